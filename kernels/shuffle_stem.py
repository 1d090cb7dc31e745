"""The stem of ShuffleNetV2 for inference, its batch norm folded into weight and bias.

    out = max_pool(relu(conv(in)))        conv 3x3 and max_pool 3x3, both of stride 2 and padding 1

Sums are float32 (float64 for float64), rounded once to the dtype of the tensors: rounding and
maximum may change places. Ma et al. 2018, Table 5, the first two rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import triton_runs
from .conv_call import dense_pixels
from .layout import in_its_own_dtype
from .shuffle_pack import KERNEL_DTYPES, checked_input, padded, padded_matrix

# rows and columns of the weight, and bytes of the pixels under a row of taps; larger ones fit
# neither into registers nor into shared memories
LARGEST, LARGEST_LINE = 256, 256


class PackedStem(NamedTuple):
    """The weights of a stem as `shuffle_stem` takes them.

    Attributes:
        weight: [9 * Cin, Cout] in the tensors' dtype, rows by tap, then by channel; both sides
            padded by zeros to the next power of two, at least 16.
        bias: [Cout], padded likewise, float32 (float64 if that is the tensors' dtype).
        in_channels, out_channels: Without padding.
    """

    weight: Tensor
    bias: Tensor
    in_channels: int
    out_channels: int

    def to(self, device: torch.device | str) -> PackedStem:
        """Returns the same on another device."""
        return self._replace(weight=self.weight.to(device), bias=self.bias.to(device))


def pack_stem(weight: Tensor, bias: Tensor) -> PackedStem:
    """Packs a convolution, its norm folded, for `shuffle_stem`.

    Args:
        weight: [Cout, Cin, 3, 3], floating point.
        bias: [Cout].

    Raises:
        ValueError: If a shape or dtype does not fit.
    """
    if weight.dim() != 4 or weight.shape[2:] != (3, 3) or not weight.dtype.is_floating_point:
        raise ValueError(
            "weight must be [Cout, Cin, 3, 3] in floating point, got "
            f"{weight.dtype} {list(weight.shape)}"
        )
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be {[weight.shape[0]]}, got {list(bias.shape)}")
    channels = weight.shape[1]
    matrix = weight.detach().permute(2, 3, 1, 0).flatten(0, 2)
    return PackedStem(*padded_matrix(matrix, bias), channels, len(bias))


@in_its_own_dtype
def _run_reference(input: Tensor, weight: Tensor, bias: Tensor, channels: int) -> Tensor:
    cin = input.shape[1]
    taps = weight[: 9 * cin, :channels].reshape(3, 3, cin, channels).permute(3, 2, 0, 1)
    sums = F.conv2d(input, taps, bias[:channels].to(input.dtype), 2, 1)
    return F.max_pool2d(sums.relu(), 3, 2, 1)


@torch.library.custom_op("meddanet::shuffle_stem", mutates_args=())
def _shuffle_stem(
    input: Tensor, weight: Tensor, bias: Tensor, channels: int, seen: Tensor | None
) -> Tensor:
    """Returns the output [N, channels, ...], channels last."""
    output = _new_output(input, channels)
    if not output.numel():
        return output
    if input.dtype in KERNEL_DTYPES and fits(input, weight) and triton_runs(input):
        from .shuffle_stem_triton import run

        run(output, dense_pixels(input), weight, bias, seen)
    else:
        output.copy_(_run_reference(input, weight, bias, channels))
    return output


def fits(input: Tensor, weight: Tensor) -> bool:
    """Tells whether the Triton kernel has room for a stem."""
    line = padded(3 * input.shape[1]) * input.element_size()
    return max(weight.shape) <= LARGEST and line <= LARGEST_LINE


@_shuffle_stem.register_fake
def _(input, weight, bias, channels, seen):
    return _new_output(input, channels)


def _new_output(input: Tensor, channels: int) -> Tensor:
    height, width = ((side + 3) // 4 for side in input.shape[2:])
    return input.new_empty(input.shape[0], height, width, channels).permute(0, 3, 1, 2)


def _checked(input: Tensor, stem: PackedStem, seen: Tensor | None = None) -> tuple:
    """Checks the arguments and returns those of the operator."""
    input = checked_input(input, "stem", stem.in_channels, stem.weight, seen)
    return input, stem.weight, stem.bias, stem.out_channels, seen


def shuffle_stem_reference(input: Tensor, stem: PackedStem) -> Tensor:
    """Plain PyTorch statement of `shuffle_stem`, layer by layer, of every sample."""
    return _run_reference(*_checked(input, stem)[:4])


def shuffle_stem(input: Tensor, stem: PackedStem, seen: Tensor | None = None) -> Tensor:
    """Runs the stem of ShuffleNetV2 without gradients.

    Stems with more than 256 weights per output channel or output channels, those of more than 21
    channels in float32, and float64, run in the reference everywhere.

    Args:
        input: [N, Cin, H, W], float16, bfloat16, float32 or float64; channels last is not copied.
        stem: From `pack_stem`, in the input's dtype and where the input is.
        seen: int32 [N], where the input is: samples for which it is 0 may be left out, what the
            output holds of them is anything. None: all samples are seen.

    Returns:
        [N, Cout, H / 4, W / 4], rounded up, in the input's dtype, channels last.

    Raises:
        ValueError: If a shape, dtype or device does not fit.

    Source: Ma et al. 2018, Table 5 (Conv1 and MaxPool).
    """
    return _shuffle_stem(*_checked(input, stem, seen))
