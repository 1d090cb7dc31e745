"""What about a scan lets one expect worse labels: a line each, to warn of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.orientations import aff2axcodes

from .data import Volume, has_hounsfield_values, lacks_hounsfield_values
from .data.axes import SLIGHT_SKEW, skew, tilt, turned
from .data.nifti import both_forms
from .frame import Frame

# in degrees, well below the 40 to 50 at which results were found to change
_SLIGHT_TILT = 20.0
# as an axis turned to another or back; what is registered to an atlas may be turned a little
_OTHER_AXES = 45.0


def doubts_about(
    volume: Volume, spacing: Sequence[float] | None, window_hu: tuple[float, float] | None
) -> Iterator[str]:
    """Yields what is odd about a volume.

    Args:
        volume: Raw intensities, the modalities that the model takes.
        spacing: Voxel size in training, in millimetres, if it is known.
        window_hu: The model's Hounsfield window, or None.
    """
    if spacing and not np.allclose(volume.spacing, spacing, rtol=0.1):
        yield (
            f"its voxels are {_size(volume.spacing)}, the model was trained on {_size(spacing)}; "
            "resample the scan, or expect worse labels"
        )
    yield from _odd_axes(volume.affine)
    if volume.header is not None:
        yield from _odd_forms(volume.header)
    yield from _flat_scans(volume)
    yield from _same_scans(volume)
    if window_hu is None:
        yield from _negative_scans(volume)
    elif lacks_hounsfield_values(volume, window_hu):
        yield f"{no_hounsfield_values(volume)}, or expect worse labels"


def no_hounsfield_values(volume: Volume) -> str:
    """Says what is odd about a CT that `lacks_hounsfield_values`."""
    return (
        f"its values begin at {volume.data.min():g}, while air has -1000 Hounsfield units; where "
        "the scanner's offset is missing, such as 1024, subtract it or set scl_inter"
    )


def _size(spacing: Sequence[float]) -> str:
    return " x ".join(f"{side:.3g}" for side in spacing) + " mm"


def _odd_axes(affine: np.ndarray) -> Iterator[str]:
    """Of scans whose slices are none of a body that lies straight."""
    if (angle := skew(affine)) > SLIGHT_SKEW:
        yield (
            f"its voxel axes are {angle:.0f} degrees off right angles, as of a tilted gantry; "
            "resample the scan to right angles, or expect worse labels"
        )
    elif (angle := tilt(affine)) > _SLIGHT_TILT:
        yield (
            f"its voxel axes are {angle:.0f} degrees off the body's; resample the scan along "
            "these, or expect worse labels"
        )


def _odd_forms(header: Any) -> Iterator[str]:
    """Of headers that tell no geometry, or two."""
    if not header["sform_code"] and not header["qform_code"]:
        yield (
            "its header tells no orientation (sform_code and qform_code are 0), so that voxel axes "
            "are taken to run toward Left, Anterior and Superior; set the scan's own, or expect "
            "labels of a body that lies otherwise"
        )
    if forms := both_forms(header):
        angle, sizes = turned(*forms), [voxel_sizes(form) for form in forms]
        if angle > _OTHER_AXES or not np.allclose(sizes[0], sizes[1], rtol=0.03):
            codes = ["".join(aff2axcodes(form)) for form in forms]
            used, other = map("{}, {}".format, codes, map(_size, sizes))
            apart = f", turned by {angle:.0f} degrees" if angle > _OTHER_AXES else ""
            yield (
                f"its header's sform ({used}), which is used, and qform ({other}{apart}) are two "
                "geometries; set the wrong one's code to 0"
            )


def _flat_scans(volume: Volume) -> Iterator[str]:
    # few voxels tell that a scan is not flat
    few = volume.data[..., ::8, ::8, ::8]
    if not few.size:
        return
    flat = [
        name
        for name, some, every in zip(volume.modalities, few, volume.data, strict=True)
        if some.min() == some.max() and every.min() == every.max()
    ]
    if len(flat) == len(few) and not few.any():
        yield "its voxels are all 0; look at the scan"
    elif flat:
        yield f"{', '.join(flat)} has the same value everywhere; look at the scan"


def _same_scans(volume: Volume) -> Iterator[str]:
    """Of images that are there twice, as by a link or a copy, whatever their files look like."""
    few = volume.data[..., ::8, ::8, ::8]
    for one, other in combinations(range(len(few)), 2):
        if not few.size or not np.array_equal(few[one], few[other]):
            continue
        image = volume.data[one]
        if np.array_equal(image, volume.data[other]) and image.min() < image.max():
            names = f"{volume.modalities[one]} and {volume.modalities[other]}"
            yield f"{names} are the same image; give each its own file, or expect worse labels"


def _negative_scans(volume: Volume) -> Iterator[str]:
    """Of those of which what `normalize` takes for background is more than background."""
    if has_hounsfield_values(volume):
        yield (
            "is a CT with negative values, which count as background since the model has no "
            "Hounsfield window; train one with window_hu, or expect worse labels"
        )
        return
    few = volume.data[..., ::4, ::4, ::4].copy(order="K")
    if not few.size or few.min() >= 0:
        return
    total, least = few.sum(0), few.min((1, 2, 3))
    lowest = few == least[:, None, None, None]
    # where all modalities are at their lowest there is no tissue, but padding
    lost, kept = (total < 0) & ~lowest.all(0), total > 0
    count = np.count_nonzero(lost)
    if count <= 0.05 * np.count_nonzero(kept):
        return
    share = count / (count + np.count_nonzero(kept))
    culprits = [
        f"{name} is {value:g}"
        for name, value, there in zip(volume.modalities, least, lowest, strict=True)
        if value < 0 and np.count_nonzero(there & lost) > 0.5 * count
    ]
    if culprits:
        yield (
            f"{' and '.join(culprits)} where others show something, so that {share:.0%} of the "
            "voxels count as background; mend the scan, or expect worse labels"
        )
    else:
        yield (
            f"{share:.0%} of its voxels that are not 0 are negative, summed over the modalities, "
            "and count as background; give scans before normalisation, as the model was trained "
            "on, or expect worse labels"
        )


def doubts_about_frame(
    frame: Frame, canvas: tuple[int, int] | None, smallest: int, stride: int
) -> Iterator[str]:
    """Yields what is odd about what the networks are shown of a volume's slices.

    Args:
        frame: That part.
        canvas: Height and width of the slices in training, if they are known.
        smallest: The least side that the model takes.
        stride: Sides are rounded up to a multiple of it.
    """
    if canvas is None:
        return
    most = (max(side, smallest) + stride for side in canvas)
    if any(side >= many for side, many in zip((frame.height, frame.width), most, strict=True)):
        yield (
            f"what is not 0 needs slices of {frame.height} x {frame.width} pixels, the model was "
            f"trained on {' x '.join(map(str, canvas))}; cut off what lies around the organ, or "
            "expect worse labels"
        )
