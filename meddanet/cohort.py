"""Many cases with one model: which there are, which are finished, what becomes of each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .data import Case, VolumeError, case_from_files, find_cases, load_volume, save_volume
from .predictor import VolumePredictor
from .report import case_report, write_json, write_preview


def gather_cases(inputs: Sequence[str]) -> tuple[list[Case], list[ValueError]]:
    """Finds the cases of all inputs.

    Args:
        inputs: Case folders, folders of cases and image files; named files, `flair=a.nii.gz`,
            together make one case.

    Returns:
        The cases, each once, and one error per input that holds none or whose case has the name of
        another one.
    """
    cases: dict[str, Case] = {}
    errors: list[ValueError] = []
    named = [text.split("=", 1) for text in inputs if _is_named_file(text)]
    paths = [text for text in inputs if not _is_named_file(text)]
    for source in [*paths, *([named] if named else [])]:
        try:
            found = find_cases(source) if isinstance(source, str) else [_named_case(source)]
        except ValueError as error:
            errors.append(error)
            continue
        for case in found:
            if cases.setdefault(case.name, case).files != case.files:
                errors.append(VolumeError(
                    f"{case.folder}: case {case.name} has the name of the one in "
                    f"{cases[case.name].folder}; expected different names in one output folder"
                ))
    return list(cases.values()), errors


def _is_named_file(text: str) -> bool:
    return text.partition("=")[0].replace("-", "").isalnum() and "=" in text


def _named_case(pairs: list[list[str]]) -> Case:
    repeated = {key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1}
    if repeated:
        raise VolumeError(f"named files: {', '.join(repeated)} is named twice; expected once")
    return case_from_files(dict(pairs))


def output_folder(path: str | Path) -> Path:
    """Creates a folder and tries to write in it, before any work is done.

    Raises:
        VolumeError: If it cannot be written.
    """
    folder = Path(path)
    probe = folder / ".meddanet-write-test"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise VolumeError(
            f"{folder}: cannot write there ({error.strerror}); name another folder with -o"
        ) from error
    return folder


def is_finished(case: Case, out: Path, preview: bool) -> bool:
    """Tells whether an earlier run left everything that is asked for."""
    wanted = [".nii.gz", ".json", *([".png"] if preview else [])]
    return all((out / f"{case.name}{ending}").is_file() for ending in wanted)


def segment_case(
    case: Case,
    predictor: VolumePredictor,
    out: Path,
    *,
    weights: str,
    preview: bool = False,
    modalities: tuple[str, ...] | None = None,
) -> dict:
    """Segments one case into `<out>/<case>.nii.gz`, `.json` and, with a preview, `.png`.

    Args:
        case: From `find_cases`.
        predictor: The model.
        out: An existing folder.
        weights: What the report calls the weights.
        preview: Whether to draw the picture.
        modalities: What the channels are, in file order, where the naming does not tell.

    Returns:
        The report.

    Raises:
        VolumeError: If the case is bad, or its labels would take the place of its image.
    """
    began = time.perf_counter()
    labels, picture, report = (out / f"{case.name}{end}" for end in (".nii.gz", ".png", ".json"))
    files = [case.files] if isinstance(case.files, Path) else case.files.values()
    if labels.resolve() in [file.resolve() for file in files]:
        raise VolumeError(f"{labels}: is the input itself; name another folder with -o")
    volume = load_volume(case, None if case.modalities else modalities)
    prediction = predictor.predict(volume)
    # the report marks a case as finished, so an old one goes first and the new one comes last
    for path in (report, picture):
        path.unlink(missing_ok=True)
    save_volume(prediction.labels, labels, like=volume)
    seconds = time.perf_counter() - began
    if preview:
        write_preview(volume, prediction, picture)
    content = case_report(
        volume, prediction, seconds,
        weights=weights, device=str(predictor.device), threads=torch.get_num_threads(),
    )
    write_json(content, report)
    return content
