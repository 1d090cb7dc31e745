"""Activation ratios of hand-made decisions."""

import numpy as np
import pytest

from meddanet.activation import activation_ratio

ROUTES = ("skip", "M1", "M2")


def test_shares_by_hand():
    """Two volumes of 4 and 2 slices: the first half is skipped but for one slice."""
    ratio = activation_ratio([np.array([0, 1, 2, 1]), np.array([0, 2])], ROUTES, bins=2)
    assert ratio.overall == pytest.approx([2 / 6, 2 / 6, 2 / 6])
    assert ratio.by_position == pytest.approx(np.array([[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]]))
    lines = ratio.render().splitlines()
    assert lines[0].split() == ["position", "skip", "M1", "M2"]
    assert lines[1].split() == ["0-", "50", "%", "66.7", "33.3", "0.0"]
    assert lines[-1].split() == ["all", "33.3", "33.3", "33.3"]


def test_windows_count_one_by_one_at_their_slices_position():
    decisions = np.array([[0, 0, 0, 1], [2, 2, 2, 2]])
    ratio = activation_ratio([decisions], ROUTES, bins=2)
    assert ratio.by_position == pytest.approx(np.array([[0.75, 0.25, 0], [0, 0, 1]]))
    assert ratio.overall == pytest.approx([3 / 8, 1 / 8, 4 / 8])


def test_a_short_volume_leaves_bins_empty():
    ratio = activation_ratio([np.array([1, 0])], ROUTES, bins=4)
    assert np.isnan(ratio.by_position[[1, 3]]).all()
    assert ratio.by_position[[0, 2]].tolist() == [[0, 1, 0], [1, 0, 0]]


def test_no_decisions_are_an_error():
    with pytest.raises(ValueError, match="no decisions were given"):
        activation_ratio([], ROUTES)
