"""Differentiable crop at a fractional offset, and its transpose, the paste.

    crop:   out(i, j) = sum over the 4 neighbours of  (i, j) + offset  in the image
    paste:  out(i, j) = sum over the 4 neighbours of  (i, j) - offset  in the patch

`offset` is (y, x), in pixels, of the top-left corner, pixel-centre convention; samples outside are
zero. The fraction of the offset is the same for every pixel of a sample, so each output pixel is
four taps with constant weights: (1-fy)(1-fx), (1-fy)fx, fy(1-fx), fy fx.

Each op is the other's transpose: the gradient of crop by the image is paste, the gradient of paste
by the patch is crop. Both are gathers, so they repeat bit for bit. At integer offsets
crop(paste(p)) = p. Replaces the affine_grid + grid_sample pairs of Med-DANet V2, section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor


def as_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Returns (height, width) of an int or a pair."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _check(name: str, input: Tensor, offset: Tensor, size: int | tuple[int, int]) -> None:
    if input.dim() != 4:
        raise ValueError(f"{name} takes a [N, C, H, W] tensor, got shape {list(input.shape)}")
    if offset.shape != (input.shape[0], 2):
        raise ValueError(
            f"offset must be [N, 2] = [{input.shape[0]}, 2], (y, x) in pixels, "
            f"got shape {list(offset.shape)}"
        )
    if min(as_pair(size)) < 1:
        raise ValueError(f"size must be positive, got {size}")


def _axis_weights(offset: Tensor, length_out: int, length_in: int) -> Tensor:
    """Returns [N, length_out, length_in]: row i holds the two taps of coordinate i + offset."""
    out = torch.arange(length_out, device=offset.device, dtype=offset.dtype)
    coordinate = out[None, :, None] + offset[:, None, None]
    inside = torch.arange(length_in, device=offset.device, dtype=offset.dtype)
    return (1 - (coordinate - inside).abs()).clamp_min(0)


def _shift_reference(input: Tensor, shift: Tensor, size: tuple[int, int]) -> Tensor:
    """Samples `input` at (i, j) + shift for every output pixel (i, j) of `size`."""
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    shift = shift.to(wide)
    rows = _axis_weights(shift[:, 0], size[0], input.shape[2])
    columns = _axis_weights(shift[:, 1], size[1], input.shape[3])
    taps = torch.matmul(torch.matmul(rows[:, None], input.to(wide)), columns[:, None].transpose(2, 3))
    return taps.to(input.dtype)


def bilinear_crop_reference(input: Tensor, offset: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Plain PyTorch statement of `bilinear_crop`: two banded matrix products, autograd's gradient."""
    _check("bilinear_crop", input, offset, size)
    return _shift_reference(input, offset, as_pair(size))


def affine_paste_reference(patch: Tensor, offset: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Plain PyTorch statement of `affine_paste`: two banded matrix products, autograd's gradient."""
    _check("affine_paste", patch, offset, size)
    return _shift_reference(patch, -offset, as_pair(size))


def bilinear_crop(input: Tensor, offset: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Cuts a patch out of every image at its own, possibly fractional, offset.

    Args:
        input: [N, C, H, W], float16, bfloat16, float32 or float64.
        offset: [N, 2], (y, x), in pixels, of the top-left corner, pixel-centre convention.
        size: P or (height, width) of the patch; may exceed the image.

    Returns:
        [N, C, P, P]: pixel (i, j) is the bilinear sample of the input at (i, j) + offset, zero
        outside. Differentiable in input and offset. A NaN offset gives NaN, a huge one zeros.

    Raises:
        ValueError: If a shape is not as above.

    Source: Med-DANet V2, section 3.3 (the crop of AdaFocus V2 at unit scale).
    """
    return bilinear_crop_reference(input, offset, size)


def affine_paste(patch: Tensor, offset: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Writes every patch into a zero canvas at its own, possibly fractional, offset.

    Args:
        patch: [N, C, P, P], float16, bfloat16, float32 or float64.
        offset: [N, 2], (y, x), in pixels, of the top-left corner, pixel-centre convention.
        size: (height, width) of the canvas, or an int for a square one.

    Returns:
        [N, C, H, W]: pixel (i, j) is the bilinear sample of the patch at (i, j) - offset, zero
        outside. Differentiable in patch and offset.

    Raises:
        ValueError: If a shape is not as above.

    Source: Med-DANet V2, section 3.3.
    """
    return affine_paste_reference(patch, offset, size)
