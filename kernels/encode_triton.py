"""The Triton kernel that turns floats into codes; `encode.py` has the equations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .backend import tl, triton
from .conv_call import pixel_pitch
from .conv_epilogue_triton import codes_of, joined, pair_at, step_of, times_plus
from .encode_call import EncodeCall
from .within_triton import parted, within

# elements per program; other sizes were not tried on a GPU
BLOCK = 2048


@triton.jit
def _affine(
    value, gain_ptr, shift_ptr, channel, precise, CHANNELS: tl.constexpr, PRECISE: tl.constexpr
):
    """Returns value * gain + shift, rounded once if precise."""
    if PRECISE and precise:
        gain, gain_tail = pair_at(gain_ptr, channel, CHANNELS)
        shift, shift_tail = pair_at(shift_ptr, channel, CHANNELS)
        tail = tl.zeros_like(value)
        head, tail = times_plus(value, tail, gain, gain_tail, shift, shift_tail, True)
        value = joined(head, tail)
    else:
        # each rounded on its own
        value = value * tl.load(gain_ptr + channel)[None, :]
        value += tl.load(shift_ptr + channel)[None, :]
    return value


@triton.jit
def _encode_tile(
    start, in_ptr, gain_ptr, shift_ptr, low_ptr, high_ptr, bits, step, largest, top, left,
    height_in, width_in, height, width,
    CHANNELS: tl.constexpr, PITCH: tl.constexpr, OUT_PITCH: tl.constexpr, RELU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Encodes BLOCK_M pixels from `start` on; pointers are those of their slot."""
    pixel = start + tl.arange(0, BLOCK_M)
    channel = tl.arange(0, BLOCK_C)[None, :]
    mask = (pixel < height * width)[:, None] & (channel < CHANNELS)
    row, column = parted(pixel, width)
    row, column = row + top, column + left
    inside = within(row, height_in) & within(column, width_in)
    if PITCH == 0:
        offs = channel.to(tl.int64) * (height_in * width_in) + (row * width_in + column)[:, None]
    else:
        offs = (row * width_in + column).to(tl.int64)[:, None] * PITCH + channel
    x = tl.load(in_ptr + offs, mask=mask & inside[:, None], other=0.0)
    value = x.to(tl.float32)
    if gain_ptr is not None:
        # channels beyond, which are not stored, take the last one's constants
        own = tl.minimum(tl.arange(0, BLOCK_C), CHANNELS - 1)
        value = _affine(
            value, gain_ptr, shift_ptr, own, bits > 8, CHANNELS, high_ptr is not None
        )
    codes = codes_of(value, step, largest, RELU)
    offs = pixel.to(tl.int64)[:, None] * OUT_PITCH + channel
    # the cast keeps the lowest byte
    tl.store(low_ptr + offs, codes.to(tl.int8), mask=mask)
    if high_ptr is not None and bits > 8:
        tl.store(high_ptr + offs, ((codes + 128) >> 8).to(tl.int8), mask=mask)


