"""An engine beside other threads and processes, and with models and slices it was not made for."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from copy import copy, deepcopy
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn

from meddanet.build import build_med_danet, build_med_danet_v2
from meddanet.devices import resolve_device
from meddanet.engine import compile_engine
from meddanet.engine.routing import EVERYWHERE, CropEngine, halo
from meddanet.engine.slices import single_threaded_workers
from meddanet.engine.torch_networks import _freeze
from meddanet.layers import QuantConv2d, quantized_layers, set_quantization
from meddanet.med_danet_v2 import MedDANetV2
from meddanet.networks.unet import LastStage, ResidualBlock
from meddanet.predictor import VolumePredictor

pytestmark = pytest.mark.usefixtures("few_units")

needs_openvino = pytest.mark.skipif(not find_spec("openvino"), reason="OpenVINO is not installed")
CPU_EXECUTORS = [pytest.param("openvino", marks=needs_openvino), "torch", "eager"]


def made_model() -> MedDANetV2:
    torch.manual_seed(0)
    model = build_med_danet_v2("unet-8", 2, 3, crop_sizes=(16,))
    for layer in quantized_layers(model).values():
        layer.input_amax.fill_(4.0)
    set_quantization(model, quantize=True, update_range=False)
    return model.eval()


@pytest.fixture
def model() -> MedDANetV2:
    return made_model()


@pytest.fixture(scope="module", params=CPU_EXECUTORS)
def engine(request):
    """An engine of that model, for tests that ask it alone."""
    return compile_engine(made_model(), "cpu", request.param)


# threads and processes -------------------------------------------------------------------------


@needs_openvino
def test_other_threads_modules_run_while_a_graph_is_recorded():
    """torch.fx changes what every module of the process does when it is called."""
    from meddanet.engine.opset import record

    recording, called = threading.Event(), threading.Event()

    class Waiting(nn.Module):
        def forward(self, input):
            recording.set()
            assert called.wait(20)
            return input + input

    other, outcome = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), []

    def call() -> None:
        assert recording.wait(20)
        try:
            outcome.append(other(torch.ones(2, 3)))
        except Exception as error:
            outcome.append(error)
        called.set()

    thread = threading.Thread(target=call)
    thread.start()
    recorded = record(Waiting())
    thread.join()
    assert torch.equal(outcome[0], other(torch.ones(2, 3)))
    assert [node.op for node in recorded.graph.nodes] == ["placeholder", "call_function", "output"]


def test_a_forked_process_is_told(model):
    """Its engine's threads are the parent's: it would wait for them for ever."""
    engine = compile_engine(model, "cpu", "torch")
    slices = torch.randn(1, 2, 32, 32)
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            engine.segment(slices)
        except RuntimeError as error:
            os.write(writing, str(error).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as told:
        assert told.read().endswith("make one in each process, or start processes by spawn")
    os.waitpid(child, 0)


@pytest.mark.parametrize("executor", CPU_EXECUTORS)
def test_an_engine_stays_where_it_is(model, executor):
    predictor = VolumePredictor(model, "cpu", executor=executor)
    for move in (pickle.dumps, copy, deepcopy):
        with pytest.raises(TypeError, match="send the model and make an engine in each process"):
            move(predictor.engine)
        if move is not copy:  # a shallow one shares the engine
            with pytest.raises(TypeError, match="send the model and make an engine in each proc"):
                move(predictor)


def test_so_does_an_engine_on_a_gpu():
    from meddanet.engine.triton_engine import TritonEngine

    engine = TritonEngine.__new__(TritonEngine)
    with pytest.raises(TypeError, match="send the model"):
        deepcopy(engine)


@needs_openvino
def test_a_forked_process_can_drop_an_engine():
    """OpenVINO's destructors wait for threads that a forked process has not: for ever."""
    program = """
import gc, os, sys, torch
from meddanet import compile_engine
from meddanet.build import build_med_danet_v2
from meddanet.layers import set_quantization
model = build_med_danet_v2("unet-4", 2, 3, (16,))
set_quantization(model, quantize=False, update_range=False)
engine = compile_engine(model, "cpu", "openvino")
engine.segment(torch.randn(2, 2, 32, 32))
graphs = len(engine._networks._graphs)
for leave in (os._exit, sys.exit):
    if os.fork() == 0:
        assert len(engine._networks._graphs) == graphs > 0
        del engine
        gc.collect()
        leave(0)
    print(os.wait()[1])
del engine
gc.collect()
"""
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.stdout == "0\n0\n", run.stdout + run.stderr


