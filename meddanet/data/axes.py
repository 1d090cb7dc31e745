"""How the voxel axes of a scan lie to each other and to the body's."""

from __future__ import annotations

import numpy as np

from .volume import directions, lps_axes

# in degrees: lengths and angles that are taken from voxel sizes are right to 2 %
SLIGHT_SKEW = 2.0


def skew(affine: np.ndarray) -> float:
    """Returns by how many degrees, at most, the angle of two voxel axes differs from a right one.

    Args:
        affine: [4, 4], voxels to world space.
    """
    axes = directions(affine)
    # of each pair
    cosines = np.abs(np.triu(axes.T @ axes, 1))
    return float(np.degrees(np.arcsin(cosines.max().clip(max=1))))


def tilt(affine: np.ndarray) -> float:
    """Returns by how many degrees, at most, a voxel axis lies off the body axis it is taken for.

    Args:
        affine: [4, 4], voxels to RAS+ world space.
    """
    axes, _ = lps_axes(affine)
    cosines = np.abs(directions(affine)[np.arange(3), list(axes)])
    return float(np.degrees(np.arccos(cosines.min().clip(max=1))))


def turned(affine: np.ndarray, other: np.ndarray) -> float:
    """Returns by how many degrees, at most, the directions of one voxel axis in two worlds differ.

    Args:
        affine, other: [4, 4], voxels to world space.
    """
    cosines = (directions(affine) * directions(other)).sum(0)
    return float(np.degrees(np.arccos(cosines.min().clip(-1, 1))))
