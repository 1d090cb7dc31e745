"""Predicts kernel and volume times on GPUs that are not at hand. Predictions, not measurements.

    python benchmarks/predict.py [--card "RTX 4090"] [--out benchmarks/results/prediction.json]
    python benchmarks/predict.py --compare GPU.json [...]

A launch takes as long as the slowest of four things, each at the card's published peak: its bytes
at the memory's bandwidth, its integer operations at the tensor cores' int8 rate, its shared memory
traffic at 128 bytes per clock and SM, and a launch without work in a CUDA graph. No kernel
reaches a peak, so a prediction is a bound from below on time; what share of it is reached,
`--compare` tells from measured results (`benchmarks/gpu.sh kernels`), which every case with its
bytes and operations has. What moves and computes how much: `gpu_work.py`. A volume is that of a
real case: its routes and widths as `results/brats2021.json` has them.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_work import Tiles, Work, half_precision, head, last_stage, unet

from meddanet.build import build_decision_network, build_position_network

RESULTS = Path(__file__).parent / "results"
SLICES, SIDE, HALO = 155, 240, 2
# a kernel without work in a CUDA graph on an H200: "width" of the groups without slices in
# results/gpu_launches_h200_00000.json
LAUNCH_SECONDS = 1.15e-6
SHARED_BYTES_PER_CLOCK = 128


@dataclass(frozen=True)
class Card:
    """Published peaks of one card.

    Attributes:
        arch: Its code, such as "sm_89".
        multiprocessors: How many SMs.
        gigahertz: Boost clock.
        gigabytes_per_second: Memory bandwidth.
        tera_ops: int8 on tensor cores, without sparsity; half precision has half of it.
        source: Where the vendor says so.
        devices: What PyTorch calls it, whole: a "Laptop GPU" or "D" is another card.
    """

    arch: str
    multiprocessors: int
    gigahertz: float
    gigabytes_per_second: float
    tera_ops: float
    source: str
    devices: tuple[str, ...] = ()


CARDS = {
    "RTX 3090": Card("sm_86", 82, 1.695, 936, 284,
                     "NVIDIA Ampere GA102 GPU Architecture, whitepaper V2, Appendix A",
                     ("NVIDIA GeForce RTX 3090",)),
    "RTX 4090": Card("sm_89", 128, 2.52, 1008, 660.6,
                     "NVIDIA Ada GPU Architecture, whitepaper V2, Appendix A",
                     ("NVIDIA GeForce RTX 4090",)),
    "RTX 5090": Card("sm_120", 170, 2.407, 1792, 838,
                     "NVIDIA RTX Blackwell GPU Architecture, whitepaper V1, Appendix A",
                     ("NVIDIA GeForce RTX 5090",)),
    "L40S": Card("sm_89", 142, 2.52, 864, 733,
                 "NVIDIA L40S datasheet; clock and SMs: NVIDIA Ada GPU Architecture, whitepaper",
                 ("NVIDIA L40S",)),
    "A100 80 GB": Card("sm_80", 108, 1.41, 2039, 624,
                       "NVIDIA A100 datasheet; NVIDIA A100 Architecture, whitepaper V1, Table 4",
                       ("NVIDIA A100-SXM4-80GB",)),
    "H200": Card("sm_90", 132, 1.83, 4800, 1979,
                 "NVIDIA H200 datasheet; clock and SMs: NVIDIA H100 Architecture, whitepaper",
                 ("NVIDIA H200",)),
}  # fmt: skip


@dataclass(frozen=True)
class Prediction:
    """How long a launch takes at the peaks, and what takes that long."""

    name: str
    seconds: float
    bound: str


def predict(work: Work, card: Card) -> Prediction:
    """Returns the time of the slowest part; several launches alike count as such."""
    rate = card.tera_ops * 1e12 * (0.5 if work.half else 1)
    shared = card.multiprocessors * card.gigahertz * 1e9 * SHARED_BYTES_PER_CLOCK
    seconds = {
        "memory": work.bytes / (card.gigabytes_per_second * 1e9),
        "operations": work.operations / rate,
        "shared memory": work.shared_bytes / shared,
        "launch": work.launches * LAUNCH_SECONDS,
    }
    bound = max(seconds, key=lambda name: seconds[name])
    return Prediction(work.name, seconds[bound], bound)


def network_work(
    side: int, samples: int, widths: list[dict[int, int]], tiles: Tiles
) -> list[Work]:
    """Returns the launches of U-Net-16 up to its last stage.

    Args:
        side: Of the slices or crops.
        samples: How many.
        widths: For each encoder stage, how many of them chose each width.
        tiles: Of the card's architecture.
    """
    found = []
    for convolution in unet(side):
        shares = {8: samples} if convolution.stage is None else widths[convolution.stage]
        parts = [convolution.work(n, bits, tiles(convolution)) for bits, n in shares.items()]
        found += convolution.times * [_one_launch(convolution.label, parts)]
    return found


def _one_launch(name: str, parts: Iterable[Work]) -> Work:
    """Slots of several widths in one launch."""
    parts = list(parts)
    return Work(
        name, sum(part.bytes for part in parts), sum(part.operations for part in parts),
        sum(part.shared_bytes for part in parts),
    )


def volume_work(
    routes: dict[str, int], num_bits: list[dict[str, int]], seen: int, tiles: Tiles
) -> list[Work]:
    """Returns all launches of one volume, slices in memory to labels: one batch per route.

    Args:
        routes: How many slices went which way: "skip", "crop-P", "whole".
        num_bits: For each encoder stage, width -> slices that ran at it.
        seen: Slices that the policy sees; 0 for a static network.
        tiles: Of the card's architecture.
    """
    ran = sum(count for route, count in routes.items() if route != "skip")
    view = (4, SIDE // 2, SIDE // 2)
    work = [Work("background", SLICES * SIDE**2)]
    if seen:
        policy = build_decision_network("shufflenetv2-m", len(routes))
        position = build_position_network("heatmap")
        work.append(Work("slices at half size", seen * 4 * (4 * SIDE**2 + 2 * (SIDE // 2) ** 2)))
        work.append(half_precision("policy", policy, (seen, *view)))
        work.append(half_precision("position", position, (seen, *view)))
    for route, count in routes.items():
        if route == "skip" or not count:
            continue
        whole = route == "whole"
        side = SIDE if whole else int(route.rpartition("-")[2])
        canvas = SIDE if whole else side + 4 * HALO
        shares = [{int(b): round(n * count / ran) for b, n in stage.items()} for stage in num_bits]
        # four channels of float32 in, codes out
        work.append(Work(f"{route}: slices to codes", count * 4 * side**2 * (4 + 1)))
        work += network_work(side, count, shares, tiles)
        work += [c.work(count, 8, tiles(c)) for c in last_stage(16, canvas)]
        work.append(head(count, canvas))
    return work


def predict_volume(work: list[Work], card: Card) -> dict[str, Any]:
    """Returns milliseconds of one volume and their share by what bounds the launches."""
    found = [predict(part, card) for part in work]
    by_bound: Counter[str] = Counter()
    for prediction in found:
        by_bound[prediction.bound] += prediction.seconds
    return {
        "milliseconds": round(1e3 * sum(p.seconds for p in found), 3),
        "launches": sum(part.launches for part in work),
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
    static = {"whole": SLICES}, [{"8": SLICES}] * 4, 0
    cards = {}
    for name, card in CARDS.items():
        tiles = Tiles(variants, card.arch)
        decided = {name: case["decisions"] for name, case in cases.items()}
        volumes = {case: (d["routes"], d["num_bits"], SLICES) for case, d in decided.items()}
        volumes["static, every slice whole"] = static
        cards[name] = {
            "peaks": vars(card), "kernels": kernel_rows(card, tiles),
            "volumes": {
                case: predict_volume(volume_work(*routed, tiles), card)
                for case, routed in volumes.items()
            },
        }
    return cards


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
    card = next((card for card in CARDS.values() if device in card.devices), None)
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
    print("predicted, not measured: milliseconds per volume at published peaks")
    for name, found in cards.items():
        for case, volume in found["volumes"].items():
            parts = ", ".join(f"{k} {v}" for k, v in volume["milliseconds_by_bound"].items())
            print(f"{name:12} {case:26} {volume['milliseconds']:7.3f}  ({parts})")
    for row in cards[options.card]["kernels"] if options.card else []:
        print(f"{row['kernel']:70} {row['microseconds']:8.2f} us  {row['bound']}")
    if options.out:
        content = {
            "prediction": "bounds from published peaks, nothing measured",
            "command": "python benchmarks/predict.py --out FILE",
            "launch_seconds": LAUNCH_SECONDS, "cards": cards,
        }
        options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
