"""What glibc does with freed memory: what goes back to the system, and what is kept.

Both of its bounds rise with what a process frees, and a network's maps, freed and asked for again
by every operation, keep crossing them: then the system clears each page anew. A bound that is set
stays, and so does the other one, which starts at 128 KiB, so that both are set here.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
# by which a user sets the bounds
VARIABLES = "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"


def keep_freed_memory() -> None:
    """Keeps arrays up to 32 MiB that are freed: for a process that does one thing and ends."""
    _set(own_mapping=32 << 20, kept=1 << 30)  # older glibc allow no larger arrays


def return_freed_volumes() -> None:
    """Hands back arrays of 16 MiB and more as soon as they are freed, and keeps smaller ones.

    Else the arenas of reading threads keep a few hundred MB of volumes that nobody uses. Each
    thread's arena keeps up to 64 MiB so: 0.1 GB more in all, in a folder run.
    """
    _set(own_mapping=16 << 20, kept=64 << 20)


def _set(own_mapping: int, kept: int) -> None:
    """Sets both bounds, unless the user has; where malloc is not glibc's, nothing happens."""
    if any(name in os.environ for name in VARIABLES):
        return
    with suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, own_mapping)
        mallopt(_TRIM_THRESHOLD, kept)
