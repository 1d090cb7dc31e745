"""From a folder of labelled cases to cached slices with classes, and what the weights must know."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .cache import cache_phantoms, fill_cache, read_table
from .data import MODALITIES, VolumeError
from .data.conventions import LABELLED
from .data.slices import CachedCase, folds, read_cache
from .data.survey import Survey, some, survey
from .distributed import first_alone, rank
from .frame import STEP, middle_of
from .recipe import TrainConfig

_FIRST_PHANTOM = 1000


@dataclass(frozen=True)
class Dataset:
    """Cached cases, split by patient.

    Attributes:
        training: Cases to train on.
        held_out: The fold that is held out.
        phantoms: Synthetic gliomas to mix in, if the cases are gliomas.
        modalities: Channels, in order.
        num_classes: Classes, background included.
        facts: What `save_model` shall note: label convention or values, normalisation, spacing.
    """

    training: list[CachedCase]
    held_out: list[CachedCase]
    phantoms: list[CachedCase]
    modalities: tuple[str, ...]
    num_classes: int
    facts: dict[str, object]

    @property
    def split(self) -> dict[str, list[str]]:
        """The names of both parts."""
        return {
            "trained_on": [case.name for case in self.training],
            "held_out": [case.name for case in self.held_out],
        }

    def canvas(self, stride: int, smallest: int) -> tuple[int, int]:
        """Returns the height and width, multiples of `stride`, that all slices fit into."""
        cases = (*self.training, *self.held_out, *self.phantoms)
        height, width = (
            -(-max(smallest, *(case.labels.shape[axis] for case in cases)) // stride) * stride
            for axis in (1, 2)
        )
        return height, width

    def placement(self) -> dict[str, tuple[float, float]]:
        """Returns "canvas", the size of the training slices, and "centre", their mean `middle_of`.

        Empty where sizes differ, so that the body lies in other places of what is padded.
        """
        sizes = {case.labels.shape[1:] for case in self.training}
        if len(sizes) > 1:
            return {}
        few = (torch.from_numpy(np.array(case.images[::STEP, :1])) for case in self.training)
        known = [middle for slices in few if (middle := middle_of(slices)) is not None]
        if not known:
            return {}
        y, x = np.mean(known, axis=0).round(1).tolist()
        return {"canvas": sizes.pop(), "centre": (y, x)}


def prepare_dataset(config: TrainConfig) -> Dataset:
    """Caches every labelled case that is not cached yet, and splits them.

    Raises:
        VolumeError: If a case is bad, or the cases do not belong together.
        ValueError: If the cache was made with other settings, or the fold does not fit.
        ConnectionError: If the first process, which fills the cache, fails.
    """
    cache = Path(config.cache or Path(config.out) / "cache")
    there = survey(config.data)
    found = {case.name: case for case in there.cases if case.label is not None}
    if not found:
        raise VolumeError(
            f"{config.data}: no case has a label file, named {LABELLED}; there are "
            f"{_left_out(there, Path(config.data))}"
        )
    training, held_out = folds(list(found), config.folds, config.fold, config.patient)
    if config.label_map is not None:
        _check_map(config.label_map)
    with first_alone() as first:
        if first:
            if left_out := _left_out(there, Path(config.data)):
                warnings.warn(
                    f"{config.data}: {len(found)} labelled cases, {len(training)} to train on and "
                    f"{len(held_out)} held out; left out are {left_out}", stacklevel=2,
                )
            fill_cache(found, config, cache, partial(_agreed, config))
    facts = _facts(found, cache)
    modalities, gliomas, num_classes = _agreed(config, facts)
    phantoms = []
    if gliomas and modalities == MODALITIES:
        phantoms = [f"phantom-{_FIRST_PHANTOM + index}" for index in range(config.phantoms)]
        with first_alone() as first:
            if first:
                cache_phantoms(phantoms, cache)
    spacing = np.median([fact["spacing_mm"] for fact in facts.values()], axis=0)
    parts = [[read_cache(n, cache) for n in part] for part in (training, held_out, phantoms)]
    return Dataset(
        parts[0], parts[1], parts[2], modalities, num_classes,
        {**_label_facts(config, gliomas, num_classes), **_normalisation(config),
         "spacing_mm": spacing.round(4).tolist()},
    )


def _left_out(there: Survey, root: Path) -> str:
    """Says what of a folder is in no split, and why; empty if everything is in one."""
    groups = {
        "cases without labels": [case.name for case in there.cases if case.label is None],
        **there.unused(root),
    }
    return ", ".join(f"{why} ({some(names)})" for why, names in groups.items() if names)


def _facts(names: Iterable[str], cache: Path) -> dict[str, dict]:
    """Returns the rows of cases that the first process has cached.

    Raises:
        VolumeError: If this process does not see them.
    """
    file = cache / "cases.json"
    table = read_table(file)["cases"] if file.exists() else {}
    if not table.keys() >= set(names):
        raise VolumeError(
            f"{cache}: lacks cases for process {rank()} that process 0 has cached; out and cache "
            "have to lie on a disk that all machines share"
        )
    return {name: table[name] for name in names}


def _check_map(label_map: dict[int, int]) -> None:
    """Raises ValueError unless a map's classes are 1..K."""
    if not all(0 <= number <= 255 for pair in label_map.items() for number in pair):
        raise ValueError(f"label_map is {label_map}, expected values and classes from 0 to 255")
    if label_map.get(0):
        raise ValueError(f"label_map is {label_map}, but value 0 is background; leave it out")
    classes = set(label_map.values()) - {0}
    if not classes or max(classes) > len(classes):
        raise ValueError(
            f"label_map is {label_map}, whose classes are {_listed(classes)}; "
            f"expected {_listed(range(1, len(classes) + 1)) if classes else '1 and so on'}"
        )


