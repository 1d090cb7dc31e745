"""The head a phantom is made of: sampled space, smooth noise, brain, tissues."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FIELD_OF_VIEW = (240.0, 240.0, 155.0)  # mm, of a BraTS volume; all lengths here are in its mm

Point = tuple[float, float, float]
Axes = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Grid:
    """The sampled coordinates: three broadcastable float32 axes in mm."""

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along the three axes."""
        return self.x.size, self.y.size, self.z.size


class Noise:
    """Smooth and rough noise over a grid, decided by the seed and the order of calls."""

    def __init__(self, seed: int, grid: Grid) -> None:
        self.rng = np.random.Generator(np.random.PCG64(seed))
        self.grid = grid

    def uniform(self, low: float, high: float) -> float:
        """One draw between `low` and `high`."""
        return low + (high - low) * float(self.rng.random())

    def smooth(self, cell: float) -> np.ndarray:
        """Cubic B-spline noise of about unit variance, knots `cell` mm apart."""
        counts = [int(size / cell) + 5 for size in FIELD_OF_VIEW]
        field = (self.rng.random(counts, dtype=np.float32) - np.float32(0.5)) * np.float32(10.4)
        for axis, at in ((2, self.grid.z), (1, self.grid.y), (0, self.grid.x)):
            field = _spline(field, at.ravel() / np.float32(cell), axis)
        return field

    def rough(self) -> np.ndarray:
        """Independent triangular noise of unit variance per voxel."""
        noise = self.rng.random(self.grid.shape, dtype=np.float32)
        noise += self.rng.random(self.grid.shape, dtype=np.float32)
        noise -= np.float32(1)
        noise *= np.float32(2.4495)
        return noise


def _spline(field: np.ndarray, at: np.ndarray, axis: int) -> np.ndarray:
    knot = at.astype(np.int64)
    t = at - knot.astype(np.float32)
    weights = (
        (1 - t) * (1 - t) * (1 - t) / 6,
        (t * t * (3 * t - 6) + 4) / 6,
        (t * (t * (3 - 3 * t) + 3) + 1) / 6,
        t * t * t / 6,
    )
    shape = [1, 1, 1]
    shape[axis] = at.size
    total = np.take(field, knot, axis) * weights[0].reshape(shape)
    for k in (1, 2, 3):
        total += np.take(field, knot + k, axis) * weights[k].reshape(shape)
    return total


def ramp(value: np.ndarray, width: float) -> np.ndarray:
    """0 below -width / 2, 1 above width / 2, linear between."""
    return np.clip(value / np.float32(width) + np.float32(0.5), 0, 1)


def inside(at: Axes, centre: Point, radii: Point) -> np.ndarray:
    """About the distance in mm from within an ellipsoid to its surface, negative outside."""
    total: np.ndarray | np.float32 = np.float32(0)
    for p, c, r in zip(at, centre, radii, strict=True):
        q = (p - np.float32(c)) / np.float32(r)
        total = total + q * q
    return (1 - np.sqrt(total)) * np.float32(min(radii))


def union(at: Axes, *ellipsoids: tuple[Point, Point]) -> np.ndarray:
    """`inside` of several ellipsoids, each (centre, radii), taken together."""
    total = inside(at, *ellipsoids[0])
    for ellipsoid in ellipsoids[1:]:
        np.maximum(total, inside(at, *ellipsoid), out=total)
    return total


@dataclass(frozen=True)
class Anatomy:
    """Brain and tissues over a grid.

    Attributes:
        brain: bool, what skull stripping leaves.
        cerebrum: bool, where gliomas grow.
        side: float32, mm from the midline, negative on one side.
        depth: float32, mm below the brain's surface.
        csf: float32, share of fluid per voxel.
        white: float32, share of white matter; grey matter is what is left.
        vessel: bool, what takes up contrast agent without being a tumour.
    """

    brain: np.ndarray
    cerebrum: np.ndarray
    side: np.ndarray
    depth: np.ndarray
    csf: np.ndarray
    white: np.ndarray
    vessel: np.ndarray


