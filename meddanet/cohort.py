"""What becomes of a run's cases: predicted, written, one's error no other's."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from .cases import ReadAhead, Reading, read_case
from .data import Case, VolumeError, save_volume
from .data.lock import alone_in
from .data.results import check_kept, digest, is_result, marked, report_of, result_paths
from .data.storage import Staged, write_json
from .finished import Request, is_finished
from .predictor import Prediction, VolumePredictor
from .preview import write_preview
from .report import case_report

# what may be wrong with one case while the others go on
# (PyTorch's and OpenVINO's own errors, memory that is not there among them, are RuntimeErrors)
CASE_ERRORS = (ValueError, OSError, MemoryError, RuntimeError)

# what was read, what was found in it, and the seconds that reading and predicting took
_Predicted = tuple[Reading, Prediction, float]


def segment_case(
    case: Case, predictor: VolumePredictor, out: Path, *, preview: bool = False, **run: object
) -> dict:
    """Segments one case into `<out>/<case>.nii.gz`, `.json` and, with a preview, `.png`.

    Args:
        case: From `find_cases`.
        predictor: The model.
        out: An existing folder.
        preview: Whether to draw the picture.
        **run: What the report says of the run, such as the name of the weights.

    Returns:
        The report; its "file_to_file" is reading, predicting and writing the labels.

    Raises:
        VolumeError: As for `read_case`.
    """
    outcome = _predict(predictor, read_case(case, out))
    return _write(case, predictor, out, run, preview, None, outcome)


def segment_cases(
    readings: ReadAhead, predictor: VolumePredictor, *, preview: bool = False,
    asked: Request | None = None, **run: object,
) -> Iterator[tuple[Case, dict | Exception]]:
    """Segments many cases: the next one is read and the former one written meanwhile.

    At most three volumes are in memory: one read ahead, one at work, one being written.

    Args:
        readings: The cases; results go to its `out`.
        predictor, preview, **run: As for `segment_case`.
        asked: What results that another run wrote meanwhile must be of to stay and count as the
            case's; others are its error. None: they are replaced.

    Yields:
        Each case, in order, with its report once it is written, or the error that ended it.
    """
    with ThreadPoolExecutor(1) as writer:
        written: tuple[Case, Future] | None = None
        for case, reading in readings:
            outcome: _Predicted | Exception | None
            try:
                outcome = _predict(predictor, reading.result())
            except CASE_ERRORS as error:
                outcome = error
            del reading
            if written is not None:
                yield written[0], _outcome(written[1])
            written = case, writer.submit(
                _write, case, predictor, readings.out, run, preview, asked, outcome
            )
            del outcome
        if written is not None:
            yield written[0], _outcome(written[1])


def _predict(predictor: VolumePredictor, reading: Reading | None) -> _Predicted | None:
    if reading is None:
        return None
    began = time.perf_counter()
    prediction = predictor.predict(reading.volume)
    return reading, prediction, reading.seconds + time.perf_counter() - began


def _outcome(writing: Future) -> dict | Exception:
    try:
        return writing.result()
    except CASE_ERRORS as error:
        return error


def _write(
    case: Case,
    predictor: VolumePredictor,
    out: Path,
    run: Mapping[str, object],
    preview: bool,
    asked: Request | None,
    outcome: _Predicted | Exception | None,
) -> dict:
    """Writes labels, picture and report, which replace earlier ones at once; returns the report.

    Without an outcome another process has written all that.

    Raises:
        Exception: The outcome, if it is one.
        VolumeError: If what another process has written is gone.
    """
    if isinstance(outcome, Exception):
        raise outcome
    if outcome is None:
        if there := report_of(result_paths(case.name, out)[0]):
            return there
        raise VolumeError(
            f"{case.name}: another process had finished it, and its results are gone; run it again"
        )
    reading, prediction, seconds = outcome
    volume = reading.volume
    labels, report, picture = results = result_paths(case.name, out)
    with Staged() as staged:
        began = time.perf_counter()
        save_volume(prediction.labels, labels, volume, staged.write)
        seconds += time.perf_counter() - began
        if preview:
            write_preview(
                volume, prediction, picture, write=staged.write, window_hu=predictor.window_hu
            )
        content = case_report(
            volume, prediction, seconds,
            **run, device=str(predictor.device), executor=predictor.engine.executor,
            threads=torch.get_num_threads(),
        )
        content["images_sha256"] = reading.images
        content["labels_sha256"] = sha256 = digest(staged.partials[labels])
        write_json(content, report, staged.write)
        with alone_in(out):
            if asked is not None:
                check_kept(results)
                if is_finished(case, out, asked):
                    return report_of(labels)
            # of labels that are replaced
            stale = not preview and is_result(labels)
            with marked(labels, sha256):
                staged.appear()
                if stale:
                    picture.unlink(missing_ok=True)
    return content
