"""Agreement of two segmentations: Dice score, 95 % Hausdorff distance and surface Dice.

Surfaces and their areas are defined in `surfaces.py`, after DeepMind's surface-distance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import numpy as np

from .data import LABELS
from .surfaces import Directed, surface_distances

# what empty masks score, per rule: (both empty, one empty)
EMPTY_DICE = {"brats": (1.0, 0.0), "nan": (math.nan, 0.0)}
EMPTY_DISTANCE = {"brats": (0.0, 373.13), "nan": (math.nan, math.inf)}

Labels = Mapping[str, Sequence[int]]


def brats_regions(convention: str = "brats2021") -> dict[str, tuple[int, ...]]:
    """Returns the label values of the BraTS regions: whole tumour, tumour core, enhancing tumour.

    Args:
        convention: "brats2021" (2017-2021: enhancing tumour is 4), "brats2023" (it is 3) or "msd".

    Raises:
        ValueError: If the convention is unknown.
    """
    if convention not in LABELS:
        raise ValueError(f"label convention is {convention!r}, expected one of {', '.join(LABELS)}")
    necrosis, oedema, enhancing = (LABELS[convention][k] for k in (1, 2, 3))
    return {"WT": (necrosis, oedema, enhancing), "TC": (necrosis, enhancing), "ET": (enhancing,)}


@overload
def dice_score(
    prediction: np.ndarray, reference: np.ndarray, *, labels: None = None, empty: str = ...
) -> float: ...


@overload
def dice_score(
    prediction: np.ndarray, reference: np.ndarray, *, labels: Labels, empty: str = ...
) -> dict[str, float]: ...


def dice_score(
    prediction: np.ndarray,
    reference: np.ndarray,
    *,
    labels: Labels | None = None,
    empty: str = "brats",
) -> float | dict[str, float]:
    """Computes the Dice coefficient 2 |A and B| / (|A| + |B|).

    Args:
        prediction: Boolean mask, or label map of any integer dtype; any shape.
        reference: The same, of the same shape.
        labels: For label maps: region name -> the values that make it up.
        empty: Rule for empty masks. "brats": 1 where both are empty, 0 where one is.
            "nan": NaN where both are, 0 where one is.

    Returns:
        A float for masks, {region: float} for label maps.

    Raises:
        ValueError: If shapes or dtypes do not fit, or the rule is unknown.
    """
    return _per_region(_dice, prediction, reference, labels, _rule(empty, EMPTY_DICE))


@overload
def hausdorff_distance_95(
    prediction: np.ndarray,
    reference: np.ndarray,
    *,
    labels: None = None,
    spacing: Sequence[float] = ...,
    empty: str = ...,
) -> float: ...


@overload
def hausdorff_distance_95(
    prediction: np.ndarray,
    reference: np.ndarray,
    *,
    labels: Labels,
    spacing: Sequence[float] = ...,
    empty: str = ...,
) -> dict[str, float]: ...


def hausdorff_distance_95(
    prediction: np.ndarray,
    reference: np.ndarray,
    *,
    labels: Labels | None = None,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    empty: str = "brats",
) -> float | dict[str, float]:
    """Computes the larger of the two directed 95th percentiles of the surface distances, in mm.

    Surface elements are weighted by area. Needs the extra `train`.

    Args:
        prediction: Boolean mask, or label map of any integer dtype; [H, W, D] in any order.
        reference: The same, of the same shape.
        labels: For label maps: region name -> the values that make it up.
        spacing: Voxel size along each axis of the arrays, in mm.
        empty: Rule for empty masks. "brats": 0 where both are empty, 373.13 (the diagonal of
            240 x 240 x 155 mm) where one is. "nan": NaN where both are, infinite where one is, so
            that a missed structure cannot drop out of a mean.

    Returns:
        A float for masks, {region: float} for label maps.

    Raises:
        ValueError: If shapes, dtypes or spacing do not fit, or the rule is unknown.
        ImportError: If `edt` is not installed.
    """
    size = _voxel_size(prediction, spacing)

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return _larger_percentile(surface_distances(a, b, size))

    return _per_region(distance, prediction, reference, labels, _rule(empty, EMPTY_DISTANCE))


@overload
def surface_dice(
    prediction: np.ndarray,
    reference: np.ndarray,
    tolerance: float = ...,
    *,
    labels: None = None,
    spacing: Sequence[float] = ...,
    empty: str = ...,
) -> float: ...


@overload
def surface_dice(
    prediction: np.ndarray,
    reference: np.ndarray,
    tolerance: float = ...,
    *,
    labels: Labels,
    spacing: Sequence[float] = ...,
    empty: str = ...,
) -> dict[str, float]: ...


def surface_dice(
    prediction: np.ndarray,
    reference: np.ndarray,
    tolerance: float = 1.0,
    *,
    labels: Labels | None = None,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    empty: str = "brats",
) -> float | dict[str, float]:
    """Computes the share of both surfaces, by area, within `tolerance` mm of the other surface.

    Needs the extra `train`.

    Args:
        prediction: Boolean mask, or label map of any integer dtype; [H, W, D] in any order.
        reference: The same, of the same shape.
        tolerance: Largest distance that counts as agreement, in mm, inclusive.
        labels: For label maps: region name -> the values that make it up.
        spacing: Voxel size along each axis of the arrays, in mm.
        empty: Rule for empty masks, as in `dice_score`.

    Returns:
        A float for masks, {region: float} for label maps.

    Raises:
        ValueError: If shapes, dtypes, spacing or tolerance do not fit, or the rule is unknown.
        ImportError: If `edt` is not installed.
    """
    size, limit = _voxel_size(prediction, spacing), _limit(tolerance)

    def agreement(a: np.ndarray, b: np.ndarray) -> float:
        return _share_within(surface_distances(a, b, size), limit)

    return _per_region(agreement, prediction, reference, labels, _rule(empty, EMPTY_DICE))


def surface_scores(
    prediction: np.ndarray,
    reference: np.ndarray,
    tolerance: float = 1.0,
    *,
    labels: Labels,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    empty: str = "brats",
) -> dict[str, dict[str, float]]:
    """Computes `hausdorff_distance_95` and `surface_dice` of label maps, each surface seen once.

    Arguments and errors are those of the two.

    Returns:
        "hd95_mm" and "surface_dice", by region.
    """
    size, limit = _voxel_size(prediction, spacing), _limit(tolerance)

    def both(a: np.ndarray, b: np.ndarray) -> Any:
        directed = surface_distances(a, b, size)
        return _larger_percentile(directed), _share_within(directed, limit)

    rules = zip(_rule(empty, EMPTY_DISTANCE), _rule(empty, EMPTY_DICE), strict=True)
    pairs: Any = _per_region(both, prediction, reference, labels, tuple(rules))
    return {
        "hd95_mm": {region: pair[0] for region, pair in pairs.items()},
        "surface_dice": {region: pair[1] for region, pair in pairs.items()},
    }


def check_tolerance(tolerance: float) -> None:
    """Raises ValueError unless `surface_dice` takes a tolerance, in mm."""
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance is a length in mm, 0 or more, got {tolerance}")


def _limit(tolerance: float) -> float:
    check_tolerance(tolerance)
    # the distances are float32: a few units in the last place still count as equal
    return tolerance * (1 + 4e-7)


def _larger_percentile(directed: tuple[Directed, Directed]) -> float:
    return max(_percentile_95(distances, areas) for distances, areas in directed)


def _share_within(directed: tuple[Directed, Directed], limit: float) -> float:
    within = sum(areas[distances <= limit].sum() for distances, areas in directed)
    return float(within / sum(areas.sum() for _, areas in directed))


def _rule(empty: str, rules: Mapping[str, tuple[float, float]]) -> tuple[float, float]:
    if empty not in rules:
        raise ValueError(f"empty must be one of {', '.join(rules)}, got {empty!r}")
    return rules[empty]


def _voxel_size(array: np.ndarray, spacing: Sequence[float]) -> tuple[float, ...]:
    if np.ndim(array) != 3:
        raise ValueError(f"surfaces need 3-D arrays, got shape {np.shape(array)}")
    if len(spacing) != 3 or not all(0 < length < math.inf for length in spacing):
        raise ValueError(f"spacing is three positive lengths in mm, got {tuple(spacing)}")
    return tuple(float(length) for length in spacing)


def _per_region(
    measure: Callable[[np.ndarray, np.ndarray], float],
    prediction: np.ndarray,
    reference: np.ndarray,
    labels: Labels | None,
    rule: Any,
) -> Any:
    """Measures the masks, or each region of the label maps; `rule` scores empty masks."""

    def score(a: np.ndarray, b: np.ndarray) -> float:
        if a.any() and b.any():
            return measure(a, b)
        both_empty, one_empty = rule
        return one_empty if a.any() or b.any() else both_empty

    a, b = np.asarray(prediction), np.asarray(reference)
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: prediction {a.shape}, reference {b.shape}")
    kinds = f"prediction is {a.dtype}, reference {b.dtype}"
    if labels is None:
        if a.dtype != bool or b.dtype != bool:
            raise ValueError(
                f"masks are boolean; label maps need labels={{name: (values)}}: {kinds}"
            )
        return score(a, b)
    if a.dtype.kind not in "iu" or b.dtype.kind not in "iu":
        raise ValueError(f"label maps hold whole numbers in an integer dtype: {kinds}")
    regions = {name: _values(name, values) for name, values in labels.items()}
    return {name: score(_region(a, values), _region(b, values)) for name, values in regions.items()}


def _values(name: str, values: Sequence[int]) -> list[int]:
    members = np.atleast_1d(values)
    if not members.size or members.dtype.kind not in "iu":
        raise ValueError(f"region {name!r} is made of whole label values, got {values!r}")
    return members.tolist()


def _region(array: np.ndarray, values: list[int]) -> np.ndarray:
    region = array == values[0]
    for value in values[1:]:
        region |= array == value
    return region


def _dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * int(np.count_nonzero(a & b)) / int(np.count_nonzero(a) + np.count_nonzero(b))


def _percentile_95(distances: np.ndarray, areas: np.ndarray) -> float:
    """Returns the smallest distance within which 95 % of the area lies."""
    order = np.argsort(distances)
    covered = np.cumsum(areas[order])
    # an area of exactly 95 % counts, whatever the sum's rounding made of it
    index = np.searchsorted(covered, 0.95 * covered[-1] * (1 - 1e-12))
    return float(distances[order[index]])
