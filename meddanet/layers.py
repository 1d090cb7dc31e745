"""Drop-in layers whose weights and inputs live on the package's quantisation grid.

Each subclasses the PyTorch layer it replaces: same constructor, same parameter names, and float
state_dicts load with strict=True both ways, because the running input range is not persistent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import fake_quant_conv2d, fake_quantize
from .kernels.grid import amax_of
from .kernels.layout import wide_dtype
from .kernels.per_width import conv_per_width, weight_amax
from .kernels.quantize import check_num_bits

RANGE_MOMENTUM = 0.05

# what layers take, for type checkers, which a mixin's *args tell nothing
Size = int | tuple[int, int]
Width = int | Tensor | None
Device = torch.device | str | int | None


class QuantizedInput(nn.Module):
    """Mixin: one running input range and the switch between float and quantised arithmetic.

    A `state_dict` alone loses the range: without one each sample's own maximum serves in `eval()`,
    too. `save_model` keeps it; else save `input_amax` of all `quantized_layers(model)` beside the
    weights and copy it back (docs/kernels.md).

    Args:
        *args, **kwargs: Of the PyTorch layer that it is mixed into.
        num_bits, input_num_bits, per_channel: Which see.

    Attributes:
        num_bits: Width of the weights, 2..16, used where `forward` is given none.
        input_num_bits: Width of the input, 2..16.
        per_channel: One weight range per output channel instead of one per tensor.
        quantize: False runs the plain PyTorch layer.
        exempt: Whether `set_quantization` leaves the layer in float.
        update_range: Whether training updates the running range; once False, training uses it as
            `eval()` does.
        input_amax: Running range, a scalar buffer; 0 until the first training batch.
        weight: Of the PyTorch layer that it is mixed into.
    """

    input_amax: Tensor
    weight: Tensor

    def __init__(
        self,
        *args: Any,
        num_bits: int = 8,
        input_num_bits: int = 8,
        per_channel: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        for name, width in (("num_bits", num_bits), ("input_num_bits", input_num_bits)):
            check_num_bits(name, width, batch=0)
        self.num_bits = num_bits
        self.input_num_bits = input_num_bits
        self.per_channel = per_channel
        self.quantize = True
        self.exempt = False
        self.update_range = True
        # in half precision a running mean would stand still
        amax = torch.zeros((), dtype=wide_dtype(self.weight), device=self.weight.device)
        self.register_buffer("input_amax", amax, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves the layer as PyTorch does; a range stays in float32 where the weights go lower."""
        known = self.input_amax
        super()._apply(fn, recurse)
        if (dtype := wide_dtype(self.input_amax)) != self.input_amax.dtype:
            self.input_amax = known.to(self.input_amax.device, dtype)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        """Gives a layer that was made on "meta" a range where its weights have come to lie."""
        super()._load_from_state_dict(*args)
        if self.input_amax.is_meta and not self.weight.is_meta:
            self.input_amax = torch.zeros_like(self.input_amax, device=self.weight.device)

    def reset_parameters(self) -> None:
        """Initialises the parameters as PyTorch does and forgets the range.

        After `to_empty` a range is what its memory held, and a state_dict brings none.
        """
        super().reset_parameters()  # type: ignore[misc]  # of the layer that it is mixed into
        # the layer's own constructor calls it before there is one
        if "input_amax" in self._buffers:
            self.input_amax.zero_()

    def weight_range(self) -> Tensor:
        """Returns max|weight|: of the tensor, or as per output channel it broadcasts to it."""
        return weight_amax(self.weight, self.per_channel)

    def input_range(self, input: Tensor) -> Tensor | None:
        """Returns the range to quantise with; None means each sample's own maximum.

        A sample's own maximum serves while the range is being learnt, or where none was ever set.
        A batch with an Inf or a NaN, as mixed precision has them now and then, teaches nothing.
        A compiled or exported graph cannot ask whether a range was set: it has either, per sample,
        so that it broadcasts to the input. Elsewhere the range is a scalar, and a GPU is waited
        for.

        Args:
            input: [N, ...], from which the range is learnt.
        """
        if self.training and self.update_range:
            if input.numel():
                largest = amax_of(input, per_sample=True).mean().to(self.input_amax.dtype)
                known = self.input_amax
                learnt = torch.where(known == 0, largest, known.lerp(largest, RANGE_MOMENTUM))
                # chosen on the device, which is not waited for
                known.copy_(torch.where(largest.isfinite(), learnt, known))
            return None
        unset = self.input_amax == 0
        if torch.compiler.is_compiling():
            own = amax_of(input, per_sample=True).to(self.input_amax.dtype)
            own = own.reshape(-1, *[1] * (input.dim() - 1))
            return torch.where(unset, own, self.input_amax)
        return None if unset.is_meta or bool(unset) else self.input_amax

    def check_input(self, input: Tensor, channels: int, axis: int) -> None:
        """Raises ValueError where a layer cannot take an input, before its range is learnt from it.

        Args:
            input: As given to `forward`.
            channels: How many it has to have.
            axis: Where, counted from the end: -1 after any axes, -3 of an image or a batch.
        """
        if axis == -1:
            axes, taken = f"[..., {channels}]", input.dim() > 0
        else:
            axes = f"[{channels}, H, W] or [N, {channels}, H, W]"
            taken = input.dim() in (3, 4)
        if not taken or input.shape[axis] != channels:
            raise ValueError(f"input must be {axes}, got shape {list(input.shape)}")
        device = input.device.type
        mixed = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        alike = input.dtype == self.weight.dtype or mixed
        if not (alike and input.is_floating_point()):
            raise ValueError(f"input is {input.dtype}, the layer's weights are {self.weight.dtype}")

    def call_widths(
        self, num_bits: Width, input_num_bits: Width, batch: int
    ) -> tuple[int | Tensor, int | Tensor]:
        """Returns the widths of a call, the layer's own where it gives none.

        Raises ValueError for what is no width, before a range is learnt.

        Args:
            num_bits: Of the weights; one, or one per sample, [N].
            input_num_bits: Of the input likewise.
            batch: Number of samples N.
        """
        num_bits = self.num_bits if num_bits is None else num_bits
        input_num_bits = self.input_num_bits if input_num_bits is None else input_num_bits
        check_num_bits("num_bits", num_bits, batch)
        check_num_bits("input_num_bits", input_num_bits, batch)
        return num_bits, input_num_bits

    def quantized_input(self, input: Tensor, width: int | Tensor) -> Tensor:
        """Fake-quantises `input` [N, ...] by the layer's range to a width, or one per sample."""
        amax = self.input_range(input)
        if amax is None and isinstance(width, int):
            width = torch.full((input.shape[0],), width, device=input.device)
        return fake_quantize(input, width, amax)

    def extra_repr(self) -> str:
        """Adds the widths to PyTorch's description."""
        widths = f"num_bits={self.num_bits}, input_num_bits={self.input_num_bits}"
        return f"{super().extra_repr()}, {widths}"


