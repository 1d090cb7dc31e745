"""Fills the cache of a training run: one row of a table and three files per case."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
    has_hounsfield_values,
    lacks_hounsfield_values,
    load_labels,
    load_volume,
    normalize,
    to_classes,
    to_slices,
)
from .data.lock import hold
from .data.phantom import make_phantom
from .data.slices import is_cached, write_cache
from .data.storage import read_errors, read_record, write_bytes
from .doubts import no_hounsfield_values
from .recipe import TrainConfig

# what all rows of a table were made with, and what each of them holds
_SETTINGS = ("modalities", "label_map", "window_hu")
_ROW = {"modalities", "gliomas", "values", "spacing_mm"}


@contextmanager
def _table(cache: Path, config: TrainConfig) -> Iterator[dict[str, Any]]:
    """Opens the cache's table; keeps what was added, also where a later case is bad."""
    settings = json.loads(json.dumps({name: getattr(config, name) for name in _SETTINGS}))
    path = cache / "cases.json"
    content = read_table(path) if path.exists() else {}
    # what no run has accepted binds nobody; older tables do not say
    accepted = content.get("accepted", bool(content.get("cases")))
    if not accepted and content.get("settings") != settings:
        content = {"settings": settings, "cases": {}, "accepted": False}
    for name, value in settings.items():
        if content["settings"][name] != value:
            raise ValueError(
                f"{cache}: was made with {name} {content['settings'][name]}, not {value}; "
                "delete it or name another cache"
            )
    try:
        yield content
    finally:
        write_bytes(path, json.dumps(content).encode())


def read_table(path: Path) -> dict[str, Any]:
    """Reads `<cache>/cases.json`: the settings it was filled with, and a row per case.

    Raises:
        VolumeError: If it is damaged.
    """
    cure = "delete it to have the cache filled again"
    content = read_record(path, cure)
    settings, cases = (content.get(name) for name in ("settings", "cases"))
    whole = isinstance(settings, dict) and settings.keys() >= set(_SETTINGS)
    rows = cases.values() if isinstance(cases, dict) else [None]
    if not whole or not all(isinstance(row, dict) for row in rows):
        raise VolumeError(f"{path}: is damaged (no whole table of a cache); {cure}")
    return content


def _hold(cache: Path) -> AbstractContextManager[object]:
    """Keeps other runs from filling the cache, or waits until they have filled it."""
    lock = cache / "cache.lock"
    try:
        return hold(lock)
    except BlockingIOError:
        warnings.warn(f"{cache}: another run is filling it; waiting for its end", stacklevel=2)
        return hold(lock, wait=True)


def fill_cache(
    cases: dict[str, Case], config: TrainConfig, cache: Path,
    accept: Callable[[dict[str, dict]], object],
) -> None:
    """Caches what is not cached yet, or whose files are others than then.

    Args:
        cases: By name.
        config: Its settings bind the cache once the cases are accepted.
        cache: Folder.
        accept: Takes the cases' rows of the table and raises where they cannot be trained on.

    Raises:
        VolumeError: If a case is bad, or the table damaged.
        ValueError: If the cache was made with other settings.
    """
    with _hold(cache), _table(cache, config) as content:
        table, changed = content["cases"], list[str]()
        for name, case in tqdm(cases.items(), desc="cache", disable=None):
            files = _fingerprint(case)
            row, there = table.get(name, {}), is_cached(name, cache)
            if there and row.get("files", files) != files:
                changed.append(name)
            # rows without values are from before single modalities were told from gliomas
            if not there or row.get("files") != files or not row.keys() >= _ROW:
                table[name] = {**_cache_case(case, config, cache), "files": files}
        if changed:
            warnings.warn(
                f"{cache}: {len(changed)} cases, such as {changed[0]}, had files of another size "
                "or time of change when they were cached and are cached anew; runs that have "
                "begun on this cache go on with the new ones", stacklevel=2,
            )
        accept({name: table[name] for name in cases})
        content["accepted"] = True


def _fingerprint(case: Case) -> list[list[Any]]:
    """Returns name, size and time of change of a case's files.

    Raises:
        VolumeError: If one is not there, as where a link leads nowhere.
    """
    rows: list[list[Any]] = []
    for path in (*case.paths, case.label):
        if path is not None:
            with read_errors(path):
                rows.append([path.name, path.stat().st_size, path.stat().st_mtime_ns])
    return rows


def _cache_case(case: Case, config: TrainConfig, cache: Path) -> dict[str, object]:
    """Caches one case and returns its row of the table, as it will be read."""
    volume = load_volume(case, config.modalities)
    if config.window_hu is None and has_hounsfield_values(volume):
        raise VolumeError(
            f"{case.name}: is a CT with negative values, which without a window count as background"
            "; name the Hounsfield values that become 0 and 1, such as --window_hu '[-160, 240]'"
        )
    if config.window_hu is not None and lacks_hounsfield_values(volume, config.window_hu):
        warnings.warn(f"{case.name}: {no_hounsfield_values(volume)}", stacklevel=2)
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
        "modalities": list(volume.modalities), "gliomas": gliomas,
        "values": values[values > 0].tolist(), "spacing_mm": list(volume.spacing),
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


def cache_phantoms(names: list[str], cache: Path) -> None:
    """Caches the phantoms, named `phantom-<seed>`, that are not cached yet."""
    missing = [name for name in names if not is_cached(name, cache)]
    with _hold(cache) if missing else nullcontext():
        for name in missing:
            phantom = make_phantom(int(name.removeprefix("phantom-")))
            images = normalize(phantom.data).transpose(3, 0, 1, 2)
            write_cache(name, images, phantom.labels.transpose(2, 0, 1), cache)
