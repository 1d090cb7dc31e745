"""Which member of a model bank should segment a slice: the supervision of V1's decision network.

Wang et al. 2022 (Med-DANet), Eq. 4:

    D = 0                                                      if no foreground pixel
    D = 1 + argmax_i (1 - alpha) * S_i + alpha * softmax(1 / F)_i   otherwise

S_i is the Dice score of member i on the slice, F_i what it costs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .recipe import DecisionConfig


def choice_metric(scores: Tensor, macs: Sequence[float], config: DecisionConfig) -> Tensor:
    """Returns what the argmax of Eq. 4 is taken of, [N, n] float64.

    Args:
        scores: [N, n] Dice per slice and member.
        macs: n multiply-adds of the members on such a slice.
        config: Alpha, the unit of F, and which of the two pass a softmax.
    """
    inverse = config.cost_unit / torch.tensor(macs, dtype=torch.float64, device=scores.device)
    if config.softmax_costs:
        inverse = inverse.softmax(0)
    scores = scores.double()
    if config.softmax_scores:
        scores = scores.softmax(1)
    return (1 - config.alpha) * scores + config.alpha * inverse


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
