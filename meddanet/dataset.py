"""From a folder of labelled cases to cached slices with classes, and what the weights must know."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .data import (
    MODALITIES,
    Case,
    VolumeError,
    canonical,
    detect_label_convention,
    find_cases,
    load_labels,
    load_volume,
    normalize,
    to_classes,
    to_slices,
)
from .data.lock import hold
from .data.phantom import make_phantom
from .data.slices import CachedCase, folds, is_cached, read_cache, write_cache
from .data.storage import read_record, write_bytes
from .distributed import first_alone, rank
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


def prepare_dataset(config: TrainConfig) -> Dataset:
    """Caches every labelled case that is not cached yet, and splits them.

    Raises:
        VolumeError: If a case is bad, or the cases do not belong together.
        ValueError: If the cache was made with other settings, or the fold does not fit.
    """
    cache = Path(config.cache or Path(config.out) / "cache")
    found = {case.name: case for case in find_cases(config.data) if case.label is not None}
    if not found:
        raise VolumeError(f"{config.data}: no case has a label file; expected labelled cases")
    training, held_out = folds(list(found), config.folds, config.fold, config.patient)
    if config.label_map is not None:
        _check_map(config.label_map)
    with first_alone() as first:
        if first:
            _fill_cache(found, config, cache)
    if not (cache / "cases.json").exists():
        raise VolumeError(
            f"{cache}: is empty for process {rank()}, filled by process 0; out and cache have to "
            "lie on a disk that all machines share"
        )
    table = _read_table(cache / "cases.json")["cases"]
    facts = {name: table[name] for name in found}
    modalities = tuple(_common(facts, "modalities"))
    gliomas = _common(facts, "gliomas")
    phantoms = []
    if gliomas and modalities == MODALITIES:
        phantoms = [f"phantom-{_FIRST_PHANTOM + index}" for index in range(config.phantoms)]
        with first_alone() as first:
            if first:
                _cache_phantoms(phantoms, cache)
    num_classes = 4 if gliomas else 1 + _count_classes(config, facts)
    spacing = np.median([fact["spacing_mm"] for fact in facts.values()], axis=0)
    parts = [[read_cache(n, cache) for n in part] for part in (training, held_out, phantoms)]
    return Dataset(
        parts[0], parts[1], parts[2], modalities, num_classes,
        {**_label_facts(config, gliomas, num_classes), **_normalisation(config),
         "spacing_mm": spacing.round(4).tolist()},
    )


def _check_map(label_map: dict[int, int]) -> None:
    """Raises ValueError unless a map's classes are 1..K."""
    if not all(0 <= number <= 255 for pair in label_map.items() for number in pair):
        raise ValueError(f"label_map is {label_map}, expected values and classes from 0 to 255")
    classes = set(label_map.values()) - {0}
    if not classes or max(classes) > len(classes):
        raise ValueError(
            f"label_map is {label_map}, whose classes are {_listed(classes)}; "
            f"expected {_listed(range(1, len(classes) + 1)) if classes else '1 and so on'}"
        )


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
        values[k] = value
    return {"label_convention": "values", "label_values": values}


def _normalisation(config: TrainConfig) -> dict[str, object]:
    if config.window_hu is None:
        return {}
    return {"normalisation": "hounsfield window", "window_hu": list(config.window_hu)}


@contextmanager
def _table(cache: Path, config: TrainConfig) -> Iterator[dict[str, dict]]:
    """Opens the cache's table of cases; keeps what was added, also where a later case is bad."""
    settings = {
        name: getattr(config, name) for name in ("modalities", "label_map", "window_hu")
    }
    settings = json.loads(json.dumps(settings))
    path = cache / "cases.json"
    content = _read_table(path) if path.exists() else {"cases": {}}
    # a table without cases binds nobody
    content = content if content["cases"] else {"settings": settings, "cases": {}}
    for name, value in settings.items():
        if content["settings"][name] != value:
            raise ValueError(
                f"{cache}: was made with {name} {content['settings'][name]}, not {value}; "
                "delete it or name another cache"
            )
    try:
        yield content["cases"]
    finally:
        write_bytes(path, json.dumps(content).encode())


