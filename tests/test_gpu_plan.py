"""What only a GPU can show of the recorded plan: it is captured, and waits for nothing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from meddanet.data import Volume, from_classes, from_slices, normalize, to_slices
from meddanet.data.phantom import make_phantom
from meddanet.engine import compile_engine
from meddanet.engine.triton_engine import TritonEngine
from meddanet.metrics import dice_score
from meddanet.predictor import VolumePredictor
from meddanet.weights import load_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(scope="module")
def engine():
    engine = compile_engine(load_model(), "cuda")
    if engine.executor != "triton":
        pytest.skip("this GPU runs no plan: compute capability 8.0 and triton are needed")
    return engine


@pytest.fixture(scope="module")
def slices() -> torch.Tensor:
    """Forty slices of a phantom around its lesion: one chunk of the largest capacity."""
    phantom = make_phantom(0, (240, 240, 48))
    images = normalize(phantom.data.round().clip(0)).transpose(3, 0, 1, 2)[4:44]
    return torch.from_numpy(images.copy())


@pytest.fixture
def no_synchronisation():
    """Makes PyTorch raise where it would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_the_sync_debug_mode_works(no_synchronisation):
    with pytest.raises(RuntimeError, match="synchron"):
        torch.ones(1, device="cuda").item()


def test_a_run_and_its_graph_wait_for_nothing(engine, slices, request):
    plan, replay = engine.plan(len(slices), *slices.shape[2:])
    plan.images[: len(slices)].copy_(slices)
    plan.run()
    request.getfixturevalue("no_synchronisation")
    plan.run()
    replay()


def test_a_whole_volume_waits_once_at_its_end(engine, slices, request):
    """From upload to labels: the wait is for an event, which the debug mode lets pass."""
    engine.segment(slices)
    request.getfixturevalue("no_synchronisation")
    engine.segment(slices)


def test_the_graph_answers_as_the_launches_do(engine, slices):
    plan, replay = engine.plan(len(slices), *slices.shape[2:])
    plan.images.zero_()
    plan.images[: len(slices)].copy_(slices)
    answers, told = [], (plan.labels, plan.decisions, plan.offsets, plan.num_bits)

    def one_after_the_other():
        for launch in plan.launches:
            launch.run()

    # the first on one stream; a race between several would come and go
    for run in (torch.no_grad()(one_after_the_other), plan.run, replay, replay, replay):
        for buffer in told:
            buffer.fill_(1)
        run()
        torch.cuda.synchronize()
        answers.append([buffer.clone() for buffer in told])
    for answer in answers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(answers[0], answer, strict=True))
    assert answers[0][0].any()


def test_it_answers_as_the_models_own_layers(engine, slices):
    found = engine.segment(slices)
    expected = compile_engine(load_model(), "cuda", "eager").segment(slices)
    assert (found.decisions != expected.decisions).float().mean() <= 0.05
    assert dice_score(found.labels.numpy() > 0, expected.labels.numpy() > 0) >= 0.98


def test_a_volume_of_many_chunks(engine, slices):
    """Five chunks of eight, each uploaded while the last is worked on: each as if it were alone."""
    chunked = TritonEngine(load_model().eval(), torch.device("cuda"), capacities=(8,))
    found, whole = chunked.segment(slices), engine.segment(slices)
    for start in range(0, len(slices), 8):
        part = slice(start, start + 8)
        alone = chunked.segment(slices[part])
        assert all(torch.equal(a, b[part]) for a, b in zip(alone, found, strict=True))
    # in one chunk the decision networks see another batch, and may round another way
    assert torch.equal(found.decisions, whole.decisions)
    assert (found.labels != whole.labels).float().mean() <= 1e-3


def test_a_smaller_volume_takes_a_smaller_plan(engine, slices):
    few = engine.segment(slices[20:23])
    many = engine.segment(slices)
    assert torch.equal(few.decisions, many.decisions[20:23])
    assert (few.labels != many.labels[20:23]).float().mean() <= 1e-3


def test_a_volume_is_normalised_where_it_is_segmented(engine):
    """Raw on the CPU to labels on the CPU, as from slices that the CPU has normalised."""
    phantom = make_phantom(0, (240, 240, 48))
    raw = phantom.data.round().clip(0)
    volume = Volume(raw, phantom.affine, None, phantom.modalities, "brats2021", "phantom")
    predictor = VolumePredictor(load_model(), "cuda")
    assert predictor._slices(volume).is_cuda
    found = predictor.predict(volume)
    expected = engine.segment(torch.from_numpy(to_slices(volume)))
    labels = from_classes(from_slices(expected.labels.numpy(), volume), "brats2021")
    assert (found.decisions == expected.decisions.numpy()).all() and labels.any()
    # a normalised value may differ in its last bit
    assert (found.labels != labels).mean() <= 1e-4


@pytest.mark.parametrize("executor", ["triton", "eager"])
def test_slices_on_the_gpu_are_segmented_as_those_on_the_cpu(slices, executor):
    """In one chunk, in many, and where a chunk needs more room than most do."""
    model = load_model().eval()
    engines = [compile_engine(model, "cuda", executor)]
    if executor == "triton":
        engines.append(TritonEngine(model, torch.device("cuda"), capacities=(8,)))
    for engine in engines:
        for some in (slices, slices[20:23].repeat(11, 1, 1, 1)):
            there, here = engine.segment(some.cuda()), engine.segment(some)
            assert all(part.device.type == "cpu" for part in there)
            assert all(torch.equal(a, b) for a, b in zip(there, here, strict=True))


FIRST_VOLUME = """
import torch
from triton import knobs
from meddanet.engine import compile_engine, triton_engine
from meddanet.weights import load_model
found, ahead, compile_side_by_side = [], [], triton_engine.compile_side_by_side
knobs.compilation.listener = lambda **facts: found.append(facts["cache_hit"])
def watched(launch):
    found.clear()
    compile_side_by_side(launch)
    ahead.append(len(found))
    found.clear()
triton_engine.compile_side_by_side = watched
engine = compile_engine(load_model(), "cuda", "triton")
for count in (3, 40):
    engine.segment(torch.randn(count, 4, 240, 240))
print(*ahead, len(found), found.count(False))
"""


def test_a_first_volumes_kernels_are_compiled_side_by_side(tmp_path):
    """Where no cache holds any; what then launches them, in plans of any size, compiles none."""
    run = subprocess.run(
        [sys.executable, "-c", FIRST_VOLUME],
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "t")},
        capture_output=True, text=True,
    )
    assert run.returncode == 0, run.stderr
    ahead, launched, compiled = map(int, run.stdout.split())
    assert ahead >= 40 and 0 < launched <= ahead and compiled == 0


def test_slices_give_way_to_the_work(slices, monkeypatch):
    """Where both have no room, the slices go to the CPU, and their memory is given back."""
    predictor = VolumePredictor(load_model(), "cuda")
    segment, tried = predictor.engine.segment, []

    def short_of_memory(images):
        tried.append((images.device.type, torch.cuda.memory_allocated()))
        if images.is_cuda:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return segment(images)

    monkeypatch.setattr(predictor.engine, "segment", short_of_memory)
    result = predictor._segment(slices.cuda())
    (_, before), (place, after) = tried
    assert place == "cpu" and before - after >= slices.numel() * slices.element_size()
    assert torch.equal(result.labels, segment(slices).labels)
