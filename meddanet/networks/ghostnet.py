"""GhostNet, the cheapest of the stock decision networks of V1 Table 5."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import QuantConv2d, QuantLinear
from .decision import conv, depthwise, init_kaiming, pointwise


def _divisible(channels: float) -> int:
    """The nearest multiple of 4, at least 4 and not more than a tenth below."""
    nearest = max(4, int(channels + 2) // 4 * 4)
    return nearest + 4 if nearest < 0.9 * channels else nearest


class GhostModule(nn.Module):
    """A 1x1 convolution makes half of the channels, a depthwise 3x3 of these the other half."""

    def __init__(self, cin: int, cout: int, activation: type[nn.Module]) -> None:
        super().__init__()
        half = cout // 2
        self.primary = nn.Sequential(conv(cin, half, 1), nn.BatchNorm2d(half), activation())
        self.cheap = nn.Sequential(depthwise(half, 1), activation())

    def forward(self, input: Tensor) -> Tensor:
        """Maps [N, Cin, H, W] to [N, Cout, H, W]."""
        primary = self.primary(input)
        return torch.cat([primary, self.cheap(primary)], 1)


class SqueezeExcite(nn.Module):
    """Scales channels by a gate computed from their means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = QuantConv2d(channels, _divisible(channels / 4), 1)
        self.expand = QuantConv2d(_divisible(channels / 4), channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        """Maps [N, C, H, W] to the same shape."""
        gate = self.expand(self.reduce(input.mean((2, 3), keepdim=True)).relu())
        return input * F.hardsigmoid(gate)


class GhostBottleneck(nn.Module):
    """Two ghost modules around a strided depthwise convolution and squeeze-and-excite."""

    def __init__(
        self, cin: int, mid: int, cout: int, kernel: int, stride: int, excite: bool
    ) -> None:
        super().__init__()
        branch: list[nn.Module] = [GhostModule(cin, mid, nn.ReLU)]
        if stride == 2:
            branch.append(depthwise(mid, 2, kernel))
        if excite:
            branch.append(SqueezeExcite(mid))
        self.branch = nn.Sequential(*branch, GhostModule(mid, cout, nn.Identity))
        self.shortcut = nn.Sequential()
        if stride == 2 or cin != cout:
            self.shortcut = nn.Sequential(
                depthwise(cin, stride, kernel), conv(cin, cout, 1), nn.BatchNorm2d(cout)
            )

    def forward(self, input: Tensor) -> Tensor:
        """Maps [N, Cin, H, W] to [N, Cout, H / stride, W / stride]."""
        return self.branch(input) + self.shortcut(input)


class GhostNet(nn.Module):
    """GhostNet for images of any number of channels.

    Args:
        width: Factor on the channels of all stages; V1 Table 5 fits 0.5.
        num_classes: Outputs K.
        in_channels: Channels of the image.

    Source: Han et al. 2020, Table 1.
    """

    # kernel, expanded channels, channels, squeeze-and-excite, stride
    stages = (
        (3, 16, 16, False, 1), (3, 48, 24, False, 2), (3, 72, 24, False, 1), (5, 72, 40, True, 2),
        (5, 120, 40, True, 1), (3, 240, 80, False, 2), (3, 200, 80, False, 1),
        (3, 184, 80, False, 1), (3, 184, 80, False, 1), (3, 480, 112, True, 1),
        (3, 672, 112, True, 1), (5, 672, 160, True, 2), (5, 960, 160, False, 1),
        (5, 960, 160, True, 1), (5, 960, 160, False, 1), (5, 960, 160, True, 1),
    )

    def __init__(self, width: float, num_classes: int, in_channels: int = 4) -> None:
        super().__init__()
        cin, last = _divisible(16 * width), _divisible(960 * width)
        units: list[nn.Module] = [
            conv(in_channels, cin, 3, 2), nn.BatchNorm2d(cin), nn.ReLU(inplace=True)
        ]
        for kernel, mid, channels, excite, stride in self.stages:
            cout = _divisible(channels * width)
            units.append(
                GhostBottleneck(cin, _divisible(mid * width), cout, kernel, stride, excite)
            )
            cin = cout
        self.features = nn.Sequential(*units, pointwise(cin, last))
        self.head = QuantLinear(last, 1280)
        self.dropout = nn.Dropout(0.2)
        self.classifier = QuantLinear(1280, num_classes)
        init_kaiming(self)

    def forward(self, input: Tensor) -> Tensor:
        """Maps [N, in_channels, H, W] of any size to [N, num_classes]."""
        x = self.head(self.features(input).mean((2, 3))).relu()
        return self.classifier(self.dropout(x))
