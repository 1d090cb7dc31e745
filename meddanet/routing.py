"""What both models do at inference: a route per slice, and the slices of a route as one batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from .data.volume import window_origins
from .networks.unet import check_input

Module = TypeVar("Module", bound=nn.Module)


class Segmentation(NamedTuple):
    """What `segment` returns; with windows, a window axis M follows N but in `labels`.

    Attributes:
        labels: [N, H, W] uint8 classes.
        decisions: [N] int64, index into `routes`.
        offsets: [N, 2] float32, (y, x) of the crop in pixels, 0 where none was made.
        num_bits: [N, S] int64 widths per encoder stage, 0 where it did not run; S is 0 for a model
            that chooses no widths.
    """

    labels: Tensor
    decisions: Tensor
    offsets: Tensor
    num_bits: Tensor

    @classmethod
    def skipped(cls, slices: Tensor, stages: int) -> Segmentation:
        """Returns, on the CPU, what slices [N, C, H, W] get that are all skipped."""
        count, _, height, width = slices.shape
        return cls(
            torch.zeros(count, height, width, dtype=torch.uint8, device="cpu"),
            torch.zeros(count, dtype=torch.long, device="cpu"),
            torch.zeros(count, 2, dtype=torch.float32, device="cpu"),
            torch.zeros(count, stages, dtype=torch.long, device="cpu"),
        )

    @classmethod
    def joined(cls, parts: Iterable[Iterable[Tensor]]) -> Segmentation:
        """Returns one of all slices from those of some."""
        return cls(*map(torch.cat, zip(*parts, strict=True)))


class RoutedSegmenter(nn.Module, ABC):
    """Decides on a route per slice and runs the slices of equal decision as one batch.

    Attributes:
        routes: Names of the routes; the first is "skip".
        in_channels: Channels of the image.
        num_classes: Classes, background included.
        stride: Sides of slices are multiples of it.
        smallest_side: Slices are at least this large, in pixels.
        num_stages: Encoder stages S whose width is chosen.
        decision_scale: Slices are decided on shrunk by this factor.
        config: Arguments of the builder that makes the same architecture.
        metadata: What a weights file says of itself.
    """

    routes: tuple[str, ...]
    in_channels: int
    num_classes: int
    stride: int
    smallest_side: int
    num_stages: int = 0
    decision_scale: int = 1
    config: dict[str, object]
    metadata: dict[str, Any]

    @abstractmethod
    def decide(self, slices: Tensor) -> Tensor:
        """Returns route logits [N, R] of slices [N, C, H, W]."""

    @abstractmethod
    def run(self, route: int, slices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Runs one route other than skip on slices [N, C, H, W].

        Returns:
            Logits [N, K, H, W], offsets [N, 2] and widths [N, S] as in `Segmentation`.
        """

    def check(self, slices: Tensor) -> None:
        """Raises ValueError, with the cure, unless the model takes slices of this shape."""
        check_input(slices, self.in_channels, self.stride)

    @torch.no_grad()
    def segment(self, slices: Tensor) -> Segmentation:
        """Routes every slice, runs each group of equal decision as one batch.

        Nothing is computed for a skipped slice but its decision, and not even that for a slice
        without any signal. Crops are made at whole pixels, where they are exact copies.

        Args:
            slices: [N, C, H, W], H and W multiples of the stride, at least `smallest_side`.

        Returns:
            A `Segmentation`; skipped slices are background.

        Raises:
            ValueError: If the shape does not fit.
        """
        decisions, offsets, num_bits, groups = self._route(slices)
        labels = torch.zeros(
            slices.shape[0], *slices.shape[2:], dtype=torch.uint8, device=slices.device
        )
        for index, logits in groups:
            labels[index] = logits.argmax(1).to(torch.uint8)
        return Segmentation(labels, decisions, offsets, num_bits)

    @torch.no_grad()
    def segment_windows(self, slices: Tensor, window: int = 128) -> Segmentation:
        """Decides per overlapping window and averages probabilities: the papers' protocol.

        Args:
            slices: [N, C, H, W].
            window: Side of a window in pixels; stride is a third of it.

        Returns:
            A `Segmentation` with M windows per slice, in the order of `window_corners`.
        """
        batch, _, height, width = slices.shape
        total = slices.new_zeros(batch, self.num_classes, height, width)
        routed = []
        for y, x in window_corners(height, width, window):
            view = slices[:, :, y : y + window, x : x + window]
            decisions, offsets, num_bits, groups = self._route(channels_last(view))
            target = total[:, :, y : y + window, x : x + window]
            target[:, 0] += (decisions == 0).to(total.dtype)[:, None, None]
            for index, logits in groups:
                target[index] += logits.softmax(1)
            routed.append((decisions, offsets, num_bits))
        decisions, offsets, num_bits = (torch.stack(part, 1) for part in zip(*routed, strict=True))
        return Segmentation(total.argmax(1).to(torch.uint8), decisions, offsets, num_bits)

    def _route(
        self, slices: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Iterator[tuple[Tensor, Tensor]]]:
        """Returns (decisions, offsets, num_bits, groups); the latter two are filled by `groups`."""
        self.check(slices)
        batch = slices.shape[0]
        decisions = torch.zeros(batch, dtype=torch.long, device=slices.device)
        offsets = slices.new_zeros(batch, 2, dtype=torch.float32)
        num_bits = torch.zeros(batch, self.num_stages, dtype=torch.long, device=slices.device)
        seen = (slices != 0).flatten(1).any(1).nonzero().squeeze(1)
        if len(seen):
            decisions[seen] = self.decide(slices[seen]).argmax(1)

        def groups() -> Iterator[tuple[Tensor, Tensor]]:
            for route in range(1, len(self.routes)):
                index = (decisions == route).nonzero().squeeze(1)
                if len(index):
                    group = channels_last(slices[index])
                    logits, offset, num_bits[index] = self.run(route, group)
                    offsets[index] = offset.float()
                    yield index, logits

        return decisions, offsets, num_bits, groups()


def check_routed(model: object) -> None:
    """Raises ValueError, with the cure, unless a model is a `RoutedSegmenter`."""
    if not isinstance(model, RoutedSegmenter):
        raise ValueError(
            f"model is a {type(model).__name__}, which routes no slices; expected a MedDANet, "
            "whose bank takes any segmenter, or a MedDANetV2"
        )


def check_shape(name: str, output: Tensor | np.ndarray, expected: tuple[int, ...]) -> None:
    """Raises ValueError unless a network's answer has its shape, which broadcasting would hide."""
    if tuple(output.shape) != expected:
        raise ValueError(f"{name} must return shape {list(expected)}, got {list(output.shape)}")


def window_corners(height: int, width: int, window: int) -> tuple[tuple[int, int], ...]:
    """Returns (y, x), in pixels, of every window of a slice, row by row; see `window_origins`."""
    rows, columns = (window_origins(side, window) for side in (height, width))
    return tuple((y, x) for y in rows for x in columns)


def channels_last(input: Tensor) -> Tensor:
    """Lays [N, C, H, W] out as NHWC, which convolutions on CPU and GPU prefer."""
    return input.contiguous(memory_format=torch.channels_last)


def to_memory_format(module: Module, memory_format: torch.memory_format) -> Module:
    """Lays the weights [N, C, H, W] of a module out in a memory format, in place."""
    # PyTorch's stubs leave this form of `to` out
    return module.to(memory_format=memory_format)  # type: ignore[call-overload]
