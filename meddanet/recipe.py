"""What a training run is made of; the defaults made the shipped weights."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class PhaseConfig:
    """One phase of training.

    Attributes:
        objective: "segmenter", "decisions", "quantised", "joint" or "static".
        steps: Optimiser steps.
        batch: Slices (or windows) per step.
        learning_rate: Peak of the schedule.
    """

    objective: str
    steps: int
    batch: int = 8
    learning_rate: float = 1e-3


@dataclass
class TrainConfig:
    """One training run; the defaults are the recipe of the shipped weights.

    Attributes:
        data: Folder of labelled cases, in any naming that `meddanet segment` reads.
        out: Folder for checkpoints, the log, the configuration and the final weights.
        cache: Folder for the uncompressed slices; None = `<out>/cache`.
        folds: Number of folds k; every k-th case by name is held out.
        fold: Which of them is held out.
        seed: Seed of weights, sampling and augmentation.
        threads: CPU threads; 0 = all.
        phantoms: Synthetic cases mixed into the training cases.
        segmenter: Name for `build_segmenter`.
        decision_network: Name for `build_decision_network`.
        crop_sizes: Sides of the crops in pixels.
        num_bits: Widths the selectors choose from.
        cost_weight: Lambda of the joint phase.
        bit_weight: Weight of the mean width in the quantised phase.
        phases: What is trained, in this order; a finished phase is not repeated.
        static_steps: Steps of a plain segmenter trained beside, as the baseline; 0 = none.
    """

    data: str
    out: str
    cache: str | None = None
    folds: int = 5
    fold: int = 0
    seed: int = 0
    threads: int = 0
    phantoms: int = 3
    segmenter: str = "unet-16"
    decision_network: str = "shufflenetv2-m"
    crop_sizes: tuple[int, ...] = (96,)
    num_bits: tuple[int, ...] = (8, 16)
    cost_weight: float = 0.06
    bit_weight: float = 0.06
    phases: list[PhaseConfig] = field(default_factory=lambda: [
        PhaseConfig("segmenter", steps=1600, batch=8, learning_rate=1e-3),
        PhaseConfig("decisions", steps=1800, batch=8, learning_rate=2e-3),
        PhaseConfig("quantised", steps=150, batch=8, learning_rate=3e-4),
    ])
    static_steps: int = 2600
