"""Segmenters and decision networks, against the papers' descriptions written out in plain PyTorch.

Parameters and multiply-adds have their own file, test_paper_costs.py.
"""

import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meddanet.build import (
    DECISION_NETWORKS,
    SEGMENTERS,
    build_decision_network,
    build_med_danet_v2,
    build_position_network,
    build_segmenter,
)
from meddanet.layers import QuantLinear, quantized_layers, set_quantization
from meddanet.networks.decision import ShuffleUnit
from meddanet.networks.heatmap import EDGE
from meddanet.networks.transbts import TransBTS, TransformerLayer


def shaken(model: nn.Module) -> nn.Module:
    """Moves norms away from the identity and position embeddings from zero, in float64."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    for name, parameter in model.named_parameters():
        if name.endswith("position_embedding"):
            nn.init.normal_(parameter)
    return model.double().eval()


class Written:
    """The networks of spec and papers as functions of a state_dict."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, self.state[f"{name}.bias"], stride, weight.shape[-1] // 2)

    def norm(self, x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            self.state[f"{name}.{part}"][:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def pre_activation(self, x: Tensor, name: str) -> Tensor:
        y = self.conv(self.norm(x, f"{name}.norm1").relu(), f"{name}.conv1")
        return x + self.conv(self.norm(y, f"{name}.norm2").relu(), f"{name}.conv2")

    def conv_norm_relu_twice(self, x: Tensor, name: str) -> Tensor:
        x = self.norm(self.conv(x, f"{name}.0"), f"{name}.1").relu()
        return self.norm(self.conv(x, f"{name}.3"), f"{name}.4").relu()

    def post_activation(self, x: Tensor, name: str) -> Tensor:
        return x + self.conv_norm_relu_twice(x, f"{name}.branch")

    def encoder(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, skips = self.conv(x, "init"), []
        for stage, blocks in enumerate((1, 2, 2, 4)):
            for block in range(blocks):
                x = self.pre_activation(x, f"encoder.{stage}.blocks.{block}")
            skips.append(x)
            if stage < 3:
                x = self.conv(x, f"encoder.{stage}.down", stride=2)
        return x, skips

    def decoder(self, x: Tensor, skips: list[Tensor], block) -> Tensor:
        for level in (3, 2, 1):
            x = self.conv(x, f"up{level}.reduce")
            weight, bias = self.state[f"up{level}.up.weight"], self.state[f"up{level}.up.bias"]
            x = F.conv_transpose2d(x, weight, bias, stride=2)
            x = self.conv(torch.cat([skips[level - 1], x], 1), f"up{level}.fuse")
            x = block(x, f"dec{level}" if level > 1 else "last_stage.block")
        return self.conv(x, "last_stage.end")

    def unet(self, x: Tensor) -> Tensor:
        return self.decoder(*self.encoder(x), self.pre_activation)

    def transformer_layer(self, prefix: str) -> nn.TransformerEncoderLayer:
        """PyTorch's own layer with these weights; query, key and value have no bias."""
        layer = nn.TransformerEncoderLayer(
            512, 8, 2048, 0.0, "gelu", batch_first=True, norm_first=True, dtype=torch.float64
        ).eval()
        names = {
            "self_attn.in_proj_weight": "attention.qkv.weight",
            "self_attn.out_proj.weight": "attention.proj.weight",
            "self_attn.out_proj.bias": "attention.proj.bias",
            "linear1.weight": "perceptron.0.weight", "linear1.bias": "perceptron.0.bias",
            "linear2.weight": "perceptron.3.weight", "linear2.bias": "perceptron.3.bias",
            **{f"norm{i}.{p}": f"norm{i}.{p}" for i in (1, 2) for p in ("weight", "bias")},
        }
        state = {ours: self.state[f"{prefix}{theirs}"] for ours, theirs in names.items()}
        state["self_attn.in_proj_bias"] = torch.zeros(3 * 512, dtype=torch.float64)
        layer.load_state_dict(state)
        return layer

    def transbts(self, x: Tensor, layers: int) -> Tensor:
        x, skips = self.encoder(x)
        x = self.conv(self.norm(x, "transformer.project.0").relu(), "transformer.project.2")
        x = x + self.state["transformer.position_embedding"]
        tokens = x.flatten(2).transpose(1, 2)
        for index in range(layers):
            tokens = self.transformer_layer(f"transformer.layers.{index}.")(tokens)
        weight, bias = self.state["transformer.norm.weight"], self.state["transformer.norm.bias"]
        tokens = F.layer_norm(tokens, (512,), weight, bias)
        x = tokens.transpose(1, 2).reshape(x.shape)
        x = self.conv_norm_relu_twice(x, "transformer.reduce")
        x = self.post_activation(x, "transformer.refine")
        return self.decoder(x, skips, self.post_activation)


@torch.no_grad()
def test_the_unet_as_the_papers_describe_it(tolerances):
    model = shaken(build_segmenter("unet-12", in_channels=3, num_classes=5))
    x = torch.randn(2, 3, 40, 24, dtype=torch.float64)
    tolerances.elementwise(model(x), Written(model.state_dict()).unet(x))


@torch.no_grad()
def test_transbts_as_the_papers_describe_it(tolerances):
    """At the size the position embedding is learnt at; PyTorch's own transformer layers inside."""
    model = shaken(TransBTS(4, 1, 2, layers=2, position_size=(4, 6)))
    set_quantization(model, quantize=False, update_range=False)
    x = torch.randn(2, 1, 32, 48, dtype=torch.float64)
    tolerances.elementwise(model(x), Written(model.state_dict()).transbts(x, layers=2))


@pytest.mark.parametrize("name", ["unet-12", "unet-4", "transbts-light"])
@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (2, 3, 24, 40)])
@torch.no_grad()
def test_segmenters_take_any_channels_classes_and_size(name, shape):
    model = build_segmenter(name, in_channels=shape[1], num_classes=6).eval()
    first, second = (model(torch.ones(shape)) for _ in range(2))
    assert first.shape == (shape[0], 6, *shape[2:]) and first.isfinite().all()
    # dropout rests, or the two would differ
    assert torch.equal(first, second)
    model.train()
    assert not torch.equal(*(model(torch.ones(2, *shape[1:])) for _ in range(2)))


@pytest.mark.parametrize("name", SEGMENTERS)
def test_a_size_that_does_not_divide_is_told_its_cure(name):
    model = build_segmenter(name)
    with pytest.raises(ValueError, match="multiples of 8, got 130x240; pad to 136x240"):
        model(torch.zeros(1, 4, 130, 240))
    with pytest.raises(ValueError, match=r"must be \[N, 4, H, W\], got shape \[1, 3, 16, 16\]"):
        model(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("name", ["unet-0", "unet-", "unet-016", "unet-12x", "resnet"])
def test_unknown_segmenters_are_named(name):
    with pytest.raises(ValueError, match=f"unknown segmenter '{name}'; known are unet-12, unet-16"):
        build_segmenter(name)


def cubic(old: int, new: int) -> Tensor:
    """The matrix [new, old] of cubic convolution (Keys 1981, a = -0.75), borders repeated."""
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for row in range(new):
        place = (row + 0.5) * old / new - 0.5  # pixel centres
        for tap in range(math.floor(place) - 1, math.floor(place) + 3):
            d, a = abs(place - tap), -0.75
            inner = (a + 2) * d**3 - (a + 3) * d**2 + 1
            outer = a * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[row, min(max(tap, 0), old - 1)] += inner if d <= 1 else outer
    return matrix


@torch.no_grad()
def test_a_slice_of_another_size_gets_the_position_embedding_stretched(tolerances):
    model = TransBTS(4, 1, 2, layers=1, embedding=16, heads=2, hidden=8).double().eval()
    set_quantization(model, quantize=False, update_range=False)
    transformer = model.transformer
    embedding = nn.init.normal_(transformer.position_embedding)
    for parameter in transformer.project[2].parameters():
        parameter.zero_()
    seen = []
    transformer.dropout.register_forward_hook(lambda module, args, output: seen.append(output))
    model(torch.randn(1, 1, 240, 96, dtype=torch.float64))
    tolerances.elementwise(seen[0], cubic(16, 30) @ embedding @ cubic(16, 12).T)


@torch.no_grad()
def test_the_shuffle_unit_as_its_paper_describes_it(tolerances):
    """Concatenate, shuffle two groups, split: here the shuffle comes first, of the unit's input."""
    unit = shaken(ShuffleUnit(8, 8, stride=1))
    set_quantization(unit, quantize=False, update_range=False)
    x = torch.randn(2, 8, 6, 5, dtype=torch.float64)
    shuffled = x.reshape(2, 4, 2, 6, 5).transpose(1, 2).reshape(2, 8, 6, 5)
    kept, processed = shuffled.chunk(2, 1)
    state = unit.state_dict()
    for index, name in ((0, "main.0"), (1, "main.1"), (2, "main.2")):
        weight = state[f"{name}.0.weight"]
        groups = len(weight) if index == 1 else 1
        processed = F.conv2d(processed, weight, None, 1, weight.shape[-1] // 2, 1, groups)
        processed = Written(state).norm(processed, f"{name}.1")
        processed = processed if index == 1 else processed.relu()
    tolerances.elementwise(unit(x), torch.cat([kept, processed], 1))


@pytest.mark.parametrize("name", DECISION_NETWORKS)
@torch.no_grad()
def test_decision_networks_take_any_channels_and_size(name):
    model = build_decision_network(name, num_classes=3, in_channels=2).eval()
    for side in ((32, 32), (40, 56)):
        assert model(torch.randn(2, 2, *side)).shape == (2, 3)
    alone, together = model(torch.ones(1, 2, 40, 56)), model(torch.ones(4, 2, 40, 56))
    torch.testing.assert_close(together, alone.expand(4, 3))


@torch.no_grad()
def test_the_place_is_where_the_map_is_hot():
    heat = torch.zeros(2, 1, 8, 10)
    heat[0, 0, 1, 9] = 50.0
    network = build_position_network("heatmap", in_channels=2, size=32)
    # rows: cell 1 of 8, centre 24 of 128 pixels, a crop from 8 on, of 96 possible; columns: centre
    # 152 of 160, a crop that would leave the image
    place = network.centre(heat, torch.zeros(2, 2, 128, 160)).sigmoid()
    assert place[0].tolist() == pytest.approx([8 / 96, 1 - EDGE], abs=1e-6)
    assert place[1].tolist() == pytest.approx([0.5, 0.5], abs=1e-6)
    # the same centre of a larger image, and one that the crop fills
    place = network.centre(heat, torch.zeros(2, 2, 256, 32)).sigmoid()
    assert place[0].tolist() == pytest.approx([(48 - 16) / 224, 1 - EDGE], abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("side", [(32, 48), (120, 128), (130, 144)])
def test_a_map_has_a_cell_per_16_pixels(side):
    network = build_position_network("heatmap", in_channels=2).eval()
    image = torch.randn(3, 2, *side)
    assert network.heat(image).shape == (3, 1, *(-(-length // 16) for length in side))
    assert network(image).shape == (3, 2)


def test_unknown_decision_networks_are_named():
    with pytest.raises(ValueError, match="'resnet'; known are shufflenetv2-m, shufflenetv2"):
        build_decision_network("resnet", 3)


# V2 around TransBTS --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dynamic() -> nn.Module:
    torch.manual_seed(0)
    return build_med_danet_v2("transbts-light", in_channels=2, num_classes=3, crop_sizes=(8,))


def test_every_linear_layer_of_a_quantised_transbts_is_on_the_grid(dynamic):
    linear = {n: m for n, m in dynamic.segmenter.named_modules() if isinstance(m, nn.Linear)}
    assert set(linear) == {
        f"transformer.layers.0.{name}"
        for name in ("attention.qkv", "attention.proj", "perceptron.0", "perceptron.3")
    }
    assert all(isinstance(m, QuantLinear) and m.quantize for m in linear.values())
    assert all((m.num_bits, m.input_num_bits) == (8, 8) for m in linear.values())


def test_v2_around_transbts_trains_end_to_end(dynamic):
    dynamic.train()
    set_quantization(dynamic, quantize=True, update_range=True)
    slices = torch.randn(2, 2, 16, 24)
    out = dynamic(slices)
    assert [logits.shape for logits in out.branch_logits] == [(2, 3, 16, 24)] * 2
    assert all(set(bits.unique().tolist()) <= {8.0, 16.0} for bits in out.num_bits)
    torch.testing.assert_close(out.mixed.sum(1), torch.ones(2, 16, 24))
    loss = out.mixed.square().mean() + sum(bits.mean() for bits in out.num_bits)
    (loss + sum(logits.square().mean() for logits in out.branch_logits)).backward()
    for name, parameter in dynamic.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    embedding = dynamic.segmenter.transformer.position_embedding
    assert embedding.grad.abs().sum() > 0
    # the ranges of the linear layers were learnt, too
    assert all(layer.input_amax > 0 for layer in quantized_layers(dynamic).values())


@torch.no_grad()
def test_v2_around_transbts_segments_slice_by_slice_alike(dynamic):
    """Fixed ranges, all three routes: the batch's answer is each slice's own, twice the same."""
    set_quantization(dynamic, quantize=True, update_range=False)
    dynamic.eval()
    for layer in quantized_layers(dynamic).values():
        layer.input_amax.fill_(3.0)
    # in float64, where no code hangs on the rounding that differs with the batch
    dynamic = deepcopy(dynamic).double()
    dynamic.policy = Decide()
    for selector in dynamic.bit_selectors:
        selector.widths = selector.widths.double()
    slices = torch.randn(6, 2, 16, 24, dtype=torch.float64)
    slices[:, 0, 0, 0] = torch.tensor([0.0, 1, 2, 2, 1, 0])
    together, again = dynamic.segment(slices), dynamic.segment(slices)
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
    assert together.decisions.tolist() == [0, 1, 2, 2, 1, 0]
    assert not together.labels[[0, 5]].any()
    for index in range(6):
        alone = dynamic.segment(slices[index : index + 1])
        assert torch.equal(alone.num_bits[0], together.num_bits[index])
        assert torch.equal(alone.offsets[0], together.offsets[index])
        assert torch.equal(alone.labels[0], together.labels[index])


class Decide(nn.Module):
    """A policy that reads its answer in the slice's first pixel."""

    def forward(self, slices: Tensor) -> Tensor:
        return torch.eye(3)[slices[:, 0, 0, 0].round().long()]


def test_v2_around_transbts_quantises_its_tokens(dynamic):
    """A linear layer's answer is the product of values rounded by hand on the 8-bit grid."""
    layer = dynamic.segmenter.transformer.layers[0].attention.qkv.eval()
    tokens = torch.randn(1, 6, 512)
    layer.input_amax.fill_(2.0)

    def on_grid(x: Tensor, amax: float) -> Tensor:
        step = torch.tensor(amax) / 127  # the grid's arithmetic is float32
        return (x / step).round().clamp(-127, 127).double() * step.double()

    with torch.no_grad():
        weight = on_grid(layer.weight, layer.weight.abs().max().item())
        exact = on_grid(tokens, 2.0) @ weight.T
        assert (layer(tokens).double() - exact).abs().max() < 1e-5 * exact.abs().max()
        plain = tokens.double() @ layer.weight.double().T
        assert (exact - plain).abs().max() > 1e-3 * exact.abs().max()


def test_a_transformer_layer_keeps_its_dropout_for_training():
    layer = TransformerLayer(512, 8, 2048, 0.1)
    set_quantization(layer, quantize=False, update_range=False)
    tokens = torch.randn(1, 4, 512)
    with torch.no_grad():
        assert not torch.equal(layer(tokens), layer(tokens))
        layer.eval()
        assert torch.equal(layer(tokens), layer(tokens))
