"""The Triton kernel that looks at slices once: averaged squares, and flags; `view.py` has both."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .backend import tl, triton

# averages per program; other sizes were not tried on a GPU
BLOCK = 2048


@triton.jit(do_not_specialize=["height", "width", "tiles"])
def view_kernel(
    images_ptr, view_ptr, seen_ptr, height, width, tiles,
    CHANNELS: tl.constexpr, SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Averages BLOCK_M squares of one slice and stores whether a pixel of theirs is not zero."""
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    # squares that overhang the slice have no average, but are looked at
    columns = (width + SCALE - 1) // SCALE
    square = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    row, column = square // columns, square % columns
    # squares last: neighbouring threads read neighbouring pixels of a plane
    channel = tl.arange(0, BLOCK_C)[:, None]
    images_ptr += (sample * CHANNELS + channel) * height * width

    total = tl.zeros([BLOCK_C, BLOCK_M], tl.float32)
    seen = tl.zeros([BLOCK_C, BLOCK_M], tl.int32)
    for dy in tl.static_range(SCALE):
        for dx in tl.static_range(SCALE):
            y, x = row * SCALE + dy, column * SCALE + dx
            mask = (channel < CHANNELS) & ((y < height) & (x < width))[None, :]
            pixel = tl.load(images_ptr + (y * width + x)[None, :], mask=mask, other=0.0)
            total += pixel
            # a NaN differs from zero
            seen |= (pixel != 0).to(tl.int32)
    tl.store(seen_ptr + tl.program_id(0), tl.max(tl.max(seen, 1), 0))

    if SCALE & (SCALE - 1) == 0:
        # a power of two, whose inverse is exact
        mean = total * (1.0 / (SCALE * SCALE))
    else:
        mean = tl.div_rn(total, tl.full([BLOCK_C, BLOCK_M], SCALE * SCALE, tl.float32))
    height, width = height // SCALE, width // SCALE
    mask = (channel < CHANNELS) & ((row < height) & (column < width))[None, :]
    view_ptr += (sample * height * width + row * width + column)[None, :] * CHANNELS
    tl.store(view_ptr + channel, mean.to(view_ptr.dtype.element_ty), mask=mask)


def _block(channels: int) -> dict[str, int]:
    rows = triton.next_power_of_2(channels)
    return {"BLOCK_M": max(32, BLOCK // rows), "BLOCK_C": rows}


def new_view(images: Tensor, scale: int, dtype: torch.dtype) -> Tensor:
    """Allocates the view of images [N, C, H, W]: [N, C, h, w], channels last."""
    samples, channels, height, width = images.shape
    shape = samples, height // scale, width // scale, channels
    return torch.empty(shape, dtype=dtype, device=images.device).permute(0, 3, 1, 2)


def new_flags(images: Tensor, scale: int) -> Tensor:
    """Allocates the flags of images [N, C, H, W]: int32 [N, T], one per program of a slice."""
    samples, channels, height, width = images.shape
    squares = triton.cdiv(height, scale) * triton.cdiv(width, scale)
    tiles = triton.cdiv(squares, _block(channels)["BLOCK_M"])
    return torch.empty(samples, tiles, dtype=torch.int32, device=images.device)


def run(images: Tensor, view: Tensor, seen: Tensor, scale: int) -> None:
    """Launches the pass over images, once; every element of both outputs is written.

    Args:
        images: float32 [N, C, H, W], dense.
        view: Of `new_view`.
        seen: Of `new_flags`.
        scale: Side of the squares.
    """
    channels, height, width = images.shape[1:]
    with torch.cuda.device_of(images):
        view_kernel[(seen.numel(),)](
            images, view, seen, height, width, seen.shape[1], CHANNELS=channels, SCALE=scale,
            **_block(channels), enable_fp_fusion=False,
        )  # fmt: skip


def shape_classes() -> dict[str, Callable[[], object]]:
    """Returns, by name, the launches of the shipped models; called with meta tensors by `aot.py`.

    Four channels, squares of 2 x 2, half precision; any size and number of slices.
    """
    images = torch.empty(2, 4, 240, 240, device="meta")
    view, seen = new_view(images, 2, torch.float16), new_flags(images, 2)
    return {"view of slices": partial(run, images, view, seen, 2)}
