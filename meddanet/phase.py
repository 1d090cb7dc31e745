"""One phase of training: an objective, some parts of a model, a number of steps.

Adam with amsgrad and weight decay 1e-5, warm-up and poly schedule (Med-DANet V2, section 4.1). A
phase that was stopped goes on where its checkpoint stands.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from .batches import Batches
from .checkpoint import Progress, load_checkpoint, save_checkpoint
from .distributed import average_, barrier, gathered, rank, world
from .layers import quantized_layers
from .monitor import Monitor, Predict
from .objectives import Objective
from .recipe import PhaseConfig

_LOG_EVERY = 50
# at an overflow float16's scaler halves its scale, 65536 at first; where it scales no more, it is
# not why a gradient is not finite
_LEAST_SCALE = 1.0
# parts that have no say in how a slice is segmented where it is not skipped
_DECIDING = {"policy", "position", "decision"}
_AUTOCAST = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def schedule(step: float, steps: float, *, decay: bool = True, warm_up: float = 50) -> float:
    """Returns the share of the peak learning rate: linear warm-up, then (1 - progress)^0.9.

    Without `decay` the rate stays at its peak, for a phase that another one continues.
    """
    warm_up = min(warm_up, steps // 5)
    if step < warm_up:
        return (step + 1) / warm_up
    if not decay:
        return 1.0
    return (1 - (step - warm_up) / max(steps - warm_up, 1)) ** 0.9


def phase_share(step: int, phase: PhaseConfig, progress: Progress) -> float:
    """Returns the share of the peak rate at a step of a phase whose lengths are in steps.

    A phase that was extended moves from the rate it had to that of the longer schedule within the
    length of a warm-up, without a jump.
    """
    steps = phase.schedule_before + phase.steps + phase.schedule_after
    share = schedule(
        phase.schedule_before + step, steps, decay=phase.decay, warm_up=phase.warm_up
    )
    way = (step - progress.ramp_start + 1) / max(phase.warm_up, 1)
    if progress.ramp_start < 0 or way >= 1:
        return share
    return progress.ramp_share + (share - progress.ramp_share) * way


class _Step(nn.Module):
    """One objective as a module, the form in which DistributedDataParallel takes it."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batches: Batches, step: int, phase: PhaseConfig) -> Tensor:
        return self.objective(self.model, batches, step, phase)


def run_phase(
    model: nn.Module,
    objective: Objective,
    phase: PhaseConfig,
    batches: Batches,
    checkpoint: Path | None,
    monitor: Monitor,
    *,
    name: str = "",
    predict: Predict | None = None,
    minutes: float = 5.0,
    every: int = 0,
) -> None:
    """Trains a model on one objective, from its checkpoint if there is one.

    Args:
        model: What is trained, on its device; the phase's parts of it.
        objective: Loss of one step.
        phase: Settings, its lengths in steps.
        batches: What is trained on.
        checkpoint: File. When all steps are done it holds the result, which another call loads.
            None keeps nothing.
        monitor: Takes the log.
        name: What the log calls the phase; default the checkpoint's stem.
        predict: Labels of slices, for the monitor's looks; None = no looks.
        minutes: Time between checkpoints.
        every: Steps between checkpoints; 0 = by time alone.

    Raises:
        FloatingPointError: If loss or gradient stop being finite, in float16 at every scale; the
            step and the batch are named.
        ValueError: If the checkpoint has more steps than the phase, or not as many for every
            process.
    """
    device = next(model.parameters()).device
    name = name or (checkpoint.stem if checkpoint else phase.objective)
    train_parts(model, phase.parts)
    optimizer = torch.optim.Adam(
        _groups(model, phase), lr=phase.learning_rate, weight_decay=1e-5, amsgrad=True
    )
    scaler = torch.amp.GradScaler(device.type, enabled=phase.autocast == "float16")
    stateful: dict[str, Any] = {"optimizer": optimizer, "scaler": scaler}
    if hasattr(objective, "state_dict"):
        stateful["objective"] = objective
    progress = _resume(model, stateful, phase, checkpoint)
    if progress.step == phase.steps:
        return
    monitor.rewind(name, progress.step)
    step_of: nn.Module = _Step(model, objective)
    if world() > 1:
        step_of = DistributedDataParallel(step_of, find_unused_parameters=True)
    ranges = [layer.input_amax for layer in quantized_layers(model).values()]
    steps = tqdm(
        range(progress.step, int(phase.steps)), desc=name, initial=progress.step,
        total=phase.steps, disable=None if rank() == 0 else True,
    )
    spent, due = progress.cpu_seconds - time.process_time(), time.monotonic() + 60 * minutes
    for step in steps:
        batches.seek(step)
        progress.share = phase_share(step, phase, progress)
        for group in optimizer.param_groups:
            group["lr"] = phase.learning_rate * progress.share * group.get("factor", 1)
        loss = _make_step(step_of, optimizer, scaler, phase, batches, step, name)
        average_(ranges)
        progress.smooth = loss if progress.smooth is None else 0.98 * progress.smooth + 0.02 * loss
        progress.step, last = step + 1, step + 1 == phase.steps
        progress.cpu_seconds = spent + time.process_time()
        if progress.step % _LOG_EVERY == 0 or last:
            monitor.log(
                name, progress.step, loss=round(progress.smooth, 5),
                learning_rate=phase.learning_rate * progress.share,
                cpu_seconds=round(progress.cpu_seconds, 1),
            )
        if predict and monitor.every and (progress.step % monitor.every == 0 or last):
            monitor.look(name, progress.step, predict, device, segmenter_loss(phase))
            train_parts(model, phase.parts)
        if last or time.monotonic() > due or (every and progress.step % every == 0):
            due = time.monotonic() + 60 * minutes
            if checkpoint and rank() == 0:
                states = {key: value.state_dict() for key, value in stateful.items()}
                save_checkpoint(checkpoint, model, progress, **states)
    barrier()


