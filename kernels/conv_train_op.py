"""The operator under `fake_quant_conv2d`: its forward, what it keeps, and its gradients.

Forward. Samples that chose the same widths run as one batch: on integer codes where
`forward_way.py` says so, else as PyTorch's convolution on their values. Which samples did is known
only when the operation runs, so tracing takes the operator as a whole.

Kept for the backward pass: of a quantised input its codes, the range of each sample, and one bit
per element where a given range may clip (see `input_codes.py`); of an input that is left in float,
or whose own width learns (its gradient hangs on what rounding took away), the input itself.

Backward. The gradients by input and weight are PyTorch's convolution_backward on the values, read
back from codes or quantised again; then the straight-through gradient of the quantisation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .conv_on_codes import conv_on_codes
from .conv_pack import byte_planes
from .forward_way import takes_integers
from .input_codes import InputCodes, decode_input, encode_input, new_packed, new_planes
from .layout import memory_format, wide_dtype
from .per_width import by_width, weight_amax
from .quantize import LN2, _fake_quantize, _masked_gradient, _width_gradient, fake_quantize


def convolve(
    input: Tensor, weight: Tensor, geometry: list[int], bias: Tensor | None = None
) -> Tensor:
    """Runs `F.conv2d` in the input's dtype.

    Args:
        input: [N, Cin, H, W].
        weight: [Cout, Cin / groups, kH, kW], in the input's dtype.
        geometry: As for `fake_quant_conv2d_op`.
        bias: [Cout], of any dtype, or None.

    Returns:
        [N, Cout, Hout, Wout].
    """
    bias = None if bias is None else bias.to(input.dtype)
    return F.conv2d(input, weight, bias, geometry[:2], geometry[2:4], geometry[4:6], geometry[6])


@torch.library.custom_op("meddanet::fake_quant_conv2d", mutates_args=())
def fake_quant_conv2d_op(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    num_bits: Tensor | None,
    width: int,
    input_num_bits: Tensor | None,
    input_width: int,
    amax: Tensor | None,
    dtype: torch.dtype,
    geometry: list[int],
    per_channel: bool,
    keep: bool,
    mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the output and, as far as asked for, the input's byte planes, ranges and mask.

    Args:
        input: [N, Cin, H, W].
        weight: [Cout, Cin / groups, kH, kW].
        bias: [Cout] or None.
        num_bits: Widths of the weight [N], or None: all samples take `width`.
        width: See `num_bits`.
        input_num_bits: Widths of the input [N], or None: all samples take `input_width`.
        input_width: See `input_num_bits`; without either, 0, the input is not quantised.
        amax: Range of the input, [1] or [N]; None: it is not quantised.
        dtype: Of the output and of PyTorch's convolution.
        geometry: Stride, padding, dilation (y, x each) and groups.
        per_channel: One weight range per output channel.
        keep: Whether to return byte planes and ranges.
        mask: Whether to return the bits of |input| <= amax.
    """
    input, weight = input.detach(), weight.detach()
    bits = width if num_bits is None else num_bits
    input_bits = input_width if input_num_bits is None else input_num_bits
    groups = list(by_width(bits, input_bits))
    on_codes = [amax is not None and _on_codes(input, weight, geometry, w) for w, _ in groups]
    made = _nothing_kept(input)
    if amax is not None:
        wanted = None if on_codes and all(on_codes) else dtype
        read = [byte_planes(x) for ((_, x), _), on in zip(groups, on_codes, strict=True) if on]
        count = byte_planes(input_bits) if keep else max(read, default=0)
        made = encode_input(input, input_bits, amax, planes=count, values=wanted, mask=mask)
    values = input.to(dtype) if amax is None else made.values
    output = None if len(groups) == 1 else _new_output(input, weight, geometry, dtype)
    with torch.autocast(input.device.type, enabled=False):
        for ((b, x), samples), integers in zip(groups, on_codes, strict=True):
            if integers:
                planes, ranges = made.planes[: byte_planes(x), samples], made.ranges[samples]
                part = conv_on_codes(planes, x, ranges, weight, b, bias, geometry, per_channel)
            else:
                quantised = fake_quantize(weight, b, weight_amax(weight, per_channel)).to(dtype)
                part = convolve(values[samples], quantised, geometry, bias)
            if output is None:
                output = part.to(dtype).contiguous(memory_format=memory_format(input))
            else:
                output[samples] = part.to(dtype)
    assert output is not None
    kept = made if keep else _nothing_kept(input)
    return output, kept.planes, kept.ranges, made.packed


def _on_codes(input: Tensor, weight: Tensor, geometry: list[int], widths: tuple[int, ...]) -> bool:
    """Tells whether samples of these widths (weight's, input's) run on integers."""
    bytes = {byte_planes(width) for width in widths if 2 <= width <= 16}
    one = len(bytes) == 1 and min(widths) >= 2 and max(widths) <= 16
    return one and takes_integers(input, weight, geometry, bytes.pop())


def _nothing_kept(input: Tensor) -> InputCodes:
    return InputCodes(
        input.new_empty(0, dtype=torch.int8), input.new_empty(0),
        input.new_empty(0, dtype=torch.uint8), input.new_empty(0, dtype=wide_dtype(input)),
    )


