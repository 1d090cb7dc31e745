"""Med-DANet V2's networks as OpenVINO graphs: one per part, image size and bit width.

Between graphs lie float32 maps [1, H, W, C], channels last as OpenVINO's convolutions keep them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from ..layers import quantized_layers, sobel_kernel
from ..med_danet_v2 import MedDANetV2
from .openvino_graphs import Graphs, Key, Part, to_labels
from .operations import Node, channels_last, constant, integers
from .opset import Recorded, record
from .slices import Array
from .unreported import unreported

with unreported():
    from openvino import opset13 as ops

# graphs that a thread keeps: those of crops and of some three sizes of whole slices
KEPT = 96


class _Stage(nn.Module):
    """An encoder stage at one width."""

    def __init__(self, stage: nn.Module, num_bits: int) -> None:
        super().__init__()
        self.stage: Any = stage
        self.num_bits = num_bits

    def forward(self, input):
        return self.stage(input, self.num_bits)


class _Decoder(nn.Module):
    """The decoder and what follows it."""

    def __init__(self, segmenter: nn.Module, follower: nn.Module) -> None:
        super().__init__()
        self.segmenter: Any = segmenter
        self.follower = follower

    def forward(self, input, first, second, third):
        return self.follower(self.segmenter.decode(input, [first, second, third]))


class OpenVINONetworks(Graphs):
    """Implements `routing.Networks`.

    Args:
        model: In `eval()`, every quantised layer with a range.
        threads: How many calls run at a time; others wait.

    Raises:
        ValueError: If a part has no translation.
    """

    def __init__(self, model: MedDANetV2, threads: int) -> None:
        super().__init__(threads, KEPT)
        # its parts are found by name, of which type checkers know nothing
        self._model: Any = model
        layers = quantized_layers(self._model.segmenter).values()
        # floats round another way in another graph
        self._integers = self.exact.signed and all(
            layer.quantize and max(layer.num_bits, layer.input_num_bits) <= 8 for layer in layers
        )
        self._recorded: dict[Part, Recorded] = {}
        self._check()

    def _check(self) -> None:
        """Records all parts and builds graphs for small images: what has no translation says so."""
        for index, selector in enumerate(self._model.bit_selectors):
            for width in selector.widths.tolist():
                self._part("stage", index, int(width))
        self._part("decode")
        model, stride = self._model, self._model.stride
        image = (1, model.in_channels, 4 * stride, 4 * stride)
        maps = [
            (1, image[2] >> level, image[3] >> level, channels)
            for level, channels in enumerate(model.segmenter.stage_channels)
        ]
        for part in ("decide",), ("locate",), ("begin",):
            self.graph(part, image)
        for index, shape in enumerate(maps):
            self.graph(("stage", index, 8), shape)
        self.graph(("finish",), maps[-1], *maps[:-1])
        for index in range(len(model.crop_sizes)):
            self.graph(("last", index), maps[0])

    # the interface of routing.Networks ---------------------------------------------------------

    def prepare(
        self, widths: tuple[int, ...], crop: int, tiles: Sequence[tuple[int, int]]
    ) -> None:
        """Compiles what crops of `crop` pixels are likely to need, beside other work."""
        parts: list[Key] = []
        if self._integers and max(widths) <= 8:
            image = (1, self._model.in_channels, crop, crop)
            parts.append((("at once", widths, False), (image,)))
        channels = self._model.segmenter.stage_channels[0]
        parts += [(("last", 0), ((1, *tile, channels),)) for tile in tiles]
        self.expect(parts)

    def decide(self, images: Array) -> Array:
        """Returns route logits [8, R]."""
        return self._run(("decide",), images)[0]

    def locate(self, images: Array) -> Array:
        """Returns the logits [8, 2] of the crops' places."""
        return self._run(("locate",), images)[0]

    def begin(self, image: Array) -> tuple[Array, Array, Array]:
        """Returns (input of stage 0 [1, H, W, b], its spread [b], image gradients [2 * C])."""
        feature, spread, gradients = self._run(("begin",), image)
        return feature, spread[0], gradients[0]

    def stage(self, index: int, num_bits: int, input: Array) -> tuple[Array, Array, Array | None]:
        """Runs a stage on float32 [1, h, w, c].

        Returns:
            The skip, of the input's shape; the next stage's input [1, h / 2, w / 2, c']; its spread
            [c']. Of the last stage the skip twice, and None.
        """
        skip, *rest = self._run(("stage", index, num_bits), input)
        return (skip, rest[0], rest[1][0]) if rest else (skip, skip, None)

    def at_once(
        self, widths: tuple[int, ...], image: Array, finish: bool
    ) -> tuple[Array, Array, list[Array]] | None:
        """Returns (features [H, W, b] or labels [H, W], image gradients, spreads)."""
        if not self._integers:
            return None
        result, gradients, *spreads = self._run(("at once", widths, finish), image)
        return result[0], gradients[0], [spread[0] for spread in spreads]

    def decode(self, input: Array, skips: list[Array]) -> Array:
        """Returns the features [H, W, b]."""
        return self._run(("decode",), input, *skips[:-1])[0][0]

    def finish(self, input: Array, skips: list[Array]) -> Array:
        """Returns the labels [H, W] of a whole slice."""
        return self._run(("finish",), input, *skips[:-1])[0][0]

    def last(self, index: int, features: Array) -> Array:
        """Returns labels [H, W]."""
        return self._run(("last", index), features[None])[0][0]

    # graphs ------------------------------------------------------------------------------------

    def _part(self, *part: Any) -> Recorded:
        if part not in self._recorded:
            self._recorded[part] = record(self._module(*part))
        return self._recorded[part]

    def _module(self, name: str, *rest: int) -> nn.Module:
        model, segmenter = self._model, self._model.segmenter
        if name == "stage":
            index, num_bits = rest
            return _Stage(segmenter.encoder[index], num_bits)
        if name == "last":
            return model.crop_last_stages[rest[0]]
        return {
            "decide": lambda: model.policy,
            "locate": lambda: model.position,
            "begin": lambda: nn.Sequential(segmenter.init, segmenter.dropout),
            "decode": lambda: _Decoder(segmenter, nn.Identity()),
            "finish": lambda: _Decoder(segmenter, segmenter.last_stage),
        }[name]()

    def _outputs(self, part: Part, inputs: list[Node]) -> list[Node]:
        name, *rest = part
        if name in ("decide", "locate"):
            return self.translated(self._part(name), inputs)
        if name == "begin":
            feature, gradients = self._begin(inputs)
            return [channels_last(feature), _spread(feature), gradients]
        if name == "at once":
            widths, finish = rest
            return self._whole_way(widths, finish, inputs)
        results = self.translated(self._part(*part), inputs, channels_last=True)
        if name == "stage":
            return self._stage(*rest, *results)
        return [channels_last(results[0]) if name == "decode" else to_labels(results[0])]

    def _stage(self, index: int, num_bits: int, skip: Node, feature: Node) -> list[Node]:
        """A skip, and what the next stage and its selector need."""
        if num_bits > 8:
            skip = _copy(skip)
        if self._model.segmenter.encoder[index].down is None:
            return [channels_last(skip)]
        return [channels_last(skip), channels_last(feature), _spread(feature)]

    def _begin(self, inputs: list[Node]) -> tuple[Node, Node]:
        """The input of the first stage and the image's gradients."""
        (feature,) = self.translated(self._part("begin"), inputs)
        return feature, _gradients(inputs[0], self._model.in_channels)

    def _whole_way(
        self, widths: tuple[int, ...], finish: bool, inputs: list[Node]
    ) -> list[Node]:
        """Features or labels, the image's gradients and the spreads, in one graph."""
        feature, gradients = self._begin(inputs)
        skips, spreads = [], []
        for index, num_bits in enumerate(widths):
            spreads.append(_spread(feature))
            skip, feature = self.translated(self._part("stage", index, num_bits), [feature])
            skips.append(skip)
        end = self._part("finish" if finish else "decode")
        (result,) = self.translated(end, [feature, *skips[:-1]])
        return [to_labels(result) if finish else channels_last(result), gradients, *spreads]