def test_threads_that_cannot_be_started(monkeypatch):
    """As under a limit of processes: the first one does not wait for the second for ever."""
    usual, before = torch.get_num_threads(), set(threading.enumerate())
    start = threading.Thread.start

    def start_one(thread):
        if len(set(threading.enumerate()) - before):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_one)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        single_threaded_workers(2)
    for thread in set(threading.enumerate()) - before:
        thread.join(20)
        assert not thread.is_alive()
    assert torch.get_num_threads() == usual


@needs_openvino
def test_auto_goes_on_where_openvino_fails(model, monkeypatch):
    """As in an image without the plugin for CPUs: its own errors are RuntimeErrors."""
    from meddanet.engine import openvino_graphs

    def fail(core):
        raise RuntimeError("Exception from core.cpp:117:\nDevice 'CPU' is not registered")

    monkeypatch.setattr(openvino_graphs, "exact_sums", fail)
    engine = compile_engine(model, "cpu")
    assert engine.executor == "torch" and "\n" not in engine.passed_over
    assert "Device 'CPU' is not registered; use executor torch" in engine.passed_over


def test_a_gpu_has_its_number(monkeypatch):
    """The current GPU is each thread's own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for name in ("auto", "cuda", "cuda:1"):
        assert resolve_device(name) == torch.device("cuda:1")
    assert resolve_device("cuda:0") == torch.device("cuda:0")


# slices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(engine, value):
    """Not a route, as if the slice had been seen: the largest of NaN is the first."""
    slices = torch.randn(3, 2, 32, 32)
    slices[1, 0, 5, 7] = value
    with pytest.raises(ValueError, match="slices hold NaN or infinite values"):
        engine.segment(slices)
    slices[1] = 1e37  # whose sum is infinite
    engine.segment(slices)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int16])
def test_other_dtypes(engine, dtype):
    slices = (torch.randn(2, 2, 32, 32) * 2).round().to(dtype)
    for found, expected in zip(engine.segment(slices), engine.segment(slices.float()), strict=True):
        assert torch.equal(found, expected)


def test_a_dtype_as_default_changes_nothing(engine):
    slices = torch.randn(3, 2, 32, 48)
    expected = engine.segment(slices)
    torch.set_default_dtype(torch.float64)
    try:
        found = engine.segment(slices)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("executor", CPU_EXECUTORS)
def test_the_callers_autocast_changes_nothing(model, executor):
    model = deepcopy(model)
    with torch.no_grad():  # whole, of features that are not 0
        model.policy.last[1].bias.fill_(1.0)
        model.policy.classifier.weight.copy_(torch.tensor([[-1.0], [-1.0], [1.0]]))
    slices, engine = torch.randn(8, 2, 32, 48), compile_engine(model, "cpu", executor)
    expected = engine.segment(slices)
    assert (expected.decisions == 2).all()
    with torch.autocast("cpu", torch.bfloat16):
        found = engine.segment(slices)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("executor", CPU_EXECUTORS)
def test_a_device_as_default_changes_nothing(model, executor):
    """As torch.set_default_device("cuda") sets it: whatever is made on "meta" has no values."""
    slices = torch.randn(3, 2, 32, 48)
    slices[0] = 0  # skipped, or all might be
    expected = compile_engine(model, "cpu", executor).segment(slices)
    with torch.device("meta"):
        found = compile_engine(model, "cpu", executor).segment(slices)
    for one, other in zip(found, expected, strict=True):
        assert one.device == other.device and torch.equal(one, other)


@pytest.mark.parametrize("executor", CPU_EXECUTORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_of_another_dtype_runs_in_float32(model, executor, dtype):
    rounded, slices = deepcopy(model).to(dtype), torch.randn(3, 2, 32, 48)
    found = compile_engine(rounded, "cpu", executor).segment(slices)
    expected = compile_engine(deepcopy(rounded).float(), "cpu", executor).segment(slices)
    assert next(rounded.parameters()).dtype == dtype, "stays as it is"
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_slices_of_another_shape_or_beyond_float32(engine):
    with pytest.raises(ValueError, match=r"input must be \[N, 2, H, W\], got shape \[2, 32, 48\]"):
        engine.segment(torch.zeros(2, 32, 48))
    with pytest.raises(ValueError, match="slices hold NaN or infinite values"):
        engine.segment(torch.full((1, 2, 32, 48), 1e300, dtype=torch.float64))


def test_what_segment_returns_can_be_changed(model, engine):
    """As tensors of inference mode cannot be, outside of it."""
    slices = torch.randn(2, 2, 32, 48)
    bank = build_med_danet(("unet-4",), 2, 3).eval()
    for result in (
        engine.segment(slices), model.segment(slices), bank.segment(slices),
        model.segment_windows(slices, 32), bank.segment_windows(slices, 32),
    ):
        for tensor in result:
            assert not tensor.requires_grad
            tensor.add_(1)


# layers ----------------------------------------------------------------------------------------


class Centred(QuantConv2d):
    """A quantised convolution that does more than one: its input's mean is taken off."""

    def forward(self, input, num_bits=None, input_num_bits=None):
        centred = input - input.mean((2, 3), keepdim=True)
        return super().forward(centred, num_bits, input_num_bits)


