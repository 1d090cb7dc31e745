"""Recognises the files of a case by their names' suffixes, never by a case's digits."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from .storage import read_small
from .volume import VolumeError

MODALITIES = ("flair", "t1ce", "t1", "t2")
RECOGNISED = (
    "BraTS 2017-2021 (_flair _t1ce _t1 _t2), BraTS 2023+ (-t2f -t1c -t1n -t2w), "
    "MSD (imagesTr/BRATS_001), nnU-Net (_0000 _0001 ...) and LiTS (volume-0), .nii or .nii.gz"
)
LABELLED = "x_seg, x-seg, labelsTr/x or, beside volume-0, segmentation-0"

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
        doubled: Two files that would be the same part of the case, which cannot be loaded then.
    """

    name: str
    files: dict[str, Path] | Path
    convention: str
    modalities: tuple[str, ...] = ()
    label: Path | None = None
    doubled: tuple[Path, ...] = ()

    @property
    def paths(self) -> list[Path]:
        """The image files."""
        return [self.files] if isinstance(self.files, Path) else list(self.files.values())

    @property
    def folder(self) -> Path:
        """Where the images lie."""
        return self.paths[0].parent


def canonical_modality(name: str) -> str:
    """Returns the package's name for a modality: "T2-FLAIR" is "flair", "T1gd" is "t1ce"."""
    return _ALIASES.get(name.lower(), name.lower())


def stem(path: Path) -> str:
    """Returns a file's name without .nii or .nii.gz."""
    return re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.IGNORECASE)


def is_nifti(path: Path) -> bool:
    """Tells whether a path is a file named .nii or .nii.gz, and not a hidden one.

    So is a link that leads nowhere, as of data that were not fetched: reading it says so.
    """
    # hidden files include the "._" companions that macOS leaves in archives
    name = path.name.lower()
    named = not name.startswith(".") and name.endswith((".nii", ".nii.gz"))
    return named and is_file_or_lost(path)


def is_file_or_lost(path: Path) -> bool:
    """Tells whether a path is a file, or a link whose target is not there."""
    return path.is_file() or (path.is_symlink() and not path.exists())


def is_label_name(path: Path) -> bool:
    """Tells whether a path names a segmentation in any recognised convention."""
    parsed = _parse(path)
    return (parsed is not None and parsed[2] == _LABEL) or is_label_folder(path.parent)


def labelled_case(path: Path) -> str:
    """Returns the case whose labels a file holds: "volume-0" for segmentation-0, "a" for a_seg."""
    parsed = _parse(path)
    return parsed[1] if parsed is not None and parsed[2] == _LABEL else stem(path)


def labels_among(paths: list[Path]) -> list[Path]:
    """Returns which NIfTI files of one folder are label files: all, but for scans beside labels.

    Beside files that are named as labels a scan is what names a modality, what is a channel of a
    case that has a first one, and what begins with the name of a case that has labels.
    """
    labelled = {labelled_case(path) for path in paths if is_label_name(path)}
    if not labelled:
        return paths
    stems = {stem(path) for path in paths}

    def is_scan(path: Path) -> bool:
        convention, name, _ = _parse(path) or ("", "", "")
        named = convention in _BRATS or (convention == "nnunet" and f"{name}_0000" in stems)
        begins = {stem(path)[: match.start()] for match in re.finditer(r"[_.-]|$", stem(path))}
        return named or not begins.isdisjoint(labelled)

    return [path for path in paths if is_label_name(path) or not is_scan(path)]


