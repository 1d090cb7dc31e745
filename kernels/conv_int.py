"""The integer convolution of inference, on codes, with everything that follows it in one pass.

    S     = conv(codes, weight codes)                           an exact integer
    sum   = S * (step * scale_c) + bias_c  [+ residual]         stored as the stream, if asked
    value = ReLU(sum * gain_c + shift_c)                        affine map and ReLU if asked
    codes = clamp(round_half_even(value / step'), +-qmax(b'))   stored as codes, if asked

scale and bias hold the weights' step and the norm that follows this convolution; (gain, shift) is
the norm of the *next* pre-activation block, so that such a block is two calls with nothing between.
Since fq(x) * fq(w) = step_x * step_w * codes_x * codes_w, this is the fake-quantised path of
training (Med-DANet V2, Eq. 6) in eval().

Numerics. S is exact on every executor: at most 2^42 for 16-bit codes. Per-channel constants are
pairs of float32 until they meet S (`pairs.py`). Where a slot's codes have at most 8 bits, what
follows is float32, each product and sum rounded on its own, in the order above: executors agree bit
for bit, and a code differs from that of exact arithmetic only at a rounding tie, to within a few
float32 roundings. Steps of 16 bits are 256 times finer: where a slot has them, everything up to
`value` is carried in float64 (on a GPU in two float32, as float64 may be slow there) and rounded to
float32 once.
(oneDNN, where it makes codes itself, orders roundings in its own way: they agree but at ties.)
A NaN has no code: the stream carries it, the codes are 0 there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import conv_reference
from .backend import onednn_runs, triton_runs
from .conv_call import ConvCall, checked_call, even_planes
from .conv_pack import PackedConv
from .quantize import split_width


class ConvOutput(NamedTuple):
    """What `quant_conv2d` returns; either may be None.

    Attributes:
        stream: The sum, [M, Cout, Hout, Wout].
        codes: int8 [M, Cout, Hout, Wout], or byte planes [2, M, Cout, Hout, Wout].
    """

    stream: Tensor | None
    codes: Tensor | None


@cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def _run(call: ConvCall, stream: Tensor | None, codes: Tensor | None) -> None:
    run: Callable[..., None]
    if triton_runs(call.input):
        from .conv_int_triton import run, supports
    elif onednn_runs(call.input):
        from .conv_int_onednn import run, supports
    else:
        return conv_reference.run(call, stream, codes)
    if supports(call.conv):
        return run(call, stream, codes)
    _say_once(
        f"quant_conv2d has no kernel for {describe(call.conv)}: the plain PyTorch reference "
        "computes it, slowly"
    )
    return conv_reference.run(call, stream, codes)


def describe(conv: PackedConv) -> str:
    """Returns a convolution's geometry in words, for messages."""
    kind = "transposed " if conv.transposed else ""
    height, width = conv.kernel_size
    return (
        f"{kind}{height}x{width}, stride {conv.stride}, padding {conv.padding}, "
        f"dilation {conv.dilation}, groups {conv.groups}"
    )


