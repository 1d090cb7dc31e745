"""What a run's folder says of it: whose it is now, and that it goes on as what it was."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .checkpoint import checkpoint_files, read_progress
from .data.lock import hold
from .data.storage import read_record, write_bytes
from .distributed import first_alone
from .recipe import TrainConfig

# what may differ between two calls of one run; the split is compared by names, not by its folder
_FREE = {
    "data", "out", "cache", "device", "threads", "compile", "deterministic", "checkpoint_minutes",
    "checkpoint_steps", "validate_every", "validation_slices", "tensorboard", "baseline",
}
# of a phase that is not finished, what acts from the next step on
_PACE = ("learning_rate", "selector_rate", "schedule_before", "schedule_after", "decay", "warm_up")
# what a run writes beside its configuration and its checkpoints
_RESULTS = ("model.safetensors", "log.jsonl", "validation.jsonl")


def hold_run(out: Path) -> AbstractContextManager[object]:
    """Keeps other runs out of a run's folder, which is made, while the context lasts.

    Only the first process of a run holds it. Where the file system has no locks, nothing does.

    Raises:
        ValueError: If another run is in it.
        ConnectionError: If so, in the other processes.
    """
    with first_alone() as first:
        if not first:
            return nullcontext()
        try:
            return hold(out / "run.lock")
        except BlockingIOError as error:
            raise ValueError(
                f"another run is using {out}; wait until it ends, or name another out"
            ) from error


def check_out(out: Path, checkpoints: Iterable[Path]) -> None:
    """Sees that a folder that holds no run has no file that a run would write or go on from.

    Args:
        out: The folder.
        checkpoints: Of the run that is to be there.

    Raises:
        ValueError: If it has one; it is named.
    """
    # either is enough: a damaged one is deleted to go on
    if (out / "config.json").exists() or (out / "split.json").exists():
        return
    for path in (*(out / name for name in _RESULTS), *checkpoints):
        if path.exists():
            raise ValueError(
                f"{path}: has the name of a run's file, but {out} holds no run (no config.json); "
                "name another out, or move the file away"
            )


def keep_config(config: TrainConfig, split: dict[str, list[str]]) -> None:
    """Writes `<out>/config.json` and `split.json`, or sees that those there say the same.

    Steps, devices, threads and how a run is watched may differ, and phases may be added; so may all
    of a phase that has not begun, and the learning rate and schedule of one that is not finished.

    Raises:
        ValueError: If anything else differs; the first such field is named. If a file is damaged.
    """
    out = Path(config.out)
    for path, content in ((out / "split.json", split), (out / "config.json", asdict(config))):
        _check_record(path, content)
        write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def check_config(config: TrainConfig) -> None:
    """Sees that `<out>/config.json`, if it is there, says the same; raises as `keep_config`.

    It writes nothing: for before the data are read, which takes a cache into use.
    """
    _check_record(Path(config.out) / "config.json", asdict(config))


def _check_record(path: Path, content: dict[str, Any]) -> None:
    if path.exists():
        cure = "delete it and give the run's own settings again, or name another out"
        saved = read_record(path, cure)
        try:
            # as it will be read
            _check_same(path, saved, json.loads(json.dumps(content)))
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: is damaged ({error!r}); {cure}") from error


def _with_later_fields(saved: dict[str, Any]) -> dict[str, Any]:
    """Adds to a configuration the fields that came later, as what its run had."""
    phases = [
        {**phase, "selector_rate": phase.get("selector_rate", 1.0)} for phase in saved["phases"]
    ]
    later: dict[str, Any] = {
        "start": None, "start_parts": [], "lesion_share": 0.67, "patient": None
    }
    augment = {"rotation": 15.0, "zoom": 0.15, "shift": 0.06, **saved["augment"]}
    # Med-DANet (V1) has no such network, whatever is asked
    if not saved.get("bank"):
        later["position_network"] = None
    return {**later, **saved, "phases": phases, "augment": augment}


def _check_same(path: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    now = dict(_fields(wanted))
    if "phases" in saved:
        saved = _with_later_fields(saved)
    for name, value in _fields(saved):
        root, _, rest = name.partition(".")
        free = root in _FREE and not (root == "baseline" and wanted["baseline"] and rest)
        if free or name.endswith(".steps") or now.get(name, _ABSENT) == value:
            continue
        regrouped = 1 in (value, now.get(name)) and _has_selectors(saved, name)
        if root in ("phases", "baseline") and _may_change(path.parent, saved, name, regrouped):
            continue
        asked = "nothing" if name not in now else repr(now[name])
        raise ValueError(
            f"{path}: {name} is {value!r} in the run that is there, and {asked} is asked for; "
            "expected the same, or another out"
        )


def _has_selectors(saved: dict[str, Any], name: str) -> bool:
    """Tells whether a rate by its dotted name is one of selectors, a group of the optimiser's."""
    root, *rest = name.split(".")
    if root != "phases" or rest[1:] != ["selector_rate"] or saved.get("bank"):
        return False
    parts = saved["phases"][int(rest[0])].get("parts")
    return not parts or "bit_selectors" in parts


def _may_change(out: Path, saved: dict[str, Any], name: str, regrouped: bool) -> bool:
    """Tells whether a field of a phase, by its dotted name, has had no effect yet.

    `regrouped`: Whether its change leaves the optimiser other groups.
    """
    root, *number, field = name.split(".")
    if not number and root == "phases":
        return False
    files, baseline = checkpoint_files(out, (phase["objective"] for phase in saved["phases"]))
    here = int(number[0]) if number else len(files)
    files.append(baseline)
    # those of later phases would have been trained from what is to change
    if any(file.exists() for file in files[here + 1 :]):
        return False
    if not files[here].exists():
        return True
    if field not in _PACE or regrouped:
        return False
    progress = read_progress(files[here])
    return progress.step < progress.steps


_ABSENT = object()


def _fields(content: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) of every field; the members of `phases` are numbered."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _fields(value, f"{name}.{key}".lstrip("."))
    elif name == "phases":
        for number, value in enumerate(content):
            yield from _fields(value, f"{name}.{number}")
    else:
        yield name, content
