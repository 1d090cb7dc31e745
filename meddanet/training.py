"""Training of Med-DANet V2 in phases, and of the static segmenter it is compared with.

One phase is one objective over some parts of the model for a number of steps. Each has its own
warm-up and poly schedule (Med-DANet V2, section 4.1: Adam with amsgrad, weight decay 1e-5).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
import numpy as np
from tqdm import tqdm

from .build import build_med_danet_v2, build_segmenter
from .cost import cost_table
from .data import (
    canonical,
    detect_label_convention,
    find_cases,
    load_labels,
    load_volume,
    normalize,
    to_classes,
    to_slices,
)
from .data.phantom import make_phantom
from .data.slices import CachedCase, SliceSampler, augment, folds, read_cache, write_cache
from .layers import quantized_layers, set_quantization
from .losses import dice_loss, segmentation_loss
from .med_danet_v2 import MedDANetV2, TrainingOutput, channels_last
from .recipe import PhaseConfig, TrainConfig
from .weights import save_model


@dataclass
class Batches:
    """Augmented batches of the training cases.

    Attributes:
        cases: Cached training cases.
        phantoms: Synthetic cases mixed in.
        seed: Seed of sampling and augmentation.
        cost_weight: Weight of the chosen route's cost, as a share of the dearest (lambda).
        bit_weight: Weight of the mean width's share of the dearest, in the quantised phase.
    """

    cases: list[CachedCase]
    phantoms: list[CachedCase] = field(default_factory=list)
    seed: int = 0
    cost_weight: float = 0.06
    bit_weight: float = 0.06
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
        return augment(*self.windows.batch(size), self.generator)

    def slice_batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Returns augmented whole slices in their natural mix."""
        return augment(*self.slices.batch(size), self.generator, shift=0.06)


Objective = Callable[[nn.Module, Batches, int, int], Tensor]


def static(model: nn.Module, batches: Batches, step: int, size: int) -> Tensor:
    """Loss of a plain segmenter on windows: the baseline the dynamic model is compared with."""
    images, labels = batches.window_batch(size)
    return segmentation_loss(model(channels_last(images)), labels)


