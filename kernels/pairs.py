"""Constants as pairs of float32, head + tail: some 48 bits where float64 would hold 53.

GPUs made for graphics have two float64 units per multiprocessor for 128 of float32, and reading a
float64 constant into float32 is work for them. So constants are split once, when they are packed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split_floats(values: Tensor) -> Tensor:
    """Splits floats [..., C] into pairs: float32 [..., 2, C], head and tail.

    The head is the value rounded to float32, the tail what that left out, rounded as well; it is 0
    where the head is infinite or NaN.
    """
    values = values.detach()
    head = values.float()
    if values.dtype != torch.float64:
        return torch.stack((head, torch.zeros_like(head)), -2)
    tail = (values - head.double()).float()
    return torch.stack((head, torch.where(head.isfinite(), tail, 0.0)), -2)


def split_affine(
    affine: tuple[Tensor, Tensor] | None, channels: int
) -> tuple[Tensor, Tensor] | None:
    """Splits an affine map (gain, shift) of channels [C] each; None stays None.

    Raises:
        ValueError: If a shape is another one.
    """
    if affine is None:
        return None
    if any(part.shape != (channels,) for part in affine):
        raise ValueError(f"affine must be (gain, shift) of shape [{channels}] each")
    gain, shift = map(split_floats, affine)
    return gain, shift


def times_step(pairs: Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns pairs [..., 2, C] times a float32, [..., C]: in float32 as the kernels round it."""
    head, tail = pairs.unbind(-2)
    if dtype == torch.float32:
        return (head.double() * step.double() + (tail * step).double()).float()
    return join_floats(pairs) * step.double()


def join_floats(pairs: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Returns what pairs [..., 2, C] hold, [..., C]: in float32 their heads, else the sums."""
    head, tail = pairs.unbind(-2)
    return head if dtype == torch.float32 else head.to(dtype) + tail.to(dtype)
