"""Many cases with one model: which there are, which are finished, what becomes of each."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from .data import Case, Volume, VolumeError, case_from_files, load_volume, save_volume
from .data.conventions import Survey, survey
from .data.sources import unnamed_channels
from .data.storage import has_report, is_result, unfinished_mark, write_errors
from .predictor import Prediction, VolumePredictor
from .report import case_report, write_json, write_preview

# what may be wrong with one case while the others go on
# (PyTorch's and OpenVINO's own errors, memory that is not there among them, are RuntimeErrors)
CASE_ERRORS = (ValueError, OSError, MemoryError, RuntimeError)

# above it arrays are of whole volumes, below it maps of slices, which come and go all the time
_OWN_MAPPING = 16 << 20


def gather_cases(inputs: Sequence[str]) -> tuple[list[Case], list[ValueError]]:
    """Finds the cases of all inputs.

    Args:
        inputs: Case folders, folders of cases and image files; named files, `flair=a.nii.gz`,
            together make one case.

    Returns:
        The cases, each once, and one error per input that holds none, or files that belong to
        none, or whose case has the name of another one.
    """
    cases: dict[str, Case] = {}
    errors: list[ValueError] = []
    named = [text.split("=", 1) for text in inputs if _is_named_file(text)]
    sources: list[str | list[list[str]]] = [text for text in inputs if not _is_named_file(text)]
    if named:
        sources.append(named)
    for source in sources:
        try:
            found = survey(source) if isinstance(source, str) else Survey([_named_case(source)])
        except ValueError as error:
            errors.append(error)
            continue
        if isinstance(source, str) and (line := found.left_out(source)):
            errors.append(VolumeError(line))
        for case in found.cases:
            if cases.setdefault(case.name, case).files != case.files:
                errors.append(VolumeError(
                    f"{case.folder}: case {case.name} has the name of the one in "
                    f"{cases[case.name].folder}; expected different names in one output folder"
                ))
    return list(cases.values()), errors


def _is_named_file(text: str) -> bool:
    key, equals, _ = text.partition("=")
    return bool(equals) and key.replace("-", "").isalnum() and not Path(text).exists()


def _named_case(pairs: list[list[str]]) -> Case:
    repeated = {key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1}
    if repeated:
        raise VolumeError(f"named files: {', '.join(repeated)} is named twice; expected once")
    return case_from_files(dict(pairs))


def output_folder(path: str | Path) -> Path:
    """Creates a folder and tries to write in it, before any work is done.

    Raises:
        VolumeError: If it cannot be written, or has no name.
    """
    if not str(path):
        raise VolumeError("--out is empty; name a folder, . for the current one")
    folder = Path(path)
    probe = folder / ".meddanet-write-test"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        # another process may try the same folder
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise VolumeError(
            f"{folder}: cannot write there ({error.strerror}); name another folder with --out"
        ) from error
    return folder


def is_finished(case: Case, out: Path, preview: bool) -> bool:
    """Tells whether an earlier run left everything that is asked for."""
    labels, _, picture = _results(case, out)
    wanted = [labels, *([picture] if preview else [])]
    return has_report(labels) and all(path.is_file() for path in wanted)


def _results(case: Case, out: Path) -> tuple[Path, Path, Path]:
    """Returns the labels, the report and the picture of a case."""
    labels, report, picture = (out / f"{case.name}{end}" for end in (".nii.gz", ".json", ".png"))
    return labels, report, picture


def segment_case(
    case: Case,
    predictor: VolumePredictor,
    out: Path,
    *,
    weights: str,
    preview: bool = False,
    modalities: tuple[str, ...] | None = None,
    overwrite: bool = False,
) -> dict:
    """Segments one case into `<out>/<case>.nii.gz`, `.json` and, with a preview, `.png`.

    Args:
        case: From `find_cases`.
        predictor: The model.
        out: An existing folder.
        weights: What the report calls the weights.
        preview: Whether to draw the picture.
        modalities: What the channels are, in file order; needed where the naming does not tell.
        overwrite: Whether results may take the place of files that are not meddanet's.

    Returns:
        The report; its "file_to_file" is reading, predicting and writing the labels.

    Raises:
        VolumeError: If the case is bad, or its results would take the place of its own files, or
            of others that meddanet did not write.
    """
    volume, reading = _timed(_read, case, out, modalities, overwrite)
    prediction, predicting = _timed(predictor.predict, volume)
    return _write(case, predictor, out, weights, preview, volume, prediction, reading + predicting)


def segment_cases(
    cases: Sequence[Case],
    predictor: VolumePredictor,
    out: Path,
    *,
    weights: str,
    preview: bool = False,
    modalities: tuple[str, ...] | None = None,
    overwrite: bool = False,
) -> Iterator[tuple[Case, dict | Exception]]:
    """Segments many cases: the next one is read and the former one written meanwhile.

    At most three volumes are in memory: one read ahead, one at work, one being written. Where the
    C library is glibc and MALLOC_MMAP_THRESHOLD_ is not set, the process's threshold for mapping
    arrays one by one becomes 16 MiB, so that their memory goes back.

    Args:
        cases, predictor, out, weights, preview, modalities, overwrite: As for `segment_case`.

    Yields:
        Each case, in order, with its report once it is written, or the error that ended it.
    """
    _return_freed_volumes()
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:

        def read(case: Case) -> Future:
            return reader.submit(_timed, _read, case, out, modalities, overwrite)

        ahead = read(cases[0]) if cases else None
        written: tuple[Case, Future] | None = None
        for index, case in enumerate(cases):
            assert ahead is not None
            current, ahead = ahead, None
            current.exception()
            if index + 1 < len(cases):
                ahead = read(cases[index + 1])
            outcome = _predict(case, predictor, current)
            del current
            if written is not None:
                yield written[0], _outcome(written[1])
            written = case, writer.submit(
                _write_or_raise, case, predictor, out, weights, preview, outcome
            )
            del outcome
        if written is not None:
            yield written[0], _outcome(written[1])


def _return_freed_volumes() -> None:
    """Has glibc hand memory of volumes back as soon as they are freed.

    Its bound for that rises with what is freed, to 32 MiB, and the arenas of the reading threads
    then keep a few hundred MB more than is in use.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(-3, _OWN_MAPPING)  # M_MMAP_THRESHOLD of malloc.h


