"""Which member of a model bank should segment a slice: the supervision of V1's decision network.

Wang et al. 2022 (Med-DANet), Eq. 4:

    D = 0                                                      if no foreground pixel
    D = 1 + argmax_i (1 - alpha) * S_i + alpha * softmax(1 / F)_i   otherwise

S_i is the Dice score of member i on the slice, F_i what it costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GIGA = 1e9


@dataclass(frozen=True)
class ChoiceMetric:
    """Weighs a member's Dice on a slice against its cost; V1 Table 4 compares the variants.

    Table 4's rows "w/ S & F", "w/o F", "w/o S" (the paper's final model, and the default here) and
    "w/o S & F" are (softmax_scores, softmax_costs) = (True, True), (True, False), (False, True)
    and (False, False).

    Attributes:
        alpha: Weight of the cost, 0..1.
        softmax_scores: Whether the members' Dice scores pass a softmax.
        softmax_costs: Whether the members' inverse costs pass a softmax.
        cost_unit: Multiply-adds per unit of F. The paper names none, and it matters: in G the
            softmax of the inverse costs ranks its four members, in single multiply-adds it is
            uniform and alpha without effect.
    """

    alpha: float = 0.001
    softmax_scores: bool = False
    softmax_costs: bool = True
    cost_unit: float = GIGA

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}, expected 0..1")
        if self.cost_unit <= 0:
            raise ValueError(f"cost_unit is {self.cost_unit}, expected more than 0")

    def __call__(self, scores: Tensor, macs: Sequence[float]) -> Tensor:
        """Returns the metric [N, n].

        Args:
            scores: [N, n] Dice per slice and member.
            macs: n multiply-adds of the members on such a slice.
        """
        inverse = self.cost_unit / torch.tensor(macs, dtype=torch.float64, device=scores.device)
        if self.softmax_costs:
            inverse = inverse.softmax(0)
        scores = scores.double()
        if self.softmax_scores:
            scores = scores.softmax(1)
        return (1 - self.alpha) * scores + self.alpha * inverse

    def labels(self, scores: Tensor, macs: Sequence[float], foreground: Tensor) -> Tensor:
        """Returns the decision labels [N] int64: 0 is skip, 1 + i is member i.

        Args:
            scores: [N, n] Dice per slice and member.
            macs: n multiply-adds of the members on such a slice.
            foreground: [N] bool, whether the slice holds a labelled pixel.
        """
        return torch.where(foreground, 1 + self(scores, macs).argmax(1), 0)


def slice_dice(
    prediction: Tensor, labels: Tensor, regions: Sequence[Sequence[int]]
) -> Tensor:
    """Returns the hard Dice of every slice [N] float64, averaged over regions.

    A region that is empty in both counts 1, as in the papers' evaluation.

    Args:
        prediction: [N, H, W] classes.
        labels: [N, H, W] classes.
        regions: Classes that make up each region, such as ((1, 2, 3), (1, 3), (3,)) for whole
            tumour, tumour core and enhancing tumour.
    """
    scores = []
    for region in regions:
        classes = torch.tensor(region, device=labels.device)
        found = torch.isin(prediction, classes.to(prediction.dtype)).flatten(1)
        truth = torch.isin(labels, classes.to(labels.dtype)).flatten(1)
        overlap, total = (found & truth).sum(1), found.sum(1) + truth.sum(1)
        scores.append(torch.where(total > 0, 2 * overlap.double() / total, 1.0))
    return torch.stack(scores, 1).mean(1)
