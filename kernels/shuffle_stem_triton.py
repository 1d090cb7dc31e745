"""The Triton kernel of the stem of ShuffleNetV2; `shuffle_stem.py` has the equation.

The convolution's output is never stored: a program computes it at the nine places of each of its
windows of the pooling, as products of gathered pixels with the weight on tensor cores, and keeps
the maximum. Each place is so computed 2.25 times on average, from pixels that lie in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .backend import tl, triton
from .shuffle_pack import padded
from .within_triton import any_seen, within

# pooled pixels per program; others were not tried
BLOCK_M = 64


@triton.jit(do_not_specialize=["height_in", "width_in", "height", "width", "pixels"])
def shuffle_stem_kernel(
    in_ptr, weight_ptr, bias_ptr, seen_ptr, out_ptr, height_in, width_in, height, width, pixels,
    CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Computes BLOCK_M neighbouring output pixels of the whole batch, all channels."""
    if seen_ptr is not None and not any_seen(seen_ptr, pixels, height * width, BLOCK_M):
        return
    pixel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    used = pixel < pixels
    row, column = pixel // width % height, pixel % width
    in_ptr += (pixel // (height * width)).to(tl.int64)[:, None] * (height_in * width_in * CHANNELS)
    rows_between, columns_between = (height_in + 1) // 2, (width_in + 1) // 2

    k = tl.arange(0, BLOCK_K)
    tap, channel = k // CHANNELS, k % CHANNELS
    # above the image where there is no tap
    dy, dx = tl.where(tap < 9, tap // 3 - 1, -2 - height_in), tap % 3 - 1
    out_channel = tl.arange(0, BLOCK_O)
    weight = tl.load(weight_ptr + k[:, None] * BLOCK_O + out_channel[None, :])
    bias = tl.load(bias_ptr + out_channel)[None, :]

    # what the ReLU leaves is never below
    best = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
    for place in tl.range(0, 9):
        between_y, between_x = 2 * row + place // 3 - 1, 2 * column + place % 3 - 1
        inside = used & within(between_y, rows_between) & within(between_x, columns_between)
        y, x = tl.where(inside, 2 * between_y, -2)[:, None] + dy[None, :], 2 * between_x
        x = x[:, None] + dx[None, :]
        offs = (y * width_in + x) * CHANNELS + channel[None, :]
        mask = within(y, height_in) & within(x, width_in)
        value = tl.load(in_ptr + offs, mask=mask, other=0.0)
        sums = tl.dot(value, weight, input_precision="ieee") + bias
        # comparisons and maximum keep a NaN; a place outside has no bias either
        sums = tl.where((sums < 0) | (inside == 0)[:, None], 0.0, sums)
        best = tl.maximum(best, sums, propagate_nan=tl.PropagateNan.ALL)

    offs = pixel.to(tl.int64)[:, None] * OUT_CHANNELS + out_channel[None, :]
    mask = used[:, None] & (out_channel < OUT_CHANNELS)[None, :]
    tl.store(out_ptr + offs, best.to(out_ptr.dtype.element_ty), mask=mask)


def run(
    output: Tensor, input: Tensor, weight: Tensor, bias: Tensor, seen: Tensor | None = None
) -> None:
    """Launches a stem into a given output, once.

    Args:
        output: [N, Cout, H / 4, W / 4], rounded up, dense, channels last.
        input: [N, Cin, H, W], dense, channels last, in float16, bfloat16 or float32.
        weight: Of a `PackedStem`, no side above `LARGEST`.
        bias: Likewise.
        seen: int32 [N], or None: what is 0 there may be left out of the output.

    Raises:
        ValueError: If the batch has 2^31 output pixels or an image 2^31 elements.
    """
    samples, channels, *size = input.shape
    pixels = samples * output.shape[2:].numel()
    # an image's elements are counted in 32 bits
    if max(pixels, channels * size[0] * size[1]) > 2**31 - BLOCK_M:
        raise ValueError(f"a batch of {list(input.shape)} has too many pixels for one launch")
    with torch.cuda.device_of(input):
        shuffle_stem_kernel[(triton.cdiv(pixels, BLOCK_M),)](
            input, weight, bias, seen, output, *size, *output.shape[2:], pixels,
            CHANNELS=channels, OUT_CHANNELS=output.shape[1], BLOCK_M=BLOCK_M,
            BLOCK_K=weight.shape[0], BLOCK_O=weight.shape[1], enable_fp_fusion=True,
        )  # fmt: skip


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
