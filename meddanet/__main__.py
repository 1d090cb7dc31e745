"""`python -m meddanet` is the `meddanet` command."""

from .cli import entry

entry()
