"""Triton kernels that make and read the codes of a convolution's input; see `input_codes.py`.

Tensors are dense and walked in the order of memory, a block of one sample per program. Grid
arithmetic is float32, as in the epilogue of the integer convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .backend import tl, triton
from .conv_epilogue_triton import as_range, codes_of, step_of

# elements per program, a multiple of the mask's 8; others were not tried on a GPU
BLOCK = 1024


@triton.jit
def _block(blocks, length, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    """Returns this program's sample, the offsets in it with a mask, and where the sample begins."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    offs = (tl.program_id(0) % blocks).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    return row, offs, offs < length, row * length


# what is not listed here decides how wide loads and stores may be
@triton.jit(do_not_specialize=["width", "blocks", "amax_stride", "row_bytes"])
def input_encode_kernel(
    x_ptr, bits_ptr, amax_ptr, low_ptr, high_ptr, value_ptr, packed_ptr, ranges_ptr,
    width, length, blocks, amax_stride, row_bytes, INDEX: tl.constexpr, BLOCK: tl.constexpr,
):
    """Encodes BLOCK elements of one sample; pointers that are None are not written."""
    row, offs, mask, first = _block(blocks, length, INDEX, BLOCK)

    x = tl.load(x_ptr + first + offs, mask=mask, other=0.0).to(tl.float32)
    bits = width if bits_ptr is None else tl.load(bits_ptr + row)
    step, largest = step_of(amax_ptr + row * amax_stride, bits)

    codes = codes_of(x, step, largest, False)

    if low_ptr is not None:
        # the cast keeps the lowest byte
        tl.store(low_ptr + first + offs, codes.to(tl.int8), mask=mask)
        # every program that meets a NaN writes the same
        worst = tl.max(tl.where(x == x, 0, 1))
        tl.store(ranges_ptr + row, float("nan"), mask=worst > 0)
    if high_ptr is not None:
        tl.store(high_ptr + first + offs, ((codes + 128) >> 8).to(tl.int8), mask=mask)
    if value_ptr is not None:
        value = tl.where(x == x, codes.to(tl.float32) * step, x)
        tl.store(value_ptr + first + offs, value.to(value_ptr.dtype.element_ty), mask=mask)
    if packed_ptr is not None:
        amax = as_range(tl.load(amax_ptr + row * amax_stride))
        inside = tl.reshape((tl.abs(x) <= amax).to(tl.int32), [BLOCK // 8, 8])
        packed = tl.sum(inside << tl.arange(0, 8)[None, :], 1)
        offs = (tl.program_id(0) % blocks).to(INDEX) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
        tl.store(packed_ptr + row * row_bytes + offs, packed.to(tl.uint8), mask=offs < row_bytes)


@triton.jit(do_not_specialize=["width", "blocks"])
def input_decode_kernel(
    low_ptr, high_ptr, bits_ptr, ranges_ptr, value_ptr, width, length, blocks,
    INDEX: tl.constexpr, BLOCK: tl.constexpr,
):
    """Writes the values of BLOCK codes of one sample."""
    row, offs, mask, first = _block(blocks, length, INDEX, BLOCK)

    codes = tl.load(low_ptr + first + offs, mask=mask, other=0).to(tl.int32)
    if high_ptr is not None:
        codes += tl.load(high_ptr + first + offs, mask=mask, other=0).to(tl.int32) * 256
    bits = width if bits_ptr is None else tl.load(bits_ptr + row)
    step, _ = step_of(ranges_ptr + row, bits)

    value = codes.to(tl.float32) * step
    tl.store(value_ptr + first + offs, value.to(value_ptr.dtype.element_ty), mask=mask)


def _geometry(rows: int, length: int) -> tuple[tuple[int], int, dict]:
    """Returns (grid, blocks of a sample, constants)."""
    index = tl.int64 if length >= 2**31 - BLOCK else tl.int32
    blocks = triton.cdiv(length, BLOCK)
    return (rows * blocks,), blocks, {"INDEX": index, "BLOCK": BLOCK, "enable_fp_fusion": False}


def _widths(num_bits: int | Tensor) -> tuple[Tensor | None, int]:
    if isinstance(num_bits, int):
        return None, num_bits
    # a width that is NaN is none
    return num_bits.detach().float().nan_to_num().round().to(torch.int32), 0


def encode(
    input: Tensor, num_bits: int | Tensor, amax: Tensor, planes: Tensor, values: Tensor | None,
    packed: Tensor | None,
) -> Tensor:
    """Launches the encoding of a dense input into what is given; returns the ranges [N]."""
    length, amax = input.shape[1:].numel(), amax.float()
    ranges = amax.expand(len(input)).clone()
    bits, width = _widths(num_bits)
    grid, blocks, constants = _geometry(len(input), length)
    low, high = (planes[p] if len(planes) > p else None for p in range(2))
    if grid[0]:
        with torch.cuda.device_of(input):
            input_encode_kernel[grid](
                input, bits, amax, low, high, values, packed, ranges, width, length, blocks,
                0 if len(amax) == 1 else 1, 0 if packed is None else packed.shape[1], **constants,
            )
    return ranges


def decode(planes: Tensor, num_bits: int | Tensor, ranges: Tensor, dtype: torch.dtype) -> Tensor:
    """Launches the decoding of dense byte planes; arguments as of `decode_input`."""
    value, length = torch.empty_like(planes[0], dtype=dtype), planes.shape[2:].numel()
    bits, width = _widths(num_bits)
    grid, blocks, constants = _geometry(planes.shape[1], length)
    if grid[0]:
        with torch.cuda.device_of(planes):
            input_decode_kernel[grid](
                planes[0], planes[1] if len(planes) > 1 else None, bits, ranges, value,
                width, length, blocks, **constants,
            )
    return value


def shape_classes() -> dict[str, Callable[[], object]]:
    """Returns, by name, the launches of the shipped models; called with meta tensors by `aot.py`.

    One width (one byte) or one per sample (two); codes kept or, without a backward pass or where
    widths learn, not; with a mask where a fixed range may clip. A sample's elements are a multiple
    of 16 (wide loads and stores) or not.
    """
    found: dict[str, Callable[[], object]] = {}
    for name, side in (("multiple of 16", 48), ("any length", 7)):
        x = torch.empty(2, 1, side, side, device="meta")
        packed = torch.empty(2, -(-(side**2) // 8), dtype=torch.uint8, device="meta")
        amax, bits = torch.empty(2, device="meta"), torch.empty(2, device="meta")
        for kind, widths, count in (("8 bit", 8, 1), ("width per sample", bits, 2)):
            planes = torch.empty(count, *x.shape, dtype=torch.int8, device="meta")
            found[f"decoded input, {kind}, {name}"] = partial(
                decode, planes, widths, amax, torch.float32
            )
            for what, kept, mask in (
                ("values alone", planes[:0], None), ("kept", planes, None),
                ("kept with mask", planes, packed),
            ):
                found[f"encoded input, {kind}, {what}, {name}"] = partial(
                    encode, x, widths, amax, kept, x, mask
                )
    return found
