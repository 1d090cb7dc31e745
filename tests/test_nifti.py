"""Reading volumes against nibabel."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from meddanet.data import (
    VolumeError,
    find_cases,
    load_labels,
    load_volume,
)

MRI = ("flair", "t1ce", "t1", "t2")
AFFINE = np.array([[-1.0, 0, 0, 3], [0, -1, 0, 239], [0, 0, 2, -7], [0, 0, 0, 1]])
SHAPE = (6, 5, 4)


def image(seed: int = 0, shape: tuple[int, ...] = SHAPE, dtype: type = np.int16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 3000, shape).astype(dtype)


def write(
    path: Path, data: np.ndarray, affine: np.ndarray = AFFINE, form: type = nib.Nifti1Image
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(form(data, affine), path)
    return path


def write_case(folder: Path, name: str = "p1") -> dict[str, Path]:
    return {
        kind: write(folder / f"{name}_{kind}.nii.gz", image(seed)) for seed, kind in enumerate(MRI)
    }


def error_of(call: Callable[[], object]) -> str:
    with pytest.raises(VolumeError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_case_folder(tmp_path: Path) -> None:
    files = write_case(tmp_path)
    volume = load_volume(tmp_path)
    assert (volume.modalities, volume.convention, volume.name) == (MRI, "brats2021", "p1")
    assert volume.data.shape == (4, *SHAPE) and volume.data.dtype == np.float32
    for data, kind in zip(volume.data, MRI, strict=True):
        np.testing.assert_array_equal(data, nib.load(files[kind]).get_fdata())
    np.testing.assert_array_equal(volume.affine, AFFINE)
    assert volume.spacing == (1, 1, 2)


def test_modalities_choose_and_order_the_channels(tmp_path: Path) -> None:
    write_case(tmp_path)
    volume = load_volume(tmp_path, modalities=("T2", "T1c"))
    assert volume.modalities == ("t2", "t1ce")
    np.testing.assert_array_equal(volume.data, [image(3), image(1)])


def test_named_files_and_cases(tmp_path: Path) -> None:
    files = write_case(tmp_path)
    named = {"t2w": str(files["t2"]), "FLAIR": files["flair"]}
    volume = load_volume(named)
    assert volume.modalities == ("flair", "t2")
    np.testing.assert_array_equal(volume.data, [image(0), image(3)])
    np.testing.assert_array_equal(load_volume(find_cases(tmp_path)[0]).data[3], image(3))


def test_a_four_dimensional_file(tmp_path: Path) -> None:
    data = image(shape=(*SHAPE, 4))
    path = write(tmp_path / "imagesTr" / "BRATS_001.nii.gz", data)
    volume = load_volume(path)
    assert (volume.modalities, volume.convention) == (MRI, "msd")
    # the file's own order is FLAIR, T1w, T1gd, T2w
    np.testing.assert_array_equal(volume.data, np.moveaxis(data, 3, 0)[[0, 2, 1, 3]])
    np.testing.assert_array_equal(load_volume(path, ("t2",)).data, [data[..., 3]])


def test_unknown_channels_are_named_by_the_caller(tmp_path: Path) -> None:
    data = image(shape=(*SHAPE, 2))
    path = write(tmp_path / "scan.nii.gz", data)
    assert "scan: what its channels are is unknown" in error_of(lambda: load_volume(path))
    volume = load_volume(path, ("t2", "flair"))
    assert (volume.modalities, volume.convention) == (("t2", "flair"), "files")
    np.testing.assert_array_equal(volume.data, np.moveaxis(data, 3, 0))
    message = error_of(lambda: load_volume(path, MRI))
    assert message == f"{path}: number of channels is 2, expected 4"


def test_nnunet_files_without_dataset_json(tmp_path: Path) -> None:
    for index in range(2):
        write(tmp_path / f"p_000{index}.nii.gz", image(index))
    assert "unknown" in error_of(lambda: load_volume(tmp_path))
    assert "2 channel files, expected 4" in error_of(lambda: load_volume(tmp_path, MRI))
    volume = load_volume(tmp_path, ("t1", "flair"))
    np.testing.assert_array_equal(volume.data, [image(0), image(1)])


@pytest.mark.parametrize("form", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["u1", "i1", "i2", "u2", "i4", "f4", "f8", "i8"])
def test_every_header_byte_order_and_type(
    tmp_path: Path, form: type, order: str, kind: str
) -> None:
    data = (image() % 100).astype(f"{order}{kind}")
    header = form.header_class(endianness=order)
    header.set_data_dtype(data.dtype)
    path = tmp_path / "scan.nii"
    nib.save(form(data, AFFINE, header), path)
    assert nib.load(path).header.endianness == order
    volume = load_volume({"t1": path})
    np.testing.assert_array_equal(volume.data[0], nib.load(path).get_fdata())
    np.testing.assert_array_equal(volume.affine, AFFINE)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_slope_and_intercept(tmp_path: Path, suffix: str) -> None:
    stored = nib.Nifti1Image(image(), AFFINE)
    stored.header.set_slope_inter(0.37, -1024)
    raw = bytearray(nib.Nifti1Image(image(), AFFINE, stored.header).to_bytes())
    raw[112:120] = np.array([0.37, -1024], "<f4").tobytes()
    path = tmp_path / f"scan{suffix}"
    path.write_bytes(gzip.compress(raw) if suffix == ".nii.gz" else raw)
    expected = nib.load(path).get_fdata()
    assert expected.min() < -900
    np.testing.assert_array_equal(load_volume({"ct": path}).data[0], expected.astype(np.float32))


def test_gzip_members_extensions_and_trailing_bytes(tmp_path: Path) -> None:
    stored = nib.Nifti1Image(image(), AFFINE)
    stored.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 900))
    raw = stored.to_bytes()
    contents = {
        "plain.nii": raw,
        "misnamed.nii": gzip.compress(raw),
        "unzipped.nii.gz": raw,
        "members.nii.gz": gzip.compress(raw[:500]) + gzip.compress(raw[500:]),
        "longer.nii.gz": gzip.compress(raw + bytes(5000)),
        "padded.nii.gz": gzip.compress(raw) + bytes(100),
        "longer.nii": raw + bytes(5000),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        np.testing.assert_array_equal(load_volume({"t1": tmp_path / name}).data[0], image())


def test_headers_without_forms_take_nibabels_base_affine(tmp_path: Path) -> None:
    path = tmp_path / "scan.nii"
    header = nib.Nifti1Header()
    header.set_data_shape(SHAPE)
    header.set_zooms((2, 3, 4))
    nib.save(nib.Nifti1Image(image(), None, header), path)
    np.testing.assert_array_equal(load_volume({"t1": path}).affine, nib.load(path).affine)


def test_rounding_noise_between_affines_is_no_difference(tmp_path: Path) -> None:
    files = write_case(tmp_path)
    tilted = AFFINE.copy()
    tilted[0, 1] = 2e-8
    write(files["t2"], image(3), tilted)
    assert load_volume(tmp_path).data.shape == (4, *SHAPE)


def test_real_volumes_load_exactly_as_nibabel_loads_them(real_data: Path) -> None:
    folder = real_data / "brats2021" / "BraTS2021_00006"
    volume = load_volume(folder)
    for data, kind in zip(volume.data, MRI, strict=True):
        expected = nib.load(folder / f"BraTS2021_00006_{kind}.nii.gz")
        np.testing.assert_array_equal(data, expected.get_fdata())
        np.testing.assert_array_equal(volume.affine, expected.affine)
    labels = load_labels(folder / "BraTS2021_00006_seg.nii.gz", like=volume)
    assert set(np.unique(labels)) == {0, 1, 2, 4}
    for case in find_cases(real_data / "hippocampus")[:3]:
        np.testing.assert_array_equal(
            load_volume(case, ("t1",)).data[0], nib.load(case.files).get_fdata()
        )