def _read_table(path: Path) -> dict[str, Any]:
    cure = "delete it to have the cache filled again"
    content = read_record(path, cure)
    if not content.keys() >= {"settings", "cases"}:
        raise VolumeError(f"{path}: is no table of a cache; {cure}")
    return content


def _hold(cache: Path) -> AbstractContextManager[object]:
    """Keeps other runs from filling the cache, or waits until they have filled it."""
    lock = cache / "cache.lock"
    try:
        return hold(lock)
    except BlockingIOError:
        warnings.warn(f"{cache}: another run is filling it; waiting for its end", stacklevel=2)
        return hold(lock, wait=True)


def _fill_cache(cases: dict[str, Case], config: TrainConfig, cache: Path) -> None:
    """Caches what is not cached yet, or whose files are others than then."""
    with _hold(cache), _table(cache, config) as table:
        for name, case in tqdm(cases.items(), desc="cache", disable=None):
            files = _fingerprint(case)
            row = table.get(name, {})
            # rows without values are from before single modalities were told from gliomas
            if row.get("files") != files or "values" not in row or not is_cached(name, cache):
                table[name] = {**_cache_case(case, config, cache), "files": files}


def _fingerprint(case: Case) -> list[list[Any]]:
    """Returns name, size and time of change of a case's files."""
    files = [case.files] if isinstance(case.files, Path) else list(case.files.values())
    return [
        [path.name, path.stat().st_size, path.stat().st_mtime_ns]
        for path in (*files, case.label) if path is not None
    ]


def _cache_case(case: Case, config: TrainConfig, cache: Path) -> dict[str, object]:
    """Caches one case and returns its row of the table."""
    volume = load_volume(case, config.modalities)
    labels = load_labels(str(case.label), like=volume)
    values = np.unique(labels)
    # one T1 or T2 may be of anything
    gliomas = config.label_map is None and set(volume.modalities) == set(MODALITIES)
    if gliomas:
        classes = to_classes(labels, detect_label_convention(volume, values))
    else:
        classes = _by_value(labels, config.label_map, case)
    images = to_slices(volume, window_hu=config.window_hu)
    if not np.isfinite(images).all():
        raise VolumeError(f"{case.name}: holds values that are not finite; expected numbers")
    if not images.any():
        raise VolumeError(f"{case.name}: holds no signal after normalisation; check window_hu")
    classes = canonical(classes, volume.affine).transpose(2, 0, 1)
    write_cache(case.name, images, classes, cache)
    return {
        "modalities": volume.modalities, "gliomas": gliomas,
        "values": values[values > 0].tolist(), "spacing_mm": volume.spacing,
    }


def _by_value(labels: np.ndarray, label_map: dict[int, int] | None, case: Case) -> np.ndarray:
    """Translates label values by a map, values outside it to background; None keeps them."""
    if labels.dtype != np.uint8:
        raise VolumeError(f"{case.label}: values reach {labels.max()}, expected at most 255")
    if label_map is None:
        return labels
    lookup = np.zeros(256, np.uint8)
    for value, k in label_map.items():
        lookup[value] = k
    return lookup[labels]


def _cache_phantoms(names: list[str], cache: Path) -> None:
    missing = [name for name in names if not is_cached(name, cache)]
    with _hold(cache) if missing else nullcontext():
        for name in missing:
            phantom = make_phantom(int(name.removeprefix("phantom-")))
            images = normalize(np.round(phantom.data).clip(0)).transpose(3, 0, 1, 2)
            write_cache(name, images, phantom.labels.transpose(2, 0, 1), cache)


def _common(facts: dict[str, dict], key: str) -> Any:
    """Returns what all cases agree in."""
    (first, fact), *others = facts.items()
    for name, other in others:
        if other[key] != fact[key]:
            raise VolumeError(
                f"{name}: {key} is {other[key]}, but {fact[key]} in {first}; expected one of them"
            )
    return fact[key]
