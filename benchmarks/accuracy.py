"""Dice and multiply-adds of a trained model on cases it has not seen, beside static baselines.

    python benchmarks/accuracy.py DATA RUN [--out benchmarks/results/NAME.json]

RUN is the output folder of `meddanet train`: `model.safetensors`, `split.json`, `log.jsonl` and,
where the run trained a baseline, `static.pt`. Three rows per held-out case:

    dynamic   skip / crop / whole as decided
    whole     the same weights, the whole branch on every slice
    static    a plain segmenter of the same kind, trained beside on the same split
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from meddanet.build import build_segmenter
from meddanet.cost import count_macs
from meddanet.data import (
    find_cases,
    from_slices,
    load_labels,
    load_volume,
    to_classes,
    to_slices,
)
from meddanet.layers import set_quantization
from meddanet.metrics import dice_score
from meddanet.predictor import VolumePredictor
from meddanet.weights import load_model

REGIONS = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}


@torch.inference_mode()
def run_whole(logits, volume) -> np.ndarray:
    """Labels [H, W, D] of a function from slices [N, C, H, W] to logits, on every slice."""
    slices = torch.from_numpy(to_slices(volume))
    labels = [logits(part).argmax(1).to(torch.uint8) for part in slices.split(8)]
    return from_slices(torch.cat(labels).numpy(), volume)


def evaluate(data: Path, run: Path) -> dict:
    """Returns the table as {row: {case: {region: dice, "macs": {convention: MACs}}}}."""
    split = json.loads((run / "split.json").read_text())
    model = load_model(run / "model.safetensors")
    predictor = VolumePredictor(model, device="cpu")
    rows = {"dynamic": {}, "whole": {}, "static": {}}
    plain = None
    if (run / "baseline.pt").exists():
        plain = build_segmenter("unet-16", model.in_channels, model.num_classes).eval()
        set_quantization(plain, quantize=False, update_range=False)
        plain.load_state_dict(torch.load(run / "baseline.pt", weights_only=True)["model"])
    cases = {case.name: case for case in find_cases(data)}
    for name in split["held_out"]:
        volume = load_volume(cases[name])
        truth = to_classes(load_labels(cases[name].label, like=volume), "brats2021")
        prediction = predictor.predict(volume)
        classes = to_classes(prediction.labels, "brats2021")
        shape = (1, model.in_channels, *volume.data.shape[1:3])
        depth = volume.data.shape[3]
        static_macs = {
            c: depth * count_macs(model.segmenter, shape, c) for c in ("mac", "paper")
        }
        rows["dynamic"][name] = score(classes, truth, prediction.cost)
        counts = np.bincount(prediction.decisions, minlength=len(prediction.routes))
        rows["dynamic"][name]["decisions"] = dict(
            zip(prediction.routes, counts.tolist(), strict=True)
        )
        rows["dynamic"][name]["scaled_paper"] = int(prediction.cost["scaled_paper"])
        whole = run_whole(lambda part: model.whole_branch(part)[0], volume)
        rows["whole"][name] = score(whole, truth, static_macs)
        if plain is not None:
            rows["static"][name] = score(run_whole(plain, volume), truth, static_macs)
        for row, scored in rows.items():
            if name in scored:
                print(name, row, scored[name], flush=True)
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    return {"machine": machine, "split": split, "rows": rows, "log": training_time(run / "log.jsonl")}


def score(classes: np.ndarray, truth: np.ndarray, macs: dict) -> dict:
    """Dice per region and the case's multiply-adds."""
    dice = dice_score(classes, truth, labels=REGIONS)
    dice = {region: round(float(value), 4) for region, value in dice.items()}
    return {**dice, "macs": {c: int(macs[c]) for c in ("mac", "paper")}}


def training_time(log: Path) -> dict[str, float]:
    """CPU seconds per phase, as the log of the run says."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return {line["phase"]: line["cpu_seconds"] for line in lines}


def main() -> None:
    """Runs the evaluation, prints each row and stores the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result = evaluate(args.data, args.run)
    for row, cases in result["rows"].items():
        for region in REGIONS:
            values = [case[region] for case in cases.values()]
            if values:
                print(f"{row:8} {region} mean Dice {np.mean(values):.4f}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
