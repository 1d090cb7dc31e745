"""Decision networks as a plan runs them: fixed weights, norms folded, no word to the host."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..kernels import (
    PackedHeatHead,
    PackedPooledHead,
    PackedStage,
    PackedStem,
    PackedUnit,
    fake_quantize,
    heat_head,
    pack_heat_head,
    pack_pooled_head,
    pack_stage,
    pack_stem,
    pack_unit,
    pooled_head,
    shuffle_stage,
    shuffle_stem,
)
from ..kernels.layout import wide_dtype
from ..layers import quantized_layers
from ..networks.decision import ShuffleNetV2, ShuffleStem, ShuffleUnit
from ..networks.heatmap import EDGE, HeatmapLocator, play_shares
from ..routing import to_memory_format


class _OnGrid(nn.Module):
    """A layer in full precision behind the rounding of its input.

    Args:
        layer: Its weights are on the grid already.
        num_bits: Width of the input.
        amax: Range of the input.
    """

    amax: Tensor

    def __init__(self, layer: nn.Module, num_bits: int, amax: Tensor) -> None:
        super().__init__()
        self.layer, self.num_bits = layer, num_bits
        self.register_buffer("amax", amax.detach().clone())

    def forward(self, input: Tensor) -> Tensor:
        """Runs the layer on input [N, ...]."""
        return self.layer(fake_quantize(input, self.num_bits, self.amax))


class _OneKernel(nn.Module):
    """A part of ShuffleNetV2 or `HeatmapLocator` as one operation.

    Args:
        operation: `shuffle_stem`, `shuffle_stage`, `pooled_head` or `heat_head`.
        packed: Its weights as they run, where they run: they cannot be moved or cast.

    Attributes:
        seen: int32 [N], 0 where the next input's sample may be left out; None: all are seen.
    """

    seen: Tensor | None = None

    def __init__(
        self, operation: Callable[..., Tensor],
        packed: PackedStem | PackedStage | PackedPooledHead | PackedHeatHead,
    ) -> None:
        super().__init__()
        self.operation, self.packed = operation, packed

    def forward(self, input: Tensor, *more: Any) -> Tensor:
        """Runs the part on input [N, Cin, H, W] and what else its operation takes."""
        return self.operation(input, self.packed, *more, seen=self.seen)


class _Headed(nn.Module):
    """A decision network whose head, all that follows its stages, is one operation.

    Args:
        network: Has stem and stages.
        head: `pooled_head` or `heat_head`.
        size: Of a `HeatCentre`; None: the head asks for no free play.
    """

    def __init__(
        self, network: ShuffleNetV2 | HeatmapLocator, head: _OneKernel, size: float | None = None
    ) -> None:
        super().__init__()
        self.stem, self.stages, self.head = network.stem, network.stages, head
        self.size = size

    def asked(self, view: Tensor) -> tuple[list[float], ...]:
        """Returns what the head of a view [N, C, H, W] takes beside the stages' map."""
        return () if self.size is None else (play_shares(view.shape[2:], self.size),)

    def forward(self, view: Tensor) -> Tensor:
        """Maps [N, C, H, W] to logits [N, K], in float32 at least."""
        return self.head(self.stages(self.stem(view)), *self.asked(view))


