"""Label files: values in, geometry out, never half-written."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from meddanet.data import Volume, load_labels, load_volume, save_image, save_volume


@pytest.fixture
def volume(scans, tmp_path: Path) -> Volume:
    scans.write_case(tmp_path / "case")
    return load_volume(tmp_path / "case")


def test_labels_keep_their_values(scans, tmp_path: Path, volume: Volume) -> None:
    for dtype, top in ((np.uint8, 4), (np.float64, 4), (np.int32, 117), (np.int16, 300)):
        labels = np.resize([0, 1, 2, top], scans.SHAPE).astype(dtype)
        path = scans.write(tmp_path / "labels.nii.gz", labels)
        result = load_labels(path, like=volume)
        np.testing.assert_array_equal(result, labels)
        assert result.dtype == (np.uint16 if top > 255 else np.uint8)


@pytest.mark.parametrize("bad", [0.5, 1.0001, -1, np.nan, np.inf, 70000])
def test_values_that_are_no_labels(scans, tmp_path: Path, bad: float) -> None:
    data = np.zeros(scans.SHAPE)
    data[2, 2, 2] = bad
    path = scans.write(tmp_path / "p_seg.nii", data)
    assert scans.error(lambda: load_labels(path)) == (
        f"{path}: is no segmentation, it holds {float(bad)}; expected whole numbers from 0 to 65535"
    )


def write_scaled(path: Path, data: np.ndarray, dtype: type = np.int16) -> Path:
    """Writes floats as nibabel does where a header asks for integers."""
    image = nib.Nifti1Image(data, np.eye(4))
    image.set_data_dtype(dtype)
    nib.save(image, path)
    return path


@pytest.mark.parametrize(("dtype", "top"), [
    (np.int16, 1), (np.int16, 4), (np.int16, 117), (np.int16, 254), (np.int16, 1000), (np.uint8, 4),
])
def test_labels_that_were_scaled_are_whole_again(scans, tmp_path, dtype: type, top: int) -> None:
    labels = np.resize(np.linspace(0, top, min(top, 119) + 1).round(), scans.SHAPE)
    path = write_scaled(tmp_path / "p_seg.nii", labels, dtype)
    assert top == 1 or not np.array_equal(nib.load(path).dataobj, labels)
    np.testing.assert_array_equal(load_labels(path), labels)


def test_an_image_that_was_scaled_is_no_segmentation(scans, tmp_path: Path) -> None:
    path = write_scaled(tmp_path / "p_seg.nii", np.resize([0, 1, 1.02, 4], scans.SHAPE))
    assert scans.error(lambda: load_labels(path)).startswith(f"{path}: is no segmentation, it ho")


def test_labels_of_another_grid(scans, tmp_path: Path, volume: Volume) -> None:
    path = scans.write(tmp_path / "p_seg.nii", np.zeros((6, 5, 5), np.uint8))
    assert "differs from (6, 5, 4) of volume p1" in scans.error(lambda: load_labels(path, volume))
    other = np.diag([1.0, 1, 2, 1])
    path = scans.write(tmp_path / "p_seg.nii", np.zeros(scans.SHAPE, np.uint8), other)
    assert "the affine differs" in scans.error(lambda: load_labels(path, volume))
    path = scans.write(tmp_path / "p_seg.nii", np.zeros((*scans.SHAPE, 2), np.uint8))
    assert "number of channels is 2, expected 1" in scans.error(lambda: load_labels(path, volume))


@pytest.mark.parametrize("oblique", [False, True])
def test_labels_in_another_voxel_order_are_turned(tmp_path: Path, oblique: bool) -> None:
    """As nibabel turns them, in all 48 orders."""
    affine = np.diag([-1.5, -1.0, 2.0, 1])
    affine[:3, 3] = 20, 30, -9
    if oblique:
        c, s = np.cos(0.5), np.sin(0.5)
        affine = np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ affine
    labels = np.random.default_rng(0).integers(0, 5, (6, 5, 4)).astype(np.uint8)
    image = nib.Nifti1Image(labels, affine)
    volume = Volume(np.zeros((1, 6, 5, 4), np.float32), image.affine, image.header, ("t1",))
    for axes in permutations(range(3)):
        for signs in product((1, -1), repeat=3):
            turned = image.as_reoriented(np.array(list(zip(axes, signs, strict=True))))
            nib.save(turned, tmp_path / "labels.nii")
            result = load_labels(tmp_path / "labels.nii", like=volume)
            np.testing.assert_array_equal(result, labels)
            np.testing.assert_array_equal(load_labels(tmp_path / "labels.nii"), turned.dataobj)
    # by a voxel beside the grid, though in the volume's order of axes
    moved = nib.Nifti1Image(labels[::-1], affine @ np.diag([-1.0, 1, 1, 1]))
    nib.save(moved, tmp_path / "labels.nii")
    with pytest.raises(ValueError, match=r"labels\.nii: the affine differs by up to"):
        load_labels(tmp_path / "labels.nii", like=volume)


def labels_of(volume: Volume) -> np.ndarray:
    return np.resize([0, 1, 2, 4, 0], volume.data.shape[1:]).astype(np.uint8)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("form", [nib.Nifti1Image, nib.Nifti2Image])
def test_d10_labels_carry_the_inputs_geometry(
    scans, tmp_path: Path, suffix: str, form: type
) -> None:
    header = form.header_class(endianness=">")
    header.set_data_dtype(">i2")
    header.set_xyzt_units("mm", "sec")
    source = form(scans.image(shape=(*scans.SHAPE, 4)), None, header)
    qform = np.diag([-1.0, 1.0, 2.0, 1.0])
    source.set_sform(scans.AFFINE, code=4)
    source.set_qform(qform, code=2)
    source.header["descrip"] = b"a patient's name"
    path = tmp_path / f"BRATS_001{suffix}"
    nib.save(source, path)
    volume = load_volume(path)
    out = tmp_path / f"out{suffix}"
    save_volume(labels_of(volume), out, like=volume)
    result = nib.load(out)
    assert type(result) is form and result.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asanyarray(result.dataobj), labels_of(volume))
    np.testing.assert_array_equal(result.affine, scans.AFFINE)
    sform, sform_code = result.get_sform(coded=True)
    stored_qform, qform_code = result.get_qform(coded=True)
    assert (sform_code, qform_code) == (4, 2)
    np.testing.assert_array_equal(sform, scans.AFFINE)
    np.testing.assert_allclose(stored_qform, qform, atol=1e-7)
    assert result.header.get_xyzt_units() == ("mm", "sec")
    assert bytes(result.header["descrip"]).strip(b"\0") == b""
    np.testing.assert_array_equal(load_labels(out, like=volume), labels_of(volume))


@pytest.mark.parametrize("codes", [(1, 1), (2, 0), (0, 3), (0, 0)], ids=str)
def test_labels_of_a_cut_volume_lie_where_it_lies(tmp_path: Path, codes: tuple[int, int]) -> None:
    """As nibabel moves the affine of a cut image, in both forms."""
    path = tmp_path / "scan.nii"
    scan = nib.Nifti1Image(np.random.default_rng(0).normal(size=(6, 7, 8)).astype(np.float32), None)
    axes = np.array([[-1.5, 0, 0, 20], [0, 2, 0, -30], [0, 0, 3, 5], [0, 0, 0, 1]])
    for form, code in zip((scan.header.set_qform, scan.header.set_sform), codes, strict=True):
        form(axes, code)
    nib.save(scan, path)
    volume = load_volume({"flair": path})
    cut = nib.load(path).slicer[2:5, 1:, 3:]
    part = replace(volume, data=volume.data[:, 2:5, 1:, 3:], affine=cut.affine)
    out = tmp_path / "labels.nii.gz"
    save_volume(np.ones(cut.shape, np.uint8), out, like=part)
    saved = nib.load(out)
    np.testing.assert_allclose(saved.affine, cut.affine, atol=1e-4)
    if codes[0]:
        np.testing.assert_allclose(saved.get_qform(), cut.affine, atol=1e-4)
    assert saved.header["sform_code"] == (codes[1] or codes[0] or 1)


def test_a_label_file_of_a_scaled_image_is_not_scaled(scans, tmp_path: Path) -> None:
    raw = bytearray(nib.Nifti1Image(scans.image(), scans.AFFINE).to_bytes())
    raw[112:120] = np.array([0.5, -3], "<f4").tobytes()
    path = tmp_path / "scan.nii"
    path.write_bytes(raw)
    volume = load_volume({"t1": path})
    save_volume(labels_of(volume), tmp_path / "out.nii", like=volume)
    np.testing.assert_array_equal(nib.load(tmp_path / "out.nii").get_fdata(), labels_of(volume))


def test_equal_labels_give_equal_bytes_and_ordinary_permissions(
    tmp_path: Path, volume: Volume
) -> None:
    first, second = tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"
    save_volume(labels_of(volume), first, like=volume)
    save_volume(np.asfortranarray(labels_of(volume), int), second, like=volume)
    assert first.read_bytes() == second.read_bytes()
    (tmp_path / "touched").touch()
    assert first.stat().st_mode == (tmp_path / "touched").stat().st_mode


@pytest.mark.parametrize("bad", [0.5, -1, 256, np.nan])
def test_only_bytes_are_saved(scans, tmp_path: Path, volume: Volume, bad: float) -> None:
    with pytest.raises(ValueError, match="whole numbers from 0 to 255"):
        save_volume(np.full(scans.SHAPE, bad), tmp_path / "out.nii", like=volume)
    with pytest.raises(ValueError, match=r"labels have shape \(4, 5, 6\), expected \(6, 5, 4\)"):
        save_volume(np.zeros((4, 5, 6), np.uint8), tmp_path / "out.nii", like=volume)
    with pytest.raises(ValueError, match="out.mha: expected a name that ends in"):
        save_volume(labels_of(volume), tmp_path / "out.mha", like=volume)


def test_a_read_only_output_folder(scans, tmp_path: Path, volume: Volume) -> None:
    folder = tmp_path / "out"
    folder.mkdir(mode=0o555)
    if os.access(folder, os.W_OK):
        # the superuser writes everywhere but into the kernel's own folder
        folder = Path("/proc")
    path = folder / "p1.nii.gz"
    message = scans.error(lambda: save_volume(labels_of(volume), path, like=volume))
    assert message.startswith(f"{path}: cannot be written (")
    assert message.endswith("; expected a writable folder")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_disk_that_cannot_be_waited_for(
    scans, tmp_path: Path, volume: Volume, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Some file systems have no fsync; what fails in one that has is no matter of permissions."""

    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    path = tmp_path / "p1.nii.gz"
    if number == errno.EIO:
        message = scans.error(lambda: save_volume(labels_of(volume), path, like=volume))
        assert message.endswith("(Input/output error); name a folder on another disk")
        assert not list(tmp_path.glob("*p1*"))
    else:
        save_volume(labels_of(volume), path, like=volume)
        assert np.array_equal(nib.load(path).get_fdata(), labels_of(volume))


