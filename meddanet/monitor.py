"""How a training run is watched: a log, TensorBoard, and looks at the held-out cases."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .data.slices import CachedCase, pad
from .data.storage import write_bytes
from .distributed import rank

# slices [N, C, H, W] -> labels [N, H, W]
Predict = Callable[[Tensor], Tensor]
_CHUNK = 8
# what a loss has to do with a class that swallows background, and what to do
_ADVICE = {
    "dice": "the phase's loss is dice, which counts foreground alone and allows that, see dice+ce",
    "dice+ce": "the phase's loss is dice+ce, which forbids that: lower learning_rate if the next "
    "looks say the same",
    None: "this phase trains decisions alone, so the cause lies before it: train what segments "
    "anew, with loss dice+ce or a lower learning_rate",
}


class Monitor:
    """Writes `log.jsonl`, `validation.jsonl` and TensorBoard's files; only in the first process.

    Args:
        out: Folder of the run.
        held_out: Cases to look at.
        every: Steps between looks; 0 = none.
        slices: Slices that one takes, spread evenly over all cases.
        num_classes: Classes, background included.
        canvas: Height and width that slices are padded to.
        tensorboard: Write `<out>/tensorboard/<phase>` too.

    Raises:
        ImportError: If TensorBoard is asked for and not installed.
    """

    def __init__(
        self,
        out: Path,
        held_out: list[CachedCase] | None = None,
        *,
        every: int = 0,
        slices: int = 64,
        num_classes: int = 4,
        canvas: tuple[int, int] = (0, 0),
        tensorboard: bool = False,
    ) -> None:
        self.out, self.every, self.num_classes = out, every if held_out else 0, num_classes
        self.canvas = canvas
        all_slices = [(case, z) for case in held_out or [] for z in range(len(case.labels))]
        chosen = np.linspace(0, len(all_slices) - 1, min(slices, len(all_slices))).round()
        self.samples = [all_slices[int(index)] for index in chosen]
        self.summary_writer = summary_writer() if tensorboard and rank() == 0 else None
        self.writer: Any = None

    def rewind(self, phase: str, step: int) -> None:
        """Opens the log of a phase; drops what is there of it after `step`, to be logged again."""
        if self.summary_writer is not None:
            if self.writer is not None:
                # it has a thread
                self.writer.close()
            # a folder per phase, since purging does not tell one tag from another
            folder = self.out / "tensorboard" / phase
            self.writer = self.summary_writer(str(folder), purge_step=step + 1)
        for path in (self.out / name for name in ("log.jsonl", "validation.jsonl")):
            if rank() == 0 and path.exists():
                kept = [
                    line for line in path.read_text().splitlines()
                    if (row := _row(line)) and (row.get("phase") != phase or row["step"] <= step)
                ]
                write_bytes(path, "".join(f"{line}\n" for line in kept).encode())

    def log(self, phase: str, step: int, file: str = "log.jsonl", **values: Any) -> None:
        """Appends one line of JSON, and TensorBoard's scalars of its numbers."""
        if rank() > 0:
            return
        with (self.out / file).open("a") as stream:
            stream.write(json.dumps({"phase": phase, "step": step, **values}) + "\n")
        if self.writer is not None:
            numbers = {k: v for k, v in values.items() if isinstance(v, float)}
            numbers |= {f"dice/{k}": v for k, v in values.get("dice", {}).items() if v is not None}
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()

    def look(
        self, phase: str, step: int, predict: Predict, device: torch.device,
        loss: str | None = "dice+ce",
    ) -> None:
        """Logs the Dice of each class on held-out slices; warns where one swallows background.

        Args:
            phase: Name of the phase.
            step: Steps done.
            predict: Labels of slices.
            device: Where slices are taken.
            loss: What the phase trains the segmenter by, for the warning; None = it does not.
        """
        if rank() > 0:
            return
        counts = np.zeros((self.num_classes, self.num_classes), np.int64)
        background = np.zeros((2, self.num_classes), np.int64)
        with torch.inference_mode():
            for start in range(0, len(self.samples), _CHUNK):
                part = self.samples[start : start + _CHUNK]
                images = np.stack([pad(c.images[z], self.canvas) for c, z in part])
                truth = np.stack([pad(c.labels[z], self.canvas) for c, z in part])
                labels = predict(torch.from_numpy(images.astype(np.float32)).to(device))
                found, outside = labels.cpu().numpy(), truth == 0
                signal = (images != 0).any(axis=1)
                counts += _pairs(truth, found, counts.shape)
                background += _pairs(signal[outside], found[outside], background.shape)
        dice, swallowed = dice_per_class(counts), swallowed_background(*background)
        self.log(phase, step, "validation.jsonl", dice=dice, swallowed_background=swallowed)
        for name, share in swallowed.items():
            if share > 0.5:
                warnings.warn(
                    f"{phase}, step {step}: class {name} takes {share:.0%} of the background of "
                    f"held-out slices; {_ADVICE[loss]}",
                    stacklevel=2,
                )


def _row(line: str) -> dict[str, Any]:
    """Returns what a line of a log says; nothing of half a line, which a killed process leaves."""
    with suppress(ValueError):
        return json.loads(line)
    return {}


def _pairs(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Counts how often each row meets each column, whole numbers below `shape`."""
    index = rows.astype(np.int64) * shape[1] + columns
    return np.bincount(index.ravel(), minlength=shape[0] * shape[1]).reshape(shape)


def dice_per_class(counts: np.ndarray) -> dict[str, float | None]:
    """Returns Dice by class of a confusion matrix [truth, found]; None where a class is absent."""
    total = counts.sum(0) + counts.sum(1)
    return {
        str(k): round(2 * int(counts[k, k]) / int(total[k]), 4) if total[k] else None
        for k in range(1, len(counts))
    }


def swallowed_background(air: np.ndarray, signal: np.ndarray) -> dict[str, float]:
    """Returns, by class, the share of the true background that is taken for it.

    Of all background, or of that where the image holds signal, whichever is more: air is most of
    a brain scan's background and would hide that a class swallows the brain.

    Args:
        air: [K] counts of background pixels without signal in any channel, by the class found.
        signal: [K] counts of those with signal.
    """
    parts = np.stack([air + signal, signal])
    shares = (parts / np.maximum(parts.sum(1, keepdims=True), 1)).max(0)
    return {str(k): round(float(shares[k]), 4) for k in range(1, len(shares))}


def summary_writer() -> Any:
    """Returns TensorBoard's class of writers, or raises ImportError that says how to get it."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            'tensorboard is not installed: pip install "meddanet[train]", or leave it off'
        ) from error
    return SummaryWriter
