"""Training of Med-DANet V2 in phases, and of the static segmenter it is compared with.

One phase is one objective over some parts of the model for a number of steps. Each has its own
warm-up and poly schedule (Med-DANet V2, section 4.1: Adam with amsgrad, weight decay 1e-5).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from .build import build_med_danet_v2, build_segmenter
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
from .data.slices import CachedCase, folds, read_cache, write_cache
from .layers import quantized_layers, set_quantization
from .med_danet_v2 import MedDANetV2
from .objectives import OBJECTIVES, Batches, Objective
from .recipe import PhaseConfig, TrainConfig
from .weights import save_model


def schedule(
    step: int, steps: int, *, decay: bool = True, warm_up: int = 50, power: float = 0.9
) -> float:
    """Returns the share of the peak learning rate: linear warm-up, then (1 - progress)^0.9.

    Without `decay` the rate stays at its peak, for a phase that another one continues.
    """
    warm_up = min(warm_up, steps // 5)
    if step < warm_up:
        return (step + 1) / warm_up
    if not decay:
        return 1.0
    return (1 - (step - warm_up) / max(steps - warm_up, 1)) ** power


def run_phase(
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    objective: Objective,
    phase: PhaseConfig,
    batches: Batches,
    log: Path,
    *,
    name: str,
) -> None:
    """Trains `parameters` on one objective and appends its progress to `log` as JSON lines.

    Raises:
        FloatingPointError: If the loss stops being finite; the step is named.
    """
    optimizer = torch.optim.Adam(
        parameters, lr=phase.learning_rate, weight_decay=1e-5, amsgrad=True
    )
    began, smooth = time.process_time(), None
    for step in tqdm(range(phase.steps), desc=name, disable=None):
        for group in optimizer.param_groups:
            group["lr"] = phase.learning_rate * schedule(step, phase.steps, decay=phase.decay)
        with torch.autocast("cpu", torch.bfloat16, enabled=phase.bfloat16):
            loss = objective(model, batches, step, phase.batch)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{name}: loss is {loss.item()} at step {step}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        if step % 50 == 49 or step == phase.steps - 1:
            row = {
                "phase": name, "step": step + 1, "loss": round(smooth, 5),
                "cpu_seconds": round(time.process_time() - began, 1),
            }
            with log.open("a") as stream:
                stream.write(json.dumps(row) + "\n")


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
        decision_network=config.decision_network, decision_scale=config.decision_scale,
    ).to(memory_format=torch.channels_last)
    for number, phase in enumerate(config.phases):
        batches = Batches(
            training, phantoms, config.seed + 10 * number,
            config.cost_weight, config.bit_weight, config.intensity, config.margin,
        )
        if phase.objective == "segmenter":
            start_crop_stages(model)
        _phase(model, phase, batches, out / f"{number}-{phase.objective}.pt")
    path = out / "model.safetensors"
    save_model(model.eval(), path, **split)
    if config.baseline is not None:
        plain = build_segmenter(config.segmenter, in_channels, num_classes)
        if config.phases and config.phases[0].objective == "static":
            _start_from(plain, out / "0-static.pt")
        batches = Batches(training, phantoms, config.seed + 1000, intensity=config.intensity)
        _phase(plain.to(memory_format=torch.channels_last), config.baseline, batches, out / "baseline.pt")
    return path


def start_crop_stages(model: MedDANetV2) -> None:
    """Gives every crop's last stage the weights of the whole slice's."""
    for stage in model.crop_last_stages:
        stage.load_state_dict(model.segmenter.last_stage.state_dict())


def _start_from(plain: nn.Module, checkpoint: Path) -> None:
    """Loads the segmenter of a dynamic model's checkpoint."""
    state, prefix = torch.load(checkpoint, weights_only=True)["model"], "segmenter."
    plain.load_state_dict(
        {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}
    )


def _phase(model: nn.Module, phase: PhaseConfig, batches: Batches, checkpoint: Path) -> None:
    """Runs one phase and keeps its result as `checkpoint`; loads it where it is there already."""
    layers = quantized_layers(model)
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for name, amax in state["input_amax"].items():
            layers[name].input_amax.copy_(amax)
        return
    quantize, update_range = _ARITHMETIC[phase.objective]
    set_quantization(model, quantize=quantize, update_range=update_range)
    log = checkpoint.with_name("log.jsonl")
    objective = OBJECTIVES[phase.objective]
    run_phase(
        model.train(), model.parameters(), objective, phase, batches, log, name=checkpoint.stem
    )
    amax = {name: layer.input_amax for name, layer in layers.items()}
    partial = checkpoint.with_suffix(".partial")
    torch.save({"model": model.state_dict(), "input_amax": amax}, partial)
    os.replace(partial, checkpoint)
