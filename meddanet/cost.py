"""Multiply-adds of any module, and what each route of a dynamic model costs.

Two conventions. "mac" counts true multiply-adds: convolutions, transposed convolutions on their
input positions, matrix products. "paper" counts as both papers did, with fvcore <= 0.1.5:
transposed convolutions on their *output* positions, norms as 5 per element. Activations, pooling,
additions and biases are 0 in both.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

CONVENTIONS = ("mac", "paper")
FLOAT_BITS = 32


class _Counter(TorchDispatchMode):
    """Adds up what passes the dispatcher, per part named by `part`."""

    def __init__(self, convention: str) -> None:
        super().__init__()
        self.convention = convention
        self.part = "rest"
        self.macs: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "convolution":
            input, weight, transposed = args[0], args[1], args[6]
            on_input = transposed and self.convention == "mac"
            positions = input.shape[2:] if on_input else output.shape[2:]
            # weight is [Cin, Cout / groups, ...] when transposed, [Cout, Cin / groups, ...] else
            self.macs[self.part] += input.shape[0] * weight.numel() * math.prod(positions)
        elif name in ("mm", "bmm"):
            self.macs[self.part] += args[0].numel() * args[1].shape[-1]
        elif name in ("addmm", "baddbmm"):
            self.macs[self.part] += args[1].numel() * args[2].shape[-1]
        elif "norm" in name and "vector" not in name and self.convention == "paper":
            self.macs[self.part] += 5 * args[0].numel()
        return output


def _count(
    model: nn.Module, run: Callable, input_shape: tuple[int, ...], convention: str,
    parts: dict[str, str] | None = None,
) -> dict[str, int]:
    """Returns MACs per part of `run(model, zeros)`; `parts` maps a submodule's name to its part."""
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be 'mac' or 'paper', got {convention!r}")
    copy = deepcopy(model).to("meta").eval()
    for module in copy.modules():
        if hasattr(module, "quantize"):
            module.quantize = False
    counter = _Counter(convention)
    for name, part in (parts or {}).items():
        module = copy.get_submodule(name)
        module.register_forward_pre_hook(lambda *_, part=part: setattr(counter, "part", part))
        module.register_forward_hook(lambda *_: setattr(counter, "part", "rest"))
    with torch.no_grad(), counter:
        run(copy, torch.zeros(input_shape, device="meta"))
    return dict(counter.macs)


def count_macs(
    model: nn.Module, input_shape: tuple[int, ...], convention: str = "mac"
) -> int:
    """Counts the multiply-adds of one forward pass; bit widths do not matter.

    Args:
        model: Any module of one tensor. For a `MedDANetV2`: its dearest route, policy included.
        input_shape: (N, C, H, W), or (C, H, W) for a batch of one.
        convention: "mac" for true multiply-adds, "paper" as both papers counted.

    Raises:
        ValueError: If the convention is unknown.
    """
    shape = tuple(input_shape) if len(input_shape) == 4 else (1, *input_shape)
    if hasattr(model, "routes"):
        table = cost_table(model, (1, *shape[1:]), convention)
        return shape[0] * max(table.macs(route) for route in table.routes)
    return sum(_count(model, lambda m, x: m(x), shape, convention).values())


