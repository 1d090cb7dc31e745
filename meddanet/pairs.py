"""Which label map belongs to which reference, by the names of their files."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .data import Case, VolumeError, find_cases
from .data.conventions import is_nifti, labelled_case, labels_among, listing, stem


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
        references: A label file, a folder of label files, or a folder of labelled cases.

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
    known = _references(references)
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
    return {
        "without_prediction": sorted(_references(Path(references)).keys() - paired),
        "without_reference": sorted(_label_files(Path(predictions)).keys() - paired),
    }


def _pair(name: str, predictions: list[Path], references: list[Path], case: Case) -> Pair:
    doubled = next((paths for paths in (predictions, references) if len(paths) > 1), [])
    return Pair(name, predictions[0], references[0], case, tuple(doubled[:2]))


def _label_files(folder: Path) -> dict[str, list[Path]]:
    """Returns the label files in a folder by case, one of each unless a case is there twice.

    Raises:
        VolumeError: If the folder cannot be listed.
    """
    with listing(folder):
        paths = sorted(path for path in folder.iterdir() if is_nifti(path))
    files: dict[str, list[Path]] = {}
    for path in labels_among(paths):
        files.setdefault(labelled_case(path), []).append(path)
    return files


def _references(folder: Path) -> dict[str, tuple[list[Path], Case]]:
    """Returns label files and case by name: of the labelled cases, without any of loose files."""
    cases: list[Case] = []
    try:
        cases = find_cases(folder)
    except VolumeError as error:
        # cases may lie where nobody may look; that none was found leaves loose files
        if isinstance(error.__cause__, OSError):
            raise
    known = {
        case.name: (list(case.doubled) if case.label in case.doubled else [case.label], case)
        for case in cases if case.label is not None
    }
    return known or {
        name: (paths, Case(stem(paths[0]), paths[0], "files"))
        for name, paths in _label_files(folder).items()
    }


def _case_of(reference: Path) -> Case:
    with suppress(VolumeError):
        for case in find_cases(reference.parent):
            if case.label == reference:
                return case
    return Case(stem(reference), reference, "files")
