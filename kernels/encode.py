"""Floats to the codes of an integer convolution, with a shift, a norm and a ReLU on the way.

    value(i, j) = ReLU(input(i + y, j + x) * gain_c + shift_c),   input = 0 outside of its image
    code        = clamp(round_half_even(value / step), +-qmax(b))

(y, x) is a whole-pixel offset per slot: an image's crop, or, negative, a patch's place in a zero
canvas, so that neither is written before it is quantised. Inference of Med-DANet V2, section 3.3,
on the grid of Eq. 6.

Numerics are those of `conv_int.py`: float32, each product and sum rounded on its own, where codes
have at most 8 bits; beyond, the affine map is carried in float64 (on a GPU in two float32) and
rounded to float32 once. float64 inputs stay in float64, without a kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import triton_runs
from .conv_call import pixel_pitch, step_of
from .conv_pack import byte_planes, split_codes
from .crop_paste import overlap
from .encode_call import EncodeCall
from .grid import qmax, quantize_codes
from .layout import as_pair, wide_dtype
from .pairs import join_floats, split_affine
from .quantize import check_num_bits, split_width, whole_width
from .slots import check_offset, integers


def _window(call: EncodeCall, slot: int) -> Tensor:
    """Returns the shifted input of a slot, [C, height, width]."""
    image = call.input[slot if call.slots is None else int(call.slots[slot])]
    y, x = (0, 0) if call.offset is None else call.offset[slot].tolist()
    window = image.new_zeros(image.shape[0], *call.size)
    rows, rows_in = overlap(y, call.size[0], image.shape[1])
    columns, columns_in = overlap(x, call.size[1], image.shape[2])
    window[:, rows, columns] = image[:, rows_in, columns_in]
    return window


def _value(call: EncodeCall, window: Tensor, width: int) -> Tensor:
    """Returns what is quantised, in float32, or float64 for float64 inputs."""
    narrow = wide_dtype(window)
    if call.affine is not None:
        wide = torch.float64 if width > 8 else narrow
        gain, shift = (join_floats(t, wide)[:, None, None] for t in call.affine)
        window = window.to(wide) * gain + shift
    value = window.to(narrow)
    # a comparison keeps a NaN
    return torch.where(value < 0, 0, value) if call.relu else value


def run_reference(call: EncodeCall, codes: Tensor) -> None:
    """Writes slot by slot into given outputs, as `encode_triton.run` does."""
    used = call.samples if call.count is None else min(int(call.count), call.samples)
    for slot in range(used):
        width = call.num_bits if isinstance(call.num_bits, int) else int(call.num_bits[slot])
        if 0 < width == call.done:
            continue
        if 2 <= width <= 16:
            step = step_of(call.amax, slot, width)
            value = _value(call, _window(call, slot), width)
            values = quantize_codes(value, step, int(qmax(width)))
            planes = split_codes(values.nan_to_num_(0.0)[None])[:, 0]
            # a narrow slot's high plane is nobody's
            planes = planes[: 1 if width <= 8 else 2]
        else:
            planes = torch.zeros_like(codes[:1, slot])
        codes[: len(planes), slot] = planes


@torch.library.custom_op("meddanet::encode", mutates_args=())
def _encode(
    input: Tensor,
    amax: Tensor,
    height: int,
    width: int,
    num_bits: Tensor | None,
    one_width: int,
    gain: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    offset: Tensor | None,
    slots: Tensor | None,
    count: Tensor | None,
) -> Tensor:
    """Returns byte planes [P, M, C, height, width]."""
    # an exported program was traced with other layouts than it may meet
    if pixel_pitch(input) is None and not input.is_contiguous():
        input = input.contiguous(memory_format=torch.channels_last)
    call = EncodeCall(
        input, amax, (height, width), one_width if num_bits is None else num_bits,
        None if gain is None or shift is None else (gain, shift), relu, offset, slots, count,
    )
    codes = call.new_codes()
    if codes.numel():
        if triton_runs(input) and input.dtype != torch.float64:
            from .encode_triton import run

            run(call, codes)
        else:
            run_reference(call, codes)
    return codes


@_encode.register_fake
def _(input, amax, height, width, num_bits, one_width, *others):
    # len() would fix a size that tracing leaves open
    samples = (input if others[-2] is None else others[-2]).shape[0]
    planes = byte_planes(one_width if num_bits is None else num_bits)
    shape = (planes, samples, height, width, input.shape[1])
    return input.new_empty(shape, dtype=torch.int8).permute(0, 1, 4, 2, 3)


def _checked(
    input: Tensor, amax: Tensor, num_bits: int | Tensor, affine: tuple[Tensor, Tensor] | None,
    relu: bool, offset: Tensor | None, size: int | tuple[int, int] | None, slots: Tensor | None,
    count: Tensor | None,
) -> EncodeCall:
    """Checks the arguments of `encode` and brings them in form."""
    if input.dim() != 4 or not input.is_floating_point():
        raise ValueError(
            f"input must be [N, C, H, W] in floating point, got {input.dtype} {list(input.shape)}"
        )
    samples, channels = (input if slots is None else slots).shape[0], input.shape[1]
    check_num_bits("num_bits", num_bits, samples)
    if amax.numel() not in (1, samples):
        raise ValueError(
            f"amax must hold one value or one per slot, {samples}, got shape {list(amax.shape)}"
        )
    if offset is not None:
        check_offset(offset, samples)
    offset, slots, count = integers(offset, slots, count)
    return EncodeCall(
        input.detach(), amax.detach().to(wide_dtype(input)).reshape(-1),
        (input.shape[2], input.shape[3]) if size is None else as_pair(size),
        whole_width(num_bits), split_affine(affine, channels), relu, offset, slots, count,
    )


def _named(planes: Tensor) -> Tensor:
    return planes[0] if len(planes) == 1 else planes


def encode_reference(
    input: Tensor,
    amax: Tensor,
    num_bits: int | Tensor = 8,
    *,
    affine: tuple[Tensor, Tensor] | None = None,
    relu: bool = False,
    offset: Tensor | None = None,
    size: int | tuple[int, int] | None = None,
    slots: Tensor | None = None,
    count: Tensor | None = None,
) -> Tensor:
    """Plain PyTorch statement of `encode`, slot by slot."""
    call = _checked(input, amax, num_bits, affine, relu, offset, size, slots, count)
    codes = call.new_codes()
    run_reference(call, codes)
    return _named(codes)


def encode(
    input: Tensor,
    amax: Tensor,
    num_bits: int | Tensor = 8,
    *,
    affine: tuple[Tensor, Tensor] | None = None,
    relu: bool = False,
    offset: Tensor | None = None,
    size: int | tuple[int, int] | None = None,
    slots: Tensor | None = None,
    count: Tensor | None = None,
) -> Tensor:
    """Quantises to codes: what `fake_quantize` multiplies by the step.

    Args:
        input: [N, C, H, W], floating point.
        amax: Range, one value or one per slot [M].
        num_bits: Int, or a tensor [M].
        affine: (gain, shift), [C], of the norm before the convolution, or None.
        relu: Whether values below zero become zero before they are quantised.
        offset: Integer [M, 2], (y, x), in pixels: output pixel (i, j) is input pixel
            (i + y, j + x), zero outside. None: 0.
        size: P or (height, width) of the output; None: the input's.
        slots: Integer [M], from 0 to N - 1, which is not looked at: slot m of the output reads
            sample slots[m]; None: m reads m.
        count: Integer tensor of one element: slots from here on are left zero; None: all are used.

    Returns:
        int8 [M, C, height, width], or byte planes [2, M, C, height, width] for a tensor or a width
        above 8; channels last. A NaN has no code and becomes 0.

    Raises:
        ValueError: If a shape, dtype or width does not fit.

    Source: Med-DANet V2, Eq. 6.
    """
    call = _checked(input, amax, num_bits, affine, relu, offset, size, slots, count)
    return _named(_encode(
        call.input, call.amax, *call.size, *split_width(call.num_bits),
        *(call.affine or (None, None)), call.relu, call.offset, call.slots, call.count,
    ))
