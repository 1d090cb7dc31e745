"""Which label map belongs to which reference, by the names of their files."""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .data import Case, VolumeError, find_cases
from .data.conventions import is_label_name, is_nifti, labelled_case, labels_among, stem
from .data.survey import listing, look_through, some, with_unique_names

# the label files of each case, one unless it is there twice
Files = dict[str, list[Path]]


@dataclass(frozen=True)
class Pair:
    """A label map and what it should have been.

    Attributes:
        name: Case name.
        prediction: Its label file.
        reference: The label file that it should agree with.
        case: The reference's.
        doubled: Two files that would be the same side of the pair, which cannot be scored then.
    """

    name: str
    prediction: Path
    reference: Path
    case: Case
    doubled: tuple[Path, ...] = ()


def find_pairs(predictions: str | Path, references: str | Path) -> list[Pair]:
    """Finds the reference of every label map.

    A pair of which a side is there twice is `compare`'s to refuse, so that it stops no other.

    Args:
        predictions: A label file or a folder of `<case>.nii.gz`, or named as labels (`a_seg`).
        references: A label file, a folder of label files, or a folder of labelled cases, whose
            scans need not be there.

    Raises:
        VolumeError: If a path is empty or does not exist, or nothing belongs together.
    """
    for path, what in ((predictions, "PRED"), (references, "REF")):
        if not str(path):
            raise VolumeError(f"{what} is empty; name a folder or a file, . for the current folder")
    predictions, references = Path(predictions), Path(references)
    for path in (predictions, references):
        if not path.exists():
            raise VolumeError(f"{path}: no such file or folder")
    if references.is_file():
        if predictions.is_dir():
            raise VolumeError(f"{references}: is one file; expected a folder, as {predictions} is")
        return [Pair(stem(predictions), predictions, references, _case_of(references))]
    single = predictions.is_file()
    files = {labelled_case(predictions): [predictions]} if single else _label_files(predictions)
    known = _references(references, files)
    if not known:
        raise VolumeError(
            f"{references}: holds no labelled case and no label file; expected folders of cases "
            "with a segmentation, or files <case>.nii.gz"
        )
    pairs = [_pair(name, paths, *known[name]) for name, paths in files.items() if name in known]
    if not pairs:
        raise VolumeError(
            f"{predictions}: holds no <case>.nii.gz for any labelled case of {references}"
        )
    return pairs


def unpaired(
    pairs: list[Pair], predictions: str | Path, references: str | Path
) -> dict[str, list[str]]:
    """Returns the names that folders hold on one side only, as "without_prediction" and so on.

    One file as prediction asks for its own reference alone, so that nothing is missing.
    """
    if Path(predictions).is_file():
        return {"without_prediction": [], "without_reference": []}
    paired = {pair.name for pair in pairs}
    files = _label_files(Path(predictions))
    return {
        "without_prediction": sorted(_references(Path(references), files).keys() - paired),
        "without_reference": sorted(files.keys() - paired),
    }


def _pair(name: str, predictions: list[Path], references: list[Path], case: Case) -> Pair:
    doubled = next((paths for paths in (predictions, references) if len(paths) > 1), [])
    return Pair(name, predictions[0], references[0], case, tuple(doubled[:2]))


def _label_files(folder: Path) -> Files:
    """Returns the label files in a folder by case.

    Raises:
        VolumeError: If the folder cannot be listed.
    """
    with listing(folder):
        paths = sorted(path for path in folder.iterdir() if is_nifti(path))
    files: Files = {}
    for path in labels_among(paths):
        files.setdefault(labelled_case(path), []).append(path)
    return files


def _references(folder: Path, predictions: Files) -> dict[str, tuple[list[Path], Case]]:
    """Returns label files and case by name: of labelled cases, or without any of loose files.

    Labels whose scans lie nowhere are of a case, too. A prediction in a folder below is no scan of
    its case, which `<case>.nii.gz` may be.
    """
    here = folder.resolve()
    ours = [path for paths in predictions.values() for path in paths if not is_label_name(path)]
    places = [(path.parent.resolve(), path.name) for path in ours]
    found = look_through(folder, {place / name for place, name in places if place != here})
    for fault in found.faulty.values():
        if found.cases or found.lone_labels:
            # of this line, so that it is said once however often references are looked for
            warnings.warn(f"{fault}; its cases are left out", stacklevel=1)
        elif isinstance(fault.__cause__, OSError):
            # what is looked for may lie there; without channels there may still be loose files
            raise fault
    known = _by_name(found.cases)
    if not known:
        for name, paths in _label_files(folder).items():
            known[name] = (paths, Case(stem(paths[0]), paths[0], "files"))
    predicted = {path.resolve() for paths in predictions.values() for path in paths}
    lone = [path for path in found.lone_labels if path.resolve() not in predicted]
    scanned = {case.name for case in found.cases}
    # of a case with images, labels that lie elsewhere may be anybody's
    without = [path for path in lone if labelled_case(path) not in scanned]
    known = {**_by_name(_without_scans(without, folder)), **known}
    unclear = scanned.intersection(predictions).difference(known)
    if apart := [path for path in lone if labelled_case(path) in unclear]:
        if not known:
            raise VolumeError(_lie_apart(folder, apart))
        warnings.warn(_lie_apart(folder, apart), stacklevel=1)
    return known


def _lie_apart(folder: Path, labels: list[Path]) -> str:
    there = labels[0].parent
    names = some(sorted({labelled_case(path) for path in labels if path.parent == there}))
    return (
        f"{folder}: labels of {names} lie in {there}, apart from the scans; if they are "
        "references, name that folder"
    )


def _by_name(cases: list[Case]) -> dict[str, tuple[list[Path], Case]]:
    """Returns the label file of each case that has one, or both where it is there twice."""
    return {
        case.name: (list(case.doubled) if case.label in case.doubled else [case.label], case)
        for case in cases if case.label is not None
    }


def _without_scans(labels: list[Path], folder: Path) -> list[Case]:
    """Makes cases of label files alone."""
    groups: dict[tuple[Path, str], list[Path]] = {}
    for path in labels:
        groups.setdefault((path.parent, labelled_case(path)), []).append(path)
    return with_unique_names([
        Case(name, paths[0], "files", (), paths[0], tuple(paths[:2]) if paths[1:] else ())
        for (_, name), paths in groups.items()
    ], folder)


def _case_of(reference: Path) -> Case:
    with suppress(VolumeError):
        for case in find_cases(reference.parent):
            if case.label == reference:
                return case
    return Case(stem(reference), reference, "files")
