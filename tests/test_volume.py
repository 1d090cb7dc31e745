"""Orientation against nibabel, normalisation by hand and in float64, the papers' windows."""

from __future__ import annotations

from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
from nibabel import orientations
from scipy.spatial.transform import Rotation

from meddanet.data import (
    Volume,
    canonical,
    from_canonical,
    from_slices,
    load_volume,
    normalize,
    to_slices,
    window_origins,
)
from meddanet.data.axes import skew, tilt

CODES = [
    "".join(letters) for axes in permutations(("RL", "AP", "SI")) for letters in product(*axes)
]


def affine_of(codes: str, tilt: float = 0.0) -> np.ndarray:
    """Anisotropic affine whose voxel axes point to `codes`, turned by `tilt` degrees."""
    directions = np.zeros((3, 3))
    for axis, (world, sign) in enumerate(orientations.axcodes2ornt(codes).astype(int)):
        directions[world, axis] = sign
    affine = np.eye(4)
    turn = Rotation.from_rotvec(np.array([1, -2, 1.5]) / 2.69 * tilt, degrees=True).as_matrix()
    affine[:3, :3] = turn @ directions @ np.diag([0.5, 1.0, 3.0])
    affine[:3, 3] = (-90, 120, 33)
    return affine


def volume_of(data: np.ndarray, affine: np.ndarray) -> Volume:
    names = tuple(f"m{index}" for index in range(len(data)))
    return Volume(data.astype(np.float32), affine, None, names, "files", "case")


@pytest.mark.parametrize("tilt", [0, 20])
@pytest.mark.parametrize("codes", CODES)
def test_every_orientation_becomes_lps_as_nibabel_says_and_comes_back(
    codes: str, tilt: float
) -> None:
    array = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    affine = affine_of(codes, tilt)
    transform = orientations.ornt_transform(
        orientations.io_orientation(affine), orientations.axcodes2ornt("LPS")
    )
    expected = np.stack([orientations.apply_orientation(part, transform) for part in array])
    result = canonical(array, affine)
    np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(from_canonical(result, affine), array)
    assert codes == "".join(orientations.aff2axcodes(affine))


def test_the_48_orientations_are_48() -> None:
    assert ["".join(orientations.aff2axcodes(affine_of(codes))) for codes in CODES] == CODES
    assert len(set(CODES)) == 48


def test_lps_files_stay_as_they_are() -> None:
    array = np.arange(24).reshape(2, 3, 4)
    np.testing.assert_array_equal(canonical(array, np.diag([-1.0, -1.0, 1.0, 1.0])), array)


def test_canonical_axes_point_left_posterior_superior_for_any_mild_tilt() -> None:
    for angles in np.random.default_rng(0).uniform(-25, 25, (50, 3)):
        affine = np.eye(4)
        affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
        array = np.zeros((4, 4, 4))
        array[0, 0, 3] = 1  # the corner furthest to left, posterior (low x, low y) and superior
        assert canonical(array, affine)[3, 3, 3] == 1


def test_normalize_by_hand() -> None:
    # voxels: background, two inside, two outside whose modalities sum to zero and below
    a, b = [0.0, 1.0, 3.0, 5.0, 4.0], [0.0, 7.0, 7.0, -5.0, -6.0]
    result = normalize(np.array([a, b]).reshape(2, 5, 1, 1))
    # a: mean 2, population std 1; b is constant inside
    np.testing.assert_array_equal(result.reshape(2, 5), [[0, -1, 1, 0, 0], [0] * 5])
    assert result.dtype == np.float32


@pytest.mark.parametrize("order", ["C", "F"])
def test_normalize_is_the_float64_z_score_in_any_memory_order(order: str) -> None:
    generator = np.random.default_rng(1)
    data = generator.normal(900, 300, (3, 9, 7, 5)) * (generator.random((9, 7, 5)) < 0.4)
    data = np.asarray(data, np.float32, order=order)[:, ::-1]
    exact = data.astype(np.float64)
    mask = exact.sum(0) > 0
    expected = np.zeros_like(exact)
    for channel in range(3):
        inside = exact[channel][mask]
        expected[channel][mask] = (inside - inside.mean()) / inside.std(ddof=0)
    result = normalize(data)
    np.testing.assert_allclose(result, expected, rtol=1.3e-6, atol=1e-5)
    assert (result[:, ~mask] == 0).all()


def test_normalize_keeps_blank_and_constant_volumes_silent() -> None:
    with np.errstate(all="raise"):
        assert not normalize(np.zeros((2, 4, 4, 4), np.float32)).any()
        assert not normalize(np.full((2, 4, 4, 4), 0.1, np.float32)).any()


