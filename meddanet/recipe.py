"""What a training run is made of; the defaults are the recipe of the shipped weights."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from os import fspath
from pathlib import Path

from .bounds import check_numbers


@dataclass
class PhaseConfig:
    """One phase of training.

    Attributes:
        objective: Of Med-DANet V2 "segmenter", "decisions", "quantised", "joint" or "static"; of
            Med-DANet (V1) "bank" or "decision".
        steps: Optimiser steps, or epochs by `unit`.
        unit: "steps", or "epochs": `steps`, `warm_up` and `schedule_*` then count epochs, each of
            as many samples as the training cases have slices with any signal.
        batch: Slices (or windows) per step, all processes together.
        learning_rate: Peak of the schedule.
        decay: Whether the rate falls; without, a later phase continues at the peak.
        warm_up: Length of the linear warm-up, at most a fifth of the schedule.
        schedule_before: How much of one schedule that phases share lies before this one.
        schedule_after: How much of it lies after.
        autocast: "none", "bfloat16" or "float16" (with loss scaling) for convolutions; weights stay
            in float32.
        parts: Which of the model's parts train (of Med-DANet V2: segmenter, crop_last_stages,
            bit_selectors, policy, position; of V1: bank, decision); the rest is frozen, norms and
            dropout included. Empty = all; in V1 the one that the objective is named after.
        arithmetic: "float", "learning" (quantised, ranges follow the data) or "fixed" (quantised,
            ranges stay); None = what the objective is for.
        loss: "dice+ce", or "dice": the papers' foreground Dice, summed over classes.
        branch_weight: Weight, in "joint", of the mean loss of the branches.
        mixed_weight: Weight of the Dice of the mixed output.
        oracle_weight: Weight of what the labels teach policy and position network.
        cost_weight: Weight of the chosen route's cost; None = the run's.
        branch_cost_weight: Weight of the cost of all branches together, chosen or not.
        selector_rate: Learning rate of the bit selectors, as a multiple of the phase's; above 0.
        stay: In "bank", the share of the steps each member takes part in, cheapest first; empty =
            all of them. A phase per member, (1, 0), then (0, 1), trains each on its own.
        windows: In "bank" and "decision", train on windows (V1's setting 1) instead of whole slices
            in their natural mix.
    """

    objective: str
    steps: float
    unit: str = "steps"
    batch: int = 8
    learning_rate: float = 1e-3
    decay: bool = True
    warm_up: float = 50
    schedule_before: float = 0
    schedule_after: float = 0
    autocast: str = "none"
    parts: tuple[str, ...] = ()
    arithmetic: str | None = None
    loss: str = "dice+ce"
    branch_weight: float = 1.0
    mixed_weight: float = 1.0
    oracle_weight: float = 1.0
    cost_weight: float | None = None
    branch_cost_weight: float = 0.0
    selector_rate: float = 1.0
    stay: tuple[float, ...] = ()
    windows: bool = True

    def __post_init__(self) -> None:
        self.parts, self.stay = tuple(self.parts), tuple(self.stay)
        check_numbers(
            self, positive=("steps", "learning_rate", "selector_rate"), counted=("batch",),
            not_negative=(
                "warm_up", "schedule_before", "schedule_after", "branch_weight", "mixed_weight",
                "oracle_weight", "cost_weight", "branch_cost_weight",
            ),
        )
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                expected = ", ".join(str(value) for value in known)
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {expected}")

    def in_steps(self, steps_per_epoch: int) -> PhaseConfig:
        """Returns the same phase with all lengths in optimiser steps."""
        factor = steps_per_epoch if self.unit == "epochs" else 1
        lengths = {
            name: round(getattr(self, name) * factor)
            for name in ("steps", "warm_up", "schedule_before", "schedule_after")
        }
        return replace(self, unit="steps", **{**lengths, "steps": max(lengths["steps"], 1)})


_CHOICES: dict[str, tuple[str | bool | None, ...]] = {
    "unit": ("steps", "epochs"),
    "autocast": ("none", "bfloat16", "float16"),
    "arithmetic": (None, "float", "learning", "fixed"),
    "loss": ("dice+ce", "dice"),
    "decay": (True, False),
    "windows": (True, False),
}


def meddanet_phases() -> list[PhaseConfig]:
    """Returns the schedule of the shipped weights: the labels teach the decisions first."""
    return [
        PhaseConfig("static", steps=900, decay=False, autocast="bfloat16"),
        PhaseConfig("static", steps=1640, autocast="bfloat16"),
        PhaseConfig("segmenter", steps=600, learning_rate=5e-4, autocast="bfloat16"),
        PhaseConfig("decisions", steps=1600, batch=16, learning_rate=2e-3),
        # Adam moves a selector by the rate a step: at that of the rest none leaves where it starts
        PhaseConfig(
            "quantised", steps=120, learning_rate=3e-4, oracle_weight=0, selector_rate=10,
            parts=("segmenter", "crop_last_stages", "bit_selectors"),
        ),
    ]


def _baseline() -> PhaseConfig:
    return PhaseConfig("static", steps=1700, learning_rate=5e-4, autocast="bfloat16")


@dataclass(frozen=True)
class AugmentConfig:
    """How batches are varied beside flips; see `data.augment`.

    Attributes:
        rotation: Largest angle in degrees.
        zoom: Largest relative change of size.
        shift: Largest shift of a whole slice, as a share of its side; windows lie at random anyway.
        intensity: Largest relative change of a modality's distances from its mean, and largest
            shift in standard deviations: of the whole scan, or of a CT's slice in its window.
        transplant: Chance of a window to get another one's lesion.
        contrast: Chance of a slice's lesion to be made fainter, or a little stronger.
        texture: Chance of a slice to be blurred, and of one to be roughened; where it is not 0,
            half of the modalities have their grey values bent, from the least to the largest.
    """

    rotation: float = 15.0
    zoom: float = 0.15
    shift: float = 0.06
    intensity: float = 0.25
    transplant: float = 0.3
    contrast: float = 0.5
    texture: float = 0.2

    def __post_init__(self) -> None:
        check_numbers(
            self, not_negative=("rotation",),
            share=("zoom", "shift", "intensity", "transplant", "contrast", "texture"),
        )


# what papers and published code do: flips, and intensities as here
PAPERS_AUGMENTATION = AugmentConfig(
    rotation=0, zoom=0, shift=0, intensity=0.1, transplant=0, contrast=0, texture=0
)


@dataclass
class DecisionConfig:
    """What Med-DANet's decision network learns: the choice of Eq. 4, weighed by Eq. 7.

    Table 4's rows "w/ S & F", "w/o F", "w/o S" (the paper's final model, and the default here) and
    "w/o S & F" are (softmax_scores, softmax_costs) = (True, True), (True, False), (False, True)
    and (False, False).

    Attributes:
        alpha: Weight of the cost against the Dice score, 0..1.
        softmax_scores: Whether the members' Dice scores pass a softmax.
        softmax_costs: Whether the members' inverse costs pass a softmax.
        cost_unit: Multiply-adds per unit of cost. The paper names none, and it matters: in G the
            softmax of the inverse costs ranks its four members, in single multiply-adds it is
            uniform and alpha without effect.
        route_weights: Weight of each route in the cross-entropy, skip first; empty = from 0.8 for
            skip evenly up to 1.2 for the last member. The paper gives no numbers, only that better
            members weigh slightly more and skip less.
        regions: Classes that make up each region of the Dice score S_i; empty = every foreground
            class is one. For brain tumours ((1, 2, 3), (1, 3), (3,)).
    """

    alpha: float = 0.001
    softmax_scores: bool = False
    softmax_costs: bool = True
    cost_unit: float = 1e9
    route_weights: tuple[float, ...] = ()
    regions: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        check_numbers(self, share=("alpha",), positive=("cost_unit",))


@dataclass
class TrainConfig:
    """One training run; the defaults are the recipe of the shipped weights.

    Where data, out, cache and start are paths, they are kept as text.

    Attributes:
        data: Folder of labelled cases, in any naming that `meddanet segment` reads.
        out: Folder for checkpoints, the log, the configuration and the final weights.
        cache: Folder for the uncompressed slices; None = `<out>/cache`.
        modalities: What the channels are, in file order, where the naming does not tell.
        label_map: Label file's values and the classes 1, 2, ... they become; others are background,
            as is what becomes 0. Where several become one class, predictions have the first of
            them, so score it with `meddanet evaluate --groups 'kidneys=2,3'`.
            None = the convention of the naming where the four modalities of a glioma are there, of
            other cases the values themselves.
        window_hu: Hounsfield values that become 0 and 1 (CT, which is refused without where values
            are negative); None = z-score in the joint mask.
        folds: Number of folds k; every k-th patient by name is held out. 0 = none is.
        fold: Which of them is held out.
        patient: Regular expression whose first group, or whole match, is the patient in a case's
            name: cases of one patient stay together. None = BraTS 2023 names tell the patient,
            every other case is one.
        seed: Seed of weights, sampling and augmentation.
        phantoms: Synthetic glioma cases mixed into the training cases.
        augment: How batches are varied.
        window: Side of the training windows in pixels; None = whole slices.
        lesion_share: Share of a segmenter's samples that come from slices with a lesion, windows
            centred near it; None = all slices that hold signal alike, windows anywhere (the
            papers').
        bank: Names for `build_segmenter`, cheapest first: trains Med-DANet (V1) with these members,
            by phases "bank" and "decision", such as recipe v1-paper. Empty = Med-DANet V2.
        decision: What V1's decision network learns.
        segmenter: Name for `build_segmenter`.
        decision_network: Name for `build_decision_network`.
        position_network: Name for `build_position_network`; None = a decision network, as in the
            paper.
        decision_scale: The decision networks see slices averaged over squares of so many pixels.
        quantize_decisions: Whether the decision networks have 8 bits too.
        crop_sizes: Sides of the crops in pixels.
        margin: Pixels a crop has to spare on each side of the lesion to be the policy's answer.
        num_bits: Widths the selectors choose from.
        start: Weights to start from, a file or a name as for `load_model`; what they have no tensor
            of the same name and shape for starts anew. The baseline does not start from them.
        start_parts: Parts of the model that start from them, such as segmenter; () = all.
        cost_weight: Lambda of the joint phase.
        bit_weight: Weight of the mean width in the quantised phase.
        phases: What is trained, in this order; a finished phase is not repeated.
        baseline: A plain segmenter trained beside, to compare with; it continues the first phases
            "static", so that both have those in common. None = none.
        device: "auto", "cpu", "cuda" or "cuda:N".
        threads: CPU threads; 0 = all.
        compile: Compile the networks' parts by torch.compile.
        deterministic: Only algorithms that give the same bits again, on a GPU too.
        checkpoint_minutes: A phase is saved so often while it runs.
        checkpoint_steps: And every so many steps; 0 = by time alone.
        validate_every: Steps between looks at the held-out cases; 0 = none.
        validation_slices: Slices that such a look takes, spread over the held-out cases.
        tensorboard: Write `<out>/tensorboard/<phase>` too (extra "train").
    """

    data: str | Path
    out: str | Path
    cache: str | Path | None = None
    modalities: tuple[str, ...] | None = None
    label_map: dict[int, int] | None = None
    window_hu: tuple[float, float] | None = None
    folds: int = 5
    fold: int = 0
    patient: str | None = None
    seed: int = 0
    phantoms: int = 3
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    window: int | None = 128
    lesion_share: float | None = 0.67
    bank: tuple[str, ...] = ()
    decision: DecisionConfig = field(default_factory=DecisionConfig)
    segmenter: str = "unet-16"
    decision_network: str = "shufflenetv2-m"
    position_network: str | None = "heatmap"
    decision_scale: int = 2
    quantize_decisions: bool = False
    crop_sizes: tuple[int, ...] = (96, 128)
    margin: int = 6
    num_bits: tuple[int, ...] = (8, 16)
    start: str | Path | None = None
    start_parts: tuple[str, ...] = ()
    cost_weight: float = 0.06
    bit_weight: float = 0.06
    phases: list[PhaseConfig] = field(default_factory=meddanet_phases)
    baseline: PhaseConfig | None = field(default_factory=_baseline)
    device: str = "auto"
    threads: int = 0
    compile: bool = False
    deterministic: bool = False
    checkpoint_minutes: float = 5.0
    checkpoint_steps: int = 0
    validate_every: int = 400
    validation_slices: int = 64
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("data", "out", "cache", "start"):
            value = getattr(self, name)
            # the configuration is kept as JSON, which has no paths
            setattr(self, name, value if value is None else fspath(value))
        for name in ("modalities", "window_hu", "bank", "crop_sizes", "num_bits", "start_parts"):
            value = getattr(self, name)
            setattr(self, name, value if value is None else tuple(value))
        check_numbers(
            self, share=("lesion_share",), positive=("checkpoint_minutes",),
            not_negative=("cost_weight", "bit_weight"),
            whole=(
                "folds", "fold", "seed", "phantoms", "margin", "threads", "checkpoint_steps",
                "validate_every",
            ),
            counted=("window", "decision_scale", "validation_slices"),
        )
        if not self.phases:
            raise ValueError("phases is empty, expected at least one")
