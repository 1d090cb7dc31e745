"""The last 1x1 convolution of inference, its argmax and the label map, in one pass.

    label(y + i, x + j) = argmax_k (<weight_k, input(i, j)> + bias_k),   0 (background) elsewhere

(y, x) is the whole-pixel corner of the region in its slice. Class scores are never stored: 16 bytes
of codes are read and one byte is written per pixel, where a convolution, an argmax and a paste move
33. Inference of Med-DANet V2, section 3.3, where the fractional paste of features comes earlier.

The input is a feature in floating point, or the codes that `quant_conv2d` stores; of these the
scores are exact sums times float32 constants, as there. The first of several largest classes wins,
and a NaN score counts as larger than any number, as in `torch.argmax`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import triton_runs
from .conv_call import pixel_pitch, step_of
from .conv_pack import PackedConv
from .layout import as_pair, in_its_own_dtype
from .pairs import times_step
from .slots import check_offset, integers

MAX_CLASSES = 256


def _scores(
    input: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor, amax: Tensor | None,
    num_bits: int, slot: int,
) -> Tensor:
    """Returns the float32 class scores of one region, [K, h, w]."""
    feature = input[slot : slot + 1]
    if scale is None or amax is None:
        return F.conv2d(feature.float(), weight.float()[:, :, None, None], bias.float())[0]
    channels = feature.shape[1]
    total = F.conv2d(feature.double(), weight[:, :channels, None, None].double())[0]
    factor = times_step(scale, step_of(amax, slot, num_bits), torch.float32)
    return total.float() * factor[:, None, None] + bias[:, None, None]


@in_its_own_dtype
def _run_reference(
    labels: Tensor, input: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor,
    amax: Tensor | None, num_bits: int, offset: Tensor, slots: Tensor | None, count: Tensor | None,
    margin: int = 0,
) -> None:
    """Writes the regions slot by slot into `labels`."""
    (height, width), corners = input.shape[2:], offset.tolist()
    used = len(input) if count is None else min(int(count), len(input))
    for slot in range(used):
        label = _scores(input, weight, scale, bias, amax, num_bits, slot).argmax(0)
        (rows, rows_in), (columns, columns_in) = (
            _written(start, length, end, margin)
            for start, length, end in zip(
                corners[slot], (height, width), labels.shape[1:], strict=True
            )
        )
        target = labels[slot if slots is None else int(slots[slot]), rows, columns]
        target.copy_(label[rows_in, columns_in])


def _written(start: int, length: int, end: int, margin: int) -> tuple[slice, slice]:
    """Returns along one axis what a region writes in its slice, and where that lies in itself."""
    first = start + margin if start > 0 else 0
    last = start + length - margin if start + length < end else end
    last = max(first, last)
    return slice(first, last), slice(first - start, last - start)


@torch.library.custom_op("meddanet::label_head", mutates_args=())
def _label_head(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor,
    amax: Tensor | None,
    num_bits: int,
    offset: Tensor,
    slots: Tensor | None,
    count: Tensor | None,
    slices: int,
    height: int,
    width: int,
    margin: int = 0,
) -> Tensor:
    """Returns labels [slices, height, width]; weight [K, C], scale [2, K] for codes, or None."""
    labels = torch.zeros(slices, height, width, dtype=torch.uint8, device=input.device)
    if len(input) == 0:
        return labels
    # an exported program was traced with other layouts than it may meet
    if pixel_pitch(input) is None:
        input = input.contiguous(memory_format=torch.channels_last)
    arguments = (labels, input, weight, scale, bias, amax, num_bits, offset, slots, count, margin)
    if triton_runs(input):
        from .head_triton import run

        run(*arguments)
    else:
        _run_reference(*arguments)
    return labels


@_label_head.register_fake
def _(input, weight, scale, bias, amax, num_bits, offset, slots, count, slices, *size_and_margin):
    height, width = size_and_margin[:2]
    return input.new_empty(slices, height, width, dtype=torch.uint8)


def _checked(
    input: Tensor, weight: Tensor | PackedConv, bias: Tensor | None, offset: Tensor,
    size: int | tuple[int, int], slices: int | None, amax: Tensor | None, num_bits: int,
    slots: Tensor | None, count: Tensor | None, margin: int,
) -> tuple[tuple, tuple[int, int, int]]:
    """Checks the arguments; returns those of a run, from the input on, and the labels' shape."""
    if input.dim() != 4:
        raise ValueError(f"input must be [M, C, h, w], got shape {list(input.shape)}")
    samples, channels = input.shape[:2]
    scale = None
    if isinstance(weight, PackedConv):
        if input.dtype != torch.int8 or amax is None or amax.numel() not in (1, samples):
            raise ValueError(
                "packed weights take int8 codes and their range amax, one value or one per slot; "
                "codes of more than 8 bits go through quant_conv2d"
            )
        if bias is not None or (weight.kernel_size, weight.stride, weight.padding) != (
            (1, 1), (1, 1), (0, 0)
        ) or weight.groups != 1 or not 2 <= num_bits <= 8:
            raise ValueError("packed weights must be a 1x1, with their own bias, for 2..8 bits")
        variant, inputs = weight.variant(num_bits), weight.in_channels
        rows, scale, bias = weight.codes[variant, 0], weight.scale[variant], weight.bias[0]
        amax = amax.detach().float().reshape(-1)
    else:
        square = weight.dim() > 1 and weight.shape[2:].numel() == 1
        if not input.is_floating_point() or not square:
            raise ValueError(
                f"weights [K, C] or [K, C, 1, 1] take a floating-point input, got {input.dtype} "
                f"and weights {list(weight.shape)}; codes need weights from pack_conv"
            )
        rows, inputs, amax = weight.detach().flatten(1).float().contiguous(), weight.shape[1], None
        bias = rows.new_zeros(len(rows)) if bias is None else bias.detach().float()
        if bias.shape != rows.shape[:1]:
            raise ValueError(f"bias must be [{len(rows)}], got shape {list(bias.shape)}")
    if inputs != channels:
        raise ValueError(f"input has {channels} channels, weights take {inputs}")
    if margin < 0:
        raise ValueError(f"margin must be at least 0, got {margin}")
    if not 1 <= len(rows) <= MAX_CLASSES:
        raise ValueError(f"labels are bytes: 1 to {MAX_CLASSES} classes, got {len(rows)}")
    check_offset(offset, samples)
    if slots is not None and slots.shape != (samples,):
        raise ValueError(f"slots must be [{samples}], got shape {list(slots.shape)}")
    if slots is None and slices is not None and slices < samples:
        raise ValueError(f"{samples} regions need as many slices, got {slices}: give slots")
    whole = integers(offset, slots, count)
    arguments = input.detach(), rows, scale, bias, amax, num_bits, *whole, margin
    return arguments, (samples if slices is None else slices, *as_pair(size))


