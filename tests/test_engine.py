"""The engine answers as the model does, on every executor, and computes no more than it has to."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from copy import deepcopy
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from meddanet.build import (
    build_decision_network,
    build_med_danet,
    build_med_danet_v2,
    build_segmenter,
)
from meddanet.data import normalize
from meddanet.data.phantom import make_phantom
from meddanet.engine import compile_engine
from meddanet.engine.decisions import frozen
from meddanet.engine.packed_unet import PackedUNet
from meddanet.engine.routing import CropEngine, Tile
from meddanet.engine.slices import holds_signal, shrink, single_threaded_workers
from meddanet.engine.unreported import unreported
from meddanet.kernels import affine_paste, forward_way, use_backend
from meddanet.kernels.onednn import is_exact
from meddanet.layers import (
    BitSelector,
    QuantConv2d,
    QuantLinear,
    image_gradients,
    quantized_layers,
    set_quantization,
)
from meddanet.med_danet import MedDANet
from meddanet.med_danet_v2 import MedDANetV2
from meddanet.networks.unet import UNet
from meddanet.routing import channels_last
from meddanet.weights import load_model

pytestmark = pytest.mark.usefixtures("few_units")

needs_openvino = pytest.mark.skipif(not find_spec("openvino"), reason="OpenVINO is not installed")
EXECUTORS = [pytest.param("openvino", marks=needs_openvino), "torch"]


class MeanPolicy(torch.nn.Module):
    """Takes the route that the mean of a slice's first channel names."""

    def __init__(self, channels: int, routes: int) -> None:
        super().__init__()
        self.linear = QuantLinear(channels, routes)
        self.linear.quantize = False
        number = torch.arange(routes, dtype=torch.float32)
        with torch.no_grad():
            self.linear.weight.zero_()[:, 0] = 2 * number
            self.linear.bias.copy_(-(number**2))

    def forward(self, slices):
        return self.linear(slices.mean((2, 3)))


def assume_exact(monkeypatch, unsigned: bool, signed: bool) -> None:
    """Makes OpenVINO's executor take a machine's int8 sums for exact, or not."""
    from meddanet.engine import openvino_graphs, opset

    monkeypatch.setattr(
        openvino_graphs, "exact_sums", lambda core: opset.Exact(unsigned, signed)
    )


def build(segmenter="unet-12", **changes) -> MedDANetV2:
    torch.manual_seed(0)
    options = {"num_classes": 3, "in_channels": 2, "crop_sizes": (16, 24), **changes}
    model = build_med_danet_v2(segmenter, **options)
    for layer in quantized_layers(model).values():
        layer.input_amax.fill_(4.0)
    set_quantization(model, quantize=True, update_range=False)
    model.policy = MeanPolicy(2, len(model.routes))
    for selector in model.bit_selectors:
        torch.nn.init.zeros_(selector.linear.weight)
    return model.eval()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small maps: more threads only wait for each other."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(usual)


@pytest.fixture(scope="module")
def model() -> MedDANetV2:
    return build()


def choose(model: MedDANetV2, widths: tuple[int, ...]) -> None:
    """Makes the selectors choose these widths."""
    for selector, width in zip(model.bit_selectors, widths, strict=True):
        with torch.no_grad():
            selector.linear.bias.copy_((selector.widths == width).float())


def slices_for(decisions: list[int], side: tuple[int, int] = (40, 48)) -> torch.Tensor:
    slices = torch.randn(len(decisions), 2, *side, generator=torch.Generator().manual_seed(1))
    means = slices[:, 0].mean((1, 2)) - torch.tensor(decisions)
    slices[:, 0] -= means[:, None, None]
    return slices


@torch.no_grad()
def exact_labels(model: MedDANetV2, slices: torch.Tensor) -> torch.Tensor:
    """The float64 answer of every slice, routed as its first channel's mean says."""
    double = deepcopy(model).double()
    for selector in double.bit_selectors:
        selector.widths = selector.widths.double()
    labels = torch.zeros(len(slices), *slices.shape[2:], dtype=torch.uint8)
    for index, image in enumerate(slices[:, None]):
        route = int(image[0, 0].mean().round())
        if route == len(model.routes) - 1:
            logits, _ = double.whole_branch(image.double())
        elif route > 0:
            size = model.crop_sizes[route - 1]
            offset = model.offset(model.locate(image), size, *slices.shape[2:]).round()
            logits, _ = double.crop_branch(image.double(), offset.double(), route - 1)
        if route > 0:
            labels[index] = logits[0].argmax(0)
    return labels


def assert_as_exact_as_the_model(labels, model, slices, tolerances) -> None:
    """Against float64: at most twice the share of voxels that the model gets wrong in float32.

    An untrained network is all near-ties: one code decided by a tie goes on to turn others over.
    The model convolves in float32 here throughout; where it convolves codes its sums are exact.
    """
    exact = exact_labels(model, slices).numpy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward_way, "SPEED_UP", {})
        own = float(np.mean(model.segment(slices).labels.numpy() != exact))
    print(f"the model's own float32 differs in {own:.2e}")
    tolerances.labels(labels.numpy(), exact, share=2 * own)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("widths", [(8, 8, 16, 16), (16, 16, 8, 8)])
