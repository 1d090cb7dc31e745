"""The synthetic case against what real cases look like."""

from __future__ import annotations

import hashlib

import nibabel as nib
import numpy as np
import pytest

from meddanet.data.phantom import Phantom, make_phantom, write_phantom

SMALL = (48, 48, 24)
HALF = (120, 120, 78)
FLAIR, T1CE, T1, T2 = range(4)


@pytest.fixture(scope="module")
def half() -> Phantom:
    return make_phantom(0, HALF)


def standardised(phantom: Phantom) -> tuple[np.ndarray, np.ndarray]:
    """Brain mask and [4, H, W, D] in the brain's standard deviations from its mean."""
    brain = phantom.data.sum(0) > 0
    inside = phantom.data[:, brain].astype(np.float64)
    mean, std = inside.mean(1), inside.std(1)
    return brain, (phantom.data - mean[:, None, None, None]) / std[:, None, None, None]


def test_same_seed_gives_the_same_case_and_another_seed_another() -> None:
    first, second, other = make_phantom(3, SMALL), make_phantom(3, SMALL), make_phantom(4, SMALL)
    np.testing.assert_array_equal(first.data, second.data)
    np.testing.assert_array_equal(first.labels, second.labels)
    assert (first.data != other.data).any() and (first.labels != other.labels).any()


def test_labels_are_the_same_on_every_platform() -> None:
    digest = hashlib.sha256(make_phantom(0, SMALL).labels.tobytes()).hexdigest()
    assert digest[:16] == "459ea741e0abaafb"


@pytest.mark.parametrize("shape", [(16, 16, 16), SMALL, (61, 50, 33)])
@pytest.mark.parametrize("seed", range(6))
def test_every_shape_has_a_brain_with_a_tumour_in_it(
    seed: int, shape: tuple[int, int, int]
) -> None:
    phantom = make_phantom(seed, shape)
    assert phantom.data.shape == (4, *shape) and phantom.data.dtype == np.float32
    assert phantom.labels.shape == shape and phantom.labels.dtype == np.uint8
    assert set(np.unique(phantom.labels)) <= {0, 1, 2, 3} and phantom.labels.any()
    brain = phantom.data[0] > 0
    for channel in phantom.data:
        np.testing.assert_array_equal(channel > 0, brain)
    assert (phantom.data[:, ~brain] == 0).all()
    assert brain[phantom.labels > 0].all()
    np.testing.assert_array_equal(phantom.data, np.rint(phantom.data))
    assert phantom.data.max() <= 32767
    assert (phantom.labels == 0).all((0, 1)).mean() >= 0.4


def test_brain_is_as_large_as_a_real_one(half: Phantom) -> None:
    """Real cases: 1.25 to 1.73 litres, 133-143 x 160-181 x 126-147 mm, nothing at the border."""
    brain = half.data[0] > 0
    assert 1.2e6 < brain.sum() * 8 < 1.8e6
    where = np.argwhere(brain)
    extent = (where.max(0) - where.min(0) + 1) * 2
    assert (extent >= [125, 150, 120]).all() and (extent <= [155, 190, 152]).all()


def test_tissues_contrast_as_in_real_cases() -> None:
    """Bounds from the BraTS 2021 cases, in standard deviations from the brain's mean."""
    for seed in (0, 1, 2):
        phantom = make_phantom(seed, HALF)
        brain, z = standardised(phantom)
        core, oedema, enhancing = (phantom.labels == k for k in (1, 2, 3))
        healthy = brain & (phantom.labels == 0)
        assert oedema.any() and enhancing.any() and core.any()
        assert z[FLAIR, oedema].mean() > 1 and z[T2, oedema].mean() > 0.2
        assert -1 < z[T1CE, oedema].mean() < 0.8
        assert z[T1CE, enhancing].mean() > 1
        for other in (core, oedema, healthy):
            assert z[T1CE, enhancing].mean() > z[T1CE, other].mean() + 1
        assert z[T1CE, core].mean() < z[T1CE, enhancing].mean() - 1.5
        assert z[T2, core].mean() > 1
        fluid = healthy & (z[T2] > 2.5)
        assert fluid.any()
        assert z[FLAIR, fluid].mean() < -1 and z[T1, fluid].mean() < -1


def test_lesions_vary_with_the_seed() -> None:
    cases = [make_phantom(seed, SMALL).labels for seed in range(40)]
    volumes = [(labels > 0).sum() for labels in cases]
    assert max(volumes) > 4 * min(volumes)
    rims = [(labels == 3).any() for labels in cases]
    assert any(rims)
    assert not all(rims)


def test_written_case_reads_back(tmp_path) -> None:
    folder = write_phantom(tmp_path / "new", seed=5, name="case_7", shape=SMALL)
    assert folder == tmp_path / "new" / "case_7"
    phantom = make_phantom(5, SMALL)
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        f"case_7_{part}.nii.gz" for part in ("flair", "t1ce", "t1", "t2", "seg")
    )
    for modality, expected in zip(("flair", "t1ce", "t1", "t2"), phantom.data, strict=True):
        image = nib.load(folder / f"case_7_{modality}.nii.gz")
        assert image.get_data_dtype() == np.int16
        np.testing.assert_array_equal(np.asarray(image.dataobj), expected)
        assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
        assert image.header.get_zooms() == (1, 1, 1)
    seg = nib.load(folder / "case_7_seg.nii.gz")
    assert seg.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(seg.dataobj), np.array([0, 1, 2, 4])[phantom.labels])


@pytest.mark.parametrize(
    ("seed", "shape", "message"),
    [(-1, SMALL, "seed is -1"), (0, (48, 48, 8), "at least 16"), (0, (48, 48), "three sides")],
)
def test_bad_arguments_say_what_would_be_right(seed, shape, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_phantom(seed, shape)
