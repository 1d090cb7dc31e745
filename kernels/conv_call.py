"""One call of the integer convolution, as its executors take it: checked, shapes known."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .conv_pack import PackedConv, byte_planes, channels_last_planes, split_codes
from .grid import qmax
from .pairs import split_affine
from .quantize import check_num_bits, whole_width
from .slots import integers

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# float32 holds reciprocals, bounds and rests of such steps
MILD_STEPS = 1e-30, 1e30


@dataclass(frozen=True)
class ConvCall:
    """Everything `quant_conv2d` computes with, but the tensors it writes.

    Sample-wise tensors of the input (`amax`, `num_bits`) go by the input's samples, those of the
    output (`residual`, `output_amax`, `output_num_bits`) by slots.

    Attributes:
        input: int8 byte planes [P, N, C, H, W], channels last; see `conv_pack`.
        conv: The packed weights.
        amax: float32 [1] or [N], range of the input.
        num_bits: Int, or int32 [N].
        residual: [M, Cout, Hout, Wout] in float32, float16 or bfloat16, channels last, or None.
        affine: (scale, shift), pairs of float32 [2, Cout], or None.
        relu: Whether to cut off below zero.
        output_amax: float32 [1] or [M], range of the output codes.
        output_num_bits: Int, or int32 [M].
        slots: int32 [M] with the sample that each slot reads, or None: slot m reads sample m.
        count: int32 [1], how many slots are in use, or None: all.
        skip_amax: float32 [1], range of codes of the sum itself, without `affine` and `relu`: what
            a skip connection takes; or None.
        skip_num_bits: Their width, at most 8.
        mild: Whether the caller knows that all constants are finite and steps 0 or in
            `MILD_STEPS`, see `is_mild`, no range is negative, no residual is NaN, and a ReLU
            follows `affine`: a kernel then asks after neither NaN nor extreme or negative steps.
    """

    input: Tensor
    conv: PackedConv
    amax: Tensor
    num_bits: int | Tensor = 8
    residual: Tensor | None = None
    affine: tuple[Tensor, Tensor] | None = None
    relu: bool = False
    output_amax: Tensor | None = None
    output_num_bits: int | Tensor = 8
    slots: Tensor | None = None
    count: Tensor | None = None
    skip_amax: Tensor | None = None
    skip_num_bits: int = 8
    mild: bool = False

    @property
    def samples(self) -> int:
        """M, the number of slots."""
        return self.input.shape[1] if self.slots is None else self.slots.shape[0]

    @property
    def output_size(self) -> tuple[int, int]:
        """(height, width) of the output."""
        conv = self.conv
        sizes = []
        for axis in range(2):
            size, padding = self.input.shape[3 + axis], conv.padding[axis]
            reach = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
            if conv.transposed:
                sizes.append((size - 1) * conv.stride[axis] - 2 * padding + reach + 1)
            else:
                sizes.append((size + 2 * padding - reach - 1) // conv.stride[axis] + 1)
        return sizes[0], sizes[1]

    @property
    def output_planes(self) -> int:
        """Byte planes of the output codes: 2 where a sample may have more than 8 bits."""
        return byte_planes(self.output_num_bits)

    def new_stream(self, dtype: torch.dtype) -> Tensor:
        """Allocates the sum's tensor [M, Cout, Hout, Wout], channels last; zeros if unused."""
        return self._new(1, dtype)[0]

    def new_codes(self) -> Tensor:
        """Allocates the output's byte planes [P, M, Cout, Hout, Wout], channels last."""
        return self._new(self.output_planes, torch.int8)

    def _new(self, planes: int, dtype: torch.dtype) -> Tensor:
        shape = (planes, self.samples, *self.output_size, self.conv.out_channels)
        # a narrow sample's high plane and an unused slot are never written
        make = torch.zeros if planes == 2 or self.count is not None else torch.empty
        output = make(shape, dtype=dtype, device=self.input.device)
        return output.permute(0, 1, 4, 2, 3)


def largest_code(num_bits: int) -> Tensor:
    """Returns qmax as float32 on the CPU, NaN for a width outside of 2..16."""
    largest = qmax(num_bits) if 2 <= num_bits <= 16 else math.nan
    return torch.tensor(largest, dtype=torch.float32, device="cpu")


def step_of(amax: Tensor, index: int, num_bits: int) -> Tensor:
    """Returns the float32 step of one of the ranges [1] or [N]: 0 of a negative one, NaN of inf."""
    amax = amax[index if len(amax) > 1 else 0]
    return (amax + 0 * amax).clamp_min(0) / largest_code(num_bits).to(amax.device)


def is_mild(amax: Tensor, num_bits: int, *constants: Tensor) -> bool:
    """Returns what `ConvCall.mild` asks of a range and of constants; a GPU is waited for."""
    step = float(step_of(amax, 0, num_bits))
    known = step == 0 or MILD_STEPS[0] <= step <= MILD_STEPS[1]
    # so that no sum of products with them is infinite; a NaN is not below
    return known and all(bool((part.abs() * max(1.0, step) < 1e28).all()) for part in constants)


