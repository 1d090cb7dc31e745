"""A convolution's input on the grid of `grid.py`, kept for the backward pass as its integer codes.

One pass over the input gives, as far as asked for, its codes (byte planes, see `conv_pack.py`),
their values, and one bit per element that tells whether it lay in the range: the straight-through
gradient passes there. An 8-bit code and a bit are 1.125 bytes, where values and a mask of PyTorch's
own operator are 5. A NaN has no code, so it makes its sample's range NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .backend import triton_runs
from .bitmask import pack_bits
from .conv_pack import bytes_of
from .grid import inside, quantize_codes, step_size
from .layout import memory_format


class InputCodes(NamedTuple):
    """What `encode_input` makes; of what is not asked for there is an empty tensor.

    Attributes:
        planes: int8 byte planes [P, N, C, H, W], each laid out as the input.
        values: [N, C, H, W] in the dtype asked for.
        packed: Bits of |x| <= range, uint8 [N, bytes], see `bitmask.py`.
        ranges: [N], in the dtype of the grid's arithmetic; NaN where the sample holds a NaN.
    """

    planes: Tensor
    values: Tensor
    packed: Tensor
    ranges: Tensor


def new_planes(input: Tensor, planes: int) -> Tensor:
    """Allocates byte planes [P, N, C, H, W] for an input, in its layout."""
    shape = (planes, *input.shape)
    if memory_format(input) == torch.contiguous_format:
        return input.new_empty(shape, dtype=torch.int8)
    p, n, c, h, w = shape
    return input.new_empty(p, n, h, w, c, dtype=torch.int8).permute(0, 1, 4, 2, 3)


def new_packed(input: Tensor) -> Tensor:
    """Allocates the bits of an input's mask."""
    # numel() of a shape would fix sizes that tracing leaves open
    n, c, h, w = input.shape
    return input.new_empty(n, -(-(c * h * w) // 8), dtype=torch.uint8)


def encode_input(
    input: Tensor,
    num_bits: int | Tensor,
    amax: Tensor,
    *,
    planes: int,
    values: torch.dtype | None,
    mask: bool,
) -> InputCodes:
    """Puts [N, C, H, W] on the grid.

    Args:
        input: Any floating-point dtype.
        num_bits: Int, or a tensor [N].
        amax: Range, [1] or [N].
        planes: How many byte planes to make: 0 (none), 1 (the low one; the codes themselves up to
            8 bits), or 2, where codes may have more than 8 bits.
        values: Dtype in which the values are returned; None does not return them.
        mask: Whether to return the bits of the range.

    Raises:
        ValueError: If the codes do not have so many byte planes.
    """
    whole = isinstance(num_bits, int) and num_bits <= 8
    most = 1 if whole else 2
    if not 0 <= planes <= most:
        raise ValueError(f"planes is {planes}, codes of {num_bits} bits have 0 to {most}")
    input = input.contiguous(memory_format=memory_format(input))
    made, empty = new_planes(input, planes), input.new_empty(0)
    packed = new_packed(input) if mask else empty.to(torch.uint8)
    if triton_runs(input) and input.dtype != torch.float64:
        from .input_codes_triton import encode

        value = None if values is None else torch.empty_like(input, dtype=values)
        ranges = encode(input, num_bits, amax, made, value, packed if mask else None)
        return InputCodes(made, empty if value is None else value, packed, ranges)
    step, largest, limits = step_size(input, num_bits, amax)
    if mask:
        packed = pack_bits(inside(input, limits), len(input))
    codes = quantize_codes(input, step, largest)
    ranges = limits.reshape(-1).expand(len(input)).contiguous()
    if planes:
        # codes are finite: their sum is NaN where one is
        ranges = torch.where(codes.sum((1, 2, 3)).isnan(), torch.nan, ranges)
        known = codes.nan_to_num(0.0) if bool(ranges.isnan().any()) else codes
        for plane, byte in zip(made, (known,) if whole else bytes_of(known), strict=False):
            plane.copy_(byte)
    value = empty if values is None else codes.mul_(step).to(values)
    return InputCodes(made, value, packed, ranges)


@torch.library.custom_op("meddanet::decode_input", mutates_args=())
def decode_input(
    planes: Tensor, num_bits: Tensor | None, width: int, ranges: Tensor, dtype: torch.dtype
) -> Tensor:
    """Returns the values [N, C, H, W] of byte planes, in a dtype and in the layout of the planes.

    Args:
        planes: int8 [P, N, C, H, W].
        num_bits: Widths [N], or None: all have `width`.
        width: See `num_bits`.
        ranges: [N], as `encode_input` returns them.
        dtype: Of the values.
    """
    low, bits = planes[0], width if num_bits is None else num_bits
    if triton_runs(planes) and ranges.dtype != torch.float64:
        from .input_codes_triton import decode

        return decode(planes, bits, ranges, dtype)
    step, _, _ = step_size(ranges[:, None, None, None], bits, ranges)
    codes = low.to(ranges.dtype)
    if len(planes) == 2:
        codes.add_(planes[1], alpha=256)
    return codes.mul_(step).to(dtype)


@decode_input.register_fake
def _(planes, num_bits, width, ranges, dtype):
    return torch.empty_like(planes[0], dtype=dtype, memory_format=memory_format(planes[0]))
