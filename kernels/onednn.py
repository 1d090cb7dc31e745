"""oneDNN's int8 convolution, which PyTorch brings for x86 CPUs, and whether to trust it here.

It takes unsigned activations: a code q becomes q + 128 with zero point 128, the same integer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

ZERO_POINT = 128


def convolve(
    codes: Tensor, weight: Tensor, stride, padding, dilation, groups: int, *,
    step: float = 1.0, scale: Tensor | None = None, bias: Tensor | None = None,
    output_step: float = 1.0, relu: bool = False, dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Convolves codes with prepacked weights.

    Args:
        codes: uint8 [N, Cin, H, W], code + `ZERO_POINT`.
        weight: int8 codes, [Cout, Cin / groups, kH, kW] before `prepack`.
        stride, padding, dilation, groups: As in `F.conv2d`, the first three pairs (y, x).
        step: Of the codes.
        scale: float32 [Cout], steps of the weights, or None: 1.
        bias: float32 [Cout] or None.
        output_step: Of codes that go out.
        relu: Whether to cut off below zero.
        dtype: float32 for values, uint8 for codes + `ZERO_POINT`.

    Returns:
        [N, Cout, Hout, Wout] in that dtype.
    """
    rows = weight.shape[0]
    ones, zeros = _ones(rows), torch.zeros(rows, dtype=torch.int64, device="cpu")
    return torch.ops.onednn.qconv2d_pointwise(
        codes, step, ZERO_POINT, weight, ones if scale is None else scale, zeros, bias, stride,
        padding, dilation, groups, output_step, 0 if dtype == torch.float32 else ZERO_POINT, dtype,
        "relu" if relu else "none", [], "",
    )


def prepack(
    codes: Tensor, stride, padding, dilation, groups: int, *, shape: Sequence[int]
) -> Tensor:
    """Lays out int8 weight codes for inputs of one shape [N, Cin, H, W]; geometry as `convolve`."""
    return torch.ops.onednn.qconv_prepack(
        codes, _ones(len(codes)), 1.0, ZERO_POINT, stride, padding, dilation, groups, list(shape)
    )


def _ones(count: int) -> Tensor:
    # whatever the default dtype and device are
    return torch.ones(count, dtype=torch.float32, device="cpu")


@cache
def is_exact() -> bool:
    """Tells, by one convolution of the largest codes, whether int8 sums are exact here.

    Without VNNI instructions pairs of products saturate at 16 bits and results are silently wrong.
    """
    if not hasattr(torch.ops.onednn, "qconv2d_pointwise"):
        return False
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (80, 64, 3, 3), generator=generator, device="cpu") * 2 - 1
    # rows of one sign reach the largest sums, mixed ones meet every pairing
    signs[:16], signs[16:32] = 1, -1
    codes = torch.randint(0, 2, (1, 64, 6, 6), generator=generator, device="cpu") * 254 - 127
    codes[..., :3] = 127
    wanted = F.conv2d(codes.double(), signs.double() * 127)
    try:
        geometry = [1, 1], [0, 0], [1, 1], 1
        weight = prepack((signs * 127).to(torch.int8), *geometry, shape=codes.shape)
        total = convolve((codes + ZERO_POINT).to(torch.uint8), weight, *geometry)
    except RuntimeError:
        return False
    return torch.equal(total.double(), wanted)
