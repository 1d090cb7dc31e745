"""`meddanet train`: weights of one's own."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import Namespace

from ..arguments import train_config
from ..distributed import launched_number
from ..heap import keep_freed_memory
from ..messages import say
from ..training import train


def run(options: Namespace) -> int:
    """Trains, or goes on with a run."""
    if options.resume and not (Path(options.out) / "config.json").is_file():
        raise ValueError(f"{options.out}: holds no run to resume; start one without --resume")
    first = launched_number("RANK", "0") == 0
    keep_freed_memory()
    path = train(train_config(options))
    if first:
        say(str(path))
    return 0
