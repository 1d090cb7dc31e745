"""2-D TransBTS: the U-Net's encoder and decoder with a transformer between them.

"light" has one transformer layer (V1's M3, V2's second baseline), the full one four (M4).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..layers import QuantConv2d, QuantLinear
from .unet import UNet


def _conv_twice(cin: int, cout: int) -> nn.Sequential:
    return nn.Sequential(
        QuantConv2d(cin, cout, 3, padding=1), nn.BatchNorm2d(cout), nn.ReLU(inplace=True),
        QuantConv2d(cout, cout, 3, padding=1), nn.BatchNorm2d(cout), nn.ReLU(inplace=True),
    )


class PostActivationBlock(nn.Module):
    """x + ReLU(norm(conv(ReLU(norm(conv(x)))))), the same number of channels throughout."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = _conv_twice(channels, channels)

    def forward(self, input: Tensor) -> Tensor:
        """Maps [N, C, H, W] to the same shape."""
        return input + self.branch(input)


class Attention(nn.Module):
    """Multi-head self-attention; the matrix products stay in full precision."""

    def __init__(self, channels: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = QuantLinear(channels, 3 * channels, bias=False)
        self.proj = QuantLinear(channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps [N, L, C] to the same shape."""
        query, key, value = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).unbind(2)
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
            dropout_p=self.dropout if self.training else 0.0,
        )  # [N, heads, L, C / heads]
        return self.proj(mixed.transpose(1, 2).flatten(2))


class TransformerLayer(nn.Module):
    """Attention and a two-layer perceptron, each after a layer norm and added to its input."""

    def __init__(self, channels: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attention = Attention(channels, heads, dropout)
        self.norm2 = nn.LayerNorm(channels)
        self.perceptron = nn.Sequential(
            QuantLinear(channels, hidden), nn.GELU(), nn.Dropout(dropout),
            QuantLinear(hidden, channels),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps [N, L, C] to the same shape."""
        tokens = tokens + self.dropout(self.attention(self.norm1(tokens)))
        return tokens + self.dropout(self.perceptron(self.norm2(tokens)))


class Transformer(nn.Module):
    """Linear projection, position embedding, transformer layers, and the way back to the decoder.

    Args:
        channels: Channels of the feature map.
        embedding: Channels of the tokens.
        layers: Number of transformer layers.
        heads: Attention heads.
        hidden: Width of the perceptrons.
        position_size: (height, width) in tokens that the position embedding is learnt at; maps of
            another size get it interpolated.
        dropout: Rate in training.
    """

    def __init__(
        self,
        channels: int,
        embedding: int,
        layers: int,
        heads: int,
        hidden: int,
        position_size: tuple[int, int],
        dropout: float,
    ) -> None:
        super().__init__()
        self.project = nn.Sequential(
            nn.BatchNorm2d(channels), nn.ReLU(), QuantConv2d(channels, embedding, 3, padding=1)
        )
        self.position_embedding = nn.Parameter(torch.zeros(1, embedding, *position_size))
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.Sequential(
            *(TransformerLayer(embedding, heads, hidden, dropout) for _ in range(layers))
        )
        self.norm = nn.LayerNorm(embedding)
        self.reduce = _conv_twice(embedding, channels)
        self.refine = PostActivationBlock(channels)

    def forward(self, input: Tensor) -> Tensor:
        """Maps [N, C, H, W] to the same shape, one token per pixel."""
        embedded = self.project(input) + positions_for(self.position_embedding, input)
        tokens = self.dropout(embedded).flatten(2).transpose(1, 2)
        tokens = self.norm(self.layers(tokens))  # [N, H * W, embedding]
        return self.refine(self.reduce(as_map(tokens, input)))


@fx.wrap
def positions_for(embedding: Tensor, input: Tensor) -> Tensor:
    """Resizes a position embedding [1, E, h, w] to a map [N, C, H, W]: [1, E, H, W]."""
    size = input.shape[2:]
    if embedding.shape[2:] == size:
        return embedding
    return F.interpolate(embedding, size, mode="bicubic", align_corners=False)


@fx.wrap
def as_map(tokens: Tensor, input: Tensor) -> Tensor:
    """Lays tokens [N, H * W, E] out as the map [N, C, H, W] that they come from: [N, E, H, W]."""
    return tokens.transpose(1, 2).unflatten(2, input.shape[2:])


class TransBTS(UNet):
    """The U-Net with a transformer at its coarsest resolution and post-activation decoder blocks.

    Takes images of any size whose sides are multiples of 8; the encoder stages take bit widths per
    sample as the U-Net's do.

    Args:
        base_channels: b.
        in_channels: Channels of the image.
        num_classes: K, background included.
        layers: Transformer layers: 1 is the light version, 4 the full one.
        embedding: Channels of the tokens.
        heads: Attention heads.
        hidden: Width of the perceptrons. 2048 is what the papers' FLOPs imply.
        position_size: (height, width) of the learnt position embedding in pixels / 8.
        dropout: Rate inside the transformer, in training only.

    Source: Wang et al. 2021 (TransBTS), made 2-D as in Med-DANet, section 4.1.
    """

    def __init__(
        self,
        base_channels: int,
        in_channels: int,
        num_classes: int,
        layers: int,
        embedding: int = 512,
        heads: int = 8,
        hidden: int = 2048,
        position_size: tuple[int, int] = (16, 16),
        dropout: float = 0.1,
    ) -> None:
        super().__init__(
            base_channels, in_channels, num_classes, decoder_block=PostActivationBlock
        )
        self.transformer = Transformer(
            self.stage_channels[-1], embedding, layers, heads, hidden, position_size, dropout
        )

    def decode(self, input: Tensor, skips: list[Tensor]) -> Tensor:
        """Runs the transformer, then maps as `UNet.decode` does."""
        return super().decode(self.transformer(input), skips)