def test_an_interrupted_write_leaves_what_was_there(
    scans, tmp_path: Path, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    path = folder / "p1.nii.gz"
    path.write_bytes(b"earlier result")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    message = scans.error(lambda: save_volume(labels_of(volume), path, like=volume))
    assert message.startswith(f"{path}: cannot be written (No space left on device)")
    assert [entry.name for entry in folder.iterdir()] == ["p1.nii.gz"]
    assert path.read_bytes() == b"earlier result"


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32, ">i2"])
def test_images_are_written_as_they_are(scans, tmp_path: Path, dtype: type | str) -> None:
    for data in (scans.image().astype(dtype), scans.image(shape=(*scans.SHAPE, 2)).astype(dtype)):
        save_image(data, tmp_path / "scan.nii.gz", scans.AFFINE)
        result = nib.load(tmp_path / "scan.nii.gz")
        np.testing.assert_array_equal(np.asanyarray(result.dataobj), data)
        np.testing.assert_array_equal(result.affine, scans.AFFINE)
        np.testing.assert_allclose(result.get_qform(), scans.AFFINE, atol=1e-6)
        assert result.header.get_xyzt_units()[0] == "mm"
        assert result.get_data_dtype() == np.dtype(dtype).newbyteorder("<")


@pytest.mark.parametrize("dtype", [bool, np.float16])
def test_images_of_a_type_that_nifti_lacks(scans, tmp_path: Path, dtype: type) -> None:
    with pytest.raises(ValueError, match=f"NIfTI has no type for {np.dtype(dtype)}; expected one"):
        save_image(scans.image().astype(dtype), tmp_path / "scan.nii", scans.AFFINE)
    assert not list(tmp_path.iterdir())


