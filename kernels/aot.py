"""Compiles kernels ahead of time, without GPU or driver, into what Triton's JIT finds at run time.

    MEDDANET_CUDA_ARCHS="8.6;8.9" pip install --no-build-isolation .
    meddanet info --kernels --build 8.6,8.9

Both end in `build`. `variants.py` lists what is compiled, `precompiled.py` says where entries lie
and has the JIT look there first.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from .precompiled import PACKAGED, entries, folders, user_folder
from .side_by_side import compile_in_threads
from .variants import Variant, check_triton, variants

# compute capabilities with int8 tensor cores that Triton compiles for
ARCHITECTURES = ("8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "10.3", "12.0", "12.1")


def parse_archs(text: str) -> list[int]:
    """Turns "8.6;8.9", with semicolons, commas or blanks, into [86, 89].

    Raises:
        ValueError: If an architecture is unknown or none is named.
    """
    known = f"known are {', '.join(ARCHITECTURES)}"
    names = [name for name in re.split(r"[;,\s]+", text) if name]
    for name in names:
        if name not in ARCHITECTURES:
            raise ValueError(f"unknown CUDA architecture {name!r}; {known}")
    if not names:
        raise ValueError(f"no CUDA architecture named; {known}")
    return sorted({int(name.replace(".", "")) for name in names})


@contextmanager
def _scratch_cache() -> Iterator[None]:
    """Gives Triton an empty cache of its own, so that everything is compiled."""
    from triton import knobs
    from triton.runtime.cache import FileCacheManager

    with tempfile.TemporaryDirectory() as scratch, knobs.cache.scope():
        knobs.cache.dir, knobs.cache.manager_class = scratch, FileCacheManager
        yield


def compile_all(wanted: list[Variant], done: Callable[[Variant, Any], object]) -> None:
    """Compiles side by side, calls `done(variant, compiled)`; what fails is compiled again, alone.

    Raises:
        ValueError: If one does not compile; its name and architecture are told.
    """

    def again(variant: Variant) -> Any:
        try:
            return variant.compile()
        except Exception as error:
            raise ValueError(
                f"{variant.name} ({variant.shape_class}) does not compile for sm_{variant.arch}: "
                f"{type(error).__name__}: {error} {error.__cause__ or ''}"
            ) from error

    with _scratch_cache():
        failed = []
        with closing(compile_in_threads(wanted)) as results:
            for variant, compiled in results:
                if compiled is None:
                    failed.append(variant)
                else:
                    done(variant, compiled)
        for variant in failed:
            done(variant, again(variant))


def build(
    archs: list[int],
    folder: Path | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Path:
    """Compiles all variants for these architectures into a folder, replacing older entries.

    Args:
        archs: Such as [86, 89].
        folder: One of `folders`; None = the package's own if it can be written, else the user's.
        progress: Called after each kernel with (done, total).

    Returns:
        The folder.

    Raises:
        ValueError: If a kernel does not compile or triton is missing.
    """
    folder = folder or writable_folder()
    wanted = [variant for arch in archs for variant in variants(arch)]
    keys: set[str] = set()
    from triton import __version__

    def keep(variant: Variant, compiled: Any) -> None:
        _store(folder / __version__ / variant.key, variant.name, compiled)
        keys.add(variant.key)
        progress(len(keys), len(wanted))

    compile_all(wanted, keep)
    for entry in entries(folder):
        # what an earlier version of a kernel has left
        if entry.triton == __version__ and entry.arch in archs and entry.key not in keys:
            shutil.rmtree(entry.path)
    return folder


def _store(path: Path, name: str, compiled: Any) -> None:
    """Writes what the JIT loads of a kernel, all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=".partial-"))
    for ending in ("cubin", "json"):
        shutil.copy(compiled.metadata_group[f"{name}.{ending}"], partial)
    # mkdtemp lets only its owner in
    partial.chmod(0o755)
    shutil.rmtree(path, ignore_errors=True)
    os.replace(partial, path)


def writable_folder() -> Path:
    """Returns the package's folder of entries if it can be written, else the user's.

    Raises:
        ValueError: If the user has none.
    """
    place = PACKAGED if PACKAGED.exists() else PACKAGED.parent
    folder = PACKAGED if os.access(place, os.W_OK) else user_folder()
    if folder is None:
        raise ValueError(
            f"compiled kernels have no place: {place} cannot be written, and there is no home "
            "folder; set XDG_CACHE_HOME to a folder"
        )
    return folder


def listing() -> list[str]:
    """Returns lines that tell what is precompiled: folder, triton, architecture, kernels, counts.

    Of entries for the triton that runs, those that the kernels of this version still use count;
    an architecture is complete when nothing is left for the JIT to compile.

    Raises:
        ValueError: If triton is missing.
    """
    check_triton()
    from triton import __version__

    lines = []
    for folder in folders():
        groups: dict[tuple[str, int], list] = {}
        for entry in entries(folder):
            groups.setdefault((entry.triton, entry.arch), []).append(entry)
        for (version, arch), found in sorted(groups.items()):
            head = f"sm_{arch}, triton {version}, {folder}"
            if version != __version__:
                lines.append(f"{head}: {len(found)} kernels, unused: triton {__version__} runs")
                continue
            wanted = {variant.key: variant.name for variant in variants(arch)}
            counts = Counter(e.kernel for e in found if e.key in wanted)
            names = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
            lines.append(f"{head}: {sum(counts.values())} of {len(wanted)} kernels ({names})")
    return lines
