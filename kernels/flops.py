"""Formulas for PyTorch's FlopCounterMode, which cannot look into an operator.

Import this module to count the convolutions with one width per sample. It is not imported with
the package: the counter imports triton wherever that is installed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from . import conv_train  # noqa: F401, registers the operators


@register_flop_formula(torch.ops.meddanet.fake_quant_conv2d)
def conv_flop(input_shape: Any, weight_shape: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    """Counts two operations per product, as for `F.conv2d`, whatever the widths."""
    return conv_flop_count(input_shape, weight_shape, out_shape)


@register_flop_formula(torch.ops.meddanet.fake_quant_conv2d_backward)
def conv_backward_flop(
    grad_shape: Any, input_shape: Any, weight_shape: Any, *arguments: Any, out_shape: Any, **_: Any
) -> int:
    """Counts one convolution for each gradient that is wanted: by input, weight and widths."""
    wanted = arguments[-1]
    return sum(wanted) * conv_flop_count(input_shape, weight_shape, grad_shape)
