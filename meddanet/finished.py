"""Whether an earlier run left what a run asks for: nothing else of its name is taken for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .cases import image_digests
from .data import Case, VolumeError
from .data.results import report_of, result_paths


def is_finished(case: Case, out: Path, preview: bool) -> bool:
    """Tells whether an earlier run left everything that is asked for.

    What a report does not tell, as older ones do not, is no difference.

    Args:
        case: From `gather_cases`.
        out: Folder of the results.
        preview: Whether a picture is asked for.

    Raises:
        VolumeError: If there is a report of something else, whose results a run would replace, or
            an image cannot be read.
    """
    labels, path, picture = result_paths(case.name, out)
    report = report_of(labels)
    if not report:
        return False
    if differences := " and ".join(_differences(case, report)):
        raise VolumeError(
            f"{case.name}: {path} is {differences}; name another folder with -o, or replace it "
            "with --overwrite"
        )
    return labels.is_file() and (picture.is_file() or not preview)


def _differences(case: Case, report: dict[str, Any]) -> Iterator[str]:
    """Yields what a report is of that is not asked for."""
    known = report.get("images_sha256", {})
    # images that were not there then had no part in it
    found = image_digests(case) if known else {}
    if others := [kind for kind in known if known[kind] != found.get(kind)]:
        yield f"of other images ({', '.join(others)})"
