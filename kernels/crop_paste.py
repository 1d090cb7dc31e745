"""Differentiable crop at a fractional offset, and its transpose, the paste.

    crop:   out(i, j) = bilinear sample of the image at (i, j) + offset
    paste:  out(i, j) = bilinear sample of the patch at (i, j) - offset

`offset` is (y, x), in pixels, of the patch's top-left corner in the image, pixel-centre convention;
samples outside are zero. With offset = base + fraction, the same for every pixel of a sample,

    crop(i)  = (1 - fraction) image(i + base) + fraction image(i + base + 1)
    paste(k) = (1 - fraction) patch(k - base) + fraction patch(k - base - 1)

along each axis. The weights are the same, so each op is the other's exact transpose: the gradient
of one by its tensor is the other, a gather that repeats bit for bit. The gradient of both by the
offset is that of <crop(image, offset), patch>, with the incoming gradient as the missing partner.
A tap of weight 0 is not read: at whole pixels a crop is a copy and crop(paste(p)) = p.

Bilinear sampling has kinks at whole pixels. There the derivative by the offset is the one from the
right, but the one from the left where patch and image end together, so that no pixel beyond the
far edge pulls on the offset. Replaces the affine_grid + grid_sample pairs of Med-DANet V2, 3.3.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from .backend import triton_runs
from .layout import as_pair, memory_format, wide_dtype


def _empty(input: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Allocates [N, C, height, width], channels last where the input's channels lie so."""
    shape = (*input.shape[:2], *size)
    layout = memory_format(input)
    return torch.empty(shape, dtype=dtype, device=input.device, memory_format=layout)


def _split(
    offset: Tensor, image_size: tuple[int, int], patch_size: tuple[int, int]
) -> tuple[list[list[int]], Tensor]:
    """Returns (base, fraction) of offset [N, 2]; the whole numbers as lists, 0 for NaN."""
    image, patch = offset.new_tensor(image_size), offset.new_tensor(patch_size)
    # beyond this nothing is inside, and an int still holds it
    offset = offset.clamp(-patch - 1, image)
    base = offset.detach().floor()
    base = torch.where(offset == image - patch, base - 1, base)
    return base.nan_to_num().long().tolist(), offset - base


def overlap(shift: int, length_out: int, length_in: int) -> tuple[slice, slice]:
    """Returns the outputs i that have an input i + shift, and these inputs."""
    start = min(max(0, -shift), length_out)
    stop = max(start, min(length_out, length_in - shift))
    return slice(start, stop), slice(start + shift, stop + shift)


def _shift_reference(input: Tensor, offset: Tensor, size: tuple[int, int], paste: bool) -> Tensor:
    """Sums, sample by sample, the one to four shifted copies that make up the output."""
    source_size = (input.shape[2], input.shape[3])
    wide = offset.to(wide_dtype(input))
    base, fraction = _split(wide, *((size, source_size) if paste else (source_size, size)))
    shares = torch.stack([1 - fraction, fraction])
    # a tap of weight 0 still carries a derivative
    used = ((shares != 0) | offset.requires_grad).tolist()
    copies = not bool((fraction % 1).any())
    output = _empty(input, size, input.dtype if copies else wide.dtype).zero_()
    for n, tap_y, tap_x in product(range(len(base)), range(2), range(2)):
        if not (used[tap_y][n][0] and used[tap_x][n][1]):
            continue
        shift_y, shift_x = base[n][0] + tap_y, base[n][1] + tap_x
        sign = -1 if paste else 1
        rows, rows_in = overlap(sign * shift_y, size[0], source_size[0])
        columns, columns_in = overlap(sign * shift_x, size[1], source_size[1])
        taps = input[n, :, rows_in, columns_in].to(output.dtype)
        if copies and not offset.requires_grad:
            output[n, :, rows, columns] = taps
        else:
            output[n, :, rows, columns] += shares[tap_y, n, 0] * shares[tap_x, n, 1] * taps
    nan = fraction.isnan().any(1)
    if bool(nan.any()):
        # in place, so that it stays laid out as without one
        output.masked_fill_(nan[:, None, None, None], torch.nan)
    return output.to(input.dtype)


def _offset_gradient_reference(image: Tensor, patch: Tensor, offset: Tensor) -> Tensor:
    """Returns d/d offset of <crop(image, offset), patch>, [N, 2]."""
    wide = offset.to(wide_dtype(image))
    height, width = patch.shape[2:]
    base, fraction = _split(wide, (image.shape[2], image.shape[3]), (height, width))
    gradient = torch.zeros_like(wide)
    for n, (base_y, base_x) in enumerate(base):
        rows, rows_in = overlap(base_y, height + 1, image.shape[2])
        columns, columns_in = overlap(base_x, width + 1, image.shape[3])
        taps = wide.new_zeros(image.shape[1], height + 1, width + 1)
        taps[:, rows, columns] = image[n, :, rows_in, columns_in].to(wide.dtype)
        down, right = taps.diff(dim=1), taps.diff(dim=2)
        slope_y = torch.lerp(down[:, :, :-1], down[:, :, 1:], fraction[n, 1])
        slope_x = torch.lerp(right[:, :-1], right[:, 1:], fraction[n, 0])
        gradient[n, 0] = (slope_y * patch[n]).sum()
        gradient[n, 1] = (slope_x * patch[n]).sum()
    return gradient


