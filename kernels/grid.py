"""The package's one quantisation grid: training, reference, CPU and GPU put values on it.

    step = amax / qmax(b)
    code = clamp(round_half_even(x / step), -qmax(b), qmax(b))
    value = code * step

Med-DANet V2 (WACV 2024), Eq. 6, with its two slips mended: the range is max|x|, not max(x), and
qmax(b) = 2^(b-1) - 1, so that no code overflows. qmax(16) = 32639 = 127 * 256 + 127: a 16-bit code
splits into two signed bytes, and an exact 16-bit product is four int8 products.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .layout import wide_dtype


def qmax(num_bits: int | Tensor) -> int | Tensor:
    """Returns the largest code of a width: 2^(b-1) - 1, and 32639 at 16 bit.

    Args:
        num_bits: An int, or a tensor of widths of any shape; float ones are rounded, as they may
            carry the noise of a straight-through sum.

    Returns:
        An int, or a float64 tensor of the same shape: NaN for widths outside of 2..16.
    """
    if isinstance(num_bits, Tensor):
        width = num_bits.detach().to(torch.float64).round()
        largest = torch.where(width == 16, 32639.0, 2.0 ** (width - 1) - 1)
        return torch.where((width >= 2) & (width <= 16), largest, math.nan)
    return 32639 if num_bits == 16 else 2 ** (num_bits - 1) - 1


def amax_of(input: Tensor, per_sample: bool) -> Tensor:
    """Returns max|input|: [N], of each sample, or [1], of the whole tensor."""
    if input.numel() == 0:
        return input.new_zeros(input.shape[0] if per_sample else 1)
    input = input.detach()
    axes = tuple(range(1 if per_sample else 0, input.dim()))
    if not axes:
        return input.abs().reshape(-1)
    # two passes that read beat abs(), which writes
    return torch.maximum(input.amax(axes), -input.amin(axes)).reshape(-1)


def step_size(
    input: Tensor, num_bits: int | Tensor, amax: Tensor
) -> tuple[Tensor, Tensor | int, Tensor]:
    """Returns (step, qmax, amax) that broadcast to `input`; a range of inf is NaN, below 0 is 0.

    Args:
        input: [N, ...].
        num_bits: An int or a tensor [N].
        amax: [1], [N], or of as many axes as the input, to which it broadcasts.
    """
    dtype = wide_dtype(input)
    column = [-1] + [1] * (input.dim() - 1)
    largest = qmax(num_bits)
    if isinstance(largest, Tensor):
        largest = largest.to(dtype).reshape(column)
    if amax.dim() != input.dim():
        amax = amax.reshape(column if input.dim() else [])
    amax = amax.detach().to(dtype)
    # an infinity becomes NaN
    amax = (amax + 0 * amax).clamp_min(0)
    # on a GPU a number's reciprocal would be multiplied by
    divisor = largest if isinstance(largest, Tensor) else torch.full_like(amax, largest)
    return amax / divisor, largest, amax


def quantize_codes(input: Tensor, step: Tensor, largest: Tensor | int) -> Tensor:
    """Returns the integer codes of `input`; a step of 0 gives zeros, NaN stays NaN.

    Args:
        input: Of any shape and floating-point dtype.
        step: float32 or float64, broadcastable to `input`, as `step_size` returns it.
        largest: An int, or a tensor of the step's dtype, likewise.

    Returns:
        Whole numbers in the step's dtype and the input's shape.
    """
    wide, divisor = input.to(step.dtype), step.masked_fill(step == 0, math.inf)
    # a copy is free to be written to
    codes = wide.div(divisor) if wide is input else wide.div_(divisor)
    codes.round_()
    if isinstance(largest, int):
        return codes.clamp_(-largest, largest)
    # clamp_ with tensors is ten times slower on a CPU
    torch.minimum(codes, largest, out=codes)
    return torch.maximum(codes, -largest, out=codes)


def inside(input: Tensor, amax: Tensor) -> Tensor:
    """Returns 1 where |input| <= amax, 0 elsewhere: uint8, in the input's shape.

    Args:
        input: Of any shape and floating-point dtype.
        amax: Broadcastable to it, as `step_size` returns it; compared in its dtype.
    """
    # in place and in one dtype: several times as fast as a tensor of booleans on a CPU
    return input.to(amax.dtype).abs().le_(amax).to(torch.uint8)
