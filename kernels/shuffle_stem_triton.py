"""The Triton kernel of the stem of ShuffleNetV2; `shuffle_stem.py` has the equation.

The convolution's output is never stored. A program goes down the image, one pooled row at a time:
it gathers each row of the input once for each of the three columns of the pooling's windows, as
rows of products with a third of the weight on tensor cores. What the next pooled row shares with
this one stays in registers: sums to which the input's last row adds, and the last maximum.

Bias and ReLU follow the maximum, which they may: both, as rounded, never decrease. Where a window
leaves the convolution's output, its column is the nearest one inside, which it holds anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .backend import tl, triton
from .shuffle_pack import padded
from .within_triton import parted, within

# pooled rows, columns and output channels of a program: a tensor core's tile; others are not timed
BLOCK_H, BLOCK_W, BLOCK_O = 6, 16, 16


@triton.jit
def gathered(in_ptr, line, height_in, width_in, CHANNELS: tl.constexpr, offs, taps):
    """Returns the values of a line of the input at three columns each, as rows of a product."""
    in_ptr += line.to(tl.int64) * (width_in * CHANNELS)
    # none of a line below the image
    width = tl.where(line < height_in, width_in, 0)
    return (
        tl.load(in_ptr + offs[0], mask=within(taps[0], width), other=0.0),
        tl.load(in_ptr + offs[1], mask=within(taps[1], width), other=0.0),
        tl.load(in_ptr + offs[2], mask=within(taps[2], width), other=0.0),
    )


@triton.jit
def added(values, weight, sums):
    """Returns three sums, each plus a product with the weight."""
    return (
        tl.dot(values[0], weight, sums[0], input_precision="ieee"),
        tl.dot(values[1], weight, sums[1], input_precision="ieee"),
        tl.dot(values[2], weight, sums[2], input_precision="ieee"),
    )


@triton.jit
def larger(x, y):
    """Returns the maximum, NaN where either is."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest(sums):
    """Returns the maximum of three."""
    return larger(larger(sums[0], sums[1]), sums[2])


