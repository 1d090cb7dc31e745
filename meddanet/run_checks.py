"""What a configuration asks for, and what is wrong with it before any data is read."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from .build import build_med_danet, build_med_danet_v2
from .devices import emulates_bfloat16
from .med_danet import MedDANet
from .med_danet_v2 import MedDANetV2
from .monitor import summary_writer
from .objectives import OBJECTIVES, Objective
from .objectives_v1 import DecisionObjective, bank, member_shares
from .phase import check_parts
from .recipe import PhaseConfig, TrainConfig
from .weight_files import locate


def untrained_model(config: TrainConfig, channels: int, classes: int) -> MedDANet | MedDANetV2:
    """Builds the untrained model."""
    if config.bank:
        return build_med_danet(config.bank, channels, classes, config.decision_network)
    return build_med_danet_v2(
        config.segmenter, channels, classes, config.crop_sizes, config.num_bits,
        config.decision_network, config.decision_scale, config.quantize_decisions,
        config.position_network,
    )


def objectives_of(model: Any, config: TrainConfig) -> dict[str, Objective]:
    """Returns what a phase of this model may minimise, by name."""
    if isinstance(model, MedDANet):
        return {"bank": bank, "decision": DecisionObjective(model, config.decision)}
    return {**OBJECTIVES}


def check_run(config: TrainConfig, starts: bool) -> None:
    """Sees, before any data is read, what can be seen without it.

    Args:
        config: Of the run.
        starts: Whether weights to start from will be read.

    Raises:
        ValueError: If a phase cannot be trained, or the window does not fit; it is named. If there
            are no weights to start from.
        ImportError: If TensorBoard is asked for and not installed.
    """
    model = untrained_model(config, channels=1, classes=2)
    stride, largest = model.stride, model.smallest_side
    if config.window is not None and (config.window % stride or config.window < largest):
        raise ValueError(
            f"window is {config.window}, expected a multiple of {stride} that is at least "
            f"{largest}, or null for whole slices"
        )
    _check_phases(model, config)
    check_parts(model, config.start_parts, "start_parts")
    if config.start is not None and starts:
        locate(config.start)
    if config.tensorboard:
        summary_writer()


def _check_phases(model: Any, config: TrainConfig) -> None:
    """Sees, before anything is trained, that every phase can be.

    Raises:
        ValueError: If one has an objective, parts or shares that the model does not; it is named.
    """
    known = objectives_of(model, config)
    for number, phase in enumerate(config.phases):
        try:
            _check_phase(model, phase, known)
        except ValueError as error:
            raise ValueError(f"phases.{number}.{error}") from error
    if config.baseline is not None and config.baseline.objective != "static":
        raise ValueError(
            f"baseline.objective is {config.baseline.objective!r}, expected static: it is a plain "
            "segmenter"
        )
    if config.cost_weight != TrainConfig.cost_weight and "joint" not in [
        phase.objective for phase in config.phases
    ]:
        warnings.warn(
            "cost_weight acts in phases `joint` alone and there is none; bit_weight is that of "
            "phases `quantised`", stacklevel=2,
        )


def _check_phase(model: Any, phase: PhaseConfig, known: dict[str, Objective]) -> None:
    if phase.objective not in known:
        cure = "" if hasattr(model, "bank") else "; Med-DANet (V1) is trained where a bank is named"
        raise ValueError(
            f"objective is {phase.objective!r}, expected one of {', '.join(known)} for a "
            f"{type(model).__name__}{cure}"
        )
    check_parts(model, phase.parts)
    if phase.objective == "bank":
        member_shares(phase, len(model.bank))


def warn_of_emulation(config: TrainConfig, device: torch.device) -> None:
    """Warns of phases that this machine computes in a number format that it has not."""
    phases = [*config.phases, *filter(None, [config.baseline])]
    slow = [phase.objective for phase in phases if phase.autocast == "bfloat16"]
    if slow and emulates_bfloat16(device):
        kinds = ", ".join(dict.fromkeys(slow))
        warnings.warn(
            f"this CPU has no bfloat16, which phases ({len(slow)}: {kinds}) are to compute in; "
            "their steps take several times as long as with autocast: none", stacklevel=2,
        )
