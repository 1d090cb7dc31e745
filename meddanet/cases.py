"""The cases of a run: which there are, which are finished; their volumes, read ahead of the work.

Nothing here imports torch, which takes a second: a command reads its first case meanwhile.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from .data import Case, Volume, VolumeError, case_from_files, load_volume
from .data.conventions import cases_among, stem
from .data.results import check_kept, digest, result_paths
from .data.sources import unnamed_channels
from .data.storage import read_errors, write_errors
from .data.survey import Survey, survey
from .heap import return_freed_volumes


def gather_cases(inputs: Sequence[str]) -> tuple[list[Case], list[ValueError]]:
    """Finds the cases of all inputs.

    Args:
        inputs: Case folders, folders of cases and image files; named files, `flair=a.nii.gz`,
            together make one case, and so do other files of one case that lie in one folder.

    Returns:
        The cases, each once however often it is named, and one error per input that holds none, or
        files that belong to none, or whose case has the name of another one.
    """
    cases: dict[str, Case] = {}
    errors: list[ValueError] = []
    taken: set[tuple[str, Path]] = set()
    for group in _groups(inputs):
        try:
            found = _survey(group)
        except ValueError as error:
            errors.append(error)
            continue
        if line := found.left_out(group[0]):
            errors.append(VolumeError(line))
        for case in [case for case in found.cases if not _parts(case) <= taken]:
            taken |= _parts(case)
            if _parts(cases.setdefault(case.name, case)) <= _parts(case):
                cases[case.name] = case
            else:
                errors.append(VolumeError(
                    f"{case.folder}: case {case.name} has the name of the one in "
                    f"{cases[case.name].folder}; expected different names in one output folder"
                ))
    return list(cases.values()), errors


def _groups(inputs: Sequence[str]) -> list[list[str]]:
    """Puts together the inputs that may be of one case: named files, and files of one folder."""
    groups: dict[str | Path | None, list[str]] = {}
    for text in inputs:
        path, key = Path(text), None if _is_named_file(text) else text
        groups.setdefault(path.parent.resolve() if path.is_file() else key, []).append(text)
    return list(groups.values())


def _survey(group: list[str]) -> Survey:
    """Finds the cases of a folder, of files of one folder, or of named files."""
    text, paths = group[0], {Path(text).name: Path(text) for text in group}
    if not text:
        raise VolumeError("INPUT is empty; name a folder or a file, . for the current folder")
    if _is_named_file(text):
        return Survey([_named_case([text.split("=", 1) for text in group])])
    if not Path(text).is_file():
        return survey(text)
    cases = cases_among(list(paths.values()), Path(text).parent)
    used = {path for case in cases for path in (*case.paths, *case.doubled, case.label)}
    others = [Case(stem(path), path, "files") for path in paths.values() if path not in used]
    return Survey(cases + others)


def _parts(case: Case) -> set[tuple[str, Path]]:
    """Returns the images and what each is of, however their folder was named."""
    files = {"": case.files} if isinstance(case.files, Path) else case.files
    return {(kind, path.parent.resolve() / path.name) for kind, path in files.items()}


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
    probe = folder / f".meddanet-write-test-{secrets.token_hex(4)}"
    try:
        if folder.is_symlink() and not folder.exists():
            raise VolumeError(f"{folder}: is a link that leads nowhere; name another with --out")
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch(exist_ok=False)
        # another user of the folder may clear it
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise VolumeError(
            f"{folder}: cannot write there ({error.strerror}); name another folder with --out"
        ) from error
    return folder


class Reading(NamedTuple):
    """A case that was read: its volume, what its files were, and how many seconds that took."""

    volume: Volume
    images: dict[str, str]
    seconds: float


def image_digests(case: Case) -> dict[str, str]:
    """Returns the SHA-256 of every image file by what it is of; "all" if it is of everything.

    Names and times tell less: files are moved, and those of two patients may agree in both. All
    bytes of a BraTS case, 10 MB, take 14 ms, and plain files have no checksum at their end.

    Raises:
        VolumeError: If one cannot be read.
    """
    files = {"all": case.files} if isinstance(case.files, Path) else case.files
    digests = {}
    for kind, path in files.items():
        with read_errors(path):
            digests[kind] = digest(path)
    return digests


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
    results = result_paths(case.name, out)
    labels = results[0]
    own = case.paths if case.label is None else [*case.paths, case.label]
    if labels.resolve() in [file.resolve() for file in own]:
        raise VolumeError(f"{labels}: belongs to the input itself; name another folder with -o")
    if not overwrite:
        with write_errors(labels):
            check_kept(results)
    volume = load_volume(case, unnamed_channels(case, modalities))
    return Reading(volume, image_digests(case), time.perf_counter() - began)


class ReadAhead:
    """Reads cases in turn, one ahead of the one that is at work; the first one at once.

    Leaving its context waits for what is being read, unless an error leaves it.

    Where the C library is glibc and MALLOC_MMAP_THRESHOLD_ is not set, the process's threshold for
    mapping arrays one by one becomes 16 MiB, so that their memory goes back.

    Args:
        cases, out, modalities, overwrite: As for `read_case`.
        is_finished: Tells whether another process has finished a case meanwhile, which then is not
            read: its reading is None.

    Attributes:
        out: As given.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        out: Path,
        modalities: tuple[str, ...] | None = None,
        overwrite: bool = False,
        is_finished: Callable[[Case], bool] | None = None,
    ) -> None:
        return_freed_volumes()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="meddanet-read")
        self._waiting = iter(cases)
        self.out, self._options, self._is_finished = out, (modalities, overwrite), is_finished
        self._ahead = self._read_next()

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # an error is told at once, however slow the disk
        self._pool.shutdown(wait=kind is None, cancel_futures=True)

    def _read_next(self) -> tuple[Case, Future[Reading | None]] | None:
        case = next(self._waiting, None)
        return None if case is None else (case, self._pool.submit(self._read, case))

    def _read(self, case: Case) -> Reading | None:
        if self._is_finished is not None and self._is_finished(case):
            return None
        return read_case(case, self.out, *self._options)

    def __iter__(self) -> Iterator[tuple[Case, Future[Reading | None]]]:
        """Yields each case, in order and once, when its reading has ended, well or not."""
        while self._ahead is not None:
            current, self._ahead = self._ahead, None
            current[1].exception()
            self._ahead = self._read_next()
            yield current
            del current
