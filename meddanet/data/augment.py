"""Augmentation of batches of slices, on their own device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """The random numbers of one batch, the same however many processes share it.

    Attributes:
        generator: Source of randomness, on the CPU.
        count: Samples of this process.
        device: Where the numbers are used.
        rank: This process; it has every `world`-th sample of the whole batch.
        world: Number of processes.
    """

    generator: torch.Generator
    count: int
    device: torch.device
    rank: int = 0
    world: int = 1

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Returns numbers [count, *shape] from low to high."""
        drawn = torch.rand(self.count * self.world, *shape, generator=self.generator)
        return (low + (high - low) * drawn[self.rank :: self.world]).to(self.device)

    def normal(self, *shape: int) -> Tensor:
        """Returns normally distributed numbers [count, *shape]."""
        drawn = torch.randn(self.count * self.world, *shape, generator=self.generator)
        return drawn[self.rank :: self.world].to(self.device)

    def chance(self, share: float, *shape: int) -> Tensor:
        """Returns booleans [count, *shape], true with this chance."""
        return self.uniform(0, 1, *shape) < share


def transplant(
    images: Tensor, labels: Tensor, donors: tuple[Tensor, Tensor], draws: Draws, share: float
) -> tuple[Tensor, Tensor]:
    """Pastes the lesions of donor slices into a share of the slices, where both hold brain.

    Sources: TumorCP (Yang et al. 2021) and CarveMix (Zhang et al. 2021), on slices; lesions stay
    where they were, but for a mirroring, and fade in over a pixel.

    Args:
        images: [N, C, H, W]; background is exactly 0.
        labels: [N, H, W] int64.
        donors: As many images and labels.
        draws: Random numbers.
        share: Chance of a slice.
    """
    mirror = draws.chance(0.5)
    other = torch.where(mirror[:, None, None, None], donors[0].flip(3), donors[0])
    lesion = torch.where(mirror[:, None, None], donors[1].flip(2), donors[1])
    brain = (images != 0).any(1) & (other != 0).any(1) & draws.chance(share)[:, None, None]
    taken = (lesion > 0) & brain
    faded = F.avg_pool2d(taken[:, None].to(images.dtype), 3, 1, 1) * brain[:, None]
    mixed = images + faded * (other - images)
    # what was background in one modality alone stays background in it
    return torch.where(images != 0, mixed, images), torch.where(taken, lesion, labels)


def change_contrast(images: Tensor, labels: Tensor, draws: Draws, share: float) -> Tensor:
    """Makes the lesions of a share of the slices fainter, or a little stronger.

    Every class moves towards the mean of the slice's normal tissue in each modality, or away from
    it: to 0.4 to 1.15 of its distance, times 0.75 to 1.25 for each class and modality by itself.

    Args:
        images: [N, C, H, W]; background is exactly 0.
        labels: [N, H, W] int64.
        draws: Random numbers.
        share: Chance of a slice.
    """
    channels, classes = images.shape[1], int(labels.max()) if labels.numel() else 0
    signal = images != 0
    normal = (signal & (labels == 0)[:, None]).to(images.dtype)
    mean = (images * normal).sum((2, 3)) / normal.sum((2, 3)).clamp_min(1)
    chosen, common = draws.chance(share), draws.uniform(0.4, 1.15)
    own = draws.uniform(0.75, 1.25, _MOST_CLASSES, channels)
    change = torch.where(chosen[:, None, None], common[:, None, None] * own - 1, 0)
    factor = torch.zeros_like(images)
    for k in range(1, classes + 1):
        mask = F.avg_pool2d((labels == k)[:, None].to(images.dtype), 5, 1, 2)
        factor = factor + mask * change[:, (k - 1) % _MOST_CLASSES, :, None, None]
    moved = images + factor * (images - mean[:, :, None, None])
    return torch.where(signal, moved, images)


_MOST_CLASSES = 8


