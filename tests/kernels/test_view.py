"""view_slices against averages and flags counted by hand and in float64."""

from __future__ import annotations

import pytest
import torch

from meddanet.kernels import view_slices, view_slices_reference
from meddanet.kernels.view_triton import BLOCK, FLAGS, SLICES

pytestmark = pytest.mark.usefixtures("nan_poisoning")
FUNCTIONS = (view_slices, view_slices_reference)


def seen_of(function, images, scale):
    """Whether each slice is said to hold anything."""
    seen = function(images, scale)[1]
    assert seen.dtype == torch.int32 and seen.shape == images.shape[:1]
    assert set(seen.tolist()) <= {0, 1}
    return seen.bool().tolist()


def average(images, scale):
    """The mean of each square, row by row of it, in the precision of the images."""
    height, width = (side // scale for side in images.shape[2:])
    squares = images[:, :, : height * scale, : width * scale]
    squares = squares.reshape(*images.shape[:2], height, scale, width, scale)
    total = sum(squares[:, :, :, dy, :, dx] for dy in range(scale) for dx in range(scale))
    return total / scale**2


def test_by_hand():
    image = torch.tensor([[1.0, 2, 8], [3, 6, 8], [8, 8, 8]])
    images = torch.stack([image, -image])[:, None]
    for function in FUNCTIONS:
        view, _ = function(images, 2, torch.float16)
        assert view.dtype == torch.float16 and view.flatten().tolist() == [3, -3]
        assert torch.equal(function(images, 1)[0], images)
        mean = torch.tensor([52 / 9, -52 / 9])
        torch.testing.assert_close(function(images, 3)[0].flatten(), mean)


@pytest.mark.parametrize("scale", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 1, 3, 3), (3, 4, 16, 24), (2, 5, 21, 9), (2, 4, 67, 81)],
                         ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_squares_are_averaged(shape, scale, dtype):
    images = torch.randn(shape)
    for function in FUNCTIONS:
        view, seen = function(images, scale, dtype)
        assert view.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(view, average(images, scale).to(dtype))
        torch.testing.assert_close(
            view.double(), average(images.double(), scale),
            rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps,
        )
        assert seen.all()


def test_every_pixel_is_seen():
    """One value somewhere, also where no square reaches; several programs share a slice."""
    height, width = 5, BLOCK // 4 + 3
    places = [(c, y, x) for c in (0, 1) for y in (0, 3, 4) for x in (0, width - 2, width - 1)]
    images = torch.zeros(len(places) + 1, 2, height, width)
    for image, (c, y, x) in zip(images, places, strict=False):
        image[c, y, x] = -1e-30
    assert view_slices(images, 2)[0].abs().max() <= 1e-30
    for function in FUNCTIONS:
        for scale in (1, 2):
            assert seen_of(function, images, scale) == [True] * len(places) + [False]


def test_any_part_of_any_slice():
    """More slices than are merged at a time, of more programs each; in one of them one pixel."""
    side = BLOCK * FLAGS // 8 + BLOCK // 4
    images = torch.zeros(SLICES + 3, 1, 8, side)
    for number, image in enumerate(images[1:]):
        image[0, number % 8, number * (side - 1) // (SLICES + 1)] = 1
    for function in FUNCTIONS:
        assert seen_of(function, images, 1) == [False] + [True] * (SLICES + 2)


@pytest.mark.parametrize(("value", "seen"), [
    (float("nan"), True), (float("inf"), True), (-0.0, False), (1e-45, True)
])
def test_what_is_not_zero(value, seen):
    images = torch.zeros(1, 1, 4, 4)
    images[0, 0, 3, 0] = value
    for function in FUNCTIONS:
        assert seen_of(function, images, 2) == [seen]
        expected = torch.tensor([[0, 0], [value / 4, 0]])
        assert torch.equal(function(images, 2)[0][0, 0].nan_to_num(-7), expected.nan_to_num(-7))


def test_any_layout_and_none_at_all():
    images = torch.randn(2, 3, 8, 10).contiguous(memory_format=torch.channels_last)
    for function in FUNCTIONS:
        assert torch.equal(function(images, 2)[0], average(images, 2))
        view, seen = function(images[:0], 2)
        assert view.shape == (0, 3, 4, 5) and len(seen) == 0


@pytest.mark.parametrize(("images", "scale", "message"), [
    (torch.zeros(1, 4, 4), 2, r"images must be \[N, C, H, W\] in floating point"),
    (torch.zeros(1, 1, 4, 4, dtype=torch.int32), 2, "in floating point, got torch.int32"),
    (torch.zeros(1, 1, 4, 3), 4, "scale must be 1 to 3 for images of 4x3, got 4"),
    (torch.zeros(1, 1, 4, 4), 0, "scale must be 1 to 4"),
])
def test_bad_arguments(images, scale, message):
    for function in FUNCTIONS:
        with pytest.raises(ValueError, match=message):
            function(images, scale)
