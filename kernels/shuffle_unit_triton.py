"""The Triton kernel of a unit of ShuffleNetV2; `shuffle_unit.py` has the equations.

Nothing between the layers is stored: for each of the nine taps of the 3x3 convolution a program
loads the pixels that lie there, expands them on tensor cores and adds them up by the tap's weights.
A pixel is so expanded up to nine times, which costs less than storing and loading it once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from .backend import tl, triton
from .shuffle_pack import padded
from .within_triton import any_seen

# elements of a layer's output per program, and their bounds in pixels; others were not tried: the
# lower one is the least that a tensor core takes
BLOCK, FEWEST, MOST = 1024, 16, 64


@triton.jit
def _load(in_ptr, pixel, inside, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Loads [pixels, BLOCK_C], zero outside of the image and beyond the channels."""
    channel = tl.arange(0, BLOCK_C)
    offs = pixel.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    mask = inside[:, None] & (channel < CHANNELS)[None, :]
    return tl.load(in_ptr + offs, mask=mask, other=0.0)


@triton.jit
def _store(
    out_ptr, value, pixel, used, PITCH: tl.constexpr, FIRST: tl.constexpr, END: tl.constexpr
):  # fmt: skip
    """Stores [pixels, channels] as the channels FIRST ... END - 1 of the output."""
    channel = FIRST + tl.arange(0, value.shape[1])
    offs = pixel.to(tl.int64)[:, None] * PITCH + channel[None, :]
    value = value.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs, value, mask=used[:, None] & (channel < END)[None, :])


@triton.jit
def _halves(value, BLOCK_K: tl.constexpr):
    """Returns the even and the odd channels."""
    return tl.split(tl.reshape(value, (value.shape[0], BLOCK_K, 2)))


