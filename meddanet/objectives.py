"""What a training step minimises: one objective per phase of Med-DANet V2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batches import Batches
from .cost import CostTable, cost_table
from .distributed import global_mean, global_sum
from .losses import LOSSES
from .med_danet_v2 import TrainingOutput
from .networks.heatmap import HeatmapLocator
from .recipe import PhaseConfig
from .routing import channels_last

# (model, batches, step, phase) -> loss of the whole batch
Objective = Callable[[Any, Batches, int, PhaseConfig], Tensor]


def static(model: Any, batches: Batches, step: int, phase: PhaseConfig) -> Tensor:
    """Loss of a plain segmenter, or of a dynamic model's own, on windows in float."""
    images, labels = batches.window_batch(phase.batch)
    logits = getattr(model, "segmenter", model)(channels_last(images))
    return LOSSES[phase.loss][0](logits, labels)


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
    inside_rows, inside_columns = ((x >= 0) & (x < size) for x in (rows, columns))
    return labels * (inside_rows[:, :, None] & inside_columns[:, None])


_RIM = 16  # pixels


def branch_loss(
    model: Any, batches: Batches, step: int, phase: PhaseConfig
) -> tuple[Tensor, Tensor]:
    """Returns the loss of one branch on a batch of windows, and its widths [N, S].

    Steps take the branches in turn; crops lie near the lesion, whole pixels, and cost less, so
    their batches are half as large again.
    """
    index, size = step % (len(model.crop_sizes) + 1), phase.batch
    loss = LOSSES[phase.loss][0]
    if index == len(model.crop_sizes):
        images, labels = batches.window_batch(size)
        logits, num_bits = model.whole_branch(channels_last(images))
        return loss(logits, labels), num_bits
    crop = model.crop_sizes[index]
    # a crop that fills its window would never show its last stage the empty canvas around it
    images, labels = batches.window_batch(size + size // 2, crop + _RIM)
    jitter = batches.jitter(len(labels), crop // 6)
    play = torch.tensor(labels.shape[1:], device=labels.device) - crop
    offset = torch.minimum((centred_offset(labels, crop).round() + jitter).clamp_min(0), play)
    logits, num_bits = model.crop_branch(channels_last(images), offset.to(images.dtype), index)
    return loss(logits, inside_crop(labels, offset, crop)), num_bits


def decisions(model: Any, batches: Batches, step: int, phase: PhaseConfig) -> Tensor:
    """Cross-entropy of the policy with the oracle's route, and the crop's distance in crop sizes.

    A position network with a map also learns where the lesion's box lies. A slice weighs up to four
    times as much as an empty one by the lesion it holds, which is what a wrong skip loses.
    """
    images, labels = batches.slice_batch(phase.batch)
    return oracle_loss(model, channels_last(images), labels, batches.margin)


def oracle_loss(model: Any, images: Tensor, labels: Tensor, margin: int = 0) -> Tensor:
    """The loss of `decisions` on given slices [N, C, H, W] and labels [N, H, W]."""
    # never in half precision: oneDNN's bfloat16 depthwise weight gradient is garbage on maps of
    # one column, and the networks are tiny
    with torch.autocast(images.device.type, enabled=False):
        glance = model.at_a_glance(images)
        route_logits, (position, heat) = model.policy(glance), _located(model, glance)
    route = oracle_route(labels, model.crop_sizes, margin)
    area = (labels > 0).flatten(1).sum(1).to(images.dtype)
    mean_area = global_sum(area.sum()) / global_sum((area > 0).to(area).sum()).clamp_min(1)
    weight = 1 + 2 * (area / mean_area.clamp_min(1)).clamp(max=1.5)
    loss = F.cross_entropy(route_logits, route, reduction="none") * weight
    loss = global_sum(loss.sum()) / global_sum(weight.sum())
    for index, crop in enumerate(model.crop_sizes):
        fits = (route == index + 1).to(images.dtype)
        offset = model.offset(position, crop, *labels.shape[1:])
        wanted = centred_offset(labels, crop).to(offset.dtype)
        miss = F.smooth_l1_loss(offset / crop, wanted / crop, beta=0.05, reduction="none").mean(1)
        loss = loss + 2 * global_sum((miss * fits).sum()) / global_sum(fits.sum()).clamp_min(1)
    if heat is not None:
        present = (route > 0).to(images.dtype)
        missed = global_sum((heat_loss(heat, labels) * present).sum())
        loss = loss + missed / global_sum(present.sum()).clamp_min(1) / 2
    return loss


def _located(model: Any, glance: Tensor) -> tuple[Tensor, Tensor | None]:
    """Returns where crops go [N, 2] and, where the network has one, its map [N, 1, h, w]."""
    if not isinstance(model.position, HeatmapLocator):
        return model.position(glance).sigmoid(), None
    heat = model.position.heat(glance)
    return model.position.centre(heat, glance).sigmoid(), heat


def heat_loss(heat: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy [N] of a map [N, 1, h, w] with even heat over the lesion's box in [N, H, W]."""
    first, last, _ = lesion_box(labels)
    inside = [
        (at >= first[:, axis, None]) & (at <= last[:, axis, None])
        for axis, side in enumerate(labels.shape[1:])
        for at in [torch.arange(side, device=labels.device)]
    ]
    box = (inside[0][:, :, None] & inside[1][:, None]).to(heat.dtype)
    height, width = heat.shape[2:]
    wanted = F.adaptive_avg_pool2d(box[:, None], (height, width)).flatten(1)
    wanted = wanted / wanted.sum(1, keepdim=True)
    return -(wanted * heat.flatten(1).log_softmax(1)).sum(1)


def segmenter(model: Any, batches: Batches, step: int, phase: PhaseConfig) -> Tensor:
    """The full-precision segmenter, crop and whole branches in turn."""
    return branch_loss(model, batches, step, phase)[0]


def quantised(model: Any, batches: Batches, step: int, phase: PhaseConfig) -> Tensor:
    """Everything on the quantisation grid, ranges learnt, bit widths under their cost."""
    loss, num_bits = branch_loss(model, batches, step, phase)
    loss = loss + batches.bit_weight * width_share(model, num_bits)
    if phase.oracle_weight:
        loss = loss + phase.oracle_weight * decisions(model, batches, step, phase)
    return loss


def joint(model: Any, batches: Batches, step: int, phase: PhaseConfig) -> Tensor:
    """The whole framework, route by Gumbel-softmax, Dice of the mix and cost (Eq. 10)."""
    of_logits, of_probability = LOSSES[phase.loss]
    images, labels = batches.window_batch(phase.batch, max(model.crop_sizes, default=0) + _RIM)
    output = model(channels_last(images))
    size = images.shape[2], images.shape[3]
    loss = (phase.cost_weight or 0) * global_mean(relative_cost(model, output, size))
    if phase.branch_weight:
        branches = [of_logits(logits, labels) for logits in output.branch_logits]
        loss = loss + phase.branch_weight * sum(branches) / len(branches)
    if phase.mixed_weight:
        loss = loss + phase.mixed_weight * of_probability(output.mixed, labels)
    if phase.branch_cost_weight:
        costs = route_costs(model, output.num_bits, size)
        loss = loss + phase.branch_cost_weight * global_mean(costs[:, 1:].sum(1))
    if phase.oracle_weight:
        loss = loss + phase.oracle_weight * decisions(model, batches, step, phase)
    return loss


def width_share(model: Any, num_bits: Tensor) -> Tensor:
    """Returns the mean of widths [N, S], over samples and stages, as a share of the widest."""
    return global_mean(num_bits / model.bit_selectors[0].widths.max())


_TABLES: WeakKeyDictionary[nn.Module, dict[tuple[int, int], CostTable]] = WeakKeyDictionary()


def route_costs(model: Any, num_bits: list[Tensor], size: tuple[int, int]) -> Tensor:
    """Returns what each route costs each sample, [N, R], as shares of a whole one in 32 bit.

    Costs are true multiply-adds, those of quantised stages scaled by b / 32; differentiable in the
    widths (Med-DANet V2, Eq. 8).

    Args:
        model: Dynamic model.
        num_bits: Widths [N, S] of each route but the skip.
        size: Height and width of the input.
    """
    tables = _TABLES.setdefault(model, {})
    if size not in tables:
        # counted once: counting runs a copy of the model
        tables[size] = cost_table(model, (1, model.in_channels, *size), "mac")
    table, batch = tables[size], len(num_bits[0])
    widths = [torch.full_like(num_bits[0], 32.0), *num_bits]
    costs = [
        table.slice_cost(torch.full((batch,), route, device=bits.device), bits)
        for route, bits in enumerate(widths)
    ]
    dearest = table.slice_cost(torch.tensor([len(model.routes) - 1]), widths[0][:1].cpu())
    return torch.stack(costs, 1) / dearest.item()


def relative_cost(
    model: Any, output: TrainingOutput, size: tuple[int, int] = (128, 128)
) -> Tensor:
    """Returns the chosen route's cost [N] as a share; differentiable in the choice too."""
    return (output.choice * route_costs(model, output.num_bits, size)).sum(1)


OBJECTIVES: dict[str, Objective] = {
    "static": static, "segmenter": segmenter, "decisions": decisions, "quantised": quantised,
    "joint": joint,
}
