"""Recognises the files of a case by their names' suffixes, never by a case's digits."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from .volume import VolumeError

MODALITIES = ("flair", "t1ce", "t1", "t2")
RECOGNISED = (
    "BraTS 2017-2021 (_flair _t1ce _t1 _t2), BraTS 2023+ (-t2f -t1c -t1n -t2w), "
    "MSD (imagesTr/BRATS_001), nnU-Net (_0000 _0001 ...) and LiTS (volume-0), .nii or .nii.gz"
)

_ALIASES = {
    **dict.fromkeys(("flair", "t2f", "t2-flair", "t2_flair", "t2flair"), "flair"),
    **dict.fromkeys(("t1ce", "t1c", "t1gd"), "t1ce"),
    **dict.fromkeys(("t1", "t1n", "t1w"), "t1"),
    **dict.fromkeys(("t2", "t2w"), "t2"),
}
_BRATS = {
    "brats2021": r"(.+)_(flair|t1ce|t1|t2|seg)",
    "brats2023": r"(.+)-(t2f|t1c|t1n|t2w|seg)",
}
_MSD_BRATS_ORDER = ("flair", "t1", "t1ce", "t2")
_LABEL = "label"
_MAX_DEPTH = 5


@dataclass(frozen=True)
class Case:
    """The files of one patient.

    Attributes:
        name: Case name, unique within one `find_cases`.
        files: File of each modality (nnU-Net channels of unknown meaning are keyed "0000", ...),
            or one file with all channels.
        convention: "brats2021", "brats2023", "msd", "nnunet", "lits" or "files".
        modalities: What the naming promises, in channel order; empty where it is unknown.
        label: Reference segmentation, if there is one.
    """

    name: str
    files: dict[str, Path] | Path
    convention: str
    modalities: tuple[str, ...] = ()
    label: Path | None = None

    @property
    def folder(self) -> Path:
        """Where the images lie."""
        files = self.files
        return (files if isinstance(files, Path) else next(iter(files.values()))).parent


def canonical_modality(name: str) -> str:
    """Returns the package's name for a modality: "T2-FLAIR" is "flair", "T1gd" is "t1ce"."""
    return _ALIASES.get(name.lower(), name.lower())


def stem(path: Path) -> str:
    """Returns a file's name without .nii or .nii.gz."""
    return re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.IGNORECASE)


def is_label_name(path: Path) -> bool:
    """Tells whether a path names a segmentation in any recognised convention."""
    parsed = _parse(path)
    return (parsed is not None and parsed[2] == _LABEL) or _is_label_folder(path.parent)


def labelled_case(path: Path) -> str:
    """Returns the case whose labels a file holds: "volume-0" for segmentation-0, "a" for a_seg."""
    parsed = _parse(path)
    return parsed[1] if parsed is not None and parsed[2] == _LABEL else stem(path)


def find_cases(path: str | Path) -> list[Case]:
    """Finds the cases in a case folder, a folder of cases (nested or flat) or one file.

    Returns:
        Cases sorted by name. Whether each one is complete is `load_volume`'s to say, so that one
        bad case does not stop the others.

    Raises:
        VolumeError: If the path does not exist or holds nothing recognised.
    """
    path = Path(path)
    if path.is_file():
        return _cases_among([path], path.parent) or [Case(stem(path), path, "files")]
    if not path.is_dir():
        raise VolumeError(f"{path}: no such file or folder")
    try:
        cases = sorted(_walk(path, _MAX_DEPTH), key=lambda case: case.name)
    except OSError as error:
        raise VolumeError(f"{error.filename}: cannot be listed ({error.strerror})") from error
    if not cases:
        raise VolumeError(_nothing_found(path))
    return _with_unique_names(cases)


def case_from_files(files: Mapping[str, str | Path], name: str | None = None) -> Case:
    """Makes a case of named files, modality -> path; files of one BraTS naming keep its convention.

    Raises:
        VolumeError: If no file is named or two keys mean the same modality.
    """
    paths = {canonical_modality(key): Path(value) for key, value in files.items()}
    if not paths or len(paths) < len(files):
        given = ", ".join(files) or "none"
        raise VolumeError(f"named files: modalities are {given}; expected each modality once")
    parsed = {entry[:2] if (entry := _parse(path)) else None for path in paths.values()}
    shared = parsed.pop() if len(parsed) == 1 else None
    convention = shared[0] if shared and shared[0] in _BRATS else "files"
    first = next(iter(paths.values()))
    return Case(name or (shared[1] if shared else stem(first)), paths, convention, tuple(paths))


def _walk(folder: Path, depth: int) -> Iterator[Case]:
    # hidden files include the "._" companions that macOS leaves in archives
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    yield from _cases_among([entry for entry in entries if _is_nifti(entry)], folder)
    if depth:
        for entry in entries:
            if entry.is_dir() and not _is_label_folder(entry):
                yield from _walk(entry, depth - 1)


