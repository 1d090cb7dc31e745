"""Predicts kernel and volume times on GPUs that are not at hand. Predictions, not measurements.

    python benchmarks/predict.py [--card "RTX 4090"] [--out benchmarks/results/prediction.json]
    python benchmarks/predict.py --compare GPU.json [...]

A launch takes at least as long as the slowest of six things, four of them at the card's published
peak: its bytes at the memory's bandwidth, its integer operations at the tensor cores' int8 rate,
its shared memory traffic at 128 bytes per clock and SM, its instructions at four per clock and SM;
and two as an H200 was measured: a launch without work in a CUDA graph, and so much for each of its
programs, working or not. No kernel reaches a peak, so a prediction is a lower bound on time; what
share of it is reached, `--compare` tells from measured results (`benchmarks/gpu.sh kernels`), which
every case with its bytes and operations has. What a kernel moves and computes: `gpu_work.py`. A
volume is that of a real case, its routes and widths as `results/brats2021.json` has them, and goes
through all launches of the engine's plan: `plan_work.py`.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cards import CARDS, LAUNCH_SECONDS, PROGRAM_SECONDS, Card, known_card
from gpu_work import Tiles, Work, last_stage, unet
from plan_work import SIDE, plan_work

RESULTS = Path(__file__).parent / "results"
SLICES = 155
SHARED_BYTES_PER_CLOCK = 128
# a multiprocessor has four schedulers
INSTRUCTIONS_PER_CLOCK = 4
DECIDING = "decisions and routing"


@dataclass(frozen=True)
class Prediction:
    """How long a launch takes at the peaks, and what takes that long."""

    name: str
    seconds: float
    bound: str


def roofs(work: Work, card: Card) -> dict[str, float]:
    """Returns the seconds that each part of a launch takes at the least."""
    rate = card.tera_ops * 1e12 * (0.5 if work.half else 1)
    clocks = card.multiprocessors * card.gigahertz * 1e9
    return {
        "memory": work.bytes / (card.gigabytes_per_second * 1e9),
        "operations": work.operations / rate,
        "shared memory": work.shared_bytes / (clocks * SHARED_BYTES_PER_CLOCK),
        "instructions": work.instructions / (clocks * INSTRUCTIONS_PER_CLOCK),
        "programs": work.programs * PROGRAM_SECONDS,
        "launch": work.launches * LAUNCH_SECONDS,
    }


def predict(work: Work, card: Card) -> Prediction:
    """Returns the time of the slowest part; several launches alike count as such."""
    seconds = roofs(work, card)
    bound = max(seconds, key=lambda name: seconds[name])
    return Prediction(work.name, seconds[bound], bound)


def seconds_at_once(branches: Iterable[list[Work]], card: Card) -> float:
    """Returns the time of branches that run side by side: the longest's, or what all share."""
    branches = list(branches)
    longest = max(sum(predict(work, card).seconds for work in branch) for branch in branches)
    needed: Counter[str] = Counter()
    for branch in branches:
        for work in branch:
            needed.update(roofs(work, card))
    # launches of several branches overlap
    del needed["launch"]
    return max(longest, *needed.values())


def stages_of(work: list[Work]) -> list[list[list[Work]]]:
    """Returns what runs one after the other, each as its branches side by side: see `Plan.run`."""
    stages: dict[str, dict[str, list[Work]]] = {}
    for part in work:
        branch = part.name.split(":")[0]
        together = {"decide": "networks", "locate": "networks", "view": "view", "route": "route"}
        stages.setdefault(together.get(branch, "groups"), {}).setdefault(branch, []).append(part)
    return [list(branches.values()) for branches in stages.values()]


def part_of(launch: str) -> str:
    """Returns the part of the plan that a launch belongs to, as `plan_launches.py` names it."""
    return launch.split(":")[0] if ":" in launch else DECIDING


def predict_volume(work: list[Work], card: Card) -> dict[str, Any]:
    """Returns lower bounds for one volume.

    Args:
        work: Of `plan_work`.
        card: Where it runs.

    Returns:
        "milliseconds" of the whole graph, in which networks and groups run side by side; and of the
        launches one after the other, "milliseconds_by_part" and "milliseconds_by_bound".
    """
    by_part, by_bound = Counter[str](), Counter[str]()
    for part in work:
        found = predict(part, card)
        by_part[part_of(part.name)] += found.seconds
        by_bound[found.bound] += found.seconds
    seconds = sum(seconds_at_once(branches, card) for branches in stages_of(work))
    return {
        "milliseconds": round(1e3 * seconds, 3), "launches": len(work),
        "milliseconds_by_part": {k: round(1e3 * v, 3) for k, v in by_part.items()},
        "milliseconds_by_bound": {k: round(1e3 * v, 3) for k, v in by_bound.most_common()},
    }


def kernel_rows(card: Card, tiles: Tiles, samples: int = 16) -> list[dict[str, Any]]:
    """Returns a row per kernel of U-Net-16 on whole slices, at each width that it runs at."""
    rows = []
    for convolution in [*unet(SIDE), *last_stage(16, SIDE)]:
        for bits in (8,) if convolution.stage is None else (8, 16):
            work = convolution.work(samples, bits, tiles(convolution))
            found = predict(work, card)
            rows.append({
                "kernel": work.name, "samples": samples, "bytes": work.bytes,
                "operations": work.operations, "shared_bytes": work.shared_bytes,
                "microseconds": round(1e6 * found.seconds, 2), "bound": found.bound,
            })
    return rows