class QuantConv2d(QuantizedInput, nn.Conv2d):
    """`nn.Conv2d` with fake-quantised weights and input.

    The input's range is learnt in `train()` and used in `eval()`; a `state_dict` does not hold it
    (docs/kernels.md says how to keep it).

    Args:
        *args, **kwargs: As for `nn.Conv2d`.
        num_bits: Width of the weights.
        input_num_bits: Width of the input.
        per_channel: One weight range per output channel.
    """

    # two numbers each; PyTorch declares them for any number of axes
    stride: tuple[int, int]
    padding: str | tuple[int, int]
    dilation: tuple[int, int]

    if TYPE_CHECKING:

        def __init__(
            self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1,
            padding: str | Size = 0, dilation: Size = 1, groups: int = 1, bias: bool = True,
            padding_mode: str = "zeros", device: Device = None, dtype: torch.dtype | None = None,
            *, num_bits: int = 8, input_num_bits: int = 8, per_channel: bool = False,
        ) -> None: ...

    def forward(
        self,
        input: Tensor,
        num_bits: Width = None,
        input_num_bits: Width = None,
    ) -> Tensor:
        """Convolves [N, Cin, H, W] or [Cin, H, W]; widths per call or per sample, [N], override."""
        if not self.quantize:
            return super().forward(input)
        self.check_input(input, self.in_channels, -3)
        if input.dim() == 3:
            return self.forward(input[None], num_bits, input_num_bits)[0]
        width, input_width = self.call_widths(num_bits, input_num_bits, input.shape[0])
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0)
        return fake_quant_conv2d(
            input,
            self.weight,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            num_bits=width,
            input_num_bits=input_width,
            input_amax=self.input_range(input),
            per_channel=self.per_channel,
        )


