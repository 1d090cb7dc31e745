"""Where a phase of training stands: saved whole or not at all."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .data.storage import write_bytes
from .layers import quantized_layers


@dataclass
class Progress:
    """How far a phase has come.

    Attributes:
        step: Steps done.
        steps: Steps the phase was to have when this was saved.
        share: Last share of the peak learning rate.
        ramp_start: Step at which the phase was extended, -1 if it never was.
        ramp_share: The share there, from which the rate moves to the longer schedule.
        smooth: Running mean of the loss.
        cpu_seconds: CPU time spent.
    """

    step: int = 0
    steps: int = 0
    share: float = 0.0
    ramp_start: int = -1
    ramp_share: float = 0.0
    smooth: float | None = None
    cpu_seconds: float = 0.0


def checkpoint_files(out: Path, objectives: Iterable[str]) -> tuple[list[Path], Path]:
    """Returns where the checkpoints of a run's phases lie, in their order, and the baseline's."""
    files = [out / f"{number}-{objective}.pt" for number, objective in enumerate(objectives)]
    return files, out / "baseline.pt"


def save_checkpoint(
    path: Path, model: nn.Module, progress: Progress, **states: dict[str, Any]
) -> None:
    """Writes model, input ranges, progress and further state_dicts.

    The file appears under its name only when it is complete and on disk; a process killed in the
    middle leaves the one before.

    Raises:
        VolumeError: If it cannot be written.
    """
    ranges = {name: layer.input_amax for name, layer in quantized_layers(model).items()}
    content = {
        "model": model.state_dict(), "input_amax": ranges, "progress": asdict(progress), **states,
    }
    stream = io.BytesIO()
    torch.save(content, stream)
    write_bytes(path, stream.getbuffer())


def load_checkpoint(path: Path, model: nn.Module) -> tuple[Progress, dict[str, dict[str, Any]]]:
    """Loads what `save_checkpoint` wrote into a model; nothing in the file is executed.

    Returns:
        The progress and the further state_dicts.

    Raises:
        ValueError: If the file is damaged or belongs to another model.
        OSError: If it cannot be read.
    """
    with _content(path) as content:
        progress = Progress(**content.pop("progress"))
        model.load_state_dict(content.pop("model"))
        layers = quantized_layers(model)
        for name, amax in content.pop("input_amax").items():
            layers[name].input_amax.copy_(amax)
    return progress, content


def read_progress(path: Path) -> Progress:
    """Returns how far a checkpoint's phase has come; raises as `load_part`."""
    with _content(path) as content:
        return Progress(**content["progress"])


def load_part(path: Path, part: str, model: nn.Module) -> None:
    """Loads one part of a checkpoint's model into a model that is such a part; ranges stay.

    Raises:
        ValueError: If the file is damaged or belongs to another model.
        OSError: If it cannot be read.
    """
    with _content(path) as content:
        state = content["model"].items()
        own = {name.removeprefix(f"{part}."): v for name, v in state if name.startswith(f"{part}.")}
        model.load_state_dict(own)


@contextmanager
def _content(path: Path) -> Iterator[dict[str, Any]]:
    """Opens a checkpoint; whatever reading it raises becomes a ValueError that names the file."""
    stream = io.BytesIO(path.read_bytes())
    try:
        yield torch.load(stream, weights_only=True, map_location="cpu")
    except MemoryError:
        raise
    # damaged bytes make readers raise nearly anything
    except Exception as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"{path}: is no checkpoint of this run ({why}); delete it, and those of later phases, "
            "to repeat its phase, or name another out"
        ) from error