def test_labels_in_a_tensor_are_written_as_an_array_is(scans, tmp_path: Path) -> None:
    volume = Volume(scans.image(shape=(1, *scans.SHAPE)), scans.AFFINE, None, ("t1",))
    labels = labels_of(volume)
    save_volume(labels, tmp_path / "array.nii", like=volume)
    save_volume(torch.tensor(labels), tmp_path / "tensor.nii", like=volume)
    assert (tmp_path / "array.nii").read_bytes() == (tmp_path / "tensor.nii").read_bytes()


@pytest.mark.parametrize("from_a_file", [True, False])
def test_a_qform_never_tells_of_another_place(
    scans, tmp_path: Path, volume: Volume, from_a_file: bool
) -> None:
    """It has no shear; a rotation it keeps to the 1e-3 of its float32 quaternion."""
    volume.header.set_qform(scans.AFFINE, code=1)
    header = volume.header if from_a_file else None
    for angle in (0, 1e-3, 0.02, 1.0, 3.1415):
        turn = Rotation.from_rotvec(np.array([2, -1, 2]) / 3 * angle).as_matrix()
        for shear, code in ((0, True), (0.1, False)):
            affine = scans.AFFINE.copy()
            affine[1, 2] = shear
            affine[:3, :3] = turn @ affine[:3, :3]
            like = replace(volume, affine=affine, header=header)
            save_volume(labels_of(volume), tmp_path / "out.nii", like)
            written = nib.load(tmp_path / "out.nii").header
            np.testing.assert_allclose(written.get_sform(), affine, atol=1e-5)
            assert written["sform_code"] > 0 and (written["qform_code"] > 0) == code
            if code:
                np.testing.assert_allclose(written.get_qform(), affine, atol=2e-3)


def test_a_volume_that_comes_from_no_file_can_be_the_model(scans, tmp_path: Path) -> None:
    data = scans.image(shape=(1, *scans.SHAPE))
    volume = Volume(data, scans.AFFINE, None, ("t1",), "files", "p1")
    save_volume(labels_of(volume), tmp_path / "out.nii.gz", like=volume)
    result = nib.load(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(result.affine, scans.AFFINE)
    np.testing.assert_array_equal(np.asanyarray(result.dataobj), labels_of(volume))
