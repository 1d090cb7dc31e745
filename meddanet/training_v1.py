"""The two training steps of Med-DANet: the model bank, then the decision network.

Wang et al. 2022, section 3.3: the members learn to segment, jointly or each on its own; then the
decision network learns which of the frozen members Eq. 4 would choose. Differences from the paper:
cross-entropy beside Dice (`segmentation_loss`); decision labels are computed on the very slices the
decision network sees, by the frozen bank, instead of once per case before augmentation.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .choice import ChoiceMetric, slice_dice
from .cost import count_macs
from .losses import segmentation_loss
from .med_danet import MedDANet
from .objectives import Batches
from .recipe import PhaseConfig
from .routing import channels_last
from .training import run_phase


@dataclass
class BankConfig:
    """How the model bank is trained.

    Attributes:
        steps: Optimiser steps.
        batch: Slices (or windows) per step.
        learning_rate: Peak of the schedule.
        stay: Share of the steps each member takes part in, cheapest first; empty = all of them.
            The paper lets small members leave after 0.75 and names none of them; for its four,
            (0.75, 0.75, 1, 1).
        joint: All members on the same batches, mean loss (Eq. 6); False trains one after another.
        windows: Train on 128-pixel windows, two thirds with a lesion (the paper's setting 1),
            instead of whole slices in their natural mix.
        bfloat16: Convolutions in bfloat16 (autocast), weights in float32.
    """

    steps: int = 2000
    batch: int = 16
    learning_rate: float = 1e-3
    stay: tuple[float, ...] = ()
    joint: bool = True
    windows: bool = True
    bfloat16: bool = False


@dataclass
class DecisionConfig:
    """How the decision network is trained.

    Attributes:
        steps: Optimiser steps.
        batch: Slices (or windows) per step.
        learning_rate: Peak of the schedule; the paper has 0.01.
        metric: Eq. 4; its costs are those of the members on the slices at hand, as the papers
            count.
        route_weights: Weight of each route in the cross-entropy (Eq. 7), skip first; empty = from
            0.8 for skip evenly up to 1.2 for the last member. The paper gives no numbers, only
            that better members weigh slightly more and skip less.
        regions: Classes that make up each region of the Dice score S_i; empty = every foreground
            class is one. For brain tumours ((1, 2, 3), (1, 3), (3,)).
        windows: Decide on 128-pixel windows (the paper's setting 1) instead of whole slices.
    """

    steps: int = 600
    batch: int = 16
    learning_rate: float = 2e-3
    metric: ChoiceMetric = field(default_factory=ChoiceMetric)
    route_weights: tuple[float, ...] = ()
    regions: tuple[tuple[int, ...], ...] = ()
    windows: bool = False


def train_bank(model: MedDANet, batches: Batches, config: BankConfig, log: Path) -> None:
    """Trains the members of the bank and leaves them in `eval()`.

    Args:
        model: From `build_med_danet`; its decision network is left alone.
        batches: The training cases.
        config: How.
        log: Progress is appended to it as JSON lines.

    Raises:
        ValueError: If `config.stay` does not fit the bank.
        FloatingPointError: If a loss stops being finite.
    """
    shares = config.stay or (1.0,) * len(model.bank)
    if len(shares) != len(model.bank) or not all(0 < share <= 1 for share in shares):
        raise ValueError(
            f"stay is {tuple(shares)}, expected a share in (0, 1] for each of "
            f"{len(model.bank)} members"
        )
    leaving = [round(share * config.steps) for share in shares]
    if config.joint:
        rounds = {"bank": leaving}
    else:
        rounds = {
            f"bank-{route}": [last if i == index else 0 for i, last in enumerate(leaving)]
            for index, route in enumerate(model.routes[1:])
        }
    model.bank.train()
    for name, lasts in rounds.items():
        phase = PhaseConfig(
            name, max(lasts), config.batch, config.learning_rate, bfloat16=config.bfloat16
        )
        objective = BankObjective(lasts, config.windows)
        run_phase(model, model.bank.parameters(), objective, phase, batches, log, name=name)
    model.bank.eval()


class BankObjective:
    """Mean loss of the members that still take part (Eq. 6).

    A member that has left is not run, so neither its weights nor its norms' statistics move.

    Args:
        leaving: The step at which each member leaves.
        windows: Whether batches are windows.
    """

    def __init__(self, leaving: Sequence[int], windows: bool) -> None:
        self.leaving, self.windows = leaving, windows

    def __call__(self, model: Any, batches: Batches, step: int, size: int) -> Tensor:
        """Draws a batch and returns the loss."""
        images, labels = draw(batches, size, self.windows)
        losses = [
            segmentation_loss(member(images), labels)
            for member, last in zip(model.bank, self.leaving, strict=True) if step < last
        ]
        return torch.stack(losses).mean()


def train_decision(
    model: MedDANet, batches: Batches, config: DecisionConfig, log: Path
) -> dict[str, int]:
    """Trains the decision network on the choices of the frozen bank; leaves it in `eval()`.

    Args:
        model: Its bank is trained.
        batches: The training cases.
        config: How.
        log: Progress and, at the end, the distribution of the labels are appended as JSON lines.

    Returns:
        How often each route was the label of a training slice.

    Raises:
        ValueError: If the route weights do not fit the bank.
        FloatingPointError: If the loss stops being finite.
    """
    objective = DecisionObjective(model, config)
    model.bank.eval()
    model.decision.train()
    phase = PhaseConfig("decision", config.steps, config.batch, config.learning_rate)
    parameters = model.decision.parameters()
    run_phase(model, parameters, objective, phase, batches, log, name="decision")
    model.decision.eval()
    distribution = dict(zip(model.routes, objective.counts.tolist(), strict=True))
    with log.open("a") as stream:
        stream.write(json.dumps({"phase": "decision", "labels": distribution}) + "\n")
    return distribution


class DecisionObjective:
    """Weighted cross-entropy with the route that Eq. 4 chooses (Eq. 7).

    Attributes:
        counts: [1 + n] how often each route was the label so far.
    """

    def __init__(self, model: MedDANet, config: DecisionConfig) -> None:
        routes = len(model.routes)
        weights = config.route_weights or torch.linspace(0.8, 1.2, routes).tolist()
        if len(weights) != routes or min(weights) < 0:
            raise ValueError(
                f"route_weights are {tuple(weights)}, expected {routes} of them, none negative: "
                f"{', '.join(model.routes)}"
            )
        self.weights = torch.tensor(weights)
        self.config = config
        self.counts = torch.zeros(routes, dtype=torch.long)
        self._macs: dict[tuple[int, ...], list[int]] = {}

    def __call__(self, model: Any, batches: Batches, step: int, size: int) -> Tensor:
        """Draws a batch and returns the loss."""
        images, labels = draw(batches, size, self.config.windows)
        config, macs = self.config, self.member_macs(model, tuple(images.shape[1:]))
        wanted = decision_labels(model, images, labels, macs, config.metric, config.regions)
        self.counts += wanted.bincount(minlength=len(self.counts)).cpu()
        logits = model.decide(images)
        return F.cross_entropy(logits, wanted, self.weights.to(logits))

    def member_macs(self, model: MedDANet, shape: tuple[int, ...]) -> list[int]:
        """Returns F_i of Eq. 4 for slices of shape (C, H, W)."""
        if shape not in self._macs:
            self._macs[shape] = [count_macs(member, (1, *shape), "paper") for member in model.bank]
        return self._macs[shape]


def draw(batches: Batches, size: int, windows: bool) -> tuple[Tensor, Tensor]:
    """Returns an augmented batch of windows or slices [N, C, H, W] and its labels [N, H, W]."""
    images, labels = batches.window_batch(size) if windows else batches.slice_batch(size)
    return channels_last(images), labels


def member_scores(
    model: MedDANet, images: Tensor, labels: Tensor, regions: Sequence[Sequence[int]] = ()
) -> Tensor:
    """Returns the hard Dice [N, n] float64 of every member on every slice.

    Args:
        model: Its bank is in `eval()`.
        images: [N, C, H, W].
        labels: [N, H, W] classes.
        regions: As in `DecisionConfig`.
    """
    regions = regions or [(label,) for label in range(1, model.num_classes)]
    with torch.no_grad():
        found = [member(images).argmax(1) for member in model.bank]
    return torch.stack([slice_dice(classes, labels, regions) for classes in found], 1)


def decision_labels(
    model: MedDANet,
    images: Tensor,
    labels: Tensor,
    macs: Sequence[float],
    metric: ChoiceMetric,
    regions: Sequence[Sequence[int]] = (),
) -> Tensor:
    """Returns the route [N] int64 that Eq. 4 chooses for every slice.

    The members run on slices with foreground only.

    Args:
        model: Its bank is in `eval()`.
        images: [N, C, H, W].
        labels: [N, H, W] classes.
        macs: n multiply-adds of the members on such a slice.
        metric: Eq. 4.
        regions: As in `DecisionConfig`.
    """
    foreground = (labels > 0).flatten(1).any(1)
    wanted = torch.zeros(len(labels), dtype=torch.long, device=labels.device)
    if foreground.any():
        scores = member_scores(model, images[foreground], labels[foreground], regions)
        wanted[foreground] = metric.labels(scores, macs, foreground[foreground])
    return wanted
