"""What a user would run instead: the peers of the kernels, as good as plain PyTorch makes them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def deviation(actual: Tensor, expected: Tensor) -> float:
    """Returns the root mean square of the difference over that of what is expected."""
    difference = actual.double() - expected.double()
    return (difference.square().mean() / expected.double().square().mean()).sqrt().item()


def agreeing(
    expected: Tensor, outputs: dict[str, Callable[[], Tensor]], bound: float
) -> dict[str, float]:
    """Returns the peers' deviations; a peer that computes something else fails the case."""
    found = {}
    for name, run in outputs.items():
        try:
            output = run()
        except Exception:
            continue  # its row will say why
        if output.is_quantized:
            output = output.dequantize()
        found[name] = deviation(output, expected)
        assert found[name] <= bound, f"{name} deviates by {found[name]:.2g}"
    return {name: round(value, 6) for name, value in found.items()}


def eager_fake_quantize(x: Tensor, amax: Tensor, num_bits: int = 8) -> Tensor:
    """PyTorch's own operator, of eight bits and one range."""
    largest = 2 ** (num_bits - 1) - 1
    scale = (amax / largest).reshape(1).float()
    # made where it is needed: an upload would wait for the GPU
    zero = torch.zeros(1, dtype=torch.int32, device=x.device)
    return torch.fake_quantize_per_tensor_affine(x, scale, zero, -largest, largest)


def formula_fake_quantize(x: Tensor, amax: Tensor, num_bits: int = 8) -> Tensor:
    """The same written out, which torch.compile can fuse."""
    largest = 2 ** (num_bits - 1) - 1
    step = amax / largest
    inside = x.clamp(-amax, amax)
    return inside + ((inside / step).round() * step - inside).detach()


def conv_norm_relu(
    x: Tensor, weight: Tensor, norm: nn.BatchNorm2d, stride: int, padding: int
) -> Tensor:
    """A convolution, its norm and a ReLU as separate operators: the model as it is written."""
    return norm(F.conv2d(x, weight, None, stride, padding)).relu()


def fake_quant_block(
    x: Tensor, weight: Tensor, norm: nn.BatchNorm2d, amax: Tensor, stride: int, padding: int
) -> Tensor:
    """The same of inputs on the grid, weights being there: an integer network simulated."""
    return conv_norm_relu(formula_fake_quantize(x, amax), weight, norm, stride, padding)


def cudnn_fused(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int
) -> Callable[[], Tensor]:
    """cuDNN's convolution + bias + ReLU in one kernel, norm folded into weight and bias."""
    pair = ([stride] * 2, [padding] * 2, [1, 1], 1)
    return lambda: torch.cudnn_convolution_relu(x, weight, bias, *pair)


def quantized_conv(
    codes: Tensor, step: float, weight: Tensor, bias: Tensor, out_step: float, stride: int,
    padding: int,
) -> Callable[[], Tensor]:
    """PyTorch's `quantized::conv2d_relu`: per-tensor int8 in and out, bias in float.

    On a CPU activations are unsigned: codes are moved by 128, and so is what stands for zero.
    """
    zero = 128 if codes.device.type == "cpu" else 0
    moved = (codes.short() + zero).to(torch.uint8) if zero else codes
    x = torch._make_per_tensor_quantized_tensor(moved, step, zero)
    weight_step = float(weight.abs().amax()) / 127
    packed = torch.ops.quantized.conv2d_prepack(
        torch.quantize_per_tensor(weight.float(), weight_step, 0, torch.qint8), bias.float(),
        [stride] * 2, [padding] * 2, [1, 1], 1,
    )
    return lambda: torch.ops.quantized.conv2d_relu(x, packed, out_step, 0)


def grid_crop(x: Tensor, offset: Tensor, size: int) -> Tensor:
    """The papers' crop: affine_grid + grid_sample."""
    height, width = x.shape[2:]
    return _sample(x, offset, (size, size), (height, width), sign=1.0)


def grid_paste(patch: Tensor, offset: Tensor, size: int) -> Tensor:
    """The papers' paste: the inverse map."""
    return _sample(patch, offset, (size, size), tuple(patch.shape[2:]), sign=-1.0)


def _sample(
    x: Tensor, offset: Tensor, size: tuple[int, int], source: tuple[int, int], sign: float
) -> Tensor:
    """Samples at (i, j) + sign * offset, zeros outside."""
    (rows, columns), (height, width) = size, source
    theta = x.new_zeros(len(x), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = columns / width, rows / height
    theta[:, 0, 2] = (2 * sign * offset[:, 1] + columns) / width - 1
    theta[:, 1, 2] = (2 * sign * offset[:, 0] + rows) / height - 1
    grid = F.affine_grid(theta, [*x.shape[:2], rows, columns], align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def roi_align_crop(x: Tensor, offset: Tensor, size: int) -> Tensor:
    """torchvision's roi_align with one sample per pixel."""
    from torchvision.ops import roi_align

    index = torch.arange(len(x), device=x.device, dtype=x.dtype)[:, None]
    boxes = torch.cat([index, offset.flip(1), offset.flip(1) + size], 1)
    return roi_align(x, boxes, (size, size), sampling_ratio=1, aligned=True)


def eager_head(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The last 1x1 convolution, argmax and the cast to uint8 as separate operators."""
    return F.conv2d(features, weight, bias).argmax(1).to(torch.uint8)


def placed(labels: Tensor, corner: int, size: int) -> Tensor:
    """Puts label regions [N, h, w] into square slices of background."""
    height, width = labels.shape[1:]
    if height == size:
        return labels
    slices = labels.new_zeros(len(labels), size, size)
    slices[:, corner : corner + height, corner : corner + width] = labels
    return slices