def label_head_reference(
    input: Tensor,
    weight: Tensor | PackedConv,
    bias: Tensor | None = None,
    *,
    offset: Tensor,
    size: int | tuple[int, int],
    slices: int | None = None,
    amax: Tensor | None = None,
    num_bits: int = 8,
    slots: Tensor | None = None,
    count: Tensor | None = None,
    margin: int = 0,
) -> Tensor:
    """Plain PyTorch statement of `label_head`, slot by slot."""
    arguments, shape = _checked(
        input, weight, bias, offset, size, slices, amax, num_bits, slots, count, margin
    )
    labels = torch.zeros(shape, dtype=torch.uint8, device=input.device)
    _run_reference(labels, *arguments)
    return labels


def label_head(
    input: Tensor,
    weight: Tensor | PackedConv,
    bias: Tensor | None = None,
    *,
    offset: Tensor,
    size: int | tuple[int, int],
    slices: int | None = None,
    amax: Tensor | None = None,
    num_bits: int = 8,
    slots: Tensor | None = None,
    count: Tensor | None = None,
    margin: int = 0,
) -> Tensor:
    """Writes the most probable class of every pixel of a region into its label slice.

    Args:
        input: [M, C, h, w], channels last: a float32, float16 or bfloat16 feature (scores in
            float32), or int8 codes.
        weight: [K, C] or [K, C, 1, 1] for a feature; a 1x1 from `pack_conv` for codes.
        bias: [K] or None for a feature; a packed convolution has its own.
        offset: Integer [M, 2], (y, x), in pixels, of the region's top-left corner; what lies
            outside of the slice is dropped.
        size: (H, W) of a slice, or an int for a square one.
        slices: Number of slices; None: M.
        amax: Range of the codes, one value or one per slot.
        num_bits: Width of the codes, 2..8.
        slots: Integer [M]: region m belongs to slice slots[m], each slice at most once; None: to
            slice m.
        count: Integer tensor of one element: regions from here on are left out; None: all are in.
        margin: Pixels along the region's edges that are not written, but where an edge is at or
            beyond the slice's own: what a convolution's padding has spoiled.

    Returns:
        uint8 [slices, H, W], 0 outside of the regions.

    Raises:
        ValueError: If a shape, dtype or width does not fit.

    Source: Med-DANet V2, section 3.3.
    """
    (*arguments, margin), shape = _checked(
        input, weight, bias, offset, size, slices, amax, num_bits, slots, count, margin
    )
    return _label_head(*arguments, *shape, margin)
