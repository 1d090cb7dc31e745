"""Locks of folders that several runs may want at once."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


# as `storage.Staged` names what a run writes: no other program's files
_PARTIAL = r"\..+\.({})\.[0-9a-f]+\.partial"
_TRAINING = "json", "jsonl", "npy", "pt", "safetensors"
_SEGMENTING = r"nii\.gz", "png", "unfinished"
# in seconds; what is done alone in a folder takes a fraction, and who holds it longer is no run
_PATIENCE = 30.0
_DAY = 86400.0


def hold(lock: Path, *, wait: bool = False) -> AbstractContextManager[object]:
    """Takes the lock of a folder, then clears what killed writers left there.

    It is let go when the context, or the process, ends. Where the platform or the file system has
    no locks, nothing is held and nothing cleared.

    Args:
        lock: A file in the folder; made where there is none, and it stays.
        wait: Whether to wait for another process that holds it.

    Raises:
        BlockingIOError: If another process holds it and `wait` is False.
        OSError: If there can be no such file.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        return nullcontext()
    if lock.exists() and not lock.is_file():
        raise OSError(errno.EINVAL, "is no regular file", str(lock))
    stream = lock.open("ab")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        stream.close()
        raise
    except OSError:
        stream.close()
        return nullcontext()
    # what `segment` writes, which holds no such lock, may be at work
    _clear(lock.parent, _TRAINING, 0)
    return stream


def clear_leftovers(folder: Path, days: float) -> None:
    """Removes from a folder what killed runs had begun to write so many days ago, or longer."""
    _clear(folder, (*_TRAINING, *_SEGMENTING), days)


def _clear(folder: Path, endings: tuple[str, ...], days: float) -> None:
    wanted = re.compile(_PARTIAL.format("|".join(endings)))
    for leftover in folder.glob(".*.partial"):
        # another run may be as far as to remove it, too
        with suppress(OSError):
            old = time.time() - leftover.stat().st_mtime >= days * _DAY
            if old and wanted.fullmatch(leftover.name):
                leftover.unlink(missing_ok=True)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Lets one process at a time into its context, for a folder; others wait, but not for ever.

    No file is made. Where the platform or the file system, such as NFS, has no locks of folders,
    nobody waits.
    """
    handle = None
    try:
        # one that may not be listed has no lock, either
        with suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            _wait_for(handle)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _wait_for(handle: int) -> None:
    """Takes a lock that is to be had before the patience ends; raises OSError of those without."""
    until = time.monotonic() + _PATIENCE
    while fcntl is not None and time.monotonic() < until:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.005)
