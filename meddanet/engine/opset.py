"""From a module of this package to an OpenVINO graph on the same integers.

`torch.fx` records the module's forward pass; each quantised layer becomes codes times step on both
sides, with the layer's own range, which is the form OpenVINO runs as int8:

    weights      int8 codes -> float -> * step (* gain of the norm that follows)
    activations  clamp to the range -> FakeQuantize with the grid's step

Where weights or inputs have more than 8 bits, or this machine's int8 sums would be wrong (`Exact`),
a layer runs in float32 on the values of the same grid. No converter is involved: OpenVINO's own one
reports usage.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from ..kernels import norm_affine
from ..kernels.grid import qmax, quantize_codes, step_size
from ..layers import QuantConv2d, QuantConvTranspose2d, QuantizedInput, QuantLinear, as_made
from ..networks.heatmap import HeatCentre
from .operations import (
    ELEMENTWISE,
    OPERATIONS,
    Node,
    channels_first,
    constant,
    integers,
    rank,
)
from .unreported import unreported

with unreported():
    from openvino import opset13 as ops


class _Tracer(fx.Tracer):
    """Takes the package's layers as they are, and leaves other threads' modules alone.

    While it records, torch.fx changes what every module of the process does when it is called.
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        whole = isinstance(module, (QuantizedInput, HeatCentre))
        return whole or super().is_leaf_module(module, name)


class Exact(NamedTuple):
    """Which int8 convolutions come out exact on a machine, for codes within +-127.

    Before VNNI, x86 adds products of unsigned and signed bytes up in pairs of 16 bits. Codes that
    are never negative fit, 2 * 127 * 127; others are moved up by 128, and their sums saturate.

    Attributes:
        unsigned: Those of codes that are never negative.
        signed: All.
    """

    unsigned: bool
    signed: bool

    def allows(self, layer: QuantizedInput, non_negative: bool) -> bool:
        """Tells whether a layer of at most 8 bits may run on codes."""
        if self.signed:
            return True
        # only what was tried
        dense = isinstance(layer, QuantConv2d) and layer.groups == 1
        return self.unsigned and non_negative and dense


class Recorded(NamedTuple):
    """A module in `eval()` and what its forward pass does."""

    module: nn.Module
    graph: fx.Graph


# two recordings at a time would undo each other's changes to PyTorch in the wrong order
_recording = threading.Lock()


def record(module: nn.Module) -> Recorded:
    """Records a module's forward pass, once for inputs of any size.

    Raises:
        ValueError: If the pass depends on values or sizes, or a layer has hooks or methods of its
            own.
    """
    name = type(module).__name__
    if not all(map(as_made, module.modules())):
        raise ValueError(f"{name} has hooks, which OpenVINO would not call, or methods of its own")
    try:
        with _recording:
            return Recorded(module, _Tracer().trace(module))
    except Exception as error:  # the forward pass sees stand-ins for tensors: anything may fail
        raise ValueError(f"{name} cannot be recorded for OpenVINO ({error})") from error


def translate(
    recorded: Recorded, inputs: Sequence[Node], exact: Exact, channels_last: bool = False
) -> list[Node]:
    """Adds a module's forward pass to an OpenVINO graph.

    Args:
        recorded: Its forward takes as many tensors as there are inputs.
        inputs: Nodes of static shape, [N, C, H, W] each.
        exact: What may run on codes where the graph will.
        channels_last: The inputs are [N, H, W, C] instead; outputs are [N, C, H, W] all the same.

    Returns:
        One node per returned tensor.

    Raises:
        ValueError: If the forward pass holds an operation without translation.
    """
    try:
        return _Translation(*recorded, exact, channels_last).run(inputs)
    except ValueError:
        raise
    except Exception as error:  # arguments that a translation, or OpenVINO, does not take
        name = type(recorded.module).__name__
        raise ValueError(f"{name} has no translation to OpenVINO ({error})") from error


