"""What stands beside the engine in benchmarks gets what it gets, and answers as PyTorch does."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch

from meddanet.bench import slice_by_slice, static_network
from meddanet.build import build_med_danet_v2
from meddanet.data import find_cases, load_volume, to_slices
from meddanet.data.phantom import write_phantom

runtimes = pytest.importorskip("runtimes")


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
    pytest.importorskip("openvino")
    model = build_med_danet_v2("unet-4", crop_sizes=(16,)).eval()
    first, others = np.random.default_rng(0).standard_normal((2, 3, 4, 32, 32)).astype(np.float32)
    run = runtimes.openvino_static(model, first, 32)
    for slices, found in ((first, run().copy()), (others, run(others))):
        expected = slice_by_slice(static_network(model), torch.from_numpy(slices)).numpy()
        assert (found != expected).mean() < 1e-3
