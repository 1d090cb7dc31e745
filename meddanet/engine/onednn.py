"""oneDNN's int8 convolution as PyTorch has it, and whether this machine runs it exactly.

x86 multiplies unsigned by signed bytes: an input code q is passed as q + 128 with zero point 128.
Without VNNI two such products are added in 16 bit, which saturates, and results are silently wrong.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ZERO = 128


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
        codes.to(torch.int8), scale.contiguous(), step, _ZERO, layer.stride, layer.padding,
        layer.dilation, layer.groups, shape,
    )


def convolve(codes: Tensor, step: float, packed: Tensor, scale: Tensor, layer: nn.Conv2d) -> Tensor:
    """Convolves input codes [N, Cin, H, W] (whole numbers within +-127); returns float32."""
    unsigned = codes.to(torch.int8).view(torch.uint8).bitwise_xor_(_ZERO)
    return torch.ops.onednn.qconv2d_pointwise(
        unsigned, step, _ZERO, packed, scale.contiguous(),
        torch.zeros(len(scale), dtype=torch.long), layer.bias, layer.stride, layer.padding,
        layer.dilation, layer.groups, 1.0, 0, torch.float32, "none", [], "",
    )


@cache
def is_exact() -> bool:
    """Tells, by trying codes of +-127, whether sums come out exact on this machine."""
    layer = nn.Conv2d(32, 8, 3, padding=1, bias=False)
    signs = torch.arange(32 * 8 * 9).reshape(8, 32, 3, 3) % 3 - 1
    weight = 127.0 * torch.where(signs == 0, 1, signs)
    codes = torch.full((1, 32, 6, 6), 127.0).contiguous(memory_format=torch.channels_last)
    scale = torch.ones(8)
    try:
        for sign in (1, -1):
            packed = pack(weight, scale, 1.0, layer, codes.shape)
            found = convolve(sign * codes, 1.0, packed, scale, layer)
            if not torch.equal(found, F.conv2d(sign * codes, weight, padding=1)):
                return False
    except (AttributeError, RuntimeError):
        return False
    return True
