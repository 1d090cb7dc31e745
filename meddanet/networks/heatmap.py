"""A position network that points: where its map is hot, there is the crop's centre."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers import QuantConv2d
from .decision import ShuffleNetV2, pointwise


class HeatCentre(nn.Module):
    """The centre of mass of a map's softmax, as logits of the crop's place.

    A centre is a share of the image's side; a place is one of the crop's free play, which is
    smaller.

    Args:
        size: Side of the smallest crop, in pixels of the image that the network sees.

    Attributes:
        gain: [2], learnt, per axis: how far the crop's centre lies from the image's for a heat's
            centre that lies so far away; the last cells of a map may hang over the image's edge.
    """

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size
        self.gain = nn.Parameter(torch.ones(2))

    def forward(self, heat: Tensor, image: Tensor) -> Tensor:
        """Maps [N, 1, h, w], the map of an image [N, C, H, W], to logits [N, 2], (y, x)."""
        height, width = heat.shape[2:]
        share = heat.flatten(1).softmax(1).reshape(-1, height, width)
        rows, columns = (
            (torch.arange(side, device=heat.device, dtype=heat.dtype) + 0.5) / side - 0.5
            for side in (height, width)
        )
        centre = (share.sum(2) * rows).sum(1), (share.sum(1) * columns).sum(1)
        # numbers, not a tensor of them: a CUDA graph takes no copies from the host
        plays = play_shares(image.shape[2:], self.size)
        moved = [gain / play * c for gain, play, c in zip(self.gain, plays, centre, strict=True)]
        return (0.5 + torch.stack(moved, 1)).clamp(EDGE, 1 - EDGE).logit()


def play_shares(sides: Sequence[int], size: float) -> list[float]:
    """Returns a crop's free play as shares of the sides, at least a pixel's."""
    return [max(side - size, 1) / side for side in sides]


EDGE = 1 / 1024  # a logit stays finite, in float16 too


class HeatmapLocator(nn.Module):
    """ShuffleNetV2 down to a sixteenth of the image, a map of one channel, its centre of mass.

    A pooled vector has to remember the places that it has seen; a map answers for places that it
    has not. Not in the papers, whose position network is a pooled ShuffleNetV2. The form of the
    answer is that of integral regression (Sun et al. 2018).

    Args:
        widths: As of `ShuffleNetV2`; the last stage is left out.
        in_channels: Channels of the image.
        size: Side of the smallest crop, in pixels of the image that the network sees.
    """

    def __init__(self, widths: tuple[int, ...], in_channels: int, size: float) -> None:
        super().__init__()
        trunk = ShuffleNetV2(widths, 1, in_channels)
        self.stem = trunk.stem
        self.stages = trunk.stages[: sum(trunk.repeats[:2])]
        self.last = pointwise(widths[2], 64)
        self.map = QuantConv2d(64, 1, 1)
        weight, bias = self.map.parameters()
        nn.init.normal_(weight, 0, 0.05)
        nn.init.zeros_(bias)
        self.centre = HeatCentre(size)

    def heat(self, input: Tensor) -> Tensor:
        """Maps [N, in_channels, H, W] to a map of logits, a cell per 16 x 16 pixels, rounded up."""
        return self.map(self.last(self.stages(self.stem(input))))

    def forward(self, input: Tensor) -> Tensor:
        """Maps [N, in_channels, H, W] of any size to logits [N, 2], (y, x)."""
        return self.centre(self.heat(input), input)
