"""What the decision networks see of slices: squares averaged; and whether there is anything to see.

    view[n, c, y, x] = mean of images[n, c, s * y : s * y + s, s * x : s * x + s]
    seen[n]          = any(images[n] != 0)

s is the model's `decision_scale`. Rows and columns that fill no square are not averaged but count
as seen, and so does a NaN, as in `torch.any`. Both come from one pass over the slices.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import triton_runs


def _checked(images: Tensor, scale: int) -> Tensor:
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(
            "images must be [N, C, H, W] in floating point, got "
            f"{images.dtype} {list(images.shape)}"
        )
    if not 1 <= scale <= min(images.shape[2:]):
        raise ValueError(
            f"scale must be 1 to {min(images.shape[2:])} for images of "
            f"{images.shape[2]}x{images.shape[3]}, got {scale}"
        )
    return images.detach().float().contiguous()


def view_slices_reference(
    images: Tensor, scale: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch statement of `view_slices`."""
    images = _checked(images, scale)
    view = F.avg_pool2d(images, scale).to(dtype, memory_format=torch.channels_last)
    return view, images.flatten(1).any(1).int()


def view_slices(
    images: Tensor, scale: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Averages slices over squares and tells which of them hold anything; has no gradient.

    Args:
        images: [N, C, H, W], floating point.
        scale: Side of the squares in pixels; 1: a copy.
        dtype: Of the view; sums are float32.

    Returns:
        The view [N, C, H // scale, W // scale], channels last, and int32 [N], 0 where a slice is
        all zero and 1 elsewhere.

    Raises:
        ValueError: If a shape, dtype or scale does not fit.
    """
    images = _checked(images, scale)
    if not len(images) or not triton_runs(images):
        return view_slices_reference(images, scale, dtype)
    from . import view_triton

    view = view_triton.new_view(images, scale, dtype)
    flags = view_triton.new_flags(images, scale)
    seen = flags.new_empty(len(images))
    view_triton.run(images, view, flags, scale)
    view_triton.merge(flags, seen)
    return view, seen
