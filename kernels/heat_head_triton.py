"""The Triton kernel of the end of a `HeatmapLocator`; `heat_head.py` has the equations.

The map is never stored: a sample's pixels are taken block by block, and the largest heat so far,
the sum of the cells' weights beside it and their sums times row and column are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from .backend import tl, triton
from .pointwise_triton import pixels_of, pointwise
from .shuffle_pack import padded
from .within_triton import parted

# pixels at a time: all of the shipped network's map
BLOCK_M = 64


@triton.jit
def _central(place, size):
    """Returns where a row or column lies in the map, from -0.5 to 0.5."""
    return (place.to(tl.float32) + 0.5) / size.to(tl.float32) - 0.5


@triton.jit
def _exponential(x):
    """Returns exp(x), x not above zero; hardware has a power of two, of a rounded product."""
    # zero from there on, and no infinity less another; a comparison keeps a NaN
    x = tl.where(x < -128.0, -128.0, x)
    whole = tl.floor(x * 1.4426950408889634 + 0.5)
    # ln 2 in two parts, of which the first one's multiples are exact
    rest = (x - whole * 0.693359375) + whole * 2.12194440e-4
    return tl.exp2(whole) * tl.exp(rest)


@triton.jit(do_not_specialize=["height", "width"])
def heat_head_kernel(
    in_ptr, weight_ptr, bias_ptr, map_ptr, gain_ptr, seen_ptr, out_ptr, height, width, play_y,
    play_x, edge, CHANNELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Computes the place of one sample."""
    sample = tl.program_id(0)
    if seen_ptr is not None and tl.load(seen_ptr + sample) == 0:
        return
    pixels = height * width
    in_ptr += sample.to(tl.int64) * pixels * CHANNELS
    k, column = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_L)
    weight = tl.load(weight_ptr + k[:, None] * BLOCK_L + column[None, :])
    bias, map_weight = tl.load(bias_ptr + column), tl.load(map_ptr + column)

    # no heat that is a number is smaller; minus infinity from itself would be none
    best = tl.full([], -3.4028234663852886e38, tl.float32)
    weights, down, right = 0.0, 0.0, 0.0
    for first in tl.range(0, pixels, BLOCK_M):
        pixel = first + tl.arange(0, BLOCK_M)
        used = pixel < pixels
        x = pixels_of(in_ptr, pixel, used, CHANNELS, BLOCK_K)
        heat = tl.sum(pointwise(x, weight, bias) * map_weight[None, :], 1)
        heat = tl.where(used, heat, float("-inf"))
        # a NaN gets into the sums, whatever the maximum makes of it
        higher = tl.maximum(best, tl.max(heat, 0))
        kept, share = _exponential(best - higher), _exponential(heat - higher)
        row, across = parted(pixel, width)
        weights = weights * kept + tl.sum(share, 0)
        down = down * kept + tl.sum(share * _central(row, height), 0)
        right = right * kept + tl.sum(share * _central(across, width), 0)
        best = higher

    axis = tl.arange(0, 2)
    centre = tl.where(axis == 0, down, right) / weights
    place = 0.5 + tl.load(gain_ptr + axis) / tl.where(axis == 0, play_y, play_x) * centre
    # comparisons keep a NaN
    place = tl.where(place < edge, edge, place)
    place = tl.where(place > 1 - edge, 1 - edge, place)
    tl.store(out_ptr + sample.to(tl.int64) * 2 + axis, tl.log(tl.div_rn(place, 1 - place)))


def run(
    output: Tensor, input: Tensor, weight: Tensor, bias: Tensor, map_weight: Tensor, gain: Tensor,
    plays: Sequence[float], edge: float, seen: Tensor | None = None,
) -> None:
    """Launches a head into a given output, once.

    Args:
        output: float32 [N, 2], dense.
        input: [N, Cin, H, W], dense, channels last, in float16, bfloat16 or float32.
        weight: Of a `PackedHeatHead` whose rows and columns of weights have at most `WIDEST` bytes.
        bias: Likewise.
        map_weight: Likewise.
        gain: Likewise.
        plays: Of `heat_head`.
        edge: Of a `PackedHeatHead`.
        seen: int32 [N], or None: what is 0 there is left out of the output.

    Raises:
        ValueError: If a sample has 2^31 elements.
    """
    samples, channels, *size = input.shape
    # a sample's elements are counted in 32 bits
    if (size[0] * size[1] + BLOCK_M) * channels >= 2**31:
        raise ValueError(f"maps of {[channels, *size]} have too many elements for one launch")
    with torch.cuda.device_of(input):
        heat_head_kernel[(samples,)](
            input, weight, bias, map_weight, gain, seen, output, *size, *map(float, plays), edge,
            CHANNELS=channels, BLOCK_M=BLOCK_M, BLOCK_K=weight.shape[0], BLOCK_L=weight.shape[1],
            enable_fp_fusion=True,
        )


def shape_classes() -> dict[str, Callable[[], object]]:
    """Returns, by name, the launches of the shipped models; called with meta tensors by `aot.py`.

    The position network has the widths of "shufflenetv2-m", in half precision.
    """
    return {"heat head, 48 to 64 channels": partial(_launch_meta, 48, 64)}


def _launch_meta(channels: int, hidden: int, dtype: torch.dtype = torch.float16) -> None:
    """Launches a head whose tensors have no memory."""
    empty = partial(torch.empty, device="meta", dtype=torch.float32)
    rows, columns = padded(channels), padded(hidden)
    image = empty(2, 8, 8, channels, dtype=dtype).permute(0, 3, 1, 2)
    run(
        empty(2, 2), image, empty(rows, columns, dtype=dtype), empty(columns), empty(columns),
        empty(2), (0.5, 0.5), 1 / 1024, empty(2, dtype=torch.int32),
    )
