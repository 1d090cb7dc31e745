"""The U-Net lowered to kernel launches over static buffers, one group of slots at a time.

    view of the image -> codes -> begin -> [width, codes of 16 bits, blocks, down] x 4
      -> [way up, block] x 3 -> labels

What a stage takes is stored as codes before its width is known: of the widest width of one byte, so
that only slots that choose another one are encoded anew.

A group is the slices of one route, compacted: slot m of every buffer is the slice slices[m], and
slots from `count` on are left alone; both lie on the device. Codes are int8 byte planes, the
residual stream is float16, everything channels last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import conv_int_triton as conv_kernel
from ..kernels import encode_triton as encode_kernel
from ..kernels import head_triton as head_kernel
from ..kernels import selector_triton as selector_kernel
from ..kernels import way_up_triton as way_up_kernel
from ..kernels.conv_call import ConvCall
from ..kernels.encode_call import EncodeCall
from ..kernels.route_call import Routing
from ..kernels.way_up import WayUpCall
from .packed_unet import Affine, Block, Conv, Last, PackedUNet, Stage, Up

STREAM = torch.float16
Size = tuple[int, int]


class Launch(NamedTuple):
    """One step of a plan: a name and a call that only enqueues work on static buffers."""

    name: str
    run: Callable[[], object]


@dataclass
class Group:
    """The slots of one route and the launches that label them.

    Attributes:
        name: Of the route, such as "crop-96".
        size: (height, width) of the view of the image.
        slices: int32 [M], the slice of each slot.
        count: int32 [1].
        corner: int32 [M, 2], (y, x) of the view in its slice.
        start: int32 [M, 2], (y, x) of the tile around the view.
        shift: int32 [M, 2], start - corner.
        launches: In order.
    """

    name: str
    size: Size
    slices: Tensor
    count: Tensor
    corner: Tensor
    start: Tensor
    shift: Tensor
    launches: list[Launch] = field(default_factory=list)

    @classmethod
    def of(cls, routing: Routing, index: int, name: str, size: Size, room: int) -> Group:
        """Returns the group of that index, which `route_triton.run` fills, with so many slots.

        The count may exceed them: slices beyond are left out.
        """
        slices, corner, start, shift = (
            part[index, :room]
            for part in (routing.slices, routing.corner, routing.start, routing.shift)
        )
        count = routing.counts[index]
        return cls(name, size, slices, count, corner, start, shift)

    def add(self, name: str, function: Callable, *arguments: object) -> None:
        """Appends a launch."""
        self.launches.append(Launch(f"{self.name}: {name}", partial(function, *arguments)))

    def planes(self, count: int, channels: int, size: Size) -> Tensor:
        """Allocates codes, int8 [P, M, C, h, w], channels last."""
        shape = (count, len(self.corner), *size, channels)
        buffer = torch.empty(shape, dtype=torch.int8, device=self.count.device)
        return buffer.permute(0, 1, 4, 2, 3)

    def stream(self, channels: int, size: Size) -> Tensor:
        """Allocates a residual stream [M, C, h, w], channels last."""
        shape = (len(self.corner), *size, channels)
        return torch.empty(shape, dtype=STREAM, device=self.count.device).permute(0, 3, 1, 2)

    def encode(
        self, name: str, input: Tensor, target: Conv, codes: Tensor, *,
        num_bits: Tensor | None = None, affine: Affine | None = None,
        offset: Tensor | None = None, slots: Tensor | None = None, done: int = 0,
    ) -> None:
        """Appends the quantisation of floats for the convolution that reads them.

        Args:
            name: Of the launch.
            input: [N, C, H, W], float32 or the stream's dtype, dense or channels last.
            target: That convolution.
            codes: int8 [P, M, C, h, w], receives the codes.
            num_bits: int32 [M], or None: the target's.
            affine: The norm before, followed by a ReLU, or None.
            offset: int32 [M, 2], (y, x) of the codes' corner in the input, or None: 0.
            slots: int32 [M], the sample that each slot reads, or None: its own.
            done: Slots of this width are left alone; 0: none are.
        """
        call = EncodeCall(
            input, target.amax, (codes.shape[3], codes.shape[4]),
            target.num_bits if num_bits is None else num_bits, affine, affine is not None, offset,
            slots, self.count, done,
        )
        self.add(name, encode_kernel.run, call, codes)

    def conv(
        self, name: str, conv: Conv, input: Tensor, *, num_bits: Tensor | None = None,
        residual: Tensor | None = None, stream: Tensor | None = None,
        affine: Affine | None = None, relu: bool = False, target: Conv | None = None,
        target_bits: int | Tensor | None = None, codes: Tensor | None = None,
        skip: tuple[Conv, Tensor] | None = None, moments: bool = False,
    ) -> Moments | None:
        """Appends a convolution of codes.

        Args:
            name: Of the launch.
            conv: The weights.
            input: int8 [P, M, Cin, H, W].
            num_bits: int32 [M], width of these codes, or None: the convolution's own.
            residual: [M, Cout, h, w] in the stream's dtype, added to the sum, or None.
            stream: Likewise, receives the sum; may be the residual. None: not stored.
            affine: The norm that follows, or None.
            relu: Whether to cut off below zero after it.
            target: The convolution that reads what is stored as codes, or None.
            target_bits: Their width, an int or int32 [M]; None: the target's own.
            codes: int8 [P, M, Cout, h, w], receives them, or None: not stored.
            skip: The convolution that reads the sum itself as codes, and int8 [M, Cout, h, w],
                which receives these; or None.
            moments: Whether the sum's are stored.

        Returns:
            The moments, or None.
        """
        skip_amax, skip_bits = (None, 8) if skip is None else (skip[0].amax, skip[0].num_bits)
        call = ConvCall(
            input, conv.packed, conv.amax, conv.num_bits if num_bits is None else num_bits,
            residual, affine, relu, None if target is None else target.amax,
            8 if target is None else target.num_bits if target_bits is None else target_bits,
            None, self.count, skip_amax, skip_bits, mild=True,
        )
        found = Moments(*conv_kernel.new_moments(call)) if moments else None
        self.add(
            name, conv_kernel.run, call, stream, codes, None if skip is None else skip[1],
            None if found is None else found.values,
        )
        return found


class Moments(NamedTuple):
    """Means and deviations of a stage's input, chunk by chunk, and how many pixels each has."""

    values: Tensor
    length: int


