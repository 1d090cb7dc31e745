"""Triton kernels of fake-quantisation, one pass forward and one backward; see `quantize.py`.

Tensors are dense and walked in the order of memory. They fall into rows, each with one width and
one range: the samples, or everything. The gradient by a width is summed block by block without
atomics; the few partial sums are added by PyTorch. Products and sums are never fused into one
rounding, so that every executor computes the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .backend import tl, triton
from .conv_epilogue_triton import as_range
from .layout import memory_format, wide_dtype

# elements per program, a multiple of the mask's 8; others were not tried on a GPU
BLOCK = 1024


@triton.jit
def _round(x):
    """Rounds half to even: beyond 2^23 (2^52) a sum has no bits left for a fraction."""
    magic = 6755399441055744.0 if x.dtype == tl.float64 else 12582912.0
    return (x + magic) - magic


@triton.jit
def _divide(x, y):
    """Divides with correct rounding, which `/` has in float64 alone."""
    if y.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def _quantize(x, bits_ptr, width, amax, row, COMPUTE: tl.constexpr):
    """Returns x on the grid of its row's width and range."""
    bits = width if bits_ptr is None else _round(tl.load(bits_ptr + row))
    known = (bits >= 2) & (bits <= 16)
    bits = tl.where(known, bits, 2).to(tl.int32)
    largest = tl.where(bits == 16, 32639, (1 << (bits - 1)) - 1).to(COMPUTE)
    largest = tl.where(known, largest, float("nan"))
    step = _divide(amax, largest)

    quotient = _divide(x, tl.where(step == 0, float("inf"), step))
    # comparisons keep a NaN
    quotient = tl.where(quotient > largest, largest, quotient)
    quotient = tl.where(quotient < -largest, -largest, quotient)
    return _round(quotient) * step


