"""Puts the logs of training runs into one small file, which the plots are made of.

    python benchmarks/curves.py RUN [RUN ...] [--out benchmarks/results/curves.json]

RUN is the output folder of `meddanet train`, one per fold or recipe: `log.jsonl` (loss of the
steps) and, where the run looked at held-out slices, `validation.jsonl` (Dice by class).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads a file of JSON lines; a last line that a killed process left half is dropped."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def curves(run: Path) -> dict[str, dict[str, list]]:
    """Returns phase -> "step", "loss", "cpu_seconds" and, where looked at, "dice".

    "dice" holds (step, mean over the classes that occur).

    Raises:
        ValueError: If the folder has no log.
    """
    phases: dict[str, dict[str, list]] = {}
    for line in read_lines(run / "log.jsonl"):
        phase = phases.setdefault(line["phase"], {"step": [], "loss": [], "cpu_seconds": []})
        for name, values in phase.items():
            values.append(line[name])
    if not phases:
        raise ValueError(f"{run}: has no log.jsonl with steps; expected the folder of a run")
    for line in read_lines(run / "validation.jsonl"):
        known = [value for value in line["dice"].values() if value is not None]
        if known and line["phase"] in phases:
            point = line["step"], round(sum(known) / len(known), 4)
            phases[line["phase"]].setdefault("dice", []).append(point)
    return phases


def main() -> None:
    """Reads the runs and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=RESULTS / "curves.json")
    options = parser.parse_args()
    try:
        found = {run.resolve().name: curves(run) for run in options.runs}
    except ValueError as error:
        parser.error(str(error))
    if len(found) < len(options.runs):
        parser.error("two runs have folders of one name; expected different ones")
    lines = [f" {json.dumps(name)}: {json.dumps(phases)}" for name, phases in found.items()]
    options.out.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
