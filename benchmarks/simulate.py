"""Simulates a plan's convolutions on GPUs that are not at hand. Predictions, not measurements.

    python benchmarks/simulate.py RESULT.json [--card "RTX 4090" ...]
    python benchmarks/simulate.py RESULT.json --check gpu_launches_CARD.json

Those of 71 crops of 96 pixels, as the case 00000 has: each is compiled for a card's architecture,
and a multiprocessor runs its share of the programs (`multiprocessor.py`). Memory's bandwidth is not
in it: a head's crops nearly fit into large L2 caches. With `--check` what a GPU has measured stands
beside it; the package on Python's path compiles, so another commit's plan is checked by that
commit's package:

    git worktree add BEFORE COMMIT && PYTHONPATH=BEFORE python benchmarks/simulate.py ...
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import machine_code
from cards import CARDS, LAUNCH_SECONDS, PROGRAM_SECONDS, Card, known_card
from gpu_work import Convolution, Tiles, last_stage, unet
from multiprocessor import simulate
from warp_way import PRODUCT, Costs, Step, disassembled, shortest_way, steps_of

from meddanet.kernels.variants import Variant, variants

# of a multiprocessor: warps, programs and kilobytes of shared memory at a time
LIMITS = {
    "sm_80": (64, 32, 164), "sm_86": (48, 16, 100), "sm_89": (48, 24, 100), "sm_90": (64, 32, 228),
    "sm_120": (48, 24, 100),
}
# slots of a plan for a head, and of them in use
CAPACITY, SLOTS = 160, 71
# pixels of the crops, and of the tiles that their last stage sees
CROP, TILE = 96, 104


def convolutions() -> Iterator[Convolution]:
    """Yields the convolutions of a crop in their order."""
    for one in [*unet(CROP), *last_stage(16, TILE)]:
        if isinstance(one, Convolution):
            yield one


class Compiled:
    """The convolutions of one card, each compiled when it is asked for."""

    def __init__(self, card: Card) -> None:
        self.costs = costs_of(card)
        listed = [v for v in variants(int(card.arch[3:])) if v.name == "conv_kernel"]
        self._by_class = {variant.shape_class: variant for variant in listed}
        rows = [{"arch": card.arch, "shape_class": name} for name in self._by_class]
        self._nearest = Tiles(rows, card.arch)
        self._described = cache(self._describe)

    def __call__(self, convolution: Convolution) -> tuple[dict[str, Any], list[Step], int]:
        """Returns (row of the table of kernels, what a warp goes through, programs at a time)."""
        row = self._nearest(convolution)
        assert row is not None, f"{convolution.label}: no such kernel is compiled"
        return self._described(row["shape_class"])

    def _describe(self, shape_class: str) -> tuple[dict[str, Any], list[Step], int]:
        variant: Variant = self._by_class[shape_class]
        compiled = variant.compile()
        row = machine_code.describe(variant, compiled)
        code = machine_code.cuobjdump("-sass", compiled.metadata_group["conv_kernel.cubin"])
        block_m, block_n, block_k, depth = (
            int(row["constants"][name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "K")
        )
        depth = -(-depth // block_k) * block_k
        products = block_m * block_n * depth // row["num_warps"] // PRODUCT
        way = shortest_way(disassembled(code), products)
        return row, steps_of(way, self.costs), resident(row)


def costs_of(card: Card) -> Costs:
    """Returns what is assumed of a card: its tensor cores' pace is the published one."""
    clocks = 4 * card.multiprocessors * card.gigahertz * 1e9
    return Costs(product=round(2 * PRODUCT * clocks / (card.tera_ops * 1e12)))