def pixel_pitch(image: Tensor) -> int | None:
    """Returns how many elements lie from pixel to pixel of [N, C, H, W], or None.

    That is C for a dense channels-last tensor and more for some channels of one, such as the half
    of a concatenation. None means that pixels do not follow one another at one distance.
    """
    n, channels, height, width = image.shape
    if image.numel() == 0:
        return channels
    steps = ((width, image.stride(3), 1), (height, image.stride(2), width),
             (n, image.stride(0), height * width))
    # the innermost axis that has a second element tells
    seen = [(stride, pixels) for size, stride, pixels in steps if size > 1]
    pitch = seen[0][0] // seen[0][1] if seen else channels
    even = all(stride == pitch * pixels for stride, pixels in seen)
    side_by_side = channels == 1 or image.stride(1) == 1
    return pitch if side_by_side and even and pitch >= channels else None


def dense_pixels(image: Tensor) -> Tensor:
    """Returns [N, C, H, W] dense and channels last, copied if need be."""
    dense = pixel_pitch(image) == image.shape[1]
    return image if dense else image.contiguous(memory_format=torch.channels_last)


def even_planes(planes: Tensor) -> Tensor:
    """Returns byte planes whose pixels follow one another at one distance, copied if need be."""
    if any(pixel_pitch(plane) is None for plane in planes.unbind()):
        return channels_last_planes(planes)
    return planes


def check_planes(planes: Tensor, num_bits: int) -> None:
    """Raises ValueError unless byte planes [P, N, C, H, W] hold codes of a width."""
    if num_bits > 8 and planes.shape[0] == 1:
        raise ValueError(f"codes of {num_bits} bits need two byte planes: see split_codes")


def _planes(input: Tensor, conv: PackedConv, num_bits: int | Tensor) -> Tensor:
    """Returns codes in any of the accepted forms as byte planes [P, N, C, H, W], checked."""
    if input.dtype == torch.int16 and input.dim() == 4:
        input = split_codes(input)
    planes = input[None] if input.dim() == 4 else input
    if planes.dtype != torch.int8 or planes.dim() != 5 or planes.shape[0] not in (1, 2):
        raise ValueError(
            "input must be codes: int8 or int16 [N, C, H, W], or int8 byte planes [2, N, C, H, W], "
            f"got {input.dtype} {list(input.shape)}"
        )
    if planes.shape[2] != conv.in_channels:
        raise ValueError(f"input has {planes.shape[2]} channels, weights take {conv.in_channels}")
    check_num_bits("num_bits", num_bits, planes.shape[1])
    for width in (num_bits,) if isinstance(num_bits, int) else (8, 16)[: planes.shape[0]]:
        conv.variant(width)
    if isinstance(num_bits, int):
        check_planes(planes, num_bits)
    return even_planes(planes)


def _range(name: str, amax: Tensor, samples: int) -> Tensor:
    if amax.numel() not in (1, samples):
        raise ValueError(
            f"{name} must hold one value or one per sample, {samples}, got shape {list(amax.shape)}"
        )
    return amax.detach().to(torch.float32).reshape(-1)


def _check_output(call: ConvCall, stream: torch.dtype | None) -> None:
    shape = (call.samples, call.conv.out_channels, *call.output_size)
    if stream is None and call.output_amax is None:
        raise ValueError("neither output is asked for: give stream=dtype, output_amax, or both")
    if stream not in (None, *FLOATS):
        raise ValueError(f"stream must be float32, float16 or bfloat16, got {stream}")
    if min(shape[2:]) < 1:
        raise ValueError(f"input of {list(call.input.shape[3:])} pixels is smaller than the kernel")
    residual = call.residual
    if residual is not None and (residual.shape != shape or residual.dtype not in FLOATS):
        raise ValueError(
            f"residual must be {list(shape)} in float32, float16 or bfloat16, "
            f"got {residual.dtype} {list(residual.shape)}"
        )


def checked_call(
    input: Tensor,
    conv: PackedConv,
    amax: Tensor,
    *,
    num_bits: int | Tensor,
    residual: Tensor | None,
    stream: torch.dtype | None,
    affine: tuple[Tensor, Tensor] | None,
    relu: bool,
    output_amax: Tensor | None,
    output_num_bits: int | Tensor,
    slots: Tensor | None,
    count: Tensor | None,
) -> ConvCall:
    """Checks the arguments of `quant_conv2d`, without asking the device, and brings them in form.

    Raises:
        ValueError: If a shape, dtype or width does not fit, or no output is asked for.
    """
    planes = _planes(input, conv, num_bits)
    samples = planes.shape[1] if slots is None else slots.shape[0]
    check_num_bits("output_num_bits", output_num_bits, samples)
    if residual is not None:
        residual = residual.detach().contiguous(memory_format=torch.channels_last)
    slots, count = integers(slots, count)
    call = ConvCall(
        planes, conv, _range("amax", amax, planes.shape[1]), whole_width(num_bits), residual,
        split_affine(affine, conv.out_channels), relu,
        None if output_amax is None else _range("output_amax", output_amax, samples),
        whole_width(output_num_bits), slots, count,
    )
    _check_output(call, stream)
    return call
