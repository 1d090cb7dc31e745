"""Which label map belongs to which reference, by the names of their files."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .data import Case, VolumeError, find_cases
from .data.conventions import stem


@dataclass(frozen=True)
class Pair:
    """A label map and what it should have been; `case` is the reference's."""

    name: str
    prediction: Path
    reference: Path
    case: Case


def find_pairs(predictions: str | Path, references: str | Path) -> list[Pair]:
    """Finds the reference of every label map.

    Args:
        predictions: A label file or a folder of `<case>.nii.gz`.
        references: A label file, a folder of label files, or a folder of labelled cases.

    Raises:
        VolumeError: If a path does not exist or nothing belongs together.
    """
    predictions, references = Path(predictions), Path(references)
    for path in (predictions, references):
        if not path.exists():
            raise VolumeError(f"{path}: no such file or folder")
    if references.is_file():
        if predictions.is_dir():
            raise VolumeError(f"{references}: is one file; expected a folder, as {predictions} is")
        return [Pair(stem(predictions), predictions, references, _case_of(references))]
    files = [predictions] if predictions.is_file() else _label_files(predictions)
    known = _references(references)
    pairs = [Pair(stem(p), p, *known[stem(p)]) for p in files if stem(p) in known]
    if not pairs:
        raise VolumeError(
            f"{predictions}: holds no <case>.nii.gz for any labelled case of {references}"
        )
    return pairs


def unpaired(pairs: list[Pair], predictions: str | Path, references: str | Path) -> dict[str, list]:
    """Returns the names that folders hold on one side only, as "without_prediction" and so on."""
    paired = {pair.name for pair in pairs}
    names: dict[str, set[str]] = {"without_prediction": set(), "without_reference": set()}
    if Path(references).is_dir():
        names["without_prediction"] = set(_references(Path(references))) - paired
    if Path(predictions).is_dir():
        files = {stem(path) for path in _label_files(Path(predictions))}
        names["without_reference"] = files - paired
    return {key: sorted(value) for key, value in names.items()}


def _label_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.nii*") if not path.name.startswith("."))


def _references(folder: Path) -> dict[str, tuple[Path, Case]]:
    """Returns label file and case by name: loose label files, and what `find_cases` knows."""
    found = {
        re.sub(r"[_-]seg$", "", stem(path)): (path, Case(stem(path), path, "files"))
        for path in _label_files(folder)
    }
    with suppress(VolumeError):
        found |= {c.name: (c.label, c) for c in find_cases(folder) if c.label is not None}
    return found


def _case_of(reference: Path) -> Case:
    with suppress(VolumeError):
        for case in find_cases(reference.parent):
            if case.label == reference:
                return case
    return Case(stem(reference), reference, "files")
