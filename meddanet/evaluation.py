"""How well label maps agree with their references, by region."""

from __future__ import annotations

import csv
import io
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from .data import (
    LABELS,
    MODALITIES,
    Case,
    Volume,
    VolumeError,
    detect_label_convention,
    load_labels,
    to_classes,
)
from .data.axes import SLIGHT_SKEW, skew
from .data.conventions import stem
from .data.nifti import load_header
from .data.results import read_report
from .data.storage import write_bytes
from .metrics import brats_regions, dice_score, surface_scores
from .pairs import Pair

# classes are numbered as the values of brats2023
REGIONS = brats_regions("brats2023")

Scores = Mapping[str, Mapping[str, float]]
Groups = Mapping[str, Sequence[int]]


def _classes(labels: np.ndarray, convention: str, path: Path) -> np.ndarray:
    try:
        return to_classes(labels, convention)
    except VolumeError as error:
        raise VolumeError(f"{path}: {error}") from error


def _classes_as_reference(labels: np.ndarray, convention: str, path: Path) -> np.ndarray:
    values = _values(labels)
    if not values <= set(LABELS[convention].values()):
        # --labels would be the reference's too
        raise VolumeError(
            f"{path}: values {listed(values)} are not those of the {convention} convention, which "
            "its reference has; name that of the predictions by --prediction-labels"
        )
    return _classes(labels, convention, path)


def compare(
    pair: Pair,
    labels: str | None = None,
    *,
    predicted: str | None = None,
    groups: Groups | None = None,
    tolerance: float = 1.0,
    empty: str = "brats",
) -> dict[str, dict[str, float]]:
    """Scores one label map by region.

    It lies on the reference's grid, in whichever voxel order it is stored.

    Without groups the regions are those of a brain tumour and each file's values follow its own
    convention: that of the report beside it, else `labels`, else the one its naming and values
    tell; a prediction without a report follows `predicted`, else its reference. A report that tells
    of other labels, the prediction's or else the reference's, makes each of them a region.

    Args:
        pair: From `find_pairs`.
        labels: Label convention of files that do not tell theirs.
        predicted: The same of predictions alone, where theirs is another than the reference's.
        groups: Region -> values in both files.
        tolerance: Of the surface Dice, in mm.
        empty: Rule for empty masks, see `dice_score`.

    Returns:
        "dice", "volume_ml", "reference_ml" and, where `edt` is installed, "hd95_mm" and
        "surface_dice", by region.

    Raises:
        VolumeError: If a side of the pair is there twice, the files do not lie on one grid, a
            convention cannot be told, a report tells one that does not exist, or the prediction's
            is a brain tumour's and the reference's is not.
    """
    if pair.doubled:
        first, second = pair.doubled
        raise VolumeError(
            f"{second}: is of case {pair.name}, as {first.name} is; expected one file per case"
        )
    reference = load_labels(pair.reference)
    # a volume only to have the prediction's grid compared with the reference's
    header = load_header(pair.reference)
    like = Volume(
        reference[None], header.get_best_affine(), header, ("labels",), "files",
        str(pair.reference),
    )
    prediction = load_labels(pair.prediction, like=like)
    if groups is None:
        own, known = _report(pair.prediction), _report(pair.reference)
        groups = _labels_told(pair, reference, own, known)
    if groups is None:
        convention = known.get("label_convention") or labels or _detected(pair, reference)
        reference = _classes(reference, convention, pair.reference)
        if told := own.get("label_convention") or predicted:
            prediction = _classes(prediction, told, pair.prediction)
        else:
            prediction = _classes_as_reference(prediction, convention, pair.prediction)
    regions = groups or REGIONS
    scores = {"dice": dice_score(prediction, reference, labels=regions, empty=empty)}
    if find_spec("edt"):
        _warn_of_skew(pair.reference, like.affine)
        scores |= surface_scores(
            prediction, reference, tolerance, labels=regions, spacing=like.spacing, empty=empty
        )
    for name, array in (("volume_ml", prediction), ("reference_ml", reference)):
        scores[name] = {
            region: round(int(np.isin(array, values).sum()) * like.voxel_ml, 3)
            for region, values in regions.items()
        }
    return scores