def test_every_mix_of_decisions(model, executor, widths, tolerances):
    """Both widths in every stage, and in slices of every route."""
    choose(model, widths)
    decisions = [0, 1, 2, 3, 3, 2, 0, 1]
    slices = slices_for(decisions)
    slices[6] = 0
    expected, found = model.segment(slices), compile_engine(model, "cpu", executor).segment(slices)
    assert found.decisions.tolist() == expected.decisions.tolist() == decisions
    assert torch.equal(found.num_bits, expected.num_bits)
    assert set(found.num_bits[1].tolist()) == set(widths) and not found.num_bits[0].any()
    assert torch.equal(found.offsets, expected.offsets)
    assert len(found.labels[3].unique()) > 1, "an answer of one class proves nothing"
    assert_as_exact_as_the_model(found.labels, model, slices, tolerances)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_the_selectors_see_what_the_models_see(executor):
    """Widths follow gradients and spreads: random selectors that split slices of any contrast."""
    model = build()
    slices = slices_for([3, 1, 2] * 4) * torch.linspace(0.2, 3, 12)[:, None, None, None]
    slices -= slices.mean((2, 3), keepdim=True)
    slices[:, 0] += torch.tensor([3, 1, 2] * 4)[:, None, None]
    for selector in model.bit_selectors:
        torch.nn.init.normal_(selector.linear.weight)
        kept: list[torch.Tensor] = []
        hook = selector.linear.register_forward_hook(lambda *call, kept=kept: kept.append(call[2]))
        model.segment(slices)
        hook.remove()
        lead = torch.cat(kept).diff(dim=1).flatten().sort().values[2:10]
        place = int(lead.diff().argmax())
        with torch.no_grad():  # the middle of the widest gap between slices
            selector.linear.bias[0] += lead[place : place + 2].mean()
    expected, found = model.segment(slices), compile_engine(model, "cpu", executor).segment(slices)
    assert all(0 < (expected.num_bits[:, stage] == 8).sum() < 12 for stage in range(4))
    assert torch.equal(found.num_bits, expected.num_bits)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("network", ["shufflenetv2-m", "mobilenetv2", "ghostnet"])
def test_decision_networks_at_half_size(executor, network):
    model = build(decision_network=network, decision_scale=2, crop_sizes=(16,))
    model.policy = build_med_danet_v2("unet-12", 2, 3, (16,), decision_network=network).policy
    for layer in quantized_layers(model.policy).values():
        layer.input_amax.fill_(4.0)
    set_quantization(model, quantize=True, update_range=False)
    model.eval()
    engine = compile_engine(model, "cpu", executor)
    assert engine.executor == executor
    slices = slices_for([1, 2, 0])
    view = F.avg_pool2d(slices, 2)
    with torch.no_grad():
        logits, place = model.policy(view), model.position(view)
    batch = torch.cat([view, torch.zeros(5, *view.shape[1:])]).numpy()
    for network, found, expected in (
        (model.policy, engine._networks.decide(batch)[:3], logits.numpy()),
        (model.position, engine._networks.locate(batch)[:3], place.numpy()),
    ):
        # one step of the classifier's input, where a code before it was decided by a tie
        step = 4.0 / 127 * network.classifier.weight.abs().max().item()
        assert np.abs(found - expected).max() <= step


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("quantize", [False, True])
def test_crops_where_a_heat_map_says(executor, quantize):
    """Crops of two sizes about one centre, the place from a map; some are stopped by the border."""
    model = build(position_network="heatmap", quantize_decisions=quantize)
    slices = slices_for([1, 2] * 10)
    with torch.no_grad():  # an untrained map is flat
        model.position.train()
        for _ in range(40):
            model.position.heat(slices)
        model.position.eval().map.weight.mul_(4 / model.position.heat(slices).std())
        model.position.centre.gain.fill_(3.0)
    expected, found = model.segment(slices), compile_engine(model, "cpu", executor).segment(slices)
    assert len(expected.offsets.unique(dim=0)) > 5
    moved = (found.offsets - expected.offsets).abs()
    assert torch.equal(found.offsets, found.offsets.round()) and moved.max() <= 1
    assert (moved > 0).float().mean() < (0.2 if quantize else 0.05)


def test_shrinking_is_the_mean(tolerances):
    image = torch.randn(3, 16, 24)
    for scale in (1, 2, 4):
        expected = F.avg_pool2d(image[None].double(), scale)[0].float()
        tolerances.elementwise(torch.from_numpy(shrink(image.numpy(), scale)), expected)


def test_a_single_voxel_is_signal():
    image = np.zeros((4, 16, 24), np.float32)
    assert not holds_signal(image)
    for index in [(0, 0, 0), (3, 15, 23), (1, 8, 5), (2, 7, 0)]:
        one = image.copy()
        one[index] = -1e-30
        assert holds_signal(one)


@pytest.mark.parametrize("classes", [2, 4, 7])
def test_the_first_of_equal_logits_is_the_label(classes):
    """Also where the classes are many, and where all are equal: as `torch.argmax`."""
    with unreported():
        ov = pytest.importorskip("openvino", reason="the executor is an extra")
    from openvino import opset13 as ops

    from meddanet.engine.openvino_graphs import to_labels

    logits = torch.randint(-1, 2, (1, classes, 16, 24), generator=torch.manual_seed(0)).float()
    logits[..., 0] = 3.0
    input = ops.parameter([1, classes, 16, 24], np.float32)
    graph = ov.Model([to_labels(input)], [input])
    (found,) = ov.Core().compile_model(graph, "CPU")([logits.numpy()]).values()
    assert found.dtype == np.uint8
    # torch's argmax of ties is not promised; numpy's is the first
    np.testing.assert_array_equal(found, logits.numpy().argmax(1))


# the background ------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("segmenter", ["unet-12", "transbts-light"])
@pytest.mark.parametrize("side", [(40, 48), (24, 32), (24, 24), (16, 16)], ids=str)
def test_the_tile_answers_as_the_whole_canvas(executor, segmenter, side, tolerances):
    """Patches in every corner, on every border, inside; where the tile fills an axis, and both."""
    torch.manual_seed(3)
    model = build(crop_sizes=(16,))
    if segmenter != "unet-12":
        model.crop_last_stages[0] = build_med_danet_v2(
            segmenter, 2, 3, (16,)
        ).crop_last_stages[0]
        channels = model.crop_last_stages[0].end.in_channels
        model.segmenter.stage_channels = (channels, *model.segmenter.stage_channels[1:])
        for layer in quantized_layers(model.crop_last_stages).values():
            layer.input_amax.fill_(4.0)
        set_quantization(model, quantize=True, update_range=False)
    for norm in model.crop_last_stages.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):  # a background that is not one class
            torch.nn.init.normal_(norm.bias)
            torch.nn.init.normal_(norm.weight)
    model.eval()
    channels = model.segmenter.stage_channels[0]
    networks = _last_stage_only(model, executor)
    engine = CropEngine(model, networks, executor, threads=1, callers=1)
    lasts = [length - 16 for length in side]
    ends = [{0, 1, 3, 4, 5, last - 5, last - 1, last} & {*range(last + 1)} for last in lasts]
    for y, x in itertools.product(*map(sorted, ends)):
        patch = torch.randn(1, channels, 16, 16)
        canvas = affine_paste(patch, torch.tensor([[float(y), float(x)]]), side)
        with torch.no_grad():
            expected = model.crop_last_stages[0](canvas).argmax(1)[0].numpy()
        labels = np.full(side, 9, np.uint8)
        features = patch[0].permute(1, 2, 0).numpy()
        engine._paste(labels, features, (y, x), 0)
        tolerances.labels(labels, expected)


