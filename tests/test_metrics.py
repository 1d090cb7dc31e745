"""Dice by hand, and against an independent library's formula on random masks."""

import math

import numpy as np
import pytest
from scipy.spatial.distance import dice as scipy_dissimilarity

from meddanet.metrics import dice_score


def test_by_hand():
    a = np.array([1, 1, 1, 0, 0], bool)
    b = np.array([0, 1, 1, 1, 0], bool)
    assert dice_score(a, b) == pytest.approx(2 * 2 / 6)


def test_regions_join_values():
    a, b = np.array([0, 1, 2, 4, 4]), np.array([0, 4, 2, 4, 0])
    scores = dice_score(a, b, labels={"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)})
    assert scores == pytest.approx({"WT": 6 / 7, "TC": 4 / 5, "ET": 2 / 4})


def test_agrees_with_scipy_on_random_masks():
    random = np.random.default_rng(0)
    for share in (0.01, 0.3, 0.9):
        a, b = (random.random((7, 8, 9)) < share for _ in range(2))
        assert dice_score(a, b) == pytest.approx(1 - scipy_dissimilarity(a.ravel(), b.ravel()))


def test_the_empty_rules():
    none, some = np.zeros(4, bool), np.array([1, 0, 0, 0], bool)
    assert dice_score(none, none) == 1.0
    assert dice_score(some, none) == dice_score(none, some) == 0.0
    assert math.isnan(dice_score(none, none, empty="nan"))


@pytest.mark.parametrize(
    ("a", "b", "kwargs", "message"),
    [
        (np.zeros(3, bool), np.zeros(4, bool), {}, "shapes differ"),
        (np.zeros(3, int), np.zeros(3, int), {}, "need labels"),
        (np.zeros(3), np.zeros(3), {"labels": {"a": (1,)}}, "whole numbers"),
        (np.zeros(3, bool), np.zeros(3, bool), {"empty": "x"}, "must be one of"),
    ],
)
def test_wrong_arguments_say_so(a, b, kwargs, message):
    with pytest.raises(ValueError, match=message):
        dice_score(a, b, **kwargs)
