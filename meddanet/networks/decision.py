"""The decision networks: small image classifiers that say what a slice needs.

`ShuffleNetV2` in the widths of V1 Table 5: "-M" halves the stock 0.5x network.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers import QuantConv2d, QuantLinear


def _conv(cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> QuantConv2d:
    return QuantConv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)


def _pointwise(cin: int, cout: int) -> nn.Sequential:
    return nn.Sequential(_conv(cin, cout, 1), nn.BatchNorm2d(cout), nn.ReLU(inplace=True))


def _depthwise(channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        _conv(channels, channels, 3, stride, groups=channels), nn.BatchNorm2d(channels)
    )


class ShuffleUnit(nn.Module):
    """The ShuffleNetV2 unit: half the channels pass untouched, or, at stride 2, a second branch."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        mid = cout // 2
        branch_in = cin if stride == 2 else cin // 2
        self.main = nn.Sequential(
            _pointwise(branch_in, mid), _depthwise(mid, stride), _pointwise(mid, cout - branch_in)
        )
        self.project = None
        if stride == 2:
            self.project = nn.Sequential(_depthwise(cin, 2), _pointwise(cin, cin))

    def forward(self, input: Tensor) -> Tensor:
        """Maps [N, Cin, H, W] to [N, Cout, H / stride, W / stride]."""
        if self.project is not None:
            return torch.cat([self.project(input), self.main(input)], 1)
        # channel shuffle before the split: even channels pass, odd ones are processed
        return torch.cat([input[:, 0::2], self.main(input[:, 1::2])], 1)


class ShuffleNetV2(nn.Module):
    """ShuffleNetV2 with a 3x3 stride-2 stem and a linear classifier without bias.

    Args:
        widths: Channels of stem, the three stages and the last 1x1 convolution.
        num_classes: Outputs K.
        in_channels: Channels of the image.

    Source: Med-DANet, Table 5; Ma et al. 2018.
    """

    repeats = (4, 8, 4)

    def __init__(self, widths: tuple[int, ...], num_classes: int, in_channels: int = 4) -> None:
        super().__init__()
        stem, *stages, last = widths
        self.stem = nn.Sequential(
            _conv(in_channels, stem, 3, 2), nn.BatchNorm2d(stem), nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )
        units, cin = [], stem
        for cout, repeat in zip(stages, self.repeats, strict=True):
            for index in range(repeat):
                units.append(ShuffleUnit(cin, cout, 2 if index == 0 else 1))
                cin = cout
        self.stages = nn.Sequential(*units)
        self.last = _pointwise(cin, last)
        self.classifier = QuantLinear(last, num_classes, bias=False)
        self._init_weights()

    def _init_weights(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d):
                std = 0.01 if name.startswith("stem") else 1.0 / module.weight.shape[1]
                nn.init.normal_(module.weight, 0, std)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.bias, 1e-4)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)

    def forward(self, input: Tensor) -> Tensor:
        """Maps [N, in_channels, H, W] of any size to [N, num_classes]."""
        x = self.last(self.stages(self.stem(input)))
        return self.classifier(x.mean((2, 3)))