def _last_stage_only(model: MedDANetV2, executor: str):
    if executor == "torch":
        from meddanet.engine.torch_networks import TorchNetworks

        return TorchNetworks(deepcopy(model))
    from meddanet.engine.openvino_networks import OpenVINONetworks

    class Unchecked(OpenVINONetworks):
        def _check(self):
            """The other parts of the model do not belong to this last stage."""

    return Unchecked(model, 1)


def test_the_tile_is_no_larger_than_two_halos():
    assert Tile.around(100, 96, 240, 2) == (96, 200, 98, 198)
    assert Tile.around(0, 96, 240, 2) == (0, 104, 0, 102)
    assert Tile.around(144, 96, 240, 2) == (136, 240, 138, 240)
    assert Tile.around(3, 96, 100, 2) == (0, 100, 0, 100)


# what is computed ----------------------------------------------------------------------------


class Counting:
    """Counts the calls of each network."""

    def __init__(self, networks) -> None:
        self.networks, self.calls = networks, Counter()

    def __getattr__(self, name):
        def call(*arguments):
            self.calls[name] += 1
            return getattr(self.networks, name)(*arguments)

        return call


def test_work_follows_the_decisions(model):
    engine = compile_engine(model, "cpu", "torch")
    engine._networks = counting = Counting(engine._networks)
    slices = slices_for([0, 1, 3, 0, 1])
    slices[3] = 0
    engine.segment(slices)
    # `last` once more: the labels of the empty canvas, which are kept
    assert counting.calls == {
        "prepare": 1, "decide": 1, "locate": 1, "at_once": 1, "begin": 3, "stage": 12, "decode": 2,
        "finish": 1, "last": 3,
    }
    counting.calls.clear()
    engine.segment(slices_for([0] * 9))
    assert counting.calls == {"decide": 2}
    engine.segment(slices_for([1]))
    assert counting.calls["last"] == 1
    counting.calls.clear()
    assert not engine.segment(torch.zeros(4, 2, 40, 48)).labels.any() and not counting.calls


def change_everything(model: torch.nn.Module) -> None:
    """Gives a model other weights, ranges and choices of widths, and the mode of training."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.mul_(-2).add_(1)
    model.train()


@pytest.mark.parametrize("executor", [*EXECUTORS, "eager"])
def test_changes_of_the_model_do_not_reach_the_engine(executor):
    """Neither what was made already, at the size seen before, nor what another size makes."""
    model = build()
    untouched = compile_engine(deepcopy(model), "cpu", executor)
    engine = compile_engine(model.train(), "cpu", executor)
    assert model.training, "the model keeps its mode"
    before = slices_for([1, 2, 3])
    engine.segment(before)
    change_everything(model)
    for slices in (before, slices_for([1, 2, 3], (48, 40))):
        pairs = zip(engine.segment(slices), untouched.segment(slices), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)


def test_workers_use_one_core_each_from_their_first_operation_on():
    """More would start teams in every worker, which slow all of PyTorch in the process."""
    usual = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        pool = single_threaded_workers(2)
        assert [pool.submit(torch.get_num_threads).result() for _ in range(4)] == [1] * 4
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(usual)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_neighbours_and_threads_change_nothing(model, executor):
    slices = slices_for([1, 3, 2, 0, 1, 3])
    single = compile_engine(model, "cpu", executor)
    assert single.threads == 1
    try:
        torch.set_num_threads(2)
        together = compile_engine(model, "cpu", executor)
        assert together.threads == 2 == torch.get_num_threads()
    finally:
        torch.set_num_threads(1)
    result = together.segment(slices)
    for index in range(len(slices)):
        alone = single.segment(slices[index : index + 1])
        for one, many in zip(alone, result, strict=True):
            assert torch.equal(one[0], many[index])


@needs_openvino
@pytest.mark.parametrize(("widths", "segmenter"), [
    ((8, 8, 8, 8), "unet-12"), (None, "unet-12"), ((8, 8, 8, 8), "transbts-light"),
    pytest.param((4, 8, 4, 4), "unet-12", marks=pytest.mark.long),
    pytest.param((16, 8, 8, 8), "unet-12", marks=pytest.mark.long),
])
def test_the_uninterrupted_way_answers_to_the_bit(widths, segmenter, monkeypatch):
    """Usual widths run in one graph; all others, and none in float, stage by stage."""
    from meddanet.engine.openvino_graphs import exact_sums, ov

    if segmenter != "unet-12" and not exact_sums(ov.Core()).signed:
        pytest.skip("where sums saturate, those of matrix products differ from graph to graph")
    # a convolution saturates alike in both
    assume_exact(monkeypatch, unsigned=True, signed=True)
    model = build(segmenter, num_bits=(4, 8, 16))
    slices = slices_for([1, 3, 2, 3, 1, 2] * 3)
    if widths is None:  # the first stage's differ from slice to slice
        selector = model.bit_selectors[0].linear
        with torch.no_grad():
            selector.weight[0, 0] = 40.0
            selector.bias.copy_(torch.tensor([-40 * 0.375, 0.0, -99.0]))
    else:
        choose(model, widths)
    engine = compile_engine(model, "cpu", "openvino")
    asked, one_by_one = Counter(), Counter()
    at_once, begin = engine._networks.at_once, engine._networks.begin
    monkeypatch.setattr(
        engine._networks, "at_once",
        lambda widths, *rest: asked.update([widths]) or at_once(widths, *rest),
    )
    monkeypatch.setattr(
        engine._networks, "begin", lambda image: one_by_one.update([0]) or begin(image)
    )
    fast = [engine.segment(slices) for _ in range(2)][1]
    found = Counter(map(tuple, fast.num_bits.tolist()))
    if widths is None:
        assert len(found) == 2 and min(found.values()) > 3
    else:
        assert set(found) == {widths}
        assert asked[widths] + one_by_one[0] == 36
        # the narrowest count as one slice: after nine others nine tenths are sure, when the
        # second of two callers may have begun another
        assert one_by_one[0] in ((36,) if max(widths) > 8 else (9, 10))
    engine._networks.at_once = lambda *arguments: None
    for one, other in zip(fast, engine.segment(slices), strict=True):
        assert torch.equal(one, other)


# transformers and banks ------------------------------------------------------------------------


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_transformer(executor, tolerances):
    """Its learnt positions, of another size than the slices' map, are resized as the model does."""
    model = build("transbts-light", crop_sizes=(16,))
    torch.nn.init.normal_(model.segmenter.transformer.position_embedding)
    slices = slices_for([1, 2], (32, 40))
    found = compile_engine(model, "cpu", executor).segment(slices)
    assert_as_exact_as_the_model(found.labels, model, slices, tolerances)


