"""Training losses: soft Dice over the batch, cross-entropy, and their sum.

The batch is that of all processes together.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .distributed import global_mean, global_sum


def _overlaps(probability: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (one-hot truth [N, K, H, W], overlap [K - 1], total [K - 1]) of the foreground."""
    truth = F.one_hot(labels, probability.shape[1]).movedim(-1, 1).to(probability.dtype)
    overlap = (probability * truth).sum((0, 2, 3))[1:]
    total = (probability.sum((0, 2, 3)) + truth.sum((0, 2, 3)))[1:]
    overlap, total = global_sum(torch.stack([overlap, total]))
    return truth, overlap, total


def dice_loss(probability: Tensor, labels: Tensor, eps: float = 1.0) -> Tensor:
    """Returns 1 - Dice, averaged over the foreground classes, each over the whole batch.

    Args:
        probability: [N, K, H, W], class 0 is background and does not count.
        labels: [N, H, W] int64 in 0..K-1.
        eps: Added to both sides of the fraction, so that an absent class costs nothing when none
            of it is predicted.

    Source: Med-DANet V2, Eq. 9 (mean instead of sum over classes).
    """
    _, overlap, total = _overlaps(probability, labels)
    return (1 - (2 * overlap + eps) / (total + eps)).mean()


def papers_dice_loss(probability: Tensor, labels: Tensor) -> Tensor:
    """Returns the sum over the foreground classes of 1 - Dice; arguments as `dice_loss`.

    An absent class costs 1, whatever is predicted. Source: Med-DANet V2, Eq. 9, and its code.
    """
    _, overlap, total = _overlaps(probability, labels)
    return (1 - 2 * overlap / (total + 1e-5)).sum()


def segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns soft Dice of the foreground plus cross-entropy of all classes.

    Cross-entropy keeps one foreground class from absorbing the background, an optimum of the
    papers' foreground-only Dice.

    Args:
        logits: [N, K, H, W]; half precision is widened to float32 first.
        labels: [N, H, W] int64.
    """
    logits = _wide(logits)
    truth, overlap, total = _overlaps(logits.softmax(1), labels)
    dice = (1 - (2 * overlap + 1.0) / (total + 1.0)).mean()
    # not F.cross_entropy, which has no deterministic form on GPUs
    return dice - global_mean((logits.log_softmax(1) * truth).sum(1))


def papers_segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns `papers_dice_loss` of the softmax; arguments as `segmentation_loss`."""
    return papers_dice_loss(_wide(logits).softmax(1), labels)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


Loss = Callable[[Tensor, Tensor], Tensor]

# name -> (of logits, of probabilities)
LOSSES: dict[str, tuple[Loss, Loss]] = {
    "dice+ce": (segmentation_loss, dice_loss),
    "dice": (papers_segmentation_loss, papers_dice_loss),
}