@pytest.mark.parametrize("codes", ["LPS", "RAS", "SAR", "PIL"])
def test_slices_are_axial_and_labels_return_to_their_voxels(codes: str) -> None:
    affine = affine_of(codes)
    data = np.random.default_rng(2).integers(1, 1000, (2, 4, 5, 6))
    volume = volume_of(data, affine)
    slices = to_slices(volume)
    expected = np.moveaxis(canonical(normalize(volume.data), affine), -1, 0)
    np.testing.assert_array_equal(slices, expected)
    assert slices.flags.c_contiguous and slices.dtype == np.float32
    # labels computed from the slices land on the voxels that they were computed from
    labels = from_slices(slices[:, 0] > 0.5, volume)
    np.testing.assert_array_equal(labels, normalize(volume.data)[0] > 0.5)
    assert labels.dtype == np.uint8 and labels.flags.f_contiguous


def test_the_first_slice_is_the_lowest() -> None:
    affine = affine_of("ILP")  # axis 0 points down
    data = np.zeros((1, 6, 4, 5))
    data[0, 5, 1, 2] = 1  # lowest slice
    data[0, 0, 3, 3] = 3
    slices = to_slices(volume_of(data, affine))
    assert slices.shape == (6, 1, 4, 5)
    assert slices[0, 0, 1, 2] == -1 and slices[5, 0, 3, 3] == 1


def test_from_slices_refuses_another_shape() -> None:
    volume = volume_of(np.ones((1, 4, 5, 6)), affine_of("LPS"))
    with pytest.raises(ValueError, match=r"case have shape \(6, 5, 4\)"):
        from_slices(np.zeros((6, 5, 4), np.uint8), volume)


def test_a_volume_equals_itself_alone() -> None:
    """Arrays compare to arrays, of which there is no one truth and no hash."""
    data, affine = np.zeros((1, 2, 3, 4), np.float32), np.eye(4)
    one, other = (Volume(data, affine, None, ("t1",)) for _ in range(2))
    assert one != other and [other, one].index(one) == 1 and len({one, other, one}) == 2


def test_spacing_follows_the_file_axes() -> None:
    assert volume_of(np.ones((1, 2, 2, 2)), affine_of("SAR", 20)).spacing == pytest.approx(
        (0.5, 1.0, 3.0)
    )


@pytest.mark.parametrize("codes", CODES[::7])
def test_a_sheared_voxel_holds_what_it_held_upright(codes: str) -> None:
    """A tilted gantry shifts slices that keep their area and their distance."""
    upright = affine_of(codes, 20)
    tilted = upright.copy()
    tilted[:3, 2] += np.tan(np.radians(30)) * 3 * upright[:3, 1]
    assert volume_of(np.ones((1, 2, 2, 2)), tilted).spacing[2] == pytest.approx(
        3 / np.cos(np.radians(30))
    )
    for affine in (upright, tilted):
        voxel_ml = volume_of(np.ones((1, 2, 2, 2)), affine).voxel_ml
        assert voxel_ml == pytest.approx(0.5 * 1 * 3 / 1000)
    assert skew(upright) == pytest.approx(0, abs=1e-5) and skew(tilted) == pytest.approx(30)


@pytest.mark.parametrize("codes", CODES[::5])
@pytest.mark.parametrize("axis", range(3))
def test_a_turn_about_one_axis_is_the_tilt(codes: str, axis: int) -> None:
    for angle in (0, 10, 44):
        turn = np.eye(4)
        turn[:3, :3] = Rotation.from_rotvec(np.eye(3)[axis] * angle, degrees=True).as_matrix()
        assert tilt(turn @ affine_of(codes)) == pytest.approx(angle, abs=1e-5)


@pytest.mark.parametrize(
    ("size", "origins"),
    [(240, [0, 42, 84, 112]), (160, [0, 32]), (128, [0]), (100, [0]), (212, [0, 42, 84])],
)
def test_window_origins_of_the_papers(size: int, origins: list[int]) -> None:
    assert window_origins(size) == origins


def test_windows_cover_every_pixel_and_stay_inside() -> None:
    for size, window in product(range(1, 70), (3, 8, 32)):
        origins = window_origins(size, window)
        covered = {pixel for origin in origins for pixel in range(origin, origin + window)}
        assert covered >= set(range(size)) and origins == sorted(set(origins))
        assert origins[-1] + window == max(size, window)


def test_window_origins_refuse_a_window_without_stride() -> None:
    with pytest.raises(ValueError, match="window 2"):
        window_origins(240, 2)


def test_a_real_case_is_normalised_over_its_joint_brain_mask(real_data: Path) -> None:
    volume = load_volume(real_data / "brats2021" / "BraTS2021_00000")
    slices = to_slices(volume).astype(np.float64)
    brain = np.moveaxis(volume.data.sum(0, dtype=np.float64) > 0, -1, 0)
    for channel in range(4):
        inside = slices[:, channel][brain]
        assert abs(inside.mean()) < 1e-6 and abs(inside.std() - 1) < 1e-6
        assert not slices[:, channel][~brain].any()
