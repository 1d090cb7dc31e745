"""A synthetic glioma case: four skull-stripped MR modalities and their labels, from a seed.

The anatomy is drawn in the millimetres of a BraTS volume (240 x 240 x 155) and sampled at the shape
asked for, so that any shape shows the whole head. Tissue contrasts are those of BraTS 2021.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MODALITIES = ("flair", "t1ce", "t1", "t2")

_FIELD = (240.0, 240.0, 155.0)  # mm, the field of view of a BraTS volume
_BOX = ((42, 198), (36, 226), (0, 151))  # mm, no voxel outside it belongs to the brain
_TUMOUR_SHARE = 0.58  # of the slices, at most
# value of each tissue in standard deviations from the brain's mean, per modality
_CSF = np.array([-2.3, -1.5, -2.3, 3.2], np.float32)
_GREY = np.array([0.5, -0.3, -0.3, -0.05], np.float32)
_WHITE = np.array([-0.35, 0.35, 0.75, -0.6], np.float32)
_VESSEL = np.array([0.0, 3.5, 0.5, 0.5], np.float32)
_NECROSIS = np.array([1.3, -0.8, -0.4, 2.0], np.float32)
_OEDEMA = np.array([1.5, -0.1, 0.1, 0.9], np.float32)
_ENHANCING = np.array([1.5, 2.3, 0.3, 0.9], np.float32)
_SPREAD = np.array([0.33, 0.36, 0.26, 0.45], np.float32)  # standard deviation / mean of the brain


@dataclass(frozen=True)
class Phantom:
    """A synthetic case.

    Attributes:
        data: float32 [4, H, W, D], whole numbers, background exactly 0.
        labels: uint8 [H, W, D] of classes 0 background, 1 necrotic core, 2 oedema, 3 enhancing.
        affine: float64 [4, 4], voxel to RAS millimetres; LPS voxel order, 1 mm, as BraTS files.
        modalities: names of the four channels.
    """

    data: np.ndarray
    labels: np.ndarray
    affine: np.ndarray
    modalities: tuple[str, ...] = MODALITIES


@dataclass(frozen=True)
class _Grid:
    """The sampled coordinates: three broadcastable float32 axes in mm."""

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.x.size, self.y.size, self.z.size


class _Noise:
    """Smooth and rough noise over a grid; a draw depends on the seed and the order of calls only."""

    def __init__(self, seed: int, grid: _Grid) -> None:
        self.rng = np.random.Generator(np.random.PCG64(seed))
        self.grid = grid

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(self.rng.random())

    def smooth(self, cell: float) -> np.ndarray:
        """Cubic B-spline noise of about unit variance, knots `cell` mm apart."""
        counts = [int(size / cell) + 5 for size in _FIELD]
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


def _ramp(value: np.ndarray, width: float) -> np.ndarray:
    """0 below -width / 2, 1 above width / 2, linear between."""
    return np.clip(value / np.float32(width) + np.float32(0.5), 0, 1)


def _inside(point: tuple[np.ndarray, ...], centre: tuple, radii: tuple) -> np.ndarray:
    """About the distance in mm from within an ellipsoid to its surface, negative outside."""
    total: np.ndarray | np.float32 = np.float32(0)
    for p, c, r in zip(point, centre, radii, strict=True):
        q = (p - np.float32(c)) / np.float32(r)
        total = total + q * q
    return (1 - np.sqrt(total)) * np.float32(min(radii))


def _union(point: tuple[np.ndarray, ...], *parts: tuple[tuple, tuple]) -> np.ndarray:
    total = _inside(point, *parts[0])
    for part in parts[1:]:
        np.maximum(total, _inside(point, *part), out=total)
    return total


@dataclass(frozen=True)
class _Anatomy:
    """Brain mask and the soft shares of its tissues (grey matter is what is left)."""

    brain: np.ndarray
    depth: np.ndarray
    side: np.ndarray
    csf: np.ndarray
    white: np.ndarray
    vessel: np.ndarray


def _anatomy(grid: _Grid, noise: _Noise) -> _Anatomy:
    x = grid.x - np.float32(120) + noise.smooth(45) * np.float32(2)
    y = grid.y + noise.smooth(45) * np.float32(4) + np.float32(noise.uniform(-4, 4))
    z = grid.z + noise.smooth(45) * np.float32(3) + np.float32(noise.uniform(-3, 3))
    ax = np.abs(x)
    point = (ax, y, z)
    # the lower half of the cerebrum is flatter than the upper
    flat = (ax, y, np.where(z < 78, 78 - (78 - z) * np.float32(1.5), z))
    stem = _inside(point, (0, 140, 32), (14, 14, 34))
    depth = _inside(flat, (0, 128, 78), (67, 84, 64))
    lobes = _union(point, ((38, 104, 48), (25, 38, 25)), ((26, 164, 38), (33, 38, 27)))
    depth = np.maximum(np.maximum(depth, lobes), stem)
    brain = np.maximum(depth, _inside(point, (0, 136, 50), (40, 40, 22))) > 0

    fold = noise.smooth(8)
    fissure = ax * 2 + np.clip(_inside(point, (0, 132, 62), (60, 46, 30)), 0, None) * 2
    # about the distance to the nearest fluid: the surface, or the sheet within a sulcus
    sulcus = np.abs(fold) * 6 + np.clip(depth - 16, 0, None) * np.float32(0.6)
    gap = np.minimum(np.minimum(depth, fissure) + np.float32(0.6), sulcus + np.float32(0.2))
    csf = 1 - _ramp(gap - np.float32(0.8), 1.2)
    white = _ramp(gap - np.float32(4.8), 1.4)

    size = noise.uniform(0.75, 1.35)
    ventricle = _union(
        point,
        ((10, 120, 88), (6 * size, 32, 8 * size)),
        ((20, 158, 80), (6 * size, 22, 8 * size)),
        ((0, 132, 72), (2.5 * size, 13, 10)),
        ((0, 160, 36), (5, 5, 8)),
        ((0, 114, 50), (12, 12, 5)),
        ((50, 108, 66), (17, 9, 2.5)),
    )
    # the cistern around the brain stem
    cistern = 2 - np.abs(stem + 2) + np.clip(58 - z, -6, 0)
    ventricle = np.maximum(ventricle, cistern)
    nuclei = _union(
        point,
        ((12, 140, 76), (8, 14, 9)),
        ((27, 122, 76), (6, 17, 9)),
        ((15, 106, 82), (5, 10, 9)),
    )
    white *= 1 - _ramp(nuclei, 2)
    fluid = _ramp(ventricle, 1.5)
    csf = np.maximum(csf, fluid)
    white *= 1 - csf
    plexus = _inside(point, (18, 152, 84), (2.5, 9, 3)) > 0
    crossing = (np.abs(fold) < 0.14) & (np.abs(noise.smooth(10)) < 0.2) & (depth < 18)
    return _Anatomy(brain, depth, x, csf, white, (plexus | crossing) & brain)


@dataclass(frozen=True)
class _Lesion:
    """Where one lesion is: classes 0..3 and how its three tissues deviate from the usual."""

    labels: np.ndarray
    shift: np.ndarray


def _centre(anatomy: _Anatomy, grid: _Grid, noise: _Noise, margin: float) -> tuple[float, ...]:
    """A random point of the cerebrum at least `margin` mm deep and off the midline."""
    low, high = (55, 60, 62), (185, 190, 122)
    at = (120.0, 128.0, 90.0)
    for _ in range(200):
        at = tuple(noise.uniform(a, b) for a, b in zip(low, high, strict=True))
        axes = (grid.x, grid.y, grid.z)
        i, j, k = (int(np.abs(g.ravel() - np.float32(p)).argmin()) for g, p in zip(axes, at))
        if anatomy.depth[i, j, k] > margin and abs(anatomy.side[i, j, k]) > margin + 4:
            break
    return at


def _lesion(anatomy: _Anatomy, grid: _Grid, noise: _Noise, core: float) -> _Lesion:
    """A core of radius `core` mm, with or without an enhancing rim, in an oedema."""
    kind = noise.uniform(0, 1)
    centre = _centre(anatomy, grid, noise, 10 + core / 3)
    stretch = [noise.uniform(0.85, 1.2) for _ in range(3)]
    point = (grid.x, grid.y, grid.z)
    distance = -_inside(point, centre, tuple(stretch)) / np.float32(min(stretch)) + 1
    ripple, finger = noise.smooth(12), noise.smooth(13)

    inner = distance + ripple * np.float32(0.12 * core + 0.4)
    reach = noise.uniform(4, 15)
    outer = distance + finger * np.float32(0.4 * reach) - anatomy.white * np.float32(0.6 * reach)
    tissue = anatomy.brain & (anatomy.csf < 0.5) & (anatomy.depth > 1)
    same_side = anatomy.side * np.float32(centre[0] - 120) > 0
    labels = np.zeros(grid.shape, np.uint8)
    labels[(outer < core + reach) & tissue & same_side] = 2
    in_core = (inner < core) & anatomy.brain & (anatomy.depth > 1)
    if kind < 0.7:
        rim = np.clip(np.float32(noise.uniform(2, 4.5)) * (1 + noise.smooth(14) / 2), 0.8, None)
        labels[in_core] = 1
        labels[in_core & (inner > core - rim)] = 3
    else:
        labels[in_core] = 1 if kind < 0.82 else 3
    shift = [[noise.uniform(-0.35, 0.35) for _ in MODALITIES] for _ in range(3)]
    return _Lesion(labels, np.array(shift, np.float32))


def _lesions(anatomy: _Anatomy, grid: _Grid, noise: _Noise, slices: int) -> list[_Lesion]:
    count = 1 + int(noise.uniform(0, 1) > 0.6) + int(noise.uniform(0, 1) > 0.75)
    kept: list[_Lesion] = []
    covered = np.zeros(grid.z.size, bool)
    for n in range(count):
        core = noise.uniform(9, 20) if n == 0 else noise.uniform(2.5, 9)
        lesion = _lesion(anatomy, grid, noise, core)
        union = covered | lesion.labels.any((0, 1))
        if union.sum() <= _TUMOUR_SHARE * slices:
            kept.append(lesion)
            covered = union
    return kept


def _blur(image: np.ndarray) -> None:
    """Binomial smoothing [1 2 1] / 4 along every axis, in place."""
    for axis in range(3):
        line = np.moveaxis(image, axis, 0)
        middle = (line[:-2] + line[2:]) * np.float32(0.25)
        line[1:-1] *= np.float32(0.5)
        line[1:-1] += middle


def _render(anatomy: _Anatomy, lesions: list[_Lesion], noise: _Noise, channel: int) -> np.ndarray:
    """One modality over the box, whole numbers, zero outside the brain."""
    grey = _GREY[channel] + np.float32(noise.uniform(-0.1, 0.1))
    image = grey + anatomy.white * (_WHITE[channel] - grey)
    image += anatomy.csf * (_CSF[channel] - image)
    image[anatomy.vessel] = _VESSEL[channel]
    texture = noise.smooth(6)
    for lesion in lesions:
        for tissue, mean in enumerate((_NECROSIS, _OEDEMA, _ENHANCING)):
            where = lesion.labels == tissue + 1
            value = mean[channel] + lesion.shift[tissue, channel]
            image[where] = value + texture[where] * np.float32(0.35)
    _blur(image)
    image += noise.smooth(5) * np.float32(0.06)
    image += noise.rough() * np.float32(0.08)
    spread = _SPREAD[channel] * np.float32(noise.uniform(0.8, 1.15))
    image = (1 + spread * image) * (1 + np.float32(0.04) * noise.smooth(70))
    image *= np.float32(noise.uniform(400, 1600))
    image = np.clip(np.rint(image), 1, 32767)
    return np.where(anatomy.brain, image, np.float32(0))


def make_phantom(seed: int = 0, shape: tuple[int, int, int] = (240, 240, 155)) -> Phantom:
    """Draw a synthetic four-modality glioma case.

    The same seed gives the same case on every platform: uniform draws of PCG64 and correctly
    rounded float32 arithmetic only.

    Args:
        seed: not negative; decides anatomy, lesions, contrasts and noise.
        shape: voxels (H, W, D); the head fills its usual share of any shape.

    Returns:
        The case, with at least 40 % of its axial slices free of tumour.

    Raises:
        ValueError: if the seed is negative or a side is shorter than 16 voxels.
    """
    if seed < 0:
        raise ValueError(f"seed is {seed}, expected 0 or more")
    if len(shape) != 3 or min(shape) < 16:
        raise ValueError(f"shape is {tuple(shape)}, expected three sides of at least 16 voxels")
    scale = [n / size for n, size in zip(shape, _FIELD, strict=True)]
    box = tuple(slice(int(a * s), int(b * s) + 1) for (a, b), s in zip(_BOX, scale, strict=True))
    axes = [
        ((np.arange(b.start, b.stop) + 0.5) / s).astype(np.float32)
        for b, s in zip(box, scale, strict=True)
    ]
    grid = _Grid(axes[0][:, None, None], axes[1][None, :, None], axes[2][None, None, :])
    noise = _Noise(seed, grid)
    anatomy = _anatomy(grid, noise)
    lesions = _lesions(anatomy, grid, noise, shape[2])
    labels = np.zeros(shape, np.uint8)
    for lesion in lesions:
        labels[box][lesion.labels > 0] = lesion.labels[lesion.labels > 0]
    data = np.zeros((len(MODALITIES), *shape), np.float32)
    for channel in range(len(MODALITIES)):
        data[channel][box] = _render(anatomy, lesions, noise, channel)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    affine[1, 3] = shape[1] - 1
    return Phantom(data, labels, affine)