def _warn_of_skew(path: Path, affine: np.ndarray) -> None:
    if (angle := skew(affine)) > SLIGHT_SKEW:
        warnings.warn(
            f"{path}: its voxel axes are {angle:.0f} degrees off right angles, so that HD95 and "
            "surface Dice, which go by voxel size, are not exact; resample scan and label maps to "
            "right angles", stacklevel=3,
        )


def _labels_told(
    pair: Pair, reference: np.ndarray, own: dict[str, Any], known: dict[str, Any]
) -> Groups | None:
    """Returns a region for each label where a report tells of others than a brain tumour's."""
    if own.get("label_convention") == "values":
        path, values = pair.prediction, own.get("label_values")
    elif known.get("label_convention") == "values":
        path, values = pair.reference, known.get("label_values")
        if convention := own.get("label_convention"):
            raise VolumeError(
                f"{pair.prediction}: holds the labels of {convention} by the report beside it, "
                f"{path} others; name what they share with --groups"
            )
    else:
        return None
    told = isinstance(values, dict) and all(isinstance(v, int) for v in values.values())
    if not told or not values:
        raise VolumeError(f"{path}: the report beside it names no label_values; see --groups")
    held = _values(reference)
    if held and held.isdisjoint(values.values()):
        # regions in neither file would score as perfect
        raise VolumeError(
            f"{path}: the report beside it tells of labels {listed(set(values.values()))}, the "
            f"reference has others ({listed(held)}); name regions with --groups"
        )
    if untold := held - set(values.values()):
        # as where training has merged labels into one
        warnings.warn(
            f"label values {listed(untold)} of references are none that the reports know, and "
            "count as background; see --groups", stacklevel=2,
        )
    return {name: (value,) for name, value in values.items()}


def parse_groups(text: str) -> dict[str, tuple[int, ...]]:
    """Reads "WT=1,2,4;TC=1,4" as region -> label values.

    Raises:
        ValueError: If it is not of that form.
    """
    groups = {}
    for part in text.split(";"):
        match = re.fullmatch(r"\s*([^=]+?)\s*=\s*(\d+(?:\s*,\s*\d+)*)\s*", part)
        if not match:
            raise ValueError(f"groups hold {part!r}, expected a form such as WT=1,2,4;TC=1,4")
        if match[1] in groups:
            raise ValueError(f"groups name {match[1]} twice; expected every region once")
        groups[match[1]] = tuple(int(value) for value in match[2].split(","))
    return groups


def check_groups(groups: Groups, pairs: Sequence[Pair]) -> None:
    """Compares groups with the label values in all files; warns of values that lie in none.

    Files that cannot be read are left to `compare`.

    Raises:
        VolumeError: If a group occurs in no file: it would score as perfect.
    """
    contents: list[set[int]] = []
    for path in {path for pair in pairs for path in (pair.prediction, pair.reference)}:
        with suppress(ValueError, OSError, MemoryError):
            contents.append(_values(load_labels(path)))
    found = set().union(*contents)
    absent = [
        f"{name}={','.join(map(str, values))}"
        for name, values in groups.items() if found.isdisjoint(values)
    ]
    if absent and contents:
        raise VolumeError(
            f"--groups {';'.join(absent)}: found in no prediction and no reference, which hold "
            f"the label values {listed(found)}; name those, or leave the group out"
        )
    if ungrouped := found.difference(*groups.values()):
        warnings.warn(f"label values in no group of --groups: {listed(ungrouped)}", stacklevel=2)


def listed(items: Iterable[Any]) -> str:
    """Returns the first ten of the items, sorted, in one line, and how many more there are."""
    ordered = [str(item) for item in sorted(items)]
    more = f" and {len(ordered) - 10} more" if len(ordered) > 10 else ""
    return (", ".join(ordered[:10]) or "none") + more


