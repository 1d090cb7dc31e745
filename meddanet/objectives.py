"""What a training step minimises: batches, and one objective per phase of Med-DANet V2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cost import cost_table
from .data.slices import CachedCase, SliceSampler, augment
from .losses import dice_loss, segmentation_loss
from .med_danet_v2 import MedDANetV2, TrainingOutput
from .routing import channels_last


@dataclass
class Batches:
    """Augmented batches of the training cases.

    Attributes:
        cases: Cached training cases.
        phantoms: Synthetic cases mixed in.
        seed: Seed of sampling and augmentation.
        cost_weight: Weight of the chosen route's cost, as a share of the dearest (lambda).
        bit_weight: Weight of the mean width's share of the dearest, in the quantised phase.
        intensity: Largest relative change and shift of a modality's intensities.
        margin: Pixels that a crop has to spare on each side of the lesion to be the policy's answer.
    """

    cases: list[CachedCase]
    phantoms: list[CachedCase] = field(default_factory=list)
    seed: int = 0
    cost_weight: float = 0.06
    bit_weight: float = 0.06
    intensity: float = 0.1
    margin: int = 0
    generator: torch.Generator = field(init=False)
    windows: SliceSampler = field(init=False)
    slices: SliceSampler = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.windows = SliceSampler(
            self.cases, self.seed + 1, lesion_share=0.67, window=128, phantoms=self.phantoms
        )
        self.slices = SliceSampler(self.cases, self.seed + 2, phantoms=self.phantoms)

    def window_batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Returns augmented 128-pixel windows, two thirds of them from slices with a lesion."""
        return augment(*self.windows.batch(size), self.generator, intensity=self.intensity)

    def slice_batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Returns augmented whole slices in their natural mix."""
        images, labels = self.slices.batch(size)
        return augment(images, labels, self.generator, shift=0.06, intensity=self.intensity)


Objective = Callable[[nn.Module, Batches, int, int], Tensor]


def static(model: nn.Module, batches: Batches, step: int, size: int) -> Tensor:
    """Loss of a plain segmenter, or of a dynamic model's own, on windows in float."""
    images, labels = batches.window_batch(size)
    return segmentation_loss(getattr(model, "segmenter", model)(channels_last(images)), labels)


