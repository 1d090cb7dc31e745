"""Axial slices for training: an uncompressed, memory-mapped cache, sampling, augmentation.

Every case is decompressed and normalised once; epochs then read slices from disk through the page
cache, so that memory stays bounded whatever the number of cases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class CachedCase:
    """One case on disk.

    Attributes:
        name: Case name.
        images: Memory map [D, C, H, W] float16, normalised.
        labels: Memory map [D, H, W] uint8, classes.
        brain: Indices of slices that hold any brain.
        lesion: Indices of slices that hold any label.
    """

    name: str
    images: np.ndarray
    labels: np.ndarray
    brain: np.ndarray
    lesion: np.ndarray


def write_cache(name: str, images: np.ndarray, labels: np.ndarray, folder: Path) -> None:
    """Stores slices [D, C, H, W] and classes [D, H, W] as `<name>.{images,labels}.npy`."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {"labels": labels.astype(np.uint8), "images": images.astype(np.float16)}
    for kind, array in arrays.items():
        partial = folder / f".{name}.{kind}.partial.npy"
        np.save(partial, array)
        partial.replace(folder / f"{name}.{kind}.npy")


def read_cache(name: str, folder: Path) -> CachedCase:
    """Maps a cached case into memory.

    Raises:
        FileNotFoundError: If the case was not cached.
    """
    images = np.load(folder / f"{name}.images.npy", mmap_mode="r")
    labels = np.load(folder / f"{name}.labels.npy", mmap_mode="r")
    brain = np.flatnonzero(images.any(axis=(1, 2, 3)))
    lesion = np.flatnonzero(labels.any(axis=(1, 2)))
    return CachedCase(name, images, labels, brain, lesion)


def folds(names: list[str], count: int, fold: int) -> tuple[list[str], list[str]]:
    """Splits patients into (training, held out): every `count`-th sorted name is held out."""
    ordered = sorted(names)
    held_out = ordered[fold::count]
    return [name for name in ordered if name not in held_out], held_out


class SliceSampler:
    """Draws batches of whole slices or windows, cases with equal chance.

    Args:
        cases: Cached cases.
        seed: Seed of the generator; the same seed gives the same batches.
        lesion_share: Share of samples drawn from slices with a lesion; the rest comes from all
            slices that hold brain. None samples all brain slices alike.
        window: Side of the window cut around a random lesion (or brain) pixel; None = whole slice.
        phantoms: Synthetic cases to mix in.
        phantom_share: Share of samples drawn from them.
    """

    def __init__(
        self,
        cases: list[CachedCase],
        seed: int,
        lesion_share: float | None = None,
        window: int | None = None,
        phantoms: list[CachedCase] | None = None,
        phantom_share: float = 0.05,
    ) -> None:
        self.cases = cases
        self.phantoms = phantoms or []
        self.phantom_share = phantom_share
        self.random = np.random.default_rng(seed)
        self.lesion_share = lesion_share
        self.window = window

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Returns (images float32 [N, C, H, W], labels int64 [N, H, W])."""
        pairs = [self._sample() for _ in range(size)]
        images = torch.from_numpy(np.stack([p[0] for p in pairs]).astype(np.float32))
        labels = torch.from_numpy(np.stack([p[1] for p in pairs]).astype(np.int64))
        return images, labels

    def _sample(self) -> tuple[np.ndarray, np.ndarray]:
        synthetic = self.phantoms and self.random.random() < self.phantom_share
        pool = self.phantoms if synthetic else self.cases
        case = pool[self.random.integers(len(pool))]
        wanted = self.lesion_share is not None and self.random.random() < self.lesion_share
        choices = case.lesion if wanted and len(case.lesion) else case.brain
        index = int(choices[self.random.integers(len(choices))])
        image, label = case.images[index], case.labels[index]
        if self.window is None:
            return image, label
        mask = label > 0 if label.any() else (image != 0).any(0)
        rows, columns = np.nonzero(mask)
        pick = self.random.integers(len(rows))
        centre = np.array([rows[pick], columns[pick]])
        jitter = self.random.integers(-self.window // 3, self.window // 3 + 1, size=2)
        limit = np.array(label.shape) - self.window
        y, x = np.clip(centre + jitter - self.window // 2, 0, np.maximum(limit, 0))
        cut = np.s_[..., y : y + self.window, x : x + self.window]
        return image[cut], label[cut]


def augment(
    images: Tensor, labels: Tensor, generator: torch.Generator, *, rotation: float = 15.0,
    scale: float = 0.15, shift: float = 0.0, intensity: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """Flips, turns, scales, shifts and re-tints a batch, on its own device.

    The papers' augmentation (flips with p = 0.5 on each axis, intensity * U(0.9, 1.1) +
    U(-0.1, 0.1)) with one factor per modality and none on the background, plus a small rotation
    and zoom.

    Args:
        images: [N, C, H, W]; background is exactly 0 and stays so.
        labels: [N, H, W] int64.
        generator: Source of randomness, on the CPU.
        rotation: Largest angle in degrees.
        scale: Largest relative change of size.
        shift: Largest shift as a share of the side.
        intensity: Largest relative change and shift of intensity.
    """
    batch, channels = images.shape[:2]
    device = images.device

    def uniform(*shape: int) -> Tensor:
        return (2 * torch.rand(*shape, generator=generator) - 1).to(device)

    gain, offset = 1 + intensity * uniform(batch, channels, 1, 1), uniform(batch, channels, 1, 1)
    images = torch.where(images != 0, images * gain + intensity * offset, images)
    angle, zoom = uniform(batch) * math.radians(rotation), 1 + scale * uniform(batch)
    flips = torch.where(uniform(batch, 2) < 0, -1.0, 1.0)
    theta = torch.zeros(batch, 2, 3, device=device)
    theta[:, 0, 0], theta[:, 0, 1] = zoom * angle.cos(), -zoom * angle.sin()
    theta[:, 1, 0], theta[:, 1, 1] = zoom * angle.sin(), zoom * angle.cos()
    theta[:, :, :2] *= flips[:, None, :]
    theta[:, :, 2] = 2 * shift * uniform(batch, 2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, mode="bilinear", align_corners=False)
    turned = F.grid_sample(labels[:, None].float(), grid, mode="nearest", align_corners=False)
    return images, turned[:, 0].long()
