"""The committed results, `results/*.json`, and what all of their tables are written with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

Content = dict[str, Any]
Cases = dict[str, Content]


class Results:
    """The committed numbers.

    Args:
        folder: Holds the JSON files.
        capability: Of the CPUs whose suite is meant, as files are named after it.
    """

    def __init__(self, folder: Path, capability: str = "avx512") -> None:
        self.folder, self.capability = folder, capability

    def read(self, name: str) -> Content:
        """Returns one file's content; the name without its ending."""
        return json.loads((self.folder / f"{name}.json").read_text())

    def named(self, pattern: str) -> dict[str, Content]:
        """Returns the content of all files whose names, without their ending, fit a pattern."""
        names = sorted(path.stem for path in self.folder.glob(f"{pattern}.json"))
        return {name: self.read(name) for name in names}

    @cached_property
    def speed(self) -> Content:
        """The CPU suite's numbers: the file of the machine that was measured last; may be none."""
        return max(self.named(f"cpu_*_{self.capability}_*").values(), key=measured, default={})

    @property
    def speed_machine(self) -> str:
        """Processor and threads of the CPU suite."""
        facts = self.networks[0]["machine"]
        return f"{facts['processor']}, {facts['threads']} threads"

    @cached_property
    def networks(self) -> list[Content]:
        """The network level, case by case, the one with all peers first."""
        found = [part for level, part in self.speed.items() if level.startswith("network ")]
        return sorted(found, key=lambda part: (-len(part["times"]), part["case"]))

    @cached_property
    def accuracy(self) -> Cases:
        """Scores and decisions of the shipped weights by held-out case."""
        return dict(sorted(self.read("brats2021")["cases"].items()))

    @cached_property
    def folds(self) -> Cases:
        """The same of the recipe, each fold's weights on the cases it held out."""
        return dict(sorted(self.read("brats2021_folds")["cases"].items()))

    @cached_property
    def predictions(self) -> dict[str, Content]:
        """What `predict.py` says of every card: computed, so never older than the results."""
        from predict import predictions

        return predictions(self.accuracy, self.read("kernels_compiled")["variants"])

    def ablations(self) -> dict[str, Content]:
        """The files that `ablations.py` wrote, by name."""
        return {name: found for name, found in self.named("*").items() if "results" in found}


def measured(levels: Content) -> str:
    """When the newest level of a CPU file was measured; one that does not say is the oldest."""
    return max(level.get("environment", {}).get("date", "") for level in levels.values())


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns a table; cells as they are."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def short(case: str) -> str:
    """BraTS2021_00024 -> 00024."""
    return case.rpartition("_")[2]


def routes(decisions: Sequence[int]) -> str:
    """What became of the slices, skip first."""
    skip, *crops, whole = decisions
    return f"{skip} skip, {sum(crops)} crop, {whole} whole"


def mean(values: Iterable[float]) -> float:
    """The mean of at least one value, rounded once: Pythons differ in how they add."""
    return fmean(values)