def build_bank(quantize: bool) -> MedDANet:
    torch.manual_seed(0)
    model = build_med_danet(("unet-4", "unet-12", "transbts-light"), 2, 3)
    model.decision = MeanPolicy(2, 4)
    for layer in quantized_layers(model).values():
        layer.input_amax.fill_(4.0)
    set_quantization(model, quantize=quantize, update_range=False)
    return model.eval()


@torch.no_grad()
def exact_member(model: MedDANet, member: int, slices: torch.Tensor) -> torch.Tensor:
    return deepcopy(model.bank[member]).double()(slices.double()).argmax(1)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_bank(executor, tolerances):
    """Every member gets the slices that are its own, whole; a blank slice gets none."""
    model, decisions = build_bank(quantize=False), [0, 3, 1, 2, 2, 3, 0]
    slices = slices_for([*decisions[:-1], 2])
    slices[-1] = 0
    found, own = compile_engine(model, "cpu", executor).segment(slices), model.segment(slices)
    assert found.decisions.tolist() == own.decisions.tolist() == decisions
    assert torch.equal(found.offsets, own.offsets) and torch.equal(found.num_bits, own.num_bits)
    for index, route in enumerate(decisions):
        exact = exact_member(model, route - 1, slices[[index]])[0] if route else own.labels[index]
        assert route == 0 or len(exact.unique()) > 1
        tolerances.labels(found.labels[index].numpy(), exact.numpy(), share=1e-3)


@pytest.mark.usefixtures("all_units")
@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_trained_member_on_the_grid(executor, tolerances):
    """Beside one in float; a trained network has few ties for codes to turn over at."""
    member = load_model().segmenter
    bank, decision = torch.nn.ModuleList([build_segmenter("unet-4"), member]), MeanPolicy(4, 3)
    with torch.no_grad():
        decision.linear.weight.zero_()
        decision.linear.bias[2] = 1
    model = MedDANet(bank=bank, decision=decision, in_channels=4, num_classes=4).eval()
    slices = normalize(make_phantom(0, (160, 160, 100)).data)[..., 50:52].transpose(3, 0, 1, 2)
    slices = torch.from_numpy(slices.copy())
    found = compile_engine(model, "cpu", executor).segment(slices)
    assert found.decisions.tolist() == [2, 2] and len(found.labels.unique()) > 1
    tolerances.labels(found.labels.numpy(), exact_member(model, 1, slices).numpy(), share=1e-3)


def multiplied(compiled) -> Counter[str]:
    """Returns how often a compiled graph multiplies numbers of which precision."""
    operations = compiled.get_runtime_model().get_ops()
    facts = [operation.get_rt_info() for operation in operations]
    return Counter(
        fact["runtimePrecision"].astype(str) for fact in facts
        if fact["layerType"].astype(str) in ("Convolution", "Deconvolution", "FullyConnected")
    )


@needs_openvino
def test_the_members_of_a_bank_multiply_bytes(monkeypatch):
    assume_exact(monkeypatch, unsigned=True, signed=True)
    from meddanet.engine.openvino_bank import OpenVINOBank

    bank = OpenVINOBank(build_bank(True), 1)
    for member in range(3):
        found = multiplied(bank.compiled(("member", member), (1, 2, 40, 48)))
        assert set(found) <= {"u8", "i8"} and found.total() > 25, found


@needs_openvino
def test_a_bank_keeps_graphs_of_three_sizes():
    engine = compile_engine(build_bank(quantize=False), "cpu", "openvino")
    engine._callers = engine._pool  # every caller keeps its own
    for height in range(16, 48, 8):
        engine.segment(slices_for([1, 2, 3], (height, 24)))
    assert len(engine._networks._graphs) == 3 * 4


def test_a_member_says_what_it_cannot_take():
    model = build_bank(quantize=False)
    model.stride = 4
    for executor in ("openvino", "torch"):
        engine = compile_engine(model, "cpu", executor)
        with pytest.raises(ValueError, match="must be multiples of 8, got 36x44; pad to 40x48"):
            engine.segment(slices_for([1], (36, 44)))


class OwnMember(torch.nn.Module):
    def forward(self, slices):
        return slices[:, :1].expand(-1, 3, -1, -1)


class OwnBank(MedDANet):
    def decide(self, slices):
        return -super().decide(slices)


def test_what_a_bank_may_be_of():
    """What other executors would run only in part, or from several threads, runs in eager."""
    decision = MeanPolicy(2, 2)
    parts = {"decision": decision, "in_channels": 2, "num_classes": 3}
    other = MedDANet(bank=torch.nn.ModuleList([OwnMember()]), **parts).eval()
    own = OwnBank(bank=build_bank(quantize=False).bank[:1], **parts).eval()
    slices = slices_for([0, 1])
    for model, reason in (
        (other, "runs banks of UNet and TransBTS only, not of OwnMember"),
        (own, "runs MedDANet and MedDANetV2 only"),
    ):
        engine = compile_engine(model, "cpu")
        assert engine.executor == "eager" and engine.passed_over == f"any other executor {reason}"
        assert torch.equal(engine.segment(slices).labels, model.segment(slices).labels)
        with pytest.raises(ValueError, match=f"executor torch {reason}; use auto or eager"):
            compile_engine(model, "cpu", "torch")