class _Translation:
    """One walk over a recorded forward pass.

    What is done element by element to a channels-last input, up to the first convolution's codes,
    is done in that layout: OpenVINO keeps it for convolutions, so that bytes need no transposition
    where floats would.
    """

    def __init__(
        self, module: nn.Module, graph: fx.Graph, exact: Exact, channels_last: bool
    ) -> None:
        self.graph, self.exact, self.channels_last = graph, exact, channels_last
        self.modules = dict(module.named_modules())
        self.values: dict[fx.Node, Node] = {}
        self.last: dict[fx.Node, Node] = {}  # the values that also exist with channels last
        self.non_negative: set[fx.Node] = set()

    def run(self, inputs: Sequence[Node]) -> list[Node]:
        waiting = iter(inputs)
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self._keep(node, next(waiting), self.channels_last)
            elif node.op == "output":
                result = self._arguments(node.args[0])
                return list(result) if isinstance(result, (tuple, list)) else [result]
            elif node not in self.values:
                self._translate(node)
        raise AssertionError("a recorded graph ends with its output")

    def _keep(self, node: fx.Node, value: Node, channels_last: bool = False) -> None:
        if channels_last:
            self.last[node] = value
            value = channels_first(value)
        self.values[node] = value

    def _translate(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            self.values[node] = self._parameter(node)
            return
        module = self._module(node)
        if isinstance(module, QuantizedInput):
            return self._keep(node, self._quantized(node, module))
        what = type(module) if module is not None else node.target
        if what not in OPERATIONS:
            raise ValueError(f"{getattr(what, '__name__', what)} has no translation to OpenVINO")
        if _keeps_sign(node, what, self.non_negative):
            self.non_negative.add(node)
        source: Any = node.args[0]
        if getattr(module, "inplace", False) and len(source.users) > 1:
            raise ValueError(f"{node.target} overwrites what others read: no translation")
        if what in ELEMENTWISE and source in self.last:
            return self._keep(node, OPERATIONS[what](module, self.last[source], -1), True)
        arguments = self._arguments(node.args)
        if module is not None:
            arguments = module, *arguments
        self._keep(node, OPERATIONS[what](*arguments, **self._arguments(node.kwargs)))

    def _arguments(self, value: Any) -> Any:
        return fx.node.map_arg(value, lambda node: self.values[node])

    def _quantized(self, node: fx.Node, layer: Any) -> Node:
        """A quantised layer; a norm that alone follows it becomes part of its scale and shift."""
        source, *rest = node.args
        names = "num_bits", "input_num_bits"
        given: Any = {**dict(zip((*names, "output_size"), rest, strict=False)), **node.kwargs}
        if given.get("output_size") is not None:
            raise ValueError("a transposed convolution's output_size has no translation")
        num_bits, input_num_bits = (
            getattr(layer, name) if given.get(name) is None else given[name] for name in names
        )
        gain, shift = np.ones(1), np.zeros(1)
        users = list(node.users)
        norm = self._module(users[0]) if len(users) == 1 else None
        if isinstance(norm, nn.BatchNorm2d):
            gain, shift = (part.numpy() for part in norm_affine(norm))
        # both or none: int8 weights of floats would make OpenVINO round the floats as well
        integer = (
            layer.quantize and max(num_bits, input_num_bits) <= 8
            and self.exact.allows(layer, source in self.non_negative)
        )
        codes = self._on_grid(source, layer, input_num_bits, integer)
        bias = 0.0 if layer.bias is None else layer.bias.detach().double().numpy()
        weight = _weight(layer, num_bits, gain, integer, tokens=rank(codes) == 3)
        result = _LAYERS[type(layer)](codes, layer, weight)
        offset = np.broadcast_to(bias * gain + shift, layer.weight.shape[_out_axis(layer)])
        if offset.any():
            trailing = 0 if isinstance(layer, QuantLinear) else 2
            result = ops.add(result, constant(offset.reshape(1, -1, *[1] * trailing)))
        if isinstance(norm, nn.BatchNorm2d):
            self.values[users[0]] = result
        return result

    def _on_grid(self, node: Any, layer: Any, num_bits: int, integer: bool) -> Node:
        if not layer.quantize:
            return self.values[node]
        options = layer, num_bits, integer, node in self.non_negative
        if node.target is torch.cat:
            # codes are put side by side, not floats: a quarter of the bytes
            inputs, axis = node.args
            return ops.concat([self._codes(source, *options) for source in inputs], axis)
        return self._codes(node, *options)

    def _codes(self, node: Any, *options: Any) -> Node:
        if node in self.last:
            return channels_first(on_grid(self.last[node], *options))
        return on_grid(self.values[node], *options)

    def _parameter(self, node: fx.Node) -> np.ndarray:
        owner, _, name = str(node.target).rpartition(".")
        return getattr(self.modules[owner], name).detach().numpy()

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.modules[str(node.target)] if node.op == "call_module" else None


def on_grid(
    input: Node, layer: Any, num_bits: int, integer: bool, non_negative: bool = False
) -> Node:
    """Puts values on the grid of a layer's input.

    For integers in the form that OpenVINO runs as codes: the range is clamped first, so that 256
    levels of the right step serve for every width up to 8 bits (255 levels of +-amax gave wrong
    sums, see docs/engine.md); what cannot be negative becomes unsigned codes, which x86 multiplies
    without a correction. Otherwise the values stay float32, rounded by what OpenVINO does not take
    for codes. That the layer has a range is `compile_engine`'s to check.
    """
    amax, step = float(layer.input_amax), float(layer.input_amax.float() / qmax(num_bits))
    if non_negative and input.get_type_name() == "Relu":
        input = input.input_value(0)
    input = ops.clamp(input, 0.0 if non_negative else -amax, amax)
    if not integer:
        codes = ops.round(ops.divide(input, constant(step)), "half_to_even")
        return ops.multiply(codes, constant(step))
    low = 0 if non_negative else -128
    ends = constant(low * step), constant((low + 255) * step)
    return ops.fake_quantize(input, *ends, *ends, 256)


def _out_axis(layer: nn.Module) -> int:
    return 1 if isinstance(layer, QuantConvTranspose2d) else 0


def _weight(layer: Any, num_bits: int, gain: np.ndarray, integer: bool, tokens: bool) -> Node:
    """Weights as int8 codes times their scale, or as float32.

    A linear layer's are those of a matrix product where its inputs are `tokens`, [N, L, C], and of
    a 1x1 convolution otherwise.
    """
    axis, weight = _out_axis(layer), layer.weight.detach().float()
    shape = [-1 if index == axis else 1 for index in range(weight.dim())]
    scale = np.broadcast_to(gain, weight.shape[axis]).reshape(shape)
    if layer.quantize:
        step, largest, _ = step_size(weight, num_bits, layer.weight_range().float())
        weight = quantize_codes(weight, step, largest)
        scale = scale * step.double().numpy()
    if isinstance(layer, QuantLinear) and not tokens:
        weight, scale = weight[:, :, None, None], scale[:, :, None, None]
    groups = getattr(layer, "groups", 1)
    if groups > 1:
        full = (groups, weight.shape[0] // groups, *weight.shape[1:])
        weight, scale = weight.reshape(full), scale.repeat(len(weight) // len(scale), 0)
        scale = scale.reshape(*full[:2], *[1] * (len(full) - 2))
    if not integer:
        return constant(weight.double().numpy() * scale)
    codes = ops.constant(weight.numpy().astype(np.int8))
    return ops.multiply(ops.convert(codes, "f32"), constant(scale))


def _convolution(input: Node, layer: QuantConv2d, weight: Node) -> Node:
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise ValueError(f"padding {layer.padding_mode} {layer.padding} has no translation")
    make = ops.convolution if layer.groups == 1 else ops.group_convolution
    padding = list(layer.padding)
    return make(input, weight, list(layer.stride), padding, padding, list(layer.dilation))


def _transposed(input: Node, layer: QuantConvTranspose2d, weight: Node) -> Node:
    if layer.groups > 1 or any(layer.output_padding):
        raise ValueError("groups and output_padding of a transposed convolution: no translation")
    padding = list(layer.padding)
    return ops.convolution_backprop_data(
        input, weight, list(layer.stride), pads_begin=padding, pads_end=padding,
        dilations=list(layer.dilation),
    )


def _linear(input: Node, layer: QuantLinear, weight: Node) -> Node:
    """[N, Cin] or [N, L, Cin]; of single rows OpenVINO's matrix product is slow."""
    if rank(input) == 3:
        return ops.matmul(input, weight, False, True)
    image = ops.reshape(input, integers(0, 0, 1, 1), True)
    sums = ops.convolution(image, weight, [1, 1], [0, 0], [0, 0], [1, 1])
    return ops.reshape(sums, integers(0, 0), True)


_LAYERS: dict[type, Callable[..., Node]] = {
    QuantConv2d: _convolution, QuantConvTranspose2d: _transposed, QuantLinear: _linear,
}
_NEVER_NEGATIVE = (nn.ReLU, nn.ReLU6, "relu", F.hardsigmoid)
_KEEP_SIGN = (
    nn.MaxPool2d, nn.Dropout, nn.Dropout2d, nn.Identity, "mean", operator.getitem, torch.cat
)


def _keeps_sign(node: fx.Node, what: Any, non_negative: set[fx.Node]) -> bool:
    """Tells whether a node's values cannot be negative."""
    if what in _NEVER_NEGATIVE:
        return True
    return what in _KEEP_SIGN and all(source in non_negative for source in node.all_input_nodes)
