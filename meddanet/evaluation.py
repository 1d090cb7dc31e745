"""Label maps against their references: which belongs to which, and how well they agree."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from .data import (
    Case,
    Volume,
    VolumeError,
    detect_label_convention,
    find_cases,
    load_labels,
    to_classes,
)
from .data.conventions import stem
from .data.nifti import load_affine
from .data.storage import write_bytes
from .metrics import brats_regions, dice_score, hausdorff_distance_95

# classes are numbered as the values of brats2023
REGIONS = brats_regions("brats2023")

Scores = Mapping[str, Mapping[str, float]]


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


def compare(pair: Pair, labels: str | None = None) -> dict[str, dict[str, float]]:
    """Scores one label map by region, both files in their own label convention.

    A file's convention is that of the report beside it, else `labels`, else the one its naming and
    values tell; a prediction without any follows its reference.

    Args:
        pair: From `find_pairs`.
        labels: Label convention of files that do not tell theirs.

    Returns:
        "dice" and, where `edt` is installed, "hd95_mm", by region.

    Raises:
        VolumeError: If the files do not lie on one grid or a convention cannot be told.
    """
    reference = load_labels(pair.reference)
    # a volume only to have the prediction's grid compared with the reference's
    like = Volume(
        reference[None], load_affine(pair.reference), None, ("labels",), "files",
        pair.reference.name,
    )
    prediction = load_labels(pair.prediction, like=like)
    convention = _reported(pair.reference) or labels or _detected(pair.case, reference)
    truth = to_classes(reference, convention)
    found = to_classes(prediction, _reported(pair.prediction) or convention)
    scores = {"dice": dice_score(found, truth, labels=REGIONS)}
    if find_spec("edt"):
        scores["hd95_mm"] = hausdorff_distance_95(
            found, truth, labels=REGIONS, spacing=like.spacing
        )
    return scores


def _reported(path: Path) -> str | None:
    report = path.with_name(f"{stem(path)}.json")
    with suppress(OSError, ValueError, AttributeError):
        return json.loads(report.read_text()).get("label_convention")
    return None


def _detected(case: Case, labels: np.ndarray) -> str:
    values = np.unique(labels)
    # without labels all conventions say the same
    return detect_label_convention(case, values) if values.any() else "brats2021"


def mean_scores(table: Mapping[str, Scores]) -> dict[str, dict[str, float]]:
    """Returns the mean over cases of every measure and region."""
    rows = list(table.values())
    return {
        measure: {r: sum(row[measure][r] for row in rows) / len(rows) for r in regions}
        for measure, regions in rows[0].items()
    }


def write_csv(table: Mapping[str, Scores], path: Path) -> None:
    """Writes one row per case, one column per measure and region.

    Raises:
        VolumeError: If the file cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    scores = next(iter(table.values()))
    writer.writerow(["case", *(f"{m}_{region}" for m in scores for region in scores[m])])
    for name, scores in table.items():
        writer.writerow([name, *(value for row in scores.values() for value in row.values())])
    write_bytes(path, text.getvalue().encode())
