"""Slices that are normalised where the networks run, against float64 and the CPU's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from nibabel import orientations

from meddanet import predictor as predictor_module
from meddanet.build import build_med_danet_v2
from meddanet.data import Volume, VolumeError, canonical, load_volume, to_slices
from meddanet.data.on_device import to_slices_on
from meddanet.predictor import VolumePredictor

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA GPU"
    )),
]


def volume_of(data: np.ndarray, codes: str = "LPS") -> Volume:
    axes = orientations.axcodes2ornt(tuple(codes))
    affine = np.zeros((4, 4))
    affine[axes[:, 0].astype(int), range(3)] = axes[:, 1]
    affine[3, 3] = 1
    names = tuple(f"m{number}" for number in range(len(data)))
    return Volume(data.astype(np.float32, order="K", copy=False), affine, None, names, "files", "x")


def scan(order: str = "F") -> np.ndarray:
    """Channels of unlike means and spreads, one far from zero, half of the voxels empty."""
    generator = np.random.default_rng(1)
    mean, spread = np.array([[900, 4e4, 1], [300, 1, 5e-3]])[..., None, None, None]
    data = generator.normal(0, 1, (3, 9, 7, 37)) * spread + mean
    data *= generator.random((9, 7, 37)) < 0.5
    return np.asarray(data, np.float32, order=order)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("codes", "order"), [("LPS", "F"), ("LPS", "C"), ("RAS", "F"), ("SAR", "C"), ("PIL", "F")]
)
def test_it_is_the_float64_z_score(device: str, codes: str, order: str) -> None:
    volume = volume_of(scan(order), codes)
    # flair where the model wants it, say: neither C nor F order
    volume = replace(volume, data=volume.data[[2, 0, 1]][:, ::-1])
    exact = np.moveaxis(canonical(volume.data.astype(np.float64), volume.affine), -1, 0)
    mask = (exact.sum(1, keepdims=True) > 0) & np.ones_like(exact, bool)
    expected = np.zeros_like(exact)
    for channel in range(3):
        inside = exact[:, channel][mask[:, channel]]
        expected[:, channel][mask[:, channel]] = (inside - inside.mean()) / inside.std()
    found = to_slices_on(torch.device(device), volume)
    assert found.dtype == torch.float32 and found.is_contiguous() and found.device.type == device
    np.testing.assert_allclose(found.cpu(), expected, rtol=1.3e-7, atol=1e-9)
    np.testing.assert_allclose(found.cpu(), to_slices(volume), rtol=2.5e-7, atol=1e-9)


@pytest.mark.parametrize("device", DEVICES)
def test_voxels_outside_the_mask_are_zero_and_constants_too(device: str) -> None:
    # two inside, two outside whose modalities sum to zero and below; b is constant inside
    data = np.array([[0.0, 1.0, 3.0, 5.0, 4.0], [0.0, 7.0, 7.0, -5.0, -6.0]]).reshape(2, 1, 1, 5)
    found = to_slices_on(torch.device(device), volume_of(data))
    np.testing.assert_array_equal(found.cpu().reshape(5, 2).T, [[0, -1, 1, 0, 0], [0] * 5])
    for value in (0, -1):
        blank = to_slices_on(torch.device(device), volume_of(np.full((2, 4, 4, 4), value)))
        assert blank.shape == (4, 2, 4, 4) and not blank.any()


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_not_finite_is_refused(device: str) -> None:
    """As by `load_volume`: arrays of one's own, too."""
    for value in (np.nan, np.inf, -np.inf):
        volume = volume_of(scan())
        volume.data[1, 4, 3, 20] = value
        for window in (None, (-160, 240)):
            with pytest.raises(VolumeError, match="voxels are NaN or infinite; expected finite"):
                to_slices_on(torch.device(device), volume, window)
            with pytest.raises(VolumeError, match="voxels are NaN or infinite; expected finite"):
                to_slices(volume, window_hu=window)


@pytest.mark.parametrize("device", DEVICES)
def test_a_hounsfield_window_is_that_of_the_cpu(device: str) -> None:
    volume = volume_of(np.random.default_rng(0).normal(0, 400, (1, 6, 5, 4)), "RAS")
    found = to_slices_on(torch.device(device), volume, (-160, 240.7))
    np.testing.assert_array_equal(found.cpu(), to_slices(volume, window_hu=(-160, 240.7)))
    with pytest.raises(ValueError, match="window_hu is 3, 3; expected ascending"):
        to_slices_on(torch.device(device), volume, (3, 3))


@pytest.mark.parametrize("device", DEVICES)
def test_a_real_case(device: str, real_data: Path) -> None:
    """As on the CPU but where a float64 rounds another way."""
    volume = load_volume(real_data / "brats2021" / "BraTS2021_00000")
    found, expected = to_slices_on(torch.device(device), volume).cpu().numpy(), to_slices(volume)
    moved = found != expected
    print(f"values moved by a rounding: {moved.mean():.1e}")
    assert moved.mean() < 1e-5
    np.testing.assert_allclose(found, expected, rtol=1.3e-7)


def test_a_volume_without_room_on_the_device_is_normalised_on_the_cpu(monkeypatch) -> None:
    model = build_med_danet_v2("unet-12", 3, 3, crop_sizes=(16,))
    predictor = VolumePredictor(model, "cpu", executor="eager")
    predictor.device = torch.device("cuda")
    volume, asked = volume_of(scan()), []

    def no_room(*arguments):
        asked.append(arguments)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(predictor_module, "to_slices_on", no_room)
    np.testing.assert_array_equal(predictor._slices(volume), to_slices(volume))
    assert asked == [(torch.device("cuda"), volume, None)]