def _copy(input: Node) -> Node:
    """A clamp that changes nothing: a float convolution's sum is slow to transpose by itself."""
    largest = float(np.finfo(np.float32).max)
    return ops.clamp(input, -largest, largest)


def _spread(input: Node) -> Node:
    """The population's standard deviation of every channel, [1, C]."""
    deviation = ops.subtract(input, ops.reduce_mean(input, integers(2, 3), True))
    return ops.sqrt(ops.reduce_mean(ops.multiply(deviation, deviation), integers(2, 3), False))


def _gradients(input: Node, channels: int) -> Node:
    """`layers.image_gradients`, [1, 2 * C], as a depthwise convolution.

    Upper and lower half lie side by side in the channels, once for each of the two kernels: four
    modalities fill a vector of 16.
    """
    half, odd = divmod(input.get_output_shape(0)[2], 2)
    if odd:
        raise ValueError("images of odd height, a stride of an odd number of pixels, have no graph")
    edge = integers(0, 0, 1, 1)
    padded = ops.pad(input, edge, edge, "edge")
    upper, lower = (
        ops.slice(padded, integers(start), integers(start + half + 2), integers(1), integers(2))
        for start in (0, half)
    )
    kernels = sobel_kernel(channels).view(channels, 2, 1, 1, 3, 3).transpose(0, 1).flatten(0, 1)
    response = ops.group_convolution(
        ops.concat([upper, upper, lower, lower], 1), constant(kernels.repeat(2, 1, 1, 1, 1)),
        [1, 1], [0, 0], [0, 0], [1, 1],
    )
    means = ops.reduce_mean(ops.abs(response), integers(2, 3), False)
    # the mean of both halves, a channel's two kernels beside each other
    order = np.eye(2 * channels).reshape(channels, 2, -1).swapaxes(0, 1).reshape(2 * channels, -1)
    return ops.matmul(means, constant(np.tile(order, (2, 1)) / 2), False, False)