class Level(NamedTuple):
    """The buffers of one resolution, used by encoder and decoder in turn."""

    stream: Tensor
    codes: Tensor  # of a block's input, and of what leaves it
    inner: Tensor  # between a block's convolutions
    skip: Tensor | None  # codes for the way up's last convolution; None at the coarsest


def lower_features(
    net: PackedUNet, group: Group, images: Tensor, num_bits: Tensor, last: Last,
    tile: tuple[Tensor, Size] | None = None,
) -> Level:
    """Appends everything before the last stage.

    Args:
        net: The weights.
        group: Receives the launches.
        images: float32 [N, C, H, W], dense.
        num_bits: int32 [S, N], receives the chosen widths.
        last: The last stage, which reads the features.
        tile: Where the features lie among zeros: int32 [M, 2], (y, x) of the tile's corner less
            the patch's, and the tile's (height, width). None: the features alone.

    Returns:
        The finest level, or the tile: its stream holds the features, its codes the last stage's
        input.
    """
    view = group.planes(1, images.shape[1], group.size)
    group.encode("image", images, net.begin, view, offset=group.corner, slots=group.slices)
    sums = selector_kernel.new_sums(
        len(group.corner), images.shape[1], group.size, images.device
    )
    group.add(
        "gradients", selector_kernel.gradients, images, sums, group.size, group.corner,
        group.slices, group.count,
    )
    levels = [_level(net, group, index) for index in range(len(net.stages))]
    moments = _lower_entry(group, "begin", net.begin, view, None, net.stages[0], levels[0])
    for index in range(len(net.stages)):
        moments = _lower_stage(net, group, levels, index, sums, moments, num_bits[index])
    below, *finer = levels[::-1]
    for level, up, after in zip(finer[:-1], net.ups[:-1], net.ups[1:], strict=True):
        _lower_up(group, up, below, level)
        _lower_block(group, "decoder", up.block, level, narrow=True, target=after.reduce)
        below = level
    shift, size = (None, group.size) if tile is None else tile
    output = levels[0] if tile is None else _map(group, levels[0].stream.shape[1], size)
    _lower_up(group, last.up, below, levels[0], output, shift)
    return output


def _level(net: PackedUNet, group: Group, index: int) -> Level:
    channels = net.channels[index]
    size = group.size[0] >> index, group.size[1] >> index
    planes = 2 if max(net.stages[index].widths) > 8 else 1
    last = index == len(net.stages) - 1
    return Level(
        group.stream(channels, size), group.planes(planes, channels, size),
        group.planes(planes, channels, size),
        None if last else group.planes(1, channels, size)[0],
    )


def _lower_entry(
    group: Group, name: str, conv: Conv, input: Tensor, num_bits: Tensor | None, stage: Stage,
    level: Level,
) -> Moments:
    """Appends the convolution before a stage: its stream, its moments and its guessed codes."""
    first, guess = stage.blocks[0], stage.guess
    codes: dict[str, Any] = {
        "affine": first.affine, "relu": True, "target": first.first, "target_bits": guess,
        "codes": level.codes[:1],
    }
    moments = group.conv(
        name, conv, input, num_bits=num_bits, stream=level.stream, moments=True,
        **(codes if guess else {}),
    )
    assert moments is not None, "they were asked for"
    return moments


