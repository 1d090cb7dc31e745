"""Places in a grid, in Triton: unsigned arithmetic takes the fewest instructions."""

from __future__ import annotations

from .backend import tl, triton


@triton.jit
def within(place, size):
    """Tells where 0 <= place < size: unsigned, what is below zero is beyond any size."""
    return place.to(tl.uint32, bitcast=True) < size.to(tl.uint32, bitcast=True)


@triton.jit
def parted(place, size):
    """Returns (place // size, place % size) of a place that is not below zero."""
    place, size = place.to(tl.uint32, bitcast=True), tl.cast(size, tl.uint32)
    line = place // size
    return line.to(tl.int32, bitcast=True), (place - line * size).to(tl.int32, bitcast=True)
