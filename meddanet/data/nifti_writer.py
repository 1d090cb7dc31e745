"""Writes NIfTI files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError

from .axes import AFFINE_TOLERANCE
from .storage import Writer, compress, write_bytes
from .volume import Volume


def save_volume(
    labels: np.ndarray, path: str | Path, like: Volume, write: Writer = write_bytes
) -> None:
    """Writes labels as uint8 NIfTI with the affine, form codes and units of the input.

    The file appears under its name only when it is complete.

    Args:
        labels: [H, W, D] whole numbers 0..255, in the voxel order of `like`; what numpy takes for
            an array.
        path: Ends in .nii, or .nii.gz to be compressed.
        like: The volume the labels were computed from.
        write: What writes the bytes.

    Raises:
        ValueError: If shape, values or the file's ending do not fit.
        VolumeError: If the file cannot be written.
    """
    labels = np.asarray(labels)
    if labels.shape != like.data.shape[1:]:
        raise ValueError(f"labels have shape {labels.shape}, expected {like.data.shape[1:]}")
    with np.errstate(invalid="ignore"):
        stored = labels.astype(np.uint8, copy=False)
    if not np.array_equal(stored, labels):
        raise ValueError("labels hold values that are not whole numbers from 0 to 255")
    header = _new_header(like.affine) if like.header is None else _header_at(like)
    header["descrip"] = header["aux_file"] = header["intent_name"] = b""
    header["cal_min"] = header["cal_max"] = header["intent_code"] = 0
    _save(stored, Path(path), header, write)


def save_image(data: np.ndarray, path: str | Path, affine: np.ndarray) -> None:
    """Writes an image [H, W, D] or [H, W, D, C] in its own dtype, in millimetres.

    Raises:
        ValueError: If the file's ending does not fit, or NIfTI has no such dtype.
        VolumeError: If the file cannot be written.
    """
    _save(data, Path(path), _new_header(affine))


def _new_header(affine: np.ndarray) -> nib.Nifti1Header:
    header = nib.Nifti1Header()
    header.set_data_shape((1, 1, 1))
    _set_affine(header, affine, "scanner", "scanner")
    header.set_xyzt_units("mm")
    return header


def _header_at(volume: Volume) -> Any:
    """Returns a copy of a volume's header with its affine, another one if it was cut or turned."""
    header = volume.header.copy()
    if not np.array_equal(header.get_best_affine(), volume.affine):
        qform, sform = int(header["qform_code"]), int(header["sform_code"])
        _set_affine(
            header, volume.affine, sform or qform or "scanner", qform or sform or "scanner"
        )
    return header


def _set_affine(
    header: Any, affine: np.ndarray, sform_code: int | str, qform_code: int | str
) -> None:
    """Sets sform and qform, the latter without its code where the axes are sheared."""
    header.set_sform(affine, code=sform_code)
    header.set_qform(affine, code=qform_code)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    moved = np.abs(header.get_qform() - affine)[:3, :3] / spacing
    if moved.max() > AFFINE_TOLERANCE:
        # programs that go by the qform would see another place
        header["qform_code"] = 0


def _save(data: np.ndarray, path: Path, header: Any, write: Writer = write_bytes) -> None:
    if not path.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"{path}: expected a name that ends in .nii or .nii.gz")
    header = header.as_byteswapped("<")
    header.set_data_shape(data.shape)
    try:
        header.set_data_dtype(data.dtype)
    except HeaderDataError as error:
        raise ValueError(
            f"{path}: NIfTI has no type for {data.dtype}; expected one such as uint8 or float32"
        ) from error
    header.set_slope_inter(1, 0)
    header["magic"], header["vox_offset"] = header.single_magic, header.single_vox_offset
    voxels = data.astype(data.dtype.newbyteorder("<"), copy=False).ravel(order="F")
    parts = header.binaryblock, bytes(4), voxels.data
    write(path, *([compress(*parts)] if path.name.endswith(".gz") else parts))
