"""The integer convolution on oneDNN's int8 kernels, see `onednn.py`.

16-bit codes are four products of bytes, (256 a + b)(256 c + d), made by one convolution: the bytes
a and b are twice as many samples, c and d twice as many output channels.

Where codes alone are asked for, oneDNN's own epilogue makes them in the same pass; it orders its
float32 roundings in its own way, so codes may differ at rounding ties. Otherwise it returns the
sums, and the reference's epilogue follows.
"""

from __future__ import annotations

from threading import Lock

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from . import conv_reference
from .conv_call import ConvCall
from .conv_pack import PackedConv, unpack_weight
from .conv_reference import Group
from .onednn import ZERO_POINT, convolve, prepack

# up to here float32 holds every integer
EXACT = 2**24
# layouts that one convolution's weights are kept in: one for every shape, width and part of K
KEPT = 32

_prepacked: WeakIdKeyDictionary = WeakIdKeyDictionary()
_lock = Lock()


def _weight(
    conv: PackedConv, variant: int, planes: int, channels: slice, shape: list[int]
) -> Tensor:
    """Returns the weights of some input channels in oneDNN's order, made once; high rows last."""
    kept = _prepacked.setdefault(conv.codes, {})
    version = 0 if conv.codes.is_inference() else conv.codes._version
    key = (version, variant, planes, channels.start, channels.stop, *shape)
    packed = kept.get(key)
    if packed is None:
        rows = [
            _plain(conv, unpack_weight(conv._replace(codes=conv.codes[:, p : p + 1]), variant))
            for p in range(planes)
        ]
        weight = torch.cat(rows)[:, channels].to(torch.int8).contiguous()
        packed = prepack(weight, *_geometry(conv), shape=shape)
        _keep(kept, key, packed)
    return packed


def _keep(kept: dict[tuple, Tensor], key: tuple, packed: Tensor) -> None:
    """Adds one layout; the oldest leave where there are too many."""
    # what another thread adds between the two steps of finding the oldest would be an error
    with _lock:
        while len(kept) >= KEPT:
            del kept[next(iter(kept))]
        kept[key] = packed


def _plain(conv: PackedConv, weight: Tensor) -> Tensor:
    """Makes a transposed convolution's weight a 1x1 with a row for each tap and channel."""
    if not conv.transposed:
        return weight
    return weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0], 1, 1)


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


def _unsigned(call: ConvCall, group: Group, planes: int, channels: slice) -> Tensor:
    """Returns the bytes of a group's codes as uint8, q + 128; the high ones are further samples."""
    codes = call.input[:planes, group.samples, channels].flatten(0, 1)
    return codes.contiguous(memory_format=torch.channels_last).view(torch.uint8) ^ ZERO_POINT


def _sums(call: ConvCall, group: Group) -> Tensor:
    """Returns a group's sums, exact where the epilogue needs them so, else rounded to float32."""
    conv = call.conv
    planes = 1 if group.num_bits <= 8 else 2
    taps = 1 if conv.transposed else conv.kernel_size[0] * conv.kernel_size[1]
    channels = conv.in_channels // conv.groups
    share = channels
    if planes == 2 or (call.output_planes == 2 and group.output_num_bits > 8):
        # so few input channels at a time that float32 holds their sums of bytes
        share = min(channels, (EXACT - 1) // (taps * 128 * 128))
    if conv.groups > 1 and (planes == 2 or share < channels):
        return conv_reference.integer_sum(call, group)
    total: Tensor | None = None
    for first in range(0, channels, share):
        some = slice(None) if share == channels else slice(first, first + share)
        codes = _unsigned(call, group, planes, some)
        weight = _weight(conv, conv.variant(group.num_bits), planes, some, list(codes.shape))
        part = convolve(codes, weight, *_geometry(conv))
        part = _joined(part) if planes == 2 else part
        total = part if total is None else total.double() + part
    assert total is not None
    return _spread(conv, total)


def _joined(sums: Tensor) -> Tensor:
    """Returns the float64 sums of 16-bit codes from those of bytes [2N, 2 rows, H, W]."""
    (low_low, low_high), (high_low, high_high) = (half.chunk(2, 1) for half in sums.chunk(2))
    total = high_high.double().mul_(256).add_(low_high).add_(high_low)
    return total.mul_(256).add_(low_low)


def _fusible_step(
    call: ConvCall, group: Group, stream: Tensor | None, skip: Tensor | None
) -> float | None:
    """Returns the output's step if oneDNN's epilogue does all that this group needs."""
    plain = all(part is None for part in (call.residual, call.affine, stream, skip))
    narrow = group.num_bits <= 8 and group.output_num_bits == 8
    if not (plain and narrow) or group.output_step is None:
        return None
    steps = group.step.item(), group.output_step.item()
    return steps[1] if all(0 < step < float("inf") for step in steps) else None


def _fused(call: ConvCall, group: Group, output_step: float, codes: Tensor) -> None:
    conv = call.conv
    variant = conv.variant(group.num_bits)
    repeats = 4 if conv.transposed else 1
    unsigned = _unsigned(call, group, 1, slice(None))
    weight = _weight(conv, variant, 1, slice(None), list(unsigned.shape))
    output = convolve(
        unsigned, weight, *_geometry(conv),
        step=float(group.step), scale=conv.scale[variant, 0].repeat(repeats),
        bias=conv.bias[0].repeat(repeats), output_step=output_step,
        relu=call.relu, dtype=torch.uint8,
    )
    # -128 is no code
    output = (output if call.relu else output.clamp_(min=1)).bitwise_xor_(ZERO_POINT)
    codes[0, group.slots] = _spread(conv, output).view(torch.int8)


def supports(conv: PackedConv) -> bool:
    """Returns whether this path computes the convolution: any but a transposed one, and the 2x2."""
    geometry = conv.kernel_size, conv.stride, conv.padding
    return not conv.transposed or geometry == ((2, 2), (2, 2), (0, 0))


def run(
    call: ConvCall, stream: Tensor | None, codes: Tensor | None, skip: Tensor | None = None
) -> None:
    """Computes the call and writes what is asked for, as `conv_int_triton.run` does."""
    for group in conv_reference.groups(call):
        output_step = _fusible_step(call, group, stream, skip)
        if codes is not None and output_step is not None:
            _fused(call, group, output_step, codes)
        else:
            conv_reference.finish(call, group, _sums(call, group), stream, codes, skip)
