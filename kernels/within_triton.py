"""Bounds by one comparison, in Triton."""

from __future__ import annotations

from .backend import tl, triton


@triton.jit
def within(place, size):
    """Tells where 0 <= place < size: unsigned, what is below zero is beyond any size."""
    return place.to(tl.uint32, bitcast=True) < size.to(tl.uint32, bitcast=True)
