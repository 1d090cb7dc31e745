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

from .conv_train_op import fake_quant_conv2d_op
from .grid import amax_of
from .layout import as_pair, autocast_device
from .per_width import weight_amax
from .quantize import check_num_bits, fake_quantize, fake_quantize_reference, split_width


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
    _check(input, weight, bias, groups, num_bits, input_num_bits)
    if input_num_bits is not None:
        input = _quantised(fake_quantize_reference, input, input_num_bits, input_amax)
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


def _check(
    input: Tensor, weight: Tensor, bias: Tensor | None, groups: int, num_bits: int | Tensor,
    input_num_bits: int | Tensor | None,
) -> None:
    if input.dim() != 4:
        raise ValueError(f"input must be [N, C, H, W], got shape {list(input.shape)}")
    if weight.dim() != 4 or input.shape[1] != groups * weight.shape[1]:
        raise ValueError(
            f"weight must be [Cout, {input.shape[1]} / {groups}, kH, kW], as input and groups are, "
            f"got shape {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], got shape {list(bias.shape)}")
    if not input.is_floating_point():
        raise ValueError(f"input must be a floating-point tensor, got {input.dtype}")
    check_num_bits("num_bits", num_bits, input.shape[0])
    if input_num_bits is not None:
        check_num_bits("input_num_bits", input_num_bits, input.shape[0])


def _quantised(
    quantize: Callable[..., Tensor], input: Tensor, num_bits: int | Tensor, amax: Tensor | None
) -> Tensor:
    """Fake-quantises the input, by default in each sample's own range."""
    if amax is None and isinstance(num_bits, int):
        num_bits = torch.full((input.shape[0],), num_bits, device=input.device)
    return quantize(input, num_bits, amax)


def _per_sample(input: Tensor, amax: Tensor | None) -> bool:
    """Tells whether each sample has one range."""
    return amax is None or amax.numel() == 1 or amax.shape == (input.shape[0], 1, 1, 1)


def _padded(
    input: Tensor,
    weight: Tensor,
    padding: int | tuple[int, int] | str,
    stride: int | tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[Tensor, tuple[int, int]]:
    """Turns the paddings "same" and "valid" into numbers; an uneven one is put on the input."""
    if not isinstance(padding, str):
        return input, as_pair(padding)
    if padding == "valid":
        return input, (0, 0)
    if padding != "same" or as_pair(stride) != (1, 1):
        raise ValueError(
            f"padding is {padding!r} with stride {stride}; expected numbers, 'valid', or 'same' "
            "with stride 1"
        )
    y, x = (d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True))
    if y % 2 == x % 2 == 0:
        return input, (y // 2, x // 2)
    return F.pad(input, (x // 2, x - x // 2, y // 2, y - y // 2)), (0, 0)


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
        ValueError: If a width is out of range or not one per sample, or a shape does not fit.

    Source: Med-DANet V2, Eq. 6 and 7.
    """
    _check(input, weight, bias, groups, num_bits, input_num_bits)
    if input_num_bits is not None and not _per_sample(input, input_amax):
        # a range that changes inside of a sample cannot be taken out of its sums
        input, input_num_bits = _quantised(fake_quantize, input, input_num_bits, input_amax), None
    if input_num_bits is None and isinstance(num_bits, int):
        amax = weight_amax(weight, per_channel) if per_channel else None
        weight = fake_quantize(weight, num_bits, amax)
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    dtype, device = input.dtype, autocast_device(input)
    if torch.is_autocast_enabled(device) and input.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    input, pads = _padded(input, weight, padding, stride, as_pair(dilation))
    geometry = [*as_pair(stride), *pads, *as_pair(dilation), groups]
    amax = None
    if input_num_bits is None:
        input = input.to(dtype)
    elif input_amax is None:
        amax = amax_of(input, per_sample=True)
    else:
        amax = input_amax.detach().reshape(-1)
    learning = [
        isinstance(t, Tensor) and t.requires_grad and torch.is_grad_enabled()
        for t in (input_num_bits, input, weight, num_bits)
    ]
    keep = amax is not None and not learning[0] and any(learning)
    mask = keep and learning[1] and input_amax is not None
    return fake_quant_conv2d_op(
        input, weight, bias, *split_width(num_bits), *split_width(input_num_bits), amax, dtype,
        geometry, per_channel, keep, mask,
    )[0]