def case_from_files(files: Mapping[str, str | Path], name: str | None = None) -> Case:
    """Makes a case of named files, modality -> path; files of one BraTS naming keep its convention.

    Raises:
        VolumeError: If no file is named, or two keys mean the same modality or name the same file.
    """
    paths = {canonical_modality(key): Path(value) for key, value in files.items()}
    if not paths or len(paths) < len(files):
        given = ", ".join(files) or "none"
        raise VolumeError(f"named files: modalities are {given}; expected each modality once")
    places = [path.resolve() for path in paths.values()]
    if same := [kind for kind, place in zip(paths, places, strict=True) if places.count(place) > 1]:
        raise VolumeError(
            f"named files: {', '.join(same)} are all {paths[same[0]]}; expected a file of each"
        )
    parsed = {entry[:2] if (entry := _parse(path)) else None for path in paths.values()}
    shared = parsed.pop() if len(parsed) == 1 else None
    convention = shared[0] if shared and shared[0] in _BRATS else "files"
    first = next(iter(paths.values()))
    return Case(name or (shared[1] if shared else stem(first)), paths, convention, tuple(paths))


def is_label_folder(folder: Path) -> bool:
    """Tells whether a folder of the Decathlon or nnU-Net holds labels alone."""
    return folder.name in ("labels", "labelsTr", "labelsTs")


def _parse(path: Path) -> tuple[str, str, str] | None:
    """Returns (convention, case name, modality, channel digits or "label"), None if not known."""
    name = stem(path)
    for convention, pattern in _BRATS.items():
        if match := re.fullmatch(pattern, name, re.IGNORECASE | re.DOTALL):
            kind = match[2].lower()
            return convention, match[1], _LABEL if kind == "seg" else canonical_modality(kind)
    if re.fullmatch(r"(?:test-)?volume-\d+", name):
        return "lits", name, "ct"
    if match := re.fullmatch(r"segmentation-(\d+)", name):
        return "lits", f"volume-{match[1]}", _LABEL
    if match := re.fullmatch(r"(.+)_(\d{4})", name, re.DOTALL):
        return "nnunet", match[1], match[2]
    return None


def cases_among(paths: list[Path], folder: Path) -> list[Case]:
    """Groups NIfTI files of one folder into cases; unknown names are left out.

    Raises:
        VolumeError: If a dataset.json that their channels hang on tells none.
    """
    groups: dict[tuple[str, str], dict[str, Path]] = defaultdict(dict)
    doubles: dict[Path, Path] = {}
    four_dimensional = []
    for path in paths:
        if parsed := _parse(path):
            kept = groups[parsed[:2]].setdefault(parsed[2], path)
            if kept != path:
                doubles[kept] = path
        elif _is_msd_name(path):
            four_dimensional.append(path)
    # other namings tell the channels themselves, whatever a dataset.json beside them is
    unnamed = four_dimensional or any(convention == "nnunet" for convention, _ in groups)
    order = _channel_names(folder) if unnamed else ()
    cases = [_msd_case(path, order) for path in four_dimensional]
    for (convention, name), files in groups.items():
        label = files.pop(_LABEL, None)
        if convention == "nnunet":
            cases.extend(_nnunet_cases(name, files, order))
        elif files:
            modalities = ("ct",) if convention == "lits" else MODALITIES
            cases.append(Case(name, files, convention, modalities, label))
    return _with_doubles(cases, doubles)


def _with_doubles(cases: list[Case], doubles: dict[Path, Path]) -> list[Case]:
    """Marks the cases of one folder of which a file is there twice, or the whole case is."""
    kept: dict[str, Case] = {}
    for case in cases:
        for path in (*case.paths, case.label):
            if path in doubles:
                case = replace(case, doubled=(path, doubles[path]))
        first = kept.setdefault(case.name, case)
        if first is not case:
            kept[case.name] = replace(first, doubled=(first.paths[0], case.paths[0]))
    return list(kept.values())


def _is_msd_name(path: Path) -> bool:
    in_images = path.parent.name in ("images", "imagesTr", "imagesTs")
    in_labels = is_label_folder(path.parent)
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
        content = json.loads(read_small(path))
        channels = content.get("channel_names") or content["modality"]
        names = tuple(canonical_modality(channels[key]) for key in sorted(channels, key=int))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise VolumeError(
            f"{path}: holds no channel order; "
            'expected "channel_names" or "modality" such as {"0": "FLAIR", "1": "T1w"}'
        ) from error
    if len(set(names)) < len(names):
        raise VolumeError(f"{path}: channels {', '.join(names)} repeat; expected each name once")
    return names
