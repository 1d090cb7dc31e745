"""How operations lay out and compute: shared answers to small questions about a tensor."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from numbers import Integral
from typing import TypeVar

import torch
from torch import Tensor


def as_pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """Returns (y, x) of a pair, or of a whole number, numpy's too, that stands for both."""
    # as they are: int() would fix a size that tracing leaves open
    y, x = (value, value) if isinstance(value, int | Integral) else value
    return y, x


def autocast_device(input: Tensor) -> str:
    """Returns the kind of device whose autocast a tensor follows; it knows no "meta"."""
    return "cpu" if input.is_meta else input.device.type


Returned = TypeVar("Returned")


def in_its_own_dtype(function: Callable[..., Returned]) -> Callable[..., Returned]:
    """Has a function whose first argument is a tensor compute in its dtypes, autocast or not."""

    @wraps(function)
    def run(input: Tensor, *others: object) -> Returned:
        with torch.autocast(autocast_device(input), enabled=False):
            return function(input, *others)

    return run


def wide_dtype(input: Tensor) -> torch.dtype:
    """Returns the dtype of the arithmetic: float64 for float64, float32 for all others."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def memory_format(input: Tensor) -> torch.memory_format:
    """Returns channels_last for [N, C, H, W] whose channels lie side by side, else contiguous."""
    if input.dim() != 4:
        return torch.contiguous_format
    # numel() of a shape would fix sizes that tracing leaves open
    _, channels, height, width = input.shape
    # one channel or one pixel lies both ways
    ambiguous = channels == 1 or (height == 1 and width == 1)
    if not ambiguous and input.stride(1) == 1:
        return torch.channels_last
    return torch.contiguous_format
