"""bilinear_crop and affine_paste against loops, grid_sample, gradcheck and each other."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from meddanet.kernels import (
    affine_paste,
    affine_paste_reference,
    bilinear_crop,
    bilinear_crop_reference,
)

pytestmark = pytest.mark.usefixtures("nan_poisoning")

# image height and width, patch height and width, one offset per sample
GEOMETRIES = {
    "inside": ((13, 11), (6, 5), [(1.25, 2.5), (6.75, 5.9)]),
    "whole pixels": ((13, 11), (6, 5), [(3.0, 2.0), (0.0, 6.0)]),
    "one axis whole": ((13, 11), (6, 5), [(3.0, 2.3), (1.7, 4.0)]),
    "far edge": ((13, 11), (6, 5), [(7.0, 6.0), (0.0, 0.0)]),
    "partly outside": ((13, 11), (6, 5), [(-2.5, -1.25), (9.5, 8.75)]),
    "wholly outside": ((13, 11), (6, 5), [(-6.0, 3.0), (2.0, 11.5)]),
    "just outside": ((13, 11), (6, 5), [(-5.5, 10.5), (12.5, -4.5)]),
    "patch larger": ((4, 5), (9, 8), [(-2.5, -1.5), (0.5, -3.0)]),
    "same size": ((7, 7), (7, 7), [(0.0, 0.0), (0.5, -0.5)]),
    "one pixel": ((1, 1), (1, 1), [(0.0, 0.0), (0.25, -0.25)]),
    "beyond a block": ((37, 41), (33, 35), [(1.5, 2.25), (3.0, 5.0)]),
}
geometry = pytest.mark.parametrize("name", GEOMETRIES)
small_geometry = pytest.mark.parametrize("name", [n for n in GEOMETRIES if n != "beyond a block"])


def tensors(name, dtype=torch.float64, channels=3):
    """Image [2, C, H, W], patch [2, C, h, w], offset [2, 2] and both sizes."""
    image_size, patch_size, offsets = GEOMETRIES[name]
    image = torch.randn(2, channels, *image_size, dtype=torch.float64).to(dtype)
    patch = torch.randn(2, channels, *patch_size, dtype=torch.float64).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return image, patch, torch.tensor(offsets, dtype=wide), image_size, patch_size


def sampled_by_loops(source, shift, size):
    """Bilinear samples of `source` at (i, j) + shift in float64, zero outside, one by one."""
    source, shift = source.double(), shift.double()
    out = torch.zeros(*source.shape[:2], *size, dtype=torch.float64)
    for n, i, j in itertools.product(range(len(source)), range(size[0]), range(size[1])):
        y, x = i + shift[n, 0].item(), j + shift[n, 1].item()
        for row, column in itertools.product(
            (math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)
        ):
            if 0 <= row < source.shape[2] and 0 <= column < source.shape[3]:
                share = (1 - abs(y - row)) * (1 - abs(x - column))
                out[n, :, i, j] += share * source[n, :, row, column]
    return out


def test_crop_worked_by_hand():
    image = torch.arange(12.0).reshape(1, 1, 3, 4)
    # rows 1, 1 + 1/4 down from row 1: 4 + 0.25 * 4; columns halfway between 1 and 2
    crop = bilinear_crop(image, torch.tensor([[1.25, 1.5]]), (1, 2))
    assert crop.tolist() == [[[[6.5, 7.5]]]]
    # a quarter of the last row and half of the last column lie inside
    assert bilinear_crop(image, torch.tensor([[2.75, 3.5]]), 1).item() == 11 * 0.25 * 0.5


def test_paste_worked_by_hand():
    patch = torch.tensor([[[[8.0]]]])
    canvas = affine_paste(patch, torch.tensor([[0.25, 1.5]]), (3, 4))
    wanted = [[0, 3.0, 3.0, 0], [0, 1.0, 1.0, 0], [0, 0, 0, 0]]
    assert canvas[0, 0].tolist() == wanted


@geometry
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_are_those_of_loops(name, dtype, tolerances):
    image, patch, offset, image_size, patch_size = tensors(name, dtype)
    crop = bilinear_crop(image, offset, patch_size)
    tolerances.elementwise(crop, sampled_by_loops(image, offset, patch_size).to(dtype))
    canvas = affine_paste(patch, offset, image_size)
    tolerances.elementwise(canvas, sampled_by_loops(patch, -offset, image_size).to(dtype))


@geometry
def test_crop_is_grid_sample(name):
    image, _, offset, (height, width), (rows, columns) = tensors(name)
    # pixel centres in [-1, 1]: x' = (2 x + 1) / W - 1, so the patch spans P / W of the image
    theta = torch.zeros(2, 2, 3, dtype=torch.float64)
    theta[:, 0, 0], theta[:, 1, 1] = columns / width, rows / height
    theta[:, 0, 2] = (2 * offset[:, 1] + columns) / width - 1
    theta[:, 1, 2] = (2 * offset[:, 0] + rows) / height - 1
    grid = F.affine_grid(theta, [2, 3, rows, columns], align_corners=False)
    wanted = F.grid_sample(image, grid, "bilinear", "zeros", align_corners=False)
    torch.testing.assert_close(bilinear_crop(image, offset, (rows, columns)), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["inside", "whole pixels", "partly outside"])
def test_half_precision_is_the_float32_result_rounded_once(name, dtype, narrow):
    image, patch, offset, image_size, patch_size = tensors(name, dtype)
    for op, source, size in ((bilinear_crop, image, patch_size), (affine_paste, patch, image_size)):
        wanted = narrow(op(source.float(), offset, size), dtype)
        torch.testing.assert_close(op(source, offset, size), wanted, rtol=0, atol=0)


def test_whole_offsets_copy_exactly():
    image = torch.randn(2, 3, 9, 9)
    image[:, :, 2, 2], image[:, :, 6, 5] = math.inf, math.nan  # beside the patches, unread
    crop = bilinear_crop(image, torch.tensor([[3.0, 3.0], [3.0, 1.0]]), (3, 2))
    assert torch.equal(crop, torch.stack([image[0, :, 3:6, 3:5], image[1, :, 3:6, 1:3]]))


@pytest.mark.parametrize("offset", [(0.0, 0.0), (4.0, 1.0), (7.0, 6.0)])
def test_the_crop_of_a_paste_is_the_patch(offset):
    patch, where = torch.randn(1, 2, 6, 5), torch.tensor([offset])
    canvas = affine_paste(patch, where, (13, 11))
    assert torch.equal(bilinear_crop(canvas, where, (6, 5)), patch)
    assert canvas.count_nonzero() == patch.numel()


@geometry
def test_crop_and_paste_are_transposes(name):
    image, patch, offset, image_size, patch_size = tensors(name)
    left = (bilinear_crop(image, offset, patch_size) * patch).sum()
    right = (image * affine_paste(patch, offset, image_size)).sum()
    torch.testing.assert_close(left, right)


@pytest.mark.parametrize("number", [int, np.int64, np.uint8])
def test_size_as_a_whole_number_is_a_square(number):
    image, offset = torch.randn(1, 1, 8, 9), torch.tensor([[0.5, 1.0]])
    expected = bilinear_crop(image, offset, (4, 4))
    assert torch.equal(bilinear_crop(image, offset, number(4)), expected)
    assert torch.equal(bilinear_crop(image, offset, (number(4), number(4))), expected)
    assert affine_paste(image, offset, number(12)).shape == (1, 1, 12, 12)


@pytest.mark.parametrize("op", [bilinear_crop, affine_paste])
def test_a_nan_offset_gives_nan_in_its_sample_and_nowhere_else(op):
    source = torch.randn(3, 2, 5, 5, requires_grad=True)
    offset = torch.tensor([[0.5, 0.5], [math.nan, 1.0], [1.0, math.nan]], requires_grad=True)
    out = op(source, offset, (7, 4))
    assert out[0].isfinite().all() and out[1:].isnan().all()
    out.sum().backward()
    assert source.grad[0].isfinite().all() and source.grad[1:].isnan().all()
    assert offset.grad[0].isfinite().all() and offset.grad[1:].isnan().any(1).all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("op", [bilinear_crop, affine_paste])
def test_a_nan_offset_leaves_the_layout_as_it_is(op, layout):
    source = torch.randn(2, 4, 5, 5).contiguous(memory_format=layout)
    offset = torch.tensor([[math.nan, 0.0], [1.0, 1.0]])
    out = op(source, offset, 6)
    assert out.isnan().any() and out.is_contiguous(memory_format=layout)
    arguments = source, offset, 6, 6, op is affine_paste
    operator = torch.ops.meddanet.bilinear_shift.default
    torch.library.opcheck(operator, arguments, test_utils="test_faketensor")


@pytest.mark.parametrize("huge", [1e4, 3e9, 1e30, math.inf])
@pytest.mark.parametrize("op", [bilinear_crop, affine_paste])
def test_a_huge_offset_gives_zeros(op, huge):
    source = torch.randn(4, 2, 5, 5, requires_grad=True)
    offset = torch.tensor(
        [[huge, 0.5], [0.5, -huge], [-huge, huge], [1.5, 0.0]], requires_grad=True
    )
    out = op(source, offset, (7, 4))
    assert not out[:3].any() and out[3].any()
    out.sum().backward()
    assert not source.grad[:3].any() and not offset.grad[:3].any() and source.grad[3].any()


def test_nan_and_infinity_stay_where_they_are():
    image = torch.zeros(1, 1, 5, 5)
    image[0, 0, 2, 2] = math.inf
    crop = bilinear_crop(image, torch.tensor([[0.5, 0.0]]), 5)
    assert crop.nonzero().tolist() == [[0, 0, 1, 2], [0, 0, 2, 2]]


@pytest.mark.parametrize("shape", [(0, 3, 5, 5), (2, 0, 5, 5)])
@pytest.mark.parametrize("op", [bilinear_crop, affine_paste])
def test_empty(op, shape):
    source = torch.zeros(shape, requires_grad=True)
    offset = torch.zeros(shape[0], 2, requires_grad=True)
    out = op(source, offset, (3, 8))
    assert out.shape == (*shape[:2], 3, 8)
    out.sum().backward()
    assert source.grad.shape == shape and not offset.grad.any()


LAYOUTS = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "window of channels last": lambda x: F.pad(x, (1, 2, 3, 0)).contiguous(
        memory_format=torch.channels_last
    )[:, :, 3:, 1:-2],
    "permuted": lambda x: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "flipped rows": lambda x: torch.stack([x, -x], -1)[..., 0],
    "expanded": lambda x: x[:, :1].expand(-1, 4, -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", [bilinear_crop, affine_paste])
def test_any_strides(op, layout):
    source = LAYOUTS[layout](torch.randn(2, 4, 6, 7))
    offset = torch.tensor([[0.5, 1.25], [-1.0, 2.0]])
    grad_out = LAYOUTS["permuted"](torch.randn(2, 4, 5, 9))
    results = []
    for values in (source, source.contiguous()):
        leaves = values.detach().requires_grad_(), offset.clone().requires_grad_()
        out = op(*leaves, (5, 9))
        results.append((out, *torch.autograd.grad(out, leaves, grad_out)))
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted)
    if "channels last" in layout:
        assert results[0][0].is_contiguous(memory_format=torch.channels_last)


def test_offsets_of_any_strides_and_dtype():
    image = torch.randn(2, 1, 6, 6)
    offset = torch.tensor([[0.5, 1.25], [2.0, 0.75]])
    wanted = bilinear_crop(image, offset, 3)
    assert torch.equal(bilinear_crop(image, offset.T.contiguous().T, 3), wanted)
    assert torch.equal(bilinear_crop(image, offset.double(), 3), wanted)
    assert torch.equal(bilinear_crop(image, offset.half(), 3), wanted)
    half = offset.half().requires_grad_()
    bilinear_crop(image, half, 3).sum().backward()
    assert half.grad.dtype == torch.float16
    whole = torch.tensor([[0, 1], [2, 3]])
    assert torch.equal(bilinear_crop(image, whole, 3), bilinear_crop(image, whole.float(), 3))


def test_a_sample_does_not_depend_on_its_neighbours():
    image, offset = torch.randn(3, 2, 8, 8), torch.tensor([[0.5, 1.5], [2.0, 1.0], [-9.0, 0.1]])
    for op in (bilinear_crop, affine_paste):
        together = op(image, offset, 5)
        for n in range(3):
            alone = op(image[n : n + 1], offset[n : n + 1], 5)
            assert torch.equal(together[n : n + 1], alone)


@pytest.mark.parametrize("name", ["inside", "partly outside", "just outside", "patch larger"])
@pytest.mark.parametrize("op", [bilinear_crop, affine_paste])
def test_gradcheck_at_fractional_offsets(name, op):
    image, patch, offset, image_size, patch_size = tensors(name, channels=2)
    offset = offset + 0.0625  # away from the kinks at whole pixels
    source, size = (image, patch_size) if op is bilinear_crop else (patch, image_size)
    leaves = source.requires_grad_(), offset.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, o: op(x, o, size), leaves, fast_mode=True)


def test_gradcheck_entry_by_entry():
    source = torch.randn(1, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    offset = torch.tensor([[0.3, -0.6]], dtype=torch.float64, requires_grad=True)
    for op in (bilinear_crop, affine_paste):
        assert torch.autograd.gradcheck(lambda x, o, op=op: op(x, o, (2, 3)), (source, offset))


@geometry
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_the_references(name, dtype, tolerances):
    image, patch, offset, image_size, patch_size = tensors(name, dtype)
    for op, reference, source, size, grad in (
        (bilinear_crop, bilinear_crop_reference, image, patch_size, patch),
        (affine_paste, affine_paste_reference, patch, image_size, image),
    ):
        results = []
        for function in (op, reference):
            leaves = source.clone().requires_grad_(), offset.clone().requires_grad_()
            results.append(torch.autograd.grad(function(*leaves, size), leaves, grad))
        for actual, wanted in zip(*results, strict=True):
            torch.testing.assert_close(actual, wanted, **SUMS[dtype])


# a float32 gradient of an offset is a sum of up to 1155 products
SUMS = {torch.float64: {}, torch.float32: {"rtol": 2e-5, "atol": 2e-5}}


@small_geometry
def test_the_gradient_by_the_offset_is_a_one_sided_derivative(name):
    """From the right, but from the left where the patch touches the image's far edge."""
    image, patch, offset, image_size, patch_size = tensors(name)
    far = torch.tensor(image_size) - torch.tensor(patch_size)
    for n, axis in itertools.product(range(2), range(2)):
        step = torch.zeros_like(offset)
        step[n, axis] = -1e-6 if offset[n, axis] == far[axis] else 1e-6
        for op, source, size, grad in (
            (bilinear_crop, image, patch_size, patch),
            (affine_paste, patch, image_size, image),
        ):
            leaf = offset.clone().requires_grad_()
            (op(source, leaf, size) * grad).sum().backward()
            here, there = ((op(source, o, size) * grad).sum() for o in (offset, offset + step))
            slope = (there - here) / step.sum()
            assert leaf.grad[n, axis].item() == pytest.approx(slope.item(), abs=1e-5)


