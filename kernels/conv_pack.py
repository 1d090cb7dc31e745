"""Integer codes as bytes, and the weights of an integer convolution packed for its kernels.

Codes lie in byte planes, int8 [P, N, C, H, W], channels last in each plane:

    code = low + 256 * high,   -128 <= low <= 127,  |high| <= 127

Plane 0 holds `low`, plane 1 `high`. A code of 8 bits or fewer is its own low byte, so one plane
serves a batch that has no others, and in a mixed batch nothing ever reads a narrow sample's high
plane: each sample moves as many bytes as its width has, and both kinds load the same way, with no
shifting per tap. An exact 16-bit product is four int8 products. qmax(16) = 32639 keeps `high` in
int8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .grid import qmax, quantize_codes, step_size
from .layout import as_pair
from .pairs import split_floats
from .per_width import weight_amax

# depth of one integer tensor-core instruction
K_MULTIPLE = 32


def byte_planes(num_bits: int | Tensor) -> int:
    """Returns how many planes hold codes of a width, or of any width that a tensor may hold."""
    return 1 if isinstance(num_bits, int) and num_bits <= 8 else 2


def bytes_of(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the (low, high) bytes of whole numbers in -32639..32639, int8 of their shape."""
    codes = codes.to(torch.int16, copy=True)
    # the cast keeps the lowest byte; 32639 + 128 still fits
    low = codes.to(torch.int8)
    return low, codes.add_(128).bitwise_right_shift_(8).to(torch.int8)


def split_codes(codes: Tensor) -> Tensor:
    """Splits whole numbers in -32639..32639, [N, C, H, W], into byte planes [2, N, C, H, W]."""
    codes = codes.to(torch.int32).contiguous(memory_format=torch.channels_last)
    return channels_last_planes(torch.stack(bytes_of(codes)))


def join_codes(planes: Tensor) -> Tensor:
    """Reverses `split_codes`: int16 [N, C, H, W]; one plane is sign-extended."""
    low = planes[0].to(torch.int16)
    return low if len(planes) == 1 else low + 256 * planes[1].to(torch.int16)


def channels_last_planes(planes: Tensor) -> Tensor:
    """Returns [P, N, C, H, W] with every pixel's channels side by side."""
    return planes.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def norm_affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Returns (scale, shift), float64 [C], with which a batch norm in eval() is x * scale + shift.

    Raises:
        ValueError: If the norm keeps no running statistics.
    """
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None:
        raise ValueError("only a batch norm with running statistics is an affine map")
    scale = (variance.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach().double()


class PackedConv(NamedTuple):
    """A convolution's weights as codes for each width, with its per-channel scale and bias.

    Attributes:
        codes: int8 [V, P, rows, K], one entry per width and byte plane. Rows are output channels,
            K runs over (tap, input channel) and is padded with zeros to a multiple of 32. Of a
            transposed convolution rows run over (tap, output channel), K over input channels.
        scale: Pairs of float32 [V, 2, Cout], see `pairs.py`; output = integer sum * input's step *
            scale + bias.
        bias: Pairs of float32 [2, Cout].
        num_bits: The V widths, ascending. Of those with as many bytes as its codes, a sample takes
            the narrowest that is not below its own width, or else the widest.
        in_channels, kernel_size, stride, padding, dilation, groups, transposed: As in PyTorch's
            layers.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor
    num_bits: tuple[int, ...]
    in_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    transposed: bool

    @property
    def out_channels(self) -> int:
        """Number of output channels."""
        return self.bias.shape[1]

    def to(self, device: torch.device | str) -> PackedConv:
        """Returns the same on another device."""
        codes, scale, bias = (t.to(device) for t in (self.codes, self.scale, self.bias))
        return self._replace(codes=codes, scale=scale, bias=bias)

    def variant(self, num_bits: int) -> int:
        """Returns the index of the weights that a sample of this width takes.

        Raises:
            ValueError: If no weights are packed with as many bytes.
        """
        fit = [i for i, width in enumerate(self.num_bits) if (width > 8) == (num_bits > 8)]
        if not fit:
            raise ValueError(
                f"codes of {num_bits} bits meet weights packed for {list(self.num_bits)}: "
                "pack_conv(num_bits=...) takes every width that occurs"
            )
        return next((i for i in fit if self.num_bits[i] >= num_bits), fit[-1])


