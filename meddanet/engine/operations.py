"""How OpenVINO computes the float operations of a recorded forward pass: see `opset.py`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..kernels import norm_affine
from ..networks.heatmap import EDGE, HeatCentre, play_shares
from ..networks.transbts import as_map, positions_for
from ..networks.unet import check_input
from .unreported import unreported

with unreported():
    from openvino import opset1
    from openvino import opset13 as ops

Node = Any


def channels_first(input: Node) -> Node:
    """[N, H, W, C] -> [N, C, H, W]."""
    return ops.transpose(input, integers(0, 3, 1, 2))


def channels_last(input: Node) -> Node:
    """[N, C, H, W] -> [N, H, W, C]; costs nothing after a convolution."""
    return ops.transpose(input, integers(0, 2, 3, 1))


def integers(*values: int) -> Node:
    """Returns an int64 constant, such as a list of axes."""
    return ops.constant(np.array(values, np.int64))


def constant(values: Any) -> Node:
    """Returns a float32 constant."""
    return ops.constant(np.asarray(values, np.float32))


def rank(node: Node) -> int:
    """Returns the number of a node's axes."""
    return len(node.get_output_shape(0))


def _norm(module: nn.BatchNorm2d, input: Node, axis: int = 1) -> Node:
    shape = (1, -1, 1, 1) if axis == 1 else (1, 1, 1, -1)
    gain, shift = (constant(part.reshape(shape)) for part in norm_affine(module))
    return ops.add(ops.multiply(input, gain), shift)


def _relu(module: nn.ReLU, input: Node, axis: int = 1) -> Node:
    return ops.relu(input)


def _layer_norm(module: nn.LayerNorm, input: Node) -> Node:
    """Over the last axis."""
    if len(module.normalized_shape) != 1 or module.bias is None:
        raise ValueError("a layer norm of several axes or without a shift has no translation")
    unit = ops.mvn(input, integers(-1), True, module.eps, "inside_sqrt")
    gain, shift = (constant(part.detach().numpy()) for part in (module.weight, module.bias))
    return ops.add(ops.multiply(unit, gain), shift)


def _gelu(module: nn.GELU, input: Node) -> Node:
    return ops.gelu(input, "erf" if module.approximate == "none" else "tanh")


def _max_pool(module: nn.MaxPool2d, input: Node) -> Node:
    if module.ceil_mode or module.dilation not in (1, (1, 1)) or module.return_indices:
        raise ValueError("ceil_mode, dilation, indices of a pooling: no translation")
    kernel, stride, padding = (
        [value, value] if isinstance(value, int) else list(value)
        for value in (module.kernel_size, module.stride, module.padding)
    )
    return opset1.max_pool(input, stride, padding, padding, kernel)


def _mean(input: Node, axes: Sequence[int], keepdim: bool = False) -> Node:
    return ops.reduce_mean(input, integers(*axes), keepdim)


def _transpose(input: Node, first: int, second: int) -> Node:
    order = list(range(rank(input)))
    order[first], order[second] = order[second], order[first]
    return ops.transpose(input, integers(*order))


def _flatten(input: Node, start: int) -> Node:
    """Joins the axes from `start` on."""
    return ops.reshape(input, integers(*[0] * start, -1), True)


def _unflatten(input: Node, axis: int, sizes: Sequence[int]) -> Node:
    if axis not in (-1, rank(input) - 1):
        raise ValueError(f"unflatten of axis {axis} has no translation")
    kept = list(input.get_output_shape(0))[:-1]
    return ops.reshape(input, integers(*kept, *sizes), False)


def _unbind(input: Node, axis: int) -> list[Node]:
    parts = ops.split(input, ops.constant(np.int64(axis)), input.get_output_shape(0)[axis])
    return [ops.squeeze(part, integers(axis)) for part in parts.outputs()]


def _attention(query: Node, key: Node, value: Node, *, dropout_p: float) -> Node:
    return ops.scaled_dot_product_attention(query, key, value)


def _like(input: Node) -> torch.Tensor:
    """A tensor of a node's shape that holds nothing."""
    return torch.empty(tuple(input.get_output_shape(0)), device="meta")


def _check_input(input: Node, in_channels: int, stride: int) -> None:
    check_input(_like(input), in_channels, stride)


def _positions_for(embedding: np.ndarray, input: Node) -> Node:
    return constant(positions_for(torch.from_numpy(embedding), _like(input)).numpy())


def _as_map(tokens: Node, input: Node) -> Node:
    size = list(input.get_output_shape(0))[2:]
    return _unflatten(_transpose(tokens, 1, 2), 2, size)


def _item(input: Node | list[Node], index: Any) -> Node:
    return input[index] if isinstance(input, list) else _channels(input, index)


def _channels(input: Node, index: Any) -> Node:
    """input[:, start:stop:step]."""
    everything = slice(None)
    if not isinstance(index, tuple) or len(index) != 2 or index[0] != everything:
        raise ValueError(f"index {index} has no translation")
    channels = np.arange(input.get_output_partial_shape(0)[1].get_length(), dtype=np.int64)
    axis = ops.constant(np.int64(1))
    return ops.gather(input, ops.constant(channels[index[1]]), axis)


def _hard_sigmoid(input: Node, inplace: bool = False) -> Node:
    return ops.hard_sigmoid(input, constant(1 / 6), constant(0.5))


def _heat_centre(module: HeatCentre, heat: Node, image: Node) -> Node:
    _, _, height, width = heat.get_output_shape(0)
    share = ops.softmax(ops.reshape(heat, integers(0, -1), True), 1)
    rows, columns = ((np.arange(side) + 0.5) / side - 0.5 for side in (height, width))
    places = np.stack([np.repeat(rows, width), np.tile(columns, height)])
    play = np.array(play_shares(list(image.get_output_shape(0))[2:], module.size))
    gain = (module.gain.detach().numpy() / play)[:, None]
    centre = ops.matmul(share, constant(places * gain), False, True)
    position = ops.clamp(ops.add(centre, constant(0.5)), EDGE, 1 - EDGE)
    return ops.log(ops.divide(position, ops.subtract(constant(1), position)))


def _value(value: Node | float) -> Node:
    return constant(value) if isinstance(value, (int, float)) else value


def _same(module: nn.Module, input: Node) -> Node:
    return input


# by module type, function or name of a method
OPERATIONS: dict[Any, Callable[..., Node]] = {
    nn.BatchNorm2d: _norm,
    nn.GELU: _gelu,
    nn.LayerNorm: _layer_norm,
    nn.MaxPool2d: _max_pool,
    nn.ReLU: _relu,
    nn.ReLU6: lambda module, input: ops.clamp(input, 0.0, 6.0),
    HeatCentre: _heat_centre,
    nn.Dropout: _same, nn.Dropout2d: _same, nn.Identity: _same,
    operator.add: lambda a, b: ops.add(_value(a), _value(b)),
    operator.mul: lambda a, b: ops.multiply(_value(a), _value(b)),
    operator.getitem: _item,
    torch.cat: lambda inputs, axis: ops.concat(list(inputs), axis),
    F.hardsigmoid: _hard_sigmoid,
    F.scaled_dot_product_attention: _attention,
    as_map: _as_map,
    check_input: _check_input,
    positions_for: _positions_for,
    "flatten": _flatten,
    "relu": lambda input: ops.relu(input),
    "mean": _mean,
    "transpose": _transpose,
    "unbind": _unbind,
    "unflatten": _unflatten,
}
ELEMENTWISE = (nn.BatchNorm2d, nn.ReLU)