def hook_before(layer):
    layer.register_forward_pre_hook(lambda _, given: (-given[0], *given[1:]))


def hook_after(layer):
    layer.register_forward_hook(lambda _, given, output: -output)


def make_centred(layer):
    layer.__class__ = Centred


def replace_forward(layer):
    own = layer.forward
    layer.forward = lambda input, *widths: -own(input, *widths)


@pytest.mark.parametrize("change", [hook_before, hook_after, make_centred, replace_forward])
@pytest.mark.parametrize("where", ["init", "up1.up"])
def test_a_layer_that_does_more_than_its_kind(model, change, where):
    """What hooks or a forward of its own do reaches the answers of "torch" as well."""
    layer, slices = model.segmenter.get_submodule(where), torch.rand(2, 2, 32, 32)
    if change is make_centred and not isinstance(layer, QuantConv2d):
        pytest.skip("a convolution's forward")
    with torch.no_grad():
        plain = model.segmenter.features(slices)
        change(layer)
        expected = model.segmenter.features(slices)
        found = _freeze(deepcopy(model)).segmenter.features(slices)
    scale = expected.abs().mean()
    # a code that rounds the other way now and then
    assert (found - expected).abs().mean() < 0.01 * scale < 0.1 * (plain - expected).abs().mean()


# last stages -----------------------------------------------------------------------------------


