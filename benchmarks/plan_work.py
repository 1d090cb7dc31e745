"""What every launch of the engine's recorded plan moves and computes, from the plan itself.

The plan is made with buffers that have no memory, and its own launches are gone through one after
the other: their kernels tell how many programs they would run, their tensors what these move. A
launch whose kernel has no model here is an error, so none can be forgotten.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from gpu_work import Convolution, Tiles, WayUp, Work, one_launch
from torch import Tensor, nn

from meddanet.engine import lowering
from meddanet.engine.plan import Plan, PlannedModel, rooms
from meddanet.kernels.conv_call import ConvCall
from meddanet.kernels.encode_call import EncodeCall
from meddanet.kernels.way_up import WayUpCall
from meddanet.networks.decision import ShuffleNetV2, ShuffleStem, ShuffleUnit
from meddanet.networks.heatmap import HeatmapLocator
from meddanet.weights import load_model

# the engine's capacity for a head
CAPACITY, SIDE = 160, 240
# slices of a head that hold anything, at the least: 126 to 146 of 155 in 15 cases of BraTS 2021
HELD = 126


@dataclass(frozen=True)
class Slots:
    """What a group's slots hold.

    Attributes:
        used: How many of them are in use.
        widths: For each encoder stage, width -> slots in use that chose it.
        tiles: Of the card's architecture.
    """

    used: int
    widths: list[dict[int, int]]
    tiles: Tiles


@contextmanager
def counted_programs() -> Iterator[list[int]]:
    """Makes launches append how many programs they would run, and run none."""
    from triton.runtime.jit import KernelInterface

    programs: list[int] = []

    def stand_in(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **constants: programs.append(math.prod(grid))

    original = KernelInterface.__getitem__
    KernelInterface.__getitem__ = stand_in
    try:
        yield programs
    finally:
        KernelInterface.__getitem__ = original


@cache
def _planned() -> PlannedModel:
    planned = PlannedModel(load_model(), torch.device("cpu"))
    # for the buffers of its plans: they need no memory
    planned.device = torch.device("meta")
    return planned


@cache
def shipped_plan(roomy: bool) -> Plan:
    """Returns the plan of the shipped weights for a head; `roomy` as there."""
    with counted_programs():
        return Plan(_planned(), CAPACITY, (SIDE, SIDE), roomy)


def plan_work(
    routes: dict[str, int], num_bits: list[dict[str, int]], tiles: Tiles, decided: bool = True
) -> list[Work]:
    """Returns the work of all launches of one volume, in the plan's order.

    Args:
        routes: How many slices went which way: "skip", "crop-P", "whole".
        num_bits: For each encoder stage, width -> slices that ran at it.
        tiles: Of the card's architecture.
        decided: Whether the decision networks run; without them it is a static network.
    """
    ran = max(1, sum(count for route, count in routes.items() if route != "skip"))
    plan, slots = shipped_plan(_overflows(routes)), {}
    for group in plan.groups:
        share = (used := routes.get(group.name, 0)) / ran
        widths = [{int(b): round(n * share) for b, n in stage.items()} for stage in num_bits]
        slots[group.name] = Slots(used, widths, tiles)
    work = []
    for launch in plan.launches:
        group, _, kernel = launch.name.partition(": ")
        if kernel:
            found = _group_work(kernel, launch.run, slots[group])
        elif launch.name in ("decide", "locate") and not decided:
            continue
        else:
            found = SHARED[launch.name](plan)
        with counted_programs() as programs:
            # the networks are no kernels of this package's own
            if launch.name not in ("decide", "locate"):
                launch.run()
        work.append(replace(found, name=launch.name, programs=sum(programs)))
    return work


def _overflows(routes: dict[str, int]) -> bool:
    """Returns whether a route has more slices than the usual plan has room for."""
    names = _planned().model.routes
    counts = [routes.get(name, 0) for name in names[1:]]
    return any(n > room for n, room in zip(counts, rooms(len(names), CAPACITY, False), strict=True))


# launches for all slices -----------------------------------------------------------------------


@cache
def _network(name: str, plan: Plan) -> Work:
    network = deepcopy(getattr(plan._planned.model, name))
    return half_precision(name, network, (HELD, *plan._view.shape[1:]))


def half_precision(name: str, network: nn.Module, shape: tuple[int, ...]) -> Work:
    """A network in half precision, norm and ReLU fused, a launch per layer.

    Stem, stages and head of the decision networks are a launch each, nothing within is stored.

    Args:
        name: What to call it.
        network: Any; it runs on the meta device.
        shape: Of its input.
    """
    moved = operations = launches = 0

    def add_launch(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal moved, launches
        weights = sum(p.numel() for p in module.parameters() if p.dim() > 1)
        if isinstance(module, ShuffleUnit) and module.project is None:
            # another unit of the same launch, whose output has the size of what it is made from
            moved += 2 * weights
            return
        launches += module not in ends
        # of a head its first input, and of answers there are few
        moved += 2 * (weights + inputs[0].numel() * (module not in ends))
        moved += 2 * output.numel() * (module not in begins | ends)

    def add_operations(layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal operations
        operations += 2 * output.numel() * layer.weight[0].numel()

    modules = list(network.modules())
    parts = [m for m in modules if isinstance(m, ShuffleStem | ShuffleUnit)]
    layers = [m for m in modules if isinstance(m, nn.Conv2d | nn.Linear)]
    inside = {layer for part in parts for layer in part.modules()}
    heads = [m for m in modules if isinstance(m, ShuffleNetV2 | HeatmapLocator)]
    begins = {head.last[0] for head in heads}
    ends = {head.classifier if isinstance(head, ShuffleNetV2) else head.map for head in heads}
    own = [layer for layer in layers if layer not in inside]
    hooks = [m.register_forward_hook(add_launch) for m in parts + own]
    hooks += [layer.register_forward_hook(add_operations) for layer in layers]
    network.to("meta")(torch.empty(shape, device="meta"))
    for hook in hooks:
        hook.remove()
    return Work(name, moved, operations, half=True, launches=launches)


def _view(plan: Plan) -> Work:
    """The pass over the slices, and its flags merged."""
    moved = _size(plan.images) + 2 * plan._view.numel() + 2 * _size(plan._flags)
    return Work("view", moved + _size(plan._seen), launches=2)


def _route(plan: Plan) -> Work:
    """The routing itself, and labels set to those of an empty canvas."""
    return Work("route", _size(plan._seen) + _size(plan._routes) + _size(plan.labels), launches=2)


SHARED: dict[str, Callable[[Plan], Work]] = {
    "view": _view, "decide": partial(_network, "policy"), "locate": partial(_network, "position"),
    "route": _route,
}


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# launches of a group ---------------------------------------------------------------------------


def _group_work(kernel: str, run: Any, slots: Slots) -> Work:
    """Returns the work of one launch for the slots of a group; nothing but a launch if empty."""
    model = MODELS[run.func]
    return model(kernel, slots, *run.args) if slots.used else Work(kernel, 0)


def _stage(kernel: str) -> int:
    """Returns the encoder stage that a launch belongs to: "stage 1 block, first", "down 1"."""
    match = re.search(r"\d", kernel)
    assert match, f"{kernel}: a width per slot, but no stage"
    return int(match[0])


def _convolution(
    kernel: str, slots: Slots, call: ConvCall, stream: Tensor | None, codes: Tensor | None,
    skip: Tensor | None, moments: Tensor | None,
) -> Work:
    conv, residual = call.conv, call.residual is not None
    # what is stored before its width is known has 8 bits
    guessed = moments is not None and codes is not None
    found = Convolution(
        _shape_class(kernel, stream, skip), conv.in_channels, conv.out_channels,
        conv.kernel_size[0], call.input.shape[3], conv.stride[0],
        residual=residual, stream=stream is not None, codes=codes is not None and not guessed,
        skip=skip is not None or guessed, moments=moments is not None,
    )
    chosen = isinstance(call.num_bits, Tensor)
    widths = slots.widths[_stage(kernel)] if chosen else {8: slots.used}
    parts = [found.work(n, bits, slots.tiles(found)) for bits, n in widths.items() if n]
    return one_launch(kernel, parts)


def _shape_class(kernel: str, stream: Tensor | None, skip: Tensor | None) -> str:
    """Returns what `kernels_compiled.json` calls a convolution."""
    if kernel.endswith("block, second"):
        if skip is not None:
            return "encoder block, last of its stage"
        return "encoder block, last" if stream is None else "encoder block, second"
    name = re.sub(r"^(decoder|last stage), ", "decoder block, ", kernel)
    name = re.sub(r"^stage \d block", "encoder block", name)
    return re.sub(r"^down \d", "down", name.replace("begin", "first convolution"))


def _way_up(
    kernel: str, slots: Slots, call: WayUpCall, stream: Tensor, codes: Tensor
) -> Work:
    tile = None if call.shift is None else call.size[1]
    found = WayUp(call.way.channels, call.skip.shape[3], tile)
    return replace(found.work(slots.used, 8, slots.tiles(found)), name=kernel)


def _codes(kernel: str, slots: Slots, call: EncodeCall, codes: Tensor) -> Work:
    channels, pixels = call.input.shape[1], math.prod(call.size)
    chosen = isinstance(call.num_bits, Tensor)
    widths = slots.widths[_stage(kernel)] if chosen else {8: slots.used}
    widths = {bits: n for bits, n in widths.items() if bits != call.done}
    stored = sum(n * (2 if bits > 8 else 1) for bits, n in widths.items())
    read = sum(widths.values()) * call.input.element_size()
    kind = "view of an image" if kernel == "image" else f"stage of {channels} channels"
    issued = sum(widths.values()) * slots.tiles.instructions(f"encode, {kind}", pixels)
    return Work(kernel, channels * pixels * (read + stored), instructions=issued)


def _gradients(
    kernel: str, slots: Slots, images: Tensor, sums: Tensor, size: tuple[int, int], *others: Tensor
) -> Work:
    view = images.shape[1] * math.prod(size) * images.element_size()
    return Work(kernel, slots.used * (view + _size(sums[0])))


def _select(
    kernel: str, slots: Slots, bits: Tensor, sums: Tensor, moments: Tensor, *others: Any
) -> Work:
    return Work(kernel, slots.used * (_size(sums[0]) + _size(moments[0])))


def _labels(kernel: str, slots: Slots, labels: Tensor, input: Tensor, *others: Any) -> Work:
    pixels = input.shape[2:].numel()
    issued = slots.used * slots.tiles.instructions("head, int8", pixels)
    return Work(kernel, slots.used * pixels * (input.shape[1] + 1), instructions=issued)


MODELS: dict[Callable, Callable[..., Work]] = {
    lowering.conv_kernel.run: _convolution, lowering.encode_kernel.run: _codes,
    lowering.way_up_kernel.run: _way_up, lowering.selector_kernel.gradients: _gradients,
    lowering.selector_kernel.select: _select, lowering.head_kernel.run: _labels,
}
