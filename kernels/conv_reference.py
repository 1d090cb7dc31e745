"""The integer convolution in plain PyTorch: group by group of slots that share widths and ranges.

The order of roundings is the one that `conv_int.py` states; executors that only bring their own
integer sum call `finish` with it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .conv_call import ConvCall, check_planes, largest_code, step_of
from .conv_pack import split_codes, unpack_weight
from .grid import quantize_codes
from .pairs import join_floats, times_step


class Group(NamedTuple):
    """Slots that share widths and ranges.

    Attributes:
        slots: Indices into the outputs; all of them as a slice.
        samples: Indices into the input, likewise.
        num_bits: Width of the input codes.
        output_num_bits: Width of the output codes.
        step: Of the input, float32 scalar.
        output_step: Of the output codes, or None.
    """

    slots: slice | list[int]
    samples: slice | list[int]
    num_bits: int
    output_num_bits: int
    step: Tensor
    output_step: Tensor | None


def groups(call: ConvCall) -> list[Group]:
    """Returns the groups of the slots in use."""

    def width(num_bits: int | Tensor, index: int) -> int:
        return num_bits if isinstance(num_bits, int) else int(num_bits[index])

    used = call.samples if call.count is None else max(0, min(int(call.count), call.samples))
    samples = list(range(used)) if call.slots is None else call.slots[:used].tolist()
    shared = len(call.amax) == 1, call.output_amax is None or len(call.output_amax) == 1
    found: dict[tuple[int, int, int, int], list[int]] = {}
    for slot, sample in enumerate(samples):
        ranges = (0 if shared[0] else sample, 0 if shared[1] else slot)
        widths = width(call.num_bits, sample), width(call.output_num_bits, slot)
        check_planes(call.input, widths[0])
        found.setdefault((*widths, *ranges), []).append(slot)
    everything = len(found) == 1 and used == call.samples
    return [
        Group(
            slice(None) if everything else slots,
            slice(None) if everything and call.slots is None else [samples[m] for m in slots],
            num_bits, output_num_bits, step_of(call.amax, n, num_bits),
            None if call.output_amax is None else step_of(call.output_amax, m, output_num_bits),
        )
        for (num_bits, output_num_bits, n, m), slots in found.items()
    ]


def integer_sum(call: ConvCall, group: Group) -> Tensor:
    """Returns a group's exact sums, [M', Cout, Hout, Wout]: float64 holds every such integer."""
    conv = call.conv
    planes = call.input[:, group.samples].double()
    codes = planes[0] + 256 * planes[1] if group.num_bits > 8 else planes[0]
    weight = unpack_weight(conv, conv.variant(group.num_bits))
    if conv.transposed:
        return F.conv_transpose2d(codes, weight, None, conv.stride, conv.padding)
    return F.conv2d(codes, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)


def run(
    call: ConvCall, stream: Tensor | None, codes: Tensor | None, skip: Tensor | None = None
) -> None:
    """Computes the call and writes what is asked for, as `conv_int_triton.run` does."""
    for group in groups(call):
        finish(call, group, integer_sum(call, group), stream, codes, skip)


def finish(
    call: ConvCall, group: Group, total: Tensor, stream: Tensor | None, codes: Tensor | None,
    skip: Tensor | None = None,
) -> None:
    """Does all that follows the sums of one group and writes it."""
    conv = call.conv
    precise = codes is not None and group.output_num_bits > 8
    dtype = torch.float64 if precise else torch.float32

    def row(values: Tensor) -> Tensor:
        return values.reshape(1, -1, 1, 1)

    scale = times_step(conv.scale[conv.variant(group.num_bits)], group.step, dtype)
    value = total.to(dtype) * row(scale)
    value += row(join_floats(conv.bias, dtype))
    if call.residual is not None:
        value += call.residual[group.slots].to(dtype)
    if stream is not None:
        stream[group.slots] = value.float().to(stream.dtype)
    if skip is not None:
        assert call.skip_amax is not None, "skip codes need a range"
        step = step_of(call.skip_amax, 0, call.skip_num_bits)
        largest = largest_code(call.skip_num_bits)
        quantised = quantize_codes(value.float(), step, largest).nan_to_num_(0.0)
        skip[group.slots] = quantised.to(torch.int8)
    if codes is None or group.output_step is None:
        return
    if call.affine is not None:
        value *= row(join_floats(call.affine[0], dtype))
        value += row(join_floats(call.affine[1], dtype))
    if call.relu:
        value.relu_()
    largest = largest_code(group.output_num_bits)
    quantised = quantize_codes(value.float(), group.output_step, largest).nan_to_num_(0.0)
    if group.output_num_bits <= 8:
        codes[0, group.slots] = quantised.to(torch.int8)
    else:
        codes[:, group.slots] = split_codes(quantised)
