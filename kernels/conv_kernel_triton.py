"""The Triton kernel of the integer convolution; `conv_int.py` has the equations.

An implicit matrix product on int8 tensor cores: pixels of one sample by output channels, K running
over (tap, channel) flattened, so that 4 or 16 channels fill the 32 of one instruction. A transposed
2x2 convolution of stride 2 is a 1x1 with 4 * Cout rows whose results scatter. A program serves one
sample and takes that sample's width on the device; 16-bit codes are four products of bytes,
(256 a + b)(256 c + d), in three exact int32 sums.
"""

from __future__ import annotations

from .backend import tl, triton
from .conv_epilogue_triton import (
    codes_of,
    float_of,
    float_of_bytes,
    joined,
    not_negative,
    pair_at,
    plus,
    step_of,
    times_plus,
    times_step,
)
from .within_triton import parted


@triton.jit
def _taps_inside(
    y, x, height, width, valid, KERNEL: tl.constexpr, PADDING: tl.constexpr
):
    """Tells which taps lie in the image, bit by bit, of valid pixels whose first is at (y, x)."""
    taps = tl.where(valid, (1 << KERNEL * KERNEL) - 1, 0)
    row: tl.constexpr = (1 << KERNEL) - 1
    column: tl.constexpr = ((1 << KERNEL * KERNEL) - 1) // row
    # so many lines of taps may lie beyond either end
    for i in tl.static_range(min(PADDING, KERNEL)):
        far: tl.constexpr = KERNEL - 1 - i
        taps &= tl.where(x + i < 0, ~(column << i), -1)
        taps &= tl.where(x + far >= width, ~(column << far), -1)
        taps &= tl.where(y + i < 0, ~(row << KERNEL * i), -1)
        taps &= tl.where(y + far >= height, ~(row << KERNEL * far), -1)
    return taps


@triton.jit
def _load(
    start, low_ptr, high_ptr, weight_ptr, first, taps, rows, width,
    C_IN: tl.constexpr, PITCH: tl.constexpr, KERNEL: tl.constexpr, K: tl.constexpr,
    ROWS: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    INSIDE: tl.constexpr,
):
    """Loads BLOCK_K values of K from `start` on: codes and weights, their high bytes if WIDE.

    first: where the codes under the first tap lie; taps: which of them are in the image.
    INSIDE: K's padding and what is beyond it are known not to be among them.
    """
    k = start + tl.arange(0, BLOCK_K)
    # one tap for the whole block, or several
    tap = start // C_IN if C_IN % BLOCK_K == 0 else (k // C_IN)[None, :]
    # a third, of what is below 32
    down = tap * 11 >> 5 if KERNEL == 3 else tap
    # of K's padding no bit is set
    mask = taps[:, None] & (1 << tap) != 0
    offs = first[:, None] + (
        (down * width + (tap - down * KERNEL)) * PITCH + (k % C_IN)[None, :]
    )
    offs_w = rows[None, :] * K + k[:, None]
    mask_w = (rows < ROWS)[None, :]
    if not INSIDE and K % BLOCK_K != 0:
        # the last block reaches beyond K, where no tap is
        mask_w &= (k < K)[:, None]

    low = tl.load(low_ptr + offs, mask=mask, other=0)
    if ROWS % BLOCK_N == 0 and (INSIDE or K % BLOCK_K == 0):
        weight_low = tl.load(weight_ptr + offs_w)
    else:
        weight_low = tl.load(weight_ptr + offs_w, mask=mask_w, other=0)
    if WIDE:
        high = tl.load(high_ptr + offs, mask=mask, other=0)
        weight_high = tl.load(weight_ptr + ROWS * K + offs_w, mask=mask_w, other=0)
    else:
        high, weight_high = low, weight_low
    return low, high, weight_low, weight_high


