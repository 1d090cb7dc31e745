"""The Triton kernels of the bit-width selector: sums over the image, one decision per slot.

`selector.py` has the equations. The sums of a slot lie in `sums`, float32 [M, chunks, 2, C]: of
absolute responses by x and by y.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .backend import tl, triton

# elements per step of a program, chunks per map; other sizes were not tried on a GPU
BLOCK = 2048
CHUNKS = 32
# chunks that a decision merges at a time
MERGED = 64


def new_sums(
    samples: int, channels: int, size: tuple[int, int], device: torch.device | str
) -> Tensor:
    """Allocates the sums of maps of one size; few pixels are one chunk."""
    pixels = size[0] * size[1]
    length = triton.cdiv(pixels, min(CHUNKS, triton.cdiv(pixels, 1024)))
    chunks = triton.cdiv(pixels, length)
    return torch.empty(samples, chunks, 2, channels, device=device)


@triton.jit
def _tap(ptr, row, column, height, width, stride, mask):
    """Loads [pixels, channels] of planes at positions kept inside of height x width."""
    row = tl.minimum(tl.maximum(row, 0), height - 1)
    column = tl.minimum(tl.maximum(column, 0), width - 1)
    return tl.load(ptr + (row * stride + column)[:, None], mask=mask, other=0.0)


@triton.jit(
    do_not_specialize=["height_in", "width_in", "height", "width", "chunks", "length"]
)
def gradients_kernel(
    image_ptr, offset_ptr, slots_ptr, count_ptr, sums_ptr,
    height_in, width_in, height, width, chunks, length,
    CHANNELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Sums the absolute Sobel responses of one chunk of one slot's view of its planar image."""
    slot = (tl.program_id(0) // chunks).to(tl.int64)
    if count_ptr is not None and slot >= tl.load(count_ptr):
        return
    chunk = tl.program_id(0) % chunks
    sample = slot if slots_ptr is None else tl.load(slots_ptr + slot).to(tl.int64)
    channel = tl.arange(0, BLOCK_C)
    ptr = image_ptr + sample * CHANNELS * height_in * width_in
    if offset_ptr is not None:
        y, x = tl.load(offset_ptr + 2 * slot), tl.load(offset_ptr + 2 * slot + 1)
        ptr += y * width_in + x
    ptr = ptr + channel.to(tl.int64)[None, :] * (height_in * width_in)

    by_x = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    by_y = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    end = tl.minimum((chunk + 1) * length, height * width)
    for start in tl.range(chunk * length, end, BLOCK_M):
        pixel = start + tl.arange(0, BLOCK_M)
        mask = (pixel < end)[:, None] & (channel < CHANNELS)[None, :]
        row, column = pixel // width, pixel % width
        x00 = _tap(ptr, row - 1, column - 1, height, width, width_in, mask)
        x01 = _tap(ptr, row - 1, column, height, width, width_in, mask)
        x02 = _tap(ptr, row - 1, column + 1, height, width, width_in, mask)
        x10 = _tap(ptr, row, column - 1, height, width, width_in, mask)
        x12 = _tap(ptr, row, column + 1, height, width, width_in, mask)
        x20 = _tap(ptr, row + 1, column - 1, height, width, width_in, mask)
        x21 = _tap(ptr, row + 1, column, height, width, width_in, mask)
        x22 = _tap(ptr, row + 1, column + 1, height, width, width_in, mask)
        by_x += tl.abs((x02 - x00) + 2 * (x12 - x10) + (x22 - x20))
        by_y += tl.abs((x20 - x00) + 2 * (x21 - x01) + (x22 - x02))

    sums_ptr += (slot * chunks + chunk) * 2 * CHANNELS + channel
    tl.store(sums_ptr, tl.sum(by_x, 0) / 8, mask=channel < CHANNELS)
    tl.store(sums_ptr + CHANNELS, tl.sum(by_y, 0) / 8, mask=channel < CHANNELS)


@triton.jit
def _chunk(
    moments_ptr, begin, channel, pixels, chunks, length,
    CHANNELS: tl.constexpr, MERGED: tl.constexpr,
):
    """Returns size, mean and squared deviation of MERGED chunks, size 0 beyond the last one."""
    chunk = begin + tl.arange(0, MERGED)[:, None]
    mask = (chunk < chunks) & (channel < CHANNELS)[None, :]
    offs = chunk * (2 * CHANNELS) + channel[None, :]
    mean = tl.load(moments_ptr + offs, mask=mask, other=0.0)
    deviation = tl.load(moments_ptr + CHANNELS + offs, mask=mask, other=0.0)
    size = tl.where(mask, tl.minimum(pixels - chunk * length, length), 0)
    return size.to(tl.float32), mean, deviation


@triton.jit(do_not_specialize=["view_pixels", "view_chunks", "pixels", "chunks", "length"])
def select_kernel(
    bits_ptr, sums_ptr, moments_ptr, weight_ptr, bias_ptr, widths_ptr, count_ptr, slots_ptr,
    record_ptr,
    view_pixels, view_chunks, pixels, chunks, length,
    WIDTHS: tl.constexpr, IMAGE: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr, CHUNKS: tl.constexpr, MERGED: tl.constexpr,
):
    """Merges one slot's sums and takes the width of the largest logit."""
    slot = tl.program_id(0).to(tl.int64)
    if count_ptr is not None and slot >= tl.load(count_ptr):
        return
    chunk = tl.arange(0, CHUNKS)[:, None]

    axis_channel = tl.arange(0, BLOCK_I)
    offs = chunk * (2 * IMAGE) + axis_channel[None, :]
    mask = (chunk < view_chunks) & (axis_channel < 2 * IMAGE)[None, :]
    sums = tl.load(sums_ptr + slot * view_chunks * 2 * IMAGE + offs, mask=mask, other=0.0)
    gradient = tl.sum(sums, 0) / view_pixels
    # the weights have x and y of a channel side by side
    place = axis_channel % IMAGE * 2 + axis_channel // IMAGE

    channel = tl.arange(0, BLOCK_C)
    known = channel < CHANNELS
    moments_ptr += slot * chunks * 2 * CHANNELS
    center = tl.zeros([BLOCK_C], tl.float32)
    for begin in tl.range(0, chunks, MERGED):
        size, mean, deviation = _chunk(
            moments_ptr, begin, channel, pixels, chunks, length, CHANNELS, MERGED
        )
        center += tl.sum(size * mean, 0) / pixels
    variance = tl.zeros([BLOCK_C], tl.float32)
    for begin in tl.range(0, chunks, MERGED):
        size, mean, deviation = _chunk(
            moments_ptr, begin, channel, pixels, chunks, length, CHANNELS, MERGED
        )
        apart = mean - center[None, :]
        variance += tl.sum(deviation + size * apart * apart, 0) / pixels
    spread = tl.sqrt_rn(variance)

    best, found = -float("inf"), 0
    for k in tl.static_range(WIDTHS):
        row = weight_ptr + k * (2 * IMAGE + CHANNELS)
        by_gradient = tl.load(row + place, mask=axis_channel < 2 * IMAGE, other=0.0)
        by_spread = tl.load(row + 2 * IMAGE + channel, mask=known, other=0.0)
        logit = tl.sum(by_gradient * gradient, 0) + tl.sum(by_spread * spread, 0)
        logit += tl.load(bias_ptr + k)
        found = tl.where(logit > best, k, found)
        best = tl.where(logit > best, logit, best)
    width = tl.load(widths_ptr + found)
    tl.store(bits_ptr + slot, width)
    if record_ptr is not None:
        sample = tl.load(slots_ptr + slot).to(tl.int64)
        tl.store(record_ptr + sample, width)


def gradients(
    image: Tensor, sums: Tensor, size: tuple[int, int], offset: Tensor | None,
    slots: Tensor | None, count: Tensor | None,
) -> None:
    """Launches the sums of |Sobel| over every slot's view of its image.

    Args:
        image: float32 [N, C, H, W], dense.
        sums: From `new_sums`.
        size: (height, width) of the view.
        offset: int32 [M, 2] of the view's corner, inside of the image, or None: 0.
        slots: int32 [M], the image that each slot sees, or None.
        count: int32 [1], how many slots are in use, or None: all.
    """
    samples, chunks, _, channels = sums.shape
    height, width = size
    with torch.cuda.device_of(image):
        gradients_kernel[(samples * chunks,)](
            image, offset, slots, count, sums, *image.shape[2:], height, width, chunks,
            triton.cdiv(height * width, chunks), CHANNELS=channels,
            **_blocks(channels), enable_fp_fusion=False,
        )


def select(
    bits: Tensor, sums: Tensor, moments: Tensor, weight: Tensor, bias: Tensor, widths: Tensor,
    size: tuple[int, int], pixels: int, length: int, count: Tensor | None,
    slots: Tensor | None = None, record: Tensor | None = None,
) -> None:
    """Launches the decision.

    Args:
        bits: int32 [M], written where a slot is in use.
        sums: Of `gradients`.
        moments: float32 [M, chunks, 2, C], mean and squared deviation of each chunk of the
            feature's pixels; of a convolution see `conv_int_triton.new_moments`.
        weight: float32 [K, 2 * Cin + C], dense.
        bias: float32 [K].
        widths: int32 [K].
        size: (height, width) of the view of the image.
        pixels: Of the feature.
        length: Pixels of a chunk of `moments`; the last one may have fewer.
        count: int32 [1] or None.
        slots: int32 [M], needed for `record`.
        record: int32 [N], receives each slot's width at slots[m]. None: not stored.
    """
    (samples, view_chunks, _, image), (chunks, _, channels) = sums.shape, moments.shape[1:]
    with torch.cuda.device_of(bits):
        select_kernel[(samples,)](
            bits, sums, moments, weight, bias, widths, count, slots, record,
            size[0] * size[1], view_chunks, pixels, chunks, length,
            WIDTHS=len(widths), IMAGE=image, CHANNELS=channels,
            BLOCK_I=triton.next_power_of_2(2 * image), BLOCK_C=triton.next_power_of_2(channels),
            CHUNKS=CHUNKS, MERGED=MERGED, enable_fp_fusion=False,
        )


def _blocks(channels: int) -> dict[str, int]:
    columns = triton.next_power_of_2(channels)
    return {"BLOCK_M": max(16, BLOCK // columns), "BLOCK_C": columns}


def shape_classes() -> dict[str, Callable[[], object]]:
    """Returns, by name, the launches of the shipped models; called with meta tensors by `aot.py`.

    Four channels of the image, 16 to 128 of the stages' inputs, two widths.
    """
    empty = partial(torch.empty, device="meta", dtype=torch.float32)
    size = 96, 96
    image, sums = empty(2, 4, *size), new_sums(2, 4, size, "meta")
    bits, count = empty(2, dtype=torch.int32), empty(1, dtype=torch.int32)
    offset = empty(2, 2, dtype=torch.int32)
    found: dict[str, Callable[[], object]] = {
        "gradients of an image": partial(gradients, image, sums, size, offset, bits, count)
    }
    for level in range(4):
        c = 16 << level
        found[f"width, {c} channels"] = partial(
            select, bits, sums, empty(2, 9, 2, c), empty(2, 8 + c), empty(2), bits, size, 96 * 96,
            1024, count, bits, bits,
        )
    return found
