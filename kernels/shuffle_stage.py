"""Units of ShuffleNetV2 one after the other, for inference, batch norms folded into the weights.

    stride 1   out = [in_even, relu(mix(depth(relu(expand(in_odd)))))]
    stride 2   out = [relu(side_mix(side_depth(in))), relu(mix(depth(relu(expand(in)))))]

in_even and in_odd are the channels 0, 2, ... and 1, 3, ...: the shuffle before the split. expand,
mix and side_mix are 1x1 convolutions; depth and side_depth are 3x3 ones per channel, with a padding
of zeros: outside of the image relu(expand) is zero, not relu(bias). Ma et al. 2018, Fig. 3 (c, d).

Sums are float32 (float64 for float64). What layers of their own would store, after the ReLU of
expand and after depth, is rounded to the dtype of the tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import triton_runs
from .conv_call import dense_pixels
from .layout import in_its_own_dtype
from .shuffle_pack import KERNEL_DTYPES, PackedStage, checked_input

# bytes of a row of weights: wider ones fit neither into registers nor into small shared memories
WIDEST = 256


def _unit(
    input: Tensor, main: Sequence[Tensor], side: Sequence[Tensor], mid: int, channels: int
) -> Tensor:
    """Runs a unit as PyTorch's own layers."""
    branch = input if side else input[:, 1::2]
    width = branch.shape[1]

    def pointwise(x: Tensor, layer: Sequence[Tensor], outputs: int) -> Tensor:
        weight, bias = layer
        matrix = weight[: x.shape[1], :outputs].T[:, :, None, None]
        return F.conv2d(x, matrix, bias[:outputs].to(x.dtype)).relu()

    def depthwise(x: Tensor, layer: Sequence[Tensor]) -> Tensor:
        groups, stride = x.shape[1], 2 if side else 1
        taps, bias = (constants[..., :groups].to(x.dtype) for constants in layer)
        return F.conv2d(x, taps.T.reshape(groups, 1, 3, 3), bias, stride, 1, groups=groups)

    hidden = depthwise(pointwise(branch, main[:2], mid), main[2:4])
    mixed = pointwise(hidden, main[4:], channels - width)
    passed = pointwise(depthwise(input, side[:2]), side[2:], width) if side else input[:, 0::2]
    return torch.cat([passed, mixed], 1)


@in_its_own_dtype
def _run_reference(
    input: Tensor, first: Sequence[Tensor], rest: Sequence[Tensor], mids: Sequence[int],
    channels: int,
) -> Tensor:
    output = _unit(input, first[:6], first[6:], mids[0], channels)
    for unit in zip(*rest, strict=True):
        output = _unit(output, unit, (), mids[1], channels)
    return output


@torch.library.custom_op("meddanet::shuffle_stage", mutates_args=())
def _shuffle_stage(
    input: Tensor, first: Sequence[Tensor], rest: Sequence[Tensor], mids: Sequence[int],
    channels: int, seen: Tensor | None,
) -> Tensor:
    """Returns the output [N, channels, ...], channels last; `first` to `mids`: `PackedStage`."""
    output = _new_output(input, len(first) > 6, channels)
    if not output.numel():
        return output
    weights = [*first, *rest]
    widest = max(*first[0].shape, *(weight.shape[-1] for weight in weights)) * input.element_size()
    if input.dtype in KERNEL_DTYPES and widest <= WIDEST and triton_runs(input):
        from .shuffle_stage_triton import run

        run(output, dense_pixels(input), first, rest, mids, seen)
    else:
        output.copy_(_run_reference(input, first, rest, mids, channels))
    return output


@_shuffle_stage.register_fake
def _(input, first, rest, mids, channels, seen):
    return _new_output(input, len(first) > 6, channels)


def _new_output(input: Tensor, halved: bool, channels: int) -> Tensor:
    height, width = ((side + 1) // 2 if halved else side for side in input.shape[2:])
    return input.new_empty(input.shape[0], height, width, channels).permute(0, 3, 1, 2)


def _checked(input: Tensor, stage: PackedStage, seen: Tensor | None = None) -> tuple:
    """Checks the arguments and returns those of the operator."""
    input = checked_input(input, "stage", stage.in_channels, stage.first[0], seen)
    return input, stage.first, stage.rest, stage.mid_channels, stage.out_channels, seen


def shuffle_stage_reference(input: Tensor, stage: PackedStage) -> Tensor:
    """Plain PyTorch statement of `shuffle_stage`, layer by layer, of every sample."""
    return _run_reference(*_checked(input, stage)[:5])


def shuffle_stage(input: Tensor, stage: PackedStage, seen: Tensor | None = None) -> Tensor:
    """Runs units of ShuffleNetV2 without gradients.

    Units with more than 128 channels (64 in float32) into, within or out of a branch, and float64,
    run in the reference everywhere.

    Args:
        input: [N, Cin, H, W], float16, bfloat16, float32 or float64; channels last is not copied.
        stage: From `pack_stage`, in the input's dtype and where the input is.
        seen: int32 [N], where the input is: samples for which it is 0 may be left out, what the
            output holds of them is anything. None: all samples are seen.

    Returns:
        [N, Cout, H / stride, W / stride], rounded up, in the input's dtype, channels last.

    Raises:
        ValueError: If a shape, dtype or device does not fit.

    Source: Ma et al. 2018, Fig. 3 (c, d) and Table 5 (Stage2 to Stage4).
    """
    return _shuffle_stage(*_checked(input, stage, seen))
