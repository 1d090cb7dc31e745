"""Fake-quantisation: values rounded to the grid of `grid.py`, gradients straight through.

Gradient (straight-through): 1 where |x| <= amax, 0 outside; amax gets none. A float width b gets
ln 2 * sum(g * (x - fq(x))), the derivative of the step's size with the rounding held fixed.

With int widths the backward pass keeps one bit per element, whether it lay inside the range, and
nothing where the range is the input's own; with float widths it keeps the input.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .backend import triton_runs
from .bitmask import pack_bits, unpack_bits, where_inside
from .grid import amax_of, inside, quantize_codes, step_size
from .layout import memory_format, wide_dtype

LN2 = math.log(2.0)


def _values(input: Tensor, step: Tensor, largest: Tensor | int) -> Tensor:
    return quantize_codes(input, step, largest).mul_(step).to(input.dtype)


def fake_quantize_reference(
    input: Tensor, num_bits: int | Tensor, amax: Tensor | None = None
) -> Tensor:
    """Plain PyTorch statement of `fake_quantize`, differentiated by autograd."""
    step, largest, amax = step_size(input, num_bits, _range(input, num_bits, amax))
    output = _values(input.detach(), step, largest)
    slope = LN2 * (input.detach() - output).to(step.dtype)
    # each sum adds zeros that carry a derivative
    inside = input.detach().to(step.dtype).abs() <= amax
    output = output + torch.where(inside, input - input.detach(), 0)
    if isinstance(num_bits, Tensor) and num_bits.requires_grad:
        zero = (num_bits - num_bits.detach()).reshape([-1] + [1] * (input.dim() - 1))
        output = output + (zero * slope).to(output.dtype)
    return output


def _rows(input: Tensor, num_bits: Tensor | None, amax: Tensor) -> int:
    """Returns into how many parts, each with one width and range, the elements fall."""
    per_sample = num_bits is not None or amax.shape == input.shape[:1]
    return input.shape[0] if per_sample and input.dim() else 1


@torch.library.custom_op("meddanet::fake_quantize", mutates_args=())
def _fake_quantize(
    input: Tensor, num_bits: Tensor | None, width: int, amax: Tensor, mask: bool
) -> tuple[Tensor, Tensor]:
    """Returns the values and, if asked, the bits of |x| <= amax; amax as in `step_size`."""
    input = input.detach().contiguous(memory_format=memory_format(input))
    rows = _rows(input, num_bits, amax)
    packed = input.new_empty(_packed_shape(input, rows, mask), dtype=torch.uint8)
    if triton_runs(input):
        from .quantize_triton import quantize

        return quantize(input, num_bits, width, amax, packed, rows), packed
    step, largest, amax = step_size(input, width if num_bits is None else num_bits, amax)
    if mask:
        packed = pack_bits(inside(input, amax), rows)
    return _values(input, step, largest), packed


def _packed_shape(input: Tensor, rows: int, mask: bool) -> tuple[int, int]:
    return (rows, -(-input.numel() // (8 * max(1, rows)))) if mask else (0, 0)


@_fake_quantize.register_fake
def _(input, num_bits, width, amax, mask):
    shape = _packed_shape(input, _rows(input, num_bits, amax), mask)
    output = torch.empty_like(input, memory_format=memory_format(input))
    return output, input.new_empty(shape, dtype=torch.uint8)


@torch.library.custom_op("meddanet::fake_quantize_masked_gradient", mutates_args=())
def _masked_gradient(grad: Tensor, packed: Tensor, channels_last: bool) -> Tensor:
    """Returns `grad` where the mask's bit is set, 0 elsewhere, in the layout of the mask."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    grad = grad.contiguous(memory_format=layout)
    if triton_runs(grad):
        from .quantize_triton import masked_gradient

        return masked_gradient(grad, packed)
    return where_inside(unpack_bits(packed, grad), grad)


