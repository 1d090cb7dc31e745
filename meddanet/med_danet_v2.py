"""Med-DANet V2: skip, crop or whole per slice, 8 or 16 bit per stage (WACV 2024).

    decide -> locate + bilinear_crop -> segmenter -> affine_paste -> last stage

`forward` is the differentiable path of training, `segment` the hard routing of inference; both use
the same parts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import affine_paste, bilinear_crop
from .layers import image_gradients
from .routing import RoutedSegmenter, channels_last, check_shape


class TrainingOutput(NamedTuple):
    """What `MedDANetV2.forward` returns; R routes, S encoder stages, B = R - 1 run branches.

    Attributes:
        branch_logits: B tensors [N, K, H, W]: one per crop size, then whole.
        mixed: [N, K, H, W] probabilities of the chosen route; gradient by straight-through.
        choice: [N, R] one-hot of the chosen route, straight-through to the Gumbel-softmax.
        route_logits: [N, R].
        position: [N, 2] in [0, 1], (y, x) share of the free play of the smallest crop.
        num_bits: B tensors [N, S] of float widths.
    """

    branch_logits: list[Tensor]
    mixed: Tensor
    choice: Tensor
    route_logits: Tensor
    position: Tensor
    num_bits: list[Tensor]


class MedDANetV2(RoutedSegmenter):
    """A segmenter that looks at each slice only as closely as it needs.

    Args:
        segmenter: Has `features(input, choose_bits)`, `last_stage`, `stride`, `in_channels`,
            `num_classes`; its own last stage serves whole slices. Executors of `compile_engine`
            other than eager need the parts, `features` and `encode` of `UNet`.
        policy: Maps [N, C, H, W] to route logits [N, 2 + len(crop_sizes)].
        position: Maps [N, C, H, W] to [N, 2] logits of the crop's place.
        bit_selectors: One `BitSelector` per encoder stage, of which `features` asks
            `choose_bits(stage, feature)`; none where nothing is chosen.
        crop_last_stages: One last stage per crop size.
        crop_sizes: Sides P of the crops in pixels, multiples of the segmenter's stride.
        decision_scale: Policy and position network see the slice averaged over squares of this
            many pixels; 1 as in the papers, 2 for a quarter of their cost.

    Raises:
        ValueError: If the crop sizes are no multiples of the stride, or not one last stage each.
            When it runs, likewise: if what a network returns is of another shape than told here.
    """

    def __init__(
        self,
        *,
        segmenter: Any,
        policy: nn.Module,
        position: nn.Module,
        bit_selectors: Iterable[nn.Module],
        crop_last_stages: Iterable[nn.Module],
        crop_sizes: tuple[int, ...],
        decision_scale: int = 1,
    ) -> None:
        super().__init__()
        self.segmenter = segmenter
        self.policy = policy
        self.position = position
        self.bit_selectors = nn.ModuleList(bit_selectors)
        self.crop_last_stages = nn.ModuleList(crop_last_stages)
        self.crop_sizes = crop_sizes
        self.decision_scale = decision_scale
        self.routes = ("skip", *(f"crop-{size}" for size in crop_sizes), "whole")
        self.in_channels, self.num_classes = segmenter.in_channels, segmenter.num_classes
        self.stride = segmenter.stride
        if any(size < 1 or size % self.stride for size in crop_sizes):
            raise ValueError(f"crop_sizes must be multiples of {self.stride}, got {crop_sizes}")
        if len(self.crop_last_stages) != len(crop_sizes):
            raise ValueError(
                f"crop_last_stages must be one for each of {len(crop_sizes)} crop_sizes, got "
                f"{len(self.crop_last_stages)}"
            )
        self.smallest_crop = min(crop_sizes, default=0)
        self.smallest_side = max(crop_sizes, default=self.stride)
        self.num_stages = len(self.bit_selectors)

    # parts ---------------------------------------------------------------------------------

    def decide(self, slices: Tensor) -> Tensor:
        """Returns route logits [N, R] of slices [N, C, H, W]."""
        logits = self.policy(self.at_a_glance(slices))
        check_shape("policy", logits, (slices.shape[0], len(self.routes)))
        return logits

    def locate(self, slices: Tensor) -> Tensor:
        """Returns where crops go, [N, 2] in [0, 1]: (y, x) share of the free play H - P, W - P.

        P is the smallest crop's side; larger ones have the same centre, as far as the slice goes.
        """
        logits = self.position(self.at_a_glance(slices))
        check_shape("position", logits, (slices.shape[0], 2))
        return logits.sigmoid()

    def at_a_glance(self, slices: Tensor) -> Tensor:
        """Returns slices [N, C, H, W] as policy and position network see them."""
        if self.decision_scale == 1:
            return slices
        return channels_last(F.avg_pool2d(slices, self.decision_scale))

    def offset(self, position: Tensor, size: int, height: int, width: int) -> Tensor:
        """Turns `locate`'s shares into the (y, x) offset in pixels of a P x P crop, [N, 2]."""
        return place(position, self.smallest_crop, size, position.new_tensor([height, width]))

    def features(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Runs the segmenter before its last stage, widths chosen per sample and stage.

        Returns:
            Features [N, b, H, W] and float widths [N, S].
        """
        gradients = image_gradients(input) if self.num_stages else None
        chosen: list[Tensor] = []

        def choose_bits(stage: int, feature: Tensor) -> Tensor:
            chosen.append(self.bit_selectors[stage](gradients, feature))
            return chosen[-1]

        features = self.segmenter.features(input, choose_bits)
        # not len(), which would fix the number of slices of an exported graph
        batch, size = input.shape[0], input.shape[2:]
        check_shape("segmenter.features", features, (batch, features.shape[1], *size))
        if len(chosen) != self.num_stages:
            raise ValueError(
                f"segmenter.features must ask choose_bits once for each of {self.num_stages} "
                f"bit_selectors, asked {len(chosen)} times"
            )
        return features, torch.stack(chosen, 1) if chosen else input.new_zeros(len(input), 0)

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
        height, width = slices.shape[2:]
        canvas = affine_paste(features, offset, (height, width))
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

    def run(self, route: int, slices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Runs the crop or whole branch on slices; crops are placed at whole pixels."""
        if route == len(self.routes) - 1:
            logits, num_bits = self.whole_branch(slices)
            return logits, num_bits.new_zeros(len(slices), 2), num_bits.long()
        height, width = slices.shape[2:]
        offset = self.offset(self.locate(slices), self.crop_sizes[route - 1], height, width).round()
        logits, num_bits = self.crop_branch(slices, offset, route - 1)
        return logits, offset, num_bits.long()

    def check(self, slices: Tensor) -> None:
        """Raises ValueError, with the cure, unless the model takes slices of this shape."""
        super().check(slices)
        if min(slices.shape[2:]) < self.smallest_side:
            raise ValueError(
                f"slices of {slices.shape[2]}x{slices.shape[3]} are smaller than the crop of "
                f"{self.smallest_side}; pad them, or build the model with smaller crop_sizes"
            )


def place(position: Tensor, smallest: int, size: int | Tensor, sides: Tensor) -> Tensor:
    """Returns the (y, x) offset [N, 2] of crops by the shares [N, 2] that `locate` returns.

    Args:
        position: Shares of the free play of the smallest crop.
        smallest: Side of the smallest crop, in pixels.
        size: Side of the crop, or of each, [N, 1] or [N, 2].
        sides: [2], height and width of the slice.
    """
    last = sides - size
    offset = (position - 0.5) * (sides - smallest) + last / 2
    return torch.minimum(offset.clamp_min(0), last)
