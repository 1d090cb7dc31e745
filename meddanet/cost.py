"""What any module, and each route of a dynamic model, costs in multiply-adds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .data.volume import window_origins
from .macs import CONVENTIONS, FLOAT_BITS, Counted, Work, count_work

__all__ = [
    "CONVENTIONS", "CaseCost", "CostTable", "case_cost", "cost_table", "cost_tables", "count_macs",
]

BRATS_SLICE, BRATS_SLICES = (240, 240), 155
DECIDING = {"decision", "policy", "position", "selectors"}


def count_macs(
    model: nn.Module, input_shape: tuple[int, ...], convention: str = "mac"
) -> int:
    """Counts the multiply-adds of one forward pass in `eval()`; bit widths do not matter.

    Args:
        model: Any module of one tensor. For a `MedDANetV2`: its dearest route, policy included.
        input_shape: Shape of the whole batch: (N, C, H, W), or whatever the module takes.
        convention: "mac" for true multiply-adds, "paper" as both papers counted.

    Raises:
        ValueError: If the convention is unknown or the shape does not fit.
    """
    if hasattr(model, "routes"):
        table = cost_table(model, input_shape, convention)
        return input_shape[0] * max(table.macs(route) for route in table.routes)
    _check_convention(convention)
    work = count_work(model, {"forward": lambda m, x: m(x)}, input_shape)[convention]["forward"]
    return sum(part.macs for part in work.values())


def _check_convention(convention: str) -> None:
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be 'mac' or 'paper', got {convention!r}")


class CaseCost(NamedTuple):
    """One cost in the units the papers' tables use.

    Attributes:
        window: One input of the network: "per inference"; Tables 1-2 of both papers call it "per
            slice".
        block: As many of these as the input has rows: "per case" in Tables 1-2, a 128^3 block.
        slice: The overlapping windows that cover one slice: "per slice" in V1 Tables 3-6 and V2
            Table 3.
        case: All slices: what a whole volume costs, "per case" in V1 Tables 3-6.
    """

    window: float
    block: float
    slice: float
    case: float


def case_cost(
    cost: float,
    input_size: tuple[int, int],
    slice_size: tuple[int, int] = BRATS_SLICE,
    slices: int = BRATS_SLICES,
) -> CaseCost:
    """Scales the (mean) cost of one input to slices and cases; defaults are a BraTS volume.

    Args:
        cost: Of one input, in any unit.
        input_size: Height and width of the input in pixels: a window, or a whole slice.
        slice_size: Height and width of the slice.
        slices: Slices of the volume.
    """
    sides = zip(slice_size, input_size, strict=True)
    windows = math.prod(len(window_origins(side, window)) for side, window in sides)
    return CaseCost(cost, cost * input_size[0], cost * windows, cost * windows * slices)


@dataclass(frozen=True)
class CostTable:
    """What every route of a model costs per slice (or window) of one size.

    Attributes:
        convention: "mac" or "paper".
        size: Height and width of the slice or window in pixels.
        routes: Names of the routes; a static segmenter has one, "whole".
        stages: Names of the encoder stages, each with its Down, whose width is chosen.
        parts: Route -> part -> MACs.
        staged: Route -> stage -> those of its MACs that follow the chosen width.
        fixed_bit_operations: Route -> part -> MACs times weight bits times input bits of all that
            does not follow a chosen width; float layers have 32.
    """

    convention: str
    size: tuple[int, int]
    routes: tuple[str, ...]
    stages: tuple[str, ...]
    parts: dict[str, dict[str, int]]
    staged: dict[str, dict[str, int]]
    fixed_bit_operations: dict[str, dict[str, int]]

    def macs(self, route: str) -> int:
        """Returns the MACs of a route, deciding networks included."""
        return sum(self.parts[route].values())

    def static_macs(self) -> int:
        """Returns the MACs of the dearest route without what decides and chooses widths."""
        return max(
            sum(macs for part, macs in row.items() if part not in DECIDING)
            for row in self.parts.values()
        )

    def slice_macs(self, route: Tensor) -> Tensor:
        """Returns the MACs [N] float64 of slices whose `route` [N] indexes `routes`."""
        return self._totals(self.parts, torch.float64, route.device)[route]

    def slice_cost(self, route: Tensor, num_bits: Tensor) -> Tensor:
        """Returns the cost of slices in the papers' sense: MACs, encoder stages scaled by b / 32.

        Args:
            route: [N] int64, index into `routes`.
            num_bits: [N, S] widths per stage; differentiable where float.

        Returns:
            [N] float32, float64 where `num_bits` is.
        """
        staged = self._staged(num_bits)
        fixed = self._totals(self.parts, staged.dtype, staged.device) - staged.sum(1)
        return fixed[route] + (staged[route] * num_bits / FLOAT_BITS).sum(1)

    def slice_bit_operations(self, route: Tensor, num_bits: Tensor) -> Tensor:
        """Returns MACs times weight bits times input bits; arguments as `slice_cost`."""
        staged = self._staged(num_bits)
        fixed = self._totals(self.fixed_bit_operations, staged.dtype, staged.device)
        return fixed[route] + (staged[route] * num_bits**2).sum(1)

    def _staged(self, num_bits: Tensor) -> Tensor:
        rows = [[self.staged[r].get(s, 0) for s in self.stages] for r in self.routes]
        dtype = torch.promote_types(num_bits.dtype, torch.float32)
        return torch.tensor(rows, dtype=dtype, device=num_bits.device)  # [R, S]

    def _totals(
        self, column: dict[str, dict[str, int]], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        totals = [sum(column[route].values()) for route in self.routes]
        return torch.tensor(totals, dtype=dtype, device=device)  # [R]

    def render(self, widths: tuple[int, ...] = (8, 16)) -> str:
        """Returns the table as text, a line per route and part, all stages at one of the widths.

        Columns: MACs, MACs with the stages scaled by b / 32 (the papers' sense), bit-operations.
        """
        columns = ["M MACs", *(f"x {b}/32" for b in widths), *(f"G bit-op {b}" for b in widths)]
        lines = [f"{'route / part':<20}" + "".join(f"{c:>14}" for c in columns)]
        for route in self.routes:
            rows = [self._row(route, part, widths) for part in self.parts[route]]
            total = [sum(column) for column in zip(*rows, strict=True)]
            named = [(route, total), *zip((f"  {p}" for p in self.parts[route]), rows, strict=True)]
            lines += [f"{name:<20}" + "".join(f"{x:>14,.3f}" for x in row) for name, row in named]
        lines.append("")
        lines += [self._in_the_papers_units(route) for route in self.routes]
        return "\n".join(lines)

    def _row(self, route: str, part: str, widths: tuple[int, ...]) -> list[float]:
        macs, staged = self.parts[route][part], self.staged[route].get(part, 0)
        fixed = self.fixed_bit_operations[route][part]
        scaled = [macs - staged * (1 - b / FLOAT_BITS) for b in widths]
        operations = [fixed + staged * b**2 for b in widths]
        return [macs / 1e6, *(x / 1e6 for x in scaled), *(x / 1e9 for x in operations)]

    def _in_the_papers_units(self, route: str) -> str:
        height, width = (max(pair) for pair in zip(self.size, BRATS_SLICE, strict=True))
        giga = case_cost(self.macs(route) / 1e9, self.size, (height, width))
        line = (
            f"{route}: {giga.slice:,.3f} G MACs per slice of {height}x{width}, {giga.case:,.2f} "
            f"per case of {BRATS_SLICES}"
        )
        if giga.slice == giga.window:
            return line
        return (
            f"{line}; {giga.window:,.3f} per window, which Tables 1-2 of the papers call a slice, "
            f"and {giga.block:,.2f} per case of {self.size[0]} of them"
        )


def cost_table(
    model: nn.Module, input_shape: tuple[int, ...], convention: str = "mac"
) -> CostTable:
    """Counts a segmenter or a dynamic model part by part and route by route.

    Args:
        model: A segmenter; a `MedDANet`, whose decision network then counts on every route; or a
            `MedDANetV2`, whose policy counts on every route and whose position network on every
            crop. Of a segmenter of another make, which lists no stages in `encoder`, nothing counts
            as following a chosen width.
        input_shape: (N, C, H, W) of slices or windows; the table is that of one of them.
        convention: "mac" or "paper".

    Raises:
        ValueError: If the convention is unknown, the model has no stages, or a crop does not fit.
    """
    _check_convention(convention)
    return cost_tables(model, input_shape)[convention]


def cost_tables(model: nn.Module, input_shape: tuple[int, ...]) -> dict[str, CostTable]:
    """Counts by both conventions at a time: convention -> table, as `cost_table` returns it."""
    shape = (1, *input_shape[1:])
    stages: tuple[str, ...] = ()
    if hasattr(model, "bank"):
        counted = _bank_work(model, shape)
    elif hasattr(model, "segmenter"):
        stages = _stage_names(model.num_stages)
        counted = _dynamic_work(model, shape)
    elif depth := _depth(model):
        stages = _stage_names(depth)
        run = {"whole": lambda m, x: m(x)}
        counted = count_work(model, run, shape, _segmenter_parts(model))
    else:
        raise ValueError(
            f"{type(model).__name__} has no encoder stages to list; count_macs counts any module"
        )
    size = shape[2], shape[3]
    return {c: _table(c, size, stages, work) for c, work in counted.items()}


def _table(
    convention: str,
    size: tuple[int, int],
    stages: tuple[str, ...],
    work: dict[str, dict[str, Work]],
) -> CostTable:
    """Makes a table of route -> part -> work."""

    def column(value: Callable[[str, Work], int]) -> dict[str, dict[str, int]]:
        return {r: {part: value(part, w) for part, w in row.items()} for r, row in work.items()}

    return CostTable(
        convention, size, tuple(work), stages,
        parts=column(lambda part, w: w.macs),
        staged=column(lambda part, w: w.quantisable if part in stages else 0),
        fixed_bit_operations=column(
            lambda part, w: w.bit_operations if part not in stages
            else (w.macs - w.quantisable) * FLOAT_BITS**2
        ),
    )


def _depth(segmenter: Any) -> int:
    """Returns how many encoder stages a segmenter has; 0 where it does not list them."""
    encoder = getattr(segmenter, "encoder", None)
    return len(encoder) if isinstance(encoder, nn.ModuleList | nn.Sequential) else 0


def _stage_names(count: Any) -> tuple[str, ...]:
    return tuple(f"enc{number}" for number in range(1, count + 1))


def _segmenter_parts(segmenter: Any, prefix: str = "") -> dict[str, str]:
    """Maps the submodules of a segmenter to the parts of the table."""
    stages = _stage_names(_depth(segmenter))
    parts = {f"{prefix}encoder.{i}": name for i, name in enumerate(stages)}
    for name, child in segmenter.named_children():
        if name == "dropout" or (stages and name == "encoder"):
            continue
        # a list is never called, its members are
        within = [f".{index}" for index, _ in child.named_children()]
        listed = isinstance(child, nn.ModuleList | nn.ModuleDict)
        parts.update({f"{prefix}{name}{index}": name for index in (within if listed else [""])})
    return parts


def _bank_work(model: Any, shape: tuple[int, ...]) -> Counted:
    """Counts the routes of a `MedDANet`; a member of foreign make is one part."""
    parts = {"decision": "decision"}
    runs: dict[str, Callable[[Any, Tensor], object]] = {"skip": lambda m, x: m.decide(x)}
    for number, (route, member) in enumerate(zip(model.routes[1:], model.bank, strict=True)):
        if _depth(member):
            parts.update(_segmenter_parts(member, f"bank.{number}."))
        else:
            parts[f"bank.{number}"] = route
        runs[route] = _member_run(number + 1)
    counted = count_work(model, runs, shape, parts)
    return {
        convention: {route: {**work["skip"], **row} for route, row in work.items()}
        for convention, work in counted.items()
    }


def _member_run(route: int) -> Callable[[Any, Tensor], object]:
    return lambda model, slices: model.run(route, slices)


def _dynamic_work(model: Any, shape: tuple[int, ...]) -> Counted:
    """Counts the routes of a `MedDANetV2` in their order."""
    parts = _segmenter_parts(model.segmenter, "segmenter.")
    parts.update({"policy": "policy", "position": "position"})
    parts.update({f"crop_last_stages.{i}": "last_stage" for i in range(len(model.crop_sizes))})
    runs = {
        "policy": lambda m, x: m.decide(x),
        "position": lambda m, x: m.locate(x),
        **{f"crop-{p}": _crop_run(i, p) for i, p in enumerate(model.crop_sizes)},
        "whole": lambda m, x: m.whole_branch(x),
    }
    counted = count_work(model, runs, shape, parts)
    rest = "selectors" if model.num_stages else "rest"
    return {convention: _with_decisions(work, rest) for convention, work in counted.items()}


def _with_decisions(
    work: dict[str, dict[str, Work]], rest: str
) -> dict[str, dict[str, Work]]:
    """Returns route -> part -> work, skip first, each with the networks that decide on it.

    What lies in no part, the gradients that selectors see among it, is named `rest`.
    """
    policy, position = work.pop("policy"), work.pop("position")
    routes = {"skip": policy}
    for route, row in work.items():
        if "rest" in row:
            row[rest] = row.pop("rest")
        routes[route] = {**policy, **(position if route != "whole" else {}), **row}
    return routes


def _crop_run(index: int, size: int) -> Callable[[Any, Tensor], None]:
    def run(model: Any, slices: Tensor) -> None:
        height, width = slices.shape[2:]
        if size > min(height, width):
            raise ValueError(f"crop of {size} does not fit an input of {height}x{width}")
        features, _ = model.features(slices[:, :, :size, :size])
        # the last stage runs on the whole slice, onto which the crop's features are pasted
        canvas = features.new_zeros(len(slices), features.shape[1], height, width)
        model.crop_last_stages[index](canvas)

    return run
