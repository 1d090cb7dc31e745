"""What OpenVINO makes of a module: the right numbers, or a refusal."""

from __future__ import annotations

from copy import deepcopy
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn

from meddanet.layers import QuantConv2d, QuantConvTranspose2d, QuantLinear

if not find_spec("openvino"):
    pytest.skip("OpenVINO is not installed", allow_module_level=True)

from meddanet.engine import openvino_graphs, opset  # noqa: E402


def graphs_of(module: nn.Module) -> openvino_graphs.Graphs:
    """Returns graphs of one part, the module."""

    class One(openvino_graphs.Graphs):
        def _outputs(self, part, inputs):
            return self.translated(opset.record(module.eval()), inputs)

    return One(1, 1)


@pytest.mark.parametrize("widths", [(8, 8), (8, 16), (16, 8), (4, 12), (2, 3)], ids=str)
@pytest.mark.parametrize("shape", [(4, 64), (1, 50, 64)], ids=["rows", "tokens"])
def test_linear_layers_of_any_widths(widths, shape):
    """Of weights and inputs, in the layer or given: neither takes the other's."""
    layer = QuantLinear(64, 32, num_bits=widths[0], input_num_bits=widths[1])
    layer.input_amax.fill_(3.0)
    layer.update_range = False

    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, input):
            first, second = widths
            return self.layer(input), self.layer(input, first, input_num_bits=second)

    input = torch.randn(shape)
    exact = deepcopy(Given()).double().eval()(input.double())[0].detach().numpy()
    compiled = graphs_of(Given()).compiled(("one",), shape)
    for found in compiled([input.numpy()]).values():
        differing = np.abs(found - exact) > 1e-5 * np.abs(exact).max()
        # a code that a tie decides moves the 32 sums of its row
        assert differing.mean() <= 0.02, differing.mean()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("layer", [
    QuantConv2d(16, 24, 3, padding=1, groups=2, per_channel=True),
    QuantConvTranspose2d(16, 24, 2, stride=2, per_channel=True),
], ids=["grouped", "transposed"])
def test_a_range_per_channel(layer, bits):
    layer.num_bits = layer.input_num_bits = bits
    layer.input_amax.fill_(3.0)
    layer.update_range = False
    with torch.no_grad():
        # one range for all would leave the first channels no codes
        size = (-1, 1, 1) if isinstance(layer, QuantConvTranspose2d) else (-1, 1, 1, 1)
        layer.weight *= torch.logspace(-4, 0, 24).reshape(size)
    input = torch.randn(2, 16, 6, 5)
    exact = deepcopy(layer).double().eval()(input.double()).detach().numpy()
    compiled = graphs_of(nn.Sequential(layer)).compiled(("one",), input.shape)
    (found,) = compiled([input.numpy()]).values()
    scale = np.abs(exact).max((0, 2, 3), keepdims=True)
    assert (np.abs(found - exact) <= 1e-5 * scale).mean() >= 0.98


class Sized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = QuantConvTranspose2d(2, 3, 3, stride=2)
        self.up.input_amax.fill_(3.0)

    def forward(self, slices):
        return self.up(slices, output_size=[10, 12])


class Overwriting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, slices):
        twice = slices + slices
        return self.relu(twice) + twice


class Hooked(nn.ReLU):
    def __init__(self) -> None:
        super().__init__()
        self.register_forward_hook(lambda module, given, result: -result)


class Negated(nn.Sequential):
    """A layer with a forward of its own, which the layer's kind does not show."""

    def __init__(self) -> None:
        super().__init__(QuantConv2d(2, 2, 3))
        self[0].forward = lambda input: -QuantConv2d.forward(self[0], input)


class Meaning(nn.Module):
    def forward(self, slices):
        return slices.mean(dim=(2, 3), keepdim=False, dtype=torch.float64)


@pytest.mark.parametrize(("module", "message"), [
    (Overwriting(), "relu overwrites what others read"),
    (Meaning(), "Meaning has no translation to OpenVINO"),
    (Sized(), "output_size has no translation"),
    (nn.Sequential(nn.MaxPool2d(2, ceil_mode=True)), "ceil_mode, dilation, indices"),
    (Hooked(), "Hooked has hooks, which OpenVINO would not call"),
    (Negated(), "OpenVINO would not call, or methods of its own"),
])
def test_what_would_be_translated_wrongly(module, message):
    with pytest.raises(ValueError, match=message):
        graphs_of(module).graph(("one",), (1, 2, 8, 8))
