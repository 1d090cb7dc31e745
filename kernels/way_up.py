"""A U-Net's way up on codes: a coarse map doubled in size and fused with a skip, in one pass.

    small  = codes(reduce(input))       1x1, 2C to C channels
    large  = codes(up(small))           transposed 2x2 of stride 2, C to C
    sum    = fuse([skip, large])        1x1, 2C to C; stored as the stream
    output = codes(relu(sum * gain + shift))

`input` and `skip` are codes, of ranges of their own; all have 8 bits or fewer. What three calls of
`quant_conv2d` round is rounded, in their order (`conv_int.py`); the norm sees the sum before it is
rounded to the stream's dtype. With a `shift` the patch so made lies somewhere on a tile of zeros,
and stream and codes are the tile's: where the patch is not, the sum is 0. There is no operator: the
recorded plan alone computes a way up at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import conv_reference
from .conv_call import ConvCall
from .crop_paste import overlap
from .encode import run_reference as encode
from .encode_call import EncodeCall
from .way_up_pack import Layer, PackedWayUp


@dataclass(frozen=True)
class WayUpCall:
    """What a way up computes with, but the tensors it writes.

    Attributes:
        input: int8 [M, 2C, h, w], codes for reduce; dense, channels last.
        skip: int8 [M, C, 2h, 2w], codes for fuse; likewise.
        way: The packed weights.
        shift: int32 [M, 2], (y, x) of the tile's corner less the patch's, or None: no tile.
        size: (height, width) of the tile; that of `skip` where there is none.
        count: int32 [1], how many slots are in use, or None: all.
    """

    input: Tensor
    skip: Tensor
    way: PackedWayUp
    shift: Tensor | None
    size: tuple[int, int]
    count: Tensor | None = None


def run_reference(call: WayUpCall, stream: Tensor, codes: Tensor) -> None:
    """Computes a call convolution by convolution, as `way_up_triton.run` does at once."""
    way, shape = call.way, call.skip.shape
    small = _convolve(call, way.reduce, call.input, way.up[1:])
    large = _convolve(call, way.up, small, way.fuse[1:])
    joined = torch.cat([call.skip, large], 1)
    patch = torch.zeros(shape, dtype=stream.dtype, device=stream.device)
    made = _convolve(call, way.fuse, joined, (way.amax, way.num_bits), patch)
    nothing = EncodeCall(
        torch.zeros(1, shape[1], 1, 1, device=patch.device), way.amax, (1, 1), way.num_bits,
        way.affine, True,
    )
    empty = nothing.new_codes()
    encode(nothing, empty)
    used = len(stream) if call.count is None else min(int(call.count), len(stream))
    for slot in range(used):
        stream[slot], codes[slot] = 0, empty[0, 0]
        shift = (0, 0) if call.shift is None else call.shift[slot].tolist()
        on_tile, on_patch = zip(
            *(overlap(*axis) for axis in zip(shift, call.size, shape[2:], strict=True)),
            strict=True,
        )
        for output, content in ((stream, patch), (codes, made)):
            output[(slot, slice(None), *on_tile)] = content[(slot, slice(None), *on_patch)]


def _convolve(
    call: WayUpCall, layer: Layer, input: Tensor, target: tuple[Tensor, int],
    stream: Tensor | None = None,
) -> Tensor:
    """Returns codes for a target's range and width, after the norm where there is a stream."""
    affine = None if stream is None else call.way.affine
    conv_call = ConvCall(
        input[None], *layer, None, affine, affine is not None, *target, None, call.count
    )
    codes = conv_call.new_codes()
    conv_reference.run(conv_call, stream, codes)
    return codes[0]
