"""Kernels compiled ahead of time: where they lie, and how Triton's JIT comes to find them.

An entry is what the JIT itself would have cached, under the JIT's own key:

    <folder>/<version of triton>/<key>/<kernel>.cubin
    <folder>/<version of triton>/<key>/<kernel>.json

The key is a hash of the kernel's source, its arguments' types, the options, the architecture and
all of triton, so an entry can be out of date but never wrong. `aot.py` writes entries; here they
are only read, and what is not among them is compiled and cached as ever.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

PACKAGED = Path(__file__).resolve().parent / "compiled"


def user_folder() -> Path | None:
    """Returns the folder of entries that belong to the user, read after the package's own.

    None for a user without a home, as in a container, unless XDG_CACHE_HOME names a folder.
    """
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    return Path(base) / "meddanet" / "kernels"


def folders() -> tuple[Path, ...]:
    """Returns where entries may lie, in the order in which they are looked up."""
    return tuple(folder for folder in (PACKAGED, user_folder()) if folder is not None)


@dataclass(frozen=True)
class Entry:
    """One compiled kernel: its name, architecture (89 for sm_89), version of triton and folder."""

    kernel: str
    arch: int
    triton: str
    path: Path

    @property
    def key(self) -> str:
        """The JIT's own key."""
        return self.path.name


def entries(folder: Path) -> Iterator[Entry]:
    """Yields what lies in a folder of `folders`, for every version of triton."""
    found: list[Path] = []
    with suppress(OSError):
        found = sorted(folder.glob("[!.]*/[!.]*/*.json"))
    for path in found:
        facts = json.loads(path.read_text())
        yield Entry(path.stem, facts["target"]["arch"], path.parts[-3], path.parent)


def _versions() -> set[str]:
    found: set[str] = set()
    for folder in folders():
        # one that is not there, or another user's, holds nothing for us
        with suppress(OSError):
            found.update(path.name for path in folder.iterdir())
    return found


class _Overlay:
    """What the JIT takes for its cache: our entry if there is one, else the cache it would use."""

    def __init__(self, key: str, version: str, make_own: Callable[[], Any]) -> None:
        self._places = [folder / version / key for folder in folders()]
        self._make_own = make_own

    @cached_property
    def _own(self) -> Any:
        """The user's cache; made when needed, because that creates a folder."""
        return self._make_own()

    def get_group(self, filename: str) -> dict[str, str] | None:
        """Returns the paths of an entry's files by their names; None if it is in neither."""
        for place in self._places:
            with suppress(OSError):
                if (place / filename).is_file():
                    return {path.name: str(path) for path in place.iterdir()}
        return self._own.get_group(filename)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


_installed = False


def install(triton: Any) -> None:
    """Makes the JIT of this process look for entries first; says so if all are of another triton.

    Does nothing where there are none.
    """
    global _installed
    versions = _versions()
    if _installed or not versions:
        return
    _installed = True
    if triton.__version__ not in versions:
        logging.getLogger("meddanet").warning(
            "the kernels were compiled for triton %s, but triton %s runs: they compile on first "
            "use (meddanet info --kernels --build ARCHITECTURES does it once)",
            ", ".join(sorted(versions)), triton.__version__,
        )
        return
    cache = triton.knobs.cache
    own = cache.manager_class or triton.runtime.cache.FileCacheManager

    def manager(key: str, override: bool = False, dump: bool = False) -> Any:
        if override or dump:
            return own(key, override=override, dump=dump)
        return _Overlay(key, triton.__version__, lambda: own(key))

    cache.manager_class = manager
