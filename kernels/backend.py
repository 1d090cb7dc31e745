"""Which executor runs an operation: the one place that asks.

    auto        Triton on CUDA tensors where it launches, oneDNN's int8 convolutions on CPUs where
                they are exact, as a probe, run once per process, finds; plain PyTorch (the
                references) elsewhere
    triton      Triton; on CPU tensors only through its interpreter (TRITON_INTERPRET=1)
    onednn      oneDNN's int8 convolutions where an operation has them, the references elsewhere
    reference   plain PyTorch

The choice is read when an operation runs, in the backward pass too, and is one for all threads:
autograd's threads must see it.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import cache
from importlib import import_module
from subprocess import CalledProcessError
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .precompiled import install

BACKENDS = ("auto", "triton", "onednn", "reference")
VARIABLE = "MEDDANET_BACKEND"


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_chosen = _checked(os.environ.get(VARIABLE) or "auto", f"the environment variable {VARIABLE}")


class use_backend:  # noqa: N801, reads as a function, like torch.no_grad
    """Chooses what runs the package's operations: from now on, or inside a `with` block.

    The environment variable `MEDDANET_BACKEND` makes the first choice; without it that is "auto".

    Args:
        name: "auto", "triton", "onednn" or "reference", as the module's docstring says.

    Raises:
        ValueError: If there is no such backend. An operation raises it where "triton" cannot run.
    """

    def __init__(self, name: str) -> None:
        global _chosen
        self._previous, self._name = _chosen, _checked(name, "backend")
        _chosen = self._name

    def __enter__(self) -> None:
        """Chooses again what the constructor has chosen, for one that was kept."""
        global _chosen
        if _chosen != self._name:
            self._previous, _chosen = _chosen, self._name

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Goes back to the choice before."""
        global _chosen
        _chosen = self._previous


def chosen_backend() -> str:
    """Returns the choice in force: "auto", "triton", "onednn" or "reference"."""
    return _chosen


def import_fault(package: str, requirement: str) -> str:
    """Returns why a package cannot be imported, with the cure; "" if it can.

    Args:
        package: Its name.
        requirement: What to install for it.
    """
    try:
        import_module(package)
    except ImportError as error:
        if error.name == package and isinstance(error, ModuleNotFoundError):
            return f"{package} is not installed; pip install {requirement}"
        return f"{package} is damaged ({error}); pip install --force-reinstall {package}"
    return ""


@cache
def triton_fault(device: torch.device) -> str:
    """Returns why Triton launches no kernel on a GPU, with the cure; "" if it does.

    Raises:
        torch.OutOfMemoryError: If the GPU has no room for it now.
    """
    fault = import_fault("triton", "triton")
    if fault:
        return fault
    faults: tuple[type[Exception], ...] = (RuntimeError, OSError, *build_errors())
    try:
        _launch(device)
    except faults as error:
        told = " ".join(str(error).split())
        if "out of memory" in told:
            # which may pass, so that it is not kept
            raise torch.OutOfMemoryError(told) from error
        return f"triton launches nothing here ({told}); it needs a C compiler and Python's headers"
    return fault


def build_errors() -> tuple[type[Exception], ...]:
    """Returns what Triton, if it is there, raises where it cannot build or place a kernel."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return (CalledProcessError,)
    return CalledProcessError, TritonError


def _launch(device: torch.device) -> None:
    """Launches a kernel that does nothing, for which Triton builds its launcher."""
    import triton

    @triton.jit
    def nothing():
        pass

    # not on the first GPU, which may be full, or too old
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        # newer versions of Triton warn where this is not said
        nothing[(1,)](enable_fp_fusion=False)


def architecture(device: torch.device) -> int:
    """Returns what Triton compiles for, 90 for sm_90; 0 where there is no GPU.

    Args:
        device: Of a launch's tensors; no GPU's where a launch is recorded for one (`variants.py`).
    """
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    from triton.runtime.driver import driver

    # the property `active` would look for a GPU
    return driver._active.get_current_target().arch if driver._active else 0


def triton_runs(input: Tensor) -> bool:
    """Returns whether Triton, not the reference, computes on `input`.

    Raises:
        ValueError: If "triton" was asked for and cannot run here.
    """
    if _chosen == "auto":
        return input.is_cuda and not triton_fault(input.device)
    if _chosen != "triton":
        return False
    if fault := import_fault("triton", "triton"):
        raise ValueError(f"backend 'triton': {fault}")
    from triton import knobs

    if not input.is_cuda and not knobs.runtime.interpret:
        raise ValueError(
            f"backend 'triton' runs on CUDA tensors, got one on {input.device}; "
            "TRITON_INTERPRET=1 interprets it on the CPU"
        )
    return True


def onednn_runs(input: Tensor) -> bool:
    """Returns whether oneDNN's int8 convolutions compute on `input`.

    Raises:
        ValueError: If "onednn" was asked for and its sums are not exact on this CPU.
    """
    if _chosen not in ("auto", "onednn") or input.device.type != "cpu":
        return False
    from .onednn import is_exact

    if _chosen == "onednn" and not is_exact():
        raise ValueError(
            "backend 'onednn' needs a CPU with exact int8 sums (VNNI); on this one they are not "
            "exact: use 'reference'"
        )
    return is_exact()


class _Absent:
    """Stands in for triton and its language: any attribute, any decorator, no launch."""

    def __getattr__(self, name: str) -> _Absent:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> _Absent:
        return self

    def __getitem__(self, grid: Any) -> _Absent:
        raise ValueError("this operation's kernel needs the package triton: pip install triton")


def __getattr__(name: str) -> Any:
    """Hands out `triton` and `tl`, imported by the first kernel file, not with the package."""
    if name not in ("triton", "tl"):
        raise AttributeError(f"module {__name__} has no attribute {name}")
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return _Absent()
    install(triton)
    return {"triton": triton, "tl": tl}[name]
