"""Quantised layers against plain PyTorch run on values rounded by hand."""

import math
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from meddanet.layers import (
    BitSelector,
    QuantConv2d,
    QuantConvTranspose2d,
    QuantLinear,
    image_gradients,
    quantized_layers,
    set_quantization,
)


def on_grid(x: torch.Tensor, bits: int, amax: float) -> torch.Tensor:
    """The contract's grid in float64, written out."""
    largest = 32639 if bits == 16 else 2 ** (bits - 1) - 1
    step = amax / largest
    return (x.double() / step).round().clamp(-largest, largest) * step


CASES = {
    "conv": (QuantConv2d, nn.Conv2d, (6, 5, 3), {"padding": 1, "stride": 2}, (3, 6, 9, 7)),
    "conv reflect": (
        QuantConv2d, nn.Conv2d, (6, 5, 3), {"padding": 1, "padding_mode": "reflect"}, (3, 6, 9, 7)
    ),
    "conv same grouped": (
        QuantConv2d, nn.Conv2d, (6, 4, 3), {"padding": "same", "groups": 2}, (3, 6, 9, 7)
    ),
    "transposed": (
        QuantConvTranspose2d, nn.ConvTranspose2d, (6, 4, 2), {"stride": 2}, (3, 6, 5, 4)
    ),
    "linear": (QuantLinear, nn.Linear, (6, 5), {"bias": False}, (3, 4, 6)),
}


