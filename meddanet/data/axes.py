"""How the voxel axes of a scan lie to each other and to the body's."""

from __future__ import annotations

import numpy as np

from .volume import lps_axes

# in degrees: lengths and angles that are taken from voxel sizes are right to 2 %
SLIGHT_SKEW = 2.0


def skew(affine: np.ndarray) -> float:
    """Returns by how many degrees, at most, the angle of two voxel axes differs from a right one.

    Args:
        affine: [4, 4], voxels to world space.
    """
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    # of each pair
    cosines = np.abs(np.triu(directions.T @ directions, 1))
    return float(np.degrees(np.arcsin(cosines.max().clip(max=1))))


def tilt(affine: np.ndarray) -> float:
    """Returns by how many degrees, at most, a voxel axis lies off the body axis it is taken for.

    Args:
        affine: [4, 4], voxels to RAS+ world space.
    """
    axes, _ = lps_axes(affine)
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    cosines = np.abs(directions[np.arange(3), list(axes)])
    return float(np.degrees(np.arccos(cosines.min().clip(max=1))))


def turned(affine: np.ndarray, other: np.ndarray) -> float:
    """Returns by how many degrees, at most, the directions of one voxel axis in two worlds differ.

    Args:
        affine, other: [4, 4], voxels to world space.
    """
    one, two = (form[:3, :3] / np.linalg.norm(form[:3, :3], axis=0) for form in (affine, other))
    return float(np.degrees(np.arccos((one * two).sum(0).min().clip(-1, 1))))


def axis_codes(affine: np.ndarray) -> str:
    """Returns where the voxel axes run to, such as "LPS": Left, Posterior, Superior.

    Args:
        affine: [4, 4], voxels to RAS+ world space; oblique axes go to the nearest world axis.
    """
    axes, signs = lps_axes(affine)
    ends = ["LPS"[world] if sign > 0 else "RAI"[world] for world, sign in enumerate(signs)]
    return "".join(ends[axes.index(voxel)] for voxel in range(3))