def _lower_stage(
    net: PackedUNet, group: Group, levels: list[Level], index: int, gradients: Tensor,
    moments: Moments, record: Tensor,
) -> Moments:
    """Appends an encoder stage, its width included, whose input `_lower_entry` has stored.

    Returns the moments of the next stage's input; of the last stage its own.
    """
    level, stage = levels[index], net.stages[index]
    capacity, channels, height, width = level.stream.shape
    bits = torch.empty(capacity, dtype=torch.int32, device=record.device)
    group.add(
        f"width {index}", selector_kernel.select, bits, gradients, moments.values, *stage.selector,
        group.size, height * width, moments.length, group.count, group.slices, record,
    )
    first = stage.blocks[0]
    if stage.guess == 0 or len(stage.widths) > 1:
        group.encode(
            f"stage {index}", level.stream, first.first, level.codes, num_bits=bits,
            affine=first.affine, done=stage.guess,
        )
    for block, after in zip(stage.blocks, [*stage.blocks[1:], None], strict=True):
        name = f"stage {index} block"
        if after is not None:
            _lower_block(
                group, name, block, level, num_bits=bits, stream=True, target=after.first,
                target_bits=bits, affine=after.affine,
            )
        elif stage.down is not None:
            assert level.skip is not None, "only the coarsest stage has no skip"
            fuse = net.ups[len(net.ups) - 1 - index].fuse
            _lower_block(
                group, name, block, level, num_bits=bits, target=stage.down, target_bits=bits,
                skip=(fuse, level.skip),
            )
        else:
            _lower_block(group, name, block, level, num_bits=bits, target=net.ups[0].reduce)
    if stage.down is None:
        return moments
    return _lower_entry(
        group, f"down {index}", stage.down, level.codes, bits, net.stages[index + 1],
        levels[index + 1],
    )


def _lower_block(
    group: Group, name: str, block: Block, level: Level, *, narrow: bool = False,
    num_bits: Tensor | None = None, stream: bool = False, target: Conv,
    target_bits: Tensor | None = None, affine: Affine | None = None,
    skip: tuple[Conv, Tensor] | None = None,
) -> None:
    """Appends a residual block from a level's codes and stream to its codes, and stream if asked.

    Args:
        group: Receives the launches.
        name: Of the block.
        block: The weights.
        level: The buffers.
        narrow: Whether codes of 8 bits lie in the first plane alone.
        num_bits: int32 [M], or None: the layers' own.
        stream: Whether the sum goes on as the stream.
        target: The convolution that reads the codes.
        target_bits: int32 [M], width of these codes, or None: the layer's own.
        affine: The norm before that convolution, followed by a ReLU, or None.
        skip: As in `Group.conv`.
    """
    codes, inner = (
        planes[:1] if narrow else planes for planes in (level.codes, level.inner)
    )
    group.conv(
        f"{name}, first", block.first, codes, num_bits=num_bits, relu=True, target=block.second,
        target_bits=num_bits, codes=inner,
    )
    group.conv(
        f"{name}, second", block.second, inner, num_bits=num_bits, residual=level.stream,
        stream=level.stream if stream else None, affine=affine, relu=affine is not None,
        target=target, target_bits=target_bits,
        codes=level.codes if target_bits is not None else level.codes[:1], skip=skip,
    )


def _lower_up(
    group: Group, up: Up, below: Level, level: Level, output: Level | None = None,
    shift: Tensor | None = None,
) -> None:
    """Appends the way up from the codes below and a level's skip to stream and codes.

    Args:
        group: Receives the launch.
        up: The weights.
        below: Holds the codes.
        level: Holds the skip.
        output: Receives stream, and codes for the block that follows; None: the level.
        shift: int32 [M, 2], (y, x) of the output's corner less the level's, or None: 0.
    """
    output = output or level
    assert level.skip is not None, "the coarsest level has no way up"
    size = output.stream.shape[2], output.stream.shape[3]
    call = WayUpCall(below.codes[0], level.skip, up.packed, shift, size, group.count)
    group.add("way up", way_up_kernel.run, call, output.stream, output.codes[0])


def _map(group: Group, channels: int, size: Size) -> Level:
    """Allocates what a last stage works on."""
    return Level(
        group.stream(channels, size), group.planes(1, channels, size),
        group.planes(1, channels, size), None,
    )


def lower_empty(group: Group, last: Last, size: Size) -> Level:
    """Appends a map of zeros of a size, as the stream and codes that a last stage reads."""
    channels = last.up.packed.channels
    level = _map(group, channels, size)
    level.stream.zero_()
    group.encode(
        "codes", level.stream, last.up.block.first, level.codes, affine=last.up.block.affine
    )
    return level


def lower_last(
    group: Group, last: Last, level: Level, labels: Tensor, corner: Tensor, margin: int
) -> None:
    """Appends a last stage from a level's codes and stream to labels.

    Args:
        group: Receives the launches.
        last: The weights.
        level: Holds the input.
        labels: uint8 [N, H, W].
        corner: int32 [M, 2] of the level's map in its slice.
        margin: As in `label_head`.
    """
    _lower_block(group, "last stage", last.up.block, level, narrow=True, target=last.end)
    end, num_bits = last.end.packed, last.end.num_bits
    variant = end.variant(num_bits)
    group.add(
        "labels", head_kernel.run, labels, level.codes[0], end.codes[variant, 0],
        end.scale[variant], end.bias[0], last.end.amax, num_bits, corner, group.slices, group.count,
        margin,
    )
