"""Volumes in memory: orientation, normalisation, axial slices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np

# the sign of each world axis (+x right, +y anterior, +z superior) along the voxel axes of "LPS"
_LPS = np.array([-1, -1, 1])


class VolumeError(ValueError):
    """Reports a bad input or output file in one line: which file, what is wrong, what is right."""


@dataclass(frozen=True)
class Volume:
    """A multi-modal scan as it lies in its files.

    Attributes:
        data: Raw intensities [C, H, W, D], float32, in the file's voxel order.
        affine: Voxel indices (h, w, d) to millimetres in RAS+ world space, [4, 4] float64.
        header: NIfTI header of the first modality, whose codes and units `save_volume` copies;
            None for a volume that comes from no file.
        modalities: Name of each channel.
        convention: Naming the files follow: "brats2021", "brats2023", "msd", "nnunet", "lits" or
            "files".
        name: Case name, which output files are named after.
    """

    data: np.ndarray
    affine: np.ndarray
    header: Any
    modalities: tuple[str, ...]
    convention: str
    name: str

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size along (h, w, d) in millimetres."""
        h, w, d = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(h), float(w), float(d)


def _orientation(affine: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
    """Returns (the voxel axis along each world axis, the direction of each: +1 or -1)."""
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    # the closest rotation, so that sheared axes are matched by what remains after unshearing
    left, _, right = np.linalg.svd(directions)
    rotation = left @ right
    world = np.arange(3)
    axes = max(permutations(range(3)), key=lambda p: np.abs(rotation[world, list(p)]).sum())
    return axes, np.where(rotation[world, list(axes)] < 0, -1, 1)


def _flip(array: np.ndarray, signs: np.ndarray) -> np.ndarray:
    h, w, d = (slice(None, None, int(sign)) for sign in signs)
    return array[..., h, w, d]


def canonical(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Views the last three axes of an array in LPS voxel order, the order of BraTS files.

    Args:
        array: [..., H, W, D] in the voxel order that `affine` describes.
        affine: [4, 4], voxels to RAS+ millimetres; oblique axes go to the nearest world axis.

    Returns:
        A view whose last three indices grow toward Left, Posterior and Superior.
    """
    axes, signs = _orientation(affine)
    lead = array.ndim - 3
    moved = array.transpose(*range(lead), *(lead + axis for axis in axes))
    return _flip(moved, signs * _LPS)


def from_canonical(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Undoes `canonical`: views an LPS array [..., H, W, D] in the voxel order of `affine`."""
    axes, signs = _orientation(affine)
    lead = array.ndim - 3
    flipped = _flip(array, signs * _LPS)
    return flipped.transpose(*range(lead), *(lead + axis for axis in np.argsort(axes)))


def normalize(data: np.ndarray) -> np.ndarray:
    """Normalises every modality to zero mean and unit variance inside one joint mask.

    The mask is where the sum over modalities is positive; the standard deviation is the
    population's; outside the mask the result is exactly 0 (the published Med-DANet preprocessing).
    A modality that is constant inside the mask becomes 0.

    Args:
        data: Raw intensities [C, H, W, D].

    Returns:
        float32 [C, H, W, D], in the memory order of `data`.
    """
    # walking along memory is several times faster than along the axes' order
    order = (0, *sorted((1, 2, 3), key=lambda axis: -abs(data.strides[axis])))
    view = data.transpose(order)
    mask = view.sum(axis=0) > 0
    result = np.zeros(view.shape, np.float32)
    for channel, out in zip(view, result, strict=True):
        inside = channel[mask].astype(np.float64)
        if inside.size and np.ptp(inside) > 0:
            inside -= inside.mean()
            inside /= math.sqrt(np.dot(inside, inside) / inside.size)
            out[mask] = inside
    return result.transpose(np.argsort(order))


def hounsfield_window(data: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Clips to a window of Hounsfield values and scales it to 0..1, float32, same shape.

    Raises:
        ValueError: If the window does not ascend.
    """
    low, high = window
    if not low < high:
        raise ValueError(f"window_hu is {low:g}, {high:g}; expected ascending Hounsfield values")
    return ((data.astype(np.float32) - np.float32(low)) / np.float32(high - low)).clip(0, 1)


def to_slices(volume: Volume, window_hu: tuple[float, float] | None = None) -> np.ndarray:
    """Returns the normalised axial slices [D, C, H, W], float32, of a volume in LPS order.

    Args:
        volume: Raw intensities.
        window_hu: Hounsfield values that become 0 and 1; None normalises by `normalize`.
    """
    data = canonical(volume.data, volume.affine)
    data = normalize(data) if window_hu is None else hounsfield_window(data, window_hu)
    return np.ascontiguousarray(np.moveaxis(data, -1, 0))


def from_slices(labels: np.ndarray, volume: Volume) -> np.ndarray:
    """Puts axial label slices back into the voxel order of the volume they were computed from.

    Args:
        labels: [D, H, W] in the order of `to_slices`.
        volume: The input of `to_slices`.

    Returns:
        uint8 [H, W, D], laid out in memory as a NIfTI file is.

    Raises:
        ValueError: If the shapes do not belong together.
    """
    result = from_canonical(np.moveaxis(labels, 0, -1), volume.affine)
    if result.shape != volume.data.shape[1:]:
        raise ValueError(
            f"labels of {volume.name} have shape {labels.shape}, which gives {result.shape} in the "
            f"input's voxel order; expected {volume.data.shape[1:]}"
        )
    return np.asfortranarray(result, np.uint8)


def window_origins(size: int, window: int = 128) -> list[int]:
    """Returns the origins of the papers' overlapping windows along one axis, in pixels.

    The stride is a third of the window and the last window ends at the border: 240 pixels give
    0, 42, 84, 112. A size below the window gives [0].

    Raises:
        ValueError: If `window` is below 3 or `size` below 1.
    """
    if window < 3 or size < 1:
        raise ValueError(f"size is {size} and window {window}, expected at least 1 and 3")
    stride, last = window // 3, max(size - window, 0)
    return [min(index * stride, last) for index in range(math.ceil(last / stride) + 1)]
