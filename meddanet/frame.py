"""Which part of its slices a network is shown: as much as in training, the body where it was."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

# first, and one after the last
Extent = tuple[int, int]
# share of a side that the middle of slices as in training may be off; BraTS's is by a third of it
_NEAR = 1 / 15
# one in so many slices tells where the middle is
STEP = 8
# pixels of a row or column that are no body, but strays
_FEW = 4


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
    zero lies about where it lay there; strays, rows and columns of few pixels, may be cut off.

    Args:
        slices: [N, C, H, W], 0 outside of the body.
        stride: Sides are multiples of it.
        smallest: Sides are no smaller.
        canvas: Height and width of the slices in training; None: any size, padded at its ends.
        centre: (y, x) that `middle_of` had there; None: the canvas's.
    """
    size = slices.shape[2], slices.shape[3]
    whole = Frame(0, 0, *(_rounded(max(side, smallest), stride) for side in size))
    if canvas is None:
        return whole
    centre = centre or (canvas[0] / 2, canvas[1] / 2)
    middle = middle_of(slices[::STEP, :1]) or middle_of(slices) or (size[0] / 2, size[1] / 2)
    off = [here - there for here, there in zip(middle, centre, strict=True)]
    near = all(abs(by) <= _NEAR * side for by, side in zip(off, canvas, strict=True))
    if size == canvas and near:
        return whole
    # of nothing to be seen any part will do
    bodies = _body(slices) or [(round(side / 2),) * 2 for side in size]
    lines = zip(off, canvas, bodies, strict=True)
    (top, height), (left, width) = (_line(*line, stride, smallest) for line in lines)
    return Frame(top, left, height, width)


def middle_of(slices: Tensor) -> tuple[float, float] | None:
    """Returns the middle (y, x), in pixels, of what is not zero in slices [N, C, H, W], if any is.

    It is that of the rows, and columns, that hold more than strays.
    """
    found = _body(slices)
    if found is None:
        return None
    y, x = (sum(ends) / 2 for ends in found)
    return y, x


def _body(slices: Tensor) -> tuple[Extent, Extent] | None:
    """Returns the extents of the rows, and columns, with more than strays; of all if all are."""
    seen = slices.ne(0).flatten(0, 1).any(0)
    lines = seen.sum(1), seen.sum(0)
    most = [int(pixels.max()) for pixels in lines]
    if not most[0]:
        return None
    places = [
        (pixels > min(_FEW, largest - 1)).nonzero().flatten().tolist()
        for pixels, largest in zip(lines, most, strict=True)
    ]
    y, x = ((line[0], line[-1] + 1) for line in places)
    return y, x


def _line(off: float, canvas: int, body: Extent, stride: int, smallest: int) -> tuple[int, int]:
    """Returns start and length of the frame along one axis of the slices."""
    begin, end = body
    length = _rounded(max(canvas, smallest, end - begin), stride)
    # all of the body
    return min(max(round(off), end - length), begin), length


def _rounded(side: int, stride: int) -> int:
    return -(-side // stride) * stride
