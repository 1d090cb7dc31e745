"""Finds the cases of a folder, nested or flat, and tells what is left out."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from .conventions import (
    RECOGNISED,
    Case,
    cases_among,
    is_file_or_lost,
    is_label_folder,
    is_label_name,
    is_nifti,
    stem,
)
from .results import is_result
from .volume import VolumeError

_MAX_DEPTH = 5


@dataclass(frozen=True)
class Survey:
    """What `find_cases` finds, and what it leaves out.

    Attributes:
        cases: Sorted by name.
        strays: NIfTI files that belong to no case, label files and results of meddanet aside.
        deep: Folders that are too deep to be looked into.
        faulty: Why folders cannot be listed, or the channels of their files not be told.
        lone_labels: Files that are named as labels, of cases without images there.
        unread: NIfTI files in a form that is not read: pairs of .hdr and .img, other compressions.
    """

    cases: list[Case] = field(default_factory=list)
    strays: list[Path] = field(default_factory=list)
    deep: list[Path] = field(default_factory=list)
    faulty: dict[Path, VolumeError] = field(default_factory=dict)
    lone_labels: list[Path] = field(default_factory=list)
    unread: list[Path] = field(default_factory=list)

    def unused(self, root: str | Path) -> dict[str, list[str]]:
        """Returns what was left out below a folder: why -> names; nothing that nothing is of."""
        groups = {
            "NIfTI files that belong to no case": self.strays,
            "files to convert to .nii.gz first": self.unread,
            "folders too deep to look into": self.deep,
            "folders with a fault": list(self.faulty),
        }
        return {
            why: [str(path.relative_to(root)) for path in paths]
            for why, paths in groups.items() if paths
        }

    def left_out(self, root: str | Path) -> str:
        """Says in one line what was left out below a folder; empty if nothing was."""
        parts = [f"{what} ({some(names)})" for what, names in self.unused(root).items()]
        count = sum(map(len, (self.strays, self.unread, self.deep, self.faulty)))
        cure = "; name them as inputs of their own, or rename them"
        if self.faulty:
            # of several the first one
            cure = f"; {next(iter(self.faulty.values()))}"
        elif not self.strays and not self.deep:
            cure = ""
        return f"{root}: {count} left out, " + " and ".join(parts) + cure if parts else ""


def find_cases(path: str | Path) -> list[Case]:
    """Finds the cases in a case folder, a folder of cases (nested or flat) or one file.

    Returns:
        Cases sorted by name. Whether each one is complete is `load_volume`'s to say, so that one
        bad case does not stop the others; folders with a fault are warned of.

    Raises:
        VolumeError: If the path does not exist or holds nothing recognised.
    """
    found = survey(path)
    for fault in found.faulty.values():
        warnings.warn(f"{fault}; its cases are left out", stacklevel=2)
    return found.cases


def survey(path: str | Path) -> Survey:
    """Does what `find_cases` does, and keeps what was left out."""
    path = Path(path)
    if path.is_file():
        return Survey(cases_among([path], path.parent) or [Case(stem(path), path, "files")])
    found = look_through(path)
    if not found.cases:
        raise next(iter(found.faulty.values()), None) or VolumeError(_nothing_found(path))
    return found


def look_through(folder: Path, ignored: Collection[Path] = ()) -> Survey:
    """Does what `survey` does of a folder, also where it holds no case.

    Args:
        folder: To be looked through.
        ignored: Files that are passed over, in folders without links.
    """
    if not folder.is_dir():
        raise _dead_link(folder) or VolumeError(f"{folder}: no such file or folder")
    found = Survey()
    _walk(folder, _MAX_DEPTH, found, set(), ignored)
    cases = sorted(with_unique_names(found.cases, folder), key=lambda case: case.name)
    return replace(found, cases=cases)


def _walk(
    folder: Path, depth: int, found: Survey, walked: set[Path], ignored: Collection[Path]
) -> None:
    """Adds what lies in a folder and below; what is wrong with one folder stops no other.

    Where links lead to a folder again it is passed over.
    """
    if (here := folder.resolve()) in walked:
        return
    walked.add(here)
    images, below, cases = [], [], []
    try:
        with listing(folder):
            entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
            below = [entry for entry in entries if entry.is_dir() and not is_label_folder(entry)]
            images = [
                entry for entry in entries
                if is_nifti(entry) and here / entry.name not in ignored and not is_result(entry)
            ]
            found.unread.extend(entry for entry in entries if _is_unread(entry))
            # without a suffix it may have been a case's folder; files of a case tell themselves
            # (a number may follow a full stop: W39_1998.09.19)
            lost = {
                entry: _dead_link(entry) for entry in entries
                if not re.search("[a-z]", entry.suffix, re.IGNORECASE)
            }
            found.faulty.update((entry, why) for entry, why in lost.items() if why)
        cases = cases_among(images, folder)
    except VolumeError as error:
        found.faulty[folder], images = error, []
    used = {path for case in cases for path in (*case.paths, *case.doubled, case.label)}
    others = [path for path in images if path not in used]
    found.cases.extend(cases)
    found.strays.extend(path for path in others if not _is_label(path))
    found.lone_labels.extend(path for path in others if is_label_name(path))
    for entry in below:
        if depth:
            _walk(entry, depth - 1, found, walked, ignored)
        else:
            found.deep.append(entry)


def _is_label(path: Path) -> bool:
    """Tells whether a name means labels; BraTS 2020 has one that ends in _Segm."""
    return is_label_name(path) or stem(path).lower().endswith("_segm")


def _is_unread(path: Path) -> bool:
    """Tells whether a file is NIfTI in a form that is not read: two files, or packed otherwise."""
    name = path.name.lower()
    named = name.endswith((".hdr", ".nii.bz2", ".nii.xz", ".nii.zst"))
    return named and is_file_or_lost(path)


def _dead_link(path: Path) -> VolumeError | None:
    """Returns what is wrong with a link to what is not there; None of anything else."""
    if path.exists() or not path.is_symlink():
        return None
    return VolumeError(f"{path}: is a link to {os.readlink(path)}, which is not there")


@contextmanager
def listing(folder: Path) -> Iterator[None]:
    """Turns what goes wrong while a folder is listed into a VolumeError that names it."""
    try:
        yield
    except OSError as error:
        raise VolumeError(f"{folder}: cannot be listed ({error.strerror})") from error


def _nothing_found(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    if not names:
        return f"{folder}: the folder is empty; recognised namings are {RECOGNISED}"
    return f"{folder}: no case found among {some(names)}; recognised namings are {RECOGNISED}"


def some(names: list[str]) -> str:
    """Returns the first few of some names, and how many more there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def with_unique_names(cases: list[Case], root: Path) -> list[Case]:
    """Puts as many folders before names that occur more than once as it takes to differ."""
    names = [case.name for case in cases]
    top = root.resolve().name
    for depth in range(1, _MAX_DEPTH + 2):
        counts = Counter(names)
        for index, case in enumerate(cases):
            if counts[names[index]] > 1:
                folders = (top, *case.folder.relative_to(root).parts)[-depth:]
                names[index] = "_".join((*folders, case.name))
    name, count = next(iter(Counter(names).most_common(1)), ("", 0))
    if count > 1:
        same = [str(case.folder) for case, other in zip(cases, names, strict=True) if other == name]
        raise VolumeError(
            f"{', '.join(same)}: {count} cases are named {name}; expected different names"
        )
    return [replace(case, name=name) for case, name in zip(cases, names, strict=True)]
