"""The papers' modified 2-D U-Net: TransBTS's encoder made 2-D, and a mirrored decoder.

Four resolutions, channels b, 2b, 4b, 8b. Every convolution is a quantisable layer; the four encoder
stages, each with the Down convolution that follows it, take a bit width per sample.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from ..layers import QuantConv2d, QuantConvTranspose2d

# (stage index, stage input [N, C, H, W]) -> widths [N], or None for the layers' own
ChooseBits = Callable[[int, Tensor], Tensor | None]


class ResidualBlock(nn.Module):
    """x + conv(ReLU(norm(conv(ReLU(norm(x)))))), the same number of channels throughout."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = QuantConv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = QuantConv2d(channels, channels, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, input: Tensor, num_bits: Tensor | None = None) -> Tensor:
        """Maps [N, C, H, W] to the same shape; `num_bits` [N] sets weights and inputs alike."""
        x = self.conv1(self.relu(self.norm1(input)), num_bits, num_bits)
        x = self.conv2(self.relu(self.norm2(x)), num_bits, num_bits)
        return input + x


class EncoderStage(nn.Module):
    """Residual blocks, then a strided convolution to the next resolution (none after the last)."""

    def __init__(self, channels: int, blocks: int, out_channels: int | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(channels) for _ in range(blocks))
        self.down = None
        if out_channels is not None:
            self.down = QuantConv2d(channels, out_channels, 3, stride=2, padding=1)

    def forward(self, input: Tensor, num_bits: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Maps [N, C, H, W] to (skip [N, C, H, W], next stage's input [N, C', H / 2, W / 2]).

        `num_bits` [N] sets weights and inputs alike. The last stage returns its skip twice.
        """
        x = input
        for block in self.blocks:
            x = block(x, num_bits)
        return x, x if self.down is None else self.down(x, num_bits, num_bits)


class Up(nn.Module):
    """1x1 convolution, transposed 2x2, concatenation [skip, up], 1x1 convolution."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.reduce = QuantConv2d(channels, out_channels, 1)
        self.up = QuantConvTranspose2d(out_channels, out_channels, 2, stride=2)
        self.fuse = QuantConv2d(2 * out_channels, out_channels, 1)

    def forward(self, input: Tensor, skip: Tensor) -> Tensor:
        """Maps [N, C, H, W] and the skip [N, C/2, 2H, 2W] to [N, C/2, 2H, 2W]."""
        return self.fuse(torch.cat([skip, self.up(self.reduce(input))], 1))


class LastStage(nn.Module):
    """The last decoder stage: one block at full resolution and the 1x1 to the classes."""

    def __init__(
        self, channels: int, num_classes: int, block: Callable[[int], nn.Module] = ResidualBlock
    ) -> None:
        super().__init__()
        self.block = block(channels)
        self.end = QuantConv2d(channels, num_classes, 1)

    def forward(self, input: Tensor) -> Tensor:
        """Maps features [N, b, H, W] to logits [N, K, H, W]."""
        return self.end(self.block(input))


class UNet(nn.Module):
    """The 2-D U-Net with base width b, split before its last decoder stage.

    Args:
        base_channels: b; 12 is V1's M1, 16 its M2 and V2's baseline.
        in_channels: Channels of the image.
        num_classes: K, background included.
        dropout: Rate of the channel dropout after the first convolution, in training only.
        decoder_block: Builds the decoder's blocks from their number of channels.

    Source: Med-DANet, section 4.1, and Med-DANet V2, section 4.1.
    """

    stride = 8
    blocks_per_stage = (1, 2, 2, 4)

    def __init__(
        self,
        base_channels: int,
        in_channels: int,
        num_classes: int,
        dropout: float = 0.2,
        decoder_block: Callable[[int], nn.Module] = ResidualBlock,
    ) -> None:
        super().__init__()
        widths = [base_channels * 2**i for i in range(4)]
        self.in_channels, self.num_classes = in_channels, num_classes
        self.stage_channels = tuple(widths)
        self.init = QuantConv2d(in_channels, widths[0], 3, padding=1)
        self.dropout = nn.Dropout2d(dropout)
        self.encoder = nn.ModuleList(
            EncoderStage(width, blocks, after)
            for width, blocks, after in zip(
                widths, self.blocks_per_stage, [*widths[1:], None], strict=True
            )
        )
        self.up3, self.dec3 = Up(widths[3], widths[2]), decoder_block(widths[2])
        self.up2, self.dec2 = Up(widths[2], widths[1]), decoder_block(widths[1])
        self.up1 = Up(widths[1], widths[0])
        self.last_stage = LastStage(widths[0], num_classes, decoder_block)

    def encode(
        self, input: Tensor, choose_bits: ChooseBits | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Returns the coarsest feature [N, 8b, H / 8, W / 8] and the skips, finest first."""
        check_input(input, self.in_channels, self.stride)
        x = self.dropout(self.init(input))
        skips = []
        for index, stage in enumerate(self.encoder):
            num_bits = None if choose_bits is None else choose_bits(index, x)
            skip, x = stage(x, num_bits)
            skips.append(skip)
        return x, skips

    def decode(self, input: Tensor, skips: list[Tensor]) -> Tensor:
        """Maps the coarsest feature and the skips to [N, b, H, W]."""
        x = self.dec3(self.up3(input, skips[2]))
        x = self.dec2(self.up2(x, skips[1]))
        return self.up1(x, skips[0])

    def features(self, input: Tensor, choose_bits: ChooseBits | None = None) -> Tensor:
        """Runs everything before the last decoder stage.

        Args:
            input: [N, in_channels, H, W], H and W multiples of 8.
            choose_bits: Called before each encoder stage with (index, feature).

        Returns:
            [N, b, H, W].

        Raises:
            ValueError: If H or W is not a multiple of 8, or the channels do not fit.
        """
        return self.decode(*self.encode(input, choose_bits))

    def forward(self, input: Tensor) -> Tensor:
        """Maps images [N, in_channels, H, W] to logits [N, K, H, W]."""
        return self.last_stage(self.features(input))


@fx.wrap
def check_input(input: Tensor, in_channels: int, stride: int) -> None:
    """Raises ValueError, with the cure, unless `input` is [N, in_channels, H, W] on the stride."""
    if input.dim() != 4 or input.shape[1] != in_channels:
        raise ValueError(
            f"input must be [N, {in_channels}, H, W], got shape {list(input.shape)}"
        )
    height, width = input.shape[2:]
    if height % stride or width % stride:
        fit = [-(-side // stride) * stride for side in (height, width)]
        raise ValueError(
            f"height and width must be multiples of {stride}, got {height}x{width}; "
            f"pad to {fit[0]}x{fit[1]}"
        )