def _agreed(config: TrainConfig, facts: dict[str, dict]) -> tuple[tuple[str, ...], bool, int]:
    """Returns what all cases have: modalities, whether they are gliomas, and how many classes.

    Raises:
        VolumeError: If they do not belong together, or a class is missing.
    """
    modalities, gliomas = tuple(_common(facts, "modalities")), _common(facts, "gliomas")
    return modalities, gliomas, 4 if gliomas else 1 + _count_classes(config, facts)


def _count_classes(config: TrainConfig, facts: dict[str, dict]) -> int:
    """Returns K where the classes of all label files are 1..K.

    Raises:
        VolumeError: If a class has no voxel anywhere; the values that there are are named.
    """
    holders = {value: name for name, fact in facts.items() for value in fact["values"]}
    if not holders:
        raise VolumeError(f"{config.data}: no case has a labelled voxel; expected labels above 0")
    there = f"{config.data}: the labels hold {_listed(holders)}"
    if config.label_map is None:
        highest = max(holders)
        if highest > len(holders):
            example = {value: k for k, value in enumerate(sorted(holders), 1)}
            raise VolumeError(
                f"{there} ({highest} in {holders[highest]}), expected 1, 2 and so on without gap; "
                f"correct the files, or name the classes: --label_map '{example}', where what is "
                "left out becomes background"
            )
        return highest
    classes = set(config.label_map.values()) - {0}
    if empty := classes - {config.label_map.get(value) for value in holders}:
        raise VolumeError(
            f"{there}, none that label_map {config.label_map} turns into class {_listed(empty)}; "
            "expected a value for each class"
        )
    return len(classes)


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(numbers))) or "none"


def _label_facts(config: TrainConfig, gliomas: bool, num_classes: int) -> dict[str, object]:
    if gliomas:
        return {"label_convention": "brats2021"}
    # of values that share a class, the first stands for it
    values = {k: k for k in range(1, num_classes)}
    for value, k in reversed((config.label_map or {}).items()):
        if k:  # what becomes background is no label
            values[k] = value
    return {"label_convention": "values", "label_values": values}


def _normalisation(config: TrainConfig) -> dict[str, object]:
    if config.window_hu is None:
        return {}
    return {"normalisation": "hounsfield window", "window_hu": list(config.window_hu)}


def _common(facts: dict[str, dict], key: str) -> Any:
    """Returns what all cases agree in."""
    (first, fact), *others = facts.items()
    for name, other in others:
        if other[key] != fact[key]:
            raise VolumeError(
                f"{name}: {key} is {other[key]}, but {fact[key]} in {first}; expected one of them"
            )
    return fact[key]
