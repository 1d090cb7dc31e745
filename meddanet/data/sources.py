"""Which file, and which channel of it, each modality of a case comes from."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from .conventions import (
    MODALITIES,
    Case,
    canonical_modality,
    case_from_files,
    is_label_name,
)
from .survey import find_cases
from .volume import VolumeError


def as_case(path: str | Path | Mapping[str, str | Path] | Case) -> Case:
    """Returns the one case that a folder, a file or named files hold.

    Raises:
        VolumeError: If there is no case, or more than one.
        ValueError: If it is none of these.
    """
    if isinstance(path, Case):
        return path
    if isinstance(path, Mapping):
        return case_from_files(path)
    if not isinstance(path, str | os.PathLike):
        raise ValueError(
            f"path is a {type(path).__name__}, expected a folder, a file, or named files such as "
            '{"flair": "a.nii.gz"}'
        )
    cases = find_cases(path)
    if len(cases) > 1:
        names = ", ".join(case.name for case in cases[:3])
        raise VolumeError(
            f"{path}: holds {len(cases)} cases ({names} ...); expected one, see find_cases"
        )
    return cases[0]


def channel_sources(case: Case, given: tuple[str, ...] | None) -> dict[str, tuple[Path, int]]:
    """Returns the file and the channel in it of every modality that the case has.

    Args:
        case: The case.
        given: Modalities asked for; they name the channels where the naming does not.

    Raises:
        VolumeError: If a file is a label file or there twice, or what the channels are is unknown.
        ValueError: If `given` is empty or repeats a name.
    """
    paths = case.paths
    if case.doubled:
        first, second = case.doubled
        raise VolumeError(
            f"{second}: is the same part of case {case.name} as {first.name}; expected one of them"
        )
    for path in paths:
        if is_label_name(path):
            raise VolumeError(f"{path}: is a label file; expected an image")
    if given is not None and (not given or len(set(given)) < len(given)):
        raise ValueError(f"modalities are {', '.join(given) or 'none'}, expected each name once")
    names = case.modalities or given
    if names is None:
        raise VolumeError(
            f"{case.name}: what its channels are is unknown; name them in their order, such as "
            "--modalities flair,t1ce,t1,t2, or modalities= in Python"
        )
    if isinstance(case.files, Path):
        return {name: (case.files, index) for index, name in enumerate(names)}
    if case.modalities:
        return {name: (path, 0) for name, path in case.files.items()}
    if len(names) != len(paths):
        raise VolumeError(
            f"{case.name}: has {len(paths)} channel files, expected {len(names)} "
            f"({', '.join(names)})"
        )
    ordered = sorted(case.files)
    return {name: (case.files[key], 0) for name, key in zip(names, ordered, strict=True)}


def unnamed_channels(case: Case, given: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Returns the modalities given, in file order, where the naming does not tell; else None.

    Raises:
        VolumeError: If the naming tells something else.
    """
    told = case.modalities
    if given is None or not told:
        return given
    names = tuple(map(canonical_modality, given))
    ordered = case.convention in ("msd", "nnunet")
    if names != told if ordered else set(names) != set(told):
        raise VolumeError(
            f"{case.name}: its channels are {', '.join(told)} by its "
            f"{'dataset.json or name' if ordered else 'name'}, by --modalities "
            f"{', '.join(names)}; leave that out, or correct the former"
        )
    return None


def named_by_model(case: Case, modalities: Sequence[str]) -> Case:
    """Returns a case of one file whose channel nothing names as a model's only modality.

    Any other case, and what is for a model of several modalities, stays as it is.
    """
    untold = not case.modalities and isinstance(case.files, Path)
    return replace(case, modalities=tuple(modalities)) if untold and len(modalities) == 1 else case


def usual_order(names: tuple[str, ...]) -> tuple[str, ...]:
    """Returns brain modalities in the order of `MODALITIES`, others as they are."""
    return tuple(sorted(names, key=MODALITIES.index)) if set(names) <= set(MODALITIES) else names