def pack_weight(
    weight: Tensor, num_bits: Sequence[int], per_channel: bool = False, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns `PackedConv.codes` and the weights' steps, float64 [V, Cout], asking no device.

    What is not finite has code 0 and makes its step NaN.
    """
    weight = weight.detach()
    # output channels first
    weight, order = (weight.transpose(0, 1), (2, 3, 0, 1)) if transposed else (weight, (0, 2, 3, 1))
    depth = weight.shape[1] if transposed else weight[0].numel()
    amax = weight_amax(weight, per_channel).reshape(-1)
    steps, codes = [], []
    for width in num_bits:
        step, _, _ = step_size(weight, width, amax)
        steps.append(step.double().reshape(-1).expand(len(weight)))
        values = quantize_codes(weight, step, int(qmax(width))).nan_to_num_(0.0)
        rows = values.permute(order).reshape(-1, depth)
        codes.append(F.pad(rows, (0, -rows.shape[1] % K_MULTIPLE)))
    packed = torch.stack(codes)
    planes = (packed,) if max(num_bits) <= 8 else bytes_of(packed)
    return torch.stack([plane.to(torch.int8) for plane in planes], 1), torch.stack(steps)


def pack_conv(
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    num_bits: int | Sequence[int] = 8,
    per_channel: bool = False,
    transposed: bool = False,
    norm: tuple[Tensor, Tensor] | None = None,
) -> PackedConv:
    """Packs float weights for `quant_conv2d`, on the grid that training put them on.

    Args:
        weight: [Cout, Cin / groups, kH, kW]; [Cin, Cout, kH, kW] if transposed.
        bias: [Cout] or None.
        stride, padding, dilation, groups: As in `F.conv2d`, or `F.conv_transpose2d`.
        num_bits: Width of the weights, 2..16, or every width that a sample may choose.
        per_channel: One weight range per output channel instead of one per tensor.
        transposed: Whether this is a transposed convolution.
        norm: (scale, shift), [Cout], of the affine map that follows, see `norm_affine`. It is
            folded into scale and bias; the codes stay what they are without it.

    Raises:
        ValueError: If a width is out of range, weight is not 4-D, bias, norm or groups do not fit
            it, a value is not finite, or a transposed convolution has groups or dilation.
    """
    widths = (num_bits,) if isinstance(num_bits, int) else tuple(sorted(set(num_bits)))
    if not widths or not all(2 <= width <= 16 for width in widths):
        raise ValueError(f"num_bits must be widths from 2 to 16, got {num_bits}")
    if weight.dim() != 4 or not bool(weight.isfinite().all()):
        raise ValueError(f"weight must be 4-D and finite, got shape {list(weight.shape)}")
    if transposed and (groups != 1 or as_pair(dilation) != (1, 1)):
        raise ValueError("a transposed convolution is packed without groups and dilation")
    outputs = weight.shape[1 if transposed else 0]
    if groups < 1 or outputs % groups:
        raise ValueError(f"groups must divide the {outputs} output channels, got {groups}")
    for name, value in (("bias", (bias,)), ("norm", norm or ())):
        if any(part is not None and part.shape != (outputs,) for part in value):
            shapes = ", ".join(str(list(part.shape)) for part in value if part is not None)
            raise ValueError(f"{name} must have shape [{outputs}], got {shapes}")
    codes, scale = pack_weight(weight, widths, per_channel, transposed)
    offset = torch.zeros_like(scale[0]) if bias is None else bias.detach().double()
    if norm is not None:
        scale, offset = scale * norm[0].double(), offset * norm[0].double() + norm[1].double()
    if not bool(torch.isfinite(torch.cat([scale.reshape(-1), offset]).float()).all()):
        raise ValueError("bias and norm must be finite, also in float32")
    return PackedConv(
        codes, split_floats(scale), split_floats(offset), widths,
        weight.shape[0] if transposed else weight.shape[1] * groups,
        (weight.shape[2], weight.shape[3]), as_pair(stride), as_pair(padding), as_pair(dilation),
        groups, transposed,
    )


def unpack_weight(conv: PackedConv, variant: int) -> Tensor:
    """Returns one width's codes in PyTorch's shape of the weight, float64 whole numbers."""
    planes = conv.codes[variant].double()
    values = planes[0] if len(planes) == 1 else planes[0] + 256 * planes[1]
    depth = conv.in_channels // conv.groups
    height, width = conv.kernel_size
    if conv.transposed:
        return values[:, :depth].reshape(height, width, -1, depth).permute(3, 2, 0, 1)
    taps = values[:, : height * width * depth]
    return taps.reshape(len(values), height, width, depth).permute(0, 3, 1, 2)
