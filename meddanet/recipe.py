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
        decay: Whether the rate falls; without, a later phase continues at the peak.
        bfloat16: Convolutions in bfloat16 (autocast), weights in float32.
    """

    objective: str
    steps: int
    batch: int = 8
    learning_rate: float = 1e-3
    decay: bool = True
    bfloat16: bool = False


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
        intensity: Largest relative change and shift of a modality's intensities.
        segmenter: Name for `build_segmenter`.
        decision_network: Name for `build_decision_network`.
        decision_scale: The decision networks see slices averaged over squares of so many pixels.
        crop_sizes: Sides of the crops in pixels.
        margin: Pixels a crop has to spare on each side of the lesion to be the policy's answer.
        num_bits: Widths the selectors choose from.
        cost_weight: Lambda of the joint phase.
        bit_weight: Weight of the mean width in the quantised phase.
        phases: What is trained, in this order; a finished phase is not repeated.
        baseline: A plain segmenter trained beside, to compare with; it continues a first phase
            "static", so that both have that in common. None = none.
    """

    data: str
    out: str
    cache: str | None = None
    folds: int = 5
    fold: int = 0
    seed: int = 0
    threads: int = 0
    phantoms: int = 3
    intensity: float = 0.25
    segmenter: str = "unet-16"
    decision_network: str = "shufflenetv2-m"
    decision_scale: int = 2
    crop_sizes: tuple[int, ...] = (96, 128)
    margin: int = 6
    num_bits: tuple[int, ...] = (8, 16)
    cost_weight: float = 0.06
    bit_weight: float = 0.06
    phases: list[PhaseConfig] = field(default_factory=lambda: [
        PhaseConfig("static", steps=1200, decay=False, bfloat16=True),
        PhaseConfig("segmenter", steps=800, bfloat16=True),
        PhaseConfig("decisions", steps=1200, batch=16, learning_rate=2e-3),
        PhaseConfig("quantised", steps=120, learning_rate=3e-4),
    ])
    baseline: PhaseConfig | None = field(default_factory=lambda: PhaseConfig(
        "static", steps=1600, bfloat16=True
    ))