@triton.jit
def _block(blocks, length, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    """Returns this program's row and the offsets in it, with a mask."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    offs = (tl.program_id(0) % blocks).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    return row, offs, offs < length


@triton.jit
def _range(amax_ptr, row, length, stride, offs, mask, EACH: tl.constexpr, COMPUTE: tl.constexpr):
    """Loads the range of the row, or of each element."""
    if EACH:
        amax = tl.load(amax_ptr + row * length + offs, mask=mask, other=1.0)
    else:
        amax = tl.load(amax_ptr + row * stride)
    return as_range(amax.to(COMPUTE))


# what is not listed here decides how wide loads and stores may be
@triton.jit(do_not_specialize=["width", "blocks", "stride_amax", "row_bytes"])
def quantize_kernel(
    x_ptr, bits_ptr, amax_ptr, out_ptr, packed_ptr, width, length, blocks, stride_amax, row_bytes,
    EACH: tl.constexpr, MASK: tl.constexpr, INDEX: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Quantises BLOCK elements of one row and packs whether they lie in the range."""
    row, offs, mask = _block(blocks, length, INDEX, BLOCK)

    x = tl.load(x_ptr + row * length + offs, mask=mask, other=0.0).to(COMPUTE)
    amax = _range(amax_ptr, row, length, stride_amax, offs, mask, EACH, COMPUTE)

    value = _quantize(x, bits_ptr, width, amax, row, COMPUTE)

    tl.store(out_ptr + row * length + offs, value.to(out_ptr.dtype.element_ty), mask=mask)
    if MASK:
        bits = tl.reshape((tl.abs(x) <= amax).to(tl.int32), [BLOCK // 8, 8])
        packed = tl.sum(bits << tl.arange(0, 8)[None, :], 1)
        offs = (tl.program_id(0) % blocks).to(INDEX) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
        tl.store(packed_ptr + row * row_bytes + offs, packed.to(tl.uint8), mask=offs < row_bytes)


@triton.jit(do_not_specialize=["blocks", "row_bytes"])
def masked_gradient_kernel(
    grad_ptr, packed_ptr, out_ptr, length, blocks, row_bytes,
    INDEX: tl.constexpr, BLOCK: tl.constexpr,
):
    """Copies BLOCK elements of one row of the gradient where the mask's bit is set."""
    row, offs, mask = _block(blocks, length, INDEX, BLOCK)

    grad = tl.load(grad_ptr + row * length + offs, mask=mask, other=0.0)
    packed = tl.load(packed_ptr + row * row_bytes + offs // 8, mask=mask, other=0)

    inside = (packed.to(tl.int32) >> (offs % 8).to(tl.int32)) & 1

    tl.store(out_ptr + row * length + offs, tl.where(inside != 0, grad, 0.0), mask=mask)


@triton.jit(do_not_specialize=["blocks", "stride_amax"])
def width_gradient_kernel(
    grad_ptr, x_ptr, bits_ptr, amax_ptr, out_ptr, sum_ptr, length, blocks, stride_amax,
    EACH: tl.constexpr, INDEX: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):
    """Quantises BLOCK elements of one row again: gradient by the input, sum for the width."""
    row, offs, mask = _block(blocks, length, INDEX, BLOCK)

    narrow = tl.load(x_ptr + row * length + offs, mask=mask, other=0.0)
    grad = tl.load(grad_ptr + row * length + offs, mask=mask, other=0.0)
    x = narrow.to(COMPUTE)
    amax = _range(amax_ptr, row, length, stride_amax, offs, mask, EACH, COMPUTE)

    value = _quantize(x, bits_ptr, 0, amax, row, COMPUTE)
    # rounded to the output's dtype, as the forward pass did
    error = x - value.to(narrow.dtype).to(COMPUTE)
    terms = tl.where(mask, grad.to(COMPUTE) * error, 0.0)

    tl.store(out_ptr + row * length + offs, tl.where(tl.abs(x) <= amax, grad, 0.0), mask=mask)
    tl.store(sum_ptr + tl.program_id(0), 0.6931471805599453 * tl.sum(terms))


def _geometry(input: Tensor, rows: int) -> tuple[int, int, dict]:
    """Returns (elements of a row, blocks of a row, constants)."""
    length = input.numel() // max(1, rows)
    index = tl.int64 if length >= 2**31 - BLOCK else tl.int32
    constants = {"INDEX": index, "BLOCK": BLOCK, "enable_fp_fusion": False}
    return length, triton.cdiv(length, BLOCK), constants


def _ranges(input: Tensor, amax: Tensor) -> tuple[Tensor, int, dict]:
    """Returns the range in the input's layout, its stride from row to row, and constants."""
    each = amax.shape == input.shape
    layout = memory_format(input) if each else torch.contiguous_format
    compute = tl.float64 if wide_dtype(input) == torch.float64 else tl.float32
    stride = 0 if amax.numel() == 1 else 1
    return amax.contiguous(memory_format=layout), stride, {"EACH": each, "COMPUTE": compute}


def quantize(
    input: Tensor, num_bits: Tensor | None, width: int, amax: Tensor, packed: Tensor, rows: int
) -> Tensor:
    """Launches the quantisation.

    Args:
        input: Floating point, dense, in either memory format.
        num_bits: Widths [rows], or None: all have `width`.
        width: See `num_bits`.
        amax: Range, [1], [rows], or in the shape of the input.
        packed: uint8 [rows, bytes of a row], receives the bits of |input| <= amax; empty: none.
        rows: Into how many equal parts, each with one width, the input falls.

    Returns:
        The values, in shape, dtype and layout of the input.
    """
    output = torch.empty_like(input)
    length, blocks, constants = _geometry(input, rows)
    amax, stride, range_constants = _ranges(input, amax)
    bits = None if num_bits is None else num_bits.detach().float().contiguous()
    if rows * blocks:
        with torch.cuda.device_of(input):
            quantize_kernel[(rows * blocks,)](
                input, bits, amax, output, packed, width, length, blocks, stride, packed.shape[1],
                MASK=packed.numel() > 0, **range_constants, **constants,
            )
    return output


def masked_gradient(grad: Tensor, packed: Tensor) -> Tensor:
    """Launches the masking of a gradient.

    Args:
        grad: Floating point, dense, in the memory format that the mask was made in.
        packed: uint8 [rows, bytes of a row], as `quantize` fills it.

    Returns:
        `grad` where the mask's bit is set, 0 elsewhere, in its shape, dtype and layout.
    """
    output = torch.empty_like(grad)
    length, blocks, constants = _geometry(grad, len(packed))
    if len(packed) * blocks:
        with torch.cuda.device_of(grad):
            masked_gradient_kernel[(len(packed) * blocks,)](
                grad, packed, output, length, blocks, packed.shape[1], **constants
            )
    return output


def width_gradient(
    grad: Tensor, input: Tensor, num_bits: Tensor, amax: Tensor
) -> tuple[Tensor, Tensor]:
    """Launches the gradients by the input and by the width of each sample.

    Args:
        grad: Of the output, floating point, in shape and layout of the input.
        input: [N, ...], floating point, dense, in either memory format.
        num_bits: Widths [N].
        amax: Range, [1], [N], or in the shape of the input.

    Returns:
        The gradient by the input, in shape, dtype and layout of `grad`, and that by the widths,
        [N], float32 (float64 for a float64 input).
    """
    output, rows = torch.empty_like(grad), len(input)
    length, blocks, constants = _geometry(input, rows)
    amax, stride, range_constants = _ranges(input, amax)
    sums = input.new_empty(rows, blocks, dtype=wide_dtype(input))
    if rows * blocks:
        with torch.cuda.device_of(input):
            width_gradient_kernel[(rows * blocks,)](
                grad, input, num_bits.detach().float().contiguous(), amax, output, sums,
                length, blocks, stride, **range_constants, **constants,
            )
    return output, sums.sum(1)


def shape_classes() -> dict[str, Callable[[], object]]:
    """Returns, by name, the launches of the shipped models; called with meta tensors by `aot.py`.

    One range for a whole tensor or for each sample, one width or one per sample, with a mask where
    training saturates. A sample's elements are a multiple of 16 (wide loads and stores) or not.
    """

    def classes(length: int, name: str) -> dict[str, Callable[[], object]]:
        x = torch.empty(2, length, device="meta")
        amax, bits = torch.empty(1, device="meta"), torch.empty(2, device="meta")
        masks = {
            "": torch.empty(0, 0, dtype=torch.uint8, device="meta"),
            ", mask": torch.empty(2, -(-length // 8), dtype=torch.uint8, device="meta"),
        }
        launches: dict[str, Callable[[], object]] = {
            f"gradient by the input, {name}": lambda: masked_gradient(x, masks[", mask"]),
            f"gradient by the width, {name}": lambda: width_gradient(x, x, bits, amax),
        }
        for kind, packed in masks.items():
            launches |= {
                f"one width, {name}{kind}": partial(quantize, x, None, 8, amax, packed, 2),
                f"width per sample, {name}{kind}": partial(quantize, x, bits, 0, amax, packed, 2),
            }
        return launches

    return classes(2304, "multiple of 16") | classes(54, "any length")
