"""One clear line for every bad input, and no memory claimed for what is not there."""

from __future__ import annotations

import gzip
import logging
import re
import tracemalloc
import warnings
from contextlib import suppress
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from meddanet.data import Volume, VolumeError, load_labels, load_volume, to_slices


def test_a_missing_modality(scans, tmp_path: Path) -> None:
    scans.write_case(tmp_path)["t1ce"].unlink()
    message = scans.error(lambda: load_volume(tmp_path))
    assert message.startswith("p1: modality t1ce is missing; expected flair, t1ce, t1, t2")
    assert str(tmp_path) in message


def test_a_modality_that_does_not_exist(scans, tmp_path: Path) -> None:
    scans.write_case(tmp_path)
    assert "modality adc is missing" in scans.error(lambda: load_volume(tmp_path, ("flair", "adc")))
    for names in ((), ("t1", "T1w")):
        with pytest.raises(ValueError, match="expected each name once"):
            load_volume(tmp_path, names)


def test_another_shape(scans, tmp_path: Path) -> None:
    path = scans.write(scans.write_case(tmp_path)["t1"], scans.image(shape=(6, 5, 3)))
    message = scans.error(lambda: load_volume(tmp_path))
    assert message.startswith(f"{path}: shape (6, 5, 3) differs from (6, 5, 4) of {tmp_path}")


@pytest.mark.parametrize(("row", "column"), [(0, 3), (2, 2), (0, 1)])
def test_another_affine(scans, tmp_path: Path, row: int, column: int) -> None:
    other = scans.AFFINE.copy()
    other[row, column] += 0.01
    path = scans.write(scans.write_case(tmp_path)["t2"], scans.image(), other)
    message = scans.error(lambda: load_volume(tmp_path))
    wanted = f"{path}: the affine differs by up to 0.01 mm from that of {tmp_path}"
    assert message.startswith(wanted)


def test_several_cases_where_one_is_expected(scans, tmp_path: Path) -> None:
    for name in ("p1", "p2"):
        scans.write_case(tmp_path / name, name)
    assert "holds 2 cases (p1, p2" in scans.error(lambda: load_volume(tmp_path))


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.999])
def test_truncated_gzip(scans, tmp_path: Path, kept: float) -> None:
    path = scans.write_case(tmp_path)["t1"]
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    message = scans.error(lambda: load_volume(tmp_path))
    assert message.startswith(f"{path}: the gzip data is truncated")


@pytest.mark.parametrize("form", [nib.Nifti1Image, nib.Nifti2Image])
def test_a_file_that_ends_within_its_header(scans, tmp_path: Path, form: type) -> None:
    nib.save(form(scans.image(), scans.AFFINE), tmp_path / "whole.nii")
    content, path = (tmp_path / "whole.nii").read_bytes(), tmp_path / "cut.nii"
    for kept in (0, 3, 166, 347, 539):
        path.write_bytes(content[: min(kept, form.header_class.sizeof_hdr - 1)])
        message = scans.error(lambda: load_volume(path, modalities=("ct",)))
        assert message.startswith(f"{path}: ")
        assert "is not a NIfTI file" in message or "header is invalid" in message


@pytest.mark.parametrize("junk", [b"j", b"junk", b"\r\n", bytes(9) + b"x", b"<html>" * 9999])
@pytest.mark.parametrize("members", [1, 2])
def test_bytes_after_the_gzip_data(scans, tmp_path: Path, junk: bytes, members: int) -> None:
    """The file is complete without, by Python's gzip."""
    path = scans.write_case(tmp_path)["t1"]
    raw = gzip.decompress(path.read_bytes())
    half = len(raw) // members
    content = b"".join(gzip.compress(raw[i : i + half]) for i in range(0, len(raw), half))
    path.write_bytes(content + junk)
    assert scans.error(lambda: load_volume(tmp_path)) == (
        f"{path}: {len(junk)} bytes that are no gzip data follow it; expected none, it is complete "
        f"without: cut the file to {len(content)} bytes"
    )
    path.write_bytes(path.read_bytes()[: len(content)])
    assert gzip.decompress(path.read_bytes()) == raw
    np.testing.assert_array_equal(load_volume(tmp_path).data[2], scans.image(2))


