"""Trains a list of configurations, fold by fold, and writes their table (Med-DANet V2, Table 3).

    python benchmarks/ablations.py DATA OUT configs/ablations/policy-*.yaml
        [--base FILE] [--start NAME] [--folds 0,1] [--json FILE] [--table FILE]
        [--option NAME VALUE]...

Each configuration is a file for `meddanet train --config`; `--base` names one read before all of
them, `--start` a configuration that ran into the same OUT before: every run starts from its weights
of the same fold. A run lies in OUT/<configuration>/fold<k>; finished ones are not repeated, stopped
ones go on. Held-out cases are scored as they lie in the cache. Rows of one run of Med-DANet V2:

    static   the baseline trained beside: a plain segmenter, every slice whole, 32 bit
    S        skip / crop / whole as decided, 32 bit: the run before its quantised phase
    Q        the final weights, every slice whole, widths as chosen
    S+Q      the final weights, all decisions taken

Rows of Med-DANet (V1):

    M1 ...   one member of the bank on every slice
    decided  as the decision network decides
    skips    its skips, the last member everywhere else
    oracle   the route that Eq. 4 chooses, knowing the labels

Where slices are decided on, "confusion" counts them: rows the route that the labels call for (of V1
Eq. 4's), columns the one taken, and "activation" is the share of each route by tenths of a
volume's height (Med-DANet, Figs. 5-6), null where no volume has a slice.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accuracy import training_seconds
from tables import ablation
from torch import Tensor

from meddanet.activation import activation_ratio
from meddanet.arguments import parse_command, train_config
from meddanet.build import build_segmenter
from meddanet.checkpoint import checkpoint_files, load_checkpoint
from meddanet.cost import cost_tables
from meddanet.data.slices import CachedCase, pad
from meddanet.dataset import Dataset, prepare_dataset
from meddanet.layers import set_quantization
from meddanet.machine import machine
from meddanet.metrics import dice_score
from meddanet.objectives import oracle_route
from meddanet.objectives_v1 import DecisionObjective, decision_labels
from meddanet.recipe import TrainConfig
from meddanet.routing import channels_last
from meddanet.training import train
from meddanet.weights import load_model

_FULL = 32.0


class Routed(NamedTuple):
    """What became of slices: labels [N, H, W], routes [N], widths [N, S]."""

    labels: Tensor
    route: Tensor
    num_bits: Tensor


# slices [N, C, H, W] and their classes [N, H, W], which only the oracle looks at
Run = Callable[[Tensor, Tensor], Routed]


def rows_of(config: TrainConfig) -> list[str]:
    """Returns the rows of one run's table."""
    if not config.bank:
        return ["static", "S", "Q", "S+Q"]
    members = [f"M{number}" for number in range(1, len(config.bank) + 1)]
    return [*members, "decided", "skips", "oracle"]


def run_configs(
    options: argparse.Namespace, keep: Callable[[dict[str, Any]], None]
) -> list[str]:
    """Trains and scores everything, and keeps the results after every run.

    Args:
        options: Of the command line.
        keep: Takes configuration -> row -> fold -> scores.

    Returns:
        What failed, a line each.
    """
    results: dict[str, Any] = {}
    failed = []
    for file in options.configs:
        for fold in options.folds:
            try:
                scores = run_fold(read_config(file, options, fold))
            except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
                failed.append(f"{file.stem}, fold {fold}: {' '.join(str(error).split())}")
                print(failed[-1], file=sys.stderr)
                continue
            rows = results.setdefault(file.stem, {})
            for row, score in scores.items():
                rows.setdefault(row, {})[str(fold)] = score
            keep(results)
    return failed


def run_fold(config: TrainConfig) -> dict[str, Any]:
    """Trains one configuration on one fold; returns row -> scores, and the CPU time per phase."""
    train(config)
    data = prepare_dataset(config)
    scores: dict[str, Any] = {}
    for row in rows_of(config):
        run = (load_v1_row if config.bank else load_row)(config, data, row)
        if run is not None:
            scores[row] = score(run, data, config)
    return {**scores, "training CPU seconds": training_seconds(Path(config.out))}


