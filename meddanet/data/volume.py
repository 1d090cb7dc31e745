"""Volumes in memory: normalisation, axial slices."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .axes import canonical, from_canonical

# of NIfTI's codes for metre and micrometre
_MILLIMETRES = {1: 1000.0, 3: 0.001}
NOT_FINITE = "voxels are NaN or infinite; expected finite ones"

Box = tuple[slice, ...]


class VolumeError(ValueError):
    """Reports a bad input or output file in one line: which file, what is wrong, what is right."""


@dataclass(frozen=True, eq=False)  # arrays have no one truth: a volume is equal to itself alone
class Volume:
    """A multi-modal scan as it lies in its files.

    What numpy takes for an array is taken for data and affine.

    Attributes:
        data: Raw intensities [C, H, W, D], float32, in the file's voxel order.
        affine: Voxel indices (h, w, d) to RAS+ world space, [4, 4] float64, in the header's unit,
            millimetres nearly always.
        header: NIfTI header of the first modality, whose codes and units `save_volume` copies;
            None for a volume that comes from no file.
        modalities: Name of each channel.
        convention: Naming the files follow: "brats2021", "brats2023", "msd", "nnunet", "lits" or
            "files".
        name: Case name, which output files are named after.

    Raises:
        VolumeError: If data or affine are no numbers, their shapes or the number of modalities do
            not fit, or the affine has no three independent axes.
    """

    data: np.ndarray
    affine: np.ndarray
    header: Any
    modalities: tuple[str, ...]
    convention: str = "files"
    name: str = "volume"

    def __post_init__(self) -> None:
        put = partial(object.__setattr__, self)
        put("data", self._array("data", None))
        put("affine", self._array("affine", np.float64))
        put("modalities", tuple(self.modalities))
        if self.data.ndim != 4 or len(self.data) != len(self.modalities):
            raise VolumeError(
                f"{self.name}: data have shape {self.data.shape}, expected "
                f"({len(self.modalities)}, H, W, D) for modalities {', '.join(self.modalities)}"
            )
        if self.affine.shape != (4, 4):
            raise VolumeError(
                f"{self.name}: the affine has shape {self.affine.shape}, expected (4, 4)"
            )
        check_axes(self.affine, self.name)

    def _array(self, field: str, dtype: Any) -> np.ndarray:
        given = getattr(self, field)
        try:
            array = np.asarray(given, dtype)
        except (TypeError, ValueError, RuntimeError) as error:
            reason = str(error).split("\n")[0]
            raise VolumeError(
                f"{self.name}: {field} is a {type(given).__name__} that numpy takes for no array "
                f"of numbers ({reason}); expected an array"
            ) from error
        if array.dtype.kind not in "biuf":
            raise VolumeError(f"{self.name}: {field} holds {array.dtype}, expected real numbers")
        return array

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size along (h, w, d) in millimetres, whatever the header's unit."""
        h, w, d = np.linalg.norm(in_millimetres(self.affine, self.header)[:3, :3], axis=0)
        return float(h), float(w), float(d)

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel in millilitres; less than its sides' product where axes are sheared."""
        axes = in_millimetres(self.affine, self.header)[:3, :3]
        return float(abs(np.linalg.det(axes))) / 1000


def check_axes(affine: np.ndarray, name: object) -> None:
    """Raises a VolumeError of that name where an affine [4, 4] has no three independent axes."""
    axes = affine[:3, :3]
    with np.errstate(all="ignore"):
        smallest = 1e-6 * np.linalg.norm(axes, axis=0).prod()
        if not np.isfinite(affine).all() or abs(np.linalg.det(axes)) <= smallest:
            raise VolumeError(
                f"{name}: the affine is singular or not finite; expected three independent axes"
            )


def in_millimetres(affine: np.ndarray, header: Any) -> np.ndarray:
    """Returns an affine [4, 4] whose world is in millimetres, whatever the NIfTI header's unit.

    Args:
        affine: As the file has it.
        header: Of the file; None: it is in millimetres.
    """
    # the three lowest bits; 0 says nothing
    unit = 0 if header is None else int(header["xyzt_units"]) & 7
    return affine * np.array([[_MILLIMETRES.get(unit, 1.0)]] * 3 + [[1.0]])


def normalize(data: np.ndarray, threads: int = 1) -> np.ndarray:
    """Normalises every modality to zero mean and unit variance inside one joint mask.

    The mask is where the sum over modalities is positive; the standard deviation is the
    population's; outside the mask the result is exactly 0 (the published Med-DANet preprocessing).
    A modality that is constant inside the mask becomes 0. Sums and arithmetic are float64.

    Args:
        data: Raw intensities [C, H, W, D].
        threads: How many threads share the work.

    Returns:
        float32 [C, H, W, D], in the memory order of `data`.

    Raises:
        VolumeError: If values are NaN or infinite.
    """
    order = memory_order(data)
    result = np.zeros([data.shape[axis] for axis in order], np.float32).transpose(np.argsort(order))
    _normalize_into(result, data, threads)
    return result