def _report(path: Path) -> dict[str, Any]:
    """Returns what meddanet's report beside a label file says; nothing without one."""
    report = path.with_name(f"{stem(path)}.json")
    content = read_report(report)
    convention, known = content.get("label_convention"), [*LABELS, "values"]
    if convention is not None and convention not in known:
        raise VolumeError(
            f"{report}: label_convention is {convention!r}, expected one of {', '.join(known)}; "
            "without the file, --labels or --prediction-labels tell it"
        )
    return content


def _detected(pair: Pair, labels: np.ndarray) -> str:
    """Returns the brain tumour convention of a reference; an error tells how to do without."""
    values = _values(labels)
    if not _may_be_brain_tumour(pair.case, values):
        raise VolumeError(
            f"{pair.reference}: its label values ({listed(values)}) are no brain tumour's; "
            "name regions with --groups, such as 'liver=1,2;tumour=2', or the convention of brain "
            "tumours by --labels"
        )
    try:
        # without labels all conventions say the same
        return detect_label_convention(pair.case, values) if values else "brats2021"
    except VolumeError as error:
        raise VolumeError(f"{error}; see --labels and --groups") from error


def _may_be_brain_tumour(case: Case, values: set[int]) -> bool:
    """Tells whether modalities and, where the naming does not, values are those of one."""
    if case.convention == "msd":
        # the Decathlon names ten tasks alike, and one T1 or T2 may be of anything
        return set(case.modalities) == set(MODALITIES)
    known = case.convention in LABELS or any(values <= {*v.values()} for v in LABELS.values())
    return known and set(case.modalities) <= set(MODALITIES)


def _values(labels: np.ndarray) -> set[int]:
    """Returns the label values that occur, without the background's 0."""
    return set(np.unique(labels[labels != 0]).tolist())


def mean_scores(table: Mapping[str, Scores]) -> dict[str, dict[str, float]]:
    """Returns the mean over cases of every measure and region.

    NaN, which the rule "nan" gives where a structure is in neither, does not count; infinity, where
    it was missed, does.
    """
    return {
        measure: {r: fmean(scores) if scores else math.nan for r, scores in regions.items()}
        for measure, regions in _by_region(table).items()
    }


def counted_scores(table: Mapping[str, Scores]) -> dict[str, dict[str, int]]:
    """Returns over how many cases each mean of `mean_scores` is taken."""
    return {
        measure: {region: len(scores) for region, scores in regions.items()}
        for measure, regions in _by_region(table).items()
    }


def _by_region(table: Mapping[str, Scores]) -> dict[str, dict[str, list[float]]]:
    """Returns the scores of all cases by measure and region, without NaN."""
    rows = list(table.values())
    regions = list(dict.fromkeys(region for row in rows for region in row["dice"]))

    def scores(measure: str, region: str) -> list[float]:
        found = (row[measure].get(region, math.nan) for row in rows)
        return [score for score in found if not math.isnan(score)]

    return {measure: {r: scores(measure, r) for r in regions} for measure in rows[0]}


def json_ready(value: Any) -> Any:
    """Returns nested scores with NaN as None and infinity as "inf": JSON has no such numbers."""
    if isinstance(value, Mapping):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf"
    return value


def write_csv(table: Mapping[str, Scores], path: Path, missing: Sequence[str] = ()) -> None:
    """Writes one row per case, one column per measure and region; cases without scores at the end.

    Args:
        table: Scores by case.
        path: Of the file.
        missing: Cases that have none: their cells are empty.

    Raises:
        VolumeError: If the file cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    columns = [(m, region) for m, regions in mean_scores(table).items() for region in regions]
    writer.writerow(["case", *(f"{measure}_{region}" for measure, region in columns)])
    for name, scores in table.items():
        cells = (scores[measure].get(region, "") for measure, region in columns)
        writer.writerow([_as_text(name), *cells])
    writer.writerows([_as_text(name), *[""] * len(columns)] for name in missing)
    # a file's name may hold bytes that are no text
    write_bytes(path, text.getvalue().encode(errors="surrogateescape"))


def _as_text(name: str) -> str:
    """Returns a cell that no spreadsheet takes for a formula."""
    return f"'{name}" if name.startswith(("=", "+", "-", "@", "\t", "\r")) else name
