"""Convolution with fake-quantised weights and input, differentiable, for training.

    y_n = conv(fq(x_n; b_x), fq(w; b_n)) + bias

b_n is one width for the batch or one per sample, as a bit selector chooses it (Med-DANet V2,
section 3.4). A float width of sample n receives ln 2 * <g_n, conv(x_n, w - fq_b(w))>: one more
convolution, not a weight gradient per sample.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .quantize import LN2, check_num_bits, fake_quantize, fake_quantize_reference


def weight_amax(weight: Tensor, per_channel: bool) -> Tensor:
    """Returns max|weight|: of the tensor, or per output channel as [Cout, 1, 1, 1]."""
    if not per_channel:
        return weight.detach().abs().amax()
    return weight.detach().abs().flatten(1).amax(1).reshape(-1, *[1] * (weight.dim() - 1))


def conv_per_width(convolve, input: Tensor, weight: Tensor, num_bits: Tensor, amax: Tensor) -> Tensor:
    """Runs `convolve(input, weight)` once per distinct width, on the samples that chose it.

    Args:
        convolve: Function of (input [M, ...], weight) -> output [M, ...], without bias.
        input: [N, ...], already quantised.
        weight: The layer's float weight.
        num_bits: [N], int or float widths.
        amax: Range of the weight.
    """
    widths = num_bits.detach().unique()
    outputs, order = [], []
    for width in widths.tolist():
        index = (num_bits.detach() == width).nonzero().squeeze(1)
        group = input if len(widths) == 1 else input.index_select(0, index)
        quantised = fake_quantize(weight, int(width), amax)
        output = convolve(group, quantised)
        if num_bits.requires_grad:
            # zero in value; its derivative by the width is the one stated above
            slope = LN2 * convolve(group, weight - quantised).detach()
            chosen = num_bits.index_select(0, index).to(output.dtype)
            chosen = chosen.reshape(-1, *[1] * (output.dim() - 1))
            output = output + (chosen - chosen.detach()) * slope
        outputs.append(output)
        order.append(index)
    if len(outputs) == 1:
        return outputs[0]
    return torch.cat(outputs).index_select(0, torch.cat(order).argsort())


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
    """Plain PyTorch statement of `fake_quant_conv2d`; same arguments, same result."""
    batch = input.shape[0]
    check_num_bits("num_bits", num_bits, batch)
    if input_num_bits is not None:
        check_num_bits("input_num_bits", input_num_bits, batch)
        if input_amax is None and isinstance(input_num_bits, int):
            input_num_bits = torch.full((batch,), input_num_bits, device=input.device)
        input = fake_quantize_reference(input, input_num_bits, input_amax)
    amax = weight_amax(weight, per_channel)

    def convolve(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, None, stride, padding, dilation, groups)

    if isinstance(num_bits, Tensor) and batch > 0:
        output = conv_per_width(convolve, input, weight, num_bits, amax)
        return output if bias is None else output + bias.reshape(1, -1, 1, 1)
    width = num_bits if isinstance(num_bits, int) else 8
    quantised = fake_quantize_reference(weight, width, amax)
    return F.conv2d(input, quantised, bias, stride, padding, dilation, groups)


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
        ValueError: If a width is out of range or not one per sample.

    Source: Med-DANet V2, Eq. 6 and 7.
    """
    return fake_quant_conv2d_reference(
        input, weight, bias, stride, padding, dilation, groups, num_bits=num_bits,
        input_num_bits=input_num_bits, input_amax=input_amax, per_channel=per_channel,
    )
