"""From logits to slots: each slice's route and place, and the slices of every route in a row.

    decision = argmax_r logits_r            0 where nothing is seen
    offset   = round(min(max((sigmoid(place) - 1/2) * play + last / 2, 0), last))       likewise
    corner   = offset, 0 where it is NaN
    start    = min(max(corner - reach, 0), limit)         shift = start - corner

play, last, reach and limit are the frame of the decision's route (`route_call.py`): offset and
corner place its view, start the tile that its last stage sees around it, where there is one. Route
0 skips; group g lists the slices of route g + 1 in ascending order. The first of several largest
logits wins and a NaN is larger than any number, as in `torch.argmax`; halves round to even.

The offset is `med_danet_v2.place` at whole pixels, in float32. An executor's sigmoid may differ
from PyTorch's in its last bits: an offset within 1e-4 pixels or so of a half may round the other
way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import triton_runs
from .route_call import Routing, new_routing


def route_slices_reference(
    logits: Tensor, places: Tensor, seen: Tensor, frames: Tensor
) -> Routing:
    """Plain PyTorch statement of `route_slices`, group by group."""
    logits, places = _checked(logits, places, seen, frames)
    found = new_routing(len(logits), len(frames), logits.device)
    decisions = logits.argmax(1).where(seen != 0, 0)
    play, last, reach, limit = frames[decisions].unbind(1)
    offsets = (places.sigmoid() - 0.5) * play + last.float() / 2
    offsets = torch.minimum(offsets.clamp_min(0), last.float()).round()
    offsets = offsets.where(seen[:, None] != 0, 0)
    corner = offsets.nan_to_num().int()
    start = torch.minimum((corner - reach).clamp_min(0), limit)
    for group, count in enumerate(found.counts):
        chosen = (decisions == group + 1).nonzero().flatten()
        count.fill_(len(chosen))
        for target, values in zip(
            found[4:], (corner, start, start - corner), strict=True
        ):
            target[group, : len(chosen)] = values[chosen]
        found.slices[group, : len(chosen)] = chosen.int()
    return found._replace(decisions=decisions, offsets=offsets)


def _checked(
    logits: Tensor, places: Tensor, seen: Tensor, frames: Tensor
) -> tuple[Tensor, Tensor]:
    """Checks the arguments and returns the first two as kernels read them."""
    if seen.dim() != 1 or seen.is_floating_point():
        raise ValueError(f"seen must be integers [N], got {seen.dtype} {list(seen.shape)}")
    samples, routes = len(seen), len(frames)
    if frames.dtype != torch.int32 or routes < 2 or frames.shape[1:] != (4, 2):
        raise ValueError(
            f"frames must be int32 [R, 4, 2], got {frames.dtype} {list(frames.shape)}"
        )
    if logits.shape != (samples, routes) or places.shape != (samples, 2):
        raise ValueError(
            f"logits must be [{samples}, {routes}] and places [{samples}, 2], got "
            f"{list(logits.shape)} and {list(places.shape)}"
        )
    return logits.detach().float().contiguous(), places.detach().float().contiguous()


def route_slices(logits: Tensor, places: Tensor, seen: Tensor, frames: Tensor) -> Routing:
    """Routes slices and lists those of every route; has no gradient.

    Args:
        logits: [N, R] of the routes; anything where `seen` is 0.
        places: [N, 2], (y, x), logits of the crop's place; likewise.
        seen: Integer [N]: a slice is skipped where it is 0.
        frames: int32 [R, 4, 2], as `meddanet.kernels.route_call.new_frames` makes them.

    Returns:
        A `Routing`; what no slot in use holds is zero.

    Raises:
        ValueError: If a shape or dtype does not fit.
    """
    logits, places = _checked(logits, places, seen, frames)
    if not triton_runs(logits):
        return route_slices_reference(logits, places, seen, frames)
    from . import route_triton

    found = new_routing(len(logits), len(frames), logits.device)
    route_triton.run(
        logits, places, seen.to(torch.int32).contiguous(), frames.contiguous(), found
    )
    return found
