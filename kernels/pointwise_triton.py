"""A 1x1 convolution of one sample's pixels in Triton: stages and heads of decision networks."""

from __future__ import annotations

from .backend import tl, triton


@triton.jit
def pixels_of(in_ptr, pixel, used, CHANNELS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Loads [pixels, BLOCK_K] of a sample, zero beyond its channels and what is used."""
    channel = tl.arange(0, BLOCK_K)
    mask = used[:, None] & (channel < CHANNELS)[None, :]
    return tl.load(in_ptr + pixel[:, None] * CHANNELS + channel[None, :], mask=mask, other=0.0)


@triton.jit
def pointwise(x, weight, bias):
    """Returns relu(x @ weight + bias), [pixels, columns] in float32, of a bias [columns]."""
    value = tl.dot(x, weight, input_precision="ieee") + bias[None, :]
    # a comparison keeps a NaN
    return tl.where(value < 0, 0.0, value)
