"""Reading volumes against nibabel."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from meddanet.data import find_cases, load_labels, load_volume, save_volume


def test_a_case_folder(scans, tmp_path: Path) -> None:
    files = scans.write_case(tmp_path)
    volume = load_volume(tmp_path)
    assert (volume.modalities, volume.convention, volume.name) == (scans.MRI, "brats2021", "p1")
    assert volume.data.shape == (4, *scans.SHAPE) and volume.data.dtype == np.float32
    for data, kind in zip(volume.data, scans.MRI, strict=True):
        np.testing.assert_array_equal(data, nib.load(files[kind]).get_fdata())
    np.testing.assert_array_equal(volume.affine, scans.AFFINE)
    assert volume.spacing == (1, 1, 2)


@pytest.mark.parametrize(("unit", "factor"), [
    ("meter", 0.001), ("mm", 1), ("micron", 1000), ("unknown", 1)
])
def test_a_spacing_is_in_millimetres_whatever_the_unit(scans, tmp_path: Path, unit, factor) -> None:
    """The labels keep the scan's own grid and unit: programs lay one on the other."""
    affine = np.diag([factor, factor, 2 * factor, 1])
    image = nib.Nifti1Image(scans.image(), affine)
    image.header.set_xyzt_units(unit, "sec")
    nib.save(image, tmp_path / "flair.nii")
    volume = load_volume({"flair": tmp_path / "flair.nii"})
    assert volume.spacing == pytest.approx((1, 1, 2))
    assert volume.voxel_ml == pytest.approx(0.002)
    save_volume(np.zeros(scans.SHAPE, np.uint8), tmp_path / "labels.nii", volume)
    labels = nib.load(tmp_path / "labels.nii")
    np.testing.assert_allclose(labels.affine, affine, rtol=1e-6)
    assert labels.header.get_xyzt_units()[0] == unit


def test_modalities_choose_and_order_the_channels(scans, tmp_path: Path) -> None:
    scans.write_case(tmp_path)
    volume = load_volume(tmp_path, modalities=("T2", "T1c"))
    assert volume.modalities == ("t2", "t1ce")
    np.testing.assert_array_equal(volume.data, [scans.image(3), scans.image(1)])


def test_named_files_and_cases(scans, tmp_path: Path) -> None:
    files = scans.write_case(tmp_path)
    named = {"t2w": str(files["t2"]), "FLAIR": files["flair"]}
    volume = load_volume(named)
    assert volume.modalities == ("flair", "t2")
    np.testing.assert_array_equal(volume.data, [scans.image(0), scans.image(3)])
    np.testing.assert_array_equal(load_volume(find_cases(tmp_path)[0]).data[3], scans.image(3))


def test_a_four_dimensional_file(scans, tmp_path: Path) -> None:
    data = scans.image(shape=(*scans.SHAPE, 4))
    path = scans.write(tmp_path / "imagesTr" / "BRATS_001.nii.gz", data)
    volume = load_volume(path)
    assert (volume.modalities, volume.convention) == (scans.MRI, "msd")
    # the file's own order is FLAIR, T1w, T1gd, T2w
    np.testing.assert_array_equal(volume.data, np.moveaxis(data, 3, 0)[[0, 2, 1, 3]])
    np.testing.assert_array_equal(load_volume(path, ("t2",)).data, [data[..., 3]])


def test_unknown_channels_are_named_by_the_caller(scans, tmp_path: Path) -> None:
    data = scans.image(shape=(*scans.SHAPE, 2))
    path = scans.write(tmp_path / "scan.nii.gz", data)
    assert "scan: what its channels are is unknown" in scans.error(lambda: load_volume(path))
    volume = load_volume(path, ("t2", "flair"))
    assert (volume.modalities, volume.convention) == (("t2", "flair"), "files")
    np.testing.assert_array_equal(volume.data, np.moveaxis(data, 3, 0))
    message = scans.error(lambda: load_volume(path, scans.MRI))
    assert message == f"{path}: number of channels is 2, expected 4"