def has_hounsfield_values(volume: Volume) -> bool:
    """Tells whether a volume is a CT whose tissues lie below 0 too, outside `normalize`'s mask."""
    return volume.modalities == ("ct",) and bool(volume.data.min() < 0)


def lacks_hounsfield_values(volume: Volume, window_hu: tuple[float, float]) -> bool:
    """Tells whether nothing lies below 0, as air and fat do, though the window begins there."""
    return window_hu[0] < 0 <= volume.data.min() < volume.data.max()


def hounsfield_window(data: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Clips to a window of Hounsfield values and scales it to 0..1, float32, same shape.

    Raises:
        ValueError: If the window does not ascend.
    """
    low, high = window
    check_window(low, high)
    return ((data.astype(np.float32) - np.float32(low)) / np.float32(high - low)).clip(0, 1)


def check_window(low: float, high: float) -> None:
    """Raises ValueError where a Hounsfield window does not ascend."""
    if not low < high:
        raise ValueError(f"window_hu is {low:g}, {high:g}; expected ascending Hounsfield values")


def to_slices(
    volume: Volume, threads: int = 1, window_hu: tuple[float, float] | None = None
) -> np.ndarray:
    """Returns the normalised axial slices [D, C, H, W], float32, of a volume in LPS order.

    Args:
        volume: Raw intensities.
        threads: How many work on it.
        window_hu: Hounsfield values that become 0 and 1; None normalises by `normalize`.

    Raises:
        VolumeError: If voxels are NaN or infinite.
        ValueError: If the window does not ascend.
    """
    data = canonical(volume.data, volume.affine)
    if window_hu is not None:
        if not np.isfinite(data).all():
            raise VolumeError(f"{volume.name}: {NOT_FINITE}")
        return np.ascontiguousarray(np.moveaxis(hounsfield_window(data, window_hu), -1, 0))
    slices = np.zeros((data.shape[3], *data.shape[:3]), np.float32)
    try:
        _normalize_into(np.moveaxis(slices, 0, -1), data, threads)
    except VolumeError as error:
        raise VolumeError(f"{volume.name}: {error}") from None
    return slices


def memory_order(data: np.ndarray) -> tuple[int, ...]:
    """Returns the axes of [C, H, W, D] as they lie in memory, channels first."""
    return (0, *sorted((1, 2, 3), key=lambda axis: -abs(data.strides[axis])))


def _normalize_into(target: np.ndarray, data: np.ndarray, threads: int) -> None:
    """Fills zeros [C, H, W, D] of any memory layout with the normalised `data`, slab by slab."""
    order = memory_order(data)
    sources, targets = (np.moveaxis(a.transpose(order), 1, 0) for a in (data, target))
    with ThreadPoolExecutor(threads) as pool:
        masks = list(pool.map(_masked_box, sources))
        seen = [(index, *found) for index, found in enumerate(masks) if found is not None]
        if not seen:
            return
        first, box, mask = seen[0]
        # sums about a value of the modality itself lose nothing to a large offset
        origin = sources[first][box][:, mask][:, :1].astype(np.float64)[..., None]

        def measure(found: tuple[int, Box, np.ndarray]) -> np.ndarray:
            index, box, mask = found
            values = np.subtract(sources[index][box], origin, dtype=np.float64)
            values *= mask
            return np.array([values.sum((1, 2)), np.einsum("cab,cab->c", values, values)])

        count = sum(np.count_nonzero(mask) for _, _, mask in seen)
        mean, square = np.sum(list(pool.map(measure, seen)), axis=0) / count
        spread = np.sqrt(np.maximum(square - mean**2, 0))
        gain = np.divide(1, spread, out=np.zeros_like(spread), where=spread > 0)[:, None, None]
        mean = mean[:, None, None] + origin

        def write(found: tuple[int, Box, np.ndarray]) -> None:
            index, box, mask = found
            values = np.subtract(sources[index][box], mean, dtype=np.float64)
            values *= gain
            values *= mask
            targets[index][box] = values

        list(pool.map(write, seen))


def _masked_box(slab: np.ndarray) -> tuple[Box, np.ndarray] | None:
    """Returns (box, mask inside it) of a slab [C, A, B]; None where no sum is positive."""
    total = slab.sum(0)
    if not np.isfinite(total).all():
        raise VolumeError(NOT_FINITE)
    mask = total > 0
    box = [slice(None)]
    for axis in (1, 0):
        inside = np.flatnonzero(mask.any(axis))
        if not len(inside):
            return None
        box.append(slice(inside[0], inside[-1] + 1))
    return tuple(box), mask[tuple(box[1:])]


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
