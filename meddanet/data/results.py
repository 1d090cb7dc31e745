"""What a folder of results holds of a case: its files, whose they are, what their report tells."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .storage import read_small, write_bytes
from .volume import VolumeError

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


def check_kept(results: tuple[Path, Path, Path]) -> None:
    """Raises VolumeError where results would replace what must be kept."""
    if kept := kept_result(results):
        path, why = kept
        raise VolumeError(
            f"{path}: {why}; name another folder with -o, or replace it with --overwrite"
        )


def is_result(labels: Path) -> bool:
    """Tells whether a label file, there or not, is `meddanet segment`'s: its report says so.

    So does the mark of a run that was ended between the two, of the very labels that it wrote.
    """
    return has_report(labels) or _is_marked(labels)


def has_report(labels: Path) -> bool:
    """Tells whether `<case>.json` beside `<case>.nii.gz` is the report of that case."""
    return bool(report_of(labels))


def report_of(labels: Path) -> dict[str, Any]:
    """Returns the report of a label file's case; empty if there is none."""
    name = labels.name.removesuffix(".nii.gz")
    content = read_report(labels.with_name(f"{name}.json"))
    return content if content.get("case") == name else {}


def read_report(path: Path) -> dict[str, Any]:
    """Returns what a file says if it is a report of meddanet's, of whichever case; else nothing."""
    # Python gives up on JSON that is nested too deeply
    with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        content = json.loads(read_small(path))
        if content["case"] and content["versions"]["meddanet"]:
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
    """Tells whether a label file is no longer the one that its report, or a mark, tells of."""
    known = report_of(labels).get("labels_sha256")
    with suppress(OSError):
        return known not in (None, digest(labels)) and not _is_marked(labels)
    return False


@contextmanager
def marked(labels: Path, sha256: str) -> Iterator[None]:
    """Has labels with that SHA-256 count as meddanet's while their report is not there yet.

    A killed process leaves the mark. The context ends without, but where it ends between the two.

    Raises:
        VolumeError: If there can be no mark.
    """
    mark = _mark(labels)
    # what a killed run left is known until it is replaced
    write_bytes(mark, " ".join([*_marks(labels), sha256]).encode())
    try:
        yield
    finally:
        if report_of(labels).get("labels_sha256") == sha256 or not _is_marked(labels):
            mark.unlink(missing_ok=True)


def is_unfinished(labels: Path) -> bool:
    """Tells whether a run was ended while it put the results of a case in place."""
    return bool(_marks(labels))


def _is_marked(labels: Path) -> bool:
    with suppress(OSError):
        return (marks := _marks(labels)) != [] and digest(labels) in marks
    return False


def _marks(labels: Path) -> list[str]:
    # a name may leave no room for that of a mark
    with suppress(OSError, ValueError):
        return read_small(_mark(labels)).decode().split()
    return []


def _mark(labels: Path) -> Path:
    return labels.with_name(f".{labels.name}.unfinished")