@triton.jit
def _add_products(tile, low_low, mixed, high_high, WIDE: tl.constexpr):
    """Adds the products of what one `_load` returned to the sums of bytes."""
    low, high, weight_low, weight_high = tile
    low_low = tl.dot(low, weight_low, low_low, out_dtype=tl.int32)
    if WIDE:
        mixed = tl.dot(high, weight_low, mixed, out_dtype=tl.int32)
        mixed = tl.dot(low, weight_high, mixed, out_dtype=tl.int32)
        high_high = tl.dot(high, weight_high, high_high, out_dtype=tl.int32)
    return low_low, mixed, high_high


@triton.jit
def _integer_sum(
    low_ptr, high_ptr, weight_ptr, first, taps, rows, width, depth, precise,
    C_IN: tl.constexpr, PITCH: tl.constexpr, KERNEL: tl.constexpr, K: tl.constexpr,
    ROWS: tl.constexpr, WIDE: tl.constexpr, PRECISE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
):
    """Sums over taps and channels, as head + tail; first and taps as in `_load`."""
    low_low = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    mixed = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    high_high = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    if K <= 18 * BLOCK_K and not WIDE:
        # as for 3x3 on 32 or 128 channels: addresses are known in advance, loads run ahead, and no
        # compiler pass carries bytes around a loop (up to sm_89 more than half of all issued)
        taken: tl.constexpr = KERNEL * KERNEL * C_IN
        loaded = ()  # type: tuple
        for start in tl.static_range(0, K + AHEAD * BLOCK_K, BLOCK_K):
            if start < K:
                tile = _load(
                    start, low_ptr, high_ptr, weight_ptr, first, taps, rows, width, C_IN, PITCH,
                    KERNEL, K, ROWS, WIDE, BLOCK_N, BLOCK_K, taken >= start + BLOCK_K,
                )
                loaded = loaded + (tile,)
            if start >= AHEAD * BLOCK_K:
                low_low, mixed, high_high = _add_products(
                    loaded[0], low_low, mixed, high_high, WIDE
                )
                loaded = loaded[1:]
    else:
        # `depth` is K, but unknown to the compiler, which would unroll the loop, too, and spill
        for start in tl.range(0, depth, BLOCK_K, num_stages=STAGES):
            tile = _load(
                tl.multiple_of(start, BLOCK_K), low_ptr, high_ptr, weight_ptr, first, taps, rows,
                width, C_IN, PITCH, KERNEL, K, ROWS, WIDE, BLOCK_N, BLOCK_K, False,
            )
            low_low, mixed, high_high = _add_products(tile, low_low, mixed, high_high, WIDE)

    if WIDE:
        # where the tail is not asked for the head has been rounded just as well
        return float_of_bytes(low_low, mixed, high_high)
    else:
        return float_of(low_low, precise, PRECISE)


@triton.jit
def _variant(bits, index, WIDTHS: tl.constexpr):
    """Returns which packed weights a sample of `bits` takes; bit b of WIDTHS: b is packed."""
    if WIDTHS == 0:
        return index
    else:
        index = bits * 0
        narrow, packed = 0, 0
        for b in tl.static_range(2, 17):
            if (WIDTHS >> b) % 2 == 1:
                index += (bits > b).to(tl.int32)
                packed += 1
                if b <= 8:
                    narrow += 1
        # a width above all of as many bytes takes the widest of them
        return tl.minimum(index, tl.where(bits > 8, packed, narrow) - 1)


@triton.jit
def _moments(value, mask, size):
    """Returns mean and squared deviation of each column of `size` masked rows."""
    mean = tl.sum(tl.where(mask, value, 0.0), 0) / size
    apart = tl.where(mask, value - mean[None, :], 0.0)
    return mean, tl.sum(apart * apart, 0)


