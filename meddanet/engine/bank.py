"""Med-DANet's bank of segmenters: a slice's way is through the member that it gets."""

from __future__ import annotations

from typing import Protocol

from .slices import Array, Deciding, SliceEngine


class BankNetworks(Deciding, Protocol):
    """A decision network and a bank as an executor runs them."""

    def member(self, index: int, image: Array) -> Array:
        """Returns labels uint8 [H, W] of an image float32 [C, H, W] by a member of the bank."""


class BankEngine(SliceEngine):
    """Segments slices as `MedDANet.segment` does; see `SliceEngine`."""

    def _segment(
        self, image: Array, labels: Array, route: int, offset: Array, num_bits: Array
    ) -> None:
        labels[...] = self._networks.member(route - 1, image)
