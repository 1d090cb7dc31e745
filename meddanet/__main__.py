"""`python -m meddanet` is the `meddanet` command."""

import sys

from .cli import main

sys.exit(main())
