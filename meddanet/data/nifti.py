"""Reads NIfTI files."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from .axes import AFFINE_TOLERANCE, in_order_of
from .conventions import Case, canonical_modality
from .sources import as_case, channel_sources, usual_order
from .storage import read_bytes, read_head
from .volume import Volume, VolumeError, check_axes, in_millimetres

# half a step of values up to 5 in 8 bit and up to 1310 in 16: how inexact scaled labels come back
_SCALED_TOLERANCE = 0.01
# as many distinct whole numbers as a label map of tumour parts may have, and an image never has
_MAX_LABEL_VALUES = 8
# nibabel's own lines name no file; this logger is nobody else's
_UNHEARD = logging.Logger("nibabel", logging.CRITICAL + 1)


@dataclass(frozen=True)
class _Image:
    """One file as stored: values [H, W, D, C] before slope and intercept."""

    path: Path
    header: Any
    affine: np.ndarray
    stored: np.ndarray

    def channel(self, index: int) -> np.ndarray:
        """Returns one channel [H, W, D] with slope and intercept applied."""
        stored = self.stored[..., index]
        if not self.is_scaled:
            return stored
        slope, intercept = self.header.get_slope_inter()
        return stored.astype(np.float64) * slope + intercept

    @property
    def is_scaled(self) -> bool:
        """Whether slope and intercept change the values."""
        slope, intercept = self.header.get_slope_inter()
        return slope is not None and (slope, intercept) != (1, 0)


def load_volume(
    path: str | Path | Mapping[str, str | Path] | Case, modalities: Sequence[str] | None = None
) -> Volume:
    """Loads one case, its files decompressed in parallel.

    Args:
        path: A case folder, a 3-D or 4-D file, named files (modality -> path) or a `Case`.
        modalities: Channels wanted, in this order. Where the naming does not tell what the
            channels are (nnU-Net or 4-D files without dataset.json), their names in file order.
            Default: flair, t1ce, t1, t2 for brain tumour cases, otherwise the files' own order.

    Returns:
        Raw intensities, slope and intercept applied, in the file's voxel order.

    Raises:
        VolumeError: If a modality is missing or a file is not a valid image (one line: which file,
            what is wrong, what would be right).
        ValueError: If `path` or `modalities` is of another type, or a name is there twice.
    """
    case = as_case(path)
    if isinstance(modalities, str):
        raise ValueError(f"modalities is {modalities!r}, expected a sequence such as (\"flair\",)")
    given = None if modalities is None else tuple(canonical_modality(name) for name in modalities)
    sources = channel_sources(case, given)
    wanted = given or usual_order(case.modalities)
    if missing := [name for name in wanted if name not in sources]:
        raise VolumeError(
            f"{case.name}: modality {', '.join(missing)} is missing; expected "
            f"{', '.join(wanted)}, found {', '.join(sources)} in {case.folder}"
        )
    paths = list(dict.fromkeys(sources[name][0] for name in wanted))
    with ThreadPoolExecutor(max(len(wanted), 1)) as pool:
        images = dict(zip(paths, pool.map(_read, paths), strict=True))
        first = images[paths[0]]
        affine = in_millimetres(first.affine, first.header)
        for image in images.values():
            _check_channels(image, len(sources) if image.path == case.files else 1)
            if fault := _grid_fault(image, first.stored.shape[:3], affine, str(first.path)):
                raise VolumeError(fault)
        # filled in the file's own memory order: no transposition here
        data = np.empty((len(wanted), *first.stored.shape[2::-1]), np.float32).transpose(0, 3, 2, 1)
        channels = [(images[sources[name][0]], sources[name][1]) for name in wanted]
        list(pool.map(lambda target, source: _fill(target, *source), data, channels))
    return Volume(data, first.affine, first.header, wanted, case.convention, case.name)


def load_labels(path: str | Path, like: Volume | None = None) -> np.ndarray:
    """Loads a segmentation.

    Args:
        path: A 3-D NIfTI file of whole numbers, exact or as slope and intercept give them back.
        like: The volume it belongs to, on the same grid; another voxel order is turned into its.

    Returns:
        The file's own values [H, W, D] (`to_classes` translates them) in the voxel order of `like`,
        else in its own, uint8, or uint16 where they exceed 255.

    Raises:
        VolumeError: If the file is unreadable, holds other than whole numbers or does not fit.
    """
    image = _read(Path(path))
    _check_channels(image, 1)
    if like is not None:
        grid = like.data.shape[1:], in_millimetres(like.affine, like.header), f"volume {like.name}"
        if fault := _grid_fault(image, *grid):
            image = _in_order_of(image, like.affine)
            if _grid_fault(image, *grid):
                raise VolumeError(fault)
    values = image.channel(0)
    whole = np.rint(values) if values.dtype.kind == "f" else values
    with np.errstate(invalid="ignore"):
        labels = whole.astype(np.uint8 if whole.max() <= 255 else np.uint16)
    if not np.array_equal(labels, values):
        _check_whole(labels, values, _SCALED_TOLERANCE if image.is_scaled else 0, image.path)
    return labels


def load_header(path: str | Path) -> Any:
    """Returns the NIfTI header of a file, as nibabel has it; reads nothing else.

    Raises:
        VolumeError: If the file is unreadable or its header invalid.
    """
    return _header(Path(path))[0]


def both_forms(header: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns a header's sform and qform in millimetres, [4, 4] each; None if it lacks a valid one.

    Args:
        header: Of a file, as nibabel has it.
    """
    if header["sform_code"] and header["qform_code"]:
        # one that is no rotation is no geometry
        with suppress(HeaderDataError, ValueError):
            forms = header.get_sform(), header.get_qform()
            for form in forms:
                check_axes(form, "form")
            sform, qform = (in_millimetres(form, header) for form in forms)
            return sform, qform
    return None