# integers --------------------------------------------------------------------------------------


@needs_openvino
def test_openvino_runs_the_widths_for_real(model, monkeypatch):
    """Convolutions up to 8 bit multiply bytes, beyond 8 bit floats; weights are codes."""
    assume_exact(monkeypatch, unsigned=True, signed=True)
    from meddanet.engine.openvino_networks import OpenVINONetworks

    compiled = OpenVINONetworks(model, 1).compiled
    assert set(multiplied(compiled(("stage", 0, 8), (1, 40, 48, 12)))) <= {"u8", "i8"}
    assert multiplied(compiled(("stage", 0, 16), (1, 40, 48, 12))).keys() == {"f32"}
    assert set(multiplied(compiled(("last", 0), (1, 24, 24, 12)))) <= {"u8", "i8"}
    assert set(multiplied(compiled(("locate",), (1, 2, 40, 48)))) <= {"u8", "i8"}
    maps = (1, 5, 6, 96), (1, 40, 48, 12), (1, 20, 24, 24), (1, 10, 12, 48)
    assert set(multiplied(compiled(("decode",), *maps))) <= {"u8", "i8"}
    whole_way = multiplied(compiled(("at once", (8,) * 4, True), (1, 2, 40, 48)))
    assert whole_way["f32"] == 2, "the image's gradients: their convolution, the order of means"
    assert set(whole_way) <= {"u8", "i8", "f32"} and whole_way["u8"] > 10


@needs_openvino
def test_bytes_are_multiplied_only_where_their_sums_are_exact(model, monkeypatch):
    """Before VNNI: what follows a ReLU; where not even that, nothing."""
    from meddanet.engine.openvino_networks import OpenVINONetworks

    parts = ("stage", 0, 8), ("last", 0), ("locate",)
    shapes = (1, 40, 48, 12), (1, 24, 24, 12), (1, 2, 40, 48)
    found = {}
    for unsigned in (True, False):
        assume_exact(monkeypatch, unsigned, signed=False)
        compiled = OpenVINONetworks(model, 1).compiled
        found[unsigned] = [multiplied(compiled(*one)) for one in zip(parts, shapes, strict=True)]
    stage, last, locate = found[True]
    assert stage == {"u8": 2, "f32": 1}, "the way down reads the residual stream"
    assert last == {"u8": 2, "f32": 1}, "and so does the last layer"
    assert locate.keys() == {"u8", "f32"}
    assert all(one.keys() == {"f32"} for one in found[False])


@needs_openvino
@pytest.mark.parametrize(("segmenter", "unsigned"), [
    ("unet-12", True), ("unet-12", False), ("transbts-light", True),
    pytest.param("transbts-light", False, marks=pytest.mark.long),
])
def test_a_machine_without_exact_sums_of_bytes(segmenter, unsigned, tolerances, monkeypatch):
    from meddanet.engine.openvino_graphs import exact_sums, ov

    if unsigned and not exact_sums(ov.Core()).unsigned:
        pytest.skip("this machine's sums of unsigned bytes are not exact")
    assume_exact(monkeypatch, unsigned, signed=False)
    model = build(segmenter)
    choose(model, (8, 8, 16, 8))
    slices = slices_for([0, 1, 2, 3, 3, 1])
    found = compile_engine(model, "cpu", "openvino").segment(slices)
    assert found.num_bits[1].tolist() == [8, 8, 16, 8]
    assert_as_exact_as_the_model(found.labels, model, slices, tolerances)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("num_bits", [4, 8, 16])
def test_a_stage_is_exact(executor, num_bits):
    """Against float64 on the same grid; the share of codes that a tie decides is printed."""
    model = build()
    networks = compile_engine(model, "cpu", executor)._networks
    stage = model.segmenter.encoder[0]
    input = channels_last(torch.randn(1, 12, 40, 48))
    if executor == "openvino":
        skip, feature, spread = networks.stage(0, num_bits, input[0].permute(1, 2, 0).numpy())
        skip, feature = (part[0].transpose(2, 0, 1) for part in (skip, feature))
    else:
        skip, feature, spread = networks.stage(0, num_bits, input)
        skip, feature = (part[0].numpy() for part in (skip, feature))
    exact = [part.detach()[0].numpy() for part in stage.double()(input.double(), num_bits)]
    for name, found, expected in zip(("skip", "feature"), (skip, feature), exact, strict=True):
        differing = np.abs(found - expected) > 1e-4 * np.abs(expected).max()
        print(f"{name}: values moved by a tie {differing.mean():.2e}")
        assert differing.mean() <= 1e-3
    deviation = exact[1].reshape(24, -1).std(1)
    np.testing.assert_allclose(spread, deviation, rtol=1e-3)


