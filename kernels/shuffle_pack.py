"""Weights of ShuffleNetV2 as `shuffle_stage` and `shuffle_stem` take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Layer: TypeAlias = tuple[Tensor, Tensor]

# what the kernels take; float64 runs in the references
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# a tensor core multiplies by no fewer channels
NARROWEST = 16


class PackedUnit(NamedTuple):
    """The weights of a unit as `pack_stage` takes them, channels padded by zeros.

    1x1 weights are [Cin, Cout] in the tensors' dtype, 3x3 ones [9, C] and biases [C] in float32
    (float64 if that is the tensors' dtype); every C is the next power of two, at least 16.

    Attributes:
        main: Weight and bias of expand, of depth and of mix.
        side: Weight and bias of side_depth and of side_mix; empty at stride 1.
        in_channels, mid_channels, out_channels: Without padding, of the unit's input, between
            expand and mix, of the unit's output.
    """

    main: tuple[Tensor, ...]
    side: tuple[Tensor, ...]
    in_channels: int
    mid_channels: int
    out_channels: int

    @property
    def stride(self) -> int:
        """1, or 2 where there is a side branch."""
        return 2 if self.side else 1


class PackedStage(NamedTuple):
    """The weights of units as `shuffle_stage` takes them.

    Attributes:
        first: `main` and `side` of the first unit's `PackedUnit`.
        rest: `main` of the others, each tensor stacked: [U, ...]; empty where there are none.
        in_channels: Of the first unit's input, without padding.
        mid_channels: Between expand and mix, of the first unit and of the others, likewise.
        out_channels: Of every unit's output, likewise.
    """

    first: tuple[Tensor, ...]
    rest: tuple[Tensor, ...]
    in_channels: int
    mid_channels: tuple[int, int]
    out_channels: int

    def to(self, device: torch.device | str) -> PackedStage:
        """Returns the same on another device."""
        first, rest = (tuple(t.to(device) for t in part) for part in (self.first, self.rest))
        return self._replace(first=first, rest=rest)


def padded(channels: int) -> int:
    """Returns the power of two that channels are padded to."""
    return max(NARROWEST, 1 << (channels - 1).bit_length())


def checked_input(
    input: Tensor, what: str, channels: int, weight: Tensor, seen: Tensor | None
) -> Tensor:
    """Returns an operation's input without its gradient.

    Args:
        input: What was given.
        what: "stem", "stage" or "head".
        channels: That its input has.
        weight: One of its packed weights.
        seen: int32 [N] where the input is, or None.

    Raises:
        ValueError: If shape, dtype or device are not those that it was packed for, or `seen` does
            not fit.
    """
    if input.dim() != 4 or input.shape[1] != channels:
        raise ValueError(f"input must be [N, {channels}, H, W], got {list(input.shape)}")
    if input.dtype != weight.dtype or input.device != weight.device:
        raise ValueError(
            f"input is {input.dtype} on {input.device}, the {what} is packed in {weight.dtype} on "
            f"{weight.device}"
        )
    if seen is not None and (
        seen.shape != input.shape[:1] or seen.dtype != torch.int32 or seen.device != input.device
    ):
        raise ValueError(
            f"seen must be int32 [{len(input)}] on {input.device}, got {seen.dtype} "
            f"{list(seen.shape)} on {seen.device}"
        )
    return input.detach()


def pack_unit(expand: Layer, depth: Layer, mix: Layer, side: Sequence[Layer] = ()) -> PackedUnit:
    """Packs a unit's layers, norms folded.

    Args:
        expand: Weight [M, B, 1, 1] and bias [M]; B is half of the input's channels at stride 1, all
            of them at stride 2.
        depth: Weight [M, 1, 3, 3] and bias [M].
        mix: Weight [O, M, 1, 1] and bias [O].
        side: Nothing at stride 1; at stride 2 side_depth, weight [B, 1, 3, 3] and bias [B], and
            side_mix, weight [B, B, 1, 1] and bias [B].

    Raises:
        ValueError: If shapes do not fit each other, or dtypes differ.
    """
    mid, branch = expand[0].shape[:2]
    last = len(mix[0])
    shapes = [(mid, branch, 1, 1), (mid, 1, 3, 3), (last, mid, 1, 1)]
    layers, names = [expand, depth, mix, *side], ["expand", "depth", "mix"]
    if side:
        shapes += [(branch, 1, 3, 3), (branch, branch, 1, 1)]
        names += ["side_depth", "side_mix"]
    if len(layers) != len(names):
        raise ValueError(f"side must be nothing or two layers, got {len(side)}")
    dtype = expand[0].dtype
    for name, (weight, bias), shape in zip(names, layers, shapes, strict=True):
        if weight.shape != shape or bias.shape != shape[:1]:
            raise ValueError(
                f"{name} must have weight {list(shape)} and bias {[shape[0]]}, "
                f"got {list(weight.shape)} and {list(bias.shape)}"
            )
        if weight.dtype != dtype or not dtype.is_floating_point:
            raise ValueError(f"{name} must be floating point as expand, got {weight.dtype}")
    packed = [tensor for layer in layers for tensor in _pack(*layer)]
    passed = branch if side else 2 * branch
    return PackedUnit(tuple(packed[:6]), tuple(packed[6:]), passed, mid, branch + last)


def pack_stage(units: Sequence[PackedUnit]) -> PackedStage:
    """Packs units that follow each other for `shuffle_stage`.

    Args:
        units: Any one first, then any number of stride 1, which are alike and have as many channels
            in as out.

    Raises:
        ValueError: If there is no unit, or one does not follow those before it.
    """
    if not units:
        raise ValueError("a stage has one unit at the least")
    first, *rest = units
    channels = first.out_channels
    mid = rest[0].mid_channels if rest else first.mid_channels
    for number, unit in enumerate(rest, 2):
        fits = unit.in_channels == unit.out_channels == channels and unit.mid_channels == mid
        if unit.side or not fits or unit.main[0].dtype != first.main[0].dtype:
            raise ValueError(
                f"unit {number} must have stride 1, {channels} channels in and out, {mid} between, "
                f"in {first.main[0].dtype}, got stride {unit.stride}, {unit.in_channels} in, "
                f"{unit.out_channels} out, {unit.mid_channels} between, in {unit.main[0].dtype}"
            )
    stacked = tuple(map(torch.stack, zip(*(unit.main for unit in rest), strict=True)))
    return PackedStage(
        (*first.main, *first.side), stacked, first.in_channels, (first.mid_channels, mid), channels
    )


def _pack(weight: Tensor, bias: Tensor) -> Layer:
    """Returns one layer's weight and bias as `PackedUnit` has them."""
    matrix = weight.detach().flatten(1).T
    if weight.shape[2:] == (1, 1):
        return padded_matrix(matrix, bias)
    constants = torch.promote_types(weight.dtype, torch.float32)
    more = (0, padded(len(bias)) - len(bias))
    return F.pad(matrix.to(constants), more).contiguous(), F.pad(bias.detach().to(constants), more)


def padded_matrix(matrix: Tensor, bias: Tensor) -> Layer:
    """Pads a matrix [I, O] on both sides, and its bias [O] in float32 or wider."""
    constants = torch.promote_types(matrix.dtype, torch.float32)
    rows, columns = (padded(side) - side for side in matrix.shape)
    matrix = F.pad(matrix, (0, columns, 0, rows)).contiguous()
    return matrix, F.pad(bias.detach().to(constants), (0, columns))