def test_a_second_gzip_member_that_is_not_whole(scans, tmp_path: Path) -> None:
    path = scans.write_case(tmp_path)["t1"]
    path.write_bytes(path.read_bytes() + path.read_bytes()[:40])
    message = scans.error(lambda: load_volume(tmp_path))
    assert message.startswith(f"{path}: the gzip data is truncated")


@pytest.mark.parametrize("position", [-6, -2, 300])
def test_damaged_gzip(scans, tmp_path: Path, position: int) -> None:
    path = scans.write_case(tmp_path)["t1"]
    content = bytearray(path.read_bytes())
    content[position] ^= 0x5A
    path.write_bytes(content)
    message = scans.error(lambda: load_volume(tmp_path))
    assert message.startswith(f"{path}: the gzip data is damaged")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_voxels_that_are_not_finite(scans, tmp_path: Path, bad: float, dtype: type) -> None:
    data = scans.image(dtype=dtype)
    data[1, 2, 3] = data[0, 0, 0] = bad
    path = scans.write(scans.write_case(tmp_path)["t2"], data)
    message = scans.error(lambda: load_volume(tmp_path))
    assert message.startswith(f"{path}: 2 voxels are NaN or infinite")


def test_finite_voxels_that_float32_does_not_hold(scans, tmp_path: Path) -> None:
    """Where some are infinite besides, those are what is told."""
    data = scans.image(dtype=np.float64)
    data[0, 0, :3] = 1e39, -1e300, float(np.finfo(np.float32).max)
    path = scans.write(scans.write_case(tmp_path)["t2"], data)
    assert scans.error(lambda: load_volume(tmp_path)) == (
        f"{path}: 2 voxels exceed 3.4e+38, which float32 ends at; rescale the scan"
    )
    data[1, 1, 1] = np.inf
    scans.write(path, data)
    message = scans.error(lambda: load_volume(tmp_path))
    assert message == f"{path}: 1 voxels are NaN or infinite; expected finite ones"


def test_a_flat_file(scans, tmp_path: Path) -> None:
    path = scans.write(scans.write_case(tmp_path)["t1"], scans.image(shape=(6, 5)))
    message = scans.error(lambda: load_volume(tmp_path))
    assert message.startswith(f"{path}: is 2-D with shape (6, 5)")


def test_more_dimensions_than_channels(scans, tmp_path: Path) -> None:
    path = scans.write(tmp_path / "scan.nii", scans.image(shape=(*scans.SHAPE, 2, 3)))
    assert "has shape (6, 5, 4, 2, 3)" in scans.error(lambda: load_volume({"t1": path}))
    path = scans.write(tmp_path / "scan.nii", scans.image(shape=(*scans.SHAPE, 2)))
    assert "number of channels is 2, expected 1" in scans.error(lambda: load_volume({"t1": path}))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("shape", [(32767, 32767, 32767), (512, 512, 512), (33, 32, 32)])
def test_a_header_that_asks_for_more_than_the_file_holds(
    scans, tmp_path: Path, compressed: bool, shape: tuple[int, int, int]
) -> None:
    data = np.random.default_rng(0).integers(0, 65536, (32, 32, 32)).astype(np.uint16)
    raw = bytearray(nib.Nifti1Image(data, scans.AFFINE).to_bytes())
    raw[42:48] = np.array(shape, "<i2").tobytes()
    path = tmp_path / ("scan.nii.gz" if compressed else "scan.nii")
    path.write_bytes(gzip.compress(raw) if compressed else raw)
    tracemalloc.start()
    message = scans.error(lambda: load_volume({"t1": path}))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    claimed = 352 + 2 * int(np.prod(shape, dtype=object))
    assert message.startswith(f"{path}: the header asks for {claimed} bytes but the file holds")
    assert peak < 8e6


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((96, 96, 97), "the gzip data is damaged"),
        # beyond what deflate can do: refused without a look inside
        ((1000, 1000, 1000), "the header asks for 2000000352 bytes but the file holds at most"),
    ],
)
def test_a_forged_length_is_noticed(
    scans, tmp_path: Path, shape: tuple[int, int, int], text: str
) -> None:
    data = np.random.default_rng(0).integers(0, 65536, (96, 96, 96)).astype(np.uint16)
    raw = bytearray(nib.Nifti1Image(data, scans.AFFINE).to_bytes())
    raw[42:48] = np.array(shape, "<i2").tobytes()
    claimed = 352 + 2 * int(np.prod(shape))
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(gzip.compress(raw, 1)[:-4] + claimed.to_bytes(4, "little"))
    assert scans.error(lambda: load_volume({"t1": path})).startswith(f"{path}: {text}")