class Gated(nn.Module):
    """A block with squeeze and excitation, whose gates depend on the whole map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block, self.gate = ResidualBlock(channels), nn.Linear(channels, channels)

    def forward(self, input):
        gate = self.gate(input.mean((2, 3))).mul(8).sigmoid()
        return self.block(input) * gate[:, :, None, None]


@pytest.mark.parametrize(("padding", "dilation", "expected"), [
    (1, 1, 1), ("same", 1, 1), ("same", 3, 3), (2, 2, 2), (0, 1, EVERYWHERE), (3, 1, EVERYWHERE),
    ("valid", 1, EVERYWHERE),
])
def test_how_far_a_convolution_looks(padding, dilation, expected):
    layer = QuantConv2d(2, 2, 3, padding=padding, dilation=dilation)
    assert halo(nn.Sequential(layer, nn.ReLU())) == expected
    if expected != EVERYWHERE:
        impulse = torch.zeros(1, 2, 15, 15)
        impulse[..., 7, 7] = 1
        layer.quantize = False
        seen = (layer(impulse) - layer(0 * impulse)).abs().sum(1)[0].nonzero()
        assert (seen - 7).abs().max() == expected


@pytest.mark.parametrize("layer", [
    QuantConv2d(2, 2, 3, stride=2, padding=1),
    QuantConv2d(2, 2, 3, padding=1, padding_mode="circular"),
    nn.InstanceNorm2d(2), nn.AvgPool2d(3, 1, 1), LastStage(2, 2, Gated), Centred(2, 2, 1),
])
def test_what_may_look_anywhere(layer):
    assert halo(nn.Sequential(layer)) == EVERYWHERE
    # what nn.Conv2d.forward calls is the usual place for one's own
    own = type("Own", (nn.Conv2d,), {"_conv_forward": lambda self, x, w, b: x - x.mean()})
    assert halo(nn.Sequential(own(2, 2, 3, padding=1))) == EVERYWHERE


def test_the_last_stages_of_the_package():
    assert halo(LastStage(4, 3)) == 2
    model = build_med_danet_v2("transbts-light", 2, 3, crop_sizes=(16,))
    assert halo(model.crop_last_stages[0]) == 2


@pytest.mark.parametrize("executor", [pytest.param("openvino", marks=needs_openvino), "torch"])
def test_a_crops_last_stage_runs_on_its_tile(model, executor, monkeypatch):
    """It sees the patch and twice the two pixels that its convolutions reach, on each side."""
    engine, seen = compile_engine(model, "cpu", executor), []
    last = engine._networks.last
    monkeypatch.setattr(
        engine._networks, "last", lambda index, map: (seen.append(map.shape), last(index, map))[1]
    )
    labels = np.zeros((48, 64), np.uint8)
    engine._paste(labels, np.ones((16, 16, 8), np.float32), (20, 24), 0)
    assert seen == [(48, 64, 8), (24, 24, 8)]  # the empty canvas, once, and the tile


def centred_last_stage() -> nn.Module:
    stage = LastStage(8, 3)
    stage.end.__class__ = Centred
    return stage


def hooked_last_stage() -> nn.Module:
    stage = LastStage(8, 3)
    stage.block.register_forward_hook(lambda _, given, map: map - map.mean((2, 3), keepdim=True))
    return stage


@pytest.mark.parametrize(
    "made", [lambda: LastStage(8, 3, Gated), centred_last_stage, hooked_last_stage],
    ids=["gated", "centred", "hooked"],
)
def test_a_last_stage_that_sees_the_whole_map(model, made):
    """It sees the whole canvas, not the patch and two halos."""
    model.crop_last_stages[0] = made()
    for layer in quantized_layers(model.crop_last_stages).values():
        layer.input_amax.fill_(4.0)
    set_quantization(model, quantize=True, update_range=False)
    model.eval()
    from meddanet.engine.torch_networks import TorchNetworks

    engine = CropEngine(model, TorchNetworks(model), "torch", threads=1, callers=1)
    patch, canvas = torch.randn(16, 16, 8), torch.zeros(1, 8, 48, 64)
    canvas[0, :, 20:36, 8:24] = patch.permute(2, 0, 1)
    with torch.no_grad():
        expected = model.crop_last_stages[0](canvas)[0].argmax(0).numpy()
    labels = np.full((48, 64), 9, np.uint8)
    engine._paste(labels, patch.numpy(), (20, 8), 0)
    assert len(np.unique(expected)) > 1
    np.testing.assert_array_equal(labels, expected)