@triton.jit
def taps_of(between, columns_between, CHANNELS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Returns where in a line the taps of the convolution's columns lie: elements and pixels."""
    x = 2 * tl.minimum(tl.maximum(between, 0), columns_between - 1)[:, None] - 1
    k = tl.arange(0, BLOCK_K)[None, :]
    # left of the image where there is no tap
    return x * CHANNELS + k, tl.where(k < 3 * CHANNELS, x + k // CHANNELS, -1)


@triton.jit(do_not_specialize=["height_in", "width_in", "height", "width"])
def shuffle_stem_kernel(
    in_ptr, weight_ptr, bias_ptr, seen_ptr, out_ptr, height_in, width_in, height, width,
    CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr,
):
    """Computes BLOCK_H rows of BLOCK_W columns of one sample's output, BLOCK_O channels."""
    tiles, blocks = tl.cdiv(height, BLOCK_H), tl.cdiv(width, BLOCK_W)
    # one in the shipped models
    CHANNEL_BLOCKS: tl.constexpr = PADDED // BLOCK_O
    first_channel = tl.program_id(0) % CHANNEL_BLOCKS * BLOCK_O
    place, block = parted(tl.program_id(0) // CHANNEL_BLOCKS, blocks)
    sample, tile = parted(place, tiles)
    if seen_ptr is not None and tl.load(seen_ptr + sample) == 0:
        return
    in_ptr += sample.to(tl.int64) * height_in * (width_in * CHANNELS)
    rows_between, columns_between = (height_in + 1) // 2, (width_in + 1) // 2

    k, channel = tl.arange(0, BLOCK_K)[:, None], first_channel + tl.arange(0, BLOCK_O)
    weight_ptr += k * PADDED + channel[None, :]
    LINE: tl.constexpr = 3 * CHANNELS
    above = tl.load(weight_ptr, mask=k < LINE, other=0.0)
    here = tl.load(weight_ptr + LINE * PADDED, mask=k < LINE, other=0.0)
    below = tl.load(weight_ptr + 2 * LINE * PADDED, mask=k < LINE, other=0.0)
    bias = tl.load(bias_ptr + channel)[None, :]

    column = block * BLOCK_W + tl.arange(0, BLOCK_W)
    left, left_taps = taps_of(2 * column - 1, columns_between, CHANNELS, BLOCK_K)
    middle, middle_taps = taps_of(2 * column, columns_between, CHANNELS, BLOCK_K)
    right, right_taps = taps_of(2 * column + 1, columns_between, CHANNELS, BLOCK_K)
    offs, taps = (left, middle, right), (left_taps, middle_taps, right_taps)
    out_offs = tl.arange(0, BLOCK_W)[:, None] * OUT_CHANNELS + channel[None, :]
    out_mask = (channel < OUT_CHANNELS)[None, :]

    first = tile * BLOCK_H
    zeros = tl.zeros([BLOCK_W, BLOCK_O], tl.float32)
    # the sums of the convolution's next row so far, and the maximum of the row before
    sums = (zeros, zeros, zeros)
    best = tl.full([BLOCK_W, BLOCK_O], float("-inf"), tl.float32)
    # the row above the first is there for what the first shares with it
    for row in tl.range(tl.maximum(first - 1, 0), tl.minimum(first + BLOCK_H, height)):
        line = 4 * row
        # all before the first product: they wait for memory together
        line_0 = gathered(in_ptr, line, height_in, width_in, CHANNELS, offs, taps)
        line_1 = gathered(in_ptr, line + 1, height_in, width_in, CHANNELS, offs, taps)
        line_2 = gathered(in_ptr, line + 2, height_in, width_in, CHANNELS, offs, taps)
        line_3 = gathered(in_ptr, line + 3, height_in, width_in, CHANNELS, offs, taps)
        sums = added(line_1, below, added(line_0, here, sums))
        best = larger(best, largest(sums))
        sums = added(line_1, above, (zeros, zeros, zeros))
        sums = added(line_3, below, added(line_2, here, sums))
        last = tl.where(2 * row + 1 < rows_between, largest(sums), float("-inf"))
        sums = added(line_3, above, (zeros, zeros, zeros))

        # maximum and comparison keep a NaN
        result = larger(best, last) + bias
        result = tl.where(result <= 0, 0.0, result).to(out_ptr.dtype.element_ty)
        best = last
        pixel = (sample.to(tl.int64) * height + row) * width + block * BLOCK_W
        mask = (column < tl.where(row < first, 0, width))[:, None] & out_mask
        tl.store(out_ptr + pixel * OUT_CHANNELS + out_offs, result, mask=mask)


def run(
    output: Tensor, input: Tensor, weight: Tensor, bias: Tensor, seen: Tensor | None = None
) -> None:
    """Launches a stem into a given output, once.

    Args:
        output: [N, Cout, H / 4, W / 4], rounded up, dense, channels last.
        input: [N, Cin, H, W], dense, channels last, in float16, bfloat16 or float32.
        weight: Of a `PackedStem` that `fits`.
        bias: Likewise.
        seen: int32 [N], or None: what is 0 there may be left out of the output.

    Raises:
        ValueError: If the launch has 2^31 programs or an image 2^31 elements.
    """
    samples, channels, *size = input.shape
    height, width = output.shape[2:]
    tiles, blocks = triton.cdiv(height, BLOCK_H), triton.cdiv(width, BLOCK_W)
    programs = samples * tiles * blocks * (weight.shape[1] // BLOCK_O)
    # an image's elements are counted in 32 bits
    if max(programs, channels * size[0] * size[1]) >= 2**31 - 2**16:
        raise ValueError(f"a batch of {list(input.shape)} has too many pixels for one launch")
    block = padded(3 * channels)
    # one warp, which has no other to wait for, if its registers hold a line's part of the products
    # and tensor cores multiply
    warps = 1 if block <= 32 and input.element_size() == 2 else 4
    with torch.cuda.device_of(input):
        shuffle_stem_kernel[(programs,)](
            input, weight, bias, seen, output, *size, height, width,
            CHANNELS=channels, OUT_CHANNELS=output.shape[1], PADDED=weight.shape[1],
            BLOCK_H=BLOCK_H, BLOCK_W=BLOCK_W, BLOCK_K=block, BLOCK_O=BLOCK_O,
            num_warps=warps, num_stages=1, enable_fp_fusion=True,
        )


def shape_classes() -> dict[str, Callable[[], object]]:
    """Returns, by name, the launches of the shipped models; called with meta tensors by `aot.py`.

    Policy and position network are of "shufflenetv2-m", in half precision.
    """
    return {"stem, 4 to 12 channels": partial(_launch_meta, 4, 12)}


def _launch_meta(cin: int, cout: int, dtype: torch.dtype = torch.float16) -> None:
    """Launches a stem whose tensors have no memory."""
    weight = torch.empty(padded(9 * cin), padded(cout), dtype=dtype, device="meta")
    maps = [torch.empty(2, s, s, c, dtype=dtype, device="meta") for s, c in ((32, cin), (8, cout))]
    image, output = (t.permute(0, 3, 1, 2) for t in maps)
    seen = torch.empty(2, dtype=torch.int32, device="meta")
    run(output, image, weight, torch.empty(weight.shape[1], device="meta"), seen)