@dataclass(frozen=True)
class CostTable:
    """What every route of a model costs per slice (or window) of one size.

    Attributes:
        convention: "mac" or "paper".
        routes: Names of the routes; a static segmenter has one, "whole".
        parts: Route -> part -> MACs. Parts named enc1.. are the stages whose width is chosen.
        stages: Names of those stages.
    """

    convention: str
    routes: tuple[str, ...]
    parts: dict[str, dict[str, int]]
    stages: tuple[str, ...]

    def macs(self, route: str) -> int:
        """Returns the MACs of a route, deciding networks included."""
        return sum(self.parts[route].values())

    def slice_cost(self, route: Tensor, num_bits: Tensor) -> Tensor:
        """Returns the cost of slices in the papers' sense: MACs, encoder stages scaled by b / 32.

        Args:
            route: [N] int64, index into `routes`.
            num_bits: [N, S] widths per stage; differentiable where float.

        Returns:
            [N] float32.
        """
        staged = torch.tensor(
            [[self.parts[r].get(s, 0) for s in self.stages] for r in self.routes],
            dtype=torch.float32, device=num_bits.device,
        )
        total = torch.tensor(
            [self.macs(r) for r in self.routes], dtype=torch.float32, device=num_bits.device
        )
        fixed = total - staged.sum(1)
        return fixed[route] + (staged[route] * num_bits / FLOAT_BITS).sum(1)

    def bit_operations(self, route: str, num_bits: int, fixed_bits: int = 8) -> int:
        """Returns MACs times weight bits times input bits, all stages at one width."""
        return sum(
            macs * (num_bits if part in self.stages else fixed_bits) ** 2
            for part, macs in self.parts[route].items()
        )

    def render(self, widths: tuple[int, ...] = (8, 16)) -> str:
        """Returns the table as text: one line per route and part, in millions of MACs."""
        columns = ["M MACs", *(f"at {b} bit" for b in widths), *(f"G bit-ops {b}" for b in widths)]
        lines = [f"{'route / part':<24}" + "".join(f"{c:>14}" for c in columns)]
        for route in self.routes:
            scaled = [self._scaled(route, b) for b in widths]
            bitops = [self.bit_operations(route, b) / 1e9 for b in widths]
            numbers = [self.macs(route) / 1e6, *(s / 1e6 for s in scaled), *bitops]
            lines.append(f"{route:<24}" + "".join(f"{n:>14,.3f}" for n in numbers))
            for part, macs in self.parts[route].items():
                lines.append(f"  {part:<22}{macs / 1e6:>14,.3f}")
        return "\n".join(lines)

    def _scaled(self, route: str, num_bits: int) -> float:
        staged = sum(self.parts[route].get(stage, 0) for stage in self.stages)
        return self.macs(route) - staged + staged * num_bits / FLOAT_BITS


def _segmenter_parts(segmenter: nn.Module, prefix: str = "") -> dict[str, str]:
    """Maps the submodules of a segmenter to the parts of the table."""
    parts = {f"{prefix}encoder.{i}": f"enc{i + 1}" for i in range(len(segmenter.encoder))}
    for name, _ in segmenter.named_children():
        if name not in ("encoder", "dropout"):
            parts[f"{prefix}{name}"] = name
    return parts


def cost_table(
    model: nn.Module, input_shape: tuple[int, ...], convention: str = "mac"
) -> CostTable:
    """Counts a segmenter or a dynamic model part by part and route by route.

    Args:
        model: A segmenter, or a `MedDANetV2`, whose policy then counts on every route and whose
            position network on every crop.
        input_shape: (1, C, H, W) of one slice or window.
        convention: "mac" or "paper".
    """
    shape = (1, *tuple(input_shape)[-3:])
    if not hasattr(model, "routes"):
        stages = tuple(f"enc{i + 1}" for i in range(len(model.encoder)))
        macs = _count(model, lambda m, x: m(x), shape, convention, _segmenter_parts(model))
        return CostTable(convention, ("whole",), {"whole": macs}, stages)
    stages = tuple(f"enc{i + 1}" for i in range(len(model.bit_selectors)))
    names = _segmenter_parts(model.segmenter, "segmenter.")
    policy = _count(model, lambda m, x: m.decide(x), shape, convention, {"policy": "policy"})
    position = _count(model, lambda m, x: m.locate(x), shape, convention, {"position": "position"})
    parts = {"skip": policy}
    for index, size in enumerate(model.crop_sizes):

        def crop(m: nn.Module, x: Tensor, index: int = index, size: int = size) -> None:
            features, _ = m.features(x[:, :, :size, :size])
            canvas = features.new_zeros(1, features.shape[1], *x.shape[2:])
            m.crop_last_stages[index](canvas)

        own = {**names, f"crop_last_stages.{index}": "last_stage"}
        parts[f"crop-{size}"] = {**policy, **position, **_count(model, crop, shape, convention, own)}
    whole = _count(model, lambda m, x: m.whole_branch(x), shape, convention, names)
    parts["whole"] = {**policy, **whole}
    for route in parts.values():
        if "rest" in route:
            route["selectors"] = route.pop("rest")
    return CostTable(convention, model.routes, parts, stages)
