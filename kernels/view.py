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
    """Plain PyTorch statement of `view_slices`; one flag per slice."""
    images = _checked(images, scale)
    view = F.avg_pool2d(images, scale).to(dtype, memory_format=torch.channels_last)
    return view, images.flatten(1).any(1, keepdim=True).int()


def view_slices(
    images: Tensor, scale: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Averages slices over squares and tells which of them hold anything; has no gradient.

    Args:
        images: [N, C, H, W], floating point.
        scale: Side of the squares in pixels; 1: a copy.
        dtype: Of the view; sums are float32.

    Returns:
        The view [N, C, H // scale, W // scale], channels last, and flags int32 [N, T], of parts of
        each slice: all zero where the slice is. T is at least 1 and up to the executor.

    Raises:
        ValueError: If a shape, dtype or scale does not fit.
    """
    images = _checked(images, scale)
    if not len(images) or not triton_runs(images):
        return view_slices_reference(images, scale, dtype)
    from . import view_triton

    view = view_triton.new_view(images, scale, dtype)
    seen = view_triton.new_flags(images, scale)
    view_triton.run(images, view, seen, scale)
    return view, seen
