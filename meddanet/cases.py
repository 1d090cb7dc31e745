"""The cases of a run: which there are, which are finished; their volumes, read ahead of the work.

Nothing here imports torch, which takes a second: a command reads its first case meanwhile.
"""

from __future__ import annotations

import ctypes
import os
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from .data import Case, Volume, VolumeError, case_from_files, load_volume
from .data.conventions import Survey, survey
from .data.sources import unnamed_channels
from .data.storage import has_report, is_edited, is_result, write_errors

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
            if not source:
                raise VolumeError(
                    "INPUT is empty; name a folder or a file, . for the current folder"
                )
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
    named = re.fullmatch(r"[\w-]+", key)
    return bool(equals and named) and not Path(text).exists()


def _named_case(pairs: list[list[str]]) -> Case:
    repeated = {key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1}
    if repeated:
        raise VolumeError(f"named files: {', '.join(repeated)} is named twice; expected once")
    if empty := [key for key, path in pairs if not path]:
        raise VolumeError(
            f"named files: {', '.join(empty)} is empty; expected a file, {empty[0]}=a.nii.gz"
        )
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
    labels, _, picture = result_paths(case, out)
    wanted = [labels, *([picture] if preview else [])]
    return has_report(labels) and all(path.is_file() for path in wanted)


def result_paths(case: Case, out: Path) -> tuple[Path, Path, Path]:
    """Returns the labels, the report and the picture of a case."""
    labels, report, picture = (out / f"{case.name}{end}" for end in (".nii.gz", ".json", ".png"))
    return labels, report, picture


class Reading(NamedTuple):
    """A case that was read: its volume, and how many seconds that took."""

    volume: Volume
    seconds: float


def read_case(
    case: Case, out: Path, modalities: tuple[str, ...] | None = None, overwrite: bool = False
) -> Reading:
    """Reads a case whose results may be written.

    Args:
        case: From `gather_cases` or `find_cases`.
        out: Folder of the results.
        modalities: What the channels are, in file order; needed where the naming does not tell.
        overwrite: Whether results may take the place of files that are not meddanet's.

    Raises:
        VolumeError: If the case is bad, or its results would take the place of its own files, of
            others that meddanet did not write, or of labels that were changed since.
    """
    began = time.perf_counter()
    results = result_paths(case, out)
    labels = results[0]
    kept = case.paths if case.label is None else [*case.paths, case.label]
    if labels.resolve() in [file.resolve() for file in kept]:
        raise VolumeError(f"{labels}: belongs to the input itself; name another folder with -o")
    with write_errors(labels):
        there = [path for path in results if path.exists()]
        foreign = [] if overwrite or is_result(labels) else there
        edited = not overwrite and is_edited(labels)
    if edited:
        raise VolumeError(
            f"{labels}: was changed after meddanet wrote it; name another folder with -o, "
            "or replace it with --overwrite"
        )
    if foreign:
        raise VolumeError(
            f"{foreign[0]}: was not written by meddanet; name another folder with -o, "
            "or replace it with --overwrite"
        )
    volume = load_volume(case, unnamed_channels(case, modalities))
    return Reading(volume, time.perf_counter() - began)


class ReadAhead:
    """Reads cases in turn, one ahead of the one that is at work; the first one at once.

    Leaving its context waits for what is being read, unless an error leaves it.

    Where the C library is glibc and MALLOC_MMAP_THRESHOLD_ is not set, the process's threshold for
    mapping arrays one by one becomes 16 MiB, so that their memory goes back.

    Args:
        cases, out, modalities, overwrite: As for `read_case`.

    Attributes:
        out: As given.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        out: Path,
        modalities: tuple[str, ...] | None = None,
        overwrite: bool = False,
    ) -> None:
        _return_freed_volumes()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="meddanet-read")
        self._waiting = iter(cases)
        self.out, self._options = out, (modalities, overwrite)
        self._ahead = self._read_next()

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # an error is told at once, however slow the disk
        self._pool.shutdown(wait=kind is None, cancel_futures=True)

    def _read_next(self) -> tuple[Case, Future[Reading]] | None:
        case = next(self._waiting, None)
        return None if case is None else (
            case, self._pool.submit(read_case, case, self.out, *self._options)
        )

    def __iter__(self) -> Iterator[tuple[Case, Future[Reading]]]:
        """Yields each case, in order and once, when its reading has ended, well or not."""
        while self._ahead is not None:
            current, self._ahead = self._ahead, None
            current[1].exception()
            self._ahead = self._read_next()
            yield current
            del current


def _return_freed_volumes() -> None:
    """Has glibc hand memory of volumes back as soon as they are freed.

    Its bound for that rises with what is freed, to 32 MiB, and the arenas of the reading threads
    then keep a few hundred MB more than is in use.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(-3, _OWN_MAPPING)  # M_MMAP_THRESHOLD of malloc.h
