"""Locks of folders that several runs may want at once."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


# as `storage.Staged` names what a run writes into such folders: no other program's files
_PARTIAL = re.compile(r"\..+\.(json|jsonl|npy|pt|safetensors)\.[0-9a-f]+\.partial")


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
    for leftover in lock.parent.glob(".*.partial"):
        if _PARTIAL.fullmatch(leftover.name):
            leftover.unlink(missing_ok=True)
    return stream


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Lets one process at a time into its context, for a folder; the others wait.

    No file is made. Where the platform or the file system has no such locks, nobody waits.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
