"""Which kernels a launch needs: listed for GPUs that are not at hand, asked before a first run.

Every `*_triton.py` that launches has `shape_classes()`: the launches of the shipped models, made by
its own launchers on meta tensors. They run here under a stand-in for Triton's driver that names an
architecture, and the JIT, stopped where it would compile, tells what it would have looked up. So
the list cannot differ from what the launchers do, nor a key from the JIT's.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One kernel specialised for one kind of call, as the JIT would compile it.

    Attributes:
        shape_class: The launch it belongs to, a key of `shape_classes()`.
        source: Triton's `ASTSource`: function, argument types, constants, divisibilities.
        target: Triton's `GPUTarget`.
        options: The backend's options: warps, stages, ...
        key: The folder in which the JIT's cache keeps it.
    """

    shape_class: str
    source: Any
    target: Any
    options: dict[str, Any]
    key: str

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.source.name

    @property
    def arch(self) -> int:
        """The architecture, 89 for sm_89."""
        return self.target.arch

    @property
    def constants(self) -> dict[str, Any]:
        """The constants by the names of the kernel's arguments."""
        names = self.source.fn.arg_names
        return {names[path[0]]: value for path, value in self.source.constants.items()}

    def compile(self) -> Any:
        """Compiles it, or finds it compiled; returns Triton's `CompiledKernel`."""
        import triton

        return triton.compile(self.source, target=self.target, options=self.options)


class _Driver:
    """What the JIT asks of its driver before it compiles; the device's number is the arch."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_device(self) -> int:
        # a number of its own, since the JIT remembers the target per device
        return self._target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target


# driver and hook are the process's: one thread at a time puts its own there and takes it away
_replacing = threading.RLock()


@contextmanager
def _pretended(target: Any) -> Iterator[None]:
    """Has the JIT take a target for the GPU of this machine."""
    from triton.runtime.driver import driver

    with _replacing:
        # the property `active` would look for a GPU
        active = driver._active
        driver.set_active(_Driver(target))
        try:
            yield
        finally:
            driver.set_active(active)


@contextmanager
def _stopped_jit(seen: Callable[[Any, dict[str, Any]], None]) -> Iterator[None]:
    """Makes this thread's launches call `seen(kernel, facts)` instead of compiling and running."""
    from triton import knobs

    with _replacing:
        thread, previous = threading.get_ident(), knobs.runtime.jit_cache_hook

        def hook(*, fn: Any, compile: dict[str, Any], **others: Any) -> bool:
            if threading.get_ident() != thread:
                return previous is not None and bool(previous(fn=fn, compile=compile, **others))
            seen(fn.jit_function, compile)
            return True

        knobs.runtime.jit_cache_hook = hook
        try:
            yield
        finally:
            knobs.runtime.jit_cache_hook = previous


def record(arch: int, shape_class: str, launch: Callable[[], object]) -> list[Variant]:
    """Returns the variants that `launch()` has the JIT look up on an architecture, each once.

    Nothing is compiled or run: results of launches are whatever their memory held.
    """
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", arch, 32)
    with _pretended(target):
        return uncompiled(target, launch, shape_class)


def uncompiled(
    target: Any, launch: Callable[[], object], shape_class: str = ""
) -> list[Variant]:
    """Returns the variants that `launch()` lacks in this process, each once.

    Args:
        target: Triton's `GPUTarget` that its driver names.
        launch: Its launches in this thread are not run but for kernels that have been before:
            their results are whatever their memory held.
        shape_class: What the variants belong to.
    """
    from triton.compiler import ASTSource

    found = {}

    def seen(kernel: Any, facts: dict[str, Any]) -> None:
        # the only place where the JIT tells all its options; what is a list was a tuple
        options = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in json.loads(facts["specialization_data"])["options"].items()
        }
        source = ASTSource(kernel, facts["signature"], facts["constants"], facts["configs"][0])
        key = _key(source, target, options)
        found[key] = Variant(shape_class, source, target, options, key)

    with _stopped_jit(seen):
        launch()
    return list(found.values())


def _key(source: Any, target: Any, options: dict[str, Any]) -> str:
    """Returns the name of the folder in which the JIT's cache keeps the compiled kernel."""
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler.compiler import make_backend
    from triton.runtime.cache import _base32, get_cache_key

    backend = make_backend(target)
    parsed = backend.parse_options(dict(options))
    key = get_cache_key(source, backend, parsed, env_vars=get_cache_invalidating_env_vars())
    return _base32(hashlib.sha256(key.encode("utf-8")).hexdigest())


def shape_classes() -> dict[str, Callable[[], object]]:
    """Returns the shape classes of every `*_triton.py` that launches kernels."""
    classes: dict[str, Callable[[], object]] = {}
    for path in sorted(Path(__file__).parent.glob("*_triton.py")):
        module = import_module(f".{path.stem}", __package__)
        classes |= getattr(module, "shape_classes", dict)()
    return classes


def variants(arch: int) -> list[Variant]:
    """Returns every variant that the shipped models use on an architecture, each once.

    Raises:
        ValueError: If triton is missing, or interprets instead of compiling.
    """
    check_triton()
    found: dict[str, Variant] = {}
    for name, launch in shape_classes().items():
        for variant in record(arch, name, launch):
            found.setdefault(variant.key, variant)
    return list(found.values())


def check_triton() -> None:
    """Raises ValueError, with the cure, unless triton is there and compiles."""
    if find_spec("triton") is None:
        raise ValueError("compiling kernels needs the package triton: pip install triton")
    from triton import knobs

    if knobs.runtime.interpret:
        raise ValueError(
            "TRITON_INTERPRET=1 interprets kernels instead of compiling them: unset it"
        )
