"""Yes or no, packed eight to a byte, for what a backward pass has to keep."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import memory_format


def pack_bits(inside: Tensor, rows: int) -> Tensor:
    """Packs uint8 0 or 1 in the order of memory into [rows, ...], the first in the lowest bit."""
    if memory_format(inside) == torch.channels_last:
        inside = inside.permute(0, 2, 3, 1)
    inside = inside.reshape(rows, inside.numel() // max(1, rows))
    eights = F.pad(inside, (0, -inside.shape[1] % 8)).view(torch.int64)
    # byte i of the eight moves to bit i of the highest byte
    return ((eights * 0x0102040810204080) >> 56).to(torch.uint8)


def unpack_bits(packed: Tensor, like: Tensor) -> Tensor:
    """Reverses `pack_bits` for a tensor laid out like `like`: uint8, 0 or 1."""
    rows = packed.shape[0]
    # every byte holds all eight bits, then only its own; the constant is 0x8040201008040201
    eights = (packed.to(torch.int64) * 0x0101010101010101) & -0x7FBFDFEFF7FBFDFF
    inside = eights.view(torch.uint8).clamp_(max=1)[:, : like.numel() // max(1, rows)]
    if memory_format(like) == torch.contiguous_format:
        return inside.reshape(like.shape)
    n, c, h, w = like.shape
    return inside.reshape(n, h, w, c).permute(0, 3, 1, 2)