@needs_openvino
@pytest.mark.parametrize("shape", [(2, 40, 48), (2, 24, 104)])
def test_gradients_are_those_of_the_layers(model, shape):
    """Which the graph computes half by half; the halves differ in scale, as channels do."""
    image = torch.randn(shape) * torch.linspace(1, 9, shape[1])[:, None]
    image *= torch.tensor([1.0, 0.01])[:, None, None]
    found = compile_engine(model, "cpu", "openvino")._networks.begin(image.numpy())[2]
    expected = image_gradients(image[None].double())[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@needs_openvino
def test_graphs_that_will_be_asked_for_are_compiled_meanwhile(model, monkeypatch):
    """Each once, whoever comes first; one that cannot be compiled is told when it is asked for."""
    from meddanet.engine.openvino_graphs import Graphs

    compile_graph, made = Graphs._compile, []

    def noted(graphs, key):
        made.append((key, threading.current_thread().name))
        return compile_graph(graphs, key)

    monkeypatch.setattr(Graphs, "_compile", noted)
    alone = compile_engine(model, "cpu", "openvino")
    alone._networks._threads = 1
    expected = alone.segment(slices_for([1, 1, 2, 3])).labels
    assert not any(name.startswith("meddanet-compile") for _, name in made)
    for _ in range(2):
        made.clear()
        engine = compile_engine(model, "cpu", "openvino")
        engine._networks._threads = 3  # of which two compile
        found = engine.segment(slices_for([1, 1, 2, 3])).labels
        assert torch.equal(found, expected)
        assert len({key for key, _ in made}) == len(made)
    parts = {key[0][0] for key, name in made if name.startswith("meddanet-compile")}
    assert {"at once", "last"} & parts

    def broken(graphs, key):
        raise RuntimeError(f"no {key[0][0]}")

    engine = compile_engine(model, "cpu", "openvino")
    monkeypatch.setattr(Graphs, "_compile", broken)
    with pytest.raises(RuntimeError, match="no decide"):
        engine.segment(slices_for([1, 1]))


@needs_openvino
def test_graphs_of_few_image_sizes_are_kept(model, monkeypatch, tolerances):
    """A cohort in which every volume has another size: old ones go, one that returns is right."""
    from meddanet.engine import openvino_networks

    monkeypatch.setattr(openvino_networks, "KEPT", 9)
    engine = compile_engine(model, "cpu", "openvino")
    engine._callers = engine._pool  # every caller keeps its own
    small, large = slices_for([3, 0], (40, 48)), slices_for([3], (48, 48))
    expected = engine.segment(small).labels
    engine.segment(large)
    graphs = list(engine._networks._graphs)
    begun = [shape[2:] for (part, *_), (shape, *_) in graphs if part == "begin"]
    assert len(graphs) == 9 and begun == [(48, 48)]
    tolerances.labels(engine.segment(small).labels.numpy(), expected.numpy())


exact_only = pytest.mark.skipif(not is_exact(), reason="oneDNN's int8 sums are not exact here")


@exact_only
@pytest.mark.parametrize(
    ("backend", "expected"), [("auto", True), ("onednn", True), ("reference", False)]
)
def test_pytorch_takes_onednn_where_the_backend_says(backend, expected, monkeypatch, tolerances):
    from meddanet.engine import onednn

    calls, convolve = [], onednn.convolve
    monkeypatch.setattr(onednn, "convolve", lambda *given: calls.append(0) or convolve(*given))
    model = build()
    choose(model, (8, 8, 8, 8))
    with use_backend(backend):
        engine = compile_engine(model, "cpu", "torch")
    slices = slices_for([1, 2, 3])
    assert_as_exact_as_the_model(engine.segment(slices).labels, model, slices, tolerances)
    assert bool(calls) == expected


@exact_only
def test_weights_packed_for_few_image_sizes_are_kept(model, monkeypatch):
    """As with OpenVINO's graphs: old sizes go, one that returns is right."""
    from meddanet.engine import torch_networks

    monkeypatch.setattr(torch_networks, "KEPT", 2)
    choose(model, (8, 8, 8, 8))
    engine = compile_engine(model, "cpu", "torch")
    small = slices_for([3, 1], (40, 48))
    expected = engine.segment(small).labels
    for height in (48, 56, 64):
        engine.segment(slices_for([3], (height, 48)))
    layers = engine._networks._model.modules()
    kept = [layer.packed.cache_info().currsize for layer in layers if hasattr(layer, "packed")]
    assert max(kept) == 2
    assert torch.equal(engine.segment(small).labels, expected)


@needs_openvino
def test_no_socket_is_opened(tmp_path):
    """From the import of OpenVINO to labels: Python's audit hook sees every socket and process."""
    program = """
import sys
calls = []
def hook(name, _):
    if name.startswith(("socket.", "subprocess.", "os.fork", "os.posix_spawn", "os.exec", "pty.")):
        calls.append(name)
import torch  # a CUDA build asks ldconfig for its libraries
sys.addaudithook(hook)
from meddanet.build import build_med_danet_v2
from meddanet.engine import compile_engine
from meddanet.layers import set_quantization
model = build_med_danet_v2("unet-4", 2, 3, (16,))
set_quantization(model, quantize=False, update_range=False)
engine = compile_engine(model, "cpu", "openvino")
engine.segment(torch.ones(2, 2, 32, 32))
assert engine.executor == "openvino"
print("calls", calls)
import socket
socket.socket().close()
assert calls, "the hook does not work"
"""
    environment = os.environ | {"HOME": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0 and run.stdout == "calls []\n", run.stdout + run.stderr
    # where OpenVINO keeps the number of a user
    assert not (tmp_path / "intel").exists()


# choosing --------------------------------------------------------------------------------------


def test_a_layer_without_a_range_is_named():
    model = build()
    model.segmenter.up2.fuse.input_amax.zero_()
    for executor in ("auto", "torch"):
        with pytest.raises(ValueError, match="layer segmenter.up2.fuse has no input range"):
            compile_engine(model, "cpu", executor)


@needs_openvino
def test_what_openvino_cannot_run_goes_to_pytorch(tolerances):
    model = build(crop_sizes=(16,))
    model.segmenter.dec2.relu = torch.nn.Softplus()
    with pytest.raises(ValueError, match="Softplus has no translation"):
        compile_engine(model, "cpu", "openvino")
    engine = compile_engine(model, "cpu")
    assert engine.executor == "torch" and "Softplus has no translation" in engine.passed_over
    slices = slices_for([1, 2], (32, 32))
    assert_as_exact_as_the_model(engine.segment(slices).labels, model, slices, tolerances)


@pytest.fixture
def damaged(tmp_path, monkeypatch) -> None:
    """Puts an OpenVINO in place that lacks its library."""
    (tmp_path / "openvino.py").write_text("raise ImportError('libopenvino.so: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "openvino", raising=False)


def test_a_damaged_openvino_is_passed_over(model, damaged):
    engine = compile_engine(model, "cpu")
    assert engine.executor == "torch"
    with pytest.raises(ValueError, match=r"damaged \(libopenvino.so: .*reinstall") as told:
        compile_engine(model, "cpu", "openvino")
    assert engine.passed_over == str(told.value)


def test_without_openvino(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert compile_engine(model, "cpu").executor == "torch"
    with pytest.raises(ValueError, match=r'not installed; pip install "meddanet\[cpu\]"'):
        compile_engine(model, "cpu", "openvino")


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_model_in_full_precision(executor, tolerances):
    model = build()
    set_quantization(model, quantize=False, update_range=False)
    slices = slices_for([1, 3])
    found = compile_engine(model, "cpu", executor).segment(slices)
    expected = exact_labels(model, slices)
    tolerances.labels(found.labels.numpy(), expected.numpy(), share=1e-3)


@pytest.mark.parametrize(
    ("device", "executor", "message"),
    [("cpu", "tensorrt", "'tensorrt', expected one of auto, openvino, torch, triton, eager"),
     ("cpu", "triton", "runs on CUDA GPUs, and on the CPU under TRITON_INTERPRET=1 alone"),
     ("gpu", "auto", "device is 'gpu', expected auto, cpu, cuda or cuda:N"),
     ("cuda:77", "auto", "this machine has .* CUDA GPUs; use cpu")],
)
def test_arguments_that_cannot_be(model, device, executor, message):
    with pytest.raises(ValueError, match=message):
        compile_engine(model, device, executor)


class SmallestSegmenter(torch.nn.Module):
    """What `MedDANetV2` asks of a segmenter, and nothing else."""

    stride, in_channels, num_classes = 1, 2, 3

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last_stage = QuantConv2d(2, 4, 3, padding=1), QuantConv2d(4, 3, 1)

    def features(self, input, choose_bits=None):
        bits = None if choose_bits is None else choose_bits(0, input)
        return self.conv(input, bits, bits)


def test_a_segmenter_of_ones_own():
    """It has no parts to run one by one: its own layers run, and others say what is missing."""
    model = MedDANetV2(
        segmenter=SmallestSegmenter(), policy=MeanPolicy(2, 3), position=MeanPolicy(2, 2),
        bit_selectors=torch.nn.ModuleList([BitSelector(2, 2)]),
        crop_last_stages=torch.nn.ModuleList([QuantConv2d(4, 3, 1)]), crop_sizes=(16,),
    ).eval()
    engine = compile_engine(model, "cpu")
    assert engine.executor == "eager" and engine.passed_over.startswith("any other executor needs")
    slices = slices_for([0, 1, 2])
    pairs = zip(engine.segment(slices), model.segment(slices), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    missing = "needs a segmenter with init, dropout, encoder, decode, stage_channels; use auto"
    for executor in ("openvino", "torch", "triton"):
        with pytest.raises(ValueError, match=f"executor {executor} {missing}"):
            compile_engine(model, "cpu", executor)
    with pytest.raises(ValueError, match=r"executor triton runs unet-\* segmenters only"):
        PackedUNet(model, torch.device("cpu"))


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("routes", [3, 5])
def test_a_policy_of_other_routes(executor, routes):
    model = build()
    model.policy = MeanPolicy(2, routes)
    with pytest.raises(ValueError, match=rf"must return shape \[2, 4\], got \[2, {routes}\]"):
        compile_engine(model, "cpu", executor).segment(slices_for([1, 2]))


class OfTwo(torch.nn.Module):
    """Answers with so many numbers of ones, for each slice."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, slices):
        return slices.mean() * 0 + torch.ones(slices.shape[0], *self.shape)


@pytest.mark.parametrize("executor", ["torch", "eager"])
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 1, 1)])
def test_a_position_of_other_numbers(executor, shape):
    """One number would be broadcast to both axes."""
    model = build()
    model.position = OfTwo(*shape)
    with pytest.raises(ValueError, match=r"^position must return shape \[[12], 2\], got \[[12], "):
        compile_engine(model, "cpu", executor).segment(slices_for([1, 2]))


class HalfAsLarge(UNet):
    """A U-Net whose features have half the size."""

    def decode(self, *given):
        return super().decode(*given)[:, :, ::2, ::2]


@pytest.mark.parametrize("executor", ["torch", "eager"])
@pytest.mark.parametrize("route", [1, 3])
def test_features_of_another_size(executor, route):
    model = build()
    model.segmenter.__class__ = HalfAsLarge
    with pytest.raises(ValueError, match="^segmenter.* must (keep the size|return shape)"):
        compile_engine(model, "cpu", executor).segment(slices_for([route]))


class Negated(UNet):
    """A U-Net with something after its parts."""

    def features(self, input, choose_bits=None):
        return -super().features(input, choose_bits)


class NegatedSkips(UNet):
    """A U-Net with something between its parts."""

    def encode(self, input, choose_bits=None):
        x, skips = super().encode(input, choose_bits)
        return x, [-skip for skip in skips]


@pytest.mark.parametrize(("made", "own"), [(Negated, "features"), (NegatedSkips, "encode")])
@pytest.mark.parametrize("on_the_instance", [False, True])
def test_a_u_net_whose_parts_are_not_all_of_it(made, own, on_the_instance):
    """Executors that run the parts would leave out what it does between or after them."""
    model = build()
    parts_alone = model.segment(slices_for([1, 2, 3])).labels
    if on_the_instance:
        other = deepcopy(model.segmenter)
        other.__class__ = made
        setattr(model.segmenter, own, getattr(other, own))
    else:
        model.segmenter.__class__ = made
    engine = compile_engine(model, "cpu")
    labels = engine.segment(slices_for([1, 2, 3])).labels
    assert torch.equal(labels, model.segment(slices_for([1, 2, 3])).labels)
    assert not torch.equal(labels, parts_alone)
    refused = f"runs the parts of UNet, not a segmenter's own {own}"
    assert (engine.executor, engine.passed_over) == ("eager", f"any other executor {refused}")
    for executor in ("openvino", "torch", "triton"):
        with pytest.raises(ValueError, match=f"executor {executor} {refused}; use auto or eager"):
            compile_engine(model, "cpu", executor)


def test_a_plan_runs_v2_alone():
    bank = build_med_danet(("unet-8",), 2, 3)
    with pytest.raises(ValueError, match="executor triton runs MedDANetV2 only; use auto or eager"):
        compile_engine(bank, "cpu", "triton")


class SomeGpu:
    """What `compile_engine` asks of a GPU."""

    type, index = "cuda", 0


@pytest.mark.parametrize(
    ("capability", "backend", "fault", "found"),
    [((9, 0), "auto", "", "triton"), ((8, 0), "triton", "", "triton"),
     ((7, 5), "auto", "", "eager"), ((9, 0), "reference", "", "eager"),
     ((9, 0), "auto", "no C compiler", "eager")],
)
def test_who_runs_on_a_gpu(model, monkeypatch, capability, backend, fault, found):
    """The plan where the GPU and the chosen backend allow it, else the model's own layers."""
    pytest.importorskip("triton")
    monkeypatch.setattr("meddanet.engine.resolve_device", lambda name: SomeGpu())
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    monkeypatch.setattr("meddanet.engine.triton_fault", lambda device: fault)
    monkeypatch.setattr(MedDANetV2, "to", lambda self, device: self)
    from meddanet.engine import triton_engine

    monkeypatch.setattr(triton_engine, "PlannedModel", lambda model, device: None)
    with use_backend(backend):
        engine = compile_engine(model, "cuda")
        assert engine.executor == found
        if found == "eager":
            with pytest.raises(ValueError, match="capability 8.0|backend ref|no C com") as told:
                compile_engine(model, "cuda", "triton")
            assert engine.passed_over == str(told.value)
        else:
            assert engine.passed_over == ""


def test_a_kernel_that_a_gpu_does_not_take_is_one_line(model, monkeypatch):
    """As where a model of one's own needs more shared memory than an SM has."""
    errors = pytest.importorskip("triton").runtime.errors
    from meddanet.engine import triton_engine

    def no_room(*arguments):
        raise errors.OutOfResources(120_000, 101_376, "shared memory")

    monkeypatch.setattr(triton_engine, "PlannedModel", lambda model, device: None)
    monkeypatch.setattr(triton_engine, "Plan", no_room)
    engine = triton_engine.TritonEngine(model, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="built .*shared memory.* 120000.*; use executor eager"):
        engine.segment(slices_for([0, 1]))


class NoStream:
    """A stream or an event where all is done at once."""

    def record_event(self) -> NoStream:
        return self

    def wait(self, *given) -> None:
        """Has nothing to wait for."""

    wait_stream = wait_event = record = synchronize = wait


@pytest.fixture
def cuda_at_once(monkeypatch) -> None:
    """Lets what is written for CUDA's streams run on the CPU."""
    for name, stand_in in {
        "Stream": NoStream, "Event": NoStream, "current_stream": NoStream,
        "stream": lambda stream: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)


class EchoPlan:
    """Stands in for a plan: a slice's labels, decision, offset and widths are its pixels' value."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.seen = capacity, []
        self.images = torch.full((capacity, 1, 4, 4), torch.nan)
        self.labels = torch.zeros(capacity, 4, 4, dtype=torch.uint8)
        self.decisions = torch.zeros(capacity, dtype=torch.long)
        self.offsets = torch.zeros(capacity, 2)
        self.num_bits = torch.zeros(3, capacity, dtype=torch.int32)

    def run(self) -> None:
        value = self.images[:, 0, 0, 0]
        self.seen.append(value.tolist())
        self.labels.copy_(self.images[:, 0])
        for answer in (self.decisions, self.offsets.T, self.num_bits):
            answer.copy_(value)


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize(
    ("capacity", "stages", "seen"),
    [(2, 2, [[1, 2], [3, 4], [5, 6], [7, 0]]), (5, 2, [[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]]),
     (8, 0, [[1, 2, 3, 4, 5, 6, 7, 0]])],
)
def test_chunks_go_to_a_gpu_and_back(
    capacity, stages, seen, resident, cuda_at_once, monkeypatch
):
    """Each slice once, piece by piece, what is left of a chunk zero, and answers at their place.

    What lies on the GPU already needs no place to be staged.
    """
    from meddanet.engine import triton_engine

    monkeypatch.setattr(torch.Tensor, "is_cuda", resident)
    monkeypatch.setattr(triton_engine, "PIECE", 2)
    engine = object.__new__(triton_engine.TritonEngine)
    engine._model = SimpleNamespace(num_stages=3)
    plan, numbers = EchoPlan(capacity), torch.arange(1, 8)
    images = numbers.float()[:, None, None, None].expand(7, 1, 4, 4)
    made, empty_like = [], torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda like: made.append(like) or empty_like(like))
    found = engine._segment_on_gpu(images, plan, plan.run)
    assert plan.seen == seen and len(made) == (0 if resident else stages)
    assert torch.equal(found.labels, images[:, 0].byte())
    assert torch.equal(found.decisions, numbers)
    assert torch.equal(found.offsets, numbers.float()[:, None].expand(7, 2))
    assert torch.equal(found.num_bits, numbers[:, None].expand(7, 3))


@pytest.mark.parametrize("quantize", [True, False], ids=["on the grid", "float"])
@pytest.mark.parametrize("network", ["shufflenetv2-m", "mobilenetv2", "ghostnet"])
def test_a_frozen_decision_network_decides_alike(network, quantize):
    """In float64, where folding a norm decides no code: the same to rounding."""
    model = build_decision_network(network, 3, 2).double()
    for layer in quantized_layers(model).values():
        layer.input_amax.fill_(4.0)
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(norm.running_mean)
            torch.nn.init.uniform_(norm.running_var, 0.5, 2)
    set_quantization(model, quantize=quantize, update_range=False)
    slices = torch.randn(2, 2, 32, 40, dtype=torch.float64)
    with torch.no_grad():
        expected = model.eval()(slices)
    found = frozen(model, torch.float64)
    norms = [m for m in found.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert not norms, "every norm is folded"
    torch.testing.assert_close(found(slices), expected, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        assert torch.equal(model(slices), expected), "the model stays as it is"
    small = frozen(model, torch.float16)
    ranges = {buffer.dtype for name, buffer in small.named_buffers() if name.endswith(".amax")}
    assert ranges == ({torch.float64} if quantize else set()), "no range is rounded"


@pytest.mark.parametrize("executor", EXECUTORS)
def test_any_layout_and_dtype_is_taken(model, executor):
    slices = slices_for([1, 3]).half().float()
    engine = compile_engine(model, "cpu", executor)
    expected = engine.segment(slices).labels
    assert torch.equal(engine.segment(channels_last(slices)).labels, expected)
    assert torch.equal(engine.segment(slices.half()).labels, expected)


def test_bad_shapes_name_the_cure(model):
    engine = compile_engine(model, "cpu", "torch")
    with pytest.raises(ValueError, match="pad to 48x48"):
        engine.segment(torch.ones(1, 2, 41, 48))
