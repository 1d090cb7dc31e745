"""One weight, several widths: samples that chose the same width run as one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .quantize import LN2, fake_quantize


def weight_amax(weight: Tensor, per_channel: bool) -> Tensor:
    """Returns max|weight|: of the tensor, or per output channel as [Cout, 1, 1, 1]."""
    magnitude = weight.detach().abs()
    if not per_channel:
        return magnitude.amax()
    return magnitude.amax(tuple(range(1, weight.dim())), keepdim=True)


def by_width(*num_bits: int | Tensor) -> Iterator[tuple[tuple[int, ...], Tensor | slice]]:
    """Yields each distinct combination of widths and the samples that chose it; all as a slice.

    Args:
        *num_bits: Each an int or a tensor [N]; a NaN in it counts as 0.
    """
    tensors = {id(bits): bits for bits in num_bits if isinstance(bits, Tensor)}
    if not tensors:
        yield tuple(int(bits) for bits in num_bits), slice(None)
        return
    # a straight-through sum leaves noise on whole numbers
    columns = [bits.detach().round().float() for bits in tensors.values()]
    chosen = torch.stack(columns, 1).nan_to_num()
    distinct = chosen.unique(dim=0)
    for row, widths in zip(distinct, distinct.tolist(), strict=True):
        found = dict(zip(tensors, widths, strict=True))
        everyone = len(distinct) == 1
        yield (
            tuple(int(found.get(id(bits), bits)) for bits in num_bits),
            slice(None) if everyone else (chosen == row).all(1).nonzero().squeeze(1),
        )


def conv_per_width(
    convolve: Callable[[Tensor, Tensor], Tensor],
    input: Tensor,
    weight: Tensor,
    num_bits: Tensor,
    amax: Tensor,
) -> Tensor:
    """Runs `convolve(input, weight)` once per distinct width, on the samples that chose it.

    Args:
        convolve: Function of (input [M, ...], weight) -> output [M, ...], without bias.
        input: [N, ...] with N >= 1, already quantised.
        weight: The layer's float weight.
        num_bits: [N], int or float widths.
        amax: Range of the weight.
    """
    outputs, order = [], []
    for (width,), samples in by_width(num_bits):
        quantised = fake_quantize(weight, width, amax)
        output = convolve(input[samples], quantised)
        if num_bits.requires_grad:
            # zero in value; its derivative by the width is the one stated above
            slope = LN2 * convolve(input[samples], weight - quantised).detach()
            chosen = num_bits[samples].to(output.dtype)
            chosen = chosen.reshape(-1, *[1] * (output.dim() - 1))
            output = output + (chosen - chosen.detach()) * slope
        if isinstance(samples, slice):
            return output
        outputs.append(output)
        order.append(samples)
    return torch.cat(outputs).index_select(0, torch.cat(order).argsort())
