"""The recorded plan of a small model, as Triton runs it, against the model in float64.

Interpreted on the CPU, compiled where there is a GPU: the same launches over the same buffers. The
truth is the model's own layers in float64 with the one thing that the engine changes, a residual
stream in half precision. An untrained network is all near-ties: labels may differ from the truth
in twice the share in which that model in float32 does (`tests/test_engine.py` has the same rule).
"""

from __future__ import annotations

import os
from copy import deepcopy
from itertools import islice, permutations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from meddanet.build import build_med_danet_v2
from meddanet.engine import compile_engine, triton_engine
from meddanet.engine.decisions import _OneKernel
from meddanet.engine.plan import overflows, rooms
from meddanet.engine.triton_engine import TritonEngine
from meddanet.kernels import affine_paste, bilinear_crop, use_backend
from meddanet.layers import (
    QuantConv2d,
    QuantLinear,
    image_gradients,
    quantized_layers,
    set_quantization,
)
from meddanet.networks.unet import UNet

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.skipif(
        not INTERPRETING and not torch.cuda.is_available(), reason="no GPU, and no interpreter"
    ),
    pytest.mark.usefixtures("few_units", "as_users_run"),
]
SIDES, CAPACITY = (16, 24), 3


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


def slices_for(decisions: list[int], seed: int = 1) -> torch.Tensor:
    """Slices of growing contrast whose first channel's mean names the route; None: no signal."""
    generator = torch.Generator().manual_seed(seed)
    slices = torch.randn(len(decisions), 2, *SIDES, generator=generator)
    slices *= torch.linspace(0.4, 2, len(decisions))[:, None, None, None]
    means = torch.tensor([float(route or 0) for route in decisions])
    slices[:, 0] += (means - slices[:, 0].mean((1, 2)))[:, None, None]
    slices[[route is None for route in decisions]] = 0
    return slices


MIXED = slices_for([1, 3, 2, None, 1])


def spread_widths(model, slices):
    """Moves the selectors so that every stage is 8 bit for some of these slices, 16 for others."""
    for selector in model.bit_selectors:
        torch.nn.init.normal_(selector.linear.weight)
        kept: list[torch.Tensor] = []
        hook = selector.linear.register_forward_hook(lambda *call, kept=kept: kept.append(call[2]))
        model.segment(slices)
        hook.remove()
        lead = torch.cat(kept).diff(dim=1).flatten().sort().values
        place = int(lead.diff().argmax())
        with torch.no_grad():  # the middle of the widest gap between slices
            selector.linear.bias[0] += lead[place : place + 2].mean()


def made_model(crop_sizes=(8, 16), num_bits=(8, 16)):
    """An untrained model whose policy is `MeanPolicy`, in eval mode."""
    torch.manual_seed(0)
    model = build_med_danet_v2(
        "unet-4", 2, 3, crop_sizes, num_bits, decision_scale=2, position_network="heatmap"
    )
    for layer in quantized_layers(model.position.stages[2:]).values():
        layer.exempt = True  # units that run as one kernel, beside others that are quantised
    for layer in quantized_layers(model).values():
        layer.input_amax.fill_(4.0)
    for norm in model.crop_last_stages.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):  # a background that is not one class
            torch.nn.init.normal_(norm.bias)
            torch.nn.init.normal_(norm.weight)
    set_quantization(model, quantize=True, update_range=False)
    model.policy = MeanPolicy(2, len(model.routes))
    return model.eval()


@pytest.fixture(scope="module")
def model():
    model = made_model()
    with use_backend("reference"):
        spread_widths(model, MIXED)
    return model


@pytest.fixture(scope="module")
def engine(model):
    return made_engine(model)


def made_engine(model, capacity=CAPACITY):
    place = torch.device("cpu" if INTERPRETING else "cuda")
    with use_backend("triton" if INTERPRETING else "auto"):
        engine = TritonEngine(deepcopy(model), place, capacities=(capacity,))
        # buffers start as NaN and the largest integers
        torch.use_deterministic_algorithms(True, warn_only=True)
        engine.plan(capacity, *SIDES)
        torch.use_deterministic_algorithms(False)
        return engine


