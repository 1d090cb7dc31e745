"""The integer convolution on oneDNN's int8 kernels, which PyTorch brings for x86 CPUs.

oneDNN takes unsigned activations: a code q becomes q + 128 with zero point 128, the same integer.
Samples of more than 8 bits, which it has no kernel for, take the reference's float64, exact too.

Where codes alone are asked for, oneDNN's own epilogue makes them in the same pass; it orders its
float32 roundings in its own way, so codes may differ at rounding ties. Otherwise it returns the
sums, and the reference's epilogue follows.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from . import conv_reference
from .conv_call import ConvCall
from .conv_pack import PackedConv, unpack_weight
from .conv_reference import Group

ZERO_POINT = 128
# largest sum of products whose float32 is exact
EXACT = 2**24

_prepacked: WeakIdKeyDictionary = WeakIdKeyDictionary()


@cache
def is_exact() -> bool:
    """Tells, by one convolution of the largest codes, whether int8 sums are exact here.

    Without VNNI instructions pairs of products saturate at 16 bits and results are silently wrong.
    """
    if not hasattr(torch.ops.onednn, "qconv2d_pointwise"):
        return False
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (80, 64, 3, 3), generator=generator) * 2 - 1
    # rows of one sign reach the largest sums, mixed ones meet every pairing
    signs[:16], signs[16:32] = 1, -1
    codes = torch.randint(0, 2, (1, 64, 6, 6), generator=generator) * 254 - 127
    codes[..., :3] = 127
    wanted = F.conv2d(codes.double(), signs.double() * 127)
    try:
        weight = torch.ops.onednn.qconv_prepack(
            (signs * 127).to(torch.int8), torch.ones(80), 1.0, ZERO_POINT, [1, 1], [0, 0], [1, 1],
            1, list(codes.shape),
        )  # fmt: skip
        total = _convolve((codes + ZERO_POINT).to(torch.uint8), weight, [1, 1], [0, 0], [1, 1], 1)
    except (RuntimeError, NotImplementedError):
        return False
    return torch.equal(total.double(), wanted)


def _convolve(
    codes: Tensor, weight: Tensor, stride, padding, dilation, groups: int, *,
    step: float = 1.0, scale: Tensor | None = None, bias: Tensor | None = None,
    output_step: float = 1.0, relu: bool = False, dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """Convolves uint8 codes with prepacked weights; sums as float32, or requantised as uint8."""
    rows = weight.shape[0]
    ones, zeros = torch.ones(rows), torch.zeros(rows, dtype=torch.int64)
    return torch.ops.onednn.qconv2d_pointwise(
        codes, step, ZERO_POINT, weight, ones if scale is None else scale, zeros, bias, stride,
        padding, dilation, groups, output_step, 0 if dtype == torch.float32 else ZERO_POINT, dtype,
        "relu" if relu else "none", [], "",
    )  # fmt: skip


def _weight(conv: PackedConv, variant: int, shape: list[int]) -> Tensor:
    """Returns one width's weights in oneDNN's order, made once per shape of the input."""
    kept = _prepacked.setdefault(conv.codes, {})
    key = (conv.codes._version, variant, *shape)
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
    return _spread(conv, _convolve(codes, weight, *_geometry(conv)))


def _fuses(call: ConvCall, group: Group, stream: Tensor | None) -> bool:
    """Tells whether oneDNN's epilogue is all that this group needs."""
    plain = call.residual is None and call.affine is None and stream is None
    narrow = group.num_bits <= 8 and group.output_num_bits == 8
    steps = [group.step, group.output_step]
    return plain and narrow and all(s is not None and 0 < float(s) < float("inf") for s in steps)


def _fused(call: ConvCall, group: Group, codes: Tensor) -> None:
    conv = call.conv
    variant = conv.variant(group.num_bits)
    repeats = 4 if conv.transposed else 1
    unsigned = _unsigned(call, group)
    output = _convolve(
        unsigned, _weight(conv, variant, list(unsigned.shape)), *_geometry(conv),
        step=float(group.step), scale=conv.scale[variant].float().repeat(repeats),
        bias=conv.bias.float().repeat(repeats), output_step=float(group.output_step),
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
        if codes is not None and _fuses(call, group, stream):
            _fused(call, group, codes)
        else:
            conv_reference.finish(call, group, _sums(call, group), stream, codes)
