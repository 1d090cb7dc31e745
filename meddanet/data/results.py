"""What a folder of results holds of a case: its files, whose they are, what their report tells."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

_CHUNK = 1 << 20


def result_paths(name: str, out: Path) -> tuple[Path, Path, Path]:
    """Returns the labels, the report and the picture of a case of that name."""
    labels, report, picture = (out / f"{name}{end}" for end in (".nii.gz", ".json", ".png"))
    return labels, report, picture


def kept_result(results: tuple[Path, Path, Path]) -> tuple[Path, str] | None:
    """Returns which file must not be replaced by results, and why; None if they may be written."""
    labels = results[0]
    if is_edited(labels):
        return labels, "was changed after meddanet wrote it"
    there = [path for path in results if path.exists()]
    if there and not is_result(labels):
        return there[0], "was not written by meddanet"
    return None


def is_result(labels: Path) -> bool:
    """Tells whether a label file, there or not, is `meddanet segment`'s: its report says so.

    So does the mark of a run that was ended between the two.
    """
    # a name may leave no room for that of a mark
    with suppress(OSError):
        if unfinished_mark(labels).exists():
            return True
    return has_report(labels)


def has_report(labels: Path) -> bool:
    """Tells whether `<case>.json` beside `<case>.nii.gz` is the report of that case."""
    return bool(report_of(labels))


def report_of(labels: Path) -> dict[str, Any]:
    """Returns the report of a label file's case; empty if there is none."""
    name = labels.name.removesuffix(".nii.gz")
    with suppress(OSError, ValueError, LookupError, TypeError):
        content = json.loads(labels.with_name(f"{name}.json").read_bytes())
        if content["case"] == name and content["versions"]["meddanet"]:
            return content
    return {}


def digest(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes."""
    found = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def is_edited(labels: Path) -> bool:
    """Tells whether a label file is no longer the one that its report tells of."""
    known = report_of(labels).get("labels_sha256")
    with suppress(OSError):
        return known is not None and known != digest(labels)
    return False


def unfinished_mark(labels: Path) -> Path:
    """Returns the file that is there while a case's results are being written."""
    return labels.with_name(f".{labels.name}.unfinished")