def _predict(
    case: Case, predictor: VolumePredictor, reading: Future
) -> tuple[Volume, Prediction, float] | Exception:
    """Returns (volume, prediction, seconds so far), or the error that ended the case."""
    try:
        volume, seconds = reading.result()
        prediction, predicting = _timed(predictor.predict, volume)
    except CASE_ERRORS as error:
        return error
    return volume, prediction, seconds + predicting


def _write_or_raise(
    case: Case,
    predictor: VolumePredictor,
    out: Path,
    weights: str,
    preview: bool,
    outcome: tuple[Volume, Prediction, float] | Exception,
) -> dict:
    if isinstance(outcome, Exception):
        raise outcome
    return _write(case, predictor, out, weights, preview, *outcome)


def _outcome(writing: Future) -> dict | Exception:
    try:
        return writing.result()
    except CASE_ERRORS as error:
        return error


def _timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    began = time.perf_counter()
    return function(*arguments), time.perf_counter() - began


def _read(
    case: Case, out: Path, modalities: tuple[str, ...] | None, overwrite: bool
) -> Volume:
    results = _results(case, out)
    labels = results[0]
    kept = case.paths if case.label is None else [*case.paths, case.label]
    if labels.resolve() in [file.resolve() for file in kept]:
        raise VolumeError(f"{labels}: belongs to the input itself; name another folder with -o")
    with write_errors(labels):
        there = [path for path in results if path.exists()]
        foreign = [] if overwrite or is_result(labels) else there
    if foreign:
        raise VolumeError(
            f"{foreign[0]}: was not written by meddanet; name another folder with -o, "
            "or replace it with --overwrite"
        )
    return load_volume(case, unnamed_channels(case, modalities))


def _write(
    case: Case,
    predictor: VolumePredictor,
    out: Path,
    weights: str,
    preview: bool,
    volume: Volume,
    prediction: Prediction,
    seconds: float,
) -> dict:
    """Writes labels, picture and report; returns the report."""
    labels, report, picture = _results(case, out)
    with _marked(labels):
        # the report marks a case as finished, so an old one goes first and the new one comes last
        if has_report(labels):
            picture.unlink(missing_ok=True)
            report.unlink()
        _, writing = _timed(save_volume, prediction.labels, labels, volume)
        if preview:
            write_preview(volume, prediction, picture)
        content = case_report(
            volume, prediction, seconds + writing,
            weights=weights, device=str(predictor.device), executor=predictor.engine.executor,
            threads=torch.get_num_threads(),
        )
        write_json(content, report)
    return content


@contextmanager
def _marked(labels: Path) -> Iterator[None]:
    """Marks results as meddanet's while they have no report; a killed process leaves the mark."""
    mark = unfinished_mark(labels)
    with write_errors(labels):
        mark.touch()
        try:
            yield
        finally:
            if has_report(labels) or not labels.exists():
                mark.unlink(missing_ok=True)
