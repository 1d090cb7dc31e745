"""Dice, HD95 and multiply-adds on cases not trained on, like Med-DANet V2, Table 3a.

    python benchmarks/accuracy.py DATA RUN [RUN ...] [--out benchmarks/results/NAME.json]

Each RUN is the output folder of `meddanet train`, usually one per fold: `model.safetensors`,
`split.json`, `log.jsonl` and, where it trained a baseline, `baseline.pt`; or weights alone, a file
or the name of shipped ones, of whose cases the file of `--out` keeps its rows `static`. What is
there from the same weights and a clean commit is not scored again. Rows per held-out case:

    static    a plain segmenter in float32 on every slice, trained as long on the same split
    whole     the dynamic model's own whole branch in float32 on every slice
    S         its decisions, in float32
    Q         its whole branch on every slice, 8 or 16 bit
    S+Q       its decisions, 8 or 16 bit: what `meddanet segment` does
    8, 16     S+Q with every stage at this width; "random": widths drawn with the selectors' mean
    whole+L, S+Q+L    only the largest part of the label map kept, whose voxels touch by a corner
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from decisions import decision_report
from scipy import ndimage
from tables import accuracy, accuracy_cases
from timing import commit
from torch import Tensor, nn

from meddanet.build import build_segmenter
from meddanet.cost import CONVENTIONS, cost_table, count_macs
from meddanet.data import find_cases, from_slices, load_labels, load_volume, to_classes, to_slices
from meddanet.data.results import digest
from meddanet.layers import set_quantization
from meddanet.machine import machine
from meddanet.metrics import brats_regions, dice_score, hausdorff_distance_95
from meddanet.predictor import VolumePredictor
from meddanet.weight_files import locate
from meddanet.weights import load_model

REGIONS = brats_regions("brats2023")


class Widths(nn.Module):
    """Stands in for a bit selector: the same widths for all, or drawn with a mean."""

    def __init__(self, low: float, high: float, share: float, seed: int = 0) -> None:
        super().__init__()
        self.low, self.high, self.share = low, high, share
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, gradients: Tensor, feature: Tensor) -> Tensor:
        """Returns widths [N]."""
        drawn = torch.rand(len(feature), generator=self.generator) < self.share
        return torch.where(drawn, self.high, self.low)


@contextmanager
def widths(model, shares: list[float]):
    """Gives stage i the widest width with chance `shares[i]`, else the narrowest."""
    own = model.bit_selectors
    low, high = (float(own[0].widths[i]) for i in (0, -1))
    model.bit_selectors = nn.ModuleList(
        Widths(low, high, share, seed) for seed, share in enumerate(shares)
    )
    yield
    model.bit_selectors = own


@contextmanager
def in_float(model):
    """Switches the quantisation off."""
    set_quantization(model, quantize=False, update_range=False)
    yield
    set_quantization(model, quantize=True, update_range=False)


@torch.inference_mode()
def run_whole(logits: Callable[[Tensor], Tensor], volume) -> np.ndarray:
    """Classes [H, W, D] of a function from slices [N, C, H, W] to logits, on every slice."""
    slices = torch.from_numpy(to_slices(volume))
    classes = [
        logits(part.contiguous(memory_format=torch.channels_last)).argmax(1).to(torch.uint8)
        for part in slices.split(8)
    ]
    return from_slices(torch.cat(classes).numpy(), volume)


def largest_part(classes: np.ndarray) -> np.ndarray:
    """Makes background of all but the largest part [H, W, D]; voxels of one touch by a corner."""
    parts, count = ndimage.label(classes > 0, np.ones((3, 3, 3)))
    if count < 2:
        return classes
    return np.where(parts == np.bincount(parts[parts > 0]).argmax(), classes, 0)


def weights_of(run: Path) -> Path:
    """Returns the weights of a run's folder, or those that are named."""
    return run / "model.safetensors" if run.is_dir() else locate(run)


def evaluate_run(data: Path, run: Path) -> dict[str, dict]:
    """Returns {held-out case: {"rows": {row: scores}, "decisions": report}} of one run."""
    model = load_model(weights_of(run))
    split = json.loads((run / "split.json").read_text()) if run.is_dir() else model.metadata
    plain = build_segmenter(model.config["segmenter"], model.in_channels, model.num_classes)
    if (run / "baseline.pt").exists():
        plain.load_state_dict(torch.load(run / "baseline.pt", weights_only=True)["model"])
    else:
        plain = None
    cases = {case.name: case for case in find_cases(data)}
    results = {}
    for name in split["held_out"]:
        results[name] = evaluate_case(model, plain, cases[name])
        for row, scores in results[name]["rows"].items():
            dice = " ".join(f"{region} {value:.3f}" for region, value in scores["dice"].items())
            print(f"{name} {row:8} {dice}  {scores['mac'] / 1e9:.1f} G", flush=True)
    return results