def test_the_checksum_is_verified_where_the_last_block_is_full(scans, tmp_path: Path) -> None:
    # 352 bytes of header and these voxels are 2 MiB to the byte
    data = np.random.default_rng(0).integers(0, 65536, (20, 20, 2621)).astype(np.uint16)
    content = bytearray(gzip.compress(nib.Nifti1Image(data, scans.AFFINE).to_bytes(), 1))
    content[-8] ^= 1
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(content)
    message = scans.error(lambda: load_volume({"t1": path}))
    assert message.startswith(f"{path}: the gzip data is damaged (CRC check failed")


@pytest.mark.parametrize("values", [[0, 1, 2, 4], [0, 1], [0, 1, 2, 3, 4, 5, 6, 200]])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_label_file_where_an_image_belongs(
    scans, tmp_path: Path, values: list[int], dtype: type
) -> None:
    labels = np.resize(values, scans.SHAPE).astype(dtype)
    path = scans.write(scans.write_case(tmp_path)["t1ce"], labels)
    message = scans.error(lambda: load_volume(tmp_path))
    assert message.startswith(f"{path}: holds only the values {values}, so it is a label file")


@pytest.mark.parametrize(
    "name", ["p_seg.nii", "p-seg.nii.gz", "segmentation-0.nii", "labels/p.nii"]
)
def test_a_label_files_name_where_an_image_belongs(scans, tmp_path: Path, name: str) -> None:
    path = scans.write(tmp_path / name, scans.image())
    for given in ({"t1": path}, path):
        message = scans.error(lambda: load_volume(given))  # noqa: B023
        assert message == f"{path}: is a label file; expected an image"


def test_blank_and_dark_images_are_no_label_files(scans, tmp_path: Path) -> None:
    blank = np.zeros(scans.SHAPE, np.int16)
    dark = np.resize([-1024, 0, 1], scans.SHAPE).astype(np.int16)
    fractions = np.resize([0, 0.25, 0.5], scans.SHAPE).astype(np.float32)
    few = np.resize(np.arange(9), scans.SHAPE).astype(np.uint8)
    for data in (blank, dark, fractions, few):
        path = scans.write(tmp_path / "scan.nii", data)
        np.testing.assert_array_equal(load_volume({"t1": path}).data[0], data)


def header_with(position: int, content: bytes) -> bytes:
    raw = bytearray(nib.Nifti1Image(np.zeros((6, 5, 4), np.int16), np.eye(4)).to_bytes())
    raw[position : position + len(content)] = content
    return bytes(raw)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is not a NIfTI file"),
        (b"PNG" * 300, "is not a NIfTI file"),
        (header_with(344, b"ni1\0"), "is half of a .hdr and .img pair"),
        (header_with(70, b"\xff\x7f"), "the NIfTI header is invalid"),
        (header_with(70, np.int16(128).tobytes() + np.int16(24).tobytes()), "holds "),
        (header_with(108, np.float32(np.nan).tobytes()), "the NIfTI header is invalid"),
        (header_with(112, np.float32([1, np.inf]).tobytes()), "the NIfTI header is invalid"),
        (header_with(44, b"\0\0"), "has shape (6, 0, 4)"),
        (header_with(44, b"\xff\xff"), "has shape (6, -1, 4)"),
        (header_with(280, bytes(16)), "the affine is singular"),
        (header_with(280, np.float32(np.nan).tobytes()), "the affine is singular"),
        (header_with(0, b"")[:200], "is not a NIfTI file"),
        (header_with(0, b"")[:400], "the header asks for 592 bytes but the file holds 400"),
    ],
)
def test_files_that_are_no_valid_nifti(scans, tmp_path: Path, content: bytes, text: str) -> None:
    for name, stored in (("scan.nii", content), ("scan.nii.gz", gzip.compress(content))):
        path = tmp_path / name
        path.write_bytes(stored)
        message = scans.error(lambda: load_volume({"t1": path}))  # noqa: B023
        assert message.replace("at most ", "").startswith(f"{path}: {text}")


