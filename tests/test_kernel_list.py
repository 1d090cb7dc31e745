"""What the shipped models launch on a GPU is what `meddanet.kernels.variants` lists for it.

Their routes run on the CPU under the stand-in that lists the variants: kernels are looked up, not
run, and their outputs are set to zero, since memory's own values would be chance.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

from meddanet.engine.decisions import frozen  # noqa: E402
from meddanet.engine.plan import Plan, PlannedModel  # noqa: E402
from meddanet.kernels import backend, variants  # noqa: E402
from meddanet.layers import set_quantization  # noqa: E402
from meddanet.routing import channels_last  # noqa: E402
from meddanet.weights import load_model  # noqa: E402

ARCH = 89
# of the decision networks
OPERATIONS = ("heat_head", "pooled_head", "shuffle_stage", "shuffle_stem")
# the modules, beside which the package has functions of their names
DECIDING = [import_module(f"meddanet.kernels.{name}") for name in OPERATIONS]


def tensors(result):
    """The tensors in what a launcher returns."""
    parts = result if isinstance(result, tuple) else (result,)
    return [part for part in parts if isinstance(part, torch.Tensor)]


def zeroing(launcher):
    """Wraps a launcher so that its outputs are zero."""

    def launch(*arguments, **options):
        result = launcher(*arguments, **options)
        for tensor in tensors(result):
            tensor.zero_()
        return result

    return launch


def zero_filled(allocate):
    """Wraps an allocation."""
    return lambda *arguments, **options: allocate(*arguments, **options).zero_()


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Lets every operation take its Triton way on CPU tensors."""
    # launchers that write into what they are given leave it as it was allocated
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, zero_filled(getattr(owner, name)))
    asked = backend.triton_runs
    for path in Path(variants.__file__).parent.glob("*.py"):
        name = path.stem
        module = import_module(f"{variants.__package__}.{name}")
        if getattr(module, "triton_runs", None) is asked:
            monkeypatch.setattr(module, "triton_runs", lambda input: True)
        if name.endswith("_triton"):
            for launcher, function in inspect.getmembers(module, inspect.isfunction):
                own = function.__module__ == module.__name__ and launcher != "shape_classes"
                if own and not launcher.startswith("_"):
                    monkeypatch.setattr(module, launcher, zeroing(function))


def force_routes(model):
    """Makes the policy skip, crop and take whole in turn, whatever it sees."""
    policy, routes = model.policy, len(model.routes)

    class Forced(torch.nn.Module):
        def forward(self, slices):
            logits = policy(slices)
            return 0 * logits + torch.eye(routes)[torch.arange(len(slices)) % routes]

    model.policy = Forced()


def slices(count, height, width):
    return channels_last(torch.randn(count, 4, height, width))


def segment(model):
    assert model.segment(slices(3, 160, 144)).decisions.tolist() == [0, 1, 2]
    # an odd number of elements per slice, divided by 64
    model.segment(slices(2, 136, 136))


def windows(model):
    model.segment_windows(slices(3, 128, 128))


def train(model):
    """One step of each quantised phase: ranges still learnt, then fixed."""
    model.train()
    for batch, update_range in ((2, True), (1, False)):
        set_quantization(model, quantize=True, update_range=update_range)
        output = model(slices(batch, 136, 136))
        loss = sum((logits**2).mean() for logits in (*output.branch_logits, output.mixed))
        (loss + sum(bits.sum() for bits in output.num_bits)).backward()


TRAINED = {
    "shift_kernel", "offset_gradient_kernel", "quantize_kernel", "input_encode_kernel",
    "input_decode_kernel", "masked_gradient_kernel", "width_gradient_kernel",
}


@pytest.mark.parametrize(("route", "kernels"), [
    (segment, {"shift_kernel", "quantize_kernel", "input_encode_kernel"}),
    (windows, {"shift_kernel", "quantize_kernel", "input_encode_kernel"}),
    (train, TRAINED),
])
def test_the_list_holds_all_that_a_route_launches(route, kernels, as_on_a_gpu):
    model = load_model()
    force_routes(model)
    launched = variants.record(ARCH, route.__name__, lambda: route(model))
    assert {variant.name for variant in launched} == kernels
    listed = {variant.key for variant in variants.variants(ARCH)}
    missing = [f"{v.name} {v.constants} {v.source.attrs}" for v in launched if v.key not in listed]
    assert not missing


@pytest.mark.parametrize("size", [(240, 240), (160, 144), (136, 96)], ids=str)
@pytest.mark.parametrize("capacity", [8, 32])
def test_the_list_holds_all_that_a_plan_launches(size, capacity, monkeypatch):
    model = load_model()
    planned = PlannedModel(model, torch.device("cpu"))
    # as on a GPU: in half precision, and the decision networks' operations on Triton
    planned.dtype = torch.float16
    planned.policy, planned.position = (
        frozen(network, torch.float16) for network in (model.policy, model.position)
    )
    for module in DECIDING:
        monkeypatch.setattr(module, "triton_runs", lambda input: True)

    def launch_all():
        for step in Plan(planned, capacity, size).launches:
            step.run()

    launched = variants.record(ARCH, "plan", launch_all)
    assert {f"{name}_kernel" for name in OPERATIONS} <= {v.name for v in launched}
    listed = variants.variants(ARCH)
    missing = {v.key for v in launched} - {v.key for v in listed}
    assert not [f"{v.name} {v.constants} {v.source.attrs}" for v in launched if v.key in missing]
    # at full size nothing is compiled in vain
    if size == (240, 240):
        known = {v.key for v in launched}
        idle = {v.name for v in listed if v.key not in known}
        assert idle == TRAINED


def test_tiles_that_an_h200_preferred_are_its_own():
    """By its machine code's architecture: a graphics card's shared memory has room for one."""
    name = "encoder block, first, 128 to 128 channels, 30"
    tiles = {}
    for arch in (80, 89, 90, 120):
        (variant,) = variants.record(arch, name, variants.shape_classes()[name])
        tiles[arch] = [variant.constants[size] for size in ("BLOCK_M", "BLOCK_N", "BLOCK_K")]
    assert tiles == {80: [64, 64, 64], 89: [64, 64, 64], 90: [64, 128, 128], 120: [64, 64, 64]}
