"""Peak memory of a folder run, case by case: is it flat, and how high?

    python benchmarks/memory.py CASES [--count 100] [--out benchmarks/results/NAME.json]

CASES is a folder of cases; they are taken in turn under new names until `--count` are done, in
one process and with the shipped weights, as `meddanet segment CASES -o OUT` does. Labels go to a
temporary folder. "peak_mb" is the largest resident set between the end of one case and the end of
the next (Linux: VmHWM, reset after every case), "resident_mb" what is resident then, "whole" how
many of the case's slices ran uncropped: the first one brings maps of its size.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

from meddanet.cases import ReadAhead
from meddanet.cohort import segment_cases
from meddanet.data import Case, find_cases
from meddanet.machine import machine
from meddanet.predictor import VolumePredictor
from meddanet.weights import load_model

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def read_memory() -> dict[str, float]:
    """Returns the resident set and its peak since `reset_peak`, in MB (10^6 bytes)."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return {
        name: round(int(lines[key].split()[0]) * 1.024e-3, 1)
        for name, key in (("peak_mb", "VmHWM"), ("resident_mb", "VmRSS"))
    }


def reset_peak() -> None:
    """Makes the peak start anew from what is resident."""
    CLEAR.write_text("5")


def renamed(cases: Iterable[Case], count: int) -> list[Case]:
    """Takes the cases in turn, each time under a name of its own."""
    turns = islice(cycle(cases), count)
    return [replace(case, name=f"{number:03d}_{case.name}") for number, case in enumerate(turns)]


def measure(cases: list[Case], predictor: VolumePredictor) -> Iterator[dict[str, float]]:
    """Segments the cases and yields the memory of each."""
    with tempfile.TemporaryDirectory() as folder:
        reset_peak()
        with ReadAhead(cases, Path(folder)) as readings:
            for _, outcome in segment_cases(readings, predictor, weights="brats2021"):
                if isinstance(outcome, Exception):
                    raise outcome
                yield {**read_memory(), "whole": outcome["decisions"]["whole"]}
                reset_peak()


def summary(rows: list[dict[str, float]]) -> dict[str, float]:
    """Returns the overall peak and by how much later cases exceed the first three."""
    peaks = [row["peak_mb"] for row in rows]
    return {
        "peak_mb": max(peaks),
        "peak_of_first_three_mb": max(peaks[:3]),
        "growth_after_third_mb": round(max(peaks) - max(peaks[:3]), 1),
    }


def main() -> None:
    """Measures, prints a line per ten cases and stores all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", type=Path)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not CLEAR.exists():
        sys.exit("memory.py reads /proc/self/status and clear_refs, which only Linux has")
    cases = renamed(find_cases(options.cases), options.count)
    predictor = VolumePredictor(load_model(), "cpu")
    began, rows = time.perf_counter(), []
    for number, row in enumerate(measure(cases, predictor), 1):
        rows.append(row)
        if number <= 5 or number % 10 == 0:
            print(f"{number:4} cases: peak {row['peak_mb']:.0f} MB, {row['resident_mb']:.0f} after",
                  flush=True)
        if options.out:
            # after every case: a run that is interrupted has its numbers, too
            options.out.write_text(json.dumps({
                "machine": machine(), "command": "python benchmarks/memory.py CASES",
                "executor": predictor.engine.executor, "cases": len(rows),
                "seconds": round(time.perf_counter() - began, 1), **summary(rows), "rows": rows,
            }) + "\n")
    print(json.dumps(summary(rows)))


if __name__ == "__main__":
    main()
