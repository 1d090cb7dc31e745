"""The Triton kernel that routes a chunk of slices in one program; `route.py` has the equations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .backend import tl, triton
from .route_call import Routing, new_frames, new_routing

# slices at a time, each in a thread of its own; others were not tried on a GPU
BLOCK = 256


@triton.jit
def _largest(logits_ptr, n, samples, ROUTES: tl.constexpr):
    """Finds the first largest logit of slices n."""
    best = tl.full(n.shape, float("-inf"), tl.float32)
    largest = tl.zeros(n.shape, tl.int32)
    for route in tl.static_range(ROUTES):
        logit = tl.load(logits_ptr + n * ROUTES + route, mask=n < samples, other=0.0)
        # a NaN beats any number, and the first one stays
        larger = (logit > best) | ((logit != logit) & (best == best))
        best = tl.where(larger, logit, best)
        largest = tl.where(larger, route, largest)
    return largest


@triton.jit
def _offset(place, play, last):
    """Turns a logit of places into whole pixels; a NaN stays."""
    last = last.to(tl.float32)
    share = tl.div_rn(tl.full(place.shape, 1.0, tl.float32), 1 + tl.exp(-place))
    offset = (share - 0.5) * play.to(tl.float32) + last * 0.5
    # comparisons keep a NaN
    offset = tl.where(offset < 0, 0.0, offset)
    offset = tl.where(offset > last, last, offset)
    # half to even: beyond 2^23 a sum has no bits left for a fraction
    return (offset + 12582912.0) - 12582912.0


@triton.jit(do_not_specialize=["samples", "stages", "pitch", "count_pitch"])
def route_kernel(
    logits_ptr, places_ptr, seen_ptr, frames_ptr, decisions_ptr, offsets_ptr, slices_ptr, count_ptr,
    corner_ptr, start_ptr, shift_ptr, bits_ptr,
    samples, stages, pitch, count_pitch,
    ROUTES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """Routes all slices, BLOCK after BLOCK in one program, so that groups keep their order."""
    route = tl.arange(0, BLOCK_R)
    axis = tl.arange(0, 2)[None, :]
    used = tl.zeros([BLOCK_R], tl.int32)
    for first in tl.range(0, samples, BLOCK):
        n = first + tl.arange(0, BLOCK)
        known = n < samples
        seen = tl.load(seen_ptr + n, mask=known, other=0) != 0
        decision = tl.where(seen, _largest(logits_ptr, n, samples, ROUTES), 0)
        tl.store(decisions_ptr + n, decision.to(tl.int64), mask=known)
        if bits_ptr is not None:
            for stage in tl.range(0, stages):
                tl.store(bits_ptr + stage * samples + n, 0, mask=known)

        pair, both = 2 * n[:, None] + axis, known[:, None]
        frame_ptr = frames_ptr + 8 * decision[:, None] + axis
        place = tl.load(places_ptr + pair, mask=both, other=0.0)
        offset = _offset(place, tl.load(frame_ptr), tl.load(frame_ptr + 2))
        # of what is not seen the networks may say anything
        offset = tl.where(seen[:, None], offset, 0.0)
        tl.store(offsets_ptr + pair, offset, mask=both)
        corner = tl.where(offset == offset, offset, 0.0).to(tl.int32)
        start = tl.maximum(corner - tl.load(frame_ptr + 4), 0)
        start = tl.minimum(start, tl.load(frame_ptr + 6))

        # a slice's slot is the number of those before it on its route
        chosen = ((decision[:, None] == route[None, :]) & both).to(tl.int32)
        rank = tl.cumsum(chosen, 0) - 1 + used[None, :]
        row = (decision - 1) * pitch + tl.sum(chosen * rank, 1)
        used += tl.sum(chosen, 0)
        taken = known & (decision > 0)
        tl.store(slices_ptr + row, n, mask=taken)
        pair, both = 2 * row[:, None] + axis, taken[:, None]
        tl.store(corner_ptr + pair, corner, mask=both)
        tl.store(start_ptr + pair, start, mask=both)
        tl.store(shift_ptr + pair, start - corner, mask=both)
    tl.store(count_ptr + (route - 1) * count_pitch, used, mask=(route > 0) & (route < ROUTES))


def run(
    logits: Tensor, places: Tensor, seen: Tensor, frames: Tensor, routing: Routing,
    num_bits: Tensor | None = None,
) -> None:
    """Launches the routing into given outputs, once, without a word from the device.

    Args:
        logits: float32 [N, R], dense.
        places: float32 [N, 2], dense.
        seen: int32 [N], dense.
        frames: int32 [R, 4, 2], dense.
        routing: Of `new_routing`; slots that are not in use stay as they are.
        num_bits: int32 [S, N], dense, set to 0: no stage has run yet. None: there is none.
    """
    samples, routes = logits.shape
    with torch.cuda.device_of(logits):
        route_kernel[(1,)](
            logits, places, seen, frames, *routing, num_bits,
            samples, 0 if num_bits is None else len(num_bits),
            routing.slices.stride(0), routing.counts.stride(0),
            ROUTES=routes, BLOCK=BLOCK, BLOCK_R=triton.next_power_of_2(routes),
            num_warps=BLOCK // 32, enable_fp_fusion=False,
        )


def shape_classes() -> dict[str, Callable[[], object]]:
    """Returns, by name, the launches of the shipped models; called with meta tensors by `aot.py`.

    Skip, two crops and whole, four stages; any number of slices.
    """
    empty = partial(torch.empty, device="meta", dtype=torch.int32)
    logits, places = (empty(8, columns, dtype=torch.float32) for columns in (4, 2))
    frames = new_frames((240, 240), 96, (96, 128), (4, 4), "meta")
    return {
        "route, four routes": partial(
            run, logits, places, empty(8), frames, new_routing(8, 4, "meta"), empty(4, 8)
        )
    }
