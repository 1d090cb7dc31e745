"""The Triton kernel of units of ShuffleNetV2; `shuffle_stage.py` has the equations.

A program takes one sample through all units. Maps of a decision network are so small that a launch
per unit would mostly wait: for the launch before it, and for its first loads. What a unit hands to
the next layer lies in memory that no other program touches; a barrier stands between those who
store it and those who load it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from .backend import tl, triton
from .pointwise_triton import pixels_of, pointwise
from .shuffle_pack import padded
from .within_triton import parted, within

# pixels at a time, and times the square of the widest row: a map of twice the channels has a
# quarter of the pixels; others were not tried
FEWEST, MOST, AREA = 16, 256, 1 << 17
WARPS = 8


@triton.jit
def _store(
    out_ptr, value, pixel, used, PITCH: tl.constexpr, FIRST: tl.constexpr, END: tl.constexpr
):
    """Stores [pixels, channels] as the channels FIRST ... END - 1 of the output."""
    channel = FIRST + tl.arange(0, value.shape[1])
    offs = pixel[:, None] * PITCH + channel[None, :]
    value = value.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs, value, mask=used[:, None] & (channel < END)[None, :])


@triton.jit
def _weights(ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.load(ptr + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def _row(ptr, COLUMNS: tl.constexpr):
    return tl.load(ptr + tl.arange(0, COLUMNS))


@triton.jit
def _expand(
    in_ptr, weight_ptr, bias_ptr, hidden_ptr, out_ptr, pixels, HALVED: tl.constexpr,
    CHANNELS: tl.constexpr, MID: tl.constexpr, OUT_CHANNELS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
):
    """The first 1x1 convolution; where channels are halved, it has the odd ones, others pass."""
    weight, bias = _weights(weight_ptr, BLOCK_K, BLOCK_H), _row(bias_ptr, BLOCK_H)
    for first in tl.range(0, pixels, BLOCK_M):
        pixel = first + tl.arange(0, BLOCK_M)
        used = pixel < pixels
        if HALVED:
            both = pixels_of(in_ptr, pixel, used, CHANNELS, 2 * BLOCK_K)
            passed, value = tl.split(tl.reshape(both, (BLOCK_M, BLOCK_K, 2)))
            _store(out_ptr, passed, pixel, used, OUT_CHANNELS, 0, CHANNELS // 2)
        else:
            value = pixels_of(in_ptr, pixel, used, CHANNELS, BLOCK_K)
        hidden = pointwise(value, weight, bias)
        if MID < BLOCK_H:
            # an infinity times the padding's zeros would be NaN, and reach every output
            hidden = tl.where((tl.arange(0, BLOCK_H) < MID)[None, :], hidden, 0.0)
        _store(hidden_ptr, hidden, pixel, used, BLOCK_H, 0, BLOCK_H)


@triton.jit
def _depthwise(
    in_ptr, weight_ptr, bias_ptr, out_ptr, height_in, width_in, height, width, STRIDE: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """A 3x3 convolution per channel."""
    pixels = height * width
    for first in tl.range(0, pixels, BLOCK_M):
        pixel = first + tl.arange(0, BLOCK_M)
        used = pixel < pixels
        line, column = parted(pixel, width)
        total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        # a row of taps at a time: all nine would take twice the registers
        for dy in tl.range(0, 3):
            y = line * STRIDE + (dy - 1)
            for dx in tl.static_range(3):
                x = column * STRIDE + (dx - 1)
                # a pixel outside of the image has no bias either
                inside = used & within(y, height_in) & within(x, width_in)
                value = pixels_of(in_ptr, y * width_in + x, inside, CHANNELS, BLOCK_C)
                weight = _row(weight_ptr + (3 * dy + dx) * BLOCK_C, BLOCK_C)
                total += value.to(tl.float32) * weight[None, :]
        total += _row(bias_ptr, BLOCK_C)[None, :]
        _store(out_ptr, total, pixel, used, BLOCK_C, 0, BLOCK_C)


@triton.jit
def _mix(
    in_ptr, weight_ptr, bias_ptr, out_ptr, pixels, FIRST: tl.constexpr, END: tl.constexpr,
    PITCH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr,
):
    """A last 1x1 convolution, to the channels FIRST ... END - 1 of PITCH."""
    weight, bias = _weights(weight_ptr, BLOCK_K, BLOCK_O), _row(bias_ptr, BLOCK_O)
    for first in tl.range(0, pixels, BLOCK_M):
        pixel = first + tl.arange(0, BLOCK_M)
        used = pixel < pixels
        value = pixels_of(in_ptr, pixel, used, BLOCK_K, BLOCK_K)
        _store(out_ptr, pointwise(value, weight, bias), pixel, used, PITCH, FIRST, END)


@triton.jit
def _unit(
    in_ptr, hidden_ptr, summed_ptr, side_ptr, out_ptr, expand_ptr, expand_bias_ptr, depth_ptr,
    depth_bias_ptr, mix_ptr, mix_bias_ptr, side_depth_ptr, side_depth_bias_ptr, side_mix_ptr,
    side_mix_bias_ptr, height_in, width_in, height, width,
    CHANNELS: tl.constexpr, MID: tl.constexpr, OUT_CHANNELS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_O: tl.constexpr,
):
    """Takes one sample through a unit; hidden, summed and side are for what lies in between."""
    SIDE: tl.constexpr = side_mix_ptr is not None
    STRIDE: tl.constexpr = 2 if SIDE else 1
    # channels that the first part of the output has
    PASSED: tl.constexpr = CHANNELS if SIDE else CHANNELS // 2
    _expand(
        in_ptr, expand_ptr, expand_bias_ptr, hidden_ptr, out_ptr, height_in * width_in, not SIDE,
        CHANNELS, MID, OUT_CHANNELS, BLOCK_M, BLOCK_K, BLOCK_H,
    )
    if SIDE:
        _depthwise(
            in_ptr, side_depth_ptr, side_depth_bias_ptr, side_ptr, height_in, width_in, height,
            width, STRIDE, CHANNELS, BLOCK_M, BLOCK_K,
        )
    tl.debug_barrier()
    _depthwise(
        hidden_ptr, depth_ptr, depth_bias_ptr, summed_ptr, height_in, width_in, height, width,
        STRIDE, BLOCK_H, BLOCK_M, BLOCK_H,
    )
    tl.debug_barrier()
    _mix(
        summed_ptr, mix_ptr, mix_bias_ptr, out_ptr, height * width, PASSED, OUT_CHANNELS,
        OUT_CHANNELS, BLOCK_M, BLOCK_H, BLOCK_O,
    )
    if SIDE:
        _mix(
            side_ptr, side_mix_ptr, side_mix_bias_ptr, out_ptr, height * width, 0, PASSED,
            OUT_CHANNELS, BLOCK_M, BLOCK_K, BLOCK_K,
        )
    # also for the next unit, which stores where this one's threads have loaded
    tl.debug_barrier()


@triton.jit(do_not_specialize=["height_in", "width_in", "height", "width"])
def shuffle_stage_kernel(
    in_ptr, expand_ptr, expand_bias_ptr, depth_ptr, depth_bias_ptr, mix_ptr, mix_bias_ptr,
    side_depth_ptr, side_depth_bias_ptr, side_mix_ptr, side_mix_bias_ptr,
    next_expand_ptr, next_expand_bias_ptr, next_depth_ptr, next_depth_bias_ptr, next_mix_ptr,
    next_mix_bias_ptr, seen_ptr, hidden_ptr, summed_ptr, side_ptr, spare_ptr, out_ptr,
    height_in, width_in, height, width,
    CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr, UNITS: tl.constexpr, HIDDEN: tl.constexpr,
    MID: tl.constexpr, NEXT_MID: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_O: tl.constexpr,
    NEXT_M: tl.constexpr, NEXT_K: tl.constexpr, NEXT_H: tl.constexpr, NEXT_O: tl.constexpr,
):
    """Takes one sample through a first unit and UNITS - 1 further ones, which are alike."""
    sample = tl.program_id(0).to(tl.int64)
    if seen_ptr is not None and tl.load(seen_ptr + sample) == 0:
        return
    in_ptr += sample * (height_in * width_in) * CHANNELS
    hidden_ptr += sample * (height_in * width_in) * HIDDEN
    summed_ptr += sample * (height * width) * HIDDEN
    if side_ptr is not None:
        side_ptr += sample * (height * width) * BLOCK_K
    out_ptr += sample * (height * width) * OUT_CHANNELS
    if UNITS > 1:
        spare_ptr += sample * (height * width) * OUT_CHANNELS
    # maps change places, the last one is the output
    if UNITS % 2 == 1:
        target_ptr, other_ptr = out_ptr, spare_ptr
    else:
        target_ptr, other_ptr = spare_ptr, out_ptr
    _unit(
        in_ptr, hidden_ptr, summed_ptr, side_ptr, target_ptr, expand_ptr, expand_bias_ptr,
        depth_ptr, depth_bias_ptr, mix_ptr, mix_bias_ptr, side_depth_ptr, side_depth_bias_ptr,
        side_mix_ptr, side_mix_bias_ptr, height_in, width_in, height, width,
        CHANNELS, MID, OUT_CHANNELS, BLOCK_M, BLOCK_K, BLOCK_H, BLOCK_O,
    )
    if UNITS > 1:
        for unit in tl.range(0, UNITS - 1):
            _unit(
                target_ptr, hidden_ptr, summed_ptr, None, other_ptr,
                next_expand_ptr + unit * (NEXT_K * NEXT_H), next_expand_bias_ptr + unit * NEXT_H,
                next_depth_ptr + unit * (9 * NEXT_H), next_depth_bias_ptr + unit * NEXT_H,
                next_mix_ptr + unit * (NEXT_H * NEXT_O), next_mix_bias_ptr + unit * NEXT_O,
                None, None, None, None, height, width, height, width,
                OUT_CHANNELS, NEXT_MID, OUT_CHANNELS, NEXT_M, NEXT_K, NEXT_H, NEXT_O,
            )
            target_ptr, other_ptr = other_ptr, target_ptr


def run(
    output: Tensor, input: Tensor, first: Sequence[Tensor], rest: Sequence[Tensor],
    mids: Sequence[int], seen: Tensor | None = None,
) -> None:
    """Launches units into a given output, once.

    Args:
        output: [N, Cout, H / stride, W / stride], dense, channels last.
        input: [N, Cin, H, W], dense, channels last, in float16, bfloat16 or float32.
        first: Of a `PackedStage` whose rows of weights have at most `WIDEST` bytes.
        rest: Likewise.
        mids: Its `mid_channels`.
        seen: int32 [N], or None: what is 0 there may be left out of the output.

    Raises:
        ValueError: If a sample's largest map has 2^31 elements.
    """
    samples, channels, *size = input.shape
    sizes = _sizes(first, "BLOCK") | _sizes(rest or first, "NEXT")
    hidden = max(sizes["BLOCK_H"], sizes["NEXT_H"])
    # a sample's elements are counted in 32 bits
    elements = (size[0] * size[1] + MOST) * max(hidden, channels, output.shape[1])
    if elements > 2**31:
        raise ValueError(
            f"a sample of {list(input.shape[1:])} has too many elements for one launch"
        )
    halved, pixels = len(first) > 6, output.shape[2:].numel()
    # what lies between layers, and the maps of every other unit
    between = [input.new_empty(samples, *size, hidden), input.new_empty(samples, pixels, hidden)]
    side = input.new_empty(samples, pixels, sizes["BLOCK_K"]) if halved else None
    with torch.cuda.device_of(input):
        shuffle_stage_kernel[(samples,)](
            input, *first, *(() if halved else (None,) * 4), *(rest or (None,) * 6), seen,
            *between, side, torch.empty_like(output) if rest else None, output,
            *size, *output.shape[2:], CHANNELS=channels, OUT_CHANNELS=output.shape[1],
            UNITS=1 + (len(rest[0]) if rest else 0), HIDDEN=hidden,
            MID=mids[0], NEXT_MID=mids[1], **sizes,
            num_warps=WARPS, num_stages=1, enable_fp_fusion=True,
        )


def _sizes(unit: Sequence[Tensor], name: str) -> dict[str, int]:
    """Returns the block sizes of units, by the shapes of their weights."""
    (inputs, mid), outputs = unit[0].shape[-2:], unit[4].shape[-1]
    # at stride 1 half of what is loaded passes by
    widest = max(inputs if len(unit) > 6 else 2 * inputs, mid, outputs)
    pixels = min(max(FEWEST, AREA // widest**2), MOST)
    return {f"{name}_M": pixels, f"{name}_K": inputs, f"{name}_H": mid, f"{name}_O": outputs}


def shape_classes() -> dict[str, Callable[[], object]]:
    """Returns, by name, the launches of the shipped models; called with meta tensors by `aot.py`.

    Policy and position network are of "shufflenetv2-m", in half precision.
    """
    return {
        f"stage, {cin} to {cout} channels, {units} units": partial(_launch_meta, cin, cout, units)
        for cin, cout, units in ((12, 24, 4), (24, 48, 8), (48, 96, 4))
    }


def _launch_meta(cin: int, cout: int, units: int, dtype: torch.dtype = torch.float16) -> None:
    """Launches a stage whose tensors have no memory."""
    empty = partial(torch.empty, device="meta", dtype=torch.float32)

    def unit(branch: int, mid: int, outputs: int, *more: int) -> tuple[Tensor, ...]:
        k, h, o = map(padded, (branch, mid, outputs))
        return (
            empty(*more, k, h, dtype=dtype), empty(*more, h), empty(*more, 9, h), empty(*more, h),
            empty(*more, h, o, dtype=dtype), empty(*more, o),
        )

    mid, k = cout // 2, padded(cin)
    side = empty(9, k), empty(k), empty(k, k, dtype=dtype), empty(k)
    first = unit(cin, mid, cout - cin) + side
    rest = unit(mid, mid, cout - mid, units - 1) if units > 1 else ()
    maps = empty(2, 16, 16, cin, dtype=dtype), empty(2, 8, 8, cout, dtype=dtype)
    image, output = (t.permute(0, 3, 1, 2) for t in maps)
    run(output, image, first, rest, (mid, mid), empty(2, dtype=torch.int32))
