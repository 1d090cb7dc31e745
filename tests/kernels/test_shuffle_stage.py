"""shuffle_stage against the layers of the units that training uses, in float64."""

from __future__ import annotations

from copy import deepcopy
from importlib import import_module

import pytest
import torch
from torch import nn

from meddanet.build import build_decision_network
from meddanet.engine.decisions import _OneKernel, frozen
from meddanet.kernels import pack_stage, pack_unit, shuffle_stage, shuffle_stage_reference
from meddanet.kernels.shuffle_pack import padded
from meddanet.layers import quantized_layers, set_quantization
from meddanet.networks.decision import ShuffleUnit

pytestmark = pytest.mark.usefixtures("nan_poisoning")
LAST = torch.channels_last
# channels in and out, stride, units: of both shipped widths, and some that no power of two divides
STAGES = [
    (12, 24, 2, 4), (24, 48, 2, 3), (48, 96, 2, 2), (96, 192, 2, 2), (24, 24, 1, 1),
    (192, 192, 1, 1), (5, 14, 2, 1), (10, 10, 1, 3), (6, 16, 1, 2), (40, 50, 2, 2),
]
FEW = [(12, 24, 2, 1), (24, 24, 1, 2), (12, 24, 2, 3)]


@torch.no_grad()
def in_float(network):
    """The network in float64 and eval, not quantised, with norms that do something."""
    network = network.double().eval()
    set_quantization(network, quantize=False, update_range=False)
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean, -1, 1)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -1, 1)
    return network


def stage_with_norms(cin, cout, stride, units=1):
    """A first unit, and others of stride 1."""
    more = [ShuffleUnit(cout, cout, 1) for _ in range(units - 1)]
    return in_float(nn.Sequential(ShuffleUnit(cin, cout, stride), *more))


@torch.no_grad()
def folded(stage, dtype):
    """The units with their norms folded into their convolutions, and those in a dtype."""
    stage = deepcopy(stage)
    for layers in list(stage.modules())[1:]:
        if isinstance(layers, nn.Sequential) and isinstance(layers[1], nn.BatchNorm2d):
            conv, norm = layers[0], layers[1]
            gain = norm.weight / (norm.running_var + norm.eps).sqrt()
            conv.weight.mul_(gain[:, None, None, None])
            conv.bias = nn.Parameter(norm.bias - norm.running_mean * gain)
            layers[1] = nn.Identity()
    return stage.to(dtype)


def packed_unit(unit):
    """A folded unit's weights."""
    def layer(layers):
        return layers[0].weight, layers[0].bias

    side = () if unit.project is None else [layer(layers) for layers in unit.project]
    return pack_unit(*(layer(layers) for layers in unit.main), side)


def packed(stage):
    """What `shuffle_stage` takes of folded units."""
    return pack_stage([packed_unit(unit) for unit in stage])


def rounding_layers(stage, round_to):
    """The units in float32 with the output of every layer rounded."""
    stage = deepcopy(stage).float()
    for layers in [layers for unit in stage for layers in (*unit.main, *(unit.project or ()))]:
        layers.register_forward_hook(lambda layer, inputs, output: round_to(output).float())
    return stage


def image(stage, dtype, *, samples=2, size=(7, 9)):
    channels = packed(folded(stage, dtype)).in_channels
    return torch.randn(samples, channels, *size).to(dtype).contiguous(memory_format=LAST)


