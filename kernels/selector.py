"""The bit-width selector of an encoder stage, decided where the features lie.

    width = widths[argmax_k <weight_k, [gradients, spread]> + bias_k]

gradients: mean absolute Sobel responses of the slot's view of the image, x then y for each channel,
borders replicated, kernels divided by 8. spread: the population's standard deviation of each
channel of the stage's input. Med-DANet V2, section 3.4, Eq. 7 (the softmax keeps the order).

Both are sums over a map, taken in a fixed order, without atomics: means and squared deviations of
chunks of it are merged by Chan's formula. The first of several largest logits wins.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import triton_runs
from .layout import as_pair, in_its_own_dtype
from .slots import check_offset, integers


def gradients_reference(image: Tensor) -> Tensor:
    """Returns the mean absolute Sobel responses of [C, H, W], x then y: [C, 2]."""
    x = F.pad(image[None].float(), (1, 1, 1, 1), mode="replicate")[0]
    down = x[:, 2:] - x[:, :-2]
    right = x[:, :, 2:] - x[:, :, :-2]
    by_y = (down[:, :, :-2] + 2 * down[:, :, 1:-1] + down[:, :, 2:]) / 8
    by_x = (right[:, :-2] + 2 * right[:, 1:-1] + right[:, 2:]) / 8
    return torch.stack([by_x.abs().mean((1, 2)), by_y.abs().mean((1, 2))], 1)


@in_its_own_dtype
def _run_reference(
    bits: Tensor, image: Tensor, feature: Tensor, weight: Tensor, bias: Tensor, widths: Tensor,
    size: tuple[int, int], offset: Tensor | None, slots: Tensor | None, count: Tensor | None,
) -> None:
    used = len(bits) if count is None else min(int(count), len(bits))
    for slot in range(used):
        y, x = (0, 0) if offset is None else offset[slot].tolist()
        whole = image[slot if slots is None else int(slots[slot])]
        gradients = gradients_reference(whole[:, y : y + size[0], x : x + size[1]])
        spread = feature[slot].float().flatten(1).std(1, correction=0)
        logits = weight @ torch.cat([gradients.flatten(), spread]) + bias
        bits[slot] = widths[logits.argmax()]


@torch.library.custom_op("meddanet::select_bits", mutates_args=())
def _select_bits(
    image: Tensor,
    feature: Tensor,
    weight: Tensor,
    bias: Tensor,
    widths: Tensor,
    height: int,
    width: int,
    offset: Tensor | None,
    slots: Tensor | None,
    count: Tensor | None,
) -> Tensor:
    """Returns int32 [M], 0 for unused slots."""
    bits = torch.zeros(len(feature), dtype=torch.int32, device=feature.device)
    routing = (height, width), offset, slots, count
    if not len(bits):
        return bits
    if not triton_runs(feature):
        _run_reference(bits, image, feature, weight, bias, widths, *routing)
        return bits
    from . import selector_triton

    sums = selector_triton.new_sums(len(bits), image.shape[1], (height, width), bits.device)
    selector_triton.gradients(image.contiguous(), sums, *routing)
    flat = feature.float().flatten(2)
    mean = flat.mean(2)
    # of one chunk; in a plan convolutions store these
    moments = torch.stack([mean, (flat - mean[..., None]).square().sum(2)], 1)[:, None]
    pixels = flat.shape[2]
    selector_triton.select(
        bits, sums, moments, weight, bias, widths, (height, width), pixels, pixels, count
    )
    return bits


@_select_bits.register_fake
def _(image, feature, *others):
    return feature.new_empty(len(feature), dtype=torch.int32)


def _checked(
    image: Tensor, feature: Tensor, weight: Tensor, bias: Tensor, widths: Tensor,
    offset: Tensor | None, size: int | tuple[int, int] | None, slots: Tensor | None,
    count: Tensor | None,
) -> tuple:
    """Checks the arguments and returns those of the operator."""
    if image.dim() != 4 or feature.dim() != 4 or not feature.is_floating_point():
        raise ValueError(
            "image and feature must be [N, C, H, W] in floating point, got shapes "
            f"{list(image.shape)} and {list(feature.shape)}"
        )
    inputs = 2 * image.shape[1] + feature.shape[1]
    if weight.shape != (len(widths), inputs) or bias.shape != widths.shape:
        raise ValueError(
            f"weight must be [{len(widths)}, {inputs}] and bias [{len(widths)}] for as many "
            f"widths, got {list(weight.shape)} and {list(bias.shape)}"
        )
    samples = len(feature)
    if offset is not None:
        check_offset(offset, samples)
    if (slots is None and len(image) != samples) or (
        slots is not None and slots.shape != (samples,)
    ):
        raise ValueError(f"{samples} features meet {len(image)} images: give slots [{samples}]")
    if size is not None and any(
        side > own for side, own in zip(as_pair(size), image.shape[2:], strict=True)
    ):
        raise ValueError(f"size {size} is larger than the image, {tuple(image.shape[2:])}")
    return (
        image.detach().float(), feature.detach(), weight.detach().float().contiguous(),
        bias.detach().float(), widths.detach().round().to(torch.int32),
        *((image.shape[2], image.shape[3]) if size is None else as_pair(size)),
        *integers(offset, slots, count),
    )


def select_bits_reference(
    image: Tensor,
    feature: Tensor,
    weight: Tensor,
    bias: Tensor,
    widths: Tensor,
    *,
    offset: Tensor | None = None,
    size: int | tuple[int, int] | None = None,
    slots: Tensor | None = None,
    count: Tensor | None = None,
) -> Tensor:
    """Plain PyTorch statement of `select_bits`, slot by slot."""
    image, feature, weight, bias, widths, height, width, *routing = _checked(
        image, feature, weight, bias, widths, offset, size, slots, count
    )
    bits = torch.zeros(len(feature), dtype=torch.int32, device=feature.device)
    _run_reference(bits, image, feature, weight, bias, widths, (height, width), *routing)
    return bits


def select_bits(
    image: Tensor,
    feature: Tensor,
    weight: Tensor,
    bias: Tensor,
    widths: Tensor,
    *,
    offset: Tensor | None = None,
    size: int | tuple[int, int] | None = None,
    slots: Tensor | None = None,
    count: Tensor | None = None,
) -> Tensor:
    """Chooses a bit width per slot from its view of the image and its stage's input.

    Args:
        image: [N, Cin, H, W], floating point.
        feature: [M, C, h, w], floating point: what the stage is about to take.
        weight: [K, 2 * Cin + C], the selector's linear layer: gradients (x, y per channel), then
            spreads.
        bias: [K].
        widths: [K] widths to choose from.
        offset: Integer [M, 2], (y, x), of the view's corner in its image, inside of it; None: 0.
        size: (height, width) of the view; None: the image's.
        slots: Integer [M]: slot m sees image slots[m]; None: image m.
        count: Integer tensor of one element: slots from here on get 0; None: all are used.

    Returns:
        int32 [M].

    Raises:
        ValueError: If a shape or dtype does not fit.

    Source: Med-DANet V2, section 3.4, Eq. 7.
    """
    return _select_bits(
        *_checked(image, feature, weight, bias, widths, offset, size, slots, count)
    )
