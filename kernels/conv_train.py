"""Convolution with fake-quantised weights and input, differentiable, for training.

    y_n = conv(fq(x_n; b_x), fq(w; b_n)) + bias

b_n is one width for the batch or one per sample, as a bit selector chooses it (Med-DANet V2,
section 3.4). A weight's range is its own maximum, so nothing is clipped and the straight-through
gradient by the weight is conv's own, whatever the widths. A float width of sample n receives
ln 2 * <g_n, conv(x_n, w - fq_b(w))>: one more convolution, not a weight gradient per sample.

Samples that chose the same width run as one batch. Which ones did is known only when the operation
runs, so widths in a tensor go through an operator that tracing takes as a whole.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import memory_format, wide_dtype
from .per_width import by_width, conv_per_width, weight_amax
from .quantize import LN2, check_num_bits, fake_quantize, fake_quantize_reference


def fake_quant_conv2d_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    num_bits: int | Tensor,
    input_num_bits: int | Tensor | None = None,
    input_amax: Tensor | None = None,
    per_channel: bool = False,
) -> Tensor:
    """Plain PyTorch statement of `fake_quant_conv2d`, sample by sample, autograd's gradient."""
    input = _checked_input(fake_quantize_reference, input, num_bits, input_num_bits, input_amax)
    amax = weight_amax(weight, per_channel)
    if isinstance(num_bits, int) or len(input) == 0:
        width = num_bits if isinstance(num_bits, int) else 8
        weight = fake_quantize_reference(weight, width, amax)
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    amax = amax.expand(1, *weight.shape)
    outputs = []
    for n in range(len(input)):
        quantised = fake_quantize_reference(weight[None], num_bits[n : n + 1], amax)[0]
        sample = input[n : n + 1]
        outputs.append(F.conv2d(sample, quantised, bias, stride, padding, dilation, groups))
    return torch.cat(outputs)


@torch.library.custom_op("meddanet::fake_quant_conv2d", mutates_args=())
def _fake_quant_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    num_bits: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    per_channel: bool,
) -> Tensor:
    """Convolution in the input's dtype and layout with one weight width per sample."""
    weight, bias = weight.detach(), None if bias is None else bias.detach().to(input.dtype)

    def convolve(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w.to(x.dtype), bias, stride, padding, dilation, groups)

    with torch.autocast(input.device.type, enabled=False):
        if len(input):
            amax = weight_amax(weight, per_channel)
            output = conv_per_width(convolve, input.detach(), weight, num_bits.detach(), amax)
        else:
            output = convolve(input.detach(), weight)
    return output.contiguous(memory_format=memory_format(input))


