"""Decision networks: small image classifiers that say what a slice needs.

`ShuffleNetV2` in the two widths of V1 Table 5 ("-M" halves the stock 0.5x network) and
`MobileNetV2`; the fourth is in `ghostnet`. All pool over the whole map: images of any size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers import QuantConv2d, QuantLinear


def conv(cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> QuantConv2d:
    """A quantisable convolution without bias that keeps H / stride x W / stride."""
    return QuantConv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)


def pointwise(cin: int, cout: int) -> nn.Sequential:
    """1x1 convolution, batch norm, ReLU."""
    return nn.Sequential(conv(cin, cout, 1), nn.BatchNorm2d(cout), nn.ReLU(inplace=True))


def depthwise(channels: int, stride: int, kernel: int = 3) -> nn.Sequential:
    """Depthwise convolution and batch norm, no activation."""
    return nn.Sequential(
        conv(channels, channels, kernel, stride, groups=channels), nn.BatchNorm2d(channels)
    )


class ShuffleStem(nn.Sequential):
    """A 3x3 convolution of stride 2, batch norm, ReLU, and max pooling of stride 2."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__(
            conv(cin, cout, 3, 2), nn.BatchNorm2d(cout), nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )


class ShuffleUnit(nn.Module):
    """The ShuffleNetV2 unit: half the channels pass untouched, or, at stride 2, a second branch."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        mid = cout // 2
        branch_in = cin if stride == 2 else cin // 2
        self.main = nn.Sequential(
            pointwise(branch_in, mid), depthwise(mid, stride), pointwise(mid, cout - branch_in)
        )
        self.project = None
        if stride == 2:
            self.project = nn.Sequential(depthwise(cin, 2), pointwise(cin, cin))

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
        self.stem = ShuffleStem(in_channels, stem)
        units, cin = [], stem
        for cout, repeat in zip(stages, self.repeats, strict=True):
            for index in range(repeat):
                units.append(ShuffleUnit(cin, cout, 2 if index == 0 else 1))
                cin = cout
        self.stages = nn.Sequential(*units)
        self.last = pointwise(cin, last)
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


def init_kaiming(model: nn.Module) -> None:
    """Draws convolutions by He's rule and linear layers near zero, biases zero."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)


def _conv_norm_relu6(
    cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        conv(cin, cout, kernel, stride, groups), nn.BatchNorm2d(cout), nn.ReLU6(inplace=True)
    )


class InvertedResidual(nn.Module):
    """Expand by 1x1, depthwise 3x3, project by 1x1 without activation; added where shapes allow."""

    def __init__(self, cin: int, cout: int, stride: int, expansion: int) -> None:
        super().__init__()
        mid = cin * expansion
        self.shortcut = stride == 1 and cin == cout
        self.branch = nn.Sequential(
            *([_conv_norm_relu6(cin, mid, 1)] if expansion != 1 else []),
            _conv_norm_relu6(mid, mid, 3, stride, groups=mid),
            conv(mid, cout, 1), nn.BatchNorm2d(cout),
        )

    def forward(self, input: Tensor) -> Tensor:
        """Maps [N, Cin, H, W] to [N, Cout, H / stride, W / stride]."""
        return input + self.branch(input) if self.shortcut else self.branch(input)


class MobileNetV2(nn.Module):
    """MobileNetV2 1.0x for images of any number of channels.

    Args:
        num_classes: Outputs K.
        in_channels: Channels of the image.

    Source: Sandler et al. 2018, Table 2.
    """

    # expansion, channels, repeats, stride of the first
    stages = (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(self, num_classes: int, in_channels: int = 4) -> None:
        super().__init__()
        units: list[nn.Module] = [_conv_norm_relu6(in_channels, 32, 3, 2)]
        cin = 32
        for expansion, cout, repeats, stride in self.stages:
            for index in range(repeats):
                units.append(InvertedResidual(cin, cout, stride if index == 0 else 1, expansion))
                cin = cout
        self.features = nn.Sequential(*units, _conv_norm_relu6(cin, 1280, 1))
        self.dropout = nn.Dropout(0.2)
        self.classifier = QuantLinear(1280, num_classes)
        init_kaiming(self)

    def forward(self, input: Tensor) -> Tensor:
        """Maps [N, in_channels, H, W] of any size to [N, num_classes]."""
        return self.classifier(self.dropout(self.features(input).mean((2, 3))))
