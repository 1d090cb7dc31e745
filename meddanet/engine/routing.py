"""One slice's way through Med-DANet V2, whatever executes its networks.

    locate + crop -> begin, stages, decode -> paste -> last stage -> labels

Where nearly all slices chose the same widths so far, the next one runs with them uninterrupted and
its selectors are asked afterwards; another answer sends it through the stages one by one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..layers import QuantConv2d, as_made
from ..med_danet_v2 import MedDANetV2, place
from ..networks.transbts import PostActivationBlock
from ..networks.unet import LastStage, ResidualBlock
from ..routing import Segmentation, check_shape
from .slices import Array, Deciding, SliceEngine
from .torch_networks import Frozen

# an uninterrupted run saves a seventh of the way, a wrong guess costs all of it
_SURE = 0.9
# pixels that no slice has
EVERYWHERE = 2**30
# what computes every pixel from the same pixel of its input, or from what its own modules say
_PIXELWISE = (
    LastStage, ResidualBlock, PostActivationBlock, Frozen, nn.Sequential, nn.ModuleList,
    nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.PReLU, nn.Identity,
    nn.Dropout, nn.Dropout2d,
)
# labels of empty canvases that are kept: one per crop size and size of slices
_BACKGROUNDS = 16


class Networks(Deciding, Protocol):
    """The networks of one model as an executor runs them.

    Images are float32 [C, H, W], maps between the parts are the executor's own; what it returns may
    be overwritten by the same thread's next call.
    """

    def prepare(
        self, widths: tuple[int, ...], crop: int, tiles: Sequence[tuple[int, int]]
    ) -> None:
        """Gets ready for crops on the first of their routes, without waiting for it.

        Args:
            widths: Of the stages.
            crop: Side of the crops in pixels.
            tiles: Sizes (height, width) that their last stage will see.
        """

    def locate(self, images: Array) -> Array:
        """Returns the logits [8, 2] of the crops' places, images as for `decide`."""

    def begin(self, image: Array) -> tuple[Any, Array, Array]:
        """Returns (input of stage 0, its spread [b], image gradients [2 * C])."""

    def stage(self, index: int, num_bits: int, input: Any) -> tuple[Any, Any, Array | None]:
        """Returns (skip, input of the next stage, its spread; None after the last stage)."""

    def at_once(
        self, widths: tuple[int, ...], image: Array, finish: bool
    ) -> tuple[Array, Array, list[Array]] | None:
        """Runs everything up to `decode`, or `finish`, with widths of at most 8 bit.

        Returns:
            (features or labels, image gradients, every stage's spread), to the bit what the parts
            return one by one; None where this saves nothing.
        """

    def decode(self, input: Any, skips: list[Any]) -> Array:
        """Returns the features before the last stage, float32 [H, W, b]."""

    def finish(self, input: Any, skips: list[Any]) -> Array:
        """Returns labels uint8 [H, W]: `decode` and the segmenter's own last stage."""

    def last(self, index: int, features: Array) -> Array:
        """Returns labels uint8 [H, W] of features [H, W, b] by a crop's last stage."""


class Tile(NamedTuple):
    """The part of a canvas that a pasted patch can change, along one axis, in pixels.

    The last stage sees `start:stop`; of its answer `first:last` is right. Beyond, the canvas is
    zero as far as the last stage looks, so the answer is that of an all-zero canvas. Two halos
    around the patch are enough: one is what the patch influences, the other what the tile's own
    zero padding spoils, except at the image's border, where that padding is the canvas's own.
    """

    start: int
    stop: int
    first: int
    last: int

    @classmethod
    def around(cls, offset: int, size: int, length: int, halo: int) -> Tile:
        """Returns the tile of a patch `offset:offset + size` on a canvas of `length` pixels."""
        side = min(size + 4 * halo, length)
        start = min(max(offset - 2 * halo, 0), length - side)
        stop = start + side
        first = start + halo if start > 0 else 0
        return cls(start, stop, first, stop - halo if stop < length else length)