@torch.library.custom_op("meddanet::fake_quant_conv2d_backward", mutates_args=())
def _fake_quant_conv2d_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    num_bits: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    per_channel: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by input, weight and widths, those that are wanted; the others are empty."""
    grad_input, grad_weight, grad_bits = _empty_gradients(input, weight, num_bits, wanted)
    grad_weight.zero_()
    input, weight = input.detach(), weight.detach()
    amax = weight_amax(weight, per_channel) if len(input) else None
    for width, samples in by_width(num_bits):
        x, g = input[samples], grad[samples]
        quantised = fake_quantize(weight, width, amax)
        if wanted[0] or wanted[1]:
            x_grad, w_grad, _ = torch.ops.aten.convolution_backward(
                g, x, quantised.to(x.dtype), None, stride, padding, dilation, False, [0, 0],
                groups, [*wanted[:2], False],
            )  # fmt: skip
            if wanted[0]:
                grad_input[samples] = x_grad
            if wanted[1]:
                grad_weight += w_grad
        if wanted[2]:
            error = (weight - quantised).to(x.dtype)
            slope = F.conv2d(x, error, None, stride, padding, dilation, groups)
            total = (g * slope).sum((1, 2, 3), dtype=wide_dtype(x))
            grad_bits[samples] = (LN2 * total).to(grad_bits.dtype)
    return grad_input, grad_weight, grad_bits


def _empty_gradients(
    input: Tensor, weight: Tensor, num_bits: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = (
        torch.empty_like(t, memory_format=memory_format(t)) if want else t.new_empty(0)
        for t, want in zip((input, weight, num_bits), wanted, strict=True)
    )
    return first, second, third


@_fake_quant_conv2d.register_fake
def _(input, weight, bias, num_bits, stride, padding, dilation, groups, per_channel):
    output = F.conv2d(input, weight.to(input.dtype), None, stride, padding, dilation, groups)
    return torch.empty_like(output, memory_format=memory_format(input))


@_fake_quant_conv2d_backward.register_fake
def _(grad, input, weight, num_bits, stride, padding, dilation, groups, per_channel, wanted):
    return _empty_gradients(input, weight, num_bits, wanted)


def _save(ctx, inputs, output):
    input, weight, _, num_bits, *ctx.geometry = inputs
    ctx.save_for_backward(input, weight, num_bits)


def _backward(ctx, grad):
    needs_input, needs_weight, needs_bias, needs_bits = ctx.needs_input_grad[:4]
    wanted = [needs_input, needs_weight, needs_bits]
    gradients = _fake_quant_conv2d_backward(grad, *ctx.saved_tensors, *ctx.geometry, wanted)
    by_input, by_weight, by_bits = (
        g if want else None for g, want in zip(gradients, wanted, strict=True)
    )
    by_bias = grad.sum((0, 2, 3)) if needs_bias else None
    return by_input, by_weight, by_bias, by_bits, None, None, None, None, None


_fake_quant_conv2d.register_autograd(_backward, setup_context=_save)


def _checked_input(
    quantize: Callable[..., Tensor],
    input: Tensor,
    num_bits: int | Tensor,
    input_num_bits: int | Tensor | None,
    input_amax: Tensor | None,
) -> Tensor:
    """Checks the arguments; returns the input, quantised by its own widths if there are any."""
    if input.dim() != 4:
        raise ValueError(f"input must be [N, C, H, W], got shape {list(input.shape)}")
    check_num_bits("num_bits", num_bits, len(input))
    if input_num_bits is None:
        return input
    check_num_bits("input_num_bits", input_num_bits, len(input))
    if input_amax is None and isinstance(input_num_bits, int):
        input_num_bits = torch.full((len(input),), input_num_bits, device=input.device)
    return quantize(input, input_num_bits, input_amax)


def _as_pair(value: int | tuple[int, int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _padded(
    input: Tensor, weight: Tensor, padding: int | tuple[int, int] | str, dilation: list[int]
) -> tuple[Tensor, list[int]]:
    """Turns the paddings "same" and "valid" into numbers; an uneven one is put on the input."""
    if not isinstance(padding, str):
        return input, _as_pair(padding)
    if padding == "valid":
        return input, [0, 0]
    y, x = (d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True))
    if y % 2 == x % 2 == 0:
        return input, [y // 2, x // 2]
    return F.pad(input, (x // 2, x - x // 2, y // 2, y - y // 2)), [0, 0]


def fake_quant_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    num_bits: int | Tensor,
    input_num_bits: int | Tensor | None = None,
    input_amax: Tensor | None = None,
    per_channel: bool = False,
) -> Tensor:
    """Applies `F.conv2d` with fake-quantised weights and, if asked, fake-quantised input.

    Under autocast it convolves in autocast's dtype, as `F.conv2d` does; the grid stays as it is.

    Args:
        input: [N, Cin, H, W].
        weight: [Cout, Cin / groups, kH, kW].
        bias: [Cout] or None; never quantised.
        stride, padding, dilation, groups: As in `F.conv2d`.
        num_bits: Width of the weights: int, int tensor [N] or float tensor [N] (receives a
            gradient). Widths are whole numbers from 2 to 16.
        input_num_bits: Width of the input, likewise; None leaves the input as it is.
        input_amax: Range of the input, broadcastable to it; None = each sample's own max|x|.
        per_channel: One weight range per output channel instead of one per tensor.

    Returns:
        [N, Cout, Hout, Wout], differentiable in input, weight, bias and float widths.

    Raises:
        ValueError: If a width is out of range or not one per sample, or input is not 4-D.

    Source: Med-DANet V2, Eq. 6 and 7.
    """
    input = _checked_input(fake_quantize, input, num_bits, input_num_bits, input_amax)
    if isinstance(num_bits, int):
        amax = weight_amax(weight, per_channel) if per_channel else None
        weight = fake_quantize(weight, num_bits, amax)
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    device = input.device.type
    if torch.is_autocast_enabled(device) and input.dtype != torch.float64:
        input = input.to(torch.get_autocast_dtype(device))
    input, pads = _padded(input, weight, padding, _as_pair(dilation))
    geometry = (_as_pair(stride), pads, _as_pair(dilation), groups, per_channel)
    return _fake_quant_conv2d(input, weight, bias, num_bits, *geometry)
