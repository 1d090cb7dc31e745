"""Med-DANet trained end to end on the Decathlon's hippocampus cases, against each of its members.

    python benchmarks/v1_hippocampus.py DATA RUN [--out benchmarks/results/NAME.json]

DATA holds `images/` and `labels/`; RUN keeps the slices and the weights, and what is there already
is not made again. Patients are split three ways: a fifth is tested on, an eighth of the others
chooses alpha of Eq. 4, the rest is trained on. Rows of the table, per tested case:

    M1, M2        one member on every slice
    Med-DANet     as the decision network decides
    skip or M2    the decision network's skips, M2 everywhere else
    oracle        the route that Eq. 4 chooses, knowing the labels
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from meddanet.activation import activation_ratio
from meddanet.batches import Batches
from meddanet.build import build_med_danet
from meddanet.choice import choice_metric, slice_dice
from meddanet.cost import CONVENTIONS, CostTable, cost_tables
from meddanet.data import Volume, canonical, find_cases, load_labels, load_volume, to_slices
from meddanet.data.slices import CachedCase, folds, read_cache, write_cache
from meddanet.machine import machine
from meddanet.med_danet import MedDANet
from meddanet.metrics import dice_score
from meddanet.monitor import Monitor
from meddanet.objectives_v1 import DecisionObjective, bank
from meddanet.phase import run_phase
from meddanet.predictor import VolumePredictor
from meddanet.recipe import DecisionConfig, PhaseConfig
from meddanet.weights import load_model, save_model

BANK = ("unet-4", "unet-12")
BANK_PHASE = PhaseConfig(
    "bank", steps=3000, batch=16, learning_rate=2e-3, stay=(0.75, 1.0), windows=False,
    autocast="bfloat16", parts=("bank",),
)
DECISION_PHASE = PhaseConfig(
    "decision", steps=1200, batch=16, learning_rate=5e-3, windows=False, parts=("decision",)
)
ALPHAS = (0.001,)
SEED = 0
TRAINED_SIZE = (48, 64)  # every hippocampus slice fits, a multiple of the stride
REGIONS = {"anterior": (1,), "posterior": (2,)}
MODALITIES = ("mri",)
EQUAL_DICE = 0.005


def load_case(case) -> tuple[Volume, np.ndarray]:
    """Returns the volume and its classes [D, H, W], in the order of `to_slices`."""
    volume = load_volume(case, MODALITIES)
    labels = canonical(load_labels(case.label, like=volume), volume.affine)
    return volume, labels.transpose(2, 0, 1)


def pad(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pads the last two axes with zeros at their end, as `VolumePredictor` does."""
    missing = [side - own for side, own in zip(size, array.shape[-2:], strict=True)]
    return np.pad(array, [(0, 0)] * (array.ndim - 2) + [(0, more) for more in missing])


def prepare(cases: dict, names: list[str], cache: Path) -> list[CachedCase]:
    """Caches normalised slices of one size."""
    for name in names:
        if not (cache / f"{name}.images.npy").exists():
            volume, labels = load_case(cases[name])
            images, labels = pad(to_slices(volume), TRAINED_SIZE), pad(labels, TRAINED_SIZE)
            write_cache(name, images, labels, cache)
    return [read_cache(name, cache) for name in names]


def split_patients(names: list[str]) -> dict[str, list[str]]:
    """Returns {"trained_on", "alpha_chosen_on", "tested_on"}."""
    rest, tested = folds(names, 5, 0)
    trained, chosen = folds(rest, 8, 0)
    return {"trained_on": trained, "alpha_chosen_on": chosen, "tested_on": tested}


def train(cases: dict, split: dict[str, list[str]], run: Path) -> dict[float, MedDANet]:
    """Trains the bank once and a decision network per alpha."""
    training = prepare(cases, split["trained_on"], run / "cache")
    facts = {"modalities": MODALITIES, "label_convention": "brats2023", "split": split}
    path = run / "bank.safetensors"
    if not path.exists():
        torch.manual_seed(SEED)
        model = build_med_danet(BANK, in_channels=1, num_classes=3)
        run_phase(model, bank, BANK_PHASE, Batches(training, seed=SEED), None, Monitor(run))
        save_model(model, path, **facts)
    models = {}
    for alpha in ALPHAS:
        trained = run / f"alpha-{alpha}.safetensors"
        if not trained.exists():
            torch.manual_seed(SEED)
            model = load_model(path)
            fresh = build_med_danet(BANK, in_channels=1, num_classes=3)
            model.decision.load_state_dict(fresh.decision.state_dict())
            objective = DecisionObjective(model, DecisionConfig(alpha=alpha))
            batches = Batches(training, seed=SEED + 10)
            run_phase(model, objective, DECISION_PHASE, batches, None, Monitor(run))
            counts = dict(zip(model.routes, objective.counts.tolist(), strict=True))
            save_model(model, trained, **facts, label_distribution=counts)
        models[alpha] = load_model(trained)
    return models


