"""What the two training steps of Med-DANet minimise: the model bank's, then the decision network's.

Wang et al. 2022, section 3.3: the members learn to segment, jointly or each on its own; then the
decision network learns which of the frozen members Eq. 4 would choose. Differences from the paper:
cross-entropy beside Dice, if the phase's loss says so; decision labels are computed on the very
slices the decision network sees, by the frozen bank, instead of once per case before augmentation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .batches import Batches
from .choice import choice_metric, slice_dice
from .cost import count_macs
from .distributed import global_sum
from .losses import LOSSES
from .med_danet import MedDANet
from .recipe import DecisionConfig, PhaseConfig
from .routing import channels_last


def bank(model: Any, batches: Batches, step: int, phase: PhaseConfig) -> Tensor:
    """Mean loss of the members that still take part (Eq. 6).

    A member that has left is not run, so neither its weights nor its norms' statistics move.

    Raises:
        ValueError: If `phase.stay` does not fit the bank.
    """
    shares = member_shares(phase, len(model.bank))
    images, labels = draw(batches, phase)
    loss = LOSSES[phase.loss][0]
    losses = [
        loss(member(images), labels)
        for member, share in zip(model.bank, shares, strict=True)
        if step < round(share * phase.steps)
    ]
    return torch.stack(losses).mean()


def member_shares(phase: PhaseConfig, members: int) -> tuple[float, ...]:
    """Returns the share of a phase's steps that each member takes part in.

    Raises:
        ValueError: If `phase.stay` does not fit so many members.
    """
    shares = phase.stay or (1.0,) * members
    if len(shares) != members or min(shares) < 0 or max(shares) != 1:
        raise ValueError(
            f"stay is {shares}, expected a share from 0 to 1 for each of {members} members, the "
            "last to leave at 1"
        )
    return shares


class DecisionObjective:
    """Weighted cross-entropy with the route that Eq. 4 chooses (Eq. 7).

    Args:
        model: A `MedDANet` whose bank is trained.
        config: What the decision network learns.

    Attributes:
        counts: [1 + n] how often each route was the label so far, in all processes.

    Raises:
        ValueError: If the route weights do not fit the bank.
    """

    def __init__(self, model: MedDANet, config: DecisionConfig) -> None:
        routes = len(model.routes)
        weights = config.route_weights or torch.linspace(0.8, 1.2, routes).tolist()
        if len(weights) != routes or min(weights) < 0:
            raise ValueError(
                f"route_weights are {tuple(weights)}, expected {routes} of them, none negative: "
                f"{', '.join(model.routes)}"
            )
        self.weights, self.config = torch.tensor(weights), config
        self.counts = torch.zeros(routes, dtype=torch.long)
        self._macs: dict[tuple[int, ...], list[int]] = {}

    def __call__(self, model: Any, batches: Batches, step: int, phase: PhaseConfig) -> Tensor:
        """Draws a batch and returns the loss."""
        images, labels = draw(batches, phase)
        macs = self.member_macs(model, tuple(images.shape[1:]))
        wanted = decision_labels(model, images, labels, macs, self.config)
        counts = torch.bincount(wanted, minlength=len(self.counts))
        self.counts += global_sum(counts.float()).long().cpu()
        weight = self.weights.to(images)[wanted]
        log_probability = model.decide(images).log_softmax(1).gather(1, wanted[:, None])[:, 0]
        return -global_sum((weight * log_probability).sum()) / global_sum(weight.sum())

    def member_macs(self, model: MedDANet, shape: tuple[int, ...]) -> list[int]:
        """Returns F_i of Eq. 4 for slices of shape (C, H, W), as the papers count."""
        if shape not in self._macs:
            self._macs[shape] = [count_macs(member, (1, *shape), "paper") for member in model.bank]
        return self._macs[shape]

    def state_dict(self) -> dict[str, Tensor]:
        """Returns what a checkpoint keeps."""
        return {"counts": self.counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Goes on counting where a checkpoint stands."""
        self.counts = state["counts"]


def draw(batches: Batches, phase: PhaseConfig) -> tuple[Tensor, Tensor]:
    """Returns an augmented batch of windows or slices [N, C, H, W] and its labels [N, H, W]."""
    sample = batches.window_batch if phase.windows else batches.slice_batch
    images, labels = sample(phase.batch)
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
    config: DecisionConfig,
) -> Tensor:
    """Returns the route [N] int64 that Eq. 4 chooses for every slice.

    The members run on slices with foreground only.

    Args:
        model: Its bank is in `eval()`.
        images: [N, C, H, W].
        labels: [N, H, W] classes.
        macs: n multiply-adds of the members on such a slice.
        config: The metric of Eq. 4, and the regions of its Dice.
    """
    foreground = (labels > 0).flatten(1).any(1)
    wanted = torch.zeros(len(labels), dtype=torch.long, device=labels.device)
    if foreground.any():
        scores = member_scores(model, images[foreground], labels[foreground], config.regions)
        wanted[foreground] = 1 + choice_metric(scores, macs, config).argmax(1)
    return wanted
