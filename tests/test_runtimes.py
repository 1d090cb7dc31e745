"""What stands beside the engine in benchmarks gets what it gets, and answers as PyTorch does."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch

from meddanet.bench import slice_by_slice, static_network
from meddanet.build import build_med_danet_v2
from meddanet.data import find_cases, load_volume, to_slices
from meddanet.data.phantom import write_phantom
from meddanet.engine.unreported import unreported

runtimes = pytest.importorskip("runtimes")
tensorrt_peer = pytest.importorskip("tensorrt_peer")


def test_a_script_around_nibabel_segments_what_the_package_does(tmp_path):
    """The same slices, modalities in the network's order, and labels where they belong."""
    case = find_cases(write_phantom(tmp_path / "case", seed=0, shape=(40, 48, 16)))[0]
    seen = []

    def network(slices):
        seen.append(slices)
        return (slices[:, 1] > 1).to(torch.uint8)

    runtimes.by_nibabel(case, network, tmp_path)
    volume = load_volume(case)
    expected = to_slices(volume)
    np.testing.assert_allclose(seen[0].numpy(), expected, atol=1e-3)
    labels = nib.load(tmp_path / "labels.nii.gz")
    assert np.array_equal(labels.affine, volume.affine)
    assert np.array_equal(labels.get_fdata() > 0, np.moveaxis(seen[0].numpy()[:, 1] > 1, 0, -1))


def test_openvino_segments_the_slices_of_the_call():
    with unreported():
        pytest.importorskip("openvino")
    model = build_med_danet_v2("unet-4", crop_sizes=(16,)).eval()
    first, others = np.random.default_rng(0).standard_normal((2, 3, 4, 32, 32)).astype(np.float32)
    run = runtimes.openvino_static(model, first, 32)
    for slices, found in ((first, run().copy()), (others, run(others))):
        expected = slice_by_slice(static_network(model), torch.from_numpy(slices)).numpy()
        assert (found != expected).mean() < 1e-3


def test_tensorrt_is_taken_where_it_is_and_named_where_it_is_not(monkeypatch):
    for name in ("torch_tensorrt", "tensorrt"):
        monkeypatch.setitem(sys.modules, name, None)
    network, example = torch.nn.Conv2d(4, 4, 1).half(), torch.zeros(2, 4, 8, 8).half()
    with pytest.raises(runtimes.Unavailable, match="tensorrt is not installed"):
        tensorrt_peer.tensorrt_network(network, example)
    calls = []
    wrapper = SimpleNamespace(compile=lambda *given, **options: calls.append((given, options)))
    monkeypatch.setitem(sys.modules, "torch_tensorrt", wrapper)
    tensorrt_peer.tensorrt_network(network, example)
    ((given, options),) = calls
    assert given == (network,) and options["inputs"] == [example] and options["ir"] == "dynamo"
    assert options["enabled_precisions"] == {torch.float16}