@dataclass
class Answered:
    """One case and what every member of the bank says of it, which no alpha changes.

    Attributes:
        volume: The case.
        slices: [D, C, H, W] normalised, padded to the stride.
        labels: [D, H, W] classes, padded alike.
        answers: [1 + n, D, H, W] classes by route, skip first.
        tables: What each route costs, by convention.
    """

    volume: Volume
    slices: Tensor
    labels: Tensor
    answers: Tensor
    tables: dict[str, CostTable]


@torch.inference_mode()
def answer(model: MedDANet, cases: dict, names: list[str]) -> dict[str, Answered]:
    """Runs every member on every slice of the cases."""
    tables: dict[tuple, dict[str, CostTable]] = {}
    answered = {}
    for name in names:
        volume, truth = load_case(cases[name])
        size = tuple(-(-side // model.stride) * model.stride for side in truth.shape[1:])
        slices = torch.from_numpy(pad(to_slices(volume), size))
        labels = torch.from_numpy(pad(truth, size).astype(np.int64))
        members = [member(slices).argmax(1) for member in model.bank]
        if size not in tables:
            tables[size] = cost_tables(model, (1, 1, *size))
        answers = torch.stack([torch.zeros_like(labels), *members])
        answered[name] = Answered(volume, slices, labels, answers, tables[size])
    return answered


@torch.inference_mode()
def evaluate(model: MedDANet, config: DecisionConfig, answered: dict[str, Answered]) -> dict:
    """Returns rows of Dice and cost per case, the decisions' confusion and the activation ratio."""
    last = len(model.bank)
    rows: dict[str, dict] = {}
    decided, confusion = [], np.zeros((len(model.routes),) * 2, int)
    for name, case in answered.items():
        depth = len(case.slices)
        oracle = best_routes(case, config)
        decisions = model.decide(case.slices).argmax(1)
        np.add.at(confusion, (oracle.numpy(), decisions.numpy()), 1)
        decided.append(decisions.numpy())
        alone = {f"M{m}": torch.full((depth,), m) for m in range(1, last + 1)}
        routed = {
            **alone,
            "Med-DANet": decisions,
            f"skip or M{last}": torch.where(decisions > 0, last, 0),
            "oracle": oracle,
        }
        for row, route in routed.items():
            classes = case.answers[route, torch.arange(depth)]
            undecided = depth if row in alone else 0
            macs = {
                c: table.slice_macs(route).sum().item() - undecided * table.macs("skip")
                for c, table in case.tables.items()
            }
            rows.setdefault(row, {})[name] = score(classes, case.labels, macs)
    ratio = activation_ratio(decided, model.routes, bins=10)
    print(ratio.render(), flush=True)
    return {
        "mean": {row: mean_of(list(table.values())) for row, table in rows.items()},
        "cases": rows,
        "confusion": {"rows": "oracle", "columns": "decided", "routes": model.routes,
                      "counts": confusion.tolist()},
        "activation": {"overall": ratio.overall.round(4).tolist(),
                       "by_position": ratio.by_position.round(4).tolist()},
    }


def best_routes(case: Answered, config: DecisionConfig) -> Tensor:
    """Returns what Eq. 4 chooses [D], knowing the labels."""
    regions = tuple(REGIONS.values())
    scores = torch.stack([slice_dice(a, case.labels, regions) for a in case.answers[1:]], 1)
    table = case.tables["paper"]
    macs = [table.macs(route) - table.macs("skip") for route in table.routes[1:]]
    foreground = case.labels.flatten(1).any(1)
    return torch.where(foreground, 1 + choice_metric(scores, macs, config).argmax(1), 0)


def check_predictor(
    model: MedDANet, answered: dict[str, Answered], scored: dict[str, dict]
) -> None:
    """Asserts that `VolumePredictor` finds what the table scores, at the cost the table names."""
    # the classes are the labels' values, which is what "brats2023" has
    predictor = VolumePredictor(model, "cpu", labels="brats2023")
    for name, case in answered.items():
        prediction = predictor.predict(case.volume)
        index = torch.arange(len(case.slices))
        check_labels(prediction.labels, case.volume, case.answers[prediction.decisions, index])
        for convention, macs in scored[name]["macs"].items():
            assert macs == prediction.cost[convention], name


def check_labels(labels: np.ndarray, volume: Volume, expected: Tensor) -> None:
    """Asserts that the predictor's labels are those the table scores, but for rounding ties."""
    own = canonical(labels, volume.affine).transpose(2, 0, 1)
    height, width = own.shape[1:]
    differing = np.mean(own != expected[:, :height, :width].numpy())
    assert differing < 1e-3, f"{volume.name}: {differing:.1e} of the voxels differ"


def score(classes: Tensor, labels: Tensor, macs: dict[str, float]) -> dict:
    """Returns Dice per region, their mean, and multiply-adds of the case."""
    dice = dice_score(classes.numpy(), labels.numpy(), labels=REGIONS)
    return {**dice, "mean": float(np.mean(list(dice.values()))), "macs": macs}


def mean_of(scores: list[dict]) -> dict:
    """Averages over cases."""
    mean = {key: float(np.mean([s[key] for s in scores])) for key in (*REGIONS, "mean")}
    macs = {c: float(np.mean([s["macs"][c] for s in scores])) for c in CONVENTIONS}
    return {**mean, "macs": macs}


def choose_alpha(results: dict[float, dict]) -> float:
    """Returns the alpha of the cheapest model within 0.5 points of the best member, or the best."""
    def dice(alpha: float) -> float:
        return results[alpha]["mean"]["Med-DANet"]["mean"]

    members = [f"M{number}" for number in range(1, len(BANK) + 1)]
    best = max(results[ALPHAS[0]]["mean"][member]["mean"] for member in members)
    equal = [alpha for alpha in ALPHAS if dice(alpha) >= best - EQUAL_DICE]
    if not equal:
        return max(ALPHAS, key=dice)
    return min(equal, key=lambda alpha: results[alpha]["mean"]["Med-DANet"]["macs"]["mac"])


def show(title: str, result: dict) -> None:
    """Prints the mean rows and the confusion."""
    print(title)
    for row, mean in result["mean"].items():
        dice = "  ".join(f"{region} {mean[region]:.4f}" for region in (*REGIONS, "mean"))
        print(f"  {row:<12} {dice}  {mean['macs']['mac'] / 1e9:.3f} G MACs per case")
    print("  oracle x decided", result["confusion"]["counts"], flush=True)


def main() -> None:
    """Trains what is missing, chooses alpha, tests, and stores everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.run.mkdir(parents=True, exist_ok=True)
    cases = {case.name: case for case in find_cases(args.data)}
    split = split_patients(list(cases))
    models = train(cases, split, args.run)
    some = next(iter(models.values()))
    answered = {part: answer(some, cases, split[part]) for part in ("alpha_chosen_on", "tested_on")}
    validation, test = (
        {a: evaluate(model, DecisionConfig(alpha=a), part) for a, model in models.items()}
        for part in answered.values()
    )
    alpha = choose_alpha(validation)
    check_predictor(models[alpha], answered["tested_on"], test[alpha]["cases"]["Med-DANet"])
    for other, result in validation.items():
        show(f"alpha {other}, the cases that choose it", result)
    for other, result in test.items():
        show(f"alpha {other}{' (chosen)' if other == alpha else ''}, tested cases", result)
    log = [json.loads(line) for line in (args.run / "log.jsonl").read_text().splitlines()]
    content = {
        "machine": machine(),
        "command": "python benchmarks/v1_hippocampus.py DATA RUN",
        "bank": BANK, "bank_phase": asdict(BANK_PHASE),
        "decision_phase": asdict(DECISION_PHASE), "alphas": ALPHAS, "chosen_alpha": alpha,
        "label_distribution": {a: m.metadata["label_distribution"] for a, m in models.items()},
        "training_log": log,
        "split": split, "validation": validation, "test": test,
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
