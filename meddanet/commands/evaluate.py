"""`meddanet evaluate`: scores of label files against references."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from ..data.storage import write_json
from ..evaluation import (
    check_groups,
    compare,
    counted_scores,
    json_ready,
    listed,
    mean_scores,
    parse_groups,
    write_csv,
)
from ..messages import complain, say
from ..metrics import check_tolerance
from ..pairs import find_pairs, unpaired
from ..version import __version__
from .options import check_targets


def run(options: Namespace) -> int:
    """Scores every pair and says the mean; writes tables where they are asked for."""
    # what is wrong with the arguments is said before all cases are read
    check_tolerance(options.tolerance)
    groups = parse_groups(options.groups) if options.groups else None
    pairs = find_pairs(options.predictions, options.references)
    check_targets(options, [path for pair in pairs for path in (pair.prediction, pair.reference)])
    if groups:
        check_groups(groups, pairs)
    alone = unpaired(pairs, options.predictions, options.references)
    _report_unpaired(alone, options.predictions)
    table = _score_all(pairs, groups, options)
    if not table:
        return 1
    failed = [pair.name for pair in pairs if pair.name not in table]
    missing = sorted([*alone["without_prediction"], *failed])
    total = len(table) + len(missing)
    mean, counted = mean_scores(table), counted_scores(table)
    fewer = [f"{region} of {n}" for region, n in counted["dice"].items() if n < len(table)]
    note = f"  ({', '.join(fewer)})" if fewer else ""
    say(f"mean of {len(table)} of {total} cases  {score_line(mean)}{note}")
    written = True
    if options.json:
        content = {
            "mean": json_ready(mean), "counted": counted, "scored": len(table), "expected": total,
            "empty_rule": options.empty, "tolerance_mm": options.tolerance,
            "labels": options.labels, "prediction_labels": options.prediction_labels,
            "groups": groups, "predictions": options.predictions,
            "references": options.references, "meddanet": __version__, **alone,
            "failed": failed, "cases": json_ready(table),
        }
        written &= _tried(write_json, content, Path(options.json))
    if options.csv:
        written &= _tried(write_csv, table, Path(options.csv), missing)
    return 1 if missing or not written else 0


def _tried(write: Callable[..., None], *arguments: Any) -> bool:
    """Writes a file and tells whether that went well; what is written after it is not lost."""
    try:
        write(*arguments)
    except (ValueError, OSError) as error:
        complain(error)
        return False
    return True


def _report_unpaired(alone: dict[str, list[str]], predictions: str) -> None:
    if names := alone["without_reference"]:
        say(f"{len(names)} without reference: {listed(names)}", sys.stderr)
    if names := alone["without_prediction"]:
        complain(
            f"{predictions}: holds no prediction of {listed(names)}; "
            "segment these too, the mean is over the others"
        )


def _score_all(pairs: list[Any], groups: Any, options: Namespace) -> dict[str, Any]:
    """Prints and returns the scores of the pairs; what is wrong with one does not stop others."""
    table = {}
    for pair in pairs:
        try:
            table[pair.name] = compare(
                pair, options.labels, predicted=options.prediction_labels, groups=groups,
                tolerance=options.tolerance, empty=options.empty,
            )
            say(f"{pair.name}  {score_line(table[pair.name])}")
        except (ValueError, OSError, MemoryError) as error:
            complain(error)
    return table


def score_line(scores: dict[str, dict[str, float]]) -> str:
    """The scores of a case, or their means, in a line."""
    parts = ["Dice", *(f"{region} {value:.4f}" for region, value in scores["dice"].items())]
    if "hd95_mm" in scores:
        parts += [" HD95", *(f"{r} {value:.2f}" for r, value in scores["hd95_mm"].items()), "mm"]
        agreement = scores["surface_dice"].items()
        parts += [" surface", *(f"{region} {value:.4f}" for region, value in agreement)]
    volumes = zip(scores["volume_ml"].items(), scores["reference_ml"].values(), strict=True)
    parts += [" ml", *(f"{region} {value:.1f}/{truth:.1f}" for (region, value), truth in volumes)]
    return " ".join(parts)
