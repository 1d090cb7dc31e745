"""Formulas for PyTorch's FlopCounterMode, which cannot look into an operator.

Import this module to count the package's convolutions. It is not imported with
the package: the counter imports triton wherever that is installed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from . import conv_int, conv_train_op, head  # noqa: F401, registers the operators


@register_flop_formula(torch.ops.meddanet.fake_quant_conv2d)
def conv_flop(input_shape: Any, weight_shape: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    """Counts two operations per product, as for `F.conv2d`, whatever the widths."""
    return conv_flop_count(input_shape, weight_shape, out_shape[0])


@register_flop_formula(torch.ops.meddanet.fake_quant_conv2d_backward)
def conv_backward_flop(
    grad_shape: Any, input_shape: Any, weight_shape: Any, *arguments: Any, out_shape: Any, **_: Any
) -> int:
    """Counts one convolution for each gradient that is wanted: by input, weight and widths."""
    wanted = arguments[-1]
    return sum(wanted) * conv_flop_count(input_shape, weight_shape, grad_shape)


@register_flop_formula(torch.ops.meddanet.quant_conv2d)
def quant_conv_flop(input_shape: Any, *arguments: Any, out_shape: Any, **_: Any) -> int:
    """Counts two operations per product, whatever the widths; every slot counts as used."""
    in_channels, kernel, groups, transposed = (arguments[i] for i in (7, 8, 12, 13))
    stream, planes = out_shape
    samples, channels, *size = stream if len(stream) == 4 else planes[1:]
    # each pixel of a transposed convolution's input meets each tap once
    pixels = math.prod(input_shape[3:] if transposed else size)
    return 2 * samples * channels * pixels * math.prod(kernel) * in_channels // groups


@register_flop_formula(torch.ops.meddanet.label_head)
def head_flop(input_shape: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
    """Counts the 1x1 convolution: two operations per product."""
    return 2 * math.prod(input_shape) * weight_shape[0]