class CropEngine(SliceEngine):
    """Segments slices as `MedDANetV2.segment` does; see `SliceEngine`."""

    def __init__(
        self, model: MedDANetV2, networks: Networks, executor: str, threads: int, callers: int
    ) -> None:
        super().__init__(model, networks, executor, threads, callers)
        self._selectors = [_selector(selector) for selector in self._model.bit_selectors]
        # how many slices chose which widths; at first the narrowest are expected
        self._chosen = Counter([tuple(min(widths) for _, _, widths in self._selectors)])
        self._halos = [halo(stage) for stage in model.crop_last_stages]
        self._background = lru_cache(_BACKGROUNDS)(self._label_background)
        self._prepared: set[tuple[int, int]] = set()

    def _prepare(self, height: int, width: int) -> None:
        """Has the executor get ready for the usual crop, its tile and the empty canvas."""
        if self._model.crop_sizes and (height, width) not in self._prepared:
            self._prepared.add((height, width))
            size = self._model.crop_sizes[0]
            tile = (Tile.around(0, size, side, self._halos[0]) for side in (height, width))
            rows, columns = (part.stop - part.start for part in tile)
            ((widths, _),) = self._chosen.most_common(1)
            self._networks.prepare(widths, size, sorted({(rows, columns), (height, width)}))

    def _locate(
        self, views: Sequence[Array], routes: Array, seen: Array, result: Segmentation
    ) -> None:
        """Fills in the offsets of the slices that are cropped."""
        cropped = (routes > 0) & (routes < len(self._model.routes) - 1)
        if cropped.any():
            places = self._in_batches(self._networks.locate, views, np.flatnonzero(cropped))
            check_shape("position", places, (len(places), 2))
            sizes = np.array(self._model.crop_sizes)[routes[cropped] - 1]
            height, width = result.labels.shape[1:]
            result.offsets[seen[cropped]] = self._offsets(places, sizes, (height, width))

    def _offsets(self, places: Array, sizes: Array, image: tuple[int, int]) -> Tensor:
        """Turns logits of places [N, 2] into whole pixels [N, 2], as `MedDANetV2.offset`."""
        smallest, size = self._model.smallest_crop, torch.from_numpy(sizes)[:, None]
        position = torch.from_numpy(places).sigmoid()
        return place(position, smallest, size, position.new_tensor(image)).round()

    def _segment(
        self, image: Array, labels: Array, route: int, offset: Array, num_bits: Array
    ) -> None:
        """Fills in labels and widths of one slice that is not skipped."""
        if route == len(self._model.routes) - 1:
            labels[...] = self._run(image, num_bits, finish=True)
            return
        (y, x), size = offset.astype(int), self._model.crop_sizes[route - 1]
        crop = np.ascontiguousarray(image[:, y : y + size, x : x + size])
        self._paste(labels, self._run(crop, num_bits, finish=False), (y, x), route - 1)

    def _run(self, image: Array, num_bits: Array, finish: bool) -> Array:
        """Returns the labels, or the features before the last stage, and fills in the widths."""
        guess = self._guess(image, finish)
        if guess is None:
            ends = self._networks.finish if finish else self._networks.decode
            result = ends(*self._encode(image, num_bits))
        else:
            result, num_bits[:] = guess
        if result.shape[:2] != image.shape[1:]:
            raise ValueError(
                f"segmenter must keep the size {list(image.shape[1:])} of its input, got "
                f"{list(result.shape[:2])}"
            )
        # threads may lose a count to each other: only the pace depends on it
        self._chosen[tuple(num_bits.tolist())] += 1
        return result

    def _guess(self, image: Array, finish: bool) -> tuple[Array, tuple[int, ...]] | None:
        """Runs with the usual widths; None if there are none, or these are not the right ones."""
        ((widths, count),) = self._chosen.most_common(1)
        if max(widths) > 8 or count < _SURE * self._chosen.total():
            return None
        found = self._networks.at_once(widths, image, finish)
        if found is None:
            return None
        result, gradients, spreads = found
        chosen = (self._width(stage, gradients, spread) for stage, spread in enumerate(spreads))
        return (result, widths) if tuple(chosen) == widths else None

    def _width(self, stage: int, gradients: Array, spread: Array) -> int:
        """Returns the width that a stage's selector chooses."""
        weight, bias, widths = self._selectors[stage]
        logits = weight @ np.concatenate([gradients, spread]) + bias
        return widths[logits.argmax()]

    def _encode(self, image: Array, num_bits: Array) -> tuple[Any, list[Any]]:
        """Returns (the coarsest feature, the skips) and fills in the chosen widths."""
        spread: Array | None
        x, spread, gradients = self._networks.begin(image)
        skips = []
        for index in range(len(self._selectors)):
            assert spread is not None, "every stage but the last leaves the next one's input"
            num_bits[index] = self._width(index, gradients, spread)
            skip, x, spread = self._networks.stage(index, int(num_bits[index]), x)
            skips.append(skip)
        return x, skips

    def _paste(
        self, labels: Array, features: Array, offset: tuple[int, int], index: int
    ) -> None:
        """Labels a slice whose features are zero but for a patch; the tile is all it computes."""
        halo, size = self._halos[index], len(features)
        tiles = [
            Tile.around(start, size, length, halo)
            for start, length in zip(offset, labels.shape, strict=True)
        ]
        (y, x), (rows, columns) = offset, tiles
        shape = rows.stop - rows.start, columns.stop - columns.start, features.shape[2]
        canvas = np.zeros(shape, np.float32)
        top, left = y - rows.start, x - columns.start
        canvas[top : top + size, left : left + size] = features
        # first of all: where the tile is the whole canvas, it may overwrite what `last` returned
        labels[...] = self._background(index, *labels.shape)
        found = self._networks.last(index, canvas)
        labels[rows.first : rows.last, columns.first : columns.last] = found[
            rows.first - rows.start : rows.last - rows.start,
            columns.first - columns.start : columns.last - columns.start,
        ]

    def _label_background(self, index: int, height: int, width: int) -> Array:
        """Labels of an all-zero canvas, borders included."""
        channels = self._model.segmenter.stage_channels[0]
        zeros = np.zeros((height, width, channels), np.float32)
        return self._networks.last(index, zeros).copy()


