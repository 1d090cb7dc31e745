"""What a network is shown of slices, worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meddanet.build import build_med_danet_v2
from meddanet.data import Volume
from meddanet.frame import Frame, frame_of
from meddanet.predictor import Prediction, VolumePredictor
from meddanet.routing import Segmentation

CANVAS, CENTRE = (48, 64), (22.0, 35.5)


def slices(size: tuple[int, int], rows: tuple[int, int], columns: tuple[int, int]) -> torch.Tensor:
    """Two slices of two channels that are 1 in a box, from the first to before the last."""
    found = torch.zeros(2, 2, *size)
    found[1, 0, slice(*rows), slice(*columns)] = 1
    return found


@pytest.mark.parametrize(("size", "expected"), [
    ((48, 64), (48, 64)), ((41, 70), (48, 72)), ((9, 5), (16, 16)),
], ids=str)
def test_without_a_canvas_slices_are_padded_at_their_ends(size, expected):
    assert frame_of(torch.zeros(2, 1, *size), 8, 16) == Frame(0, 0, *expected)


@pytest.mark.parametrize(("size", "rows", "columns", "expected"), [
    # as in training, or off by less than a fifteenth of a side: as they are
    ((48, 64), (2, 42), (16, 55), (0, 0, 48, 64)),
    ((48, 64), (5, 45), (19, 60), (0, 0, 48, 64)),
    # middle at (39, 11): 17 too low, 24.5 too far left
    ((48, 64), (30, 48), (2, 20), (17, -24, 48, 64)),
    # smaller and larger slices: middle at (15, 20) and (100, 60)
    ((30, 40), (0, 30), (0, 40), (-7, -16, 48, 64)),
    ((200, 90), (90, 110), (40, 80), (78, 24, 48, 64)),
    # a frame holds all, whatever that does to the middle
    ((96, 96), (40, 87), (20, 80), (40, 16, 48, 64)),
    # what does not fit makes it larger
    ((96, 96), (10, 70), (20, 40), (10, -6, 64, 64)),
], ids=str)
def test_the_middle_lies_where_it_lay_in_training(size, rows, columns, expected):
    # one slice in eight is looked at where nothing is out of place
    given = slices(size, rows, columns).flip(0)
    assert frame_of(given, 8, 16, CANVAS, CENTRE) == Frame(*expected)


@pytest.mark.parametrize("size", [(48, 64), (90, 80)], ids=str)
def test_strays_move_nothing(size):
    """A few pixels that were not taken away with the skull."""
    body = slices(size, (10, 40), (20, 50)).flip(0)
    expected = frame_of(body, 8, 16, CANVAS, CENTRE)
    body[:, 0, size[0] - 1, [0, 1, size[1] - 2]] = 1
    assert frame_of(body, 8, 16, CANVAS, CENTRE) == expected
    # where there is nothing else they are the body
    alone = torch.zeros(1, 1, *size)
    alone[0, 0, 3, 60] = 1
    frame = frame_of(alone, 8, 16, CANVAS, CENTRE)
    assert frame.take(alone).sum() == 1


def test_nothing_to_be_seen_has_its_middle_in_the_middle():
    assert frame_of(torch.zeros(1, 1, 100, 64), 8, 16, CANVAS) == Frame(26, 0, 48, 64)


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(9, 90), st.integers(9, 90)), st.integers(0, 2**32 - 1), st.booleans()
)
def test_a_frame_loses_nothing(size, seed, known):
    rng = np.random.default_rng(seed)
    image = torch.zeros(3, 1, *size)
    for _ in range(rng.integers(0, 4)):
        y, x = (rng.integers(side - 8) for side in size)
        image[rng.integers(3), 0, y : y + 9, x : x + 9] = 1
    frame = frame_of(image, 8, 16, CANVAS if known else None, CENTRE)
    shown = frame.take(image)
    assert shown.shape == (3, 1, frame.height, frame.width) and not (frame.height | frame.width) % 8
    assert torch.equal(frame.put_back(shown[:, 0], size), image[:, 0])


def test_margins_change_no_label():
    """A brain with any margin, or in the corner, is shown as in the slices of training."""
    model = build_med_danet_v2("unet-12", in_channels=1, crop_sizes=(16,))
    model.metadata = {"modalities": ["flair"], "canvas": [48, 64], "centre": [22, 35]}
    predictor = VolumePredictor(model, "cpu", executor="eager")
    brain = np.random.default_rng(0).uniform(50, 200, (1, 30, 40, 3)).astype(np.float32)
    shown = []

    def thresholds(slices: torch.Tensor) -> Segmentation:
        """Two crops and a whole slice, labelled by intensity."""
        shown.append(slices)
        image = slices[:, 0]
        labels = (2 * image + 1).clamp(0, 3).to(torch.uint8) * (image != 0)
        offsets = torch.tensor([[5.0, 6], [8, 20], [0, 0]])
        return Segmentation(labels, torch.tensor([1, 1, 2]), offsets, torch.full((3, 4), 8))

    predictor._segment = thresholds

    def predict(top: int, bottom: int, left: int, right: int) -> tuple[Prediction, np.ndarray]:
        data = np.pad(brain, ((0, 0), (top, bottom), (left, right), (0, 0)))
        # its axes are those of slices already
        axes = np.diag([-1.0, -1, 1, 1])
        result = predictor.predict(Volume(data, axes, None, ("flair",), "files", "x"))
        return result, result.labels[top : top + 30, left : left + 40]

    usual, labels = predict(7, 11, 15, 9)
    assert set(np.unique(labels)) == {0, 1, 2, 4} and usual.offsets.tolist()[1] == [8, 20]
    for margins in ((0, 0, 0, 0), (100, 3, 0, 50), (30, 5, 40, 0)):
        found, own = predict(*margins)
        torch.testing.assert_close(shown[-1], shown[0])
        np.testing.assert_array_equal(own, labels)
        assert np.count_nonzero(found.labels) == np.count_nonzero(labels)
        moved = np.array([margins[0] - 7, margins[2] - 15])
        np.testing.assert_array_equal(found.offsets, [[5, 6] + moved, [8, 20] + moved, [0, 0]])
        assert found.cost == usual.cost


def test_more_than_a_body_is_warned_of():
    model = build_med_danet_v2("unet-12", in_channels=1, crop_sizes=(16,))
    model.metadata = {"modalities": ["flair"], "canvas": [48, 64], "centre": [22, 35.5]}
    predictor = VolumePredictor(model, "cpu", executor="eager")
    data = np.random.default_rng(0).uniform(1, 2, (1, 60, 70, 2)).astype(np.float32)
    full = Volume(data, np.eye(4), None, ("flair",), "files", "x")
    with pytest.warns(UserWarning, match="x: .* needs slices of 64 x 72 pixels, .* 48 x 64;"):
        predictor.predict(full)
    small = replace(full, data=full.data[:, :47, :64])
    predictor.predict(small)