def test_no_pixel_beyond_the_far_edge_pulls_on_the_offset():
    flat = torch.ones(1, 1, 6, 6)
    for corner in ((0.0, 0.0), (3.0, 3.0), (0.0, 3.0), (1.5, 2.5)):
        offset = torch.tensor([corner], requires_grad=True)
        bilinear_crop(flat, offset, 3).sum().backward()
        assert not offset.grad.any()


@geometry
def test_repeats_bit_for_bit(name):
    image, patch, offset, _, patch_size = tensors(name, torch.float32)
    runs = []
    for _ in range(2):
        leaves = image.clone().requires_grad_(), offset.clone().requires_grad_()
        runs.append(torch.autograd.grad(bilinear_crop(*leaves, patch_size), leaves, patch))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@given(
    st.tuples(*[st.integers(1, 9)] * 4),
    st.tuples(*[st.one_of(st.integers(-9, 9), st.floats(-12, 12, width=32))] * 2),
)
def test_any_geometry(sizes, offset):
    image = torch.randn(1, 2, *sizes[:2], dtype=torch.float64)
    patch = torch.randn(1, 2, *sizes[2:], dtype=torch.float64)
    offset = torch.tensor([offset], dtype=torch.float64)
    crop, canvas = bilinear_crop(image, offset, sizes[2:]), affine_paste(patch, offset, sizes[:2])
    torch.testing.assert_close(crop, sampled_by_loops(image, offset, sizes[2:]))
    torch.testing.assert_close((crop * patch).sum(), (image * canvas).sum())


@pytest.mark.parametrize("op", [bilinear_crop, affine_paste])
def test_wrong_arguments(op):
    image, offset = torch.zeros(2, 3, 5, 5), torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"takes a \[N, C, H, W\] tensor, got shape \[3, 5, 5\]"):
        op(image[0], offset, 3)
    for wrong in (offset[:1], offset[:, :1], offset[0]):
        with pytest.raises(ValueError, match=r"offset must be \[N, 2\] = \[2, 2\], \(y, x\)"):
            op(image, wrong, 3)
    for size in (0, (3, -1)):
        with pytest.raises(ValueError, match="size must be positive"):
            op(image, offset, size)
    with pytest.raises(ValueError, match="floating-point"):
        op(image.int(), offset, 3)
    with pytest.raises(ValueError, match="H and W of at least 1"):
        op(image[:, :, :0], offset, 3)
