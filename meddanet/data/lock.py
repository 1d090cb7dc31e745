"""Locks of folders that several runs may want at once."""

from __future__ import annotations

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


# as `storage.Staged` names what a run writes into such folders: no other program's files
_PARTIAL = re.compile(
    r"\..+\.(json|jsonl|npy|pt|safetensors|nii\.gz|png|unfinished)\.[0-9a-f]+\.partial"
)
# what `segment` writes, which holds no such lock, may be at work
_RESULT = re.compile(r".+\.(nii\.gz|png|unfinished)\.[0-9a-f]+\.partial")
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
    stream = lock.open("ab")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        stream.close()
        raise
    except OSError:
        stream.close()
        return nullcontext()
    clear_leftovers(lock.parent)
    return stream


def clear_leftovers(folder: Path, days: float = 0) -> None:
    """Removes from a folder what killed runs had begun to write, so many days ago or longer."""
    for leftover in folder.glob(".*.partial"):
        # another run may be as far as to remove it, too
        with suppress(OSError):
            old = time.time() - leftover.stat().st_mtime >= days * _DAY
            ours = _PARTIAL.fullmatch(leftover.name) is not None
            if old and ours and (days or not _RESULT.fullmatch(leftover.name)):
                leftover.unlink(missing_ok=True)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Lets one process at a time into its context, for a folder; others wait, but not for ever.

    No file is made. Where the platform or the file system, such as NFS, has no locks of folders,
    nobody waits.
    """
    handle = _locked(folder)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _locked(folder: Path) -> int | None:
    """Returns a handle that holds a folder's lock, if it is to be had; None if there is none."""
    if fcntl is None:
        return None
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            if time.monotonic() > until:
                return handle
            time.sleep(0.005)
        except OSError:
            return handle
