"""Surface areas against convex hulls, distances against a search among all surface elements."""

import math
import sys
from itertools import permutations, product

import nibabel
import numpy as np
import pytest
from scipy.spatial import ConvexHull, KDTree

from meddanet.metrics import _percentile_95, hausdorff_distance_95, surface_dice
from meddanet.surfaces import _surfel_areas, surface_distances

VOXELS = list(product((0, 1), repeat=3))
SPACINGS = [(1.0, 1.0, 1.0), (3.0, 2.0, 1.0), (0.7, 1.1, 5.0)]

# four voxels in a row of three turns, and the hexagon between them and the other four in triangles
PATH = [(0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1)]
PATH_TRIANGLES = [
    [(0, 0.5, 0), (1, 0, 0.5), (0.5, 1, 1)],
    [(0, 0.5, 0), (0, 0, 0.5), (1, 0, 0.5)],
    [(1, 0, 0.5), (1, 0.5, 1), (0.5, 1, 1)],
    [(0.5, 1, 1), (0.5, 1, 0), (0, 0.5, 0)],
]


def code_of(voxels) -> int:
    return sum(1 << (4 * y + 2 * x + z) for y, x, z in voxels)


def triangle_area(corners, spacing) -> float:
    a, b, c = np.array(corners) * spacing
    return float(np.linalg.norm(np.cross(b - a, c - a)) / 2)


def distance(p, q) -> int:
    return sum(abs(i - j) for i, j in zip(p, q, strict=True))


def joined(voxels) -> list[list]:
    """Groups voxels that share faces."""
    groups: list[list] = []
    for voxel in voxels:
        touching = [g for g in groups if any(distance(voxel, other) == 1 for other in g)]
        groups = [g for g in groups if g not in touching] + [[voxel, *sum(touching, [])]]
    return groups


def hull_area(group, spacing) -> float:
    """The faces, inside the cube, of the hull of voxels and the middles of the edges they cut."""
    middles = [
        tuple((i + j) / 2 for i, j in zip(p, q, strict=True))
        for p, q in product(group, VOXELS)
        if q not in group and distance(p, q) == 1
    ]
    points = np.array([*group, *middles], float)
    triangles = points[ConvexHull(points * spacing).simplices]
    on_cube = [any(np.ptp(t[:, k]) == 0 and t[0, k] in (0, 1) for k in range(3)) for t in triangles]
    return sum(
        triangle_area(t, spacing) for t, outer in zip(triangles, on_cube, strict=True) if not outer
    )


def areas_by_geometry(spacing) -> np.ndarray:
    areas = np.full(256, np.nan)
    for code in range(256):
        voxels = [v for v in VOXELS if code >> (4 * v[0] + 2 * v[1] + v[2]) & 1]
        fewer = voxels if len(voxels) <= 4 else [v for v in VOXELS if v not in voxels]
        areas[code] = sum(hull_area(group, spacing) for group in joined(fewer))
    # a path is not convex: its triangles are named above, here in every orientation
    for axes, mirror in product(permutations(range(3)), product((0, 1), repeat=3)):

        def turn(points, axes=axes, mirror=mirror):
            return [tuple(abs(mirror[k] - p[axes[k]]) for k in range(3)) for p in points]

        areas[code_of(turn(PATH))] = sum(triangle_area(turn(t), spacing) for t in PATH_TRIANGLES)
    return areas


@pytest.fixture(scope="module")
def geometry():
    return {spacing: areas_by_geometry(spacing) for spacing in SPACINGS}


@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_areas_of_all_256_neighbourhoods(geometry, spacing):
    np.testing.assert_allclose(_surfel_areas(spacing), geometry[spacing], rtol=1e-12)


def elements(mask, areas):
    """Corner positions and areas of a mask's surface elements, cell by cell."""
    padded = np.pad(np.ascontiguousarray(mask, np.uint8), 1)
    shape = [n + 1 for n in mask.shape]
    codes = np.zeros(shape, np.uint8)
    for y, x, z in VOXELS:
        codes += padded[y : y + shape[0], x : x + shape[1], z : z + shape[2]] * code_of([(y, x, z)])
    where = np.argwhere((codes > 0) & (codes < 255))
    return where, areas[codes[tuple(where.T)]]