@triton.jit
def _finish(
    head, tail, step, scale_ptr, bias_ptr, gain_ptr, shift_ptr, residual_ptr, stream_ptr,
    moments_ptr, out_low_ptr, out_high_ptr, out_amax_ptr, out_bits, skip_ptr, skip_amax_ptr,
    skip_bits, pixel, rows, mask, size,
    C_OUT: tl.constexpr, OUT_PITCH: tl.constexpr, SKIP_PITCH: tl.constexpr, RELU: tl.constexpr,
    MILD: tl.constexpr, PRECISE: tl.constexpr, INDEX: tl.constexpr,
):
    """Does all that follows the sums of one tile; pointers are those of its slot."""
    channel = rows % C_OUT
    scale, scale_tail = pair_at(scale_ptr, channel, C_OUT)
    scale, scale_tail = times_step(scale, scale_tail, step, PRECISE)
    offset, offset_tail = pair_at(bias_ptr, channel, C_OUT)
    head, tail = times_plus(head, tail, scale, scale_tail, offset, offset_tail, PRECISE)
    offs = pixel.to(INDEX) * C_OUT + channel[None, :]
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offs, mask=mask, other=0.0)
        head, tail = plus(head, tail, residual.to(tl.float32), PRECISE)
    total = joined(head, tail) if PRECISE else head
    if stream_ptr is not None:
        tl.store(stream_ptr + offs, total.to(stream_ptr.dtype.element_ty), mask=mask)
    if moments_ptr is not None:
        mean, deviation = _moments(total, mask, size)
        tl.store(moments_ptr + channel, mean, mask=rows < C_OUT)
        tl.store(moments_ptr + C_OUT + channel, deviation, mask=rows < C_OUT)
    if out_low_ptr is not None:
        if gain_ptr is not None:
            gain, gain_tail = pair_at(gain_ptr, channel, C_OUT)
            shift, shift_tail = pair_at(shift_ptr, channel, C_OUT)
            head, tail = times_plus(head, tail, gain, gain_tail, shift, shift_tail, PRECISE)
        value = joined(head, tail) if PRECISE else head
        out_step, largest = step_of(out_amax_ptr, out_bits)
        codes = codes_of(value, out_step, largest, RELU, MILD)
        offs = pixel.to(INDEX) * OUT_PITCH + channel[None, :]
        # the cast keeps the lowest byte
        tl.store(out_low_ptr + offs, codes.to(tl.int8), mask=mask)
        if out_high_ptr is not None:
            tl.store(out_high_ptr + offs, ((codes + 128) >> 8).to(tl.int8), mask=mask)
    if skip_ptr is not None:
        skip_step, skip_largest = step_of(skip_amax_ptr, skip_bits)
        codes = codes_of(total, skip_step, skip_largest, False, MILD)
        offs = pixel.to(INDEX) * SKIP_PITCH + channel[None, :]
        tl.store(skip_ptr + offs, codes.to(tl.int8), mask=mask)