def read_config(file: Path, options: argparse.Namespace, fold: int) -> TrainConfig:
    """Reads one configuration, its folders and its fold put in."""
    files = [str(path) for path in (options.base, file) if path]
    arguments = [part for path in files for part in ("--config", path)]
    for name, value in options.option:
        arguments += [f"--{name}", value]
    out = options.out / file.stem / f"fold{fold}"
    parsed = parse_command([
        "train", *arguments, "--data", str(options.data), "--out", str(out), "--fold", str(fold),
    ])
    config = train_config(parsed["train"])
    if options.start:
        first = options.out / options.start / f"fold{fold}" / "model.safetensors"
        config = replace(config, start=str(first))
    return replace(config, cache=config.cache or str(options.out / "cache"))


def load_row(config: TrainConfig, data: Dataset, row: str) -> tuple[Any, Run] | None:
    """Returns the model of a row and how it runs; None where the run has no such row."""
    out, objectives = Path(config.out), [phase.objective for phase in config.phases]
    files, baseline = checkpoint_files(out, objectives)
    if row == "static":
        if not baseline.exists():
            return None
        plain = build_segmenter(config.segmenter, len(data.modalities), data.num_classes)
        load_checkpoint(baseline, plain)
        return plain.eval(), lambda slices, labels: _whole(plain, slices)
    model: Any = load_model(out / "model.safetensors")
    if row == "S":
        if "quantised" not in objectives[1:]:
            return None
        load_checkpoint(files[objectives.index("quantised") - 1], model)
        set_quantization(model, quantize=False, update_range=False)
    if row == "Q":
        return model, lambda slices, labels: _whole(model, slices)

    def decided(slices: Tensor, labels: Tensor) -> Routed:
        result = model.segment(slices)
        full = torch.full(result.num_bits.shape, _FULL)
        return Routed(result.labels, result.decisions, full if row == "S" else result.num_bits)

    return model, decided


def load_v1_row(config: TrainConfig, data: Dataset, row: str) -> tuple[Any, Run]:
    """Returns Med-DANet and how a row routes its slices."""
    model: Any = load_model(Path(config.out) / "model.safetensors")
    last = len(model.bank)

    def run(slices: Tensor, labels: Tensor) -> Routed:
        if row == "oracle":
            route = wanted_routes(model, slices, labels, config)
        elif row in ("decided", "skips"):
            route = model.segment(slices).decisions
            route = torch.where(route > 0, last, 0) if row == "skips" else route
        else:
            route = torch.full((len(slices),), int(row[1:]))
        found = torch.zeros(len(slices), *slices.shape[2:], dtype=torch.long)
        for number in route.unique().tolist():
            if number:
                found[route == number] = model.bank[number - 1](slices[route == number]).argmax(1)
        return Routed(found, route, torch.zeros(len(slices), 0))

    return model, run


def wanted_routes(model: Any, slices: Tensor, labels: Tensor, config: TrainConfig) -> Tensor:
    """Returns the route [N] that the labels call for."""
    if not config.bank:
        return oracle_route(labels, model.crop_sizes, config.margin)
    objective = DecisionObjective(model, config.decision)
    macs = objective.member_macs(model, tuple(slices.shape[1:]))
    return decision_labels(model, slices, labels, macs, config.decision)


def _whole(model: Any, slices: Tensor) -> Routed:
    """Segments every slice whole, with a plain segmenter or a dynamic model's whole branch."""
    if hasattr(model, "routes"):
        logits, num_bits = model.whole_branch(slices)
        route = torch.full((len(slices),), len(model.routes) - 1)
        return Routed(logits.argmax(1), route, num_bits)
    route = torch.zeros(len(slices), dtype=torch.long)
    return Routed(model(slices).argmax(1), route, torch.full((len(slices), 4), _FULL))


