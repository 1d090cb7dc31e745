"""Med-DANet V2: skip, crop or whole per slice, 8 or 16 bit per stage (WACV 2024).

    decide -> locate + bilinear_crop -> segmenter -> affine_paste -> last stage

`forward` is the differentiable path of training, `segment` the hard routing of inference; both use
the same parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data.volume import window_origins
from .kernels import affine_paste, bilinear_crop
from .layers import image_gradients
from .networks.unet import check_input


class TrainingOutput(NamedTuple):
    """What `MedDANetV2.forward` returns; R routes, S encoder stages, B = R - 1 run branches.

    Attributes:
        branch_logits: B tensors [N, K, H, W]: one per crop size, then whole.
        mixed: [N, K, H, W] probabilities of the chosen route; gradient by straight-through.
        choice: [N, R] one-hot of the chosen route, straight-through to the Gumbel-softmax.
        route_logits: [N, R].
        position: [N, 2] in [0, 1], (y, x) share of the free play of the crop.
        num_bits: B tensors [N, S] of float widths.
    """

    branch_logits: list[Tensor]
    mixed: Tensor
    choice: Tensor
    route_logits: Tensor
    position: Tensor
    num_bits: list[Tensor]


class Segmentation(NamedTuple):
    """What `MedDANetV2.segment` returns; with windows, a window axis M follows N but in `labels`.

    Attributes:
        labels: [N, H, W] uint8 classes.
        decisions: [N] int64, index into `routes`.
        offsets: [N, 2] float32, (y, x) of the crop in pixels, 0 where none was made.
        num_bits: [N, S] int64 widths per encoder stage, 0 where it did not run.
    """

    labels: Tensor
    decisions: Tensor
    offsets: Tensor
    num_bits: Tensor


class MedDANetV2(nn.Module):
    """A segmenter that looks at each slice only as closely as it needs.

    Args:
        segmenter: Has `features(input, choose_bits)`, `last_stage`, `stride`, `in_channels`,
            `num_classes`; its own last stage serves whole slices.
        policy: Maps [N, C, H, W] to route logits [N, 2 + len(crop_sizes)].
        position: Maps [N, C, H, W] to [N, 2] logits of the crop's place.
        bit_selectors: One `BitSelector` per encoder stage.
        crop_last_stages: One last stage per crop size.
        crop_sizes: Sides P of the crops in pixels, multiples of the segmenter's stride.
        decision_scale: Policy and position network see the slice averaged over squares of this
            many pixels; 1 as in the papers, 2 for a quarter of their cost.
    """

    def __init__(
        self,
        *,
        segmenter: nn.Module,
        policy: nn.Module,
        position: nn.Module,
        bit_selectors: nn.ModuleList,
        crop_last_stages: nn.ModuleList,
        crop_sizes: tuple[int, ...],
        decision_scale: int = 1,
    ) -> None:
        super().__init__()
        self.segmenter = segmenter
        self.policy = policy
        self.position = position
        self.bit_selectors = bit_selectors
        self.crop_last_stages = crop_last_stages
        self.crop_sizes = crop_sizes
        self.decision_scale = decision_scale
        self.routes = ("skip", *(f"crop-{size}" for size in crop_sizes), "whole")
        self.in_channels, self.num_classes = segmenter.in_channels, segmenter.num_classes
        self.stride = segmenter.stride

    # parts ---------------------------------------------------------------------------------

    def decide(self, slices: Tensor) -> Tensor:
        """Returns route logits [N, R] of slices [N, C, H, W]."""
        return self.policy(self._at_a_glance(slices))

    def locate(self, slices: Tensor) -> Tensor:
        """Returns where crops go, [N, 2] in [0, 1]: (y, x) share of the free play H - P, W - P."""
        return self.position(self._at_a_glance(slices)).sigmoid()

    def _at_a_glance(self, slices: Tensor) -> Tensor:
        if self.decision_scale == 1:
            return slices
        return channels_last(F.avg_pool2d(slices, self.decision_scale))

    def offset(self, position: Tensor, size: int, height: int, width: int) -> Tensor:
        """Turns `locate`'s shares into the (y, x) offset in pixels of a P x P crop, [N, 2]."""
        return position * position.new_tensor([height - size, width - size])

    def features(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Runs the segmenter before its last stage, widths chosen per sample and stage.

        Returns:
            Features [N, b, H, W] and float widths [N, S].
        """
        gradients = image_gradients(input)
        chosen: list[Tensor] = []

        def choose_bits(stage: int, feature: Tensor) -> Tensor:
            chosen.append(self.bit_selectors[stage](gradients, feature))
            return chosen[-1]

        features = self.segmenter.features(input, choose_bits)
        return features, torch.stack(chosen, 1)

    def crop_branch(self, slices: Tensor, offset: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Segments one crop per slice and pastes its features back before the last stage.

        Args:
            slices: [N, C, H, W].
            offset: [N, 2], (y, x), in pixels, of the crop's top-left corner.
            index: Which of `crop_sizes`.

        Returns:
            Logits [N, K, H, W] and float widths [N, S].
        """
        patch = bilinear_crop(slices, offset, self.crop_sizes[index])
        features, num_bits = self.features(channels_last(patch))
        canvas = affine_paste(features, offset, tuple(slices.shape[2:]))
        return self.crop_last_stages[index](channels_last(canvas)), num_bits

    def whole_branch(self, slices: Tensor) -> tuple[Tensor, Tensor]:
        """Segments whole slices: logits [N, K, H, W] and float widths [N, S]."""
        features, num_bits = self.features(slices)
        return self.segmenter.last_stage(features), num_bits

    # training ------------------------------------------------------------------------------

    def forward(self, slices: Tensor) -> TrainingOutput:
        """Runs every branch on every slice and mixes them by a Gumbel-softmax choice.

        In `eval()` the choice is the most probable route, without noise.

        Args:
            slices: [N, C, H, W], H and W multiples of the stride, at least the largest crop.
        """
        self.check(slices)
        height, width = slices.shape[2:]
        position = self.locate(slices)
        branches = [
            self.crop_branch(slices, self.offset(position, size, height, width), index)
            for index, size in enumerate(self.crop_sizes)
        ]
        branches.append(self.whole_branch(slices))
        branch_logits, num_bits = map(list, zip(*branches, strict=True))
        route_logits = self.decide(slices)
        if self.training:
            choice = F.gumbel_softmax(route_logits, tau=1.0, hard=True)
        else:
            choice = F.one_hot(route_logits.argmax(1), len(self.routes)).to(slices.dtype)
        background = torch.zeros_like(branch_logits[0])
        background[:, 0] = 1
        probability = torch.stack([background, *(x.softmax(1) for x in branch_logits)], 1)
        mixed = (choice[:, :, None, None, None] * probability).sum(1)
        return TrainingOutput(branch_logits, mixed, choice, route_logits, position, num_bits)

    # inference -----------------------------------------------------------------------------

    @torch.inference_mode()
    def segment(self, slices: Tensor) -> Segmentation:
        """Routes every slice, runs each group of equal decision as one batch.

        Nothing is computed for a skipped slice but its decision, and not even that for a slice
        without any signal. Crops are made at whole pixels, where they are exact copies.

        Args:
            slices: [N, C, H, W], H and W multiples of the stride, at least the largest crop.

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

    @torch.inference_mode()
    def segment_windows(self, slices: Tensor, window: int = 128) -> Segmentation:
        """Decides per overlapping window and averages probabilities: the papers' protocol.

        Args:
            slices: [N, C, H, W].
            window: Side of a window in pixels; stride is a third of it.

        Returns:
            A `Segmentation` with M windows per slice, in row-major order of their origins.
        """
        origins = [
            (y, x)
            for y in window_origins(slices.shape[2], window)
            for x in window_origins(slices.shape[3], window)
        ]
        batch, _, height, width = slices.shape
        total = slices.new_zeros(batch, self.num_classes, height, width)
        routed = []
        for y, x in origins:
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
        batch, _, height, width = slices.shape
        decisions = torch.zeros(batch, dtype=torch.long, device=slices.device)
        offsets = slices.new_zeros(batch, 2, dtype=torch.float32)
        num_bits = torch.zeros(
            batch, len(self.bit_selectors), dtype=torch.long, device=slices.device
        )
        seen = (slices != 0).flatten(1).any(1).nonzero().squeeze(1)
        if len(seen):
            decisions[seen] = self.decide(slices[seen]).argmax(1)

        def groups() -> Iterator[tuple[Tensor, Tensor]]:
            for route in range(1, len(self.routes)):
                index = (decisions == route).nonzero().squeeze(1)
                if len(index) == 0:
                    continue
                group = channels_last(slices[index])
                if route == len(self.routes) - 1:
                    logits, bits = self.whole_branch(group)
                else:
                    size = self.crop_sizes[route - 1]
                    offset = self.offset(self.locate(group), size, height, width).round()
                    logits, bits = self.crop_branch(group, offset, route - 1)
                    offsets[index] = offset
                num_bits[index] = bits.long()
                yield index, logits

        return decisions, offsets, num_bits, groups()

    def check(self, slices: Tensor) -> None:
        """Raises ValueError, with the cure, unless the model takes `slices`."""
        check_input(slices, self.in_channels, self.stride)
        if min(slices.shape[2:]) < max(self.crop_sizes, default=0):
            raise ValueError(
                f"slices of {slices.shape[2]}x{slices.shape[3]} are smaller than the crop of "
                f"{max(self.crop_sizes)}; pad them, or build the model with smaller crop_sizes"
            )


def channels_last(input: Tensor) -> Tensor:
    """Lays [N, C, H, W] out as NHWC, which convolutions on CPU and GPU prefer."""
    return input.contiguous(memory_format=torch.channels_last)