# the truth -----------------------------------------------------------------------------------


def half(x):
    return x.half().to(x.dtype)


def block(layers, exact, stream, bits=None):
    """A residual block: codes see the exact sum, the residual is what was stored."""
    x = layers.conv1(layers.relu(layers.norm1(exact)), bits, bits)
    return stream + layers.conv2(layers.relu(layers.norm2(x)), bits, bits)


def features(model, image):
    """(exact features, stored features, widths) of images [1, C, H, W]."""
    net, gradients = model.segmenter, image_gradients(image)
    exact, skips, widths = net.init(image), [], []
    for stage, selector in zip(net.encoder, model.bit_selectors, strict=True):
        stream = half(exact)
        widths.append(selector(gradients, exact))
        # codes of another width than the guessed one are made of what was stored
        guess = max((width for width in selector.widths.tolist() if width <= 8), default=0)
        exact = exact if widths[-1].item() == guess else stream
        for layers in stage.blocks:
            exact = block(layers, exact, stream, widths[-1])
            stream = half(exact)
        skips.append(exact)
        if stage.down is not None:
            exact = stage.down(exact, widths[-1], widths[-1])
    for up, layers, skip in (
        (net.up3, net.dec3, skips[2]), (net.up2, net.dec2, skips[1]), (net.up1, None, skips[0])
    ):
        exact = up(exact, skip)
        stream = half(exact)
        if layers is not None:
            exact = block(layers, exact, stream)
    return exact, stream, torch.cat(widths).long()


@torch.no_grad()
def truth(model, image, route, offset):
    """(labels [H, W], widths [S]) of one slice [C, H, W] in the model's precision."""
    if route == 0:
        return torch.zeros(SIDES, dtype=torch.uint8), torch.zeros(4, dtype=torch.long)
    image, last = image[None].to(next(model.parameters()).dtype), model.segmenter.last_stage
    if route == len(model.routes) - 1:
        exact, stream, widths = features(model, image)
    else:
        size, last = model.crop_sizes[route - 1], model.crop_last_stages[route - 1]
        *patch, widths = features(model, bilinear_crop(image, offset[None], size))
        exact, stream = (affine_paste(part, offset[None], SIDES) for part in patch)
    logits = last.end(block(last.block, exact, stream))
    return logits.argmax(1)[0].to(torch.uint8), widths


def double(model):
    model = deepcopy(model).double()
    for selector in model.bit_selectors:
        selector.widths = selector.widths.double()
    return model


def check(engine, model, slices, tolerances):
    """Compares everything the engine says of slices with the model and with the truth."""
    found = engine.segment(slices)
    with use_backend("reference"):
        expected = model.segment(slices)
        routes = found.decisions.tolist(), found.offsets
        exact, own = (
            [truth(net, *given) for given in zip(slices, *routes, strict=True)]
            for net in (double(model), model)
        )
    assert torch.equal(found.decisions, expected.decisions)
    # half precision may round the other way
    tolerance = 0 if engine.device.type == "cpu" else 1
    assert int((found.offsets - expected.offsets).abs().max()) <= tolerance
    labels, bits = (torch.stack(part) for part in zip(*exact, strict=True))
    assert torch.equal(found.num_bits, bits)
    share = (torch.stack([part for part, _ in own]) != labels).float().mean().item()
    print(f"float32 differs from float64 in {share:.2e}")
    tolerances.labels(found.labels.numpy(), labels.numpy(), share=2 * share)
    return found


@pytest.fixture(scope="module")
def mixed(engine, model, tolerances):
    """What the engine says of slices of every kind."""
    return check(engine, model, MIXED, tolerances)


# what it answers -------------------------------------------------------------------------------


