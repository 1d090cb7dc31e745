"""How the voxel axes of a scan lie to each other and to the body's; arrays in another order."""

from __future__ import annotations

from itertools import permutations

import numpy as np

# the sign of each world axis (+x right, +y anterior, +z superior) along the voxel axes of "LPS"
_LPS = np.array([-1, -1, 1])
# in degrees: lengths and angles that are taken from voxel sizes are right to 2 %
SLIGHT_SKEW = 2.0
# of two affines, relative to the voxel size; exports of one scan differ by 1e-8
AFFINE_TOLERANCE = 1e-3


def directions(affine: np.ndarray) -> np.ndarray:
    """Returns unit vectors along an affine's voxel axes, the columns of [3, 3]."""
    return affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)


def lps_axes(affine: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
    """Returns (the voxel axis along each axis of LPS order, the direction of each: +1 or -1)."""
    # the closest rotation, so that sheared axes are matched by what remains after unshearing
    left, _, right = np.linalg.svd(directions(affine))
    rotation = left @ right
    world = np.arange(3)
    axes = max(permutations(range(3)), key=lambda p: np.abs(rotation[world, list(p)]).sum())
    return axes, np.where(rotation[world, list(axes)] < 0, -1, 1) * _LPS


def _flip(array: np.ndarray, signs: np.ndarray) -> np.ndarray:
    h, w, d = (slice(None, None, int(sign)) for sign in signs)
    return array[..., h, w, d]


def canonical(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Views the last three axes of an array in LPS voxel order, the order of BraTS files.

    Args:
        array: [..., H, W, D] in the voxel order that `affine` describes.
        affine: [4, 4], voxels to RAS+ world space; oblique axes go to the nearest world axis.

    Returns:
        A view whose last three indices grow toward Left, Posterior and Superior.
    """
    axes, signs = lps_axes(affine)
    lead = array.ndim - 3
    moved = array.transpose(*range(lead), *(lead + axis for axis in axes))
    return _flip(moved, signs)


def from_canonical(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Undoes `canonical`: views an LPS array [..., H, W, D] in the voxel order of `affine`."""
    axes, signs = lps_axes(affine)
    lead = array.ndim - 3
    flipped = _flip(array, signs)
    return flipped.transpose(*range(lead), *(lead + axis for axis in np.argsort(axes)))


def in_order_of(
    array: np.ndarray, affine: np.ndarray, like: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Views the last three axes of an array in the voxel order that is nearest to another affine's.

    Args:
        array: [..., H, W, D] in the voxel order that `affine` describes.
        affine: [4, 4], voxels to RAS+ world space.
        like: The affine [4, 4] whose order is wanted.

    Returns:
        The view and the affine [4, 4] of its voxels, which lie where they did.
    """
    axes, signs = lps_axes(affine)
    wanted, senses = lps_axes(like)
    turn = np.zeros((4, 4))
    turn[3, 3] = 1
    for axis, target, sign in zip(axes, wanted, signs * senses, strict=True):
        turn[axis, target] = sign
        turn[axis, 3] = array.shape[axis - 3] - 1 if sign < 0 else 0
    return from_canonical(canonical(array, affine), like), affine @ turn


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
