"""The shipped model's plan on a real volume's slices, interpreted, launch by launch.

What it reads and writes is watched (`conftest.py`); labels are the model's own layers'.
"""

from __future__ import annotations

import os

import pytest
import torch

from meddanet import VolumePredictor, load_model, load_volume
from meddanet.data import to_slices
from meddanet.engine import plan
from meddanet.engine.triton_engine import TritonEngine
from meddanet.kernels import use_backend

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="tests/test_gpu_plan.py runs it on a GPU"
)


@pytest.fixture(scope="module")
def model():
    return load_model().eval()


@pytest.fixture(scope="module")
def decided(model, real_data) -> tuple[torch.Tensor, torch.Tensor]:
    """A volume's slices [D, 4, 240, 240] and their routes [D]."""
    volume = load_volume(real_data / "brats2021" / "BraTS2021_00024")
    predictor = VolumePredictor(model, "cpu", executor="eager")
    slices = predictor.fitted(torch.from_numpy(to_slices(predictor.ordered(volume))))
    with torch.no_grad(), use_backend("reference"):
        return slices, model.decide(slices).argmax(1)


@pytest.fixture
def engine(model, monkeypatch):
    """Without the labels of empty canvases, a third of the time: these have no lesion."""
    monkeypatch.setattr(plan, "label_background", lambda last, size, device: torch.zeros(size))
    return TritonEngine(model, torch.device("cpu"), capacities=(1,))


@pytest.mark.parametrize("route", [
    pytest.param(1, id="crop of 96"), pytest.param(2, id="crop of 128", marks=pytest.mark.long),
])
def test_a_crop(model, engine, decided, route, tolerances):
    slices, decisions = decided
    slices = slices[decisions == route][5:6]
    found = engine.segment(slices)
    with torch.no_grad(), use_backend("reference"):
        own = model.segment(slices)
    assert found.decisions.tolist() == [route]
    assert all(torch.equal(getattr(found, part), getattr(own, part))
               for part in ("decisions", "offsets", "num_bits"))
    assert own.labels.count_nonzero() > 1000
    # a residual stream in half precision turns over some 10 of 57600 voxels (docs/engine.md)
    tolerances.labels(found.labels.numpy(), own.labels.numpy(), share=5e-4)