def test_every_decision_in_one_volume(mixed, model):
    """Five slices in chunks of three, the last of them not full, all widths in all stages."""
    assert mixed.decisions.tolist() == [1, 3, 2, 0, 1]
    ran = mixed.num_bits[mixed.decisions > 0]
    assert all(set(stage.tolist()) == {8, 16} for stage in ran.T)
    assert all(len(mixed.labels[index].unique()) > 1 for index in (0, 1, 2))
    assert not mixed.labels[3].any()


@pytest.mark.parametrize("widths", [(16,), (4, 8, 16)], ids=str)
def test_other_widths(widths, tolerances):
    """Without a width of one byte, whose codes are stored before it is chosen, or with several."""
    model = made_model((16,), widths)
    for selector in model.bit_selectors:
        torch.nn.init.normal_(selector.linear.weight)
    found = check(made_engine(model, 1), model, slices_for([1, 2], seed=4)[1:], tolerances)
    assert len(found.num_bits.unique()) == len(widths), found.num_bits


def test_one_decision_fills_a_chunk(engine, model, mixed, tolerances):
    """Where a route has no room for all slices, they run again in a plan that has.

    It is kept as long as it is needed.
    """
    for route in (1, 3):
        check(engine, model, slices_for([route] * CAPACITY, seed=2), tolerances)
        assert engine.plan(CAPACITY, *SIDES)[0].roomy == (route > 1)
    few = zip(engine.segment(MIXED[:CAPACITY]), mixed, strict=True)
    assert all(torch.equal(found, expected[:CAPACITY]) for found, expected in few)
    assert not engine.plan(CAPACITY, *SIDES)[0].roomy


def test_rooms():
    """Never less than a slice, and all of a chunk for the only crop there is, or no crop."""
    assert rooms(4, 160, roomy=False) == [160, 64, 16]
    assert rooms(3, 8, roomy=False) == [8, 1]
    assert rooms(2, 8, roomy=False) == [8]
    assert rooms(4, 3, roomy=True) == [3, 3, 3]
    decisions = torch.tensor([0, 1, 1, 1, 3])
    assert not overflows(decisions, 5, 4)
    assert overflows(torch.cat([decisions, decisions]), 10, 4)
    assert overflows(torch.tensor([2, 2, 2]), 5, 4)


def test_nothing_to_label(engine):
    found = engine.segment(slices_for([0, None, 0]))
    assert not any(part.any() for part in found)
    found = engine.segment(MIXED[:0])
    assert [len(part) for part in found] == [0] * 4


def test_neighbours_and_chunks_change_nothing(engine, mixed):
    """A slice alone in its chunk, in another slot than before, and under a caller's autocast."""
    with torch.autocast(engine.device.type, torch.bfloat16):
        alone = engine.segment(MIXED[[4]])
    assert all(torch.equal(a[0], b[4]) for a, b in zip(alone, mixed, strict=True))


def test_changes_of_the_model_do_not_reach_the_engine(device):
    """Neither what was made already, at the size seen before, nor what another size makes."""
    model = made_model((8,))
    changed = deepcopy(model)
    ours, untouched = (compile_engine(m, str(device), "triton") for m in (changed, model))
    ours.capacities = untouched.capacities = (1,)
    before, after = MIXED[:1], torch.cat([MIXED[:1], MIXED[1:2]], 2)[..., :16]
    expected = ours.segment(before), untouched.segment(after)
    with torch.no_grad():
        for tensor in (*changed.parameters(), *changed.buffers()):
            tensor.mul_(-2).add_(1)
    for slices, untold in zip((before, after), expected, strict=True):
        pairs = zip(ours.segment(slices), untold, strict=True)
        assert all(torch.equal(*pair) for pair in pairs)


# how it runs -----------------------------------------------------------------------------------


