"""What `route` reads and writes: frames of the routes' views and tiles, slots of their groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# elements between what different groups own, so that each group's part is aligned as an allocation
_ALIGNED = 4


class Routing(NamedTuple):
    """Where N slices go by R routes: G = R - 1 groups of M = N slots, none for what is skipped.

    Slots from a group's count on hold what they held before: a slice's number and positions that
    are valid for the group, at first zeros.
    """

    decisions: Tensor  # int64 [N]
    offsets: Tensor  # float32 [N, 2], (y, x), NaN where the place is
    slices: Tensor  # int32 [G, M], the slice of each slot
    counts: Tensor  # int32 [G, 1], slots in use
    corner: Tensor  # int32 [G, M, 2], (y, x) of the view in its slice
    start: Tensor  # int32 [G, M, 2], (y, x) of the tile in its slice
    shift: Tensor  # int32 [G, M, 2], start - corner


def new_routing(samples: int, routes: int, device: torch.device | str) -> Routing:
    """Allocates the routing of N slices by R routes, no slot in use."""
    groups, pitch = routes - 1, -(-samples // _ALIGNED) * _ALIGNED

    def integers(*shape: int) -> Tensor:
        return torch.zeros(groups, *shape, dtype=torch.int32, device=device)

    return Routing(
        torch.zeros(samples, dtype=torch.int64, device=device),
        torch.zeros(samples, 2, dtype=torch.float32, device=device),
        integers(pitch)[:, :samples], integers(_ALIGNED)[:, :1],
        *(integers(pitch, 2)[:, :samples] for _ in range(3)),
    )


def new_frames(
    size: tuple[int, int], smallest: int, crops: Sequence[int], reaches: Sequence[int],
    device: torch.device | str,
) -> Tensor:
    """Returns where views and tiles of each route may lie: skip, crops, whole.

    Args:
        size: (height, width) of a slice.
        smallest: Side of the crop that places are shares of.
        crops: Sides of the crops.
        reaches: Pixels by which each crop's tile is larger than it on every side, less at borders.
        device: Where the frames are read.

    Returns:
        int32 [R, 4, 2], R = len(crops) + 2: play, last, reach, limit, (y, x) of each.
    """
    whole = [(side - smallest, 0, 0, 0) for side in size]
    frames = [whole]
    for crop, reach in zip(crops, reaches, strict=True):
        frames.append([
            (side - smallest, side - crop, reach, side - min(crop + 2 * reach, side))
            for side in size
        ])
    frames.append(whole)
    return torch.tensor(frames, dtype=torch.int32, device=device).transpose(1, 2).contiguous()
