"""The Triton kernel of a U-Net's way up; `way_up.py` has the equations.

Nothing between the three convolutions is stored: a program takes pixels of the lower resolution
through all of them, each to its four output pixels. Products are [pixels, columns]; a column is a
channel, or, with 16 of them, one of two neighbouring output pixels' channels, so that each product
has at least 32.

What one product has summed up is the next one's operand, or is stored, by the same thread: no sum
moves between threads. Tensor cores have a thread sum up two neighbouring columns and take four, so
an operand is two halves of columns, joined column by column; `_as_stored` has rows and columns in
the order of stores. Weights are packed (`way_up_pack.py`), and pixels loaded, in the order that
makes this right. On tensor cores with another order results are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .backend import tl, triton
from .conv_call import pixel_pitch
from .conv_epilogue_triton import codes_within
from .conv_pack import K_MULTIPLE, PackedConv
from .shuffle_pack import padded
from .way_up import WayUpCall
from .way_up_pack import PackedWayUp
from .within_triton import parted, within


@triton.jit
def _as_stored(total, WARPS: tl.constexpr):
    """Puts rows and 32 columns of sums into the order of a store of 8 columns per thread."""
    ROWS: tl.constexpr = total.shape[0]
    parts = tl.reshape(total, (ROWS // (16 * WARPS), WARPS, 2, 8, 4, 4, 2))
    return tl.reshape(tl.permute(parts, (0, 2, 1, 3, 5, 4, 6)), (ROWS, 32))


@triton.jit
def _place_of(row, WARPS: tl.constexpr):
    """Returns where `_as_stored` puts a row."""
    place = row // (16 * WARPS) * (16 * WARPS) + row // 8 % 2 * (8 * WARPS)
    return place + row // 16 % WARPS * 8 + row % 8


@triton.jit
def _pixel(place, line, top, left):
    """Returns (y, x) of the lower resolution in the patch; top, left: the tile's corner there."""
    y, x = parted(place, line)
    return y + (top >> 1), x + (left >> 1)