def _new_output(input: Tensor, weight: Tensor, geometry: list[int], dtype: torch.dtype) -> Tensor:
    sizes = []
    for size, kernel, *place in zip(
        input.shape[2:], weight.shape[2:], *(geometry[i : i + 2] for i in (0, 2, 4)), strict=True
    ):
        stride, padding, dilation = place
        sizes.append((size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1)
    # len() would fix a size that tracing leaves open
    return torch.empty(
        input.shape[0], weight.shape[0], *sizes, dtype=dtype, device=input.device,
        memory_format=memory_format(input),
    )


@fake_quant_conv2d_op.register_fake
def _(
    input, weight, bias, num_bits, width, input_num_bits, input_width, amax, dtype, geometry,
    per_channel, keep, mask,
):
    output = _new_output(input, weight, geometry, dtype)
    planes, _, packed, ranges = _nothing_kept(input)
    if keep:
        planes = new_planes(input, byte_planes(input_width if input_num_bits is None else 16))
        ranges = input.new_empty(input.shape[0], dtype=wide_dtype(input))
    return output, planes, ranges, new_packed(input) if mask else packed


@torch.library.custom_op("meddanet::fake_quant_conv2d_backward", mutates_args=())
def conv_backward(
    grad: Tensor,
    values: Tensor,
    weight: Tensor,
    num_bits: Tensor | None,
    width: int,
    geometry: list[int],
    per_channel: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients by values, weight and its widths; what is not wanted is empty.

    Args:
        grad: [N, Cout, Hout, Wout], of the output.
        values: [N, Cin, H, W], in the dtype of `grad`: what was convolved.
        weight: [Cout, Cin / groups, kH, kW], before it was quantised.
        num_bits, width, geometry, per_channel: As for `fake_quant_conv2d_op`.
        wanted: By values, by weight, by widths.

    Returns:
        Tensors of the shapes, dtypes and layouts of `values`, `weight` and `num_bits`.
    """
    by_values, by_weight, by_bits = _empty_gradients(values, weight, num_bits, wanted)
    by_weight.zero_()
    weight = weight.detach()
    amax = weight_amax(weight, per_channel)
    places = geometry[0:2], geometry[2:4], geometry[4:6], False, [0, 0], geometry[6]
    for (b,), samples in by_width(width if num_bits is None else num_bits):
        x, g = values[samples], grad[samples]
        quantised = fake_quantize(weight, b, amax)
        if wanted[0] or wanted[1]:
            x_grad, w_grad, _ = torch.ops.aten.convolution_backward(
                g, x, quantised.to(x.dtype), None, *places, [*wanted[:2], False]
            )
            if wanted[0]:
                by_values[samples] = x_grad
            if wanted[1]:
                by_weight += w_grad
        if wanted[2]:
            slope = convolve(x, (weight - quantised).to(x.dtype), geometry)
            wide = wide_dtype(x)
            total = g.to(wide).mul(slope.to(wide)).sum((1, 2, 3))
            by_bits[samples] = (LN2 * total).to(by_bits.dtype)
    return by_values, by_weight, by_bits


def _empty_gradients(
    values: Tensor, weight: Tensor, num_bits: Tensor | None, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = (
        torch.empty_like(t, memory_format=memory_format(t))
        if want and t is not None
        else values.new_empty(0)
        for t, want in zip((values, weight, num_bits), wanted, strict=True)
    )
    return first, second, third


@conv_backward.register_fake
def _(grad, values, weight, num_bits, width, geometry, per_channel, wanted):
    return _empty_gradients(values, weight, num_bits, wanted)


def _save(ctx, inputs, output):
    input, weight, _, num_bits, ctx.width, input_num_bits, ctx.input_width, amax, *rest = inputs
    ctx.dtype, ctx.geometry, ctx.per_channel, keep, mask = rest
    ctx.quantised, ctx.kept, ctx.masked = amax is not None, keep, mask
    ctx.input_dtype = input.dtype
    ctx.channels_last = memory_format(input) == torch.channels_last
    held = output[1:3] if keep else (input, amax)
    ctx.save_for_backward(weight, num_bits, input_num_bits, *held, output[3] if mask else None)


def _backward(ctx, grad, *_):
    weight, num_bits, input_num_bits, *held, packed = ctx.saved_tensors
    needs_input, needs_weight, needs_bias, needs_bits = ctx.needs_input_grad[:4]
    needs_input_bits = ctx.needs_input_grad[5]
    if ctx.kept:
        values = decode_input(held[0], input_num_bits, ctx.input_width, held[1], ctx.dtype)
    elif ctx.quantised:
        values = _fake_quantize(held[0], input_num_bits, ctx.input_width, held[1], False)[0]
    else:
        values = held[0]
    by_input, by_weight, by_bits = conv_backward(
        grad, values.to(ctx.dtype), weight, num_bits, ctx.width, ctx.geometry, ctx.per_channel,
        [needs_input or needs_input_bits, needs_weight, needs_bits],
    )
    by_input_bits = None
    by_input = by_input.to(ctx.input_dtype)
    if needs_input_bits:
        by_input, by_input_bits = _width_gradient(by_input, held[0], input_num_bits, held[1])
        by_input_bits = by_input_bits.to(input_num_bits.dtype)
    elif ctx.masked:
        by_input = _masked_gradient(by_input, packed, ctx.channels_last)
    return (
        by_input if needs_input else None, by_weight if needs_weight else None,
        grad.sum((0, 2, 3)) if needs_bias else None, by_bits if needs_bits else None, None,
        by_input_bits, *[None] * 7,
    )


fake_quant_conv2d_op.register_autograd(_backward, setup_context=_save)
