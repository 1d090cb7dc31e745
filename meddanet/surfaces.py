"""Surfaces of voxel masks, their distances and areas, as in DeepMind's surface-distance.

One surface element lies at each voxel corner whose 2x2x2 voxels are not all alike; its weight is
the area of the marching-cubes patch there (Nikolov et al. 2018, arXiv:1809.04430; Lorensen and
Cline 1987). Outside the array is background.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

Directed = tuple[np.ndarray, np.ndarray]


def surface_distances(
    a: np.ndarray, b: np.ndarray, spacing: tuple[float, ...]
) -> tuple[Directed, Directed]:
    """Measures from each surface element of one mask to the nearest of the other, both ways.

    Args:
        a: Boolean mask with at least one voxel set, [H, W, D] in any order.
        b: The same, of the same shape.
        spacing: Voxel size along each axis, in mm.

    Returns:
        Two pairs, from a to b and from b to a: distances (float32, mm) and areas (float64, mm^2)
        of the elements, both 1-D.

    Raises:
        ImportError: If `edt` is not installed.
    """
    try:
        from edt import edt
    except ImportError as error:
        raise ImportError('surface distances need edt: pip install "meddanet[train]"') from error
    box = _bounding_box(a | b)
    areas = _surfel_areas(spacing)
    codes = [_neighbour_codes(mask[box]) for mask in (a, b)]
    surfaces = [(code != 0) & (code != 255) for code in codes]
    distances = [edt(~surface, anisotropy=spacing) for surface in surfaces]
    return (
        (distances[1][surfaces[0]], areas[codes[0][surfaces[0]]]),
        (distances[0][surfaces[1]], areas[codes[1][surfaces[1]]]),
    )


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    occupied = (np.flatnonzero(mask.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1)))
    return tuple(slice(int(where[0]), int(where[-1]) + 1) for where in occupied)


def _neighbour_codes(mask: np.ndarray) -> np.ndarray:
    """Returns which of the 2x2x2 voxels around each voxel corner are set: [H+1, W+1, D+1] uint8.

    Bit 4 * y + 2 * x + z stands for the voxel on the far side along the axes that are 1.
    """
    codes = np.zeros([length + 1 for length in mask.shape], np.uint8)
    for bit in range(8):
        far = (bit >> 2 & 1, bit >> 1 & 1, bit & 1)
        corners = tuple(
            slice(1 - f, 1 - f + length) for f, length in zip(far, mask.shape, strict=True)
        )
        codes[corners] |= mask * np.uint8(1 << bit)
    return codes


@lru_cache(maxsize=8)
def _surfel_areas(spacing: tuple[float, ...]) -> np.ndarray:
    """Returns the area of the marching-cubes patch of each neighbourhood, [256] float64 in mm^2.

    Vertices lie half-way between voxels. Of the set and the unset voxels the fewer are cut off,
    each group of face neighbours by a patch of its own.
    """
    areas = np.zeros(256)
    for code in range(256):
        voxels = {bit for bit in range(8) if code >> bit & 1}
        fewer = voxels if len(voxels) <= 4 else set(range(8)) - voxels
        areas[code] = sum(_patch_area(group, spacing) for group in _groups(fewer))
    return areas


def _groups(voxels: set[int]) -> Iterator[set[int]]:
    """Yields the sets of voxels joined by faces; neighbours differ in one bit."""
    left = set(voxels)
    while left:
        group = {left.pop()}
        while found := {voxel ^ step for voxel in group for step in (1, 2, 4)} & left:
            group |= found
            left -= found
        yield group


def _patch_area(group: set[int], spacing: tuple[float, ...]) -> float:
    """Returns the area of the patch between one group and the rest of its 2x2x2 voxels."""
    faces = [math.prod(spacing) / length for length in spacing]

    def tilted(*axes: int) -> float:
        return math.hypot(*(faces[axis] for axis in axes))

    # each link of two neighbours is seen from both ends
    links = [(voxel, axis) for voxel in group for axis in range(3) if voxel ^ 4 >> axis in group]
    degree = Counter(voxel for voxel, _ in links)
    linked = {axis for _, axis in links}
    across = [axis for axis in range(3) if axis not in linked]
    match len(group), len(links) // 2:
        case 1, _:  # a triangle
            return tilted(0, 1, 2) / 8
        case 2, _:  # a rectangle along the link
            return tilted(*across) / 2
        case 3, _:  # a triangle in the plane of the three, a trapezium that caps their corner
            return faces[across[0]] / 2 + tilted(0, 1, 2) * 3 / 8
        case 4, 4:  # a full cross-section
            return faces[across[0]]
        case _ if max(degree.values()) == 3:  # a hexagon
            return tilted(0, 1, 2) * 3 / 4
    # a path along all three axes: two parallel triangles, and two that lean on its middle link
    (middle,) = {a for v, a in links if degree[v] == degree[v ^ 4 >> a] == 2}
    first, last = linked - {middle}
    return tilted(0, 1, 2) / 2 + (tilted(middle, first) + tilted(middle, last)) / 4