def _read(path: Path) -> _Image:
    header, affine, dtype, shape = _header(path)
    offset = max(int(header["vox_offset"]), header.single_vox_offset)
    size = math.prod(shape) * dtype.itemsize
    voxels = read_bytes(path, offset + size)[offset:].view(dtype)
    return _Image(path, header, affine, voxels.reshape((*shape[:3], -1), order="F"))


def _header(path: Path) -> tuple[Any, np.ndarray, np.dtype, tuple[int, ...]]:
    """Returns (header, affine, dtype, shape), all of them valid."""
    head = read_head(path, nib.Nifti2Header.sizeof_hdr)
    if head[344:348] == nib.Nifti1Header.single_magic.ljust(4, b"\0"):
        form = nib.Nifti1Header
    elif head[4:7] == nib.Nifti2Header.single_magic[:3]:
        form = nib.Nifti2Header
    elif head[344:348] == nib.Nifti1Header.pair_magic.ljust(4, b"\0"):
        raise VolumeError(f"{path}: is half of a .hdr and .img pair; convert it to one .nii.gz")
    else:
        raise VolumeError(f"{path}: is not a NIfTI file; expected a single .nii or .nii.gz")
    try:
        header = _mended(form(head[: form.sizeof_hdr], check=False), path)
        dtype, shape = header.get_data_dtype(), tuple(map(int, header.get_data_shape()))
        affine, _ = header.get_best_affine(), header.get_slope_inter()
        int(header["vox_offset"])
    except (HeaderDataError, WrapStructError, ValueError, OverflowError) as error:
        problem = " ".join(str(error).split())
        raise VolumeError(
            f"{path}: the NIfTI header is invalid ({problem}); expected a valid one"
        ) from error
    if len(shape) < 3:
        raise VolumeError(f"{path}: is {len(shape)}-D with shape {shape}; expected a 3-D volume")
    if min(shape) < 1 or math.prod(shape[4:]) > 1:
        raise VolumeError(f"{path}: has shape {shape}; expected [H, W, D] or [H, W, D, C]")
    if dtype.kind not in "iuf":
        raise VolumeError(f"{path}: holds {dtype} voxels; expected integers or floats")
    check_axes(affine, path)
    return header, affine, dtype, shape