def brute_force(a, b, areas, spacing, tolerance=1.0):
    """(HD95, surface Dice) by a nearest-neighbour search among the elements."""
    (at_a, area_a), (at_b, area_b) = elements(a, areas), elements(b, areas)
    tree_a, tree_b = KDTree(at_a * spacing), KDTree(at_b * spacing)
    percentiles, within = [], 0.0
    for points, area, tree in ((at_a, area_a, tree_b), (at_b, area_b, tree_a)):
        far, _ = tree.query(points * spacing)
        steps, step_of = np.unique(far.round(9), return_inverse=True)
        covered = np.bincount(step_of, area).cumsum()
        percentiles.append(steps[np.argmax(covered >= 0.95 * area.sum() - 1e-9)])
        within += area[far <= tolerance + 1e-9].sum()
    return max(percentiles), within / (area_a.sum() + area_b.sum())


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("share", [0.01, 0.3, 0.8])
def test_random_masks_agree_with_a_search(geometry, spacing, share):
    random = np.random.default_rng(1)
    # one layout each: nibabel hands out Fortran order
    a = random.random((9, 13, 6)) < share
    b = np.asfortranarray(random.random((9, 13, 6)) < share)
    distance, agreement = brute_force(a, b, geometry[spacing], spacing, 0.7)
    assert distance > 0 and 0 < agreement < 1
    assert hausdorff_distance_95(a, b, spacing=spacing) == pytest.approx(distance)
    assert surface_dice(a, b, 0.7, spacing=spacing) == pytest.approx(agreement)


def test_real_tumours_agree_with_a_search(geometry, real_data):
    spacing = (1.0, 1.0, 1.0)
    whole = [
        np.asarray(nibabel.load(path).dataobj) > 0
        for case in ("BraTS2021_00000", "BraTS2021_00002")
        for path in (real_data / "brats2021" / case).glob("*_seg.nii.gz")
    ]
    for a, b in (whole, (whole[0], np.roll(whole[0], 3, axis=1))):
        distance, agreement = brute_force(a, b, geometry[spacing], spacing)
        assert hausdorff_distance_95(a, b) == pytest.approx(distance)
        assert surface_dice(a, b) == pytest.approx(agreement)


def test_agrees_with_deepminds_package(real_data):
    deepmind = pytest.importorskip("surface_distance")
    path = real_data / "brats2021" / "BraTS2021_00000" / "BraTS2021_00000_seg.nii.gz"
    a = np.asarray(nibabel.load(path).dataobj) == 4
    b, spacing = np.roll(a, (1, 2, 1), (0, 1, 2)), (1.0, 0.9, 2.5)
    theirs = deepmind.compute_surface_distances(a, b, spacing)
    assert hausdorff_distance_95(a, b, spacing=spacing) == pytest.approx(
        deepmind.compute_robust_hausdorff(theirs, 95)
    )
    assert surface_dice(a, b, 1.5, spacing=spacing) == pytest.approx(
        deepmind.compute_surface_dice_at_tolerance(theirs, 1.5)
    )


def test_outside_the_array_is_background():
    # a cube that fills its array has the surface of the same cube inside a larger one
    a, spacing = np.ones((4, 4, 4), bool), (1.0, 2.0, 4.0)
    ((_, tight), _), ((_, roomy), _) = (surface_distances(m, m, spacing) for m in (a, np.pad(a, 3)))
    y, x, z = spacing
    faces = 2 * 3 * 3 * (y * x + x * z + z * y)
    edges = 4 * 3 * (y * math.hypot(x, z) + x * math.hypot(y, z) + z * math.hypot(y, x)) / 2
    corners = 8 * math.hypot(y * x, x * z, z * y) / 8
    assert tight.sum() == pytest.approx(faces + edges + corners)
    assert roomy.sum() == pytest.approx(faces + edges + corners)


def test_a_missing_edt_is_named_with_its_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "edt", None)
    a = np.ones((2, 2, 2), bool)
    with pytest.raises(ImportError, match=r'pip install "meddanet\[train\]"'):
        hausdorff_distance_95(a, a)


def test_the_95th_percentile_by_hand():
    """The smallest distance within which 95 % of the area lies, not of the elements."""
    distances = np.random.default_rng(0).permutation(np.arange(1.0, 101))
    assert _percentile_95(distances, np.ones(100)) == 95
    areas = np.where(distances > 90, 0.1, 1.0)  # 91 in all, of which 86.45 are 95 %
    assert _percentile_95(distances, areas) == 87