@triton.jit(
    do_not_specialize=[
        "bits", "done", "amax_stride", "height_in", "width_in", "height", "width", "tiles", "turns",
    ]
)
def encode_kernel(
    in_ptr, gain_ptr, shift_ptr, amax_ptr, bits_ptr, offset_ptr, slots_ptr, count_ptr, low_ptr,
    high_ptr,
    bits, done, amax_stride, height_in, width_in, height, width, tiles, turns,
    CHANNELS: tl.constexpr, PITCH: tl.constexpr, OUT_PITCH: tl.constexpr, RELU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Encodes `turns` times BLOCK_M pixels of one slot; PITCH 0: each channel is a plane."""
    slot, first = parted(tl.program_id(0), tl.cdiv(tiles, turns))
    slot = slot.to(tl.int64)
    if count_ptr is not None and slot >= tl.load(count_ptr):
        return
    bits = bits if bits_ptr is None else tl.load(bits_ptr + slot)
    if (done > 0) & (bits == done):
        return
    sample = slot if slots_ptr is None else tl.load(slots_ptr + slot).to(tl.int64)
    top, left = 0, 0
    if offset_ptr is not None:
        top, left = tl.load(offset_ptr + 2 * slot), tl.load(offset_ptr + 2 * slot + 1)
    in_ptr += sample * height_in * width_in * (CHANNELS if PITCH == 0 else PITCH)
    begin = slot * height * width
    low_ptr += begin * OUT_PITCH
    if high_ptr is not None:
        high_ptr += begin * OUT_PITCH
    step, largest = step_of(amax_ptr + slot * amax_stride, bits)
    for tile in tl.range(first * turns, tl.minimum((first + 1) * turns, tiles)):
        _encode_tile(
            tile * BLOCK_M, in_ptr, gain_ptr, shift_ptr, low_ptr, high_ptr, bits, step, largest,
            top, left, height_in, width_in, height, width, CHANNELS, PITCH, OUT_PITCH, RELU,
            BLOCK_M, BLOCK_C,
        )


def run(call: EncodeCall, codes: Tensor) -> None:
    """Launches the encoding into given outputs, once, without a word from the device.

    Args:
        call: As `encode.encode` makes it.
        codes: int8 byte planes [P, M, C, height, width], channels last, or some channels of wider
            ones, such as the half of a concatenation.
    """
    image, (height, width) = call.input, call.size
    channels = image.shape[1]
    pitch = pixel_pitch(image)
    several = isinstance(call.num_bits, Tensor)
    columns = triton.next_power_of_2(channels)
    block = max(32, BLOCK // columns)
    tiles = triton.cdiv(height * width, block)
    # a program that finds nothing to do took 0.6 ns on an H200, so one takes several tiles; how
    # many was not tried
    turns = 8 if call.done else 1
    with torch.cuda.device_of(image):
        encode_kernel[(call.samples * triton.cdiv(tiles, turns),)](
            image, *(call.affine or (None, None)), call.amax, call.num_bits if several else None,
            call.offset, call.slots, call.count, codes[0], codes[1] if len(codes) == 2 else None,
            0 if several else call.num_bits, call.done, 0 if len(call.amax) == 1 else 1,
            *image.shape[2:], height, width, tiles, turns,
            CHANNELS=channels, PITCH=pitch or 0, OUT_PITCH=pixel_pitch(codes[0]), RELU=call.relu,
            BLOCK_M=block, BLOCK_C=columns, enable_fp_fusion=False,
        )


def shape_classes() -> dict[str, Callable[[], object]]:
    """Returns, by name, the launches of the shipped models; called with meta tensors by `aot.py`.

    U-Net-16: the image's crop, the inputs of the encoder's stages with their norms at 8 or 16 bits
    per slot, a map of zeros for the last stage.
    """
    found: dict[str, Callable[[], object]] = {
        "encode, view of an image": partial(_launch_meta, 4, torch.float32, image=True),
        "encode, map of zeros": partial(_launch_meta, 16, affine=True),
    }
    for level in range(4):
        c = 16 << level
        found[f"encode, stage of {c} channels"] = partial(_launch_meta, c, mixed=True, affine=True)
    return found


def _launch_meta(
    channels: int, dtype: torch.dtype = torch.float16, *, image: bool = False,
    mixed: bool = False, affine: bool = False,
) -> None:
    """Launches an encoding whose tensors have no memory."""
    empty = partial(torch.empty, device="meta", dtype=torch.int32)

    def last(channels: int, dtype: torch.dtype) -> Tensor:
        return empty(2, 96, 96, channels, dtype=dtype).permute(0, 3, 1, 2)

    constants = empty(2, channels, dtype=torch.float32)
    call = EncodeCall(
        empty(2, channels, 96, 96, dtype=dtype) if image else last(channels, dtype),
        empty(1, dtype=torch.float32), (96, 96), empty(2) if mixed else 8,
        (constants, constants) if affine else None, affine,
        empty(2, 2) if image else None, empty(2) if image else None, empty(1),
    )
    codes = torch.stack([last(channels, torch.int8)] * (1 + mixed))
    codes = codes.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    run(call, codes)
