"""The 1x1 convolution and ReLU with which the heads of decision networks begin."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .layout import wide_dtype
from .shuffle_pack import Layer, padded_matrix


def pointwise_matrix(last: Layer) -> Layer:
    """Returns a 1x1 convolution's weight as [Cin, L], and its bias, both padded.

    Args:
        last: Weight [L, Cin, 1, 1], floating point, and bias [L].

    Raises:
        ValueError: If a shape or dtype does not fit.
    """
    weight, bias = last
    if weight.dim() != 4 or weight.shape[2:] != (1, 1) or not weight.dtype.is_floating_point:
        raise ValueError(
            "weight of last must be [L, Cin, 1, 1] in floating point, got "
            f"{weight.dtype} {list(weight.shape)}"
        )
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias of last must be {[weight.shape[0]]}, got {list(bias.shape)}")
    return padded_matrix(weight.detach().flatten(1).T, bias)


def pointwise_reference(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Returns relu(conv(input)) [N, padded L, H, W] in float32 at least, of a packed layer."""
    wide = wide_dtype(input)
    matrix = weight[: input.shape[1]].T[:, :, None, None]
    return F.conv2d(input.to(wide), matrix.to(wide), bias).relu()
