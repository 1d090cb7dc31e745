"""Launches of the integer convolution's Triton kernel, `conv_kernel_triton.py`.

Everything that shapes the machine code is decided here, by a static rule per class of shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .backend import architecture, tl, triton
from .conv_call import ConvCall, pixel_pitch
from .conv_kernel_triton import conv_kernel
from .conv_pack import K_MULTIPLE, PackedConv
from .quantize import split_width


def supports(conv: PackedConv) -> bool:
    """Returns whether the kernel computes this convolution: 1x1, 3x3, or a transposed 2x2."""
    kernel, stride, padding = conv.kernel_size, conv.stride, conv.padding
    if conv.transposed:
        return (kernel, stride, padding) == ((2, 2), (2, 2), (0, 0))
    square = all(pair[0] == pair[1] for pair in (kernel, stride, padding))
    plain = conv.groups == 1 and conv.dilation == (1, 1)
    return square and plain and kernel[0] in (1, 3) and stride[0] in (1, 2)


def _tile(conv: PackedConv, pixels: int, light: bool, heavy: bool) -> tuple[int, int]:
    """Returns (pixels, rows) of a tile whose values may be light and heavy, as in `blocks`."""
    rows, depth = conv.codes.shape[2:]
    deep = conv.in_channels % 128 == 0
    columns = min(64 if light or deep else 32, max(16, triton.next_power_of_2(rows)))
    if pixels >= 2048 and columns == 16:
        return 256, columns
    if light and (pixels >= 2048 if columns < 64 else depth > 320 and not heavy):
        return 128, columns
    return 64, columns


def blocks(
    conv: PackedConv, pixels: int, light: bool, heavy: bool, moments: bool = False, arch: int = 0
) -> dict[str, int | None]:
    """Returns the block sizes and warps for one class of shapes.

    Sums of up to 18 steps of 8-bit codes read through L1, which serves the nine taps' overlap;
    others copy ahead to shared memory, in stages. A second load ahead of a product takes shared
    memory and is worth 0 to 18 % on an H200, nothing by simulation (`benchmarks/simulate.py`).
    What a program does once is worth many pixels: of the sizes that an H200 tried
    (`benchmarks/tune.py`) the larger tile per warp won, until registers ran out. Values of more
    than 8 bits take several each: where slots may have either, those are computed in small parts
    of a tile, so that they do not decide how many programs fit. The bound on registers is one with
    which neither compiler of those tried (triton 3.6, 3.9) spills.

    Args:
        conv: The weights.
        pixels: Of an output; of a transposed one's input.
        light: Whether codes that go in may have at most 8 bits.
        heavy: Whether codes may have more, going in or out.
        moments: Whether moments are stored, of all pixels of a tile.
        arch: Of the GPU, 90 for sm_90; 0 = any.
    """
    lines, columns = _tile(conv, pixels, light, heavy)
    # where an H200 was asked: of an encoder's blocks
    asked = arch == 90 and light and heavy and not moments
    # pixels are gathered once, in half as many steps: 11.0 instead of 15.6 us there; a graphics
    # card's shared memory has room for one such program, by simulation up to a quarter slower
    widest = asked and conv.in_channels % 128 == 0 and conv.codes.shape[2] == 128
    parts = lines, columns
    if light and heavy:
        parts = (lines if moments else 32, 16)
    return {
        "BLOCK_M": lines,
        "BLOCK_N": 128 if widest else columns,
        "BLOCK_K": 128 if widest else 64 if conv.in_channels % 64 == 0 else 32,
        "PART_M": parts[0],
        "PART_N": min(columns, parts[1]),
        "STAGES": 1 if conv.codes.shape[3] <= (160 if light else 320) else 3,
        "AHEAD": 1 if columns > 32 and not asked else 2,
        "num_warps": 4,
        "maxnreg": None if columns > 16 else 96 if heavy else 112,
    }


def _pitch(image: Tensor | None, channels: int) -> int:
    """Returns the elements from pixel to pixel; those of an output that is not stored."""
    pitch = channels if image is None else pixel_pitch(image)
    assert pitch is not None, "laid out by even_planes"
    return pitch


def _stride(amax: Tensor | None) -> int:
    return 0 if amax is None or len(amax) == 1 else 1


def _launch_facts(call: ConvCall, codes: Tensor | None, moments: bool) -> tuple[bool, bool, dict]:
    """Returns whether inputs may have at most 8 bits, whether they may have more, and `blocks`."""
    conv = call.conv
    mixed = isinstance(call.num_bits, Tensor) and len(call.input) == 2
    wide = mixed if isinstance(call.num_bits, Tensor) else call.num_bits > 8
    light = mixed or not wide
    heavy = wide or (codes is not None and len(codes) == 2)
    height, width = call.input.shape[3:] if conv.transposed else call.output_size
    arch = architecture(call.input.device)
    return light, wide, blocks(conv, height * width, light, heavy, moments, arch)


def new_moments(call: ConvCall) -> tuple[Tensor, int]:
    """Allocates what `run` takes as moments of a call whose codes have at most 8 bits.

    Returns:
        float32 [M, chunks, 2, Cout], mean and squared deviation of each chunk of pixels, and how
        many pixels a chunk has; the last one may have fewer.
    """
    length = _launch_facts(call, None, True)[2]["BLOCK_M"]
    height, width = call.output_size
    chunks = triton.cdiv(height * width, length)
    shape = call.samples, chunks, 2, call.conv.out_channels
    return torch.empty(shape, dtype=torch.float32, device=call.input.device), length


def run(
    call: ConvCall, stream: Tensor | None, codes: Tensor | None, skip: Tensor | None = None,
    moments: Tensor | None = None,
) -> None:
    """Launches the convolution into given outputs, once, without a word from the device.

    Args:
        call: As `conv_call.checked_call` makes it.
        stream: [M, Cout, Hout, Wout] in any of the stream's dtypes, dense, channels last; may be
            the call's residual. None: not stored.
        codes: int8 byte planes [P, M, Cout, Hout, Wout], channels last, or some channels of wider
            ones, such as the half of a concatenation. None: not stored.
        skip: int8 [M, Cout, Hout, Wout], likewise, for the call's skip codes. None: not stored.
        moments: Of `new_moments`: receives those of the sum, as `selector_triton.select` takes
            them. None: not stored.
    """
    assert skip is None or call.skip_amax is not None, "skip codes need a range"
    assert moments is None or not call.conv.transposed, "a transposed one's tiles are no chunks"
    conv = call.conv
    bits_tensor, bits = split_width(call.num_bits)
    light, wide, sizes = _launch_facts(call, codes, moments is not None)
    out_bits_tensor, out_bits = split_width(call.output_num_bits)
    out_low, out_high = (None, None) if codes is None else (codes[0], codes[1:])
    out_high = out_high[0] if out_high is not None and len(out_high) else None
    several = bits_tensor is not None and len(conv.num_bits) > 1
    height, width = call.input.shape[3:]
    out_height, out_width = call.output_size
    pixels = height * width if conv.transposed else out_height * out_width
    pitch, *out_pitches = (
        _pitch(image, conv.out_channels) for image in (call.input[0], out_low, skip)
    )
    widest = max(*out_pitches, conv.out_channels)
    reach = max(height * width * pitch, out_height * out_width * widest)
    tiles = triton.cdiv(pixels, sizes["BLOCK_M"])
    assert moments is None or moments.shape[1] == tiles, "moments are of codes of 8 bits, as told"
    columns = triton.cdiv(conv.codes.shape[2], sizes["BLOCK_N"])
    gain, shift = call.affine or (None, None)
    with torch.cuda.device_of(call.input):
        conv_kernel[(call.samples * tiles * columns,)](
            call.input[0], call.input[1] if wide else None, bits_tensor, call.amax, conv.codes,
            conv.scale, conv.bias, call.residual, gain, shift, out_bits_tensor, call.output_amax,
            call.slots, call.count, stream, moments, out_low, out_high, skip,
            None if skip is None else call.skip_amax,
            bits, 0 if several or bits_tensor is not None else conv.variant(bits),
            _stride(call.amax), out_bits, _stride(call.output_amax), call.skip_num_bits,
            height, width, out_height, out_width, tiles, conv.codes.shape[3],
            C_IN=conv.in_channels, C_OUT=conv.out_channels, KERNEL=conv.kernel_size[0],
            STRIDE=1 if conv.transposed else conv.stride[0], PADDING=conv.padding[0],
            TRANSPOSED=conv.transposed, K=conv.codes.shape[3], PLANES=conv.codes.shape[1],
            PITCH=pitch, OUT_PITCH=out_pitches[0], SKIP_PITCH=out_pitches[1],
            WIDTHS=sum(1 << width for width in conv.num_bits) if several else 0,
            NARROW=light, WIDE=wide, RELU=call.relu, MILD=call.mild,
            INDEX=tl.int64 if reach >= 2**31 else tl.int32,
            enable_fp_fusion=False, **sizes,
        )


def shape_classes() -> dict[str, Callable[[], object]]:
    """Returns, by name, the launches of the shipped models; called with meta tensors by `aot.py`.

    U-Net-16 as the engine's plan runs it: the encoder's stages take 8 or 16 bits per slot, all else
    has 8; slots are counted on the device. The convolution before a stage, whose width is known
    only later, stores moments and codes of 8 bits beside the stream.
    """
    found: dict[str, Callable[[], object]] = {}
    # the block's size hangs on the number of pixels
    for side in (240, 128):
        _add_unet(found, side)
    return found


def _add_unet(found: dict[str, Callable[[], object]], full: int) -> None:
    """Adds the convolutions of U-Net-16 on slices of one side."""

    def add(name: str, c_in: int, c_out: int, kernel: int, side: int, **epilogue) -> None:
        label = f"{name}, {c_in} to {c_out} channels, {side}"
        found[label] = partial(_launch_meta, c_in, c_out, kernel, side, **epilogue)

    entry = {"stream": True, "affine": True, "relu": True, "moments": True}
    add("first convolution", 4, 16, 3, full, **entry)
    for level, blocks_of_stage in enumerate((1, 2, 2, 4)):
        c, side = 16 << level, full >> level
        mixed = {"mixed": True, "mixed_out": True}
        add("encoder block, first", c, c, 3, side, relu=True, **mixed)
        if blocks_of_stage > 1:
            second = {"residual": True, "stream": True, "affine": True, "relu": True, **mixed}
            add("encoder block, second", c, c, 3, side, **second)
        if level == 3:
            add("encoder block, last", c, c, 3, side, mixed=True, residual=True)
            break
        last = {"residual": True, "skip": True, **mixed}
        add("encoder block, last of its stage", c, c, 3, side, **last)
        add("down", c, 2 * c, 3, side, stride=2, mixed=True, **entry)
        add("decoder block, first", c, c, 3, side, relu=True)
        add("decoder block, second", c, c, 3, side, residual=True)


def _launch_meta(
    c_in: int, c_out: int, kernel: int, side: int, *, stride: int = 1, mixed: bool = False,
    mixed_out: bool = False, residual: bool = False, stream: bool = False, affine: bool = False,
    relu: bool = False, codes: bool = True, skip: bool = False, moments: bool = False,
) -> None:
    """Launches a convolution whose tensors have no memory."""
    empty = partial(torch.empty, device="meta", dtype=torch.float32)
    planes, depth = 1 + mixed, triton.cdiv(kernel**2 * c_in, K_MULTIPLE) * K_MULTIPLE
    conv = PackedConv(
        empty(planes, planes, c_out, depth, dtype=torch.int8),
        empty(planes, 2, c_out), empty(2, c_out),
        (8, 16)[:planes], c_in, (kernel, kernel), (stride, stride),
        (kernel // 2, kernel // 2), (1, 1), 1, False,
    )
    widths, one = empty(2, dtype=torch.int32), empty(1)
    constants = empty(2, c_out)
    call = ConvCall(
        empty(planes, 2, side, side, c_in, dtype=torch.int8).permute(0, 1, 4, 2, 3), conv, one,
        widths if mixed else 8, None, (constants, constants) if affine else None, relu,
        one if codes else None, widths if mixed_out else 8, None, one.int(), one,
        mild=True,
    )
    shape = call.output_planes, 2, *call.output_size, c_out
    out = empty(*shape, dtype=torch.int8).permute(0, 1, 4, 2, 3)
    total = empty(2, *call.output_size, c_out, dtype=torch.float16).permute(0, 3, 1, 2)
    call = replace(call, residual=total if residual else None)
    found = new_moments(call)[0] if moments else None
    run(call, total if stream else None, out if codes else None, out[0] if skip else None, found)