def draw_anatomy(grid: Grid, noise: Noise) -> Anatomy:
    """A brain with folded cortex, ventricles, deep nuclei and vessels; no two seeds alike."""
    side = grid.x - np.float32(120) + noise.smooth(45) * np.float32(2)
    y = grid.y + noise.smooth(45) * np.float32(4) + np.float32(noise.uniform(-4, 4))
    z = grid.z + noise.smooth(45) * np.float32(3) + np.float32(noise.uniform(-3, 3))
    at = (np.abs(side), y, z)  # both hemispheres at once

    # the lower half of the cerebrum is flatter than the upper
    flat = (at[0], y, np.where(z < 78, 78 - (78 - z) * np.float32(1.5), z))
    cerebrum = np.maximum(
        inside(flat, (0, 128, 78), (67, 84, 64)), inside(at, (38, 104, 48), (25, 38, 25))
    )
    stem = inside(at, (0, 140, 32), (14, 14, 34))
    hindbrain = np.maximum(stem, inside(at, (26, 164, 38), (33, 38, 27)))
    depth = np.maximum(cerebrum, hindbrain)
    brain = np.maximum(depth, inside(at, (0, 136, 50), (40, 40, 22))) > 0

    fold = noise.smooth(8)
    csf, white = _cortex(at, depth, fold)
    fluid, nuclei = _deep_structures(at, stem, noise.uniform(0.75, 1.35))
    csf = np.maximum(csf, ramp(fluid, 1.5))
    white *= (1 - ramp(nuclei, 2)) * (1 - csf)

    crossing = (np.abs(fold) < 0.2) & (np.abs(noise.smooth(10)) < 0.2) & (depth < 20)
    sinus = (at[0] < 2) & (depth < 6) & ((z > 100) | (y > 170))
    plexus = inside(at, (18, 152, 84), (2.5, 9, 3)) > 0
    vessel = (crossing | sinus | plexus) & brain
    return Anatomy(brain, (cerebrum > 1) & (cerebrum > hindbrain), side, depth, csf, white, vessel)


def _cortex(at: Axes, depth: np.ndarray, fold: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares of fluid and white matter around the zero sheets of `fold`, the sulci."""
    fissure = at[0] * 2 + np.clip(inside(at, (0, 132, 62), (60, 46, 30)), 0, None) * 2
    # about the distance to the nearest fluid: the surface, or the sheet within a sulcus
    sulcus = np.abs(fold) * 6 + np.clip(depth - 18, 0, None) * np.float32(0.5)
    gap = np.minimum(np.minimum(depth, fissure) + np.float32(0.6), sulcus + np.float32(0.3))
    return 1 - ramp(gap - np.float32(0.8), 1.2), ramp(gap - np.float32(4.6), 1.4)


def _deep_structures(at: Axes, stem: np.ndarray, size: float) -> tuple[np.ndarray, np.ndarray]:
    """Distances into the inner fluid (ventricles scaled by `size`, cisterns) and the nuclei."""
    fluid = union(
        at,
        ((10, 120, 88), (6 * size, 32, 8 * size)),
        ((20, 158, 80), (6 * size, 22, 8 * size)),
        ((0, 132, 72), (2.5 * size, 13, 10)),
        ((0, 160, 36), (5, 5, 8)),
        ((0, 114, 50), (10, 9, 4)),
        ((50, 108, 66), (17, 9, 2.5)),
    )
    # the cistern around the brain stem
    np.maximum(fluid, np.float32(0.8) - np.abs(stem + 1) + np.clip(56 - at[2], -6, 0), out=fluid)
    nuclei = union(
        at,
        ((12, 140, 76), (8, 14, 9)),
        ((27, 122, 76), (6, 17, 9)),
        ((15, 106, 82), (5, 10, 9)),
    )
    return fluid, nuclei
