"""`to_slices` where the networks run: on a GPU a volume is uploaded raw and normalised there.

The CPU takes longer to normalise a volume than a GPU takes to segment it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .axes import lps_axes
from .volume import NOT_FINITE, Volume, VolumeError, check_window, memory_order

# what is copied into pinned memory while the piece before is uploaded
_PIECE = 1 << 22  # values
# slices whose float64 arithmetic is in memory at a time: an L2 cache's worth
_SLAB = 8


def to_slices_on(
    device: torch.device, volume: Volume, window_hu: tuple[float, float] | None = None
) -> Tensor:
    """Returns the normalised axial slices of a volume on a device; see `to_slices`.

    Args:
        device: Where they are computed.
        volume: Raw intensities.
        window_hu: Hounsfield values that become 0 and 1; None normalises as `normalize` does.

    Returns:
        [D, C, H, W], float32, contiguous, complete; equal to those of `to_slices` but for the order
        in which float64 sums are made.

    Raises:
        torch.OutOfMemoryError: If the device has no room for the volume two and a half times.
        VolumeError: If voxels are NaN or infinite.
        ValueError: If the window does not ascend.
    """
    slices = _axial(_uploaded(volume.data, device), volume)
    if not slices.isfinite().all():
        raise VolumeError(f"{volume.name}: {NOT_FINITE}")
    done = _normalized(slices) if window_hu is None else _windowed(slices, *window_hu)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return done


def _uploaded(data: np.ndarray, device: torch.device) -> Tensor:
    """Copies [C, H, W, D] of any memory layout to a device, as it lies in memory."""
    order = memory_order(data)
    stored = torch.from_numpy(np.require(data.transpose(order), np.float32, ["C", "W"]))
    if device.type == "cuda":
        there = torch.empty(stored.shape, device=device)
        pieces = zip(there.flatten().split(_PIECE), stored.flatten().split(_PIECE), strict=True)
        for onto, piece in pieces:
            onto.copy_(piece.pin_memory(), non_blocking=True)
        stored = there
    return stored.permute(*np.argsort(order).tolist())


def _axial(raw: Tensor, volume: Volume) -> Tensor:
    """Returns [C, H, W, D] in the file's voxel order as slices [D, C, H, W] in LPS order."""
    axes, signs = lps_axes(volume.affine)
    height, width, depth = (1 + axis for axis in axes)
    slices = raw.permute(depth, 0, height, width)
    reversed_dims = [dim for dim, sign in zip((2, 3, 0), signs, strict=True) if sign < 0]
    return slices.flip(reversed_dims) if reversed_dims else slices


def _normalized(slices: Tensor) -> Tensor:
    mask, result = _mask(slices), torch.zeros(slices.shape, device=slices.device)
    count = mask.sum(dtype=torch.float64)
    if not count:
        return result
    inside, size = int(mask.flatten().view(torch.uint8).argmax()), mask[0].numel()
    # sums about a value of the modality itself lose nothing to a large offset
    origin = slices[inside // size].flatten(1)[:, inside % size].double()[:, None, None]
    seen = mask.flatten(1).any(1).tolist()
    parts = zip(slices.split(_SLAB), mask.split(_SLAB), result.split(_SLAB), strict=True)
    slabs = [part for number, part in enumerate(parts) if any(seen[number * _SLAB :][:_SLAB])]
    sums = torch.zeros(2, slices.shape[1], dtype=torch.float64, device=slices.device)
    for slab, inside_slab, _ in slabs:
        values = slab.double().sub_(origin).mul_(inside_slab)
        sums += torch.stack([values.sum((0, 2, 3)), values.square_().sum((0, 2, 3))])
    mean, square = sums / count
    spread = (square - mean**2).clamp_min(0).sqrt()
    gain = torch.where(spread == 0, 0.0, 1 / spread)[:, None, None]
    mean = mean[:, None, None] + origin
    for slab, inside_slab, target in slabs:
        target.copy_(slab.double().sub_(mean).mul_(gain).mul_(inside_slab))
    return result


def _mask(slices: Tensor) -> Tensor:
    """Returns where the sum over channels is positive, [D, 1, H, W]."""
    # channel after channel, as numpy adds them: what is positive must not hang on the order
    total = slices[:, 0].clone()
    for channel in slices.unbind(1)[1:]:
        total += channel
    return (total > 0)[:, None]


def _windowed(slices: Tensor, low: float, high: float) -> Tensor:
    check_window(low, high)
    # by a tensor: a number's reciprocal would be multiplied by
    width = torch.tensor(high - low, device=slices.device)
    return slices.clone(memory_format=torch.contiguous_format).sub_(low).div_(width).clamp_(0, 1)