@triton.jit
def _load(
    ptr, pixel, inside, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, COLUMNS: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Loads codes [pixels, COLUMNS], of neighbouring pixels' BLOCK_C channels; zeros outside."""
    column = tl.arange(0, COLUMNS)[None, :]
    offs = pixel.to(INDEX)[:, None] * CHANNELS
    if CHANNELS == BLOCK_C:
        return tl.load(ptr + (offs + column), mask=inside[:, None], other=0)
    else:
        offs += column // BLOCK_C * CHANNELS + column % BLOCK_C
        mask = inside[:, None] & (column % BLOCK_C < CHANNELS)
        return tl.load(ptr + offs, mask=mask, other=0)


@triton.jit
def _weights(ptr, COLUMNS: tl.constexpr, K: tl.constexpr):
    """Loads weights [K, COLUMNS]; those of a column lie side by side."""
    return tl.load(ptr + tl.arange(0, COLUMNS)[None, :] * K + tl.arange(0, K)[:, None])


@triton.jit
def _scaled(total, ptr, PITCH: tl.constexpr):
    """Returns sums times scale plus bias, which lie PITCH apart."""
    column = tl.arange(0, total.shape[1])[None, :]
    return total.to(tl.float32) * tl.load(ptr + column) + tl.load(ptr + PITCH + column)


@triton.jit
def _codes(value, grid_ptr, RELU: tl.constexpr):
    step, inverse, bound = tl.load(grid_ptr), tl.load(grid_ptr + 1), tl.load(grid_ptr + 2)
    return codes_within(value, step, inverse, bound, RELU).to(tl.int8)


@triton.jit
def _half(
    operand, weight_ptr, constants_ptr, grid_ptr,
    HALF: tl.constexpr, K: tl.constexpr, PITCH: tl.constexpr,
):
    total = tl.dot(operand, _weights(weight_ptr, HALF, K), out_dtype=tl.int32)
    return _codes(_scaled(total, constants_ptr, PITCH), grid_ptr, False)


@triton.jit
def _next_operand(
    operand, weight_ptr, constants_ptr, grid_ptr,
    COLUMNS: tl.constexpr, HALF: tl.constexpr, K: tl.constexpr,
):
    """Convolves codes to codes: two halves of columns, the second of zeros if there is but one."""
    lower = _half(operand, weight_ptr, constants_ptr, grid_ptr, HALF, K, COLUMNS)
    if COLUMNS == HALF:
        upper = tl.zeros_like(lower)
    else:
        weight_ptr, constants_ptr = weight_ptr + HALF * K, constants_ptr + HALF
        upper = _half(operand, weight_ptr, constants_ptr, grid_ptr, HALF, K, COLUMNS)
    return tl.reshape(tl.join(lower, upper), (operand.shape[0], 2 * HALF))


@triton.jit
def _fuse(
    skip, codes, weight_ptr, constants_ptr, grids_ptr, stream_ptr, out_ptr, inside, y, x, height,
    width, part,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, TILE: tl.constexpr,
    INDEX: tl.constexpr, WARPS: tl.constexpr,
):
    """The third convolution's 32 columns from `part` on, stored from output pixels (y, x) on."""
    weight_ptr += part * COLUMNS
    total = tl.dot(skip, _weights(weight_ptr, 32, COLUMNS), out_dtype=tl.int32)
    weight = _weights(weight_ptr + COLUMNS * COLUMNS, 32, COLUMNS)
    total = _as_stored(tl.dot(codes, weight, total, out_dtype=tl.int32), WARPS)
    value = _scaled(total, constants_ptr + part, COLUMNS)
    column = part + tl.arange(0, 32)[None, :]
    mask = inside[:, None]
    if TILE:
        value = tl.where(mask, value, 0.0)
        if COLUMNS == BLOCK_C:
            mask = (within(y, height) & within(x, width))[:, None]
        else:
            mask = within(y, height)[:, None] & within(x[:, None] + column // BLOCK_C, width)
    offs = (y * width + x).to(INDEX)[:, None] * CHANNELS
    if CHANNELS == BLOCK_C:
        offs += column
    else:
        offs += column // BLOCK_C * CHANNELS + column % BLOCK_C
        mask &= column % BLOCK_C < CHANNELS
    tl.store(stream_ptr + offs, value.to(stream_ptr.dtype.element_ty), mask=mask)
    gain_ptr = constants_ptr + 2 * COLUMNS + column
    value = value * tl.load(gain_ptr) + tl.load(gain_ptr + COLUMNS)
    # 16 columns per thread, as bytes would have it, are not where the sums are
    offs = tl.max_contiguous(offs, (1, 8))
    tl.store(out_ptr + offs, _codes(value, grids_ptr, True), mask=mask)


# sizes of images change nothing in the machine code
@triton.jit(do_not_specialize=["height", "width", "out_height", "out_width", "tiles"])
def way_up_kernel(
    in_ptr, skip_ptr, reduce_ptr, up_ptr, fuse_ptr, constants_ptr, grids_ptr, shift_ptr, count_ptr,
    stream_ptr, out_ptr,
    height, width, out_height, out_width, tiles,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, COLUMNS: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, WARPS: tl.constexpr, UNROLL: tl.constexpr,
):
    """Takes BLOCK_M pixels of one slot's lower resolution all the way up."""
    TAPS: tl.constexpr = COLUMNS // BLOCK_C
    TILE: tl.constexpr = shift_ptr is not None
    slot = (tl.program_id(0) // tiles).to(tl.int64)
    if count_ptr is not None and slot >= tl.load(count_ptr):
        return
    top, left, line = 0, 0, width
    if TILE:
        top, left = tl.load(shift_ptr + 2 * slot), tl.load(shift_ptr + 2 * slot + 1)
        line = out_width // 2 + 1
    in_ptr += slot * height * width * (2 * CHANNELS)
    skip_ptr += slot * height * width * (4 * CHANNELS)
    stream_ptr += slot * out_height * out_width * CHANNELS
    out_ptr += slot * out_height * out_width * CHANNELS

    row = tl.arange(0, BLOCK_M)
    place = (tl.program_id(0) % tiles) * BLOCK_M
    y, x = _pixel(place + _place_of(row, WARPS), line, top, left)
    inside = within(y, height) & within(x, width)
    first = y * (4 * width) + 2 * x
    below = _load(
        in_ptr, y * width + x, inside, 2 * CHANNELS, 2 * BLOCK_C, 2 * BLOCK_C, INDEX
    )
    reduced = _next_operand(
        below, reduce_ptr, constants_ptr, grids_ptr, BLOCK_C, COLUMNS // 2, 2 * BLOCK_C
    )
    y, x = _pixel(place + row, line, top, left)
    out_inside = within(y, height) & within(x, width)
    y, x = 2 * y - top, 2 * x - left

    constants_ptr += 2 * BLOCK_C
    grids_ptr += 3
    skip = _load(skip_ptr, first, inside, CHANNELS, BLOCK_C, COLUMNS, INDEX)
    for tap in tl.range(0, 4, TAPS, num_stages=1, loop_unroll_factor=4 // TAPS if UNROLL else 1):
        # ahead of this one's stores; after the last the first once more
        after = (tap + TAPS) % 4
        pixel = first + (after // 2 * 2 * width + after % 2)
        following = _load(skip_ptr, pixel, inside, CHANNELS, BLOCK_C, COLUMNS, INDEX)
        codes = _next_operand(
            reduced, up_ptr + tap * (BLOCK_C * COLUMNS), constants_ptr, grids_ptr, COLUMNS,
            COLUMNS // 2, COLUMNS,
        )
        for part in tl.range(
            0, COLUMNS, 32, num_stages=1, loop_unroll_factor=COLUMNS // 32 if UNROLL else 1
        ):
            _fuse(
                skip, codes, fuse_ptr, constants_ptr + 2 * COLUMNS, grids_ptr + 3, stream_ptr,
                out_ptr, out_inside, y + tap // 2, x + tap % 2, out_height, out_width, part,
                COLUMNS, CHANNELS, BLOCK_C, TILE, INDEX, WARPS,
            )
        skip = following


def blocks(channels: int) -> dict[str, int]:
    """Returns pixels per program, warps, and how many of them have rows of their own.

    What a program does once is worth many pixels, until registers run out: by the machine code, of
    sizes that no GPU has tried. Of more than 64 channels loops are not unrolled, which would spill.
    """
    block = padded(channels)
    lines, warps = {16: (64, 2), 32: (64, 2), 64: (32, 2), 128: (32, 4)}.get(block, (16, 4))
    return {
        "BLOCK_M": lines, "WARPS": min(warps, lines // 16), "UNROLL": block <= 64,
        "num_warps": warps,
    }


def run(call: WayUpCall, stream: Tensor, codes: Tensor) -> None:
    """Launches a way up into given outputs, once, without a word from the device.

    Args:
        call: Which see.
        stream: [M, C, height, width] of the call's size, in float16, bfloat16 or float32, dense,
            channels last.
        codes: int8, likewise.
    """
    way, (height, width), (out_height, out_width) = call.way, call.input.shape[2:], call.size
    channels, columns = way.channels, way.weights[1].shape[1]
    maps = (call.input, 2 * channels), (call.skip, channels), (stream, channels), (codes, channels)
    assert all(pixel_pitch(image) == pitch for image, pitch in maps), "dense, channels last"
    assert call.skip.shape[2:] == (2 * height, 2 * width), "a skip has twice the resolution"
    assert call.shift is not None or call.skip.shape[2:] == call.size, "moved by what shift?"
    pixels = height * width
    if call.shift is not None:
        # from the pixel of the tile's corner on, which may be the last of its four
        pixels = (out_height // 2 + 1) * (out_width // 2 + 1)
    sizes, reach = blocks(channels), max(image[0].numel() for image, _ in maps)
    tiles = triton.cdiv(pixels, sizes["BLOCK_M"])
    with torch.cuda.device_of(call.input):
        way_up_kernel[(len(call.input) * tiles,)](
            call.input, call.skip, *way.weights, way.constants, way.grids, call.shift, call.count,
            stream, codes, height, width, out_height, out_width, tiles,
            CHANNELS=channels, BLOCK_C=padded(channels), COLUMNS=columns,
            INDEX=tl.int64 if reach >= 2**31 else tl.int32, enable_fp_fusion=False, **sizes,
        )


def shape_classes() -> dict[str, Callable[[], object]]:
    """Returns, by name, the launches of the shipped models; called with meta tensors by `aot.py`.

    The three ways up of U-Net-16; the last of them, of a crop, ends on a tile.
    """
    found: dict[str, Callable[[], object]] = {
        f"way up, {channels} channels": partial(_launch_meta, channels) for channels in (64, 32, 16)
    }
    found["way up on a tile, 16 channels"] = partial(_launch_meta, 16, tile=True)
    return found


def _launch_meta(channels: int, side: int = 96, *, tile: bool = False) -> None:
    """Launches a way up whose tensors have no memory."""
    empty = partial(torch.empty, device="meta", dtype=torch.int8)

    def last(channels: int, side: int, dtype: torch.dtype = torch.int8) -> Tensor:
        return empty(2, side, side, channels, dtype=dtype).permute(0, 3, 1, 2)

    block = padded(channels)
    columns = max(K_MULTIPLE, block)
    one, floats = empty(1, dtype=torch.int32), empty(2 * block + 6 * columns, dtype=torch.float32)
    conv = PackedConv(
        empty(1, 1, channels, 2 * channels), floats, floats[None, :channels], (8,), 2 * channels,
        (1, 1), (1, 1), (0, 0), (1, 1), 1, False,
    )
    layer = conv, floats, 8
    weights = empty(block, 2 * block), empty(4 * block, columns), empty(2, columns, columns)
    way = PackedWayUp(
        layer, layer, layer, (floats, floats), floats, 8, weights, floats, floats[:9].view(3, 3)
    )
    call = WayUpCall(
        last(2 * channels, side // 2), last(channels, side), way,
        empty(2, 2, dtype=torch.int32) if tile else None, (side, side), one,
    )
    run(call, last(channels, side, torch.float16), last(channels, side))