@torch.library.custom_op("meddanet::quant_conv2d", mutates_args=())
def _quant_conv2d(
    input: Tensor,
    amax: Tensor,
    num_bits: Tensor | None,
    width: int,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor,
    packed_widths: list[int],
    in_channels: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    transposed: bool,
    residual: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    output_amax: Tensor | None,
    output_num_bits: Tensor | None,
    output_width: int,
    slots: Tensor | None,
    count: Tensor | None,
    stream: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Returns (stream, byte planes of codes); what is not asked for is empty."""
    # an exported program was traced with other layouts than it may meet
    call = _call(
        even_planes(input), amax, num_bits, width, codes, scale, bias, packed_widths,
        in_channels, kernel_size,
        stride, padding, dilation, groups, transposed, residual, gain, shift, relu, output_amax,
        output_num_bits, output_width, slots, count,
    )
    outputs = _outputs(call, stream)
    if call.samples:
        _run(call, *outputs)
    return _present(call, outputs)


@_quant_conv2d.register_fake
def _(*arguments):
    call = _call(*arguments[:-1])
    return _present(call, _outputs(call, arguments[-1]))


def _call(
    input, amax, num_bits, width, codes, scale, bias, packed_widths, in_channels, kernel_size,
    stride, padding, dilation, groups, transposed, residual, gain, shift, relu, output_amax,
    output_num_bits, output_width, slots, count,
) -> ConvCall:
    """Puts the operator's flat arguments back together."""
    conv = PackedConv(
        codes, scale, bias, tuple(packed_widths), in_channels, tuple(kernel_size), tuple(stride),
        tuple(padding), tuple(dilation), groups, transposed,
    )
    return ConvCall(
        input, conv, amax, width if num_bits is None else num_bits, residual,
        None if gain is None else (gain, shift), relu, output_amax,
        output_width if output_num_bits is None else output_num_bits, slots, count,
    )


def flat(call: ConvCall) -> tuple:
    """Reverses `_call`."""
    return (
        call.input, call.amax, *split_width(call.num_bits), *call.conv, call.residual,
        *(call.affine or (None, None)), call.relu, call.output_amax,
        *split_width(call.output_num_bits), call.slots, call.count,
    )


def _outputs(call: ConvCall, stream: torch.dtype | None) -> tuple[Tensor | None, Tensor | None]:
    return (
        None if stream is None else call.new_stream(stream),
        None if call.output_amax is None else call.new_codes(),
    )


def _present(call: ConvCall, outputs: tuple[Tensor | None, Tensor | None]) -> tuple[Tensor, Tensor]:
    stream, codes = outputs
    empty = call.input.new_empty
    return empty(0) if stream is None else stream, empty(0) if codes is None else codes


def _named(total: Tensor | None, codes: Tensor | None) -> ConvOutput:
    return ConvOutput(total, codes[0] if codes is not None and len(codes) == 1 else codes)


def quant_conv2d_reference(
    input: Tensor,
    conv: PackedConv,
    amax: Tensor,
    *,
    num_bits: int | Tensor = 8,
    residual: Tensor | None = None,
    stream: torch.dtype | None = None,
    affine: tuple[Tensor, Tensor] | None = None,
    relu: bool = False,
    output_amax: Tensor | None = None,
    output_num_bits: int | Tensor = 8,
    slots: Tensor | None = None,
    count: Tensor | None = None,
) -> ConvOutput:
    """Plain PyTorch statement of `quant_conv2d`, slot by slot."""
    call = checked_call(
        input, conv, amax, num_bits=num_bits, residual=residual, stream=stream, affine=affine,
        relu=relu, output_amax=output_amax, output_num_bits=output_num_bits, slots=slots,
        count=count,
    )
    outputs = _outputs(call, stream)
    conv_reference.run(call, *outputs)
    return _named(*outputs)


def quant_conv2d(
    input: Tensor,
    conv: PackedConv,
    amax: Tensor,
    *,
    num_bits: int | Tensor = 8,
    residual: Tensor | None = None,
    stream: torch.dtype | None = None,
    affine: tuple[Tensor, Tensor] | None = None,
    relu: bool = False,
    output_amax: Tensor | None = None,
    output_num_bits: int | Tensor = 8,
    slots: Tensor | None = None,
    count: Tensor | None = None,
) -> ConvOutput:
    """Convolves integer codes exactly and does all that follows in the same pass.

    Routing needs no synchronisation with the host: widths, the sample that a slot reads and the
    number of slots in use may all be tensors that the device has just written.

    Args:
        input: Codes, channels last: int8 [N, C, H, W] (all samples of 8 bits or fewer), or int8
            byte planes [2, N, C, H, W] as `split_codes` and `encode` make them. int16
            [N, C, H, W] is split first, at the cost of a pass.
        conv: Weights from `pack_conv`.
        amax: Range of the input, one value or one per sample [N]; its step is amax / qmax.
        num_bits: Width of the codes and, of the packed ones, of the weights: int, or tensor [N].
            A kernel, which cannot refuse them, gives NaN for 16-bit widths in a tensor with codes
            of one byte plane.
        residual: [M, Cout, Hout, Wout], float32, float16 or bfloat16, added to the sum, or None.
        stream: Dtype in which the sum is returned; None does not return it.
        affine: (scale, shift), [Cout], of the norm before the next convolution, or None.
        relu: Whether values below zero become zero before they are quantised.
        output_amax: Range of the output codes, one value or one per slot; None returns no codes.
        output_num_bits: Width of the output codes: int, or tensor [M].
        slots: Integer [M]: slot m of the outputs reads sample slots[m]; None: m reads m.
        count: Integer tensor of one element: slots from here on are left zero; None: all are used.

    Returns:
        (stream, codes), each None unless asked for: stream [M, Cout, Hout, Wout]; codes int8 of
        that shape, or byte planes [2, ...] where a sample may have more than 8 bits. Channels last.

    Raises:
        ValueError: If a shape, dtype or width does not fit, or neither output is asked for.

    Source: Med-DANet V2, Eq. 6, on integers.
    """
    call = checked_call(
        input, conv, amax, num_bits=num_bits, residual=residual, stream=stream, affine=affine,
        relu=relu, output_amax=output_amax, output_num_bits=output_num_bits, slots=slots,
        count=count,
    )
    total, codes = _quant_conv2d(*flat(call), stream)
    return _named(None if stream is None else total, None if output_amax is None else codes)
