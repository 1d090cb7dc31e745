"""Agreement of two segmentations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

# what an empty mask scores: (both empty, one empty)
EMPTY_DICE = {"brats": (1.0, 0.0), "nan": (float("nan"), 0.0)}


def dice_score(
    prediction: np.ndarray,
    reference: np.ndarray,
    *,
    labels: Mapping[str, Sequence[int]] | None = None,
    empty: str = "brats",
) -> float | dict[str, float]:
    """Returns the Dice coefficient 2 |A and B| / (|A| + |B|).

    Args:
        prediction: Boolean mask, or label map of whole numbers 0..255, any shape.
        reference: The same, of the same shape.
        labels: For label maps: region name -> the values that make it up.
        empty: Rule for empty masks: "brats" scores 1 where both are empty and 0 where one is,
            "nan" gives NaN where both are.

    Returns:
        A float for masks, {region: float} for label maps.

    Raises:
        ValueError: If shapes or types do not fit, or the rule is unknown.
    """
    prediction, reference = np.asarray(prediction), np.asarray(reference)
    if prediction.shape != reference.shape:
        raise ValueError(f"shapes differ: {prediction.shape} and {reference.shape}")
    if empty not in EMPTY_DICE:
        raise ValueError(f"empty must be one of {', '.join(EMPTY_DICE)}, got {empty!r}")
    if labels is None:
        if prediction.dtype != bool or reference.dtype != bool:
            raise ValueError(
                "label maps need labels={name: (values)}; masks must be boolean, "
                f"got {prediction.dtype} and {reference.dtype}"
            )
        return _dice(prediction, reference, empty)
    return {
        name: _dice(_region(prediction, values), _region(reference, values), empty)
        for name, values in labels.items()
    }


def _region(array: np.ndarray, values: Sequence[int]) -> np.ndarray:
    if array.dtype.kind not in "iub":
        raise ValueError(f"label maps hold whole numbers, got {array.dtype}")
    member = np.zeros(256, bool)
    member[list(values)] = True
    return member[array]


def _dice(a: np.ndarray, b: np.ndarray, empty: str) -> float:
    total = np.count_nonzero(a) + np.count_nonzero(b)
    if total == 0:
        return EMPTY_DICE[empty][0]
    if not a.any() or not b.any():
        return EMPTY_DICE[empty][1]
    return 2 * np.count_nonzero(a & b) / total
