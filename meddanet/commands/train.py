"""`meddanet train`: weights of one's own."""

from __future__ import annotations

import os
from pathlib import Path

from jsonargparse import Namespace

from ..arguments import train_config
from ..messages import say
from ..training import train


def run(options: Namespace) -> int:
    """Trains, or goes on with a run."""
    if options.resume and not (Path(options.out) / "config.json").is_file():
        raise ValueError(f"{options.out}: holds no run to resume; start one without --resume")
    path = train(train_config(options))
    if int(os.environ.get("RANK", "0")) == 0:
        say(str(path))
    return 0