def bilinear_crop_reference(input: Tensor, offset: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Plain PyTorch statement of `bilinear_crop`, differentiated by autograd."""
    _check("bilinear_crop", input, offset, size)
    return _shift_reference(input, offset, as_pair(size), paste=False)


def affine_paste_reference(patch: Tensor, offset: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Plain PyTorch statement of `affine_paste`, differentiated by autograd."""
    _check("affine_paste", patch, offset, size)
    return _shift_reference(patch, offset, as_pair(size), paste=True)


@torch.library.custom_op("meddanet::bilinear_shift", mutates_args=())
def bilinear_shift(input: Tensor, offset: Tensor, height: int, width: int, paste: bool) -> Tensor:
    """Crop or paste of [N, C, H, W] into [N, C, height, width]."""
    if triton_runs(input):
        from .crop_paste_triton import shift

        output = _empty(input, (height, width), input.dtype)
        return shift(input, offset.to(wide_dtype(input)), output, paste)
    return _shift_reference(input.detach(), offset.detach(), (height, width), paste)


@torch.library.custom_op("meddanet::bilinear_offset_gradient", mutates_args=())
def bilinear_offset_gradient(image: Tensor, patch: Tensor, offset: Tensor) -> Tensor:
    """Derivative by the offset of <crop(image, offset), patch>: [N, 2], float32 or float64."""
    if triton_runs(image):
        from .crop_paste_triton import offset_gradient

        return offset_gradient(image, patch, offset.to(wide_dtype(image)))
    return _offset_gradient_reference(image.detach(), patch.detach(), offset.detach())


@bilinear_shift.register_fake
def _(input, offset, height, width, paste):
    return _empty(input, (height, width), input.dtype)


@bilinear_offset_gradient.register_fake
def _(image, patch, offset):
    return offset.new_empty(offset.shape, dtype=wide_dtype(image))


def _save(ctx, inputs, output):
    input, offset, _, _, ctx.paste = inputs
    ctx.size = input.shape[2:]
    ctx.save_for_backward(input if ctx.needs_input_grad[1] else None, offset)


def _backward(ctx, grad):
    input, offset = ctx.saved_tensors
    grad_input = grad_offset = None
    if ctx.needs_input_grad[0]:
        grad_input = bilinear_shift(grad, offset, *ctx.size, not ctx.paste)
    if ctx.needs_input_grad[1]:
        pair = (grad, input) if ctx.paste else (input, grad)
        grad_offset = bilinear_offset_gradient(*pair, offset).to(offset.dtype)
    return grad_input, grad_offset, None, None, None


bilinear_shift.register_autograd(_backward, setup_context=_save)


def _check(name: str, input: Tensor, offset: Tensor, size: int | tuple[int, int]) -> None:
    if input.dim() != 4:
        raise ValueError(f"{name} takes a [N, C, H, W] tensor, got shape {list(input.shape)}")
    if not input.is_floating_point():
        raise ValueError(f"{name} takes a floating-point tensor, got {input.dtype}")
    if min(input.shape[2:]) < 1:
        raise ValueError(f"{name} needs H and W of at least 1, got shape {list(input.shape)}")
    if offset.shape != (input.shape[0], 2):
        raise ValueError(
            f"offset must be [N, 2] = [{input.shape[0]}, 2], (y, x) in pixels, "
            f"got shape {list(offset.shape)}"
        )
    if min(as_pair(size)) < 1:
        raise ValueError(f"size must be positive, got {size}")


def bilinear_crop(input: Tensor, offset: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Cuts a patch out of every image at its own, possibly fractional, offset.

    Args:
        input: [N, C, H, W], float16, bfloat16, float32 (arithmetic in float32) or float64.
        offset: [N, 2], (y, x), in pixels, of the top-left corner, pixel-centre convention.
        size: P or (height, width) of the patch; may exceed the image.

    Returns:
        [N, C, P, P]: pixel (i, j) is the bilinear sample of the input at (i, j) + offset, zero
        outside. Differentiable in input and offset. A NaN offset gives NaN, a huge one zeros.
        Channels lie last where the input's do.

    Raises:
        ValueError: If a shape or dtype is not as above.

    Source: Med-DANet V2, section 3.3 (the crop of AdaFocus V2 at unit scale).
    """
    _check("bilinear_crop", input, offset, size)
    return bilinear_shift(input, offset, *as_pair(size), False)


def affine_paste(patch: Tensor, offset: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Writes every patch into a zero canvas at its own, possibly fractional, offset.

    Args:
        patch: [N, C, P, P], float16, bfloat16, float32 (arithmetic in float32) or float64.
        offset: [N, 2], (y, x), in pixels, of the top-left corner, pixel-centre convention.
        size: (height, width) of the canvas, or an int for a square one.

    Returns:
        [N, C, H, W]: pixel (i, j) is the bilinear sample of the patch at (i, j) - offset, zero
        outside. Differentiable in patch and offset. A NaN offset gives NaN, a huge one zeros.
        Channels lie last where the patch's do.

    Raises:
        ValueError: If a shape or dtype is not as above.

    Source: Med-DANet V2, section 3.3.
    """
    _check("affine_paste", patch, offset, size)
    return bilinear_shift(patch, offset, *as_pair(size), True)
