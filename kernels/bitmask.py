"""Yes or no, packed eight to a byte, for what a backward pass has to keep."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import memory_format

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack_bits(inside: Tensor, rows: int) -> Tensor:
    """Packs 0 or 1 in the order of memory, eight to a byte, the first in the lowest bit.

    Args:
        inside: uint8, dense: [N, C, H, W] in either memory format, or of any shape, contiguous.
        rows: R, into how many equal parts it falls; each fills whole bytes.

    Returns:
        uint8 [R, elements of a row / 8, rounded up].
    """
    if memory_format(inside) == torch.channels_last:
        inside = inside.permute(0, 2, 3, 1)
    if not inside.numel():
        # of any stride, which a wider view may refuse
        return inside.new_empty(rows, 0)
    inside = inside.reshape(rows, -1)
    eights = F.pad(inside, (0, -inside.shape[1] % 8)).view(torch.int64)
    # byte i of the eight moves to bit i of the highest byte
    return ((eights * 0x0102040810204080) >> 56).to(torch.uint8)


def unpack_bits(packed: Tensor, like: Tensor) -> Tensor:
    """Reverses `pack_bits`.

    Args:
        packed: uint8 [R, bytes of a row].
        like: A tensor of the shape and memory format that was packed, of any dtype.

    Returns:
        uint8, 0 or 1, in that shape and memory format.
    """
    rows = packed.shape[0]
    # every byte holds all eight bits, then only its own; the constant is 0x8040201008040201
    eights = (packed.to(torch.int64) * 0x0101010101010101) & -0x7FBFDFEFF7FBFDFF
    inside = eights.view(torch.uint8).clamp_(max=1)[:, : like.numel() // max(1, rows)]
    if memory_format(like) == torch.contiguous_format:
        return inside.reshape(like.shape)
    n, c, h, w = like.shape
    return inside.reshape(n, h, w, c).permute(0, 3, 1, 2)


def where_inside(inside: Tensor, values: Tensor) -> Tensor:
    """Returns the values where `inside` (uint8) is 1 and 0, whatever is there, where it is 0.

    Args:
        inside: 0 or 1, uint8.
        values: Floating point, of its shape.

    Returns:
        A tensor in the dtype of the values and the layout of `inside`.
    """
    # all bits or none: a product would keep a NaN, and torch.where takes up to three times as long
    integers = _INTEGERS[values.element_size()]
    return inside.to(integers).neg_().bitwise_and_(values.view(integers)).view(values.dtype)
