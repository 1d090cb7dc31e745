"""One call of `encode`, as its executors take it: checked, shapes known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .conv_pack import byte_planes


@dataclass(frozen=True)
class EncodeCall:
    """Everything `encode` computes with, but the tensors it writes; M slots are the outputs.

    Attributes:
        input: [N, C, H, W], floating point, channels last or dense.
        amax: float32 (float64 for a float64 input) [1] or [M].
        size: (height, width) of the outputs.
        num_bits: Int, or int32 [M].
        affine: (gain, shift), pairs of float32 [2, C], see `pairs.py`, or None.
        relu: Whether to cut off below zero.
        offset: int32 [M, 2], or None: 0.
        slots: int32 [M], the sample that each slot reads, or None: slot m reads sample m.
        count: int32 [1], how many slots are in use, or None: all.
        done: Slots of this width, above 0, are left alone, their codes lie there; 0: none are.
    """

    input: Tensor
    amax: Tensor
    size: tuple[int, int]
    num_bits: int | Tensor = 8
    affine: tuple[Tensor, Tensor] | None = None
    relu: bool = False
    offset: Tensor | None = None
    slots: Tensor | None = None
    count: Tensor | None = None
    done: int = 0

    @property
    def samples(self) -> int:
        """M, the number of slots."""
        return len(self.input) if self.slots is None else len(self.slots)

    @property
    def planes(self) -> int:
        """Byte planes: 2 where a slot may have more than 8 bits."""
        return byte_planes(self.num_bits)

    def new_codes(self) -> Tensor:
        """Allocates byte planes [P, M, C, height, width], channels last; zeros if unused."""
        shape = (self.planes, self.samples, *self.size, self.input.shape[1])
        make = torch.zeros if self.planes == 2 or self.count is not None else torch.empty
        return make(shape, dtype=torch.int8, device=self.input.device).permute(0, 1, 4, 2, 3)