def lesion_box(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (first [N, 2], last [N, 2], present [N]): the (y, x) box around all labels > 0."""
    lesion = labels > 0
    first, last = [], []
    for axis in (2, 1):
        line = lesion.any(axis).to(torch.uint8)
        first.append(line.argmax(1))
        last.append(line.shape[1] - 1 - line.flip(1).argmax(1))
    return torch.stack(first, 1), torch.stack(last, 1), lesion.flatten(1).any(1)


def oracle_route(labels: Tensor, crop_sizes: tuple[int, ...]) -> Tensor:
    """Returns the cheapest route [N] that sees every labelled pixel: skip, first fit, or whole."""
    first, last, present = lesion_box(labels)
    extent = (last - first + 1).amax(1)
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

    Three of four batches are whole slices, the fourth windows, so that both protocols are served.
    """
    draw = batches.window_batch if step % 4 == 3 else batches.slice_batch
    images, labels = draw(size)
    images, route = channels_last(images), oracle_route(labels, model.crop_sizes)
    loss = F.cross_entropy(model.decide(images), route)
    position = model.locate(images)
    for index, crop in enumerate(model.crop_sizes):
        fits = route == index + 1
        if fits.any():
            offset = model.offset(position, crop, *labels.shape[1:])[fits]
            wanted = centred_offset(labels, crop)[fits]
            loss = loss + F.smooth_l1_loss(offset / crop, wanted / crop, beta=0.05)
    return loss


def segmenter(model: nn.Module, batches: Batches, step: int, size: int) -> Tensor:
    """Phase 1: the full-precision segmenter, crop and whole branches in turn."""
    return branch_loss(model, batches, step, size)[0]


def decisions(model: nn.Module, batches: Batches, step: int, size: int) -> Tensor:
    """Phase 2: policy and position networks, taught by the labels."""
    return decision_loss(model, batches, step, size)


def quantised(model: nn.Module, batches: Batches, step: int, size: int) -> Tensor:
    """Phase 3: everything on the quantisation grid, ranges learnt, bit widths under their cost."""
    loss, num_bits = branch_loss(model, batches, step, size)
    loss = loss + batches.bit_weight * width_share(model, num_bits)
    return loss + decision_loss(model, batches, step, size)


def joint(model: nn.Module, batches: Batches, step: int, size: int) -> Tensor:
    """Phase 4: the whole framework, route by Gumbel-softmax, Dice of the mix and cost (Eq. 10)."""
    images, labels = batches.window_batch(size)
    output = model(channels_last(images))
    branches = [segmentation_loss(logits, labels) for logits in output.branch_logits]
    mixed = dice_loss(output.mixed, labels)
    cost = batches.cost_weight * relative_cost(model, output).mean()
    return sum(branches) / len(branches) + mixed + cost + decision_loss(model, batches, step, size)


OBJECTIVES: dict[str, Objective] = {
    "static": static, "segmenter": segmenter, "decisions": decisions, "quantised": quantised,
    "joint": joint,
}


def schedule(step: int, steps: int, warm_up: int = 50, power: float = 0.9) -> float:
    """Returns the share of the peak learning rate: linear warm-up, then (1 - progress)^0.9."""
    warm_up = min(warm_up, steps // 5)
    if step < warm_up:
        return (step + 1) / warm_up
    return (1 - (step - warm_up) / max(steps - warm_up, 1)) ** power


def run_phase(
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    objective: Objective,
    phase: PhaseConfig,
    batches: Batches,
    log: Path,
) -> None:
    """Trains `parameters` on one objective and appends its progress to `log` as JSON lines.

    Raises:
        FloatingPointError: If the loss stops being finite; the step is named.
    """
    optimizer = torch.optim.Adam(
        parameters, lr=phase.learning_rate, weight_decay=1e-5, amsgrad=True
    )
    began, smooth = time.process_time(), None
    for step in tqdm(range(phase.steps), desc=phase.objective, disable=None):
        for group in optimizer.param_groups:
            group["lr"] = phase.learning_rate * schedule(step, phase.steps)
        loss = objective(model, batches, step, phase.batch)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{phase.objective}: loss is {loss.item()} at step {step}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        if step % 50 == 49 or step == phase.steps - 1:
            row = {
                "phase": phase.objective, "step": step + 1, "loss": round(smooth, 5),
                "cpu_seconds": round(time.process_time() - began, 1),
            }
            with log.open("a") as stream:
                stream.write(json.dumps(row) + "\n")


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


# quantised?, ranges still learnt?
_ARITHMETIC = {
    "static": (False, True), "segmenter": (False, True), "decisions": (False, True),
    "quantised": (True, True), "joint": (True, False),
}


def prepare_cases(config: TrainConfig) -> tuple[list[CachedCase], list[CachedCase], list[CachedCase]]:
    """Caches every case once and returns (training, held out, phantoms)."""
    cache = Path(config.cache or Path(config.out) / "cache")
    found = {case.name: case for case in find_cases(config.data) if case.label is not None}
    for name, case in tqdm(found.items(), desc="cache", disable=None):
        if not (cache / f"{name}.images.npy").exists():
            volume = load_volume(case)
            labels = load_labels(case.label, like=volume)
            classes = to_classes(labels, detect_label_convention(volume, np.unique(labels)))
            classes = canonical(classes, volume.affine).transpose(2, 0, 1)
            write_cache(name, to_slices(volume), classes, cache)
    phantoms = [f"phantom-{1000 + index}" for index in range(config.phantoms)]
    for index, name in enumerate(phantoms):
        if not (cache / f"{name}.images.npy").exists():
            phantom = make_phantom(1000 + index)
            images = normalize(np.round(phantom.data).clip(0)).transpose(3, 0, 1, 2)
            write_cache(name, images, phantom.labels.transpose(2, 0, 1), cache)
    training, held_out = folds(list(found), config.folds, config.fold)
    return tuple([read_cache(n, cache) for n in part] for part in (training, held_out, phantoms))


def train(config: TrainConfig) -> Path:
    """Runs the phases, then the static baseline; finished phases are loaded, not repeated.

    Returns:
        The path of the final weights, `<out>/model.safetensors`.
    """
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
    if config.threads:
        torch.set_num_threads(config.threads)
    training, held_out, phantoms = prepare_cases(config)
    split = {"trained_on": [c.name for c in training], "held_out": [c.name for c in held_out]}
    (out / "split.json").write_text(json.dumps(split, indent=2) + "\n")
    torch.manual_seed(config.seed)
    in_channels = training[0].images.shape[1]
    num_classes = 1 + max(int(case.labels.max()) for case in training)
    model = build_med_danet_v2(
        config.segmenter, in_channels=in_channels, num_classes=num_classes,
        crop_sizes=config.crop_sizes, num_bits=config.num_bits,
        decision_network=config.decision_network,
    ).to(memory_format=torch.channels_last)
    for number, phase in enumerate(config.phases):
        batches = Batches(
            training, phantoms, config.seed + 10 * number, config.cost_weight, config.bit_weight
        )
        _phase(model, phase, batches, out)
    path = out / "model.safetensors"
    save_model(model.eval(), path, **split)
    if config.static_steps:
        plain = build_segmenter(config.segmenter, in_channels, num_classes)
        phase = PhaseConfig("static", config.static_steps)
        _phase(plain.to(memory_format=torch.channels_last), phase, Batches(training, phantoms), out)
    return path


def _phase(model: nn.Module, phase: PhaseConfig, batches: Batches, out: Path) -> None:
    checkpoint = out / f"{phase.objective}.pt"
    layers = quantized_layers(model)
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for name, amax in state["input_amax"].items():
            layers[name].input_amax.copy_(amax)
        return
    quantize, update_range = _ARITHMETIC[phase.objective]
    set_quantization(model, quantize=quantize, update_range=update_range)
    objective = OBJECTIVES[phase.objective]
    run_phase(model.train(), model.parameters(), objective, phase, batches, out / "log.jsonl")
    amax = {name: layer.input_amax for name, layer in layers.items()}
    partial = checkpoint.with_suffix(".partial")
    torch.save({"model": model.state_dict(), "input_amax": amax}, partial)
    os.replace(partial, checkpoint)
