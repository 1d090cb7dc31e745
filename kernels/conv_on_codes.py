"""The forward of a training convolution on integer codes, weights quantised afresh.

    y = (sum of code products) * step_x * step_w + bias

The sum is exact: int8 products where codes have one byte, four of them where they have two. Triton,
and oneDNN for two bytes, run as in `quant_conv2d`; for one byte oneDNN's own epilogue scales.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .backend import triton_runs
from .conv_call import ConvCall, even_planes
from .conv_pack import PackedConv, pack_weight
from .grid import qmax, quantize_codes, step_size
from .onednn import ZERO_POINT, convolve, prepack
from .pairs import split_floats
from .per_width import weight_amax


def conv_on_codes(
    planes: Tensor,
    num_bits: int,
    amax: Tensor,
    weight: Tensor,
    weight_num_bits: int,
    bias: Tensor | None,
    geometry: list[int],
    per_channel: bool,
) -> Tensor:
    """Convolves codes with a weight's codes.

    Args:
        planes: int8 byte planes [P, N, C, H, W], P = 1 up to 8 bits, else 2.
        num_bits: Width of the codes.
        amax: Their ranges, [N].
        weight: [Cout, C, k, k], floating point.
        weight_num_bits: Its width, with as many bytes as `num_bits`.
        bias: [Cout] or None.
        geometry: Stride, padding, dilation (y, x each) and groups.
        per_channel: One weight range per output channel.

    Returns:
        float32 [N, Cout, Hout, Wout], channels last.
    """
    if num_bits <= 8 and not triton_runs(planes):
        ranges = weight_amax(weight, per_channel)
        return _onednn(planes[0], num_bits, amax, weight, weight_num_bits, ranges, bias, geometry)
    codes, scale = pack_weight(weight, (weight_num_bits,), per_channel)
    stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x, groups = geometry
    height, width = weight.shape[2:]
    conv = PackedConv(
        codes, split_floats(scale),
        split_floats(torch.zeros_like(scale[0]) if bias is None else bias),
        (weight_num_bits,), weight.shape[1] * groups, (height, width), (stride_y, stride_x),
        (pad_y, pad_x), (dilation_y, dilation_x), groups, False,
    )
    call = ConvCall(even_planes(planes), conv, amax.float(), num_bits)
    run: Callable[..., None]
    if triton_runs(planes):
        from .conv_int_triton import run
    else:
        from .conv_int_onednn import run
    stream = call.new_stream(torch.float32)
    run(call, stream, None)
    return stream


def _onednn(
    codes: Tensor, num_bits: int, amax: Tensor, weight: Tensor, weight_num_bits: int,
    weight_ranges: Tensor, bias: Tensor | None, geometry: list[int],
) -> Tensor:
    """Convolves codes of one byte; oneDNN scales and adds the bias where one step serves all."""
    step, _, _ = step_size(weight, weight_num_bits, weight_ranges.reshape(-1))
    weight_codes = quantize_codes(weight, step, int(qmax(weight_num_bits))).nan_to_num_(0.0)
    scale, steps = step.float().reshape(-1).expand(len(weight)), amax.float() / qmax(num_bits)
    codes = codes.contiguous(memory_format=torch.channels_last).view(torch.uint8) ^ ZERO_POINT
    places = geometry[0:2], geometry[2:4], geometry[4:6], geometry[6]
    packed = prepack(weight_codes.to(torch.int8).contiguous(), *places, shape=codes.shape)
    bias = None if bias is None else bias.float()
    ordinary = bool(((scale > 0) & (scale < torch.inf)).all())
    if ordinary and 0 < steps[0] < torch.inf and bool((steps == steps[0]).all()):
        return convolve(codes, packed, *places, step=steps[0].item(), scale=scale.contiguous(),
                        bias=bias)
    sums = convolve(codes, packed, *places)
    sums *= (steps[:, None] * scale)[:, :, None, None]
    return sums if bias is None else sums.add_(bias[:, None, None])
