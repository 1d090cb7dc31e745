"""Augmented batches of the training cases, the same for the same seed and step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from .data.augment import Draws, augment, change_contrast, change_texture, spread, transplant
from .data.slices import CachedCase, SliceSampler
from .distributed import rank, world
from .recipe import PAPERS_AUGMENTATION, AugmentConfig


@dataclass
class Batches:
    """What a phase trains on.

    All randomness of a step follows from the seed and the step alone, so that a run that was
    stopped goes on with the batches it would have had. Where several processes train, each draws
    the whole batch and reads its own share.

    Attributes:
        cases: Cached training cases.
        phantoms: Synthetic cases mixed in.
        seed: Seed of sampling and augmentation; several numbers count as one.
        bit_weight: Weight of the mean width's share of the dearest, in the quantised phase.
        augment: How samples are varied.
        margin: Pixels a crop has to spare on each side of the lesion to be the policy's answer.
        window: Side of the windows in pixels; None = whole slices.
        lesion_share: Share of the windows that come from slices with a lesion, None = of all alike.
        canvas: Height and width that whole slices are padded to.
        device: Where batches lie; augmentation runs there.
        dtype: Of the images.
        z_scores: Whether images have mean 0 and standard deviation 1, as those in a Hounsfield
            window have not: their intensities are varied by as many of their own.
        drawn: Case and slice of every sample of the current step, donors of lesions included.
    """

    cases: list[CachedCase]
    phantoms: list[CachedCase] = field(default_factory=list)
    seed: int | Sequence[int] = 0
    bit_weight: float = 0.06
    augment: AugmentConfig = PAPERS_AUGMENTATION
    margin: int = 0
    window: int | None = 128
    lesion_share: float | None = 0.67
    canvas: tuple[int, int] = (0, 0)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    z_scores: bool = True
    drawn: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.windows = SliceSampler(
            self.cases, self.lesion_share, self.window, self.canvas, self.phantoms
        )
        self.slices = SliceSampler(self.cases, None, None, self.canvas, self.phantoms)
        self.generator = torch.Generator()
        self.seek(0)

    def seek(self, step: int) -> None:
        """Seeds everything random of one step, PyTorch's own generators (dropout) included."""
        seed = np.random.SeedSequence([*np.atleast_1d(self.seed).tolist(), step])
        sampling, augmentation, layers = seed.spawn(3)
        self.random = np.random.default_rng(sampling)
        self.generator.manual_seed(_number(augmentation))
        torch.manual_seed(_number(layers) + rank())
        self.drawn = []

    def window_batch(self, size: int, at_least: int = 0) -> tuple[Tensor, Tensor]:
        """Returns augmented windows, `lesion_share` of them from slices with a lesion.

        Args:
            size: Samples of all processes together, rounded up to their number.
            at_least: Side that windows have at least, in pixels; whole slices stay as they are.
        """
        sampler = self.windows
        if sampler.window is not None and sampler.window < at_least:
            sampler = replace(sampler, window=at_least)
        return self._batch(sampler, size)

    def slice_batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Returns augmented whole slices in their natural mix; lesions keep their look.

        A decision network that learns on fainter lesions takes more empty slices for lesions.
        """
        return self._batch(self.slices, size)

    def jitter(self, count: int, reach: int) -> Tensor:
        """Returns whole numbers [count, 2] from -reach to reach, for this process's samples."""
        shape = (count * world(), 2)
        drawn = torch.randint(-reach, reach + 1, shape, generator=self.generator)
        return drawn[rank() :: world()].to(self.device)

    def _batch(self, sampler: SliceSampler, size: int) -> tuple[Tensor, Tensor]:
        whole = -(-size // world()) * world()
        config, windows = self.augment, sampler is not self.slices
        images, labels = self._sample(sampler, whole)
        draws = Draws(self.generator, len(labels), self.device, rank(), world())
        if config.transplant and windows:
            donors = self._sample(sampler, whole)
            images, labels = transplant(images, labels, donors, draws, config.transplant)
        if config.contrast and windows:
            images = change_contrast(images, labels, draws, config.contrast)
        mean, deviation = (0.0, 1.0) if self.z_scores else spread(images)
        if config.texture and windows:
            images = change_texture(images, draws, config.texture, deviation)
        images, labels = augment(
            images, labels, draws, rotation=config.rotation, scale=config.zoom,
            shift=0.0 if windows else config.shift, intensity=config.intensity,
            mean=mean, deviation=deviation,
        )
        return images.to(self.dtype), labels

    def _sample(self, sampler: SliceSampler, size: int) -> tuple[Tensor, Tensor]:
        images, labels = sampler.batch(self.random, size, slice(rank(), None, world()))
        self.drawn += sampler.drawn
        return images.to(self.device), labels.to(self.device)


def _number(seed: np.random.SeedSequence) -> int:
    return int(seed.generate_state(1, np.uint64)[0]) >> 1
