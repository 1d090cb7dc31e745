"""The Triton kernels that look at slices once: averaged squares, and flags; `view.py` has both."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .backend import tl, triton

# averages per program, and slices and their flags at a time; others were not tried on a GPU
BLOCK = 2048
SLICES, FLAGS = 16, 32


@triton.jit(do_not_specialize=["height", "width", "tiles"])
def view_kernel(
    images_ptr, view_ptr, flags_ptr, height, width, tiles,
    CHANNELS: tl.constexpr, SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):
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
    tl.store(flags_ptr + tl.program_id(0), tl.max(tl.max(seen, 1), 0))

    if SCALE & (SCALE - 1) == 0:
        # a power of two, whose inverse is exact
        mean = total * (1.0 / (SCALE * SCALE))
    else:
        mean = tl.div_rn(total, tl.full([BLOCK_C, BLOCK_M], SCALE * SCALE, tl.float32))
    height, width = height // SCALE, width // SCALE
    mask = (channel < CHANNELS) & ((row < height) & (column < width))[None, :]
    view_ptr += (sample * height * width + row * width + column)[None, :] * CHANNELS
    tl.store(view_ptr + channel, mean.to(view_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["samples", "tiles"])
def seen_kernel(
    flags_ptr, seen_ptr, samples, tiles, SLICES: tl.constexpr, FLAGS: tl.constexpr
):
    """Merges the flags of SLICES slices."""
    n = tl.program_id(0) * SLICES + tl.arange(0, SLICES)
    seen = tl.zeros([SLICES], tl.int32)
    for first in tl.range(0, tiles, FLAGS):
        tile = first + tl.arange(0, FLAGS)
        mask = (n < samples)[:, None] & (tile < tiles)[None, :]
        flags = tl.load(flags_ptr + n[:, None] * tiles + tile[None, :], mask=mask, other=0)
        seen |= tl.max(flags, 1)
    tl.store(seen_ptr + n, seen, mask=n < samples)


def _block(channels: int) -> dict[str, int]:
    rows = triton.next_power_of_2(channels)
    return {"BLOCK_M": max(32, BLOCK // rows), "BLOCK_C": rows}


def new_view(images: Tensor, scale: int, dtype: torch.dtype) -> Tensor:
    """Allocates the view of images [N, C, H, W]: [N, C, h, w], channels last."""
    samples, channels, height, width = images.shape
    shape = samples, height // scale, width // scale, channels
    return torch.empty(shape, dtype=dtype, device=images.device).permute(0, 3, 1, 2)


def new_flags(images: Tensor, scale: int) -> Tensor:
    """Allocates a flag for each of the T programs of each of the images [N, C, H, W]: [N, T]."""
    samples, channels, height, width = images.shape
    squares = triton.cdiv(height, scale) * triton.cdiv(width, scale)
    tiles = triton.cdiv(squares, _block(channels)["BLOCK_M"])
    return torch.empty(samples, tiles, dtype=torch.int32, device=images.device)


def run(images: Tensor, view: Tensor, flags: Tensor, scale: int) -> None:
    """Launches the pass over images, once; every element of both outputs is written.

    Args:
        images: float32 [N, C, H, W], dense.
        view: Of `new_view`.
        flags: Of `new_flags`: 1 where the part of a slice holds anything, 0 elsewhere.
        scale: Side of the squares.
    """
    channels, height, width = images.shape[1:]
    with torch.cuda.device_of(images):
        view_kernel[(flags.numel(),)](
            images, view, flags, height, width, flags.shape[1], CHANNELS=channels, SCALE=scale,
            **_block(channels), enable_fp_fusion=False,
        )


def merge(flags: Tensor, seen: Tensor) -> None:
    """Launches the merging of a slice's flags, once.

    Args:
        flags: int32 [N, T], dense.
        seen: int32 [N]: 1 where any of a slice's flags is set, 0 elsewhere.
    """
    with torch.cuda.device_of(flags):
        seen_kernel[(triton.cdiv(len(seen), SLICES),)](
            flags, seen, *flags.shape, SLICES=SLICES, FLAGS=FLAGS, num_warps=1,
            enable_fp_fusion=False,
        )


def shape_classes() -> dict[str, Callable[[], object]]:
    """Returns, by name, the launches of the shipped models; called with meta tensors by `aot.py`.

    Four channels, squares of 2 x 2, half precision; any size and number of slices.
    """
    images = torch.empty(2, 4, 240, 240, device="meta")
    view, flags = new_view(images, 2, torch.float16), new_flags(images, 2)
    seen = torch.empty(2, dtype=torch.int32, device="meta")
    return {
        "view of slices": partial(run, images, view, flags, 2),
        "flags of slices": partial(merge, flags, seen),
    }
