"""What several commands make of their options."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import Namespace

from ..arguments import listed_names
from ..data.conventions import stem


def channel_names(options: Namespace) -> tuple[str, ...] | None:
    """Returns what --modalities says, None where it says nothing."""
    return tuple(listed_names(options.modalities)) if options.modalities else None


def check_targets(options: Namespace, inputs: Sequence[Path]) -> None:
    """Raises ValueError unless --json and --csv, if given, can be written and are no input."""
    # a report beside a label file tells what its labels mean, a dataset.json what channels are
    read = {path.with_name(f"{stem(path)}.json").resolve() for path in inputs}
    for kind in ("json", "csv"):
        target = options.get(kind)
        if target is None:
            continue
        path = Path(target)
        if path.suffix.lower() != f".{kind}":
            raise ValueError(f"--{kind} {path}: expected a name that ends in .{kind}")
        if path.resolve() in read or path.name == "dataset.json":
            raise ValueError(f"--{kind} {path}: is the name of an input; name another file")
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise ValueError(
                f"{path}: cannot be written, expected a file in a folder that is writable"
            )
