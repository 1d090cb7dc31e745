"""A synthetic glioma case: four skull-stripped MR modalities and their labels, from a seed.

The anatomy is drawn in the millimetres of a BraTS volume (240 x 240 x 155) and sampled at the shape
asked for, so that any shape shows the whole head. Tissue contrasts are those of BraTS 2021.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .conventions import MODALITIES
from .labels import from_classes
from .nifti_writer import save_image
from .phantom_anatomy import FIELD_OF_VIEW, Anatomy, Grid, Noise, Point, draw_anatomy, inside

_BRAIN_BOX = ((42, 198), (36, 226), (0, 151))  # mm, no voxel outside it belongs to the brain
_TUMOUR_SHARE = 0.58  # of the slices, at most
# value of each tissue, per modality, in standard deviations from the brain's mean
_CSF = np.array([-2.3, -1.5, -2.3, 3.2], np.float32)
_GREY = np.array([0.5, -0.3, -0.3, -0.05], np.float32)
_WHITE = np.array([-0.35, 0.35, 0.75, -0.6], np.float32)
_VESSEL = np.array([0.0, 3.5, 0.5, 0.5], np.float32)
_NECROSIS = np.array([0.9, -0.8, -0.4, 2.0], np.float32)
_OEDEMA = np.array([0.95, -0.1, 0.1, 0.85], np.float32)
_ENHANCING = np.array([1.1, 1.9, 0.3, 0.9], np.float32)
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
class _Lesion:
    """Where one lesion is: classes 0..3 and how its three tissues deviate from the usual."""

    labels: np.ndarray
    shift: np.ndarray


def _centre(anatomy: Anatomy, grid: Grid, noise: Noise, margin: float) -> Point:
    """A random voxel of the cerebrum, more than `margin` mm from the surface and the midline."""
    room = anatomy.cerebrum & (anatomy.depth > margin) & (np.abs(anatomy.side) > margin + 4)
    candidates = np.flatnonzero(room & (grid.z > 50) & (grid.z < 122))
    chosen = candidates[int(noise.uniform(0, candidates.size))]
    i, j, k = np.unravel_index(chosen, grid.shape)
    return float(grid.x[i, 0, 0]), float(grid.y[0, j, 0]), float(grid.z[0, 0, k])


def _lesion(anatomy: Anatomy, grid: Grid, noise: Noise, core: float) -> _Lesion:
    """A core of about `core` mm radius, with or without an enhancing rim, in an oedema."""
    reach, kind = noise.uniform(4, 13), noise.uniform(0, 1)
    centre = _centre(anatomy, grid, noise, 8 + core / 3)
    stretch = noise.uniform(0.85, 1.2), noise.uniform(0.85, 1.2), noise.uniform(0.85, 1.2)
    distance = 1 - inside((grid.x, grid.y, grid.z), centre, stretch) / np.float32(min(stretch))

    tissue = anatomy.cerebrum & (anatomy.side * np.float32(centre[0] - 120) > 0)
    tissue &= distance < core + 1.3 * reach  # keeps the tumour-free share of slices
    # the oedema spreads along white matter
    spread = noise.smooth(13) * np.float32(0.5) - anatomy.white * np.float32(0.6)
    oedema = tissue & (distance + spread * np.float32(reach) < core + 0.64 * reach)
    inner = distance + noise.smooth(12) * np.float32(0.12 * core + 0.4)
    centre_mass = tissue & (inner < core)

    labels = np.zeros(grid.shape, np.uint8)
    labels[oedema & (anatomy.csf < 0.5)] = 2
    labels[centre_mass] = 3 if kind < 0.12 else 1
    if kind > 0.4:
        rim = np.clip(np.float32(noise.uniform(2, 4.5)) * (1 + noise.smooth(14) / 2), 0.8, None)
        labels[centre_mass & (inner > core - rim)] = 3
    shift = [[noise.uniform(-0.35, 0.35) for _ in MODALITIES] for _ in range(3)]
    return _Lesion(labels, np.array(shift, np.float32))


def _lesions(anatomy: Anatomy, grid: Grid, noise: Noise, slices: int) -> list[_Lesion]:
    """One to three lesions that share no voxel; a first one is always kept."""
    count = 1 + int(noise.uniform(0, 1) > 0.6) + int(noise.uniform(0, 1) > 0.75)
    first = _lesion(anatomy, grid, noise, noise.uniform(8, 17))
    kept, taken = [first], first.labels > 0
    for _ in range(count - 1):
        lesion = _lesion(anatomy, grid, noise, noise.uniform(2.5, 9))
        lesion.labels[taken] = 0
        union = taken | (lesion.labels > 0)
        if union.any((0, 1)).sum() <= _TUMOUR_SHARE * slices:
            kept.append(lesion)
            taken = union
    return kept


def _blur(image: np.ndarray) -> None:
    """Binomial smoothing [1 2 1] / 4 along every axis, in place."""
    for axis in range(3):
        line = np.moveaxis(image, axis, 0)
        middle = (line[:-2] + line[2:]) * np.float32(0.25)
        line[1:-1] *= np.float32(0.5)
        line[1:-1] += middle


def _render(anatomy: Anatomy, lesions: list[_Lesion], noise: Noise, channel: int) -> np.ndarray:
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
    image = (1 + spread * image) * (1 + np.float32(0.07) * noise.smooth(70))
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
    scale = [n / size for n, size in zip(shape, FIELD_OF_VIEW, strict=True)]
    box = tuple(
        slice(int(a * s), int(b * s) + 1) for (a, b), s in zip(_BRAIN_BOX, scale, strict=True)
    )
    axes = [
        ((np.arange(b.start, b.stop) + 0.5) / s).astype(np.float32)
        for b, s in zip(box, scale, strict=True)
    ]
    grid = Grid(axes[0][:, None, None], axes[1][None, :, None], axes[2][None, None, :])
    noise = Noise(seed, grid)
    anatomy = draw_anatomy(grid, noise)
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


def write_phantom(
    folder: str | Path,
    seed: int = 0,
    name: str = "phantom_000",
    shape: tuple[int, int, int] = (240, 240, 155),
) -> Path:
    """Write a phantom as a BraTS 2021 case folder: int16 images, uint8 labels 0, 1, 2, 4.

    Args:
        folder: where the case's folder appears, created if absent.
        seed: as in `make_phantom`.
        name: of the case, its folder and the start of its file names.
        shape: as in `make_phantom`.

    Returns:
        The case's folder, `folder / name`.

    Raises:
        VolumeError: if a file cannot be written.
        OSError: if the folder cannot be created.
    """
    phantom = make_phantom(seed, shape)
    case = Path(folder) / name
    case.mkdir(parents=True, exist_ok=True)
    for modality, image in zip(phantom.modalities, phantom.data, strict=True):
        path = case / f"{name}_{modality}.nii.gz"
        save_image(image.astype(np.int16), path, phantom.affine)
    labels = from_classes(phantom.labels, "brats2021")
    save_image(labels, case / f"{name}_seg.nii.gz", phantom.affine)
    return case
