"""Which slot of an operation reads what: offsets, sources and their number, all on the device."""

from __future__ import annotations

import torch
from torch import Tensor

FAR = 2**30


def check_offset(offset: Tensor, samples: int) -> None:
    """Raises ValueError unless an offset is whole numbers (y, x) per slot."""
    if offset.shape != (samples, 2) or offset.is_floating_point():
        raise ValueError(
            f"offset must be whole numbers (y, x), [{samples}, 2], got {offset.dtype} "
            f"{list(offset.shape)}"
        )


def integers(*values: Tensor | None) -> tuple[Tensor | None, ...]:
    """Returns tensors as int32, as kernels read them; None stays.

    Raises:
        ValueError: If one holds no whole numbers.
    """
    for value in values:
        if value is not None and (value.is_floating_point() or value.dtype == torch.bool):
            raise ValueError(f"slots and count must be whole numbers, got {value.dtype}")
    return tuple(None if value is None else _int32(value.detach()) for value in values)


def _int32(value: Tensor) -> Tensor:
    if value.dtype == torch.int64:
        # would wrap; nothing lies so far away, and sums with it stay within int32
        value = value.clamp(-FAR, FAR)
    return value.to(torch.int32)
