"""A way up's three convolutions and the norm that follows, packed for its kernel.

The kernel's products are [pixels, columns], columns = max(32, BLOCK_C), and channels are padded to
BLOCK_C by zeros. Where a channel lies hangs on who holds it: see `way_up_triton.py`.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .conv_call import is_mild, largest_code, step_of
from .conv_pack import K_MULTIPLE, PackedConv
from .pairs import times_step
from .shuffle_pack import padded

# packed weights, range of the input [1], width of its codes
Layer: TypeAlias = tuple[PackedConv, Tensor, int]
# more channels' weights fit into no small GPU's shared memory
WIDEST = 256


class PackedWayUp(NamedTuple):
    """A way up from 2C to C channels, all at 8 bits or fewer.

    Attributes:
        reduce, up, fuse: As given.
        affine: (gain, shift), pairs of float32 [2, C], of the norm that follows.
        amax: float32 [1], range of the codes after that norm and a ReLU.
        num_bits: Their width.
        weights: int8, of reduce [BLOCK_C, 2 * BLOCK_C], of up [4 * BLOCK_C, columns], of fuse
            [2, columns, columns]: for the skip, and for what comes up.
        constants: float32, one after the other: scale and bias of reduce, BLOCK_C each; scale and
            bias of up, scale and bias of fuse, gain and shift, columns each.
        grids: float32 [3, 3]: step, its reciprocal and the largest value of the codes that reduce,
            up and the norm make.
    """

    reduce: Layer
    up: Layer
    fuse: Layer
    affine: tuple[Tensor, Tensor]
    amax: Tensor
    num_bits: int
    weights: tuple[Tensor, Tensor, Tensor]
    constants: Tensor
    grids: Tensor

    @property
    def channels(self) -> int:
        """C."""
        return self.fuse[0].out_channels


def pack_way_up(
    reduce: Layer, up: Layer, fuse: Layer, affine: tuple[Tensor, Tensor], amax: Tensor,
    num_bits: int,
) -> PackedWayUp:
    """Packs a way up.

    Args:
        reduce: 1x1, from 2C to C channels.
        up: Transposed 2x2 of stride 2, from C to C.
        fuse: 1x1, from 2C to C: the skip's, then those that come up.
        affine, amax, num_bits: As in `PackedWayUp`.

    Raises:
        ValueError: If there are more than `WIDEST` channels, or a range is one that only
            `quant_conv2d` has codes for.
    """
    channels = fuse[0].out_channels
    if channels > WIDEST:
        raise ValueError(f"a way up has a kernel for up to {WIDEST} channels, not for {channels}")
    made = torch.stack([_grid(*target) for target in (up[1:], fuse[1:], (amax, num_bits))])
    block = padded(channels)
    taps = max(1, K_MULTIPLE // block)

    def row(values: Tensor, times: int = taps) -> Tensor:
        return F.pad(values, (0, block - channels)).repeat(times)

    layers = [(_scale(layer), layer[0].bias[0]) for layer in (reduce, up, fuse)]
    constants = torch.cat([
        *(row(values, 1) for values in layers[0]),
        *(row(values) for pair in layers[1:] for values in pair), *(row(p[0]) for p in affine),
    ])
    if not bool(constants.isfinite().all()):
        raise ValueError("scales of a way up are not finite: ranges or weights are too large")
    return PackedWayUp(
        reduce, up, fuse, affine, amax, num_bits, _weights(reduce, up, fuse, block, taps),
        constants, made,
    )


def _scale(layer: Layer) -> Tensor:
    conv, amax, num_bits = layer
    step = step_of(amax, 0, num_bits)
    return times_step(conv.scale[conv.variant(num_bits)], step, torch.float32)


def _grid(amax: Tensor, num_bits: int) -> Tensor:
    step = step_of(amax, 0, num_bits)
    if not is_mild(amax, num_bits):
        raise ValueError(f"a way up has no kernel for codes in steps of {float(step)}")
    inverse = torch.where(step > 0, 1 / step, 0.0)
    return torch.stack((step, inverse, largest_code(num_bits).to(step.device) * step))


def _weights(
    reduce: Layer, up: Layer, fuse: Layer, block: int, taps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `PackedWayUp.weights`."""
    channels, columns = fuse[0].out_channels, taps * block

    def wider(weight: Tensor, depth: int) -> Tensor:
        return F.pad(weight, (0, depth - weight.shape[-1], 0, block - channels))

    of_up = wider(_codes(up).reshape(4, channels, channels), columns).reshape(-1, columns)
    parts = []
    for part in _codes(fuse).split(channels, 1):
        # neighbouring pixels do not see each other
        part = torch.block_diag(*[wider(part, block)] * taps)
        # a thread stores 8 neighbouring columns: sums of every fourth pair of a product's columns
        parts.append(part.reshape(-1, 4, 4, 2, columns).transpose(1, 2).reshape(columns, columns))
    for_fuse = torch.stack((parts[0], _joined(parts[1])))
    return wider(_codes(reduce), 2 * block), _joined(of_up), for_fuse


def _codes(layer: Layer) -> Tensor:
    """Returns codes [rows, Cin]."""
    conv, _, num_bits = layer
    return conv.codes[conv.variant(num_bits), 0, :, : conv.in_channels]


def _joined(weight: Tensor) -> Tensor:
    """Returns weights of an operand whose columns are joined from two halves, one by one."""
    return weight.reshape(len(weight), 2, -1).transpose(1, 2).reshape(weight.shape)