def _is_nifti(path: Path) -> bool:
    return path.name.lower().endswith((".nii", ".nii.gz")) and path.is_file()


def _is_label_folder(folder: Path) -> bool:
    return folder.name in ("labels", "labelsTr", "labelsTs")


def _parse(path: Path) -> tuple[str, str, str] | None:
    """Returns (convention, case name, modality, channel digits or "label"), None if not known."""
    name = stem(path)
    for convention, pattern in _BRATS.items():
        if match := re.fullmatch(pattern, name, re.IGNORECASE):
            kind = match[2].lower()
            return convention, match[1], _LABEL if kind == "seg" else canonical_modality(kind)
    if re.fullmatch(r"(?:test-)?volume-\d+", name):
        return "lits", name, "ct"
    if match := re.fullmatch(r"segmentation-(\d+)", name):
        return "lits", f"volume-{match[1]}", _LABEL
    if match := re.fullmatch(r"(.+)_(\d{4})", name):
        return "nnunet", match[1], match[2]
    return None


def _cases_among(paths: list[Path], folder: Path) -> list[Case]:
    """Groups the NIfTI files of one folder into cases; unknown names are left out."""
    groups: dict[tuple[str, str], dict[str, Path]] = defaultdict(dict)
    cases = []
    order = _channel_names(folder)
    for path in paths:
        if parsed := _parse(path):
            groups[parsed[:2]][parsed[2]] = path
        elif _is_msd_name(path):
            cases.append(_msd_case(path, order))
    for (convention, name), files in groups.items():
        label = files.pop(_LABEL, None)
        if convention == "nnunet":
            cases.extend(_nnunet_cases(name, files, order))
        elif files:
            modalities = ("ct",) if convention == "lits" else MODALITIES
            cases.append(Case(name, files, convention, modalities, label))
    return cases


def _is_msd_name(path: Path) -> bool:
    in_images = path.parent.name in ("images", "imagesTr", "imagesTs")
    in_labels = _is_label_folder(path.parent)
    return in_images or (not in_labels and re.fullmatch(r"BRATS_\d+", stem(path)) is not None)


def _msd_case(path: Path, order: tuple[str, ...]) -> Case:
    if not order and stem(path).startswith("BRATS_"):
        order = _MSD_BRATS_ORDER
    return Case(stem(path), path, "msd", order, _label_beside(path.parent, stem(path)))


def _nnunet_cases(name: str, files: dict[str, Path], order: tuple[str, ...]) -> list[Case]:
    folder = next(iter(files.values())).parent
    known = bool(order) and max(map(int, files)) < len(order)
    if not known and "0000" not in files:
        # four digits that do not count from 0000 are case numbers
        return [_msd_case(path, order) for path in files.values() if _is_msd_name(path)]
    if known:
        files = {order[int(channel)]: path for channel, path in files.items()}
    order = order if known else ()
    return [Case(name, files, "nnunet", order, _label_beside(folder, name))]


def _label_beside(folder: Path, name: str) -> Path | None:
    if not folder.name.startswith("images"):
        return None
    labels = folder.with_name(folder.name.replace("images", "labels", 1))
    candidates = (labels / f"{name}{suffix}" for suffix in (".nii.gz", ".nii"))
    return next((path for path in candidates if path.is_file()), None)


def _channel_names(folder: Path) -> tuple[str, ...]:
    """Reads the channel order from the dataset.json in or above a folder; empty without one."""
    candidates = (folder / "dataset.json", folder.parent / "dataset.json")
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        return ()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        channels = content.get("channel_names") or content["modality"]
        names = tuple(canonical_modality(channels[key]) for key in sorted(channels, key=int))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise VolumeError(
            f"{path}: holds no channel order; "
            'expected "channel_names" or "modality" such as {"0": "FLAIR", "1": "T1w"}'
        ) from error
    if len(set(names)) < len(names):
        raise VolumeError(f"{path}: channels {', '.join(names)} repeat; expected each name once")
    return names


def _nothing_found(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    if not names:
        return f"{folder}: the folder is empty; recognised namings are {RECOGNISED}"
    found = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"{folder}: no case found among {found}; recognised namings are {RECOGNISED}"


def _with_unique_names(cases: list[Case]) -> list[Case]:
    """Puts the folder's name before case names that occur more than once."""
    counts = Counter(case.name for case in cases)
    renamed = [
        replace(case, name=f"{case.folder.name}_{case.name}") if counts[case.name] > 1 else case
        for case in cases
    ]
    name, count = Counter(case.name for case in renamed).most_common(1)[0]
    if count > 1:
        folders = ", ".join(str(case.folder) for case in renamed if case.name == name)
        raise VolumeError(f"{folders}: {count} cases are named {name}; expected different names")
    return renamed