def evaluate_case(model, plain: nn.Module | None, case) -> dict:
    """Scores every row on one case and reports the decisions against the truth."""
    volume = load_volume(case)
    truth = to_classes(load_labels(case.label, like=volume), "brats2021")
    rows = {}

    def dynamic(row: str):
        # an engine keeps the model as it was when it was made
        predictor = VolumePredictor(model, device="cpu", labels="brats2023", executor="eager")
        prediction = predictor.predict(volume)
        rows[row] = {**score(prediction.labels, truth, volume), **prediction.cost}
        return prediction

    routed = dynamic("S+Q")
    largest = largest_part(routed.labels)
    rows["S+Q+L"] = {**rows["S+Q"], **score(largest, truth, volume)}
    ran = routed.num_bits[routed.decisions > 0]
    narrow, wide = (float(model.bit_selectors[0].widths[i]) for i in (0, -1))
    mean = ((ran - narrow) / (wide - narrow)).mean(0) if len(ran) else np.zeros(ran.shape[1])
    stages = len(model.bit_selectors)
    for row, shares in {"8": [0.0] * stages, "16": [1.0] * stages, "random": mean}.items():
        with widths(model, list(shares)):
            dynamic(row)
    with in_float(model):
        dynamic("S")
        rows["S"]["scaled_paper"] = rows["S"]["paper"]
        whole = run_whole(lambda slices: model.whole_branch(slices)[0], volume)
    static = static_cost(model, volume)
    rows["whole"] = {**score(whole, truth, volume), **static}
    rows["whole+L"] = {**score(largest_part(whole), truth, volume), **static}
    rows["Q"] = {**static, **quantised_row(model, volume, truth)}
    if plain is not None:
        rows["static"] = {**score(run_whole(plain.eval(), volume), truth, volume), **static}
    return {"rows": rows, "decisions": decision_report(model, routed, volume, truth)}


def static_cost(model, volume) -> dict[str, float]:
    """Returns what the plain segmenter costs in float32 on every slice."""
    shape = (1, model.in_channels, *volume.data.shape[1:3])
    depth = volume.data.shape[3]
    cost = {c: depth * count_macs(model.segmenter, shape, c) for c in CONVENTIONS}
    return {**cost, "scaled_paper": cost["paper"]}


def quantised_row(model, volume, truth: np.ndarray) -> dict:
    """Scores the quantised whole branch on every slice; widths as the selectors choose."""
    chosen: list[Tensor] = []

    def logits(slices: Tensor) -> Tensor:
        output, num_bits = model.whole_branch(slices)
        chosen.append(num_bits)
        return output

    scores = score(run_whole(logits, volume), truth, volume)
    table = cost_table(model.segmenter, (1, model.in_channels, *volume.data.shape[1:3]), "paper")
    bits = torch.cat(chosen)
    cost = table.slice_cost(torch.zeros(len(bits), dtype=torch.long), bits.double())
    return {**scores, "scaled_paper": cost.sum().item()}


def score(classes: np.ndarray, truth: np.ndarray, volume) -> dict:
    """Dice and HD95 per region."""
    dice = dice_score(classes, truth, labels=REGIONS)
    distance = hausdorff_distance_95(classes, truth, labels=REGIONS, spacing=volume.spacing)
    return {
        "dice": {region: round(float(value), 4) for region, value in dice.items()},
        "hd95_mm": {region: round(float(value), 2) for region, value in distance.items()},
    }


def training_seconds(run: Path) -> dict[str, float]:
    """CPU seconds per phase, as the log of the run says."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {line["phase"]: line["cpu_seconds"] for line in lines}


def cases_of(run: Path, data: Path, known: dict[str, dict]) -> dict[str, dict]:
    """Returns the held-out cases of a run, scored unless they are known from it and this commit."""
    own = {
        "run": run.name, "weights_sha256": digest(weights_of(run)),
        "commit": commit(),
    }
    done = {name: case for name, case in known.items() if own.items() <= case.items()}
    if done and not own["commit"].endswith(("-dirty", "unknown")):
        return done
    cases = {name: {**own, **case} for name, case in evaluate_run(data, run).items()}
    for name in () if run.is_dir() else cases.keys() & known.keys():
        # weights alone have no plain network beside them
        if static := known[name]["rows"].get("static"):
            of_run = {key: known[name].get(key) for key in own}
            cases[name]["rows"]["static"] = static
            cases[name]["static_of"] = known[name].get("static_of", of_run)
    return cases


def main() -> None:
    """Evaluates the runs, stores the result and prints its tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    before = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    seconds = {run.name: training_seconds(run) for run in args.runs if run.is_dir()}
    result: dict = {
        "machine": machine(), "cases": {},
        "training_cpu_seconds": seconds or before.get("training_cpu_seconds", {}),
    }
    for run in args.runs:
        result["cases"] |= cases_of(run, args.data, before.get("cases", {}))
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(accuracy(result["cases"]), accuracy_cases(result["cases"]), sep="\n\n")


if __name__ == "__main__":
    main()
