"""Augmentation of batches of slices, on their own device."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def augment(
    images: Tensor, labels: Tensor, generator: torch.Generator, *, rotation: float = 15.0,
    scale: float = 0.15, shift: float = 0.0, intensity: float = 0.1, rank: int = 0, world: int = 1,
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
        rank: Number of the process whose share this batch is, every `world`-th sample of the whole.
        world: Number of processes.
    """
    batch, channels, height, width = images.shape
    device = images.device

    def uniform(count: int, *shape: int) -> Tensor:
        drawn = 2 * torch.rand(count * world, *shape, generator=generator) - 1
        return drawn[rank::world].to(device)

    gain, offset = 1 + intensity * uniform(batch, channels, 1, 1), uniform(batch, channels, 1, 1)
    images = torch.where(images != 0, images * gain + intensity * offset, images)
    angle, zoom = uniform(batch) * math.radians(rotation), 1 + scale * uniform(batch)
    flips = torch.where(uniform(batch, 2) < 0, -1.0, 1.0)
    theta = torch.zeros(batch, 2, 3, device=device)
    # in shares of each side: a turn of a slice that is not square is no turn of these
    theta[:, 0, 0], theta[:, 0, 1] = zoom * angle.cos(), -zoom * angle.sin() * (height / width)
    theta[:, 1, 0], theta[:, 1, 1] = zoom * angle.sin() * (width / height), zoom * angle.cos()
    theta[:, :, :2] *= flips[:, None, :]
    theta[:, :, 2] = 2 * shift * uniform(batch, 2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, mode="bilinear", align_corners=False)
    turned = F.grid_sample(labels[:, None].float(), grid, mode="nearest", align_corners=False)
    return images, turned[:, 0].long()
