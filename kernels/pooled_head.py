"""The end of ShuffleNetV2 for inference: its last 1x1 convolution, mean and classifier.

    out = classifier(mean over pixels of relu(conv(in)))        batch norm folded into conv

All is computed in float32 (float64 for float64) from weights and input as they are: nothing between
is rounded. Ma et al. 2018, Table 5, the last three rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import triton_runs
from .conv_call import dense_pixels
from .layout import in_its_own_dtype, wide_dtype
from .pointwise import pointwise_matrix, pointwise_reference
from .shuffle_pack import KERNEL_DTYPES, Layer, checked_input

# bytes of a pixel's channels and outputs: what is larger does not fit into registers
WIDEST, MOST_OUTPUTS = 512, 32


class PackedPooledHead(NamedTuple):
    """The weights of a head as `pooled_head` takes them.

    Attributes:
        weight: [Cin, L] of the convolution in the tensors' dtype; both sides padded by zeros to the
            next power of two, at least 16.
        bias: [L], padded likewise, float32 (float64 if that is the tensors' dtype).
        classifier: [L, K] in the tensors' dtype, L padded as above, K to the next power of two.
        classifier_bias: [K], padded likewise, in the dtype of `bias`, or None.
        in_channels, outputs: Without padding.
    """

    weight: Tensor
    bias: Tensor
    classifier: Tensor
    classifier_bias: Tensor | None
    in_channels: int
    outputs: int

    def to(self, device: torch.device | str) -> PackedPooledHead:
        """Returns the same on another device."""
        bias = self.classifier_bias
        return self._replace(
            weight=self.weight.to(device), bias=self.bias.to(device),
            classifier=self.classifier.to(device),
            classifier_bias=None if bias is None else bias.to(device),
        )


def pack_pooled_head(
    last: Layer, classifier: Tensor, classifier_bias: Tensor | None = None
) -> PackedPooledHead:
    """Packs a convolution, its norm folded, and a linear layer for `pooled_head`.

    Args:
        last: Weight [L, Cin, 1, 1], floating point, and bias [L].
        classifier: [K, L], in the dtype of that weight.
        classifier_bias: [K], or None.

    Raises:
        ValueError: If shapes do not fit each other, or dtypes differ.
    """
    matrix, bias = pointwise_matrix(last)
    hidden, dtype = len(last[1]), matrix.dtype
    if classifier.dim() != 2 or classifier.shape[1] != hidden or classifier.dtype != dtype:
        raise ValueError(
            f"classifier must be [K, {hidden}] in {dtype}, got "
            f"{classifier.dtype} {list(classifier.shape)}"
        )
    outputs = len(classifier)
    more = (1 << (outputs - 1).bit_length()) - outputs
    rows = F.pad(classifier.detach().T, (0, more, 0, len(bias) - hidden)).contiguous()
    if classifier_bias is not None:
        if classifier_bias.shape != (outputs,):
            raise ValueError(
                f"classifier_bias must be {[outputs]}, got {list(classifier_bias.shape)}"
            )
        classifier_bias = F.pad(classifier_bias.detach().to(bias.dtype), (0, more))
    return PackedPooledHead(matrix, bias, rows, classifier_bias, last[0].shape[1], outputs)


@in_its_own_dtype
def _run_reference(
    input: Tensor, weight: Tensor, bias: Tensor, classifier: Tensor,
    classifier_bias: Tensor | None, outputs: int,
) -> Tensor:
    pooled = pointwise_reference(input, weight, bias).mean((2, 3))
    # cuBLAS has memory that PyTorch may free while a graph still writes there
    sums = (pooled[:, None] * classifier[:, :outputs].T.to(pooled.dtype)).sum(2)
    return sums if classifier_bias is None else sums + classifier_bias[:outputs]


@torch.library.custom_op("meddanet::pooled_head", mutates_args=())
def _pooled_head(
    input: Tensor, weight: Tensor, bias: Tensor, classifier: Tensor,
    classifier_bias: Tensor | None, outputs: int, seen: Tensor | None,
) -> Tensor:
    """Returns the output [N, outputs]."""
    output = _new_output(input, outputs)
    if not output.numel():
        return output
    small = len(weight) * input.element_size() <= WIDEST and classifier.shape[1] <= MOST_OUTPUTS
    if input.dtype in KERNEL_DTYPES and small and triton_runs(input):
        from .pooled_head_triton import run

        run(output, dense_pixels(input), weight, bias, classifier, classifier_bias, seen)
    else:
        output.copy_(_run_reference(input, weight, bias, classifier, classifier_bias, outputs))
    return output


@_pooled_head.register_fake
def _(input, weight, bias, classifier, classifier_bias, outputs, seen):
    return _new_output(input, outputs)


def _new_output(input: Tensor, outputs: int) -> Tensor:
    return input.new_empty(input.shape[0], outputs, dtype=wide_dtype(input))


def _checked(input: Tensor, head: PackedPooledHead, seen: Tensor | None = None) -> tuple:
    """Checks the arguments and returns those of the operator."""
    input = checked_input(input, "head", head.in_channels, head.weight, seen)
    return input, *head[:4], head.outputs, seen


def pooled_head_reference(input: Tensor, head: PackedPooledHead) -> Tensor:
    """Plain PyTorch statement of `pooled_head`, layer by layer, of every sample."""
    return _run_reference(*_checked(input, head)[:6])


def pooled_head(input: Tensor, head: PackedPooledHead, seen: Tensor | None = None) -> Tensor:
    """Runs what follows the stages of ShuffleNetV2 without gradients.

    Heads of more than 256 channels (128 in float32) or 32 outputs, and float64, run in the
    reference everywhere.

    Args:
        input: [N, Cin, H, W], float16, bfloat16, float32 or float64; channels last is not copied.
        head: From `pack_pooled_head`, in the input's dtype and where the input is.
        seen: int32 [N], where the input is: samples for which it is 0 may be left out, what the
            output holds of them is anything. None: all samples are seen.

    Returns:
        [N, K], float32, or float64 for float64.

    Raises:
        ValueError: If a shape, dtype or device does not fit.

    Source: Ma et al. 2018, Table 5 (Conv5, GlobalPool and FC).
    """
    return _pooled_head(*_checked(input, head, seen))
