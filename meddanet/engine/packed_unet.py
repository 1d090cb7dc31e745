"""A U-Net's weights for the integer kernels: packed once, norms folded, ranges beside them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels import PackedConv, norm_affine, pack_conv
from ..kernels import conv_int_triton as conv_kernel
from ..kernels.conv_call import is_mild
from ..kernels.pairs import split_floats
from ..kernels.way_up_pack import PackedWayUp, pack_way_up
from ..layers import QuantConvTranspose2d, as_made, quantized_layers
from ..med_danet_v2 import MedDANetV2
from ..networks.unet import ResidualBlock, UNet

Affine = tuple[Tensor, Tensor]


class Conv(NamedTuple):
    """Packed weights, the range of their input [1] and the width of its codes."""

    packed: PackedConv
    amax: Tensor
    num_bits: int


class Block(NamedTuple):
    """A residual block: its first norm, and two convolutions, the second norm in the first one."""

    affine: Affine
    first: Conv
    second: Conv


class Stage(NamedTuple):
    """An encoder stage: its selector's (weight, bias, widths), blocks, the way down or None."""

    selector: tuple[Tensor, Tensor, Tensor]
    blocks: list[Block]
    down: Conv | None

    @property
    def widths(self) -> tuple[int, ...]:
        """What the selector chooses from."""
        return self.blocks[0].first.packed.num_bits

    @property
    def guess(self) -> int:
        """The widest of at most 8 bits; 0 if all have more."""
        return max((width for width in self.widths if width <= 8), default=0)


class Up(NamedTuple):
    """A way up, whose first convolution reads codes and whose last one those of a skip; a block."""

    reduce: Conv
    fuse: Conv
    packed: PackedWayUp
    block: Block


class Last(NamedTuple):
    """A last stage: its block, with the way up to it, and what ends it."""

    up: Up
    end: Conv


class PackedUNet:
    """The weights of a model's U-Net, packed once.

    Args:
        model: In `eval()`; every layer of its segmenter quantised and with a range.
        device: Where the weights go.

    Raises:
        ValueError: If the segmenter is no U-Net of residual blocks, or a layer has no integer form.
    """

    def __init__(self, model: MedDANetV2, device: torch.device) -> None:
        # its parts are found by name, of which type checkers know nothing
        self._model: Any = model
        self._device = device
        _check(model)
        unet = self._model.segmenter
        self.channels = unet.stage_channels
        self.begin = self._conv(unet.init)
        self.stages = [
            self._stage(stage, selector)
            for stage, selector in zip(unet.encoder, self._model.bit_selectors, strict=True)
        ]
        self.whole = self._last(unet.up1, unet.last_stage)
        self.crops = [self._last(unet.up1, stage) for stage in self._model.crop_last_stages]
        # the last one's convolutions are the same for all last stages
        self.ups = [self._up(unet.up3, unet.dec3), self._up(unet.up2, unet.dec2), self.whole.up]

    def _conv(self, layer: Any, num_bits: Any = None, norm: nn.BatchNorm2d | None = None) -> Conv:
        transposed = isinstance(layer, QuantConvTranspose2d)
        packed = pack_conv(
            layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups,
            num_bits=num_bits or layer.num_bits, per_channel=layer.per_channel,
            transposed=transposed, norm=None if norm is None else norm_affine(norm),
        )
        if not conv_kernel.supports(packed) or getattr(layer, "padding_mode", "zeros") != "zeros":
            raise ValueError(f"executor triton has no kernel for {layer}; use eager")
        amax = layer.input_amax.detach().float().reshape(1)
        widths = [layer.input_num_bits] if num_bits is None else num_bits
        if not all(is_mild(amax, width, packed.scale, packed.bias) for width in widths):
            raise ValueError(
                f"executor triton has no kernel for {layer}, whose inputs reach up to "
                f"{float(amax)} or whose weights are not finite; use eager"
            )
        return Conv(packed.to(self._device), amax.to(self._device), layer.input_num_bits)

    def _block(self, block: ResidualBlock, num_bits: Any = None) -> Block:
        gain, shift = (split_floats(part).to(self._device) for part in norm_affine(block.norm1))
        return Block(
            (gain, shift),
            self._conv(block.conv1, num_bits, block.norm2), self._conv(block.conv2, num_bits),
        )

    def _stage(self, stage: Any, selector: Any) -> Stage:
        widths = [int(width) for width in selector.widths.tolist()]
        linear = selector.linear
        return Stage(
            (linear.weight.detach().float().to(self._device).contiguous(),
             linear.bias.detach().float().to(self._device),
             torch.tensor(widths, dtype=torch.int32, device=self._device)),
            [self._block(block, widths) for block in stage.blocks],
            None if stage.down is None else self._conv(stage.down, widths),
        )

    def _up(self, up: Any, block: ResidualBlock) -> Up:
        reduce, double, fuse = (self._conv(layer) for layer in (up.reduce, up.up, up.fuse))
        after = self._block(block)
        packed = pack_way_up(
            reduce, double, fuse, after.affine, after.first.amax, after.first.num_bits
        )
        return Up(reduce, fuse, packed, after)

    def _last(self, up: Any, stage: Any) -> Last:
        return Last(self._up(up, stage.block), self._conv(stage.end))


def _check(model: MedDANetV2) -> None:
    segmenter: Any = model.segmenter
    lasts: list[Any] = [segmenter.last_stage, *model.crop_last_stages]
    blocks = [getattr(last, "block", None) for last in lasts] + [getattr(segmenter, "dec3", None)]
    if type(segmenter) is not UNet or not all(type(block) is ResidualBlock for block in blocks):
        raise ValueError("executor triton runs unet-* segmenters only; use auto or eager")
    for part in (segmenter, model.crop_last_stages):
        for name, module in part.named_modules():
            if not as_made(module):
                raise ValueError(
                    f"executor triton runs parts as their classes say, {name or 'the segmenter'} "
                    "has hooks or methods of its own; use auto or eager"
                )
    routed = {f"segmenter.encoder.{index}" for index in range(len(segmenter.encoder))}
    for name, layer in quantized_layers(model).items():
        if not name.startswith(("segmenter.", "crop_last_stages.")):
            continue
        if not layer.quantize:
            raise ValueError(
                f"executor triton runs integers only, layer {name} is in float; use auto or eager"
            )
        own = ".".join(name.split(".")[:3]) not in routed
        if own and max(layer.num_bits, layer.input_num_bits) > 8:
            raise ValueError(
                f"executor triton runs layer {name} at 8 bits or fewer only; use auto or eager"
            )
