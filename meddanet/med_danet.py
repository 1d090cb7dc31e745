"""Med-DANet: a decision network picks, per slice, skip or one member of a model bank (ECCV 2022).

    y = D(x) o B(x),   B = [skip, M1, ..., Mn]                                        (Eqs. 1-3)

`forward` runs everything, for training; `segment`, from `RoutedSegmenter`, runs what is decided.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn

from .routing import RoutedSegmenter


class BankOutput(NamedTuple):
    """What `MedDANet.forward` returns.

    Attributes:
        member_logits: n tensors [N, K, H, W], one per member of the bank.
        route_logits: [N, 1 + n], skip first.
    """

    member_logits: list[Tensor]
    route_logits: Tensor


class MedDANet(RoutedSegmenter):
    """A bank of segmenters of different cost, of which each slice gets one, or none.

    Args:
        bank: n modules, cheapest first, in any sequence; each maps [N, in_channels, H, W] to logits
            [N, num_classes, H, W].
        decision: Maps [N, in_channels, H, W] to route logits [N, 1 + n].
        in_channels: Channels of the image.
        num_classes: Classes K, background included.
        stride: What the sides of slices must be multiples of, for every member.

    Raises:
        ValueError: If the bank is empty.

    Source: Med-DANet, section 3.
    """

    def __init__(
        self,
        *,
        bank: Iterable[nn.Module],
        decision: nn.Module,
        in_channels: int,
        num_classes: int,
        stride: int = 8,
    ) -> None:
        super().__init__()
        self.bank = nn.ModuleList(bank)
        if not len(self.bank):
            raise ValueError("the bank is empty; expected at least one segmenter")
        self.decision = decision
        self.routes = ("skip", *(f"M{number}" for number in range(1, len(self.bank) + 1)))
        self.in_channels, self.num_classes = in_channels, num_classes
        self.stride = self.smallest_side = stride

    def decide(self, slices: Tensor) -> Tensor:
        """Returns route logits [N, 1 + n] of slices [N, C, H, W]."""
        return self.decision(slices)

    def forward(self, slices: Tensor) -> BankOutput:
        """Runs every member and the decision network on every slice [N, C, H, W]."""
        self.check(slices)
        return BankOutput([member(slices) for member in self.bank], self.decide(slices))

    def run(self, route: int, slices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Runs member `route` on slices; a bank crops nothing and chooses no widths."""
        logits = self.bank[route - 1](slices)
        return logits, logits.new_zeros(len(slices), 2), logits.new_zeros(len(slices), 0).long()
