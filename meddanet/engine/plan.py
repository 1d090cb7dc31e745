"""A chunk of slices from images to labels as a recorded list of launches over static buffers.

    seen, decide, locate -> route -> [view, encoder, decoder, tile, last stage, labels] per route

Everything that depends on the slices is decided where they lie: routes, offsets, widths, which slot
of which group a slice takes and how many are in use. So `run` allocates no map of features or
labels, waits for nothing and reads nothing back, and a CUDA graph of it serves every chunk. Kernels
of slots that are not in use return at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..med_danet_v2 import MedDANetV2, place
from .decisions import frozen
from .lowering import STREAM, Group, Launch, Level, lower_features, lower_last, lower_tile
from .packed_unet import Last, PackedUNet
from .routing import halo

# what share of a chunk's slices the smallest crop, each larger one and the whole slices have room
# for: launches and buffers of slots not in use are not free
ROOM = 1.0, 0.4, 0.1


def rooms(routes: int, capacity: int, roomy: bool) -> list[int]:
    """Returns how many slices of a chunk each route but skip takes; `roomy`: all of them."""
    smallest, larger, whole = ROOM
    shares = [smallest, *[larger] * (routes - 3), whole] if routes > 2 else [1.0]
    return [capacity if roomy else math.ceil(share * capacity) for share in shares]


def overflows(decisions: Tensor, capacity: int, routes: int) -> bool:
    """Returns whether a plan without room for all left slices of a chunk unlabelled.

    Args:
        decisions: int64 [n] of the chunk, on the CPU.
        capacity: Of the plan.
        routes: How many there are, skip included.
    """
    counts = decisions.bincount(minlength=routes)[1:].tolist()
    return any(n > room for n, room in zip(counts, rooms(routes, capacity, False), strict=True))


class PlannedModel:
    """What the plans of one model share: its weights as they run.

    Args:
        model: In `eval()`, every quantised layer with a range.
        device: Where it runs.

    Attributes:
        unet: The packed segmenter.
        policy: The policy network, frozen.
        position: The position network, frozen.
        dtype: Of both: float16 on a GPU.

    Raises:
        ValueError: If the model has no integer form.
    """

    def __init__(self, model: MedDANetV2, device: torch.device) -> None:
        self.model: Any = model
        self.device = device
        self.unet = PackedUNet(model, device)
        self.dtype = torch.float16 if device.type == "cuda" else torch.float32
        self.policy, self.position = (
            frozen(network, self.dtype, device) for network in (model.policy, model.position)
        )


class Plan:
    """The launches for chunks of one shape, and the buffers they work on.

    Args:
        planned: The weights.
        capacity: Slices of a chunk; fewer are filled up with zeros, which are not decided on.
        size: (height, width) of a slice.
        roomy: Whether every route takes a whole chunk; else only as `rooms` says. Slices of a route
            beyond that are not labelled: see `overflows`.

    Attributes:
        capacity: As given, N.
        roomy: As given.
        images: float32 [N, C, H, W]: write slices here before `run`.
        labels: uint8 [N, H, W].
        decisions: int64 [N].
        offsets: float32 [N, 2].
        num_bits: int32 [S, N], 0 where a stage did not run.
    """

    def __init__(
        self, planned: PlannedModel, capacity: int, size: tuple[int, int], roomy: bool = True
    ) -> None:
        self._planned, self._size = planned, size
        self.capacity, self.roomy = capacity, roomy
        model, device = planned.model, planned.device

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        routes = len(model.routes)
        self.images = zeros(capacity, model.in_channels, *size)
        self.labels = zeros(capacity, *size, dtype=torch.uint8)
        self.decisions = zeros(capacity, dtype=torch.int64)
        self.offsets = zeros(capacity, 2)
        self.num_bits = zeros(model.num_stages, capacity, dtype=torch.int32)
        self._seen = zeros(capacity, dtype=torch.bool)
        self._routes, self._places = zeros(capacity, routes), zeros(capacity, 2)
        self._index = torch.arange(capacity, dtype=torch.int32, device=device)
        self._backgrounds = zeros(routes, *size, dtype=torch.uint8)
        # each route's view; a skipped slice has none, and no play either
        views = [size, *((p, p) for p in model.crop_sizes), size]
        self._views = torch.tensor(views, dtype=torch.float32, device=device)
        sides = [*((crop, crop) for crop in model.crop_sizes), size]
        self.groups = [
            Group.empty(name, side, room, device)
            for name, side, room in zip(
                model.routes[1:], sides, rooms(routes, capacity, roomy), strict=True
            )
        ]
        self._deciding = [Launch("decide", self._decide)], [Launch("locate", self._locate)]
        self._seeing, self._routing = Launch("seen", self._see), Launch("route", self._route)
        for index, group in enumerate(self.groups[:-1]):
            self._lower_crop(index, group)
        self._lower_whole(self.groups[-1])
        on_gpu = device.type == "cuda"
        self._streams = [torch.cuda.Stream() for _ in self.groups[1:]] if on_gpu else []

    @property
    def launches(self) -> Iterator[Launch]:
        """What `run` runs, one after the other."""
        groups = (group.launches for group in self.groups)
        return chain([self._seeing], *self._deciding, [self._routing], *groups)

    @torch.no_grad()
    def run(self) -> None:
        """Labels the slices in `images`; only enqueues work, on the current stream and others."""
        self._seeing.run()
        self._side_by_side(*self._deciding)
        self._routing.run()
        self._side_by_side(*(group.launches for group in self.groups))

    def _side_by_side(self, *branches: list[Launch]) -> None:
        """Runs launches of several branches: on a GPU each branch has a stream."""
        if not self._streams:
            for launch in chain(*branches):
                launch.run()
            return
        current = torch.cuda.current_stream()
        streams = [current, *self._streams[: len(branches) - 1]]
        for stream in streams[1:]:
            stream.wait_stream(current)
        for stream, branch in zip(streams, branches, strict=True):
            with torch.cuda.stream(stream):
                for launch in branch:
                    launch.run()
        for stream in streams[1:]:
            current.wait_stream(stream)

    # routing -----------------------------------------------------------------------------------

    def _see(self) -> None:
        torch.any(self.images.flatten(1), 1, out=self._seen)

    def _view(self) -> Tensor:
        scale, view = self._planned.model.decision_scale, self.images
        if scale > 1:
            view = F.avg_pool2d(view, scale)
        return view.to(self._planned.dtype, memory_format=torch.channels_last)

    def _decide(self) -> None:
        self._routes.copy_(self._planned.policy(self._view()))

    def _locate(self) -> None:
        self._places.copy_(self._planned.position(self._view()))

    def _route(self) -> None:
        """Turns logits into decisions, offsets and the slots of every group."""
        self.decisions.copy_(self._routes.argmax(1) * self._seen)
        view, sides = self._views.index_select(0, self.decisions), self._views[0]
        smallest = self._planned.model.smallest_crop
        self.offsets.copy_(place(self._places.sigmoid(), smallest, view, sides).round())
        # a slice of NaN has a place all the same
        corners = self.offsets.nan_to_num().to(torch.int32)
        for route, group in enumerate(self.groups, 1):
            chosen = self.decisions == route
            rank, room = chosen.cumsum(0), len(group.corner)
            group.count.copy_(rank[-1:].clamp_max(room))
            # slices of other routes all go to the slot beyond the last
            slot = torch.where(chosen & (rank <= room), rank - 1, room)
            group.slots.scatter_(0, slot, self._index)
            group.corner.copy_(corners.index_select(0, group.slices))
        self.num_bits.zero_()
        torch.index_select(self._backgrounds, 0, self.decisions, out=self.labels)

    # groups ------------------------------------------------------------------------------------

    def _lower_whole(self, group: Group) -> None:
        last = self._planned.unet.whole
        level = lower_features(
            self._planned.unet, group, self.images, self.num_bits, last.block
        )
        lower_last(group, last, level, self.labels, group.corner, 0)

    def _lower_crop(self, index: int, group: Group) -> None:
        """Appends a crop's way; its last stage sees the patch and two halos: `routing.Tile`."""
        last = self._planned.unet.crops[index]
        margin = halo(self._planned.model.crop_last_stages[index])
        tile = tuple(min(group.size[0] + 4 * margin, side) for side in self._size)
        furthest = [side - length for side, length in zip(self._size, tile, strict=True)]
        limit = torch.tensor(furthest, dtype=torch.int32, device=group.corner.device)
        start, shift = torch.zeros_like(group.corner), torch.zeros_like(group.corner)

        def place() -> None:
            start.copy_(torch.minimum((group.corner - 2 * margin).clamp_min(0), limit))
            torch.sub(start, group.corner, out=shift)

        patch = lower_features(self._planned.unet, group, self.images, self.num_bits, None).stream
        group.add("place", place)
        level = lower_tile(group, last, patch, shift, (tile[0], tile[1]))
        lower_last(group, last, level, self.labels, start, margin)
        self._backgrounds[1 + index] = label_background(last, self._size, group.count.device)


def label_background(last: Last, size: tuple[int, int], device: torch.device) -> Tensor:
    """Returns the labels [H, W] that a crop's last stage gives an all-zero canvas."""
    group = Group.empty("background", size, 1, device)
    group.count.fill_(1)
    labels = torch.zeros(1, *size, dtype=torch.uint8, device=device)
    channels = last.block.first.packed.in_channels
    zeros = torch.zeros(1, *size, channels, dtype=STREAM, device=device).permute(0, 3, 1, 2)
    level: Level = lower_tile(group, last, zeros, group.corner, size)
    lower_last(group, last, level, labels, group.corner, 0)
    for launch in group.launches:
        launch.run()
    return labels[0]