@_masked_gradient.register_fake
def _(grad, packed, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty_like(grad, memory_format=layout)


@torch.library.custom_op("meddanet::fake_quantize_width_gradient", mutates_args=())
def _width_gradient(
    grad: Tensor, input: Tensor, num_bits: Tensor, amax: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the gradients by the input and by the width of each sample."""
    layout = memory_format(input)
    input = input.detach().contiguous(memory_format=layout)
    grad = grad.contiguous(memory_format=layout)
    if triton_runs(grad):
        from .quantize_triton import width_gradient

        return width_gradient(grad, input, num_bits, amax)
    step, largest, amax = step_size(input, num_bits, amax)
    # everything in one dtype: where they are mixed a CPU goes element by element
    wide = input.to(step.dtype)
    error = wide - _values(wide, step, largest).to(input.dtype).to(step.dtype)
    error *= grad.to(step.dtype)
    axes = tuple(range(1, input.dim()))
    by_width = LN2 * (error.sum(axes) if axes else error)
    return where_inside(inside(wide, amax), grad), by_width


@_width_gradient.register_fake
def _(grad, input, num_bits, amax):
    by_input = torch.empty_like(input, memory_format=memory_format(input))
    return by_input, input.new_empty(input.shape[:1], dtype=wide_dtype(input))


def _save(ctx, inputs, output):
    input, num_bits, _, amax, _ = inputs
    ctx.learns = ctx.needs_input_grad[1]
    ctx.channels_last = memory_format(input) == torch.channels_last
    ctx.save_for_backward(*((input, num_bits, amax) if ctx.learns else output[1:]))


def _backward(ctx, grad, _):
    if ctx.learns:
        input, num_bits, amax = ctx.saved_tensors
        by_input, by_width = _width_gradient(grad, input, num_bits, amax)
        return by_input, by_width.to(num_bits.dtype), None, None, None
    (packed,) = ctx.saved_tensors
    if len(packed):
        grad = _masked_gradient(grad, packed, ctx.channels_last)
    return grad, None, None, None, None


_fake_quantize.register_autograd(_backward, setup_context=_save)


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


def whole_width(num_bits: int | Tensor) -> int | Tensor:
    """Returns an int, or widths [N] as int32, rid of the noise of a straight-through sum."""
    return num_bits if isinstance(num_bits, int) else num_bits.detach().round().to(torch.int32)


def split_width(num_bits: int | Tensor | None) -> tuple[Tensor | None, int]:
    """Returns widths as operators take them: (tensor [N], 0), or (None, int), where 0 is none."""
    return (num_bits, 0) if isinstance(num_bits, Tensor) else (None, num_bits or 0)


def _range(input: Tensor, num_bits: int | Tensor, amax: Tensor | None) -> Tensor:
    """Checks the arguments; returns the range as [1], [N] or in the shape of the input."""
    check_num_bits("num_bits", num_bits, input.shape[0] if input.dim() else 1)
    if not input.is_floating_point():
        raise ValueError(f"fake_quantize takes a floating-point tensor, got {input.dtype}")
    if amax is None:
        return amax_of(input, isinstance(num_bits, Tensor))
    amax = amax.detach()
    if amax.numel() == 1:
        return amax.reshape(1)
    if amax.dim() == input.dim() and amax.shape == (input.shape[0], *[1] * (input.dim() - 1)):
        return amax.reshape(-1)
    try:
        return amax.expand(input.shape)
    except RuntimeError:
        raise ValueError(
            f"amax of shape {list(amax.shape)} does not broadcast to the input's "
            f"{list(input.shape)}"
        ) from None


def fake_quantize(input: Tensor, num_bits: int | Tensor, amax: Tensor | None = None) -> Tensor:
    """Rounds `input` to the values a symmetric integer grid can hold, straight-through in backward.

    Args:
        input: [N, ...] or any shape for an int width; float16, bfloat16, float32 (grid arithmetic
            in float32) or float64 (in float64).
        num_bits: Int from 2 to 16 (one range per tensor), or a tensor [N], one width per sample.
            An integer tensor carries no gradient, a float tensor (whole numbers, up to the noise
            of a straight-through sum) receives ln 2 * sum(grad * (input - output)) per sample.
        amax: Range, broadcastable to `input`; values beyond it saturate. None: max|input| of the
            whole tensor (int width) or of each sample (tensor). It gets no gradient.

    Returns:
        A tensor of the input's shape and dtype, channels last where the input is. A range of 0,
        or a negative one, gives zeros; NaN gives NaN, and so does a width outside of 2..16 in a
        tensor; an Inf makes its range NaN.

    Raises:
        ValueError: If an int width is out of range, `num_bits` is not of shape [N], `amax` does
            not broadcast, or `input` holds no floating-point numbers.

    Source: Med-DANet V2, Eq. 6 (range max|x|, codes within +-qmax).
    """
    ranges = _range(input, num_bits, amax)
    widths, width = split_width(num_bits)
    learns = widths is not None and widths.requires_grad
    # without a given range nothing lies outside of it
    mask = amax is not None and input.requires_grad and torch.is_grad_enabled() and not learns
    return _fake_quantize(input, widths, width, ranges, mask)[0]
