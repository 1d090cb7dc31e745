"""A position network that points: where its map is hot, there is the crop's centre."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers import QuantConv2d
from .decision import ShuffleNetV2, pointwise


class HeatCentre(nn.Module):
    """The centre of mass of a map's softmax, as logits of the crop's place.

    A centre is a share of the image's side, a place one of the smaller free play of a crop: a
    learnt gain per axis lies between them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((2,), 1.5))

    def forward(self, heat: Tensor) -> Tensor:
        """Maps [N, 1, h, w] to logits [N, 2], (y, x)."""
        height, width = heat.shape[2:]
        share = heat.flatten(1).softmax(1).reshape(-1, height, width)
        rows, columns = (
            (torch.arange(side, device=heat.device, dtype=heat.dtype) + 0.5) / side - 0.5
            for side in (height, width)
        )
        centre = torch.stack([(share.sum(2) * rows).sum(1), (share.sum(1) * columns).sum(1)], 1)
        return (0.5 + self.gain * centre).clamp(EDGE, 1 - EDGE).logit()


EDGE = 1 / 1024  # a logit stays finite, in float16 too


class HeatmapLocator(nn.Module):
    """ShuffleNetV2 down to a sixteenth of the image, a map of one channel, its centre of mass.

    A pooled vector has to remember the places that it has seen; a map answers for places that it
    has not. Not in the papers, whose position network is a pooled ShuffleNetV2. The form of the
    answer is that of integral regression (Sun et al. 2018).

    Args:
        widths: As of `ShuffleNetV2`; the last stage is left out.
        in_channels: Channels of the image.
    """

    def __init__(self, widths: tuple[int, ...], in_channels: int = 4) -> None:
        super().__init__()
        trunk = ShuffleNetV2(widths, 1, in_channels)
        self.stem = trunk.stem
        self.stages = trunk.stages[: sum(trunk.repeats[:2])]
        self.last = pointwise(widths[2], 64)
        self.map = QuantConv2d(64, 1, 1)
        nn.init.normal_(self.map.weight, 0, 0.05)
        nn.init.zeros_(self.map.bias)
        self.centre = HeatCentre()

    def heat(self, input: Tensor) -> Tensor:
        """Maps [N, in_channels, H, W] to the logits [N, 1, H / 16, W / 16] of the crop's centre."""
        return self.map(self.last(self.stages(self.stem(input))))

    def forward(self, input: Tensor) -> Tensor:
        """Maps [N, in_channels, H, W] of any size to logits [N, 2], (y, x)."""
        return self.centre(self.heat(input))
