"""How often each route is taken, and where in the volume: Figs. 5-6 of Med-DANet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ActivationRatio:
    """Share of the decisions that went to each route.

    Attributes:
        routes: Names of the R routes.
        overall: [R], sums to 1.
        by_position: [bins, R], each row sums to 1: slices from the first to the last of a volume,
            in bins of equal relative height. NaN where no volume has a slice.
    """

    routes: tuple[str, ...]
    overall: np.ndarray
    by_position: np.ndarray

    def render(self) -> str:
        """Returns the shares in percent as text, a line per bin and one for all."""
        bins = len(self.by_position)
        names = [f"{100 * i // bins:3d}-{100 * (i + 1) // bins:3d} %" for i in range(bins)]
        rows = [*zip(names, self.by_position, strict=True), ("all", self.overall)]
        lines = [f"{'position':<12}" + "".join(f"{route:>10}" for route in self.routes)]
        lines += [f"{name:<12}" + "".join(f"{100 * x:>10.1f}" for x in row) for name, row in rows]
        return "\n".join(lines)


def activation_ratio(
    decisions: Iterable[np.ndarray], routes: Sequence[str], bins: int = 10
) -> ActivationRatio:
    """Counts decisions over volumes.

    Args:
        decisions: Per volume, [D] or [D, M] indices into `routes`, slices in order
            (`Prediction.decisions`).
        routes: Names of the routes.
        bins: Into how many parts of equal height a volume is cut.

    Raises:
        ValueError: If there are no decisions.
    """
    counts = np.zeros((bins, len(routes)), np.int64)
    for volume in decisions:
        depth = len(volume)
        rows = np.arange(depth) * bins // max(depth, 1)
        rows = np.repeat(rows, np.asarray(volume).size // max(depth, 1))
        np.add.at(counts, (rows, np.asarray(volume).ravel()), 1)
    if not counts.any():
        raise ValueError("no decisions were given; expected at least one volume with a slice")
    with np.errstate(invalid="ignore"):
        by_position = counts / counts.sum(1, keepdims=True)
    return ActivationRatio(tuple(routes), counts.sum(0) / counts.sum(), by_position)
