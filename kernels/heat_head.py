"""The end of a `HeatmapLocator` for inference: its last two 1x1 convolutions and centre of mass.

    heat = map(relu(conv(in)))                       batch norm folded into conv, map to one channel
    share = softmax of heat over all cells
    centre = sum over cells of share * ((cell + 0.5) / cells - 0.5)                      per axis
    out = logit(clamp(0.5 + gain / play * centre, edge, 1 - edge))

All is computed in float32 (float64 for float64) from weights and input as they are: nothing between
is rounded. A softmax does not change with the map's bias, which is left out. The form of the answer
is that of integral regression, Sun et al. 2018; `meddanet.networks.heatmap` has the layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import triton_runs
from .conv_call import dense_pixels
from .layout import in_its_own_dtype, wide_dtype
from .pointwise import pointwise_matrix, pointwise_reference
from .shuffle_pack import KERNEL_DTYPES, Layer, checked_input

# bytes of a row or a column of the weight: larger ones do not fit into registers
WIDEST = 256


class PackedHeatHead(NamedTuple):
    """The weights of a head as `heat_head` takes them.

    Attributes:
        weight: [Cin, L] of the first convolution in the tensors' dtype; both sides padded by zeros
            to the next power of two, at least 16.
        bias: [L], padded likewise, float32 (float64 if that is the tensors' dtype).
        map_weight: [L] of the convolution to the map, padded likewise, in the dtype of `bias`.
        gain: [2], (y, x), in the dtype of `bias`.
        in_channels: Without padding.
        edge: How near to 0 and 1 a place may come.
    """

    weight: Tensor
    bias: Tensor
    map_weight: Tensor
    gain: Tensor
    in_channels: int
    edge: float

    def to(self, device: torch.device | str) -> PackedHeatHead:
        """Returns the same on another device."""
        return self._replace(
            weight=self.weight.to(device), bias=self.bias.to(device),
            map_weight=self.map_weight.to(device), gain=self.gain.to(device),
        )


def pack_heat_head(last: Layer, map_weight: Tensor, gain: Tensor, edge: float) -> PackedHeatHead:
    """Packs two convolutions, norms folded, and a gain for `heat_head`.

    Args:
        last: Weight [L, Cin, 1, 1], floating point, and bias [L].
        map_weight: [1, L, 1, 1].
        gain: [2], (y, x).
        edge: How near to 0 and 1 a place may come, above 0 and below 1 / 2.

    Raises:
        ValueError: If a shape, a dtype or the edge does not fit.
    """
    matrix, bias = pointwise_matrix(last)
    hidden = len(last[1])
    if map_weight.shape != (1, hidden, 1, 1) or gain.shape != (2,):
        raise ValueError(
            f"map_weight must be {[1, hidden, 1, 1]} and gain [2], got {list(map_weight.shape)} "
            f"and {list(gain.shape)}"
        )
    if not 0 < edge < 0.5:
        raise ValueError(f"edge must lie between 0 and 0.5, got {edge}")
    constants = bias.dtype
    taps = F.pad(map_weight.detach().flatten().to(constants), (0, len(bias) - hidden))
    return PackedHeatHead(
        matrix, bias, taps, gain.detach().to(constants), last[0].shape[1], float(edge)
    )


@in_its_own_dtype
def _run_reference(
    input: Tensor, weight: Tensor, bias: Tensor, map_weight: Tensor, gain: Tensor,
    plays: Sequence[float], edge: float,
) -> Tensor:
    hidden = pointwise_reference(input, weight, bias)
    heat = (hidden * map_weight[:, None, None]).sum(1)
    share = heat.flatten(1).softmax(1).reshape(heat.shape)
    moved = []
    for axis, (side, play) in enumerate(zip(heat.shape[1:], plays, strict=True)):
        cell = torch.arange(side, device=heat.device, dtype=heat.dtype)
        centre = (share.sum(2 - axis) * ((cell + 0.5) / side - 0.5)).sum(1)
        moved.append(gain[axis] / play * centre)
    return (0.5 + torch.stack(moved, 1)).clamp(edge, 1 - edge).logit()


@torch.library.custom_op("meddanet::heat_head", mutates_args=())
def _heat_head(
    input: Tensor, weight: Tensor, bias: Tensor, map_weight: Tensor, gain: Tensor,
    plays: Sequence[float], edge: float, seen: Tensor | None,
) -> Tensor:
    """Returns the output [N, 2]."""
    output = _new_output(input)
    if not output.numel():
        return output
    small = max(weight.shape) * input.element_size() <= WIDEST
    if input.dtype in KERNEL_DTYPES and small and triton_runs(input):
        from .heat_head_triton import run

        run(output, dense_pixels(input), weight, bias, map_weight, gain, plays, edge, seen)
    else:
        output.copy_(_run_reference(input, weight, bias, map_weight, gain, plays, edge))
    return output


@_heat_head.register_fake
def _(input, weight, bias, map_weight, gain, plays, edge, seen):
    return _new_output(input)


def _new_output(input: Tensor) -> Tensor:
    return input.new_empty(input.shape[0], 2, dtype=wide_dtype(input))


def _checked(
    input: Tensor, head: PackedHeatHead, plays: Sequence[float], seen: Tensor | None = None
) -> tuple:
    """Checks the arguments and returns those of the operator."""
    input = checked_input(input, "head", head.in_channels, head.weight, seen)
    if len(plays) != 2 or not all(play > 0 for play in plays):
        raise ValueError(f"plays must be two shares above 0, got {list(plays)}")
    return input, *head[:4], list(plays), head.edge, seen


def heat_head_reference(input: Tensor, head: PackedHeatHead, plays: Sequence[float]) -> Tensor:
    """Plain PyTorch statement of `heat_head`, layer by layer, of every sample."""
    return _run_reference(*_checked(input, head, plays)[:7])


def heat_head(
    input: Tensor, head: PackedHeatHead, plays: Sequence[float], seen: Tensor | None = None
) -> Tensor:
    """Runs what follows the stages of a `HeatmapLocator` without gradients.

    Heads of more than 128 channels (64 in float32) into or out of the first convolution, and
    float64, run in the reference everywhere.

    Args:
        input: [N, Cin, H, W], float16, bfloat16, float32 or float64; channels last is not copied.
        head: From `pack_heat_head`, in the input's dtype and where the input is.
        plays: Free play of the crop as shares of the image's sides, (y, x), above 0.
        seen: int32 [N], where the input is: samples for which it is 0 may be left out, what the
            output holds of them is anything. None: all samples are seen.

    Returns:
        Logits of the crop's place [N, 2], (y, x), float32, or float64 for float64.

    Raises:
        ValueError: If a shape, dtype or device does not fit, or there is no free play.

    Source: Sun et al. 2018, for the centre of mass.
    """
    return _heat_head(*_checked(input, head, plays, seen))
