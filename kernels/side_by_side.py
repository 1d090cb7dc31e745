"""Kernels that are about to be launched are compiled side by side, not one after the other.

Triton compiles a kernel where it is first launched, and what launches has to wait. A plan of the
shipped model has 46 kernels, more than a minute of one core's work.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from .variants import Variant, uncompiled


def compile_side_by_side(launch: Callable[[], object]) -> None:
    """Compiles, into Triton's own cache, what `launch()` launches on the current GPU.

    It is called once, and none of its kernels run but those that have been before in this process:
    it has to bear that, and its results mean nothing. What fails to compile is left for its launch
    to tell.

    Args:
        launch: Launches in this thread.

    Raises:
        torch.OutOfMemoryError: If `launch` does.
    """
    from triton import knobs
    from triton.runtime.driver import driver

    if knobs.compilation.always_compile:
        # what is compiled here would not be looked for
        return
    try:
        wanted = uncompiled(driver.active.get_current_target(), launch)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a Triton whose insides are others still compiles, if slowly
        logging.getLogger("meddanet").warning(
            "kernels compile one after the other: which ones cannot be told (%s: %s)",
            type(error).__name__, error,
        )
        return
    for _ in compile_in_threads(wanted):
        pass


def compile_in_threads(wanted: Sequence[Variant]) -> Generator[tuple[Variant, Any], None, None]:
    """Compiles in as many threads as there are processors; yields (variant, compiled) in order.

    Triton's front end keeps state of its own that two threads rarely, but do, spoil for each other:
    what fails, for whatever reason, is None and may do when it is compiled alone.
    """

    def work(variant: Variant) -> Any:
        try:
            return variant.compile()
        except Exception:
            return None

    pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="meddanet-compile")
    try:
        yield from zip(wanted, pool.map(work, wanted), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)