def segmenter_loss(phase: PhaseConfig) -> str | None:
    """Returns the loss that a phase trains what segments by; None where it trains decisions alone.

    These are judged by what the segmenter, or the bank, makes of them.
    """
    decides = phase.objective in ("decisions", "decision")
    if decides or (phase.parts and _DECIDING.issuperset(phase.parts)):
        return None
    return phase.loss


def _groups(model: nn.Module, phase: PhaseConfig) -> list[dict[str, Any]]:
    """Returns what trains, the bit selectors by themselves where they have another rate."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    own = [name for name in trained if name.startswith("bit_selectors.")]
    if phase.selector_rate == 1 or not own:
        return [{"params": list(trained.values())}]
    selectors = [trained.pop(name) for name in own]
    return [
        {"params": list(trained.values())}, {"params": selectors, "factor": phase.selector_rate}
    ]


def _resume(
    model: nn.Module, stateful: dict[str, Any], phase: PhaseConfig, checkpoint: Path | None
) -> Progress:
    """Loads the checkpoint, if any; a phase of other length than then gets its ramp."""
    progress, states = Progress(steps=int(phase.steps)), None
    if checkpoint is not None and checkpoint.exists():
        progress, states = load_checkpoint(checkpoint, model)
    _check_shared(checkpoint, progress.step)
    if states is None:
        return progress
    if progress.step > phase.steps:
        raise ValueError(
            f"{checkpoint}: has {progress.step} steps done, more than the {phase.steps} asked for; "
            "expected at least as many, or another out"
        )
    factors = [group.get("factor") for group in stateful["optimizer"].param_groups]
    try:
        for name, value in stateful.items():
            value.load_state_dict(states[name])
    except (ValueError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"{checkpoint}: is no checkpoint of this phase ({error}); delete it to repeat the "
            "phase, or name another out"
        ) from error
    # the rates asked for, not those of then
    for group, factor in zip(stateful["optimizer"].param_groups, factors, strict=True):
        if factor is not None:
            group["factor"] = factor
    if progress.steps != phase.steps:
        progress.ramp_start, progress.ramp_share = progress.step, progress.share
        progress.steps = int(phase.steps)
    return progress


def _check_shared(checkpoint: Path | None, step: int) -> None:
    """Raises ValueError where processes stand at different steps: OUT is not one folder."""
    steps = gathered(step)
    for number, other in enumerate(steps):
        if other != steps[0]:
            raise ValueError(
                f"{checkpoint}: has {steps[0]} steps done for process 0 and {other} for process "
                f"{number}; out and cache have to lie on a disk that all machines share"
            )


def _make_step(
    step_of: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
    phase: PhaseConfig, batches: Batches, step: int, name: str,
) -> float:
    """Makes one optimiser step and returns its loss; makes none where a number is not finite."""
    dtype = _AUTOCAST[phase.autocast]
    with torch.autocast(batches.device.type, dtype, enabled=dtype is not None):
        loss = step_of(batches, step, phase)
    value = loss.item()
    _check_finite("loss", value, name, step, batches)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    trained = (p for group in optimizer.param_groups for p in group["params"])
    norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]).item()
    # a finite norm needs no scale, which a GPU would have to be waited for
    overflown = not math.isfinite(norm) and scaler.is_enabled()
    if not overflown or scaler.get_scale() <= _LEAST_SCALE:
        _check_finite("gradient", norm, name, step, batches)
    scaler.step(optimizer)
    scaler.update()
    return value


def _check_finite(what: str, value: float, name: str, step: int, batches: Batches) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(
            f"{name}: the {what} is {value} at step {step}, whose batch is "
            f"{', '.join(batches.drawn)}; the last checkpoint was kept"
        )


def train_parts(model: nn.Module, parts: tuple[str, ...] = ()) -> None:
    """Puts a model into training; where parts are named, freezes its other children.

    Raises:
        ValueError: If the model has no such part.
    """
    check_parts(model, parts)
    model.train()
    for name, child in model.named_children():
        trains = not parts or name in parts
        child.train(trains).requires_grad_(trains)


def check_parts(model: nn.Module, parts: tuple[str, ...], name: str = "parts") -> None:
    """Raises ValueError unless a model has all of these parts; `name` is what named them."""
    known = [name for name, _ in model.named_children()]
    if strange := sorted(set(parts) - set(known)):
        raise ValueError(f"{name} holds {', '.join(strange)}, expected some of {', '.join(known)}")