class NoWordToTheHost(TorchDispatchMode):
    """Refuses operations that read tensors back, copy numbers of the host's or whose shapes hang
    on values; notes results."""

    refused = {
        "lift_fresh",
        "_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "unique",
        "_unique2", "repeat_interleave", "bincount",
    }

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.refused, f"{name} needs the host"
        if name in ("index", "index_put", "index_put_"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "a mask is counted"
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        given |= {t.untyped_storage().data_ptr() for t in (kwargs or {}).values()
                  if isinstance(t, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in given:
            self.largest = max(self.largest, out.untyped_storage().nbytes())
        return out


@pytest.fixture
def only_kernels_unwatched(monkeypatch):
    """Lets the interpreter, which reads everything, do so inside of a kernel."""
    if not INTERPRETING:
        return
    from torch.utils._python_dispatch import _disable_current_modes
    from triton.runtime.interpreter import GridExecutor

    theirs = GridExecutor.__call__

    def call(self, *arguments, **options):
        with _disable_current_modes():
            return theirs(self, *arguments, **options)

    monkeypatch.setattr(GridExecutor, "__call__", call)


def test_a_run_reads_nothing_back_and_keeps_its_buffers(engine, mixed, only_kernels_unwatched):
    plan, _ = engine.plan(CAPACITY, *SIDES, roomy=False)
    plan.images.copy_(MIXED[:CAPACITY])
    with pytest.raises(AssertionError, match="needs the host"), NoWordToTheHost():
        bool(plan.images.any())
    outside_networks = 0
    for launch in plan.launches:
        with NoWordToTheHost() as watch:
            launch.run()
        if launch.name not in ("decide", "locate"):
            outside_networks = max(outside_networks, watch.largest)
    # not even routing makes a number of its own
    assert outside_networks == 0
    assert torch.equal(plan.labels.cpu(), mixed.labels[:CAPACITY])


@pytest.mark.skipif(not INTERPRETING, reason="only interpreted kernels tell what they touch")
def test_groups_side_by_side_share_nothing(engine, mixed, launched):
    """Their launches are on streams of their own: none writes what another group's touches."""
    plan, _ = engine.plan(CAPACITY, *SIDES, roomy=False)
    plan.images.copy_(MIXED[:CAPACITY])
    labels = plan.labels.data_ptr() + np.arange(plan.labels.numel())
    for launch in islice(plan.launches, 4):  # up to the routing
        launch.run()

    def addresses(parts):
        found = [
            memory.starts[index] + part.nonzero()[0]
            for memory in launched
            for index, part in enumerate(parts(memory))
        ]
        return np.unique(np.concatenate(found))

    read, written = [], []
    for group in plan.groups:
        launched.clear()
        for launch in group.launches:
            launch.run()
        read.append(addresses(lambda memory: map(np.logical_or, memory.readers, memory.settled)))
        written.append(addresses(lambda memory: map(np.logical_or, memory.written, memory.kept)))
        assert np.intersect1d(written[-1], labels).size, "this group had no slice"
    for own, other in permutations(range(len(plan.groups)), 2):
        touched = np.union1d(read[other], written[other])
        assert not np.intersect1d(written[own], touched).size, (own, other)


def test_kernels_are_compiled_before_the_first_plan_alone(model, monkeypatch):
    """By a small one: what it launches is what all launch (`tests/test_kernel_list.py`)."""
    made, steps = [], []

    class Recorded:
        def __init__(self, planned, capacity, size, roomy=True):
            self.run = lambda: steps.append(("run", capacity))
            made.append((capacity, size))

    def compile_side_by_side(launch):
        steps.append("compile")
        launch()

    monkeypatch.setattr(triton_engine, "Plan", Recorded)
    monkeypatch.setattr(triton_engine, "compile_side_by_side", compile_side_by_side)
    engine = TritonEngine(deepcopy(model), torch.device("cpu"), capacities=(2, 8))
    engine._compiled = False  # as on a GPU
    for count in (5, 1):
        engine.plan(count, *SIDES)
    assert made == [(2, SIDES), (8, SIDES), (2, SIDES)] and steps == ["compile", ("run", 2)]


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
], ids=["allocator", "module"])
def test_a_plan_without_room_is_tried_smaller(model, monkeypatch, error):
    """First without the other plans' memory; other errors are the user's to see."""
    made, room = [], 8

    class Roomless:
        def __init__(self, planned, capacity, size, roomy=True):
            made.append(capacity)
            self.run = None
            if capacity > room:
                raise error

    monkeypatch.setattr(triton_engine, "Plan", Roomless)
    engine = TritonEngine(deepcopy(model), torch.device("cpu"), capacities=(2, 8, 32))
    engine.plan(1, *SIDES)
    engine.plan(20, *SIDES)
    assert made == [2, 32, 32, 8]
    room = 0
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        engine.plan(20, *SIDES, roomy=True)
    assert made[4:] == [32, 32, 8, 2]
    error = RuntimeError("device-side assert")
    with pytest.raises(RuntimeError, match="assert"):
        engine.plan(2, *SIDES, roomy=True)
    assert made[8:] == [2]


def test_a_stage_in_float_is_one_kernel(engine):
    parts = engine._planned.position.stages
    assert [isinstance(part, _OneKernel) for part in parts] == [False] * 2 + [True]


def test_one_launch_is_one_step(engine):
    """What would be recorded: no launch is made twice, none comes or goes with the decisions."""
    plan, _ = engine.plan(CAPACITY, *SIDES, roomy=False)
    names = [launch.name for launch in plan.launches]
    assert names[:4] == ["view", "decide", "locate", "route"]
    for route in ("crop-8", "crop-16", "whole"):
        own = [name for name in names if name.startswith(f"{route}: ")]
        assert own[0] == f"{route}: image" and own[-1] == f"{route}: labels"
        assert sum("block" in name for name in own) == 18
    assert engine.plan(CAPACITY, *SIDES, roomy=False)[0] is plan, "one plan serves all chunks"


# choosing --------------------------------------------------------------------------------------


def test_naming_the_executor(model, engine):
    device = str(engine.device)
    assert compile_engine(model, device, "triton").executor == "triton"
    with use_backend("reference"), pytest.raises(ValueError, match="backend reference is chosen"):
        compile_engine(model, device, "triton")


def test_what_has_no_plan_says_so(model, engine):
    device = str(engine.device)
    floating = deepcopy(model)
    set_quantization(floating, quantize=False, update_range=False)
    with pytest.raises(ValueError, match="layer segmenter.init is in float; use auto or eager"):
        compile_engine(floating, device, "triton")
    wide = deepcopy(model)
    wide.segmenter.up2.fuse.input_num_bits = 16
    with pytest.raises(ValueError, match="segmenter.up2.fuse at 8 bits or fewer only"):
        compile_engine(wide, device, "triton")
    for layer, value in (("segmenter.init", 1e-29), ("segmenter.encoder.0.down", 1e33)):
        broken = deepcopy(model)
        quantized_layers(broken)[layer].input_amax.fill_(value)
        with pytest.raises(ValueError, match="has no kernel for .* whose inputs reach up to"):
            compile_engine(broken, device, "triton")
    hooked = deepcopy(model)
    hooked.segmenter.init.register_forward_hook(lambda layer, given, output: -output)
    replaced = deepcopy(model)
    replaced.segmenter.decode = lambda *given: -UNet.decode(replaced.segmenter, *given)
    derived = deepcopy(model)
    derived.crop_last_stages[0].block.conv1.__class__ = type("Own", (QuantConv2d,), {})
    for name, odd in (("init", hooked), ("the segmenter", replaced), ("0.block.conv1", derived)):
        with pytest.raises(ValueError, match=f", {name} has hooks or methods of its own; use auto"):
            compile_engine(odd, device, "triton")
    transformer = build_med_danet_v2("transbts-light", 2, 3, (16,))
    for layer in quantized_layers(transformer).values():
        layer.input_amax.fill_(4.0)
    with pytest.raises(ValueError, match=r"runs unet-\* segmenters only; use auto or eager"):
        compile_engine(transformer, device, "triton")