@triton.jit
def _weights(ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.load(ptr + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def _row(ptr, COLUMNS: tl.constexpr):
    return tl.load(ptr + tl.arange(0, COLUMNS))[None, :]


@triton.jit
def _pointwise(x, weight, bias):
    """A 1x1 convolution and ReLU in float32."""
    value = tl.dot(x, weight, input_precision="ieee") + bias
    # a comparison keeps a NaN
    return tl.where(value < 0, 0.0, value)


@triton.jit(do_not_specialize=["height_in", "width_in", "height", "width", "pixels"])
def shuffle_unit_kernel(
    in_ptr, expand_ptr, expand_bias_ptr, depth_ptr, depth_bias_ptr, mix_ptr, mix_bias_ptr,
    side_depth_ptr, side_depth_bias_ptr, side_mix_ptr, side_mix_bias_ptr, seen_ptr, out_ptr,
    height_in, width_in, height, width, pixels,
    CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Computes BLOCK_M neighbouring output pixels of the whole batch, all channels."""
    if seen_ptr is not None and not any_seen(seen_ptr, pixels, height * width, BLOCK_M):
        return
    SIDE: tl.constexpr = side_mix_ptr is not None
    STRIDE: tl.constexpr = 2 if SIDE else 1
    BLOCK_C: tl.constexpr = BLOCK_K if SIDE else 2 * BLOCK_K
    # channels that a branch takes, and that the first part of the output has
    BRANCH: tl.constexpr = CHANNELS if SIDE else CHANNELS // 2
    dtype: tl.constexpr = in_ptr.dtype.element_ty
    pixel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    used = pixel < pixels
    row, column = pixel // width % height * STRIDE, pixel % width * STRIDE
    first = pixel // (height * width) * (height_in * width_in)
    expand = _weights(expand_ptr, BLOCK_K, BLOCK_H)
    expand_bias = _row(expand_bias_ptr, BLOCK_H)

    total = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    if SIDE:
        side_total = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for tap in tl.range(0, 9):
        y, x = row + tap // 3 - 1, column + tap % 3 - 1
        inside = used & (y >= 0) & (y < height_in) & (x >= 0) & (x < width_in)
        value = _load(in_ptr, first + y * width_in + x, inside, CHANNELS, BLOCK_C)
        if SIDE:
            side_total += value.to(tl.float32) * _row(side_depth_ptr + tap * BLOCK_K, BLOCK_K)
        else:
            _, value = _halves(value, BLOCK_K)
        hidden = _pointwise(value, expand, expand_bias).to(dtype).to(tl.float32)
        # a pixel outside of the image has no bias either
        hidden = tl.where(inside[:, None], hidden, 0.0)
        total += hidden * _row(depth_ptr + tap * BLOCK_H, BLOCK_H)

    hidden = (total + _row(depth_bias_ptr, BLOCK_H)).to(dtype)
    mix = _weights(mix_ptr, BLOCK_H, BLOCK_O)
    mixed = _pointwise(hidden, mix, _row(mix_bias_ptr, BLOCK_O))
    _store(out_ptr, mixed, pixel, used, OUT_CHANNELS, BRANCH, OUT_CHANNELS)
    if SIDE:
        hidden = (side_total + _row(side_depth_bias_ptr, BLOCK_K)).to(dtype)
        mix = _weights(side_mix_ptr, BLOCK_K, BLOCK_K)
        passed = _pointwise(hidden, mix, _row(side_mix_bias_ptr, BLOCK_K))
    else:
        centre = _load(in_ptr, pixel, used, CHANNELS, BLOCK_C)
        passed, _ = _halves(centre, BLOCK_K)
    _store(out_ptr, passed, pixel, used, OUT_CHANNELS, 0, BRANCH)


def run(
    output: Tensor, input: Tensor, main: Sequence[Tensor], side: Sequence[Tensor],
    seen: Tensor | None = None,
) -> None:  # fmt: skip
    """Launches a unit into a given output, once.

    Args:
        output: [N, Cout, H / stride, W / stride], dense, channels last.
        input: [N, Cin, H, W], dense, channels last, in float16, bfloat16 or float32.
        main: Of a `PackedUnit` whose rows of weights have at most `WIDEST` bytes.
        side: Likewise.
        seen: int32 [N], or None: what is 0 there may be left out of the output.

    Raises:
        ValueError: If the batch has 2^31 pixels.
    """
    samples, channels, *size = input.shape
    # pixels are counted in 32 bits, elements in 64
    if samples * size[0] * size[1] > 2**31 - MOST:
        raise ValueError(f"a batch of {list(input.shape)} has too many pixels for one launch")
    (inputs, mid), outputs = main[0].shape, main[4].shape[1]
    pixels = samples * output.shape[2:].numel()
    block = min(max(FEWEST, BLOCK // max(inputs, mid, outputs)), MOST)
    with torch.cuda.device_of(input):
        shuffle_unit_kernel[(triton.cdiv(pixels, block),)](
            input, *main, *(side or (None,) * 4), seen, output, *size, *output.shape[2:], pixels,
            CHANNELS=channels, OUT_CHANNELS=output.shape[1], BLOCK_M=block,
            BLOCK_K=inputs, BLOCK_H=mid, BLOCK_O=outputs, enable_fp_fusion=True,
        )  # fmt: skip


def shape_classes() -> dict[str, Callable[[], object]]:
    """Returns, by name, the launches of the shipped models; called with meta tensors by `aot.py`.

    Policy and position network are of "shufflenetv2-m", in half precision.
    """
    found: dict[str, Callable[[], object]] = {}
    for cin, cout in ((12, 24), (24, 48), (48, 96)):
        halving, next_ones = f"{cin} to {cout}", f"{cout} to {cout}"
        found[f"unit of stride 2, {halving} channels"] = partial(_launch_meta, cin, cout, 2)
        found[f"unit of stride 1, {next_ones} channels"] = partial(_launch_meta, cout, cout, 1)
    return found


def _launch_meta(
    cin: int, cout: int, stride: int, dtype: torch.dtype = torch.float16
) -> None:
    """Launches a unit whose tensors have no memory."""
    empty = partial(torch.empty, device="meta", dtype=torch.float32)
    branch = cin if stride == 2 else cin // 2
    k, h, o = map(padded, (branch, cout // 2, cout - branch))
    main = (
        empty(k, h, dtype=dtype), empty(h), empty(9, h), empty(h), empty(h, o, dtype=dtype),
        empty(o),
    )  # fmt: skip
    side = (empty(9, k), empty(k), empty(k, k, dtype=dtype), empty(k)) if stride == 2 else ()
    maps = (empty(2, 8 * stride, 8 * stride, cin, dtype=dtype), empty(2, 8, 8, cout, dtype=dtype))
    image, output = (t.permute(0, 3, 1, 2) for t in maps)
    run(output, image, main, side, empty(2, dtype=torch.int32))
