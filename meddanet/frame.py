"""Which part of its slices a network is shown: as much as in training, the body where it was."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

# first, and one after the last
Extent = tuple[int, int]
# pixels that the middle of slices as in training may be off; theirs were off by 5 and less
_NEAR = 16
# one in so many slices tells where the middle is
_STEP = 8


@dataclass(frozen=True)
class Frame:
    """A rectangle of all slices of a volume; it may reach beyond their ends.

    Attributes:
        top, left: (y, x) of its corner in the slices; below 0 where it begins before they do.
        height, width: Its size, pixels all of them.
    """

    top: int
    left: int
    height: int
    width: int

    def take(self, slices: Tensor) -> Tensor:
        """Cuts slices [N, C, H, W] to the frame [N, C, height, width], zeros beyond their ends."""
        pads = self._pads(*slices.shape[2:])
        return F.pad(slices, pads) if any(pads) else slices

    def put_back(self, labels: Tensor, size: tuple[int, int]) -> Tensor:
        """Puts labels [N, height, width] back into slices [N, H, W] of a size, zeros around."""
        pads = [-pad for pad in self._pads(*size)]
        return F.pad(labels, pads) if any(pads) else labels

    def _pads(self, rows: int, columns: int) -> list[int]:
        """Returns what `F.pad` adds to slices, negative where it cuts them."""
        right, bottom = self.left + self.width - columns, self.top + self.height - rows
        return [-self.left, right, -self.top, bottom]


def frame_of(
    slices: Tensor,
    stride: int,
    smallest: int,
    canvas: tuple[int, int] | None = None,
    centre: tuple[float, float] | None = None,
) -> Frame:
    """Returns what a network is to see of slices.

    A network that decides by averages over a slice takes one with a wide margin for empty, and one
    whose middle lies elsewhere for another part of the body. So slices of another size than those
    that it was trained on, or whose middle is far off, are cut and padded until all that is not
    zero lies where it lay there.

    Args:
        slices: [N, C, H, W], 0 outside of the body.
        stride: Sides are multiples of it.
        smallest: Sides are no smaller.
        canvas: Height and width of the slices in training; None: any size, padded at its ends.
        centre: (y, x) of the middle of what was not zero there; None: the canvas's.
    """
    size = slices.shape[2], slices.shape[3]
    if canvas is None:
        return Frame(0, 0, *(_rounded(max(side, smallest), stride) for side in size))
    centre = centre or (canvas[0] / 2, canvas[1] / 2)
    if size == canvas and _is_near(_box(slices[::_STEP, :1]), centre):
        return Frame(0, 0, *size)
    lines = zip(_box(slices), canvas, centre, strict=True)
    (top, height), (left, width) = (_line(*line, stride, smallest) for line in lines)
    return Frame(top, left, height, width)


def _box(slices: Tensor) -> tuple[Extent, Extent]:
    """Returns the extents of what is not zero in any of the slices; their middle if nothing is."""
    y, x = (side // 2 for side in slices.shape[2:])
    return extents(slices.ne(0).flatten(0, 1).any(0)) or ((y, y), (x, x))


def _is_near(box: tuple[Extent, Extent], centre: tuple[float, float]) -> bool:
    """Tells whether the middle of a box is about where it is expected."""
    return all(abs(sum(ends) / 2 - at) <= _NEAR for ends, at in zip(box, centre, strict=True))


def extents(seen: Tensor) -> tuple[Extent, Extent] | None:
    """Returns the extent of the rows, and columns, of booleans [H, W] that hold True, if any do."""
    rows, columns = (seen.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
    return ((rows[0], rows[-1] + 1), (columns[0], columns[-1] + 1)) if rows else None


def _line(
    box: Extent, canvas: int, centre: float, stride: int, smallest: int
) -> tuple[int, int]:
    """Returns start and length of the frame along one axis of the slices."""
    begin, end = box
    length = _rounded(max(canvas, smallest, end - begin), stride)
    start = round((begin + end) / 2 - centre)
    # all of the box
    return min(max(start, end - length), begin), length


def _rounded(side: int, stride: int) -> int:
    return -(-side // stride) * stride