def spread(images: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and standard deviation [N, C, 1, 1] of what is not background.

    Args:
        images: [N, C, H, W]; background is exactly 0.
    """
    signal = (images != 0).to(images.dtype)
    pixels = signal.sum((2, 3), keepdim=True).clamp_min(1)
    mean = images.sum((2, 3), keepdim=True) / pixels
    return mean, (((images - mean) * signal).square().sum((2, 3), keepdim=True) / pixels).sqrt()


def change_texture(
    images: Tensor, draws: Draws, share: float, deviation: Tensor | float = 1.0
) -> Tensor:
    """Bends the grey values of half of the modalities, blurs and roughens a share of the slices.

    Gamma 0.7 to 1.4 over each modality's range, a box of three pixels mixed in by 0.3 to 0.8, noise
    of up to a tenth of a standard deviation; the background stays 0.

    Args:
        images: [N, C, H, W]; background is exactly 0.
        draws: Random numbers.
        share: Chance of a slice to be blurred, and of one to be roughened.
        deviation: Standard deviation of the images, 1 for z-scores, or [N, C, 1, 1].
    """
    channels = images.shape[1]
    signal = images != 0
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    span = (high - low).clamp_min(1e-6)
    gamma = draws.uniform(-0.35, 0.35, channels, 1, 1).exp()
    bend = draws.chance(0.5, channels, 1, 1)
    bent = ((images - low) / span).clamp_min(0) ** gamma * span + low
    images = torch.where(bend & signal, bent, images)
    mix = draws.uniform(0.3, 0.8, 1, 1, 1) * draws.chance(share, 1, 1, 1)
    images = torch.lerp(images, F.avg_pool2d(images, 3, 1, 1), mix)
    strength = draws.uniform(0, 0.1, 1, 1, 1) * draws.chance(share, 1, 1, 1)
    images = images + strength * deviation * draws.normal(*images.shape[1:])
    return images * signal


def augment(
    images: Tensor, labels: Tensor, draws: Draws, *, rotation: float = 15.0, scale: float = 0.15,
    shift: float = 0.0, intensity: float = 0.1,
    mean: Tensor | float = 0.0, deviation: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Flips, turns, scales, shifts and re-tints a batch.

    The papers' augmentation (flips with p = 0.5 on each axis, intensity * U(0.9, 1.1) +
    U(-0.1, 0.1)) with one factor per modality and none on the background, plus a small rotation
    and zoom.

    Args:
        images: [N, C, H, W]; background is exactly 0 and stays so.
        labels: [N, H, W] int64.
        draws: Random numbers.
        rotation: Largest angle in degrees.
        scale: Largest relative change of size.
        shift: Largest shift as a share of the side.
        intensity: Largest relative change of a modality's distance from its mean, and largest shift
            in standard deviations.
        mean: Of the images, 0 for z-scores, or [N, C, 1, 1] as from `spread`.
        deviation: Standard deviation of the images likewise, 1 for z-scores.
    """
    batch, channels, height, width = images.shape
    gain, offset = draws.uniform(-1, 1, channels, 1, 1), draws.uniform(-1, 1, channels, 1, 1)
    tinted = mean + (images - mean) * (1 + intensity * gain) + intensity * deviation * offset
    images = torch.where(images != 0, tinted, images)
    angle = draws.uniform(-1, 1) * math.radians(rotation)
    zoom = 1 + scale * draws.uniform(-1, 1)
    flips = torch.where(draws.uniform(-1, 1, 2) < 0, -1.0, 1.0)
    theta = torch.zeros(batch, 2, 3, device=images.device)
    # in shares of each side: a turn of a slice that is not square is no turn of these
    theta[:, 0, 0], theta[:, 0, 1] = zoom * angle.cos(), -zoom * angle.sin() * (height / width)
    theta[:, 1, 0], theta[:, 1, 1] = zoom * angle.sin() * (width / height), zoom * angle.cos()
    theta[:, :, :2] *= flips[:, None, :]
    theta[:, :, 2] = 2 * shift * draws.uniform(-1, 1, 2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, mode="bilinear", align_corners=False)
    turned = F.grid_sample(labels[:, None].float(), grid, mode="nearest", align_corners=False)
    return images, turned[:, 0].long()