def test_nnunet_files_without_dataset_json(scans, tmp_path: Path) -> None:
    for index in range(2):
        scans.write(tmp_path / f"p_000{index}.nii.gz", scans.image(index))
    assert "unknown" in scans.error(lambda: load_volume(tmp_path))
    assert "2 channel files, expected 4" in scans.error(lambda: load_volume(tmp_path, scans.MRI))
    volume = load_volume(tmp_path, ("t1", "flair"))
    np.testing.assert_array_equal(volume.data, [scans.image(0), scans.image(1)])


@pytest.mark.parametrize("form", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["u1", "i1", "i2", "u2", "i4", "f4", "f8", "i8"])
def test_every_header_byte_order_and_type(
    scans, tmp_path: Path, form: type, order: str, kind: str
) -> None:
    data = (scans.image() % 100).astype(f"{order}{kind}")
    header = form.header_class(endianness=order)
    header.set_data_dtype(data.dtype)
    path = tmp_path / "scan.nii"
    nib.save(form(data, scans.AFFINE, header), path)
    assert nib.load(path).header.endianness == order
    volume = load_volume({"t1": path})
    np.testing.assert_array_equal(volume.data[0], nib.load(path).get_fdata())
    np.testing.assert_array_equal(volume.affine, scans.AFFINE)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_slope_and_intercept(scans, tmp_path: Path, suffix: str) -> None:
    stored = nib.Nifti1Image(scans.image(), scans.AFFINE)
    stored.header.set_slope_inter(0.37, -1024)
    raw = bytearray(nib.Nifti1Image(scans.image(), scans.AFFINE, stored.header).to_bytes())
    raw[112:120] = np.array([0.37, -1024], "<f4").tobytes()
    path = tmp_path / f"scan{suffix}"
    path.write_bytes(gzip.compress(raw) if suffix == ".nii.gz" else raw)
    expected = nib.load(path).get_fdata()
    assert expected.min() < -900
    np.testing.assert_array_equal(load_volume({"ct": path}).data[0], expected.astype(np.float32))


def test_gzip_members_extensions_and_trailing_bytes(scans, tmp_path: Path) -> None:
    stored = nib.Nifti1Image(scans.image(), scans.AFFINE)
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
        np.testing.assert_array_equal(load_volume({"t1": tmp_path / name}).data[0], scans.image())


def test_headers_without_forms_take_nibabels_base_affine(scans, tmp_path: Path) -> None:
    path = tmp_path / "scan.nii"
    header = nib.Nifti1Header()
    header.set_data_shape(scans.SHAPE)
    header.set_zooms((2, 3, 4))
    nib.save(nib.Nifti1Image(scans.image(), None, header), path)
    np.testing.assert_array_equal(load_volume({"t1": path}).affine, nib.load(path).affine)


def test_rounding_noise_between_affines_is_no_difference(scans, tmp_path: Path) -> None:
    files = scans.write_case(tmp_path)
    tilted = scans.AFFINE.copy()
    tilted[0, 1] = 2e-8
    scans.write(files["t2"], scans.image(3), tilted)
    assert load_volume(tmp_path).data.shape == (4, *scans.SHAPE)


def test_real_volumes_load_exactly_as_nibabel_loads_them(scans, real_data: Path) -> None:
    folder = real_data / "brats2021" / "BraTS2021_00006"
    volume = load_volume(folder)
    for data, kind in zip(volume.data, scans.MRI, strict=True):
        expected = nib.load(folder / f"BraTS2021_00006_{kind}.nii.gz")
        np.testing.assert_array_equal(data, expected.get_fdata())
        np.testing.assert_array_equal(volume.affine, expected.affine)
    labels = load_labels(folder / "BraTS2021_00006_seg.nii.gz", like=volume)
    assert set(np.unique(labels)) == {0, 1, 2, 4}
    for case in find_cases(real_data / "hippocampus")[:3]:
        np.testing.assert_array_equal(
            load_volume(case, ("t1",)).data[0], nib.load(case.files).get_fdata()
        )
