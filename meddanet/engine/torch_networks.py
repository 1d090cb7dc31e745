"""The networks in PyTorch, for where OpenVINO is not installed or knows no translation.

Weights are put on the grid once per width. Dense convolutions of up to 8 bit run on integer codes
by oneDNN where the chosen backend allows it and a probe says that it is exact; everything else in
float32 on the grid's values.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import fake_quantize
from ..kernels.backend import onednn_runs
from ..kernels.grid import qmax, quantize_codes, step_size
from ..layers import (
    QuantConv2d,
    QuantConvTranspose2d,
    QuantLinear,
    as_made,
    image_gradients,
    quantized_layers,
    spread_of,
)
from ..med_danet import MedDANet
from ..med_danet_v2 import MedDANetV2
from ..routing import channels_last, to_memory_format
from . import onednn
from .slices import Array

# shapes and widths for which a layer's weights stay packed: crops and a few sizes of whole slices
KEPT = 8


class TorchNetworks:
    """Implements `routing.Networks` for any model of V2.

    Args:
        model: In `eval()`, on the CPU, every quantised layer with a range; these layers are
            replaced in it.
    """

    def __init__(self, model: MedDANetV2) -> None:
        self._model: Any = _freeze(model)

    @torch.inference_mode()
    def decide(self, images: Array) -> Array:
        """Returns route logits [8, R]."""
        return self._model.policy(channels_last(torch.from_numpy(images))).numpy()

    def prepare(
        self, widths: tuple[int, ...], crop: int, tiles: Sequence[tuple[int, int]]
    ) -> None:
        """Has nothing to compile."""

    @torch.inference_mode()
    def locate(self, images: Array) -> Array:
        """Returns the logits [8, 2] of the crops' places."""
        return self._model.position(channels_last(torch.from_numpy(images))).numpy()

    @torch.inference_mode()
    def begin(self, image: Array) -> tuple[Tensor, Array, Array]:
        """Returns (input of stage 0 [1, b, H, W], its spread [b], image gradients [2 * C])."""
        batch = _batch(image)
        feature = self._model.segmenter.init(batch)
        return feature, _spread(feature), image_gradients(batch)[0].numpy()

    @torch.inference_mode()
    def stage(
        self, index: int, num_bits: int, input: Tensor
    ) -> tuple[Tensor, Tensor, Array | None]:
        """Runs a stage on float32 [1, c, h, w].

        Returns:
            The skip, of the input's shape; the next stage's input [1, c', h / 2, w / 2]; its spread
            [c']. Of the last stage the skip twice, and None.
        """
        stage = self._model.segmenter.encoder[index]
        skip, feature = stage(input, num_bits)
        return skip, feature, None if stage.down is None else _spread(feature)

    def at_once(self, widths: tuple[int, ...], image: Array, finish: bool) -> None:
        """Returns None: nothing is saved by it here."""

    @torch.inference_mode()
    def decode(self, input: Tensor, skips: list[Tensor]) -> Array:
        """Returns the features [H, W, b]."""
        features = self._model.segmenter.decode(input, skips)
        return features[0].permute(1, 2, 0).numpy()

    @torch.inference_mode()
    def finish(self, input: Tensor, skips: list[Tensor]) -> Array:
        """Returns the labels [H, W] of a whole slice."""
        segmenter = self._model.segmenter
        return _labels(segmenter.last_stage(segmenter.decode(input, skips)))

    @torch.inference_mode()
    def last(self, index: int, features: Array) -> Array:
        """Returns labels [H, W]."""
        batch = torch.from_numpy(features).permute(2, 0, 1)[None]
        return _labels(self._model.crop_last_stages[index](batch))


class TorchBank:
    """Implements `bank.BankNetworks` for any bank.

    Args:
        model: As for `TorchNetworks`.
    """

    def __init__(self, model: MedDANet) -> None:
        self._model: Any = _freeze(model)

    @torch.inference_mode()
    def decide(self, images: Array) -> Array:
        """Returns route logits [8, 1 + n]."""
        return self._model.decision(channels_last(torch.from_numpy(images))).numpy()

    @torch.inference_mode()
    def member(self, index: int, image: Array) -> Array:
        """Returns the labels [H, W]."""
        return _labels(self._model.bank[index](_batch(image)))


def _freeze(model: nn.Module) -> nn.Module:
    """Fixes the quantised layers of a model, in place, and lays its weights out channels last.

    A layer that does more than its kind, by hooks or as a subclass, stays as it is.
    """
    integer = onednn_runs(torch.empty(0, device="cpu"))
    for name, layer in quantized_layers(model).items():
        if layer.quantize and as_made(layer):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, Frozen(layer, integer))
    return to_memory_format(model, torch.channels_last)


class Frozen(nn.Module):
    """A quantised layer with its weights and its input range fixed.

    Args:
        layer: What it stands for.
        integer: Whether oneDNN's int8 convolution may be used.
    """

    def __init__(self, layer: Any, integer: bool) -> None:
        super().__init__()
        self.layer = layer
        dense = isinstance(layer, QuantConv2d) and layer.groups == 1 and layer.kernel_size != (1, 1)
        self.integer = integer and dense and layer.padding_mode == "zeros"
        self.codes, self.weight = cache(self._codes), cache(self._weight)
        self.packed = lru_cache(KEPT)(self._pack)

    def forward(
        self,
        input: Tensor,
        num_bits: int | None = None,
        input_num_bits: int | None = None,
        output_size: list[int] | None = None,
    ) -> Tensor:
        """Runs the layer at one width; None means its own."""
        layer = self.layer
        num_bits = layer.num_bits if num_bits is None else num_bits
        width = layer.input_num_bits if input_num_bits is None else input_num_bits
        largest = int(qmax(width))
        step = float(layer.input_amax / largest)
        codes = (input / step).round_().clamp_(-largest, largest)
        if self.integer and max(num_bits, width) <= 8:
            _, scale = self.codes(num_bits)
            packed = self.packed(num_bits, step, codes.shape)
            return onednn.convolve(codes, step, packed, scale, layer)
        values, weight = codes.mul_(step), self.weight(num_bits)
        if isinstance(layer, QuantLinear):
            return F.linear(values, weight, layer.bias)
        if isinstance(layer, QuantConvTranspose2d):
            return F.conv_transpose2d(
                values, weight, layer.bias, layer.stride, layer.padding,
                layer.output_padding_for(values, output_size), layer.groups, layer.dilation,
            )
        return layer._conv_forward(values, weight, layer.bias)

    def _codes(self, num_bits: int) -> tuple[Tensor, Tensor]:
        """Returns the weights' codes as float32 and the step of every output channel."""
        weight = self.layer.weight.detach()
        step, largest, _ = step_size(weight, num_bits, self.layer.weight_range())
        return quantize_codes(weight, step, largest), step.flatten().expand(len(weight))

    def _weight(self, num_bits: int) -> Tensor:
        weight = self.layer.weight.detach()
        weight = fake_quantize(weight, num_bits, self.layer.weight_range())
        return channels_last(weight) if weight.dim() == 4 else weight

    def _pack(self, num_bits: int, step: float, shape: torch.Size) -> Tensor:
        codes, scale = self.codes(num_bits)
        return onednn.pack(codes, scale, step, self.layer, shape)


def _batch(image: Array) -> Tensor:
    """[C, H, W] -> [1, C, H, W], channels last."""
    return channels_last(torch.from_numpy(image)[None])


def _spread(feature: Tensor) -> Array:
    return spread_of(feature)[0].numpy()


def _labels(logits: Tensor) -> Array:
    return logits[0].argmax(0).to(torch.uint8).numpy()