def _selector(selector: Any) -> tuple[Array, Array, list[int]]:
    """Returns (weight, bias, widths) of a `BitSelector`; softmax keeps the order of logits."""
    linear = selector.linear
    widths = [int(width) for width in selector.widths.tolist()]
    return linear.weight.detach().numpy(), linear.bias.detach().numpy(), widths


def halo(stage: nn.Module) -> int:
    """Returns how many pixels away a last stage looks: more than any slice has if that is unknown.

    It is the sum over its convolutions, where these keep the size and are all that looks beyond a
    pixel, as in the package's own blocks; any other module, and one with hooks or a forward of
    its own, may look at the whole map.
    """
    reach = 0
    for module in stage.modules():
        if not as_made(module):
            return EVERYWHERE
        if type(module) in (nn.Conv2d, QuantConv2d):
            found = _reach(cast(nn.Conv2d, module))
            if found is None:
                return EVERYWHERE
            reach += found
        elif type(module) not in _PIXELWISE:
            return EVERYWHERE
    return reach


def _reach(layer: nn.Conv2d) -> int | None:
    """Returns how many pixels away a convolution looks; None where it changes the map's size."""
    spans = [
        step * (side - 1) for step, side in zip(layer.dilation, layer.kernel_size, strict=True)
    ]
    paddings = [layer.padding] if isinstance(layer.padding, str) else layer.padding
    kept = paddings == ["same"] or [2 * padding for padding in paddings] == spans
    if not kept or tuple(layer.stride) != (1, 1) or layer.padding_mode != "zeros":
        return None
    return max(-(-span // 2) for span in spans)