@torch.inference_mode()
def score(run: tuple[Any, Run], data: Dataset, config: TrainConfig) -> dict[str, Any]:
    """Returns Dice by region and case, and the mean cost of a slice in millions.

    Costs: "scaled_paper" as the papers count, stages scaled by b / 32; "mac" true multiply-adds,
    whatever the width. Deciding networks count, also in row Q, where nothing asks them; a slice
    without signal costs nothing where slices are decided on.
    """
    model, segment = run
    regions = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}
    if data.facts["label_convention"] == "values":
        regions = {f"class {k}": (k,) for k in range(1, data.num_classes)}
    canvas = data.canvas(8, getattr(model, "smallest_side", 8))
    shape = (1, len(data.modalities), *canvas)
    tables = cost_tables(model, shape)
    true, paper = tables["mac"], tables["paper"]
    dice, costs, macs, routes, wanted = {}, [], [], [], []
    for case in data.held_out:
        slices, truth = case_slices(case, canvas)
        parts = [segment(*part) for part in zip(slices.split(16), truth.split(16), strict=True)]
        routed = Routed(*(torch.cat(part) for part in zip(*parts, strict=True)))
        labels = routed.labels.numpy()[:, : case.labels.shape[1], : case.labels.shape[2]]
        dice[case.name] = dice_score(labels, np.asarray(case.labels), labels=regions)
        looked_at = torch.ones(len(labels), dtype=torch.bool)
        if len(true.routes) > 1:
            # nothing decides on a slice without signal
            looked_at = (routed.route > 0) | torch.from_numpy(
                np.isin(np.arange(len(labels)), case.brain)
            )
        costs.append(paper.slice_cost(routed.route, routed.num_bits.float()) * looked_at)
        macs.append(true.slice_macs(routed.route) * looked_at)
        routes.append(routed.route)
        if hasattr(model, "routes"):
            wanted.append(wanted_routes(model, slices, truth, config))
    counts = torch.bincount(torch.cat(routes), minlength=len(true.routes)).tolist()
    confusion = torch.zeros(len(true.routes), len(true.routes), dtype=torch.long)
    if wanted:
        pair = (torch.cat(wanted), torch.cat(routes))
        confusion.index_put_(pair, torch.ones_like(pair[0]), accumulate=True)
    shares = activation_ratio([route.numpy() for route in routes], true.routes).by_position
    activation = [row.round(3).tolist() if np.isfinite(row).all() else None for row in shares]
    return {
        "confusion": confusion.tolist(),
        **({"activation": activation} if sum(map(bool, counts)) > 1 else {}),
        "dice": dice,
        "slice_mega": {
            "scaled_paper": round(torch.cat(costs).double().mean().item() / 1e6, 3),
            "mac": round(torch.cat(macs).mean().item() / 1e6, 3),
        },
        "routes": dict(zip(true.routes, counts, strict=True)),
    }


def case_slices(case: CachedCase, canvas: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Returns all slices of a case, [D, C, H, W], and classes [D, H, W], padded as in training."""
    padded = pad(case.images, canvas).astype(np.float32)
    labels = torch.from_numpy(pad(case.labels, canvas).astype(np.int64))
    return channels_last(torch.from_numpy(padded)), labels


def main() -> None:
    """Runs the list, prints the table and stores it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("configs", type=Path, nargs="+")
    parser.add_argument("--base", type=Path, help="configuration read before each of the list")
    parser.add_argument("--start", help="configuration in OUT whose weights the runs start from")
    parser.add_argument("--folds", type=lambda text: [int(k) for k in text.split(",")], default=[0])
    parser.add_argument("--option", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    for path in (options.json, options.table):
        if path and not path.parent.is_dir():
            parser.error(f"{path.parent}: is no folder")

    def keep(results: dict[str, Any]) -> None:
        if options.table:
            options.table.write_text(ablation(results) + "\n")
        if options.json:
            content = {"machine": machine(), "results": results}
            options.json.write_text(json.dumps(content, indent=1) + "\n")
        print(ablation(results), flush=True)

    failed = run_configs(options, keep)
    if failed:
        sys.exit(f"{len(failed)} runs failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