def _mended(stored: Any, path: Path) -> Any:
    """Returns a copy of a header that nibabel has checked and mended; tells what moves the scan."""
    header = stored.copy()
    header.check_fix(logger=_UNHEARD)
    for field in ("sform_code", "qform_code"):
        if header[field] != stored[field]:
            warnings.warn(
                f"{path}: {field} is {stored[field]}, which NIfTI does not know and which counts "
                "as 0; set the right one, or look how the labels lie", stacklevel=2,
            )
    return header


def _check_channels(image: _Image, expected: int) -> None:
    if image.stored.shape[3] != expected:
        raise VolumeError(
            f"{image.path}: number of channels is {image.stored.shape[3]}, expected {expected}"
        )


def _grid_fault(
    image: _Image, shape: tuple[int, ...], affine: np.ndarray, reference: str
) -> str | None:
    """Returns how an image's grid differs from one whose affine is in millimetres, if it does."""
    if image.stored.shape[:3] != shape:
        return (
            f"{image.path}: shape {image.stored.shape[:3]} differs from {shape} of {reference}; "
            "expected files on one voxel grid"
        )
    spacing = np.linalg.norm(affine[:3, :3], axis=0).min()
    difference = np.abs(in_millimetres(image.affine, image.header) - affine).max()
    if difference > AFFINE_TOLERANCE * spacing:
        return (
            f"{image.path}: the affine differs by up to {difference:.4g} mm from that of "
            f"{reference}; expected co-registered files on one voxel grid"
        )
    return None


def _in_order_of(image: _Image, affine: np.ndarray) -> _Image:
    stored, own = in_order_of(np.moveaxis(image.stored, -1, 0), image.affine, affine)
    return replace(image, stored=np.moveaxis(stored, 0, -1), affine=own)


def _check_whole(labels: np.ndarray, values: np.ndarray, tolerance: float, path: Path) -> None:
    """Raises VolumeError, which names a value, where labels differ from the values they are of."""
    # NaN differs, too
    off = ~(np.abs(values.astype(np.float64) - labels) <= tolerance)
    if off.any():
        raise VolumeError(
            f"{path}: is no segmentation, it holds {values[off][0]}; expected whole numbers from 0 "
            "to 65535"
        )


def _fill(target: np.ndarray, image: _Image, index: int) -> None:
    """Writes one channel of a file into float32 memory, if it is an image."""
    values = image.channel(index)
    with np.errstate(over="ignore"):
        target[...] = values
    if values.dtype.kind == "f" and not np.isfinite(target).all():
        raise VolumeError(f"{image.path}: {_not_finite(target, values)}")
    if _looks_like_labels(target):
        raise VolumeError(
            f"{image.path}: holds only the values {np.unique(target).astype(int).tolist()}, "
            "so it is a label file; expected an image"
        )


def _not_finite(target: np.ndarray, values: np.ndarray) -> str:
    """Returns what is wrong with values that are not finite in float32 memory."""
    if count := values.size - np.count_nonzero(np.isfinite(values)):
        return f"{count} voxels are NaN or infinite; expected finite ones"
    count = target.size - np.count_nonzero(np.isfinite(target))
    largest = np.finfo(target.dtype).max
    return f"{count} voxels exceed {largest:.1e}, which float32 ends at; rescale the scan"


def _looks_like_labels(values: np.ndarray) -> bool:
    if len(np.unique(values[::7, ::7, ::7])) > _MAX_LABEL_VALUES:
        return False
    if values.min() < 0 or values.max() > 255:
        return False
    distinct = np.unique(values)
    return 2 <= len(distinct) <= _MAX_LABEL_VALUES and bool((distinct == np.rint(distinct)).all())
