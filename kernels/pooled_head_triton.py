"""The Triton kernel of the end of ShuffleNetV2; `pooled_head.py` has the equation.

Mean and classifier are linear, so parts of a sample's pixels and of the convolution's columns are
classified as they come, and sums of answers are all that is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .backend import tl, triton
from .pointwise_triton import pixels_of, pointwise
from .shuffle_pack import padded

# pixels at a time: the least that a tensor core takes, and all of the shipped policy's map
BLOCK_M = 16
# bytes of the weights' columns that are on their way at a time, and the most columns
BYTES, MOST_COLUMNS = 1 << 14, 64


@triton.jit(do_not_specialize=["pixels"])
def pooled_head_kernel(
    in_ptr, weight_ptr, bias_ptr, classifier_ptr, classifier_bias_ptr, seen_ptr, out_ptr, pixels,
    CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_O: tl.constexpr,
):
    """Computes the answers of one sample."""
    sample = tl.program_id(0)
    if seen_ptr is not None and tl.load(seen_ptr + sample) == 0:
        return
    in_ptr += sample.to(tl.int64) * pixels * CHANNELS
    k, out = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_O)

    total = tl.zeros([BLOCK_L, BLOCK_O], tl.float32)
    for first in tl.range(0, pixels, BLOCK_M):
        pixel = first + tl.arange(0, BLOCK_M)
        used = pixel < pixels
        x = pixels_of(in_ptr, pixel, used, CHANNELS, BLOCK_K)
        for start in tl.range(0, COLUMNS, BLOCK_L):
            column = start + tl.arange(0, BLOCK_L)
            weight = tl.load(weight_ptr + k[:, None] * COLUMNS + column[None, :])
            hidden = pointwise(x, weight, tl.load(bias_ptr + column))
            sums = tl.sum(tl.where(used[:, None], hidden, 0.0), 0)
            classifier = tl.load(classifier_ptr + column[:, None] * BLOCK_O + out[None, :])
            total += sums[:, None] * classifier.to(tl.float32)

    answers = tl.sum(total, 0) / pixels
    if classifier_bias_ptr is not None:
        answers += tl.load(classifier_bias_ptr + out)
    tl.store(out_ptr + sample.to(tl.int64) * OUTPUTS + out, answers, mask=out < OUTPUTS)


def run(
    output: Tensor, input: Tensor, weight: Tensor, bias: Tensor, classifier: Tensor,
    classifier_bias: Tensor | None = None, seen: Tensor | None = None,
) -> None:
    """Launches a head into a given output, once.

    Args:
        output: float32 [N, K], dense.
        input: [N, Cin, H, W], dense, channels last, in float16, bfloat16 or float32.
        weight: Of a `PackedPooledHead` whose pixels have at most `WIDEST` bytes.
        bias: Likewise.
        classifier: Likewise, of at most `MOST_OUTPUTS` columns.
        classifier_bias: Likewise, or None.
        seen: int32 [N], or None: what is 0 there is left out of the output.

    Raises:
        ValueError: If a sample has 2^31 elements.
    """
    samples, channels, *size = input.shape
    pixels, (inputs, columns) = size[0] * size[1], weight.shape
    # a sample's elements are counted in 32 bits
    if (pixels + BLOCK_M) * channels >= 2**31:
        raise ValueError(f"maps of {[channels, *size]} have too many elements for one launch")
    block = min(columns, max(16, BYTES // (inputs * weight.element_size())), MOST_COLUMNS)
    with torch.cuda.device_of(input):
        pooled_head_kernel[(samples,)](
            input, weight, bias, classifier, classifier_bias, seen, output, pixels,
            CHANNELS=channels, COLUMNS=columns, OUTPUTS=output.shape[1], BLOCK_M=BLOCK_M,
            BLOCK_K=inputs, BLOCK_L=block, BLOCK_O=classifier.shape[1], enable_fp_fusion=True,
        )


def shape_classes() -> dict[str, Callable[[], object]]:
    """Returns, by name, the launches of the shipped models; called with meta tensors by `aot.py`.

    The policy network is of "shufflenetv2-m" and tells four routes, in half precision.
    """
    return {"pooled head, 96 to 256 channels": partial(_launch_meta, 96, 256, 4)}


def _launch_meta(
    channels: int, hidden: int, outputs: int, dtype: torch.dtype = torch.float16
) -> None:
    """Launches a head whose tensors have no memory."""
    empty = partial(torch.empty, device="meta", dtype=torch.float32)
    rows, columns = padded(channels), padded(hidden)
    image = empty(2, 4, 4, channels, dtype=dtype).permute(0, 3, 1, 2)
    classifier = empty(columns, 1 << (outputs - 1).bit_length(), dtype=dtype)
    run(
        empty(2, outputs), image, empty(rows, columns, dtype=dtype), empty(columns), classifier,
        seen=empty(2, dtype=torch.int32),
    )
