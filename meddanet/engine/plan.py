"""A chunk of slices from images to labels as a recorded list of launches over static buffers.

    view -> decide, locate -> route -> [crop, encoder, decoder, last stage, labels] per route

Everything that depends on the slices is decided where they lie: routes, offsets, widths, which slot
of which group a slice takes and how many are in use. So `run` allocates no map of features or
labels, waits for nothing and reads nothing back, and a CUDA graph of it serves every chunk. Kernels
of slots that are not in use return at once, and so do those of the decision networks' stems, stages
and heads for slices that hold nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..kernels import route_triton as route_kernel
from ..kernels import view_triton as view_kernel
from ..kernels.route_call import new_frames, new_routing
from ..med_danet_v2 import MedDANetV2
from .decisions import answers, frozen
from .lowering import Group, Launch, lower_empty, lower_features, lower_last
from .packed_unet import Last, PackedUNet
from .routing import halo

# what share of a chunk's slices the smallest crop, each larger one and the whole slices have room
# for: launches and buffers of slots not in use are not free
ROOM = 1.0, 0.4, 0.1

# priority of the streams that a capture sees: PyTorch hands streams of one priority out in turn,
# so that one of the usual priority may be what another thread works on
CAPTURED = -1


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

        routes, scale = len(model.routes), model.decision_scale
        self.images = zeros(capacity, model.in_channels, *size)
        self.labels = zeros(capacity, *size, dtype=torch.uint8)
        self.num_bits = zeros(model.num_stages, capacity, dtype=torch.int32)
        self._view = view_kernel.new_view(self.images, scale, planned.dtype)
        self._flags = view_kernel.new_flags(self.images, scale)
        self._seen = zeros(capacity, dtype=torch.int32)
        self._routes, self._places = zeros(capacity, routes), zeros(capacity, 2)
        self._backgrounds = zeros(routes, *size, dtype=torch.uint8)
        self._margins = [halo(stage) for stage in model.crop_last_stages]
        self._frames = new_frames(
            size, model.smallest_crop, model.crop_sizes, [2 * m for m in self._margins], device
        )
        self._routing = new_routing(capacity, routes, device)
        self.decisions, self.offsets = self._routing[:2]
        sizes = *((crop, crop) for crop in model.crop_sizes), size
        named = zip(model.routes[1:], sizes, rooms(routes, capacity, roomy), strict=True)
        self.groups = [Group.of(self._routing, index, *one) for index, one in enumerate(named)]
        self._seeing, self._choosing = Launch("view", self._look), Launch("route", self._route)
        self._deciding = [Launch("decide", self._decide)], [Launch("locate", self._locate)]
        for index, group in enumerate(self.groups[:-1]):
            self._lower_crop(index, group)
        self._lower_whole(self.groups[-1])
        on_gpu = device.type == "cuda"
        self._streams = [torch.cuda.Stream(device, CAPTURED) for _ in self.groups[1:] if on_gpu]

    @property
    def launches(self) -> Iterator[Launch]:
        """What `run` runs, one after the other."""
        groups = (group.launches for group in self.groups)
        return chain([self._seeing], *self._deciding, [self._choosing], *groups)

    @torch.no_grad()
    def run(self) -> None:
        """Labels the slices in `images`; only enqueues work, on the current stream and others."""
        self._seeing.run()
        self._side_by_side(*self._deciding)
        self._choosing.run()
        self._side_by_side(*(group.launches for group in self.groups))

    def _side_by_side(self, *branches: list[Launch]) -> None:
        """Runs launches of several branches: on a GPU each branch has a stream."""
        if not self._streams:
            for launch in chain(*branches):
                launch.run()
            return
        current = torch.cuda.current_stream(self.labels.device)
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

    def _look(self) -> None:
        scale = self._planned.model.decision_scale
        view_kernel.run(self.images, self._view, self._flags, scale)
        view_kernel.merge(self._flags, self._seen)

    def _decide(self) -> None:
        self._routes.copy_(answers(self._planned.policy, self._view, self._seen))

    def _locate(self) -> None:
        self._places.copy_(answers(self._planned.position, self._view, self._seen))

    def _route(self) -> None:
        """Turns logits into decisions, offsets and the slots of every group."""
        route_kernel.run(
            self._routes, self._places, self._seen, self._frames, self._routing, self.num_bits
        )
        torch.index_select(self._backgrounds, 0, self.decisions, out=self.labels)

    # groups ------------------------------------------------------------------------------------

    def _lower_whole(self, group: Group) -> None:
        last = self._planned.unet.whole
        level = lower_features(self._planned.unet, group, self.images, self.num_bits, last)
        lower_last(group, last, level, self.labels, group.corner, 0)

    def _lower_crop(self, index: int, group: Group) -> None:
        """Appends a crop's way; its last stage sees the patch and two halos: `routing.Tile`."""
        last, margin = self._planned.unet.crops[index], self._margins[index]
        height, width = (min(group.size[0] + 4 * margin, side) for side in self._size)
        level = lower_features(
            self._planned.unet, group, self.images, self.num_bits, last,
            (group.shift, (height, width)),
        )
        lower_last(group, last, level, self.labels, group.start, margin)
        self._backgrounds[1 + index] = label_background(last, self._size, group.count.device)


def label_background(last: Last, size: tuple[int, int], device: torch.device) -> Tensor:
    """Returns the labels [H, W] that a crop's last stage gives an all-zero canvas."""
    group = Group.of(new_routing(1, 2, device), 0, "background", size, 1)
    group.count.fill_(1)
    labels = torch.zeros(1, *size, dtype=torch.uint8, device=device)
    level = lower_empty(group, last, size)
    lower_last(group, last, level, labels, group.corner, 0)
    for launch in group.launches:
        launch.run()
    return labels[0]
