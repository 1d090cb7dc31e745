"""Recognises the files of a case by their names' suffixes, never by a case's digits."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from .results import is_result
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
    return named and (path.is_file() or _dead_link(path) is not None)


def _dead_link(path: Path) -> VolumeError | None:
    """Returns what is wrong with a link to what is not there; None of anything else."""
    if path.exists() or not path.is_symlink():
        return None
    return VolumeError(f"{path}: is a link to {os.readlink(path)}, which is not there")


def _is_unread(path: Path) -> bool:
    """Tells whether a file is NIfTI in a form that is not read: two files, or packed otherwise."""
    name = path.name.lower()
    named = name.endswith((".hdr", ".nii.bz2", ".nii.xz", ".nii.zst"))
    return named and (path.is_file() or _dead_link(path) is not None)


@contextmanager
def listing(folder: Path) -> Iterator[None]:
    """Turns what goes wrong while a folder is listed into a VolumeError that names it."""
    try:
        yield
    except OSError as error:
        raise VolumeError(f"{folder}: cannot be listed ({error.strerror})") from error


def is_label_name(path: Path) -> bool:
    """Tells whether a path names a segmentation in any recognised convention."""
    parsed = _parse(path)
    return (parsed is not None and parsed[2] == _LABEL) or _is_label_folder(path.parent)


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


def look_through(folder: Path) -> Survey:
    """Does what `survey` does of a folder, also where it holds no case."""
    if not folder.is_dir():
        raise _dead_link(folder) or VolumeError(f"{folder}: no such file or folder")
    found = Survey()
    _walk(folder, _MAX_DEPTH, found, set())
    cases = sorted(with_unique_names(found.cases, folder), key=lambda case: case.name)
    return replace(found, cases=cases)


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


def _walk(folder: Path, depth: int, found: Survey, walked: set[Path]) -> None:
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
            below = [entry for entry in entries if entry.is_dir() and not _is_label_folder(entry)]
            images = [entry for entry in entries if is_nifti(entry) and not is_result(entry)]
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
            _walk(entry, depth - 1, found, walked)
        else:
            found.deep.append(entry)


def _is_label(path: Path) -> bool:
    """Tells whether a name means labels; BraTS 2020 has one that ends in _Segm."""
    return is_label_name(path) or stem(path).lower().endswith("_segm")


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
