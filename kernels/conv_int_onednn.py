"""The integer convolution on oneDNN's int8 kernels, see `onednn.py`.

Samples of more than 8 bits, which it has no kernel for, take the reference's float64, exact too.

Where codes alone are asked for, oneDNN's own epilogue makes them in the same pass; it orders its
float32 roundings in its own way, so codes may differ at rounding ties. Otherwise it returns the
sums, and the reference's epilogue follows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from . import conv_reference
from .conv_call import ConvCall
from .conv_pack import PackedConv, unpack_weight
from .conv_reference import Group
from .onednn import ZERO_POINT, convolve

# largest sum of products whose float32 is exact
EXACT = 2**24

_prepacked: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _weight(conv: PackedConv, variant: int, shape: list[int]) -> Tensor:
    """Returns one width's weights in oneDNN's order, made once per shape of the input."""
    kept = _prepacked.setdefault(conv.codes, {})
    version = 0 if conv.codes.is_inference() else conv.codes._version
    key = (version, variant, *shape)
    if key not in kept:
        weight = unpack_weight(conv, variant)
        if conv.transposed:
            # a 1x1 with a row for each tap and channel
            weight = weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0], 1, 1)
        kept[key] = torch.ops.onednn.qconv_prepack(
            weight.to(torch.int8).contiguous(), torch.ones(len(weight)), 1.0, ZERO_POINT,
            *_geometry(conv), shape,
        )  # fmt: skip
    return kept[key]


def _geometry(conv: PackedConv) -> tuple:
    if conv.transposed:
        return [1, 1], [0, 0], [1, 1], 1
    return list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups


def _spread(conv: PackedConv, output: Tensor) -> Tensor:
    """Puts the rows of a transposed convolution, (tap, channel), where they belong."""
    if not conv.transposed:
        return output
    n, rows, height, width = output.shape
    taps = output.reshape(n, 2, 2, rows // 4, height, width).permute(0, 4, 1, 5, 2, 3)
    return taps.reshape(n, 2 * height, 2 * width, rows // 4).permute(0, 3, 1, 2)


def _unsigned(call: ConvCall, group: Group) -> Tensor:
    """Returns a group's codes as uint8, q + 128."""
    codes = call.input[0, group.samples].contiguous(memory_format=torch.channels_last)
    return codes.view(torch.uint8) ^ ZERO_POINT


def _sums(call: ConvCall, group: Group) -> Tensor:
    conv = call.conv
    depth = conv.in_channels // conv.groups * conv.kernel_size[0] * conv.kernel_size[1]
    if group.num_bits > 8 or (call.output_planes == 2 and depth * 127 * 127 >= EXACT):
        return conv_reference.integer_sum(call, group)
    codes = _unsigned(call, group)
    weight = _weight(conv, conv.variant(group.num_bits), list(codes.shape))
    return _spread(conv, convolve(codes, weight, *_geometry(conv)))


def _fusible_step(call: ConvCall, group: Group, stream: Tensor | None) -> float | None:
    """Returns the output's step if oneDNN's epilogue does all that this group needs."""
    plain = call.residual is None and call.affine is None and stream is None
    narrow = group.num_bits <= 8 and group.output_num_bits == 8
    if not (plain and narrow) or group.output_step is None:
        return None
    steps = group.step.item(), group.output_step.item()
    return steps[1] if all(0 < step < float("inf") for step in steps) else None


def _fused(call: ConvCall, group: Group, output_step: float, codes: Tensor) -> None:
    conv = call.conv
    variant = conv.variant(group.num_bits)
    repeats = 4 if conv.transposed else 1
    unsigned = _unsigned(call, group)
    output = convolve(
        unsigned, _weight(conv, variant, list(unsigned.shape)), *_geometry(conv),
        step=float(group.step), scale=conv.scale[variant].float().repeat(repeats),
        bias=conv.bias.float().repeat(repeats), output_step=output_step,
        relu=call.relu, dtype=torch.uint8,
    )  # fmt: skip
    # -128 is no code
    output = (output if call.relu else output.clamp_(min=1)).bitwise_xor_(ZERO_POINT)
    codes[0, group.slots] = _spread(conv, output).view(torch.int8)


def supports(conv: PackedConv) -> bool:
    """Returns whether this path computes the convolution: any but a transposed one, and the 2x2."""
    geometry = conv.kernel_size, conv.stride, conv.padding
    return not conv.transposed or geometry == ((2, 2), (2, 2), (0, 0))


def run(call: ConvCall, stream: Tensor | None, codes: Tensor | None) -> None:
    """Computes the call and writes what is asked for."""
    for group in conv_reference.groups(call):
        output_step = _fusible_step(call, group, stream)
        if codes is not None and output_step is not None:
            _fused(call, group, output_step, codes)
        else:
            conv_reference.finish(call, group, _sums(call, group), stream, codes)