def lesion_box(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (first [N, 2], last [N, 2], present [N]): the (y, x) box around all labels > 0."""
    lesion = labels > 0
    first, last = [], []
    for axis in (2, 1):
        line = lesion.any(axis).to(torch.uint8)
        first.append(line.argmax(1))
        last.append(line.shape[1] - 1 - line.flip(1).argmax(1))
    return torch.stack(first, 1), torch.stack(last, 1), lesion.flatten(1).any(1)


def oracle_route(labels: Tensor, crop_sizes: tuple[int, ...], margin: int = 0) -> Tensor:
    """Returns the cheapest route [N] that sees every labelled pixel: skip, first fit, or whole.

    A crop fits with `margin` pixels to spare on each side.
    """
    first, last, present = lesion_box(labels)
    extent = (last - first + 1).amax(1) + 2 * margin
    misfits = sum((extent > size).long() for size in sorted(crop_sizes))
    return torch.where(present, 1 + misfits, 0)


def centred_offset(labels: Tensor, size: int) -> Tensor:
    """Returns the (y, x) offset [N, 2] that centres a crop on the lesion, kept inside the slice."""
    first, last, _ = lesion_box(labels)
    play = first.new_tensor(labels.shape[1:]) - size
    return torch.minimum(((first + last + 1 - size) / 2).clamp_min(0), play)


def inside_crop(labels: Tensor, offset: Tensor, size: int) -> Tensor:
    """Returns the labels with everything outside the crop set to background."""
    rows = torch.arange(labels.shape[1], device=labels.device)[None] - offset[:, :1]
    columns = torch.arange(labels.shape[2], device=labels.device)[None] - offset[:, 1:]
    inside = ((rows >= 0) & (rows < size))[:, :, None] & ((columns >= 0) & (columns < size))[:, None]
    return labels * inside


def branch_loss(
    model: nn.Module, batches: Batches, step: int, size: int
) -> tuple[Tensor, list[Tensor]]:
    """Returns the loss of one branch on a batch of windows, and its widths [N, S].

    Steps take the branches in turn; crops lie near the lesion, whole pixels, and cost less, so
    their batches are half as large again.
    """
    index = step % (len(model.crop_sizes) + 1)
    if index == len(model.crop_sizes):
        images, labels = batches.window_batch(size)
        logits, num_bits = model.whole_branch(channels_last(images))
        return segmentation_loss(logits, labels), num_bits
    images, labels = batches.window_batch(size + size // 2)
    crop = model.crop_sizes[index]
    jitter = torch.randint(-16, 17, (len(labels), 2), generator=batches.generator)
    play = torch.tensor(labels.shape[1:]) - crop
    offset = torch.minimum((centred_offset(labels, crop).round() + jitter).clamp_min(0), play)
    logits, num_bits = model.crop_branch(channels_last(images), offset.float(), index)
    return segmentation_loss(logits, inside_crop(labels, offset, crop)), num_bits


def decision_loss(model: nn.Module, batches: Batches, step: int, size: int) -> Tensor:
    """Cross-entropy of the policy with the oracle's route, and the crop's distance in crop sizes.

    A slice weighs up to four times as much as an empty one by the lesion it holds, which is what a
    wrong skip loses.
    """
    images, labels = batches.slice_batch(size)
    images = channels_last(images)
    route = oracle_route(labels, model.crop_sizes, batches.margin)
    area = (labels > 0).flatten(1).sum(1)
    weight = 1 + 2 * (area / area[area > 0].float().mean()).nan_to_num(0).clamp(max=1.5)
    loss = (F.cross_entropy(model.decide(images), route, reduction="none") * weight).sum()
    loss = loss / weight.sum()
    position = model.locate(images)
    for index, crop in enumerate(model.crop_sizes):
        fits = route == index + 1
        if fits.any():
            offset = model.offset(position, crop, *labels.shape[1:])[fits]
            wanted = centred_offset(labels, crop)[fits]
            loss = loss + 2 * F.smooth_l1_loss(offset / crop, wanted / crop, beta=0.05)
    return loss


def segmenter(model: nn.Module, batches: Batches, step: int, size: int) -> Tensor:
    """The full-precision segmenter, crop and whole branches in turn."""
    return branch_loss(model, batches, step, size)[0]


def decisions(model: nn.Module, batches: Batches, step: int, size: int) -> Tensor:
    """Policy and position networks, taught by the labels."""
    return decision_loss(model, batches, step, size)


def quantised(model: nn.Module, batches: Batches, step: int, size: int) -> Tensor:
    """Everything on the quantisation grid, ranges learnt, bit widths under their cost."""
    loss, num_bits = branch_loss(model, batches, step, size)
    loss = loss + batches.bit_weight * width_share(model, num_bits)
    return loss + decision_loss(model, batches, step, size)


def joint(model: nn.Module, batches: Batches, step: int, size: int) -> Tensor:
    """The whole framework, route by Gumbel-softmax, Dice of the mix and cost (Eq. 10)."""
    images, labels = batches.window_batch(size)
    output = model(channels_last(images))
    branches = [segmentation_loss(logits, labels) for logits in output.branch_logits]
    mixed = dice_loss(output.mixed, labels)
    cost = batches.cost_weight * relative_cost(model, output).mean()
    return sum(branches) / len(branches) + mixed + cost + decision_loss(model, batches, step, size)


def width_share(model: MedDANetV2, num_bits: Tensor) -> Tensor:
    """Returns the mean width as a share of the widest, stages weighted by nothing but themselves."""
    return (num_bits / model.bit_selectors[0].widths.max()).mean()


def relative_cost(model: MedDANetV2, output: TrainingOutput, side: int = 128) -> Tensor:
    """Returns the chosen route's cost [N] as a share of a whole window at full precision.

    Costs are true multiply-adds, those of quantised stages scaled by b / 32; differentiable in the
    choice and in the widths (Med-DANet V2, Eq. 8).
    """
    table = cost_table(model, (1, model.in_channels, side, side), "mac")
    batch = len(output.choice)
    widths = [torch.full_like(output.num_bits[0], 32.0), *output.num_bits]
    costs = [
        table.slice_cost(torch.full((batch,), route, device=bits.device), bits)
        for route, bits in enumerate(widths)
    ]
    dearest = table.slice_cost(torch.tensor([len(model.routes) - 1]), widths[0][:1].cpu())
    return (output.choice * torch.stack(costs, 1)).sum(1) / dearest.item()


OBJECTIVES: dict[str, Objective] = {
    "static": static, "segmenter": segmenter, "decisions": decisions, "quantised": quantised,
    "joint": joint,
}