@pytest.mark.parametrize(("position", "content", "told"), [
    (254, np.int16(9).tobytes(), "sform_code is 9, which NIfTI does not know and .* as 0; set the"),
    (252, np.int16(-1).tobytes(), "qform_code is -1, which NIfTI does not know"),
    (80, np.float32([-1, -1, 1]).tobytes(), None),
    (70, np.int16(12345).tobytes(), None),
])
def test_no_line_that_names_no_file(tmp_path, caplog, position, content, told) -> None:
    """As nibabel's own, whose logger stays as it is: the last of these headers is an error."""
    (tmp_path / "scan.nii").write_bytes(header_with(position, content))
    logger = logging.getLogger("nibabel.global")
    before = logger.level, logger.disabled, logger.propagate, list(logger.handlers)
    with warnings.catch_warnings(record=True) as caught, suppress(VolumeError):
        warnings.simplefilter("always")
        load_volume({"t1": tmp_path / "scan.nii"})
    assert not caplog.records
    assert before == (logger.level, logger.disabled, logger.propagate, list(logger.handlers))
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == (told is not None)
    assert all(re.match(f"{tmp_path}/scan.nii: {told}", message) for message in messages)


def test_absent_files_and_folders(scans, tmp_path: Path) -> None:
    path = tmp_path / "scan.nii.gz"
    assert scans.error(lambda: load_volume(path)) == f"{path}: no such file or folder"
    message = scans.error(lambda: load_volume({"t1": path}))
    assert message == f"{path}: cannot be read (No such file or directory)"
    assert "Is a directory" in scans.error(lambda: load_labels(tmp_path))


@pytest.mark.parametrize(
    ("shape", "modalities", "affine", "message"),
    [
        ((4, 5, 6), ("t1",), np.eye(4), r"shape \(4, 5, 6\), expected \(1, H, W, D\) .* t1$"),
        ((2, 4, 5, 6), ("t1",), np.eye(4), r"shape \(2, 4, 5, 6\), expected \(1, H, W, D\)"),
        ((1, 4, 5, 6), ("t1",), np.eye(3), r"the affine has shape \(3, 3\), expected \(4, 4\)"),
        ((1, 4, 5, 6), ("t1",), None, r"the affine has shape \(\), expected \(4, 4\)"),
    ],
)
def test_volumes_made_by_hand_that_do_not_fit(shape, modalities, affine, message) -> None:
    with pytest.raises(VolumeError, match=message):
        Volume(np.zeros(shape, np.float32), affine, None, modalities)


SINGULAR = [[1, 0, 0, 0], [2, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize(("changed", "message"), [
    ({"affine": SINGULAR}, "the affine is singular or not finite; expected three independent axes"),
    ({"affine": np.eye(4) * np.nan}, "the affine is singular or not finite; expected three inde.*"),
    ({"affine": [[1, 2], [3]]}, "affine is a list that numpy takes for no .*; expected an array"),
    ({"affine": "LPS"}, "affine is a str that numpy takes for no array of numbers .*"),
    ({"data": torch.ones(1, 4, 5, 6, requires_grad=True)}, "data is a Tensor that numpy takes .*"),
    ({"data": np.full((1, 4, 5, 6), "x")}, "data holds <U1, expected real numbers"),
])
def test_what_is_no_scan_is_told_in_a_line(scans, changed, message) -> None:
    given = {"data": np.ones((1, 4, 5, 6)), "affine": np.eye(4), **changed}
    told = scans.error(lambda: Volume(header=None, modalities=("t1",), name="scan", **given))
    assert re.fullmatch(f"scan: {message}", told)


def test_volumes_of_lists_and_tensors() -> None:
    usual = Volume(np.ones((1, 4, 5, 6), np.float32), np.diag([2.0, 3, 4, 1]), None, ("t1",))
    other = Volume(torch.ones(1, 4, 5, 6), np.diag([2, 3, 4, 1]).tolist(), None, ["t1"])
    assert other.spacing == usual.spacing and other.modalities == usual.modalities
    np.testing.assert_array_equal(other.affine, usual.affine)
    np.testing.assert_array_equal(to_slices(other), to_slices(usual))


def test_arguments_of_another_type(scans, tmp_path: Path) -> None:
    paths = scans.write_case(tmp_path / "p1")
    with pytest.raises(ValueError, match="modalities is 'flair', expected a sequence such as"):
        load_volume(tmp_path / "p1", "flair")
    with pytest.raises(ValueError, match="path is a list, expected a folder, a file, or named"):
        load_volume(list(paths.values()))