def resident(row: dict[str, Any]) -> int:
    """Returns how many programs of a row of the table of kernels a multiprocessor holds."""
    warps, programs, kilobytes = LIMITS[row["arch"]]
    registers = -(-row["registers"] * 32 // 256) * 256 * row["num_warps"]
    # a kilobyte of each program's is the system's
    shared = row["shared_bytes"] + 1024
    return min(
        2**16 // registers, warps // row["num_warps"], kilobytes * 1024 // shared, programs
    )


def microseconds(
    convolution: Convolution, slots: int, compiled: Compiled, card: Card
) -> float:
    """Returns how long a launch takes: slots in use, and programs of those that are not."""
    row, steps, at_once = compiled(convolution)
    block_m, block_n = (int(row["constants"][name]) for name in ("BLOCK_M", "BLOCK_N"))
    pixels = (convolution.side // convolution.stride) ** 2
    tiles = -(-pixels // block_m) * -(-convolution.c_out // block_n)
    share = -(-slots * tiles // card.multiprocessors)
    clocks = simulate(steps, row["num_warps"], at_once, share, compiled.costs)
    idle = PROGRAM_SECONDS * (CAPACITY - slots) * tiles
    return 1e6 * (clocks / (card.gigahertz * 1e9) + idle + LAUNCH_SECONDS)


def predicted(card: Card) -> dict[str, Any]:
    """Returns the microseconds of all convolutions, and a row for each kind."""
    compiled = Compiled(card)
    rows = [
        {"kernel": one.label, "times": one.times,
         "microseconds": round(microseconds(one, SLOTS, compiled, card), 2)}
        for one in convolutions()
    ]
    total = sum(row["times"] * row["microseconds"] for row in rows)
    return {"microseconds": round(total, 1), "kernels": rows}


def checked(measured: dict[str, Any]) -> dict[str, Any]:
    """Sets the launches of a volume's crops of 96 that a GPU has measured beside the simulation.

    Args:
        measured: A JSON of `plan_launches.py`.

    Raises:
        ValueError: If the card is not known.
    """
    card = known_card(measured["environment"]["device"])
    if card is None:
        raise ValueError(f"device is {measured['environment']['device']!r}, which is not known")
    compiled, slots = Compiled(card), measured["decisions"][1]
    times: dict[str, list[float]] = {}
    for launch, time in measured["launches_us"]:
        if launch.startswith("crop-96: "):
            times.setdefault(launch.removeprefix("crop-96: "), []).append(time)
    rows = []
    for one in convolutions():
        own = [times[_launch(one)].pop(0) for _ in range(one.times)]
        simulated = microseconds(one, slots, compiled, card)
        rows.append({
            "kernel": one.label, "times": one.times,
            "measured_us": round(statistics.mean(own), 2), "simulated_us": round(simulated, 2),
            "simulated_of_measured": round(simulated / statistics.mean(own), 3),
        })
    shares = [row["simulated_of_measured"] for row in rows]
    return {
        "device": measured["environment"]["device"], "commit": measured["environment"]["commit"],
        "case": measured["case"], "least": min(shares), "median": statistics.median(shares),
        "most": max(shares), "kernels": rows,
    }


def _launch(one: Convolution) -> str:
    """Returns what the plan calls the launches of a convolution."""
    if one.name == "first convolution":
        return "begin"
    if one.name == "down":
        return f"down {one.stage}"
    kind = "first" if one.name.endswith("first") else "second"
    if one.name.startswith("encoder"):
        return f"stage {one.stage} block, {kind}"
    return f"{'last stage' if one.c_out == 16 else 'decoder'}, {kind}"


def main() -> None:
    """Simulates, writes and prints what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--card", choices=list(CARDS), nargs="+", default=list(CARDS))
    parser.add_argument("--check", type=Path, help="a JSON of plan_launches.py")
    options = parser.parse_args()
    from triton import __version__ as triton

    content: dict[str, Any] = {
        "simulation": "of machine code on one multiprocessor, nothing measured", "triton": triton,
    }
    if options.check:
        content["command"] = f"python benchmarks/simulate.py FILE --check {options.check.name}"
        content |= checked(json.loads(options.check.read_text()))
        for row in content["kernels"]:
            print(f"{row['kernel']:60} measured {row['measured_us']:6.1f} us, simulated "
                  f"{row['simulated_us']:6.1f}: {row['simulated_of_measured']:.0%}")
    else:
        content["command"] = "python benchmarks/simulate.py FILE"
        if options.card != list(CARDS):
            content["command"] += f" --card {' '.join(map(repr, options.card))}"
        content["cards"] = {}
        for name in options.card:
            content["cards"][name] = found = predicted(CARDS[name])
            print(f"{name:12} simulated: {found['microseconds']:.0f} us", flush=True)
    options.result.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