def predictions(cases: dict[str, Any], variants: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns everything that is predicted, card by card."""
    cards = {}
    for name, card in CARDS.items():
        tiles = Tiles(variants, card.arch)
        volumes = {
            case: plan_work(found["decisions"]["routes"], found["decisions"]["num_bits"], tiles)
            for case, found in cases.items()
        }
        volumes["static, every slice whole"] = plan_work(
            {"whole": SLICES}, [{"8": SLICES}] * 4, tiles, decided=False
        )
        cards[name] = {
            "peaks": vars(card), "kernels": kernel_rows(card, tiles),
            "volumes": {case: predict_volume(work, card) for case, work in volumes.items()},
        }
    return cards


def as_today(launches: Iterable[str]) -> list[str]:
    """Returns the names that launches of the plan have today.

    Codes of skips and moments of a stage's input once were launches of their own, and a way up was
    three, and a fourth that put the last one's patch on its tile.
    """
    renamed = (name.replace(": up, reduce", ": way up") for name in launches)
    former = ": skip", ": spread", ": up, ", ": tile"
    return [name for name in renamed if not any(part in name for part in former)]


def bounds_of_launches(
    measured: dict[str, Any], cases: dict[str, Any], variants: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """Returns the lower bounds of what `plan_launches.py` measured.

    Args:
        measured: Its JSON.
        cases: By name, with "decisions": their widths. Of others every stage has 8 bits.
        variants: Rows of `kernels_compiled.json`.

    Returns:
        As `predict_volume`, of today's plan; None if the card is not known, or the plan was another
        one, but for launches that today's have taken over: see `as_today`.
    """
    card = known_card(measured["environment"]["device"])
    if card is None:
        return None
    routes = [name for name in measured["parts_us"] if name != DECIDING]
    counts = dict(zip(("skip", *routes), measured["decisions"], strict=True))
    num_bits = [{"8": sum(measured["decisions"][1:])}] * 4
    if measured["case"] in cases:
        num_bits = cases[measured["case"]]["decisions"]["num_bits"]
    work = plan_work(counts, num_bits, Tiles(variants, card.arch))
    if [part.name for part in work] != as_today(name for name, _ in measured["launches_us"]):
        return None
    return predict_volume(work, card)


def compare(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Sets measured kernels beside the roof of their card.

    Args:
        measured: A JSON of `benchmarks/gpu.sh kernels`.

    Returns:
        A row per case with bytes: measured and predicted microseconds and the share reached.

    Raises:
        ValueError: If the card's peaks are not known here.
    """
    device = measured["environment"]["device"]
    card = known_card(device)
    if card is None:
        known = ", ".join(name for card in CARDS.values() for name in card.devices)
        raise ValueError(f"device is {device!r}, whose peaks are not known here; known: {known}")
    rows = []
    for case in measured["cases"]:
        times = case["providers"].get(case["ours"], {})
        if case.get("bytes") is None or "cold_ms" not in times:
            continue
        wide = "16 bit" in case["case"]
        work = Work(case["case"], case["bytes"], case.get("operations", 0) * (4 if wide else 1))
        roof, seconds = predict(work, card), 1e-3 * times["cold_ms"]["median"]
        rows.append({
            "case": case["case"], "device": device, "bytes": work.bytes,
            "operations": work.operations, "measured_microseconds": round(1e6 * seconds, 2),
            "predicted_microseconds": round(1e6 * roof.seconds, 2), "bound": roof.bound,
            "share_of_roof": round(roof.seconds / seconds, 3),
        })
    return rows


def main() -> None:
    """Prints predictions, or measured kernels beside them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=Path, default=RESULTS / "brats2021.json")
    parser.add_argument("--compiled", type=Path, default=RESULTS / "kernels_compiled.json")
    parser.add_argument("--card", choices=list(CARDS), help="prints this card's kernels, too")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--compare", type=Path, nargs="+", default=[])
    options = parser.parse_args()
    for path in options.compare:
        try:
            rows = compare(json.loads(path.read_text()))
        except ValueError as error:
            parser.error(f"{path}: {error}")
        for row in rows:
            print(f"{row['case']:60} measured {row['measured_microseconds']:9.2f} us, predicted "
                  f"{row['predicted_microseconds']:9.2f} ({row['bound']}): "
                  f"{row['share_of_roof']:.0%} of the roof")
    if options.compare:
        return
    cases = json.loads(options.cases.read_text())["cases"]
    cards = predictions(cases, json.loads(options.compiled.read_text())["variants"])
    print("predicted, not measured: lower bounds of milliseconds per volume at published peaks")
    for name, found in cards.items():
        for case, volume in found["volumes"].items():
            parts = ", ".join(f"{k} {v}" for k, v in volume["milliseconds_by_bound"].items())
            print(f"{name:12} {case:26} {volume['milliseconds']:7.3f}  ({parts})")
    for row in cards[options.card]["kernels"] if options.card else []:
        print(f"{row['kernel']:70} {row['microseconds']:8.2f} us  {row['bound']}")
    if options.out:
        content = {
            "prediction": "lower bounds from published peaks, nothing measured",
            "command": "python benchmarks/predict.py --out FILE",
            "launch_seconds": LAUNCH_SECONDS, "program_seconds": PROGRAM_SECONDS, "cards": cards,
        }
        options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
