"""The Triton kernel of the label head; `head.py` has the equation.

A handful of classes would leave a tensor core almost empty, and the pass is bound by memory: each
thread holds a pixel's channels and sums them class by class.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .backend import tl, triton
from .conv_call import pixel_pitch
from .conv_epilogue_triton import not_negative, pair_at, step_of, times_step

# elements per program; other sizes were not tried on a GPU
BLOCK = 4096


@triton.jit(
    do_not_specialize=[
        "bits", "amax_stride", "height", "width", "rows", "columns", "tiles", "margin",
    ]
)
def head_kernel(
    in_ptr, weight_ptr, scale_ptr, bias_ptr, amax_ptr, offset_ptr, slots_ptr, count_ptr, labels_ptr,
    bits, amax_stride, height, width, rows, columns, tiles, margin,
    CHANNELS: tl.constexpr, CLASSES: tl.constexpr, PITCH: tl.constexpr, PITCH_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Labels BLOCK_M neighbouring pixels of one slot's region, in a slice of rows x columns."""
    slot = (tl.program_id(0) // tiles).to(tl.int64)
    if count_ptr is not None and slot >= tl.load(count_ptr):
        return
    target = slot if slots_ptr is None else tl.load(slots_ptr + slot).to(tl.int64)
    pixel = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    top, left = tl.load(offset_ptr + 2 * slot), tl.load(offset_ptr + 2 * slot + 1)
    row, column = pixel // width + top, pixel % width + left
    # edges of the region that are not the slice's lose their margin
    inside = (row >= tl.where(top > 0, top + margin, 0)) & (row < rows)
    inside &= (row < top + height - tl.where(top + height < rows, margin, 0))
    inside &= (column >= tl.where(left > 0, left + margin, 0)) & (column < columns)
    inside &= column < left + width - tl.where(left + width < columns, margin, 0)
    inside &= pixel < height * width

    channel = tl.arange(0, BLOCK_C)
    offs = (slot * height * width + pixel)[:, None] * PITCH + channel[None, :]
    x = tl.load(in_ptr + offs, mask=inside[:, None] & (channel < CHANNELS)[None, :], other=0)
    if scale_ptr is not None:
        step, _ = step_of(amax_ptr + slot * amax_stride, bits)
        step = not_negative(step)

    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    label = tl.zeros([BLOCK_M], tl.int32)
    for k in tl.range(0, CLASSES):
        w = tl.load(weight_ptr + k * PITCH_W + channel, mask=channel < CHANNELS, other=0)
        if scale_ptr is not None:
            total = tl.sum(x.to(tl.int32) * w.to(tl.int32)[None, :], 1).to(tl.float32)
            scale, scale_tail = pair_at(scale_ptr, k, CLASSES)
            scale, _ = times_step(scale, scale_tail, step, False)
            score = total * scale + tl.load(bias_ptr + k)
        else:
            score = tl.sum(x.to(tl.float32) * w[None, :], 1) + tl.load(bias_ptr + k)
        # a NaN beats any number, and the first one stays
        larger = (score > best) | ((score != score) & (best == best))
        best = tl.where(larger, score, best)
        label = tl.where(larger, k, label)

    labels_ptr += target * rows * columns
    tl.store(labels_ptr + row * columns + column, label.to(tl.uint8), mask=inside)


def run(
    labels: Tensor, input: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor,
    amax: Tensor | None, num_bits: int, offset: Tensor, slots: Tensor | None, count: Tensor | None,
    margin: int = 0,
) -> None:
    """Launches the head into given labels, once; pixels outside of the regions stay as they are.

    Args:
        labels: uint8 [slices, H, W], dense.
        input: [M, C, h, w], floats or int8 codes, channels last, also some channels of wider ones.
        weight: [K, C] float32; or int8 codes [K, >= C] with `scale`.
        scale: Pairs of float32 [2, K], see `pairs.py`; None for floats.
        bias: float32 [K].
        amax: float32 [1] or [M] for codes.
        num_bits: Width of the codes.
        offset: int32 [M, 2].
        slots: int32 [M] or None.
        count: int32 [1] or None.
        margin: Pixels along edges of the region that are not written, but at the slice's own.
    """
    samples, channels, height, width = input.shape
    columns = triton.next_power_of_2(channels)
    block = max(32, BLOCK // columns)
    tiles = triton.cdiv(height * width, block)
    with torch.cuda.device_of(input):
        head_kernel[(samples * tiles,)](
            input, weight, scale, bias, amax, offset.contiguous(), slots, count, labels,
            num_bits, 0 if amax is None or len(amax) == 1 else 1, height, width, *labels.shape[1:],
            tiles, margin, CHANNELS=channels, CLASSES=len(weight), PITCH=pixel_pitch(input),
            PITCH_W=weight.stride(0), BLOCK_M=block, BLOCK_C=columns, enable_fp_fusion=False,
        )


def shape_classes() -> dict[str, Callable[[], object]]:
    """Returns, by name, the launches of the shipped models; called with meta tensors by `aot.py`.

    Codes of sixteen channels, four classes; slots name their slices and are counted.
    """
    return {"head, int8": partial(_launch_meta, torch.int8)}


def _launch_meta(dtype: torch.dtype) -> None:
    """Launches a head on a feature of a dtype; tensors have no memory."""
    empty = partial(torch.empty, device="meta", dtype=torch.float32)
    whole = partial(empty, dtype=torch.int32)
    codes = dtype == torch.int8
    feature = empty(2, 240, 240, 16, dtype=dtype).permute(0, 3, 1, 2)
    weight = empty(4, 32, dtype=dtype) if codes else empty(4, 16)
    scale, amax = (empty(2, 4), empty(1)) if codes else (None, None)
    labels = empty(2, 240, 240, dtype=torch.uint8)
    run(labels, feature, weight, scale, empty(4), amax, 8, whole(2, 2), whole(2), whole(1))