@torch.no_grad()
def check(stage, x, tolerances, narrow):
    """Both functions as exact as the layers in the same dtype."""
    own = folded(stage, x.dtype)
    exact = deepcopy(own).double()(x.double())
    if x.dtype == torch.bfloat16:  # which the interpreter cuts off
        native = rounding_layers(own, lambda v: narrow(v, x.dtype))(x.float()).to(x.dtype)
    else:
        native = own(x)
    for function in (shuffle_stage, shuffle_stage_reference):
        out = function(x, packed(own))
        assert out.is_contiguous(memory_format=LAST) or function is shuffle_stage_reference
        tolerances.reduction(out, native=native, exact=exact)
        if len(stage) == 1 and stage[0].project is None:
            assert torch.equal(out[:, : x.shape[1] // 2], x[:, 0::2]), "these channels pass"


@pytest.mark.parametrize("shape", STAGES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_against_the_layers(shape, dtype, tolerances, narrow):
    stage = stage_with_norms(*shape)
    check(stage, image(stage, dtype), tolerances, narrow)


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (2, 2), (8, 5), (33, 21)], ids=str)
@pytest.mark.parametrize("shape", FEW, ids=str)
def test_small_maps(shape, size, tolerances, narrow):
    """All border, and more pixels than a program takes at a time."""
    stage = stage_with_norms(*shape)
    check(stage, image(stage, torch.float16, size=size), tolerances, narrow)


@torch.no_grad()
@pytest.mark.parametrize("shape", FEW, ids=str)
def test_folding_changes_nothing(shape):
    """In float64, of the norms' running statistics: the units as training has it."""
    stage = stage_with_norms(*shape)
    x = image(stage, torch.float64)
    found = shuffle_stage(x, packed(folded(stage, torch.float64)))
    torch.testing.assert_close(found, stage(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_outside_of_the_image_is_zero_and_not_the_bias(dtype):
    """Worked by hand: expand answers 3 everywhere, depth adds the taps that lie inside."""
    inside = torch.tensor([[4, 6, 6, 4], [6, 9, 9, 6], [4, 6, 6, 4]])
    expand = torch.zeros(12, 12, 1, 1), torch.full((12,), 3.0)
    depth = torch.ones(12, 1, 3, 3), torch.zeros(12)
    mix = torch.eye(12)[:, :, None, None], torch.zeros(12)
    side = [(torch.ones(12, 1, 3, 3), torch.zeros(12)), mix]
    for layers, channels, step in (((), 24, 1), (side, 12, 2)):
        parts = [tuple(t.to(dtype) for t in part) for part in (expand, depth, mix, *layers)]
        unit = pack_stage([pack_unit(*parts[:3], parts[3:])])
        x = torch.ones(5, channels, 3, 4, dtype=dtype)
        out = shuffle_stage(x, unit)
        expected = 3 * inside[::step, ::step].to(dtype)
        assert torch.equal(out[:, 12:], expected.expand(5, 12, *expected.shape))
        if layers:
            assert torch.equal(out[:, :12], (expected / 3).expand(5, 12, *expected.shape))


@torch.no_grad()
@pytest.mark.parametrize("shape", FEW, ids=str)
def test_a_nan_goes_where_the_layers_take_it(shape):
    stage = folded(stage_with_norms(*shape), torch.float32)
    x = image(stage, torch.float32)
    x[1, 3, 4, 5] = float("nan")
    found, expected = shuffle_stage(x, packed(stage)), stage(x)
    assert expected.isnan().any() and torch.equal(found.isnan(), expected.isnan())


@torch.no_grad()
@pytest.mark.parametrize("shape", FEW, ids=str)
def test_an_infinity_stays_one(shape):
    """Channels are padded to a power of two, and an infinity times zero would be NaN."""
    stage = folded(stage_with_norms(*shape), torch.float32)
    for parameter in stage.parameters():
        parameter.abs_().add_(0.1)
    x = image(stage, torch.float32).abs()
    x[1, 3, 4, 5] = float("inf")
    found, expected = shuffle_stage(x, packed(stage)), stage(x)
    assert expected.isinf().any() and not expected.isnan().any()
    assert torch.equal(found.isinf(), expected.isinf()) and not found.isnan().any()


@torch.no_grad()
@pytest.mark.parametrize("shape", FEW, ids=str)
def test_any_layout(shape):
    stage = stage_with_norms(*shape)
    x, own = image(stage, torch.float16), packed(folded(stage, torch.float16))
    expected = shuffle_stage(x, own)
    wider = torch.cat([x, x], 1).contiguous(memory_format=LAST)
    for view in (x.contiguous(), wider[:, : x.shape[1]], x.mT.contiguous().mT):
        assert torch.equal(shuffle_stage(view, own), expected)
    assert shuffle_stage(x[:0], own).shape == expected[:0].shape


@torch.no_grad()
@pytest.mark.parametrize("shape", FEW, ids=str)
@pytest.mark.parametrize("size", [(3, 4), (16, 11)], ids=str)
def test_samples_that_are_not_seen(shape, size, backend):
    """The others are as ever."""
    stage = folded(stage_with_norms(*shape), torch.float16)
    x, own = image(stage, torch.float16, samples=5, size=size), packed(stage)
    seen = torch.tensor([0, 0, 1, 0, 1], dtype=torch.int32)
    # what another unit has left out
    x[seen == 0] = float("nan")
    expected, found = shuffle_stage(x, own), shuffle_stage(x, own, seen)
    assert torch.equal(found[seen > 0], expected[seen > 0])
    assert not found[seen > 0].isnan().any()
    assert found[:2].isnan().all()
    nothing = shuffle_stage(torch.zeros_like(x), own, torch.zeros_like(seen))
    # what memory held before is NaN here
    assert nothing.isnan().all() == (backend == "triton")


@torch.no_grad()
@pytest.mark.parametrize(("branch", "dtype"), [(130, torch.float16), (65, torch.float32)])
def test_wide_units_run_in_the_reference(branch, dtype, monkeypatch):
    # wherever Triton runs; the kernel would raise, as nothing launches it
    module = import_module("meddanet.kernels.shuffle_stage")
    monkeypatch.setattr(module, "triton_runs", lambda input: True)
    monkeypatch.setattr("meddanet.kernels.shuffle_stage_triton.run", None)
    stage = folded(stage_with_norms(branch, 2 * branch, 2), dtype)
    x, own = image(stage, dtype, samples=1), packed(stage)
    assert torch.equal(shuffle_stage(x, own), shuffle_stage_reference(x, own))


@torch.no_grad()
@pytest.mark.parametrize(
    ("quantised", "stages"),
    [("stages.1.main.0.0", [1, 0, 2, 8, 4]), ("stages.4.project.0.0", [4, 0, 7, 4]),
     ("stages.15.main.2.0", [4, 8, 3, 0])],
)
def test_a_unit_with_a_quantised_layer_keeps_its_layers(quantised, stages):
    network = in_float(build_decision_network("shufflenetv2-m", 4, 4))
    layer = quantized_layers(network)[quantised]
    layer.quantize = True
    layer.input_amax.fill_(4.0)
    small = frozen(network, torch.float64)
    parts = [part for part in small.stages if not isinstance(part, ShuffleUnit)]
    assert all(isinstance(part, _OneKernel) for part in (small.stem, *parts))
    units = [1 + len((*part.packed.rest, ())[0]) for part in parts]
    assert units == [n for n in stages if n]
    assert [isinstance(part, ShuffleUnit) for part in small.stages] == [not n for n in stages]
    x = torch.randn(2, 4, 40, 32, dtype=torch.float64)
    torch.testing.assert_close(small(x), network(x), rtol=1e-9, atol=1e-9)


def test_padding_is_zero():
    assert [padded(channels) for channels in (1, 16, 17, 96, 128)] == [16, 16, 32, 128, 128]
    unit = packed_unit(folded(stage_with_norms(12, 26, 2), torch.float16)[0])
    expand, expand_bias = unit.main[:2]
    assert expand.shape == (16, 16) and expand.dtype == torch.float16
    assert expand_bias.dtype == torch.float32
    assert not expand[12:].any() and not expand[:, 13:].any() and not expand_bias[13:].any()
    assert (unit.stride, unit.mid_channels, unit.out_channels) == (2, 13, 26)


def layer(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype), torch.zeros(shape[0], dtype=dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": layer(5, 1, 3, 3)}, r"depth must have weight \[6, 1, 3, 3\] and bias \[6\]"),
        ({"mix": layer(6, 5, 1, 1)}, r"mix must have weight \[6, 6, 1, 1\]"),
        ({"mix": layer(6, 6, 1, 1, dtype=torch.float16)}, "mix must be floating point as expand"),
        ({"side": [layer(4, 1, 3, 3)]}, "side must be nothing or two layers, got 1"),
        ({"side": [layer(4, 1, 3, 3), layer(3, 4, 1, 1)]},
         r"side_mix must have weight \[4, 4, 1, 1\]"),
    ],
)
def test_layers_that_do_not_fit(change, message):
    layers = {"expand": layer(6, 4, 1, 1), "depth": layer(6, 1, 3, 3), "mix": layer(6, 6, 1, 1)}
    with pytest.raises(ValueError, match=message):
        pack_unit(**{**layers, **change})


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(8, 3, 3), r"input must be \[N, 8, H, W\], got \[8, 3, 3\]"),
        (torch.zeros(1, 4, 3, 3), r"input must be \[N, 8, H, W\], got \[1, 4, 3, 3\]"),
        (torch.zeros(1, 8, 3, 3).half(), "input is torch.float16 on cpu, the stage is packed in"),
        (torch.zeros(1, 8, 3, 3, device="meta"), "input is torch.float32 on meta"),
    ],
)
def test_inputs_that_do_not_fit(x, message):
    unit = pack_stage([pack_unit(layer(6, 4, 1, 1), layer(6, 1, 3, 3), layer(4, 6, 1, 1))])
    for function in (shuffle_stage, shuffle_stage_reference):
        with pytest.raises(ValueError, match=message):
            function(x, unit)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([], "a stage has one unit at the least"),
        ([(4, 6, 2), (6, 8, 2)], "unit 2 must have stride 1, 6 channels in and out, .* stride 2"),
        ([(4, 6, 2), (6, 6, 1), (8, 8, 1)], "unit 3 must have .* got stride 1, 8 in, 8 out"),
        ([(4, 6, 2), (6, 8, 1)], "unit 2 must have .* 6 in, 8 out"),
    ],
)
def test_units_that_do_not_follow(shapes, message):
    units = [packed_unit(folded(stage_with_norms(*shape), torch.float32)[0]) for shape in shapes]
    with pytest.raises(ValueError, match=message):
        pack_stage(units)


def test_a_sample_of_too_many_pixels():
    pytest.importorskip("triton")
    from meddanet.kernels.shuffle_stage_triton import run

    x = torch.empty(1, 24, 46341, 46341, dtype=torch.float16, device="meta")
    stage = packed(folded(stage_with_norms(24, 24, 1), torch.float16))
    with pytest.raises(ValueError, match="too many elements for one launch"):
        run(x, x, stage.first, stage.rest, stage.mid_channels)
