"""`meddanet.kernels.onednn` for the layers of a model: their geometry, their codes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels import onednn
from ..kernels.onednn import ZERO_POINT


def pack(codes: Tensor, scale: Tensor, step: float, layer: nn.Conv2d, shape: torch.Size) -> Tensor:
    """Lays out weight codes for inputs of one shape.

    Args:
        codes: [Cout, Cin, kH, kW] whole numbers within +-127.
        scale: [Cout], step of the weights.
        step: Step of the input.
        layer: Says stride, padding, dilation.
        shape: [N, Cin, H, W].
    """
    return torch.ops.onednn.qconv_prepack(
        codes.to(torch.int8), scale.contiguous(), step, ZERO_POINT, layer.stride, layer.padding,
        layer.dilation, layer.groups, shape,
    )


def convolve(codes: Tensor, step: float, packed: Tensor, scale: Tensor, layer: nn.Conv2d) -> Tensor:
    """Convolves input codes [N, Cin, H, W] (whole numbers within +-127); returns float32."""
    unsigned = codes.to(torch.int8).view(torch.uint8).bitwise_xor_(ZERO_POINT)
    return onednn.convolve(
        unsigned, packed, layer.stride, layer.padding, layer.dilation, layer.groups,
        step=step, scale=scale.contiguous(), bias=layer.bias,
    )
