"""Training losses: soft Dice over the batch, cross-entropy, and their sum."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dice_loss(probability: Tensor, labels: Tensor, eps: float = 1.0) -> Tensor:
    """Returns 1 - Dice, averaged over the foreground classes, each over the whole batch.

    Args:
        probability: [N, K, H, W], class 0 is background and does not count.
        labels: [N, H, W] int64 in 0..K-1.
        eps: Added to both sides of the fraction, so that an absent class costs nothing when none
            of it is predicted.

    Source: Med-DANet V2, Eq. 9 (mean instead of sum over classes).
    """
    truth = F.one_hot(labels, probability.shape[1]).movedim(-1, 1).to(probability.dtype)
    overlap = (probability * truth).sum((0, 2, 3))[1:]
    total = (probability.sum((0, 2, 3)) + truth.sum((0, 2, 3)))[1:]
    return (1 - (2 * overlap + eps) / (total + eps)).mean()


def segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns soft Dice of the foreground plus cross-entropy of all classes.

    Cross-entropy keeps one foreground class from absorbing the background, an optimum of the
    papers' foreground-only Dice.

    Args:
        logits: [N, K, H, W]; half precision is widened to float32 first.
        labels: [N, H, W] int64.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return dice_loss(logits.softmax(1), labels) + F.cross_entropy(logits, labels)