class _FewOutputs(nn.Module):
    """A linear layer as products and sums, in float32 at least.

    cuBLAS has memory that PyTorch may free while a graph still writes there.

    Args:
        layer: Which see.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, input: Tensor) -> Tensor:
        """Maps [N, Cin] to [N, Cout], float64 where that comes in, else float32."""
        dtype = wide_dtype(input)
        output = (input[:, None].to(dtype) * self.weight.to(dtype)).sum(2)
        return output if self.bias is None else output + self.bias.to(dtype)


def frozen(
    network: nn.Module, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> nn.Module:
    """Returns a copy for inference whose forward pass can be captured in a graph.

    Layers that are quantised have their weights put on the grid and round their input by its fixed
    range; batch norms that follow a convolution are folded into it. Stem, stages and head of
    ShuffleNetV2 and `HeatmapLocator` become one operation each where they have no quantised layer,
    stages as far as there is none.

    Args:
        network: In `eval()`, every quantised layer with a range.
        dtype: Of weights and activations.
        device: Where it runs.
    """
    network = deepcopy(network).to(device).eval()
    rounding = {}
    for name, layer in quantized_layers(network).items():
        if layer.quantize:
            rounding[name] = layer.input_num_bits, layer.input_amax
            weight = fake_quantize(layer.weight.detach(), layer.num_bits, layer.weight_range())
            layer.weight = nn.Parameter(weight)
            layer.quantize = False
    for module in network.modules():
        if isinstance(module, nn.Sequential):
            _fold_norms(module)
    network = to_memory_format(network.to(dtype), torch.channels_last).requires_grad_(False)
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.Linear):
            network.set_submodule(name, _FewOutputs(layer))
    # ranges stay in full precision
    for name, (num_bits, amax) in rounding.items():
        parent, _, own = name.rpartition(".")
        owner = network.get_submodule(parent)
        setattr(owner, own, _OnGrid(getattr(owner, own), num_bits, amax))
    for name, part in list(network.named_modules()):
        if isinstance(part, ShuffleStem) and not _rounds(part):
            network.set_submodule(name, _OneKernel(shuffle_stem, pack_stem(*_layer(part))))
        elif isinstance(part, nn.Sequential) and any(isinstance(p, ShuffleUnit) for p in part):
            network.set_submodule(name, _in_stages(part))
    return _with_head(network)


def answers(network: nn.Module, view: Tensor, seen: Tensor, *more: Any) -> Tensor:
    """Runs a network of `frozen`, which leaves out what is not seen as far as it can.

    Args:
        network: Which see, or a part of it; one caller at a time.
        view: [N, C, H, W].
        seen: int32 [N]; where it is 0 the answer is anything.
        more: What else a part takes.

    Returns:
        Logits [N, K].
    """
    parts = [part for part in network.modules() if isinstance(part, _OneKernel)]
    for part in parts:
        part.seen = seen
    try:
        return network(view, *more)
    finally:
        for part in parts:
            part.seen = None


def _rounds(network: nn.Module) -> bool:
    return any(isinstance(module, _OnGrid) for module in network.modules())


def _layer(layers: Any) -> tuple[Tensor, Tensor]:
    """Returns weight and bias of a convolution whose norm is folded."""
    return layers[0].weight, layers[0].bias


def _packed(unit: ShuffleUnit) -> PackedUnit:
    expand, depth, mix = map(_layer, unit.main)
    return pack_unit(expand, depth, mix, [_layer(layers) for layers in unit.project or ()])


def _in_stages(units: nn.Sequential) -> nn.Sequential:
    """Makes one operation of units in float that follow each other; halving begins another."""
    parts: list[nn.Module] = []
    stage: list[PackedUnit] = []

    def end_stage() -> None:
        if stage:
            parts.append(_OneKernel(shuffle_stage, pack_stage(stage)))
            stage.clear()

    for unit in units:
        if not isinstance(unit, ShuffleUnit) or _rounds(unit):
            end_stage()
            parts.append(unit)
            continue
        if unit.project is not None:
            end_stage()
        stage.append(_packed(unit))
    end_stage()
    return nn.Sequential(*parts)


def _with_head(network: nn.Module) -> nn.Module:
    """Packs what follows the stages of a network whose norms are folded, if none of it rounds."""
    if isinstance(network, ShuffleNetV2):
        last, linear = network.last, network.classifier
        if not (_rounds(last) or _rounds(linear)):
            pooled = pack_pooled_head(_layer(last), linear.weight, linear.bias)
            return _Headed(network, _OneKernel(pooled_head, pooled))
    if isinstance(network, HeatmapLocator):
        last, to_map, centre = network.last, network.map, network.centre
        if not (_rounds(last) or _rounds(to_map)):
            heat = pack_heat_head(_layer(last), to_map.weight, centre.gain, EDGE)
            return _Headed(network, _OneKernel(heat_head, heat), centre.size)
    return network


def _fold_norms(sequence: nn.Sequential) -> None:
    for (name, layer), (after, norm) in pairwise(list(sequence.named_children())):
        if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            sequence.set_submodule(name, fuse_conv_bn_eval(layer, norm))
            sequence.set_submodule(after, nn.Identity())