@pytest.mark.parametrize("name", CASES)
def test_each_layer_is_its_parent_on_rounded_values(name):
    quantised, plain, args, kwargs, shape = CASES[name]
    torch.manual_seed(0)
    layer = quantised(*args, **kwargs, num_bits=8, input_num_bits=16).eval()
    layer.input_amax.fill_(1.5)
    parent = plain(*args, **kwargs).double()
    parent.load_state_dict(layer.state_dict(), strict=True)
    with torch.no_grad():
        parent.weight.copy_(on_grid(layer.weight, 8, layer.weight.abs().max().item()))
        x = torch.randn(shape)
        wanted = parent(on_grid(x, 16, 1.5))
        torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-4, atol=1e-5)
        layer.quantize = False
        layer.load_state_dict(parent.state_dict(), strict=True)
        torch.testing.assert_close(layer(x).double(), parent(x.double()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [QuantConv2d, QuantConvTranspose2d])
@pytest.mark.parametrize("width", [4, torch.tensor([4, 8, 4])], ids=["int", "per sample"])
def test_a_range_per_channel_is_that_of_a_layer_of_one_channel(kind, groups, width):
    torch.manual_seed(0)
    layer = kind(6, 4, 3, groups=groups, per_channel=True).eval()
    x = torch.randn(3, 6, 7, 5)
    layer.input_amax.fill_(2.0)
    together = layer(x, width)
    for channel in range(4):
        group, own = divmod(channel, 4 // groups)
        rows = slice(group * 6 // groups, (group + 1) * 6 // groups)
        alone = kind(6 // groups, 1, 3).eval()
        with torch.no_grad():
            transposed = kind is QuantConvTranspose2d
            weight = layer.weight[rows, own, None] if transposed else layer.weight[channel, None]
            alone.weight.copy_(weight)
            alone.bias.copy_(layer.bias[channel])
        alone.input_amax.fill_(2.0)
        torch.testing.assert_close(together[:, channel], alone(x[:, rows], width)[:, 0])
    layer.per_channel = False
    assert not torch.allclose(together, layer(x, width))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("training", [True, False])
def test_an_input_without_a_batch_is_a_batch_of_one(name, training):
    quantised, plain, args, kwargs, shape = CASES[name]
    layer = quantised(*args, **kwargs).train(training)
    x = torch.randn(shape[-1:] if quantised is QuantLinear else shape[1:])
    assert layer(x).shape == plain(*args, **kwargs)(x).shape
    torch.testing.assert_close(layer(x), layer(x[None])[0])


def test_a_transposed_convolution_takes_the_size_it_should_have():
    layers = [kind(3, 2, 3, stride=2) for kind in (QuantConvTranspose2d, nn.ConvTranspose2d)]
    x = torch.randn(1, 3, 4, 5)
    for size in (None, [9, 11], [10, 12], [9, 12]):
        ours, parents = (layer(x, output_size=size) for layer in layers)
        assert ours.shape == parents.shape
        if size:  # where PyTorch has it, in a list or a shape
            assert torch.equal(layers[0](x, size), ours)
            assert torch.equal(layers[0](x, parents.shape[2:]), ours)
    with pytest.raises(ValueError, match="requested an output size"):
        layers[0](x, output_size=[11, 11])
    assert layers[0](x[0], output_size=[2, 10, 12]).shape == (2, 10, 12)
    calls = []
    layers[0].register_forward_hook(lambda *_: calls.append(1))
    layers[0](x[0])
    assert len(calls) == 1


@pytest.mark.parametrize("name", CASES)
def test_under_autocast_each_layer_returns_what_its_parent_does(name):
    quantised, plain, args, kwargs, shape = CASES[name]
    with torch.autocast("cpu", torch.bfloat16):
        # with a bias, which has the higher precision
        layers = [kind(*args, **{**kwargs, "bias": True}) for kind in (quantised, plain)]
        assert [layer(torch.ones(shape)).dtype for layer in layers] == [torch.bfloat16] * 2


def test_widths_per_sample_are_as_each_sample_alone():
    torch.manual_seed(0)
    layer = QuantConv2d(4, 6, 3, padding=1).eval()
    x = torch.randn(5, 4, 8, 8)
    widths = torch.tensor([8, 16, 4, 16, 8])
    together = layer(x, widths, widths)
    for index, width in enumerate(widths.tolist()):
        alone = layer(x[index : index + 1], width, width)
        torch.testing.assert_close(together[index : index + 1], alone)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("num_bits", "message"),
    [
        ("8", r"num_bits must be an int from 2 to 16 or a tensor \[N\], got '8'"),
        (8.0, r"num_bits must be an int from 2 to 16 or a tensor \[N\], got 8.0"),
        (torch.tensor([8, 16]), r"one width per sample, shape \[3\], got shape \[2\]"),
    ],
)
def test_what_is_no_width_is_refused(name, num_bits, message):
    layer, _, args, kwargs, shape = CASES[name]
    made = layer(*args, **kwargs)
    with pytest.raises(ValueError, match=message):
        made(torch.randn(shape), num_bits)
    with pytest.raises(ValueError, match=f"input_{message}" if "num_bits" in message else message):
        made(torch.randn(shape), None, num_bits)
    assert made.input_amax == 0


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("option", ["num_bits", "input_num_bits"])
def test_a_layer_of_no_width_is_not_made(name, option):
    layer, _, args, kwargs, _ = CASES[name]
    for width in (1, 17, "8", True):
        with pytest.raises(ValueError, match=f"^{option} must be an int from 2 to 16"):
            layer(*args, **kwargs, **{option: width})


def test_the_range_is_learnt_in_training_and_fixed_afterwards():
    layer = QuantLinear(3, 2)
    first, second = torch.tensor([[1.0, -2.0, 0.5], [4.0, 0.0, 0.0]]), torch.full((1, 3), 5.0)
    layer(first)
    assert layer.input_amax.item() == 3.0  # mean of the samples' maxima 2 and 4
    layer(second)
    assert layer.input_amax.item() == pytest.approx(3.0 + 0.05 * (5.0 - 3.0))
    layer.update_range = False
    layer(second * 9)
    assert layer.input_amax.item() == pytest.approx(3.1)
    layer.eval()
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.zero_()
        # values beyond the range saturate: 3 x 3.1
        assert layer(torch.full((1, 3), 100.0))[0, 0].item() == pytest.approx(9.3, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_batch_that_is_not_finite_teaches_no_range(bad):
    layer = QuantLinear(3, 2)
    broken = torch.tensor([[1.0, bad, 0.5], [4.0, 0.0, 0.0]])
    layer(broken)
    assert layer.input_amax.item() == 0.0
    layer(torch.full((1, 3), 2.0))
    assert layer.input_amax.item() == 2.0
    layer(broken)
    assert layer.input_amax.item() == 2.0
    layer(torch.full((1, 3), -3.0))
    assert layer.input_amax.item() == pytest.approx(2.0 + 0.05 * (3.0 - 2.0))


@pytest.mark.parametrize("name", CASES)
def test_an_input_that_is_refused_teaches_no_range(name):
    """PyTorch's own layers refuse each of them, too, in words of their own."""
    quantised, plain, args, kwargs, shape = CASES[name]
    layer, parent = quantised(*args, **kwargs), plain(*args, **kwargs)
    axis = -1 if quantised is QuantLinear else -3
    wider = list(shape)
    wider[axis] += 1
    axes, shapes = r"\[\.\.\., 6\]", [wider, ()]
    if axis == -3:
        axes, shapes = r"\[6, H, W\] or \[N, 6, H, W\]", [wider, (), (1, *shape)]
    refused = {
        rf"^input must be {axes}, got shape \[": [torch.ones(s) for s in shapes],
        r"^input is torch\.(float64|int64), the layer's weights are torch\.float32$": [
            torch.ones(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.int64)
        ],
    }
    for message, inputs in refused.items():
        for input in inputs:
            with pytest.raises((RuntimeError, ValueError)):
                parent(input)
            with pytest.raises(ValueError, match=message):
                layer(input)
    assert layer.input_amax == 0


@pytest.mark.parametrize("name", CASES)
def test_a_range_that_is_nan_gives_nan(name):
    quantised, _, args, kwargs, shape = CASES[name]
    layer = quantised(*args, **kwargs).eval()
    layer.input_amax.fill_(math.nan)
    assert layer(torch.randn(shape)).isnan().all()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.float16, torch.float32), (torch.float32, torch.float32),
     (torch.float64, torch.float64)],
)
def test_the_range_lies_where_the_weight_does(name, dtype, wide):
    quantised, _, args, kwargs, _ = CASES[name]
    layer = quantised(*args, **kwargs, device="meta", dtype=dtype)
    assert layer.weight.device == layer.input_amax.device == torch.device("meta")
    assert (layer.weight.dtype, layer.input_amax.dtype) == (dtype, wide)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_a_range_is_learnt_in_float32_whatever_the_layer_is_cast_to(name, dtype):
    """In bfloat16 a running mean of steps of a twentieth stands still on its way."""
    quantised, _, args, kwargs, shape = CASES[name]
    layer = quantised(*args, **kwargs)
    layer(torch.full(shape, 4.0))
    layer.to(dtype)
    assert (layer.weight.dtype, layer.input_amax.dtype) == (dtype, torch.float32)
    for _ in range(200):
        layer(torch.full(shape, 4.5, dtype=dtype))
    assert 4.499 < layer.input_amax.item() <= 4.5
    assert layer.double().input_amax.dtype == torch.float64


@pytest.mark.parametrize("name", CASES)
def test_a_layer_made_on_meta_takes_weights_and_runs(name):
    quantised, _, args, kwargs, shape = CASES[name]
    layer = quantised(*args, **kwargs, device="meta")
    for training in (True, False):
        assert layer.train(training)(torch.ones(shape, device="meta")).is_meta
    other = quantised(*args, **kwargs).eval()
    layer.load_state_dict(other.state_dict(), assign=True)
    x = torch.randn(shape)
    assert torch.equal(layer(x), other(x)) and layer.input_amax == 0


def test_a_float64_layer_learns_a_float64_range():
    layer = QuantLinear(1, 1, dtype=torch.float64)
    layer(torch.tensor([[1 / 3]], dtype=torch.float64))
    assert layer.input_amax.item() == 1 / 3


@pytest.mark.parametrize("name", CASES)
def test_resetting_a_layer_forgets_its_range(name):
    quantised, plain, args, kwargs, shape = CASES[name]
    layer = quantised(*args, **kwargs, device="meta").to_empty(device="cpu")
    layer.input_amax.fill_(7.0)  # what the memory happened to hold
    torch.manual_seed(0)
    layer.reset_parameters()
    torch.manual_seed(0)
    assert torch.equal(layer.weight, plain(*args, **kwargs).weight)
    assert layer.input_amax.item() == 0.0
    layer(torch.ones(shape))
    assert layer.input_amax.item() == 1.0


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_whose_range_is_not_learnt_is_one_graph(name, training):
    quantised, _, args, kwargs, shape = CASES[name]
    layer = quantised(*args, **kwargs).train(training)
    layer.update_range = False
    x, more = torch.randn(shape), torch.randn(5, *shape[1:])
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    shapes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(layer, (x,), dynamic_shapes=shapes).module()
    for amax in (0.0, 1.5, math.nan):
        layer.input_amax.fill_(amax)
        exported.input_amax.fill_(amax)
        exact = {"rtol": 0.0, "atol": 0.0, "equal_nan": True}
        torch.testing.assert_close(compiled(x), layer(x), **exact)
        torch.testing.assert_close(exported(more), layer(more), **exact)


def test_ranges_are_saved_beside_the_weights_as_documented(tmp_path):
    text = (Path(__file__).parents[1] / "docs/kernels.md").read_text()
    start, end = text.index("    ranges = {"), text.index("After `to_empty`")
    save, load = textwrap.dedent(text[start:end]).split("\n\n", 1)
    model = nn.Sequential(QuantLinear(3, 2), QuantLinear(2, 1))
    model(torch.randn(4, 3))
    names = {"torch": torch, "quantized_layers": quantized_layers, "path": tmp_path / "model.pt"}
    exec(save, {**names, "model": model})
    other = nn.Sequential(QuantLinear(3, 2), QuantLinear(2, 1))
    exec(load, {**names, "model": other})
    x = torch.randn(5, 3)
    assert torch.equal(other.eval()(x), model.eval()(x)) and other[0].input_amax > 0


def test_set_quantization_reaches_every_layer():
    model = nn.Sequential(QuantConv2d(1, 1, 1), nn.ReLU(), nn.Sequential(QuantLinear(2, 2)))
    assert list(quantized_layers(model)) == ["0", "2.0"]
    set_quantization(model, quantize=False, update_range=False)
    assert not any(m.quantize or m.update_range for m in quantized_layers(model).values())


def test_the_selector_starts_at_the_papers_probability():
    selector = BitSelector(16)
    widths = selector(torch.rand(7, 8), torch.randn(7, 16, 5, 5))
    assert torch.equal(widths.detach(), torch.full((7,), 16.0))
    # p(16) = sigmoid(1) = 0.731; the gradient flows through 8 p8 + 16 p16
    widths.sum().backward()
    p = 1 / (1 + math.exp(-1))
    assert selector.linear.bias.grad[1].item() == pytest.approx(7 * 8 * p * (1 - p), rel=1e-4)


def test_image_gradients_of_ramps():
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(5.0), indexing="ij")
    image = torch.stack([3 * columns, 2 * rows])[None]
    padded = F.pad(image, (1, 1, 1, 1), mode="replicate")
    x = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]).abs().mean((2, 3)) / 2
    y = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]).abs().mean((2, 3)) / 2
    wanted = torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], 1)
    torch.testing.assert_close(image_gradients(image), wanted)