@triton.jit
def _tile(
    start, first_row, low_ptr, high_ptr, step, weight_ptr, scale_ptr, bias_ptr, residual_ptr,
    gain_ptr, shift_ptr, stream_ptr, moments_ptr, out_low_ptr, out_high_ptr, out_amax_ptr, skip_ptr,
    skip_amax_ptr, bits, out_bits, skip_bits, height, width, out_height, out_width, depth,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    PADDING: tl.constexpr, TRANSPOSED: tl.constexpr, K: tl.constexpr, PITCH: tl.constexpr,
    OUT_PITCH: tl.constexpr, SKIP_PITCH: tl.constexpr, NARROW: tl.constexpr, WIDE: tl.constexpr,
    PRECISE: tl.constexpr, RELU: tl.constexpr, MILD: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Computes BLOCK_M pixels from `start` on by BLOCK_N rows; pointers are those of its slot."""
    ROWS: tl.constexpr = C_OUT * 4 if TRANSPOSED else C_OUT
    TAPS: tl.constexpr = 1 if TRANSPOSED else KERNEL
    pixel = start + tl.arange(0, BLOCK_M)
    rows = first_row + tl.arange(0, BLOCK_N)
    # a transposed convolution walks its input's pixels, the others their output's
    line = width if TRANSPOSED else out_width
    pixels = line * (height if TRANSPOSED else out_height)
    valid = pixel < pixels
    y, x = parted(pixel, line)
    top, left = y * STRIDE - PADDING, x * STRIDE - PADDING
    taps = _taps_inside(top, left, height, width, valid, TAPS, PADDING)
    first = (top.to(INDEX) * width + left) * PITCH
    precise = out_bits > 8
    if WIDE and (not NARROW or bits > 8):
        head, tail = _integer_sum(
            low_ptr, high_ptr, weight_ptr, first, taps, rows, width, depth, precise,
            C_IN, PITCH, TAPS, K, ROWS, True, PRECISE, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, AHEAD,
        )
    else:
        head, tail = _integer_sum(
            low_ptr, low_ptr, weight_ptr, first, taps, rows, width, depth, precise,
            C_IN, PITCH, TAPS, K, ROWS, False, PRECISE, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, AHEAD,
        )

    size = tl.minimum(pixels - start, BLOCK_M)
    mask = valid[:, None] & (rows < ROWS)[None, :]
    if TRANSPOSED:
        tap = (rows // C_OUT)[None, :]
        pixel = (2 * y[:, None] + tap // 2) * out_width + 2 * x[:, None] + tap % 2
    else:
        pixel = pixel[:, None]
    if PRECISE and precise:
        _finish(
            head, tail, step, scale_ptr, bias_ptr, gain_ptr, shift_ptr, residual_ptr, stream_ptr,
            moments_ptr, out_low_ptr, out_high_ptr, out_amax_ptr, out_bits, skip_ptr, skip_amax_ptr,
            skip_bits, pixel, rows, mask, size, C_OUT, OUT_PITCH, SKIP_PITCH, RELU, MILD, True,
            INDEX,
        )
    else:
        _finish(
            head, tail, step, scale_ptr, bias_ptr, gain_ptr, shift_ptr, residual_ptr, stream_ptr,
            moments_ptr, out_low_ptr, None, out_amax_ptr, out_bits, skip_ptr, skip_amax_ptr,
            skip_bits, pixel, rows, mask, size, C_OUT, OUT_PITCH, SKIP_PITCH, RELU, MILD, False,
            INDEX,
        )


# sizes of images change nothing in the machine code
@triton.jit(
    do_not_specialize=[
        "bits", "variant", "amax_stride", "out_bits", "out_amax_stride", "skip_bits", "height",
        "width", "out_height", "out_width", "tiles", "depth",
    ]
)
def conv_kernel(
    low_ptr, high_ptr, bits_ptr, amax_ptr, weight_ptr, scale_ptr, bias_ptr, residual_ptr, gain_ptr,
    shift_ptr, out_bits_ptr, out_amax_ptr, slots_ptr, count_ptr, stream_ptr, moments_ptr,
    out_low_ptr, out_high_ptr, skip_ptr, skip_amax_ptr,
    bits, variant, amax_stride, out_bits, out_amax_stride, skip_bits, height, width, out_height,
    out_width, tiles, depth,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    PADDING: tl.constexpr, TRANSPOSED: tl.constexpr, K: tl.constexpr, PLANES: tl.constexpr,
    PITCH: tl.constexpr, OUT_PITCH: tl.constexpr, SKIP_PITCH: tl.constexpr, WIDTHS: tl.constexpr,
    NARROW: tl.constexpr, WIDE: tl.constexpr, RELU: tl.constexpr, MILD: tl.constexpr,
    INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PART_M: tl.constexpr, PART_N: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
):
    """Computes BLOCK_M neighbouring pixels of one slot by BLOCK_N output channels.

    Where codes of more than 8 bits go in or out a value takes several registers: such a tile is
    computed part by part, PART_M by PART_N; PART_M is BLOCK_M where moments are stored.
    """
    ROWS: tl.constexpr = C_OUT * 4 if TRANSPOSED else C_OUT
    PRECISE: tl.constexpr = out_high_ptr is not None
    columns: tl.constexpr = (ROWS + BLOCK_N - 1) // BLOCK_N
    slot, tile = parted(tl.program_id(0), tiles * columns)
    slot = slot.to(tl.int64)
    if count_ptr is not None and slot >= tl.load(count_ptr):
        return
    sample = slot if slots_ptr is None else tl.load(slots_ptr + slot).to(tl.int64)
    tile, column = parted(tile, columns)

    bits = bits if bits_ptr is None else tl.load(bits_ptr + sample)
    out_bits = out_bits if out_bits_ptr is None else tl.load(out_bits_ptr + slot)
    variant = _variant(bits, variant, WIDTHS)
    step, _ = step_of(amax_ptr + sample * amax_stride, bits)
    if not MILD:
        step = not_negative(step)
    if bits_ptr is not None and not WIDE:
        # such codes have a second byte, which is not here
        step = tl.where(bits > 8, float("nan"), step)
    weight_ptr += variant * (PLANES * ROWS * K)
    scale_ptr += variant * (2 * C_OUT)
    first = sample * height * width * PITCH
    low_ptr += first
    if high_ptr is not None:
        high_ptr += first
    first = slot * out_height * out_width
    if residual_ptr is not None:
        residual_ptr += first * C_OUT
    if stream_ptr is not None:
        stream_ptr += first * C_OUT
    if moments_ptr is not None:
        moments_ptr += (slot * tiles + tile) * (2 * C_OUT)
    if out_low_ptr is not None:
        out_low_ptr += first * OUT_PITCH
        out_amax_ptr += slot * out_amax_stride
    if out_high_ptr is not None:
        out_high_ptr += first * OUT_PITCH
    if skip_ptr is not None:
        skip_ptr += first * SKIP_PITCH

    if (WIDE or PRECISE) and (not NARROW or bits > 8 or out_bits > 8):
        # of the last tile's rows some parts may have none
        side = tl.minimum(BLOCK_N // PART_N, tl.cdiv(ROWS - column * BLOCK_N, PART_N))
        # what a loop could keep from part to part would cost registers
        for part in tl.range(0, BLOCK_M // PART_M * side, disable_licm=True):
            _tile(
                tile * BLOCK_M + part // side * PART_M, column * BLOCK_N + part % side * PART_N,
                low_ptr, high_ptr, step, weight_ptr, scale_ptr, bias_ptr, residual_ptr, gain_ptr,
                shift_ptr, stream_ptr, moments_ptr, out_low_ptr, out_high_ptr, out_amax_ptr,
                skip_ptr, skip_amax_ptr, bits, out_bits, skip_bits, height, width, out_height,
                out_width, depth, C_IN, C_OUT, KERNEL, STRIDE, PADDING, TRANSPOSED, K, PITCH,
                OUT_PITCH, SKIP_PITCH, NARROW, WIDE, PRECISE, RELU, MILD, INDEX, PART_M, PART_N,
                BLOCK_K, STAGES, AHEAD,
            )
    else:
        _tile(
            tile * BLOCK_M, column * BLOCK_N, low_ptr, None, step, weight_ptr, scale_ptr, bias_ptr,
            residual_ptr, gain_ptr, shift_ptr, stream_ptr, moments_ptr, out_low_ptr, None,
            out_amax_ptr, skip_ptr, skip_amax_ptr, bits, out_bits, skip_bits, height, width,
            out_height, out_width, depth, C_IN, C_OUT, KERNEL, STRIDE, PADDING, TRANSPOSED, K,
            PITCH, OUT_PITCH, SKIP_PITCH, True, False, False, RELU, MILD, INDEX, BLOCK_M, BLOCK_N,
            BLOCK_K, STAGES, AHEAD,
        )
