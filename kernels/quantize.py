"""Symmetric fake-quantisation on the package's one grid.

    step = amax / qmax(b);   code = clamp(round_half_even(x / step), -qmax, qmax);   value = code * step

Med-DANet V2 (WACV 2024), Eq. 6, with its two slips mended: the range is max|x|, not max(x), and
qmax(b) = 2^(b-1) - 1, so that no code overflows. qmax(16) = 32639 = 127 * 256 + 127: a 16-bit code
splits into two signed bytes, and an exact 16-bit product is four int8 products.

Gradient (straight-through): 1 where |x| <= amax, 0 outside; amax gets none. A float width b receives
d/db = ln 2 * sum(g * (x - fq(x))), the derivative of the step's size with the rounding held fixed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LN2 = math.log(2.0)


def qmax(num_bits: int | Tensor) -> int | Tensor:
    """Returns the largest code of a width: 2^(b-1) - 1, and 32639 at 16 bit.

    Args:
        num_bits: An int, or a tensor of widths of any shape, 2 <= b <= 16.

    Returns:
        An int, or a float tensor of the same shape.
    """
    if isinstance(num_bits, Tensor):
        width = num_bits.detach().to(torch.float64)
        return torch.where(width == 16, torch.full_like(width, 32639.0), 2.0 ** (width - 1) - 1)
    return 32639 if num_bits == 16 else 2 ** (num_bits - 1) - 1


def per_sample(values: Tensor, input: Tensor) -> Tensor:
    """Views [N] values as [N, 1, 1, ...] so that they broadcast over `input` [N, ...]."""
    return values.reshape(-1, *[1] * (input.dim() - 1))


def amax_of(input: Tensor, num_bits: int | Tensor) -> Tensor:
    """Returns max|input|: of the whole tensor for an int width, of each sample for [N] widths."""
    if input.numel() == 0:
        shape = [input.shape[0], *[1] * (input.dim() - 1)] if isinstance(num_bits, Tensor) else []
        return input.new_zeros(shape)
    if isinstance(num_bits, Tensor):
        return input.detach().abs().flatten(1).amax(1).reshape(-1, *[1] * (input.dim() - 1))
    return input.detach().abs().amax()


def step_size(amax: Tensor, num_bits: int | Tensor, input: Tensor) -> tuple[Tensor, Tensor | int]:
    """Returns (step, qmax) broadcastable to `input`; an infinite range becomes NaN."""
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    largest = qmax(num_bits)
    if isinstance(largest, Tensor):
        largest = per_sample(largest, input).to(dtype)
    amax = amax.detach().to(dtype)
    amax = torch.where(amax.isinf(), torch.full_like(amax, math.nan), amax)
    return amax / largest, largest


def quantize_codes(input: Tensor, step: Tensor, largest: Tensor | int) -> Tensor:
    """Returns the integer codes of `input` as floats; a step of 0 gives zeros, NaN stays NaN."""
    # dividing by infinity gives the zeros of an empty range and keeps NaN
    divisor = torch.where(step == 0, torch.full_like(step, math.inf), step)
    codes = (input.to(step.dtype) / divisor).round_()
    if isinstance(largest, int):
        return codes.clamp_(-largest, largest)
    return codes.clamp_(min=-largest, max=largest)


def _round_to_grid(input: Tensor, num_bits: int | Tensor, amax: Tensor) -> Tensor:
    step, largest = step_size(amax, num_bits, input)
    return quantize_codes(input, step, largest).mul_(step).to(input.dtype)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, num_bits, amax):
        output = _round_to_grid(input, num_bits, amax)
        residual = None
        if isinstance(num_bits, Tensor) and num_bits.requires_grad:
            residual = input - output
        ctx.save_for_backward(input.abs() <= amax, residual)
        return output

    @staticmethod
    def backward(ctx, grad):
        inside, residual = ctx.saved_tensors
        grad_bits = None
        if residual is not None:
            grad_bits = LN2 * (grad * residual).flatten(1).sum(1)
        return grad * inside, grad_bits, None


def check_num_bits(name: str, num_bits: int | Tensor, batch: int) -> None:
    """Raises ValueError unless `num_bits` is an int in 2..16 or a tensor of shape [batch]."""
    if isinstance(num_bits, Tensor):
        if num_bits.shape != (batch,):
            raise ValueError(
                f"{name} must hold one width per sample, shape [{batch}], "
                f"got shape {list(num_bits.shape)}"
            )
    elif isinstance(num_bits, bool) or not isinstance(num_bits, int) or not 2 <= num_bits <= 16:
        raise ValueError(f"{name} must be an int from 2 to 16 or a tensor [N], got {num_bits!r}")


def fake_quantize_reference(
    input: Tensor, num_bits: int | Tensor, amax: Tensor | None = None
) -> Tensor:
    """Plain PyTorch statement of `fake_quantize`; same arguments, same result."""
    check_num_bits("num_bits", num_bits, input.shape[0] if input.dim() else 1)
    amax = amax_of(input, num_bits) if amax is None else amax.detach()
    learns = input.requires_grad or (isinstance(num_bits, Tensor) and num_bits.requires_grad)
    if not (learns and torch.is_grad_enabled()):
        return _round_to_grid(input, num_bits, amax)
    return _FakeQuantize.apply(input, num_bits, amax)


def fake_quantize(input: Tensor, num_bits: int | Tensor, amax: Tensor | None = None) -> Tensor:
    """Rounds `input` to the values a symmetric integer grid can hold, straight-through in backward.

    Args:
        input: [N, ...] or any shape for an int width; float16, bfloat16, float32 (grid arithmetic
            in float32) or float64 (in float64).
        num_bits: Int from 2 to 16 (one range per tensor), or a tensor [N], one width per sample.
            An integer tensor carries no gradient, a float tensor receives
            ln 2 * sum(grad * (input - output)) per sample.
        amax: Range, broadcastable to `input`; values beyond it saturate. None: max|input| of the
            whole tensor (int width) or of each sample (tensor). It gets no gradient.

    Returns:
        A tensor of the input's shape and dtype. A range of 0 gives zeros, NaN gives NaN, an Inf
        makes its range NaN.

    Raises:
        ValueError: If a width is out of range or `num_bits` is not of shape [N].

    Source: Med-DANet V2, Eq. 6 (range max|x|, codes within +-qmax).
    """
    return fake_quantize_reference(input, num_bits, amax)