class QuantConvTranspose2d(QuantizedInput, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` with fake-quantised weights and input; arguments as `QuantConv2d`.

    With widths of the weights in a tensor it cannot be traced as one graph, see `QuantLinear`.
    """

    # two numbers each; PyTorch declares words or any number of axes
    stride: tuple[int, int]
    padding: tuple[int, int]
    kernel_size: tuple[int, int]
    dilation: tuple[int, int]

    if TYPE_CHECKING:

        def __init__(
            self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1,
            padding: Size = 0, output_padding: Size = 0, groups: int = 1, bias: bool = True,
            dilation: Size = 1, padding_mode: str = "zeros", device: Device = None,
            dtype: torch.dtype | None = None,
            *, num_bits: int = 8, input_num_bits: int = 8, per_channel: bool = False,
        ) -> None: ...

    def weight_range(self) -> Tensor:
        """Returns max|weight|: of the tensor, or as per output channel it broadcasts to it."""
        if not self.per_channel:
            return super().weight_range()
        by_group = self.weight.detach().abs().unflatten(0, (self.groups, -1))
        amax = by_group.amax((1, 3, 4), keepdim=True)
        if self.groups == 1:
            return amax[0]
        return amax.repeat_interleave(by_group.shape[1], 1).flatten(0, 1)

    def output_padding_for(
        self, input: Tensor, output_size: Sequence[int] | None
    ) -> list[int]:
        """Returns the padding by which [N, Cin, H, W] becomes as large as asked, or the layer's."""
        sizes = self.stride, self.padding, self.kernel_size
        stride, padding, kernel_size = map(list, sizes)
        # of an input without a batch it has the channels as well
        size = None if output_size is None else list(output_size)[-2:]
        return self._output_padding(
            input, size, stride, padding, kernel_size, 2, list(self.dilation)
        )

    def forward(  # type: ignore[override]  # widths come first
        self,
        input: Tensor,
        num_bits: int | Tensor | list[int] | tuple[int, ...] | None = None,
        input_num_bits: Width = None,
        output_size: Sequence[int] | None = None,
    ) -> Tensor:
        """Convolves as `QuantConv2d` does; output_size: as PyTorch's, (height, width).

        Where PyTorch has it, second, a list or tuple is an output_size, too: widths are none.
        """
        if isinstance(num_bits, list | tuple):
            num_bits, output_size = None, num_bits
        if not self.quantize:
            return super().forward(input, None if output_size is None else list(output_size))
        self.check_input(input, self.in_channels, -3)
        if input.dim() == 3:
            return self.forward(input[None], num_bits, input_num_bits, output_size)[0]
        width, input_width = self.call_widths(num_bits, input_num_bits, input.shape[0])
        output_padding = self.output_padding_for(input, output_size)

        def convolve(x: Tensor, w: Tensor) -> Tensor:
            return F.conv_transpose2d(
                x, w, None, self.stride, self.padding, output_padding, self.groups, self.dilation
            )

        output = _run(convolve, self.quantized_input(input, input_width), self.weight, width,
                      self.weight_range())
        return output if self.bias is None else output + _like(self.bias, output)[:, None, None]


class QuantLinear(QuantizedInput, nn.Linear):
    """`nn.Linear` with fake-quantised weights and input; arguments as `QuantConv2d`.

    With widths of the weights in a tensor it asks the device which samples share one: then
    `torch.compile` breaks the graph there, and `fullgraph=True` and `torch.export` refuse.
    """

    if TYPE_CHECKING:

        def __init__(
            self, in_features: int, out_features: int, bias: bool = True, device: Device = None,
            dtype: torch.dtype | None = None,
            *, num_bits: int = 8, input_num_bits: int = 8, per_channel: bool = False,
        ) -> None: ...

    def forward(
        self,
        input: Tensor,
        num_bits: Width = None,
        input_num_bits: Width = None,
    ) -> Tensor:
        """Maps [N, ..., Cin] to [N, ..., Cout], or [Cin] to [Cout]; widths override the layer's."""
        if not self.quantize:
            return super().forward(input)
        self.check_input(input, self.in_features, -1)
        if input.dim() == 1:
            return self.forward(input[None], num_bits, input_num_bits)[0]
        width, input_width = self.call_widths(num_bits, input_num_bits, input.shape[0])
        output = _run(F.linear, self.quantized_input(input, input_width), self.weight, width,
                      self.weight_range())
        return output if self.bias is None else output + _like(self.bias, output)


def _like(bias: Tensor, output: Tensor) -> Tensor:
    # under autocast a layer returns the lower precision, as PyTorch's own do
    return bias.to(output.dtype)


def _run(function, input: Tensor, weight: Tensor, num_bits: int | Tensor, amax: Tensor) -> Tensor:
    if isinstance(num_bits, Tensor) and input.shape[0] > 0:
        return conv_per_width(function, input, weight, num_bits, amax)
    width = num_bits if isinstance(num_bits, int) else 8
    return function(input, fake_quantize(weight, width, amax))


class BitSelector(nn.Module):
    """Chooses a bit width per sample from the image's gradients and the feature's spread.

    A single linear layer, as in the official code; all weights start at 1 and the last width is
    favoured by a bias of 1.

    Args:
        channels: Channels C of the stage's input feature.
        in_channels: Channels of the network's input image.
        num_bits: Widths to choose from, such as (8, 16).

    Source: Med-DANet V2, section 3.4, Eq. 7.
    """

    widths: Tensor

    def __init__(
        self, channels: int, in_channels: int = 4, num_bits: tuple[int, ...] = (8, 16)
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(channels + 2 * in_channels, len(num_bits))
        nn.init.ones_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        with torch.no_grad():
            self.linear.bias[-1] = 1.0
        self.register_buffer(
            "widths", torch.tensor(num_bits, dtype=torch.float32), persistent=False
        )

    def forward(self, gradients: Tensor, feature: Tensor) -> Tensor:
        """Returns float widths [N]: the most probable in value, the expected one in gradient.

        Args:
            gradients: [N, 2 * in_channels] from `image_gradients`.
            feature: [N, C, H, W], input of the stage.
        """
        spread = spread_of(feature.detach())
        probability = self.linear(torch.cat([gradients, spread], 1)).softmax(1)
        soft = (probability * self.widths).sum(1)
        hard = self.widths[probability.argmax(1)]
        return hard - soft.detach() + soft if soft.requires_grad else hard


def spread_of(feature: Tensor) -> Tensor:
    """Returns every channel's standard deviation (the population's) of [N, C, H, W]: [N, C]."""
    # two plain passes: Welford's, which std() makes, is ten times slower on a CPU
    deviation = feature.to(wide_dtype(feature))
    deviation = deviation - deviation.mean((2, 3), keepdim=True)
    return deviation.square_().mean((2, 3)).sqrt()


def image_gradients(input: Tensor) -> Tensor:
    """Returns the mean absolute Sobel responses of every channel, x then y: [N, 2 * C].

    Args:
        input: [N, C, H, W]; borders are replicated, kernels are divided by 8.

    Source: Med-DANet V2, section 3.4 ("gradient of spatial feature" of the input image).
    """
    padded = F.pad(input, (1, 1, 1, 1), mode="replicate")
    response = F.conv2d(padded, sobel_kernel(input.shape[1]).to(input), groups=input.shape[1])
    return response.abs().mean((2, 3))


def sobel_kernel(channels: int) -> Tensor:
    """Returns each channel's x and y kernels for C groups: float32 [2 * C, 1, 3, 3], on the CPU."""
    rows = [[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]
    sobel = torch.tensor(rows, dtype=torch.float32, device="cpu") / 8
    return torch.stack([sobel, sobel.T])[:, None].repeat(channels, 1, 1, 1)


def as_made(module: nn.Module) -> bool:
    """Tells whether a module does what its class says: no hooks, no method of the object's own.

    A quantised layer has to be one of this file's, no subclass, which may do more.
    """
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    kinds = QuantConv2d, QuantConvTranspose2d, QuantLinear
    if isinstance(module, QuantizedInput) and type(module) not in kinds:
        return False
    return not any(callable(getattr(type(module), name, None)) for name in vars(module))


def quantized_layers(model: nn.Module) -> dict[str, QuantizedInput]:
    """Returns the quantised layers of a model by their qualified name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedInput)}


def set_quantization(model: nn.Module, *, quantize: bool, update_range: bool) -> None:
    """Switches quantised layers between float and quantised, learning and fixed ranges."""
    for layer in quantized_layers(model).values():
        layer.quantize = quantize and not layer.exempt
        layer.update_range = update_range
