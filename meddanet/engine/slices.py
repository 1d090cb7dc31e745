"""Slices one at a time, a thread each: what engines on a CPU share, whatever executes networks.

    seen? -> decide -> the decision's way -> labels

The small decision networks see slices by eights, always eight, blank ones making up the number.
After that every thread takes one slice at a time through the whole way: no barriers, activations
stay in the core's cache. An executor with threads of its own has two callers for each, so that none
idles while Python prepares the next slice. No result depends on a slice's neighbours.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..routing import RoutedSegmenter, Segmentation, check_shape
from .immovable import Immovable

Array = np.ndarray

DECISIONS = 8  # slices that are decided on at a time
NOT_FINITE = "slices hold NaN or infinite values; expected finite ones"

# the number of PyTorch's threads is the process's
_STARTING = threading.Lock()


class Deciding(Protocol):
    """A decision network as an executor runs it."""

    def decide(self, images: Array) -> Array:
        """Returns route logits [8, R] of images float32 [8, C, h, w] at the decision scale."""


class SliceEngine(Immovable, ABC):
    """Segments slices as a model's own `segment` does; see `compile_engine`.

    Args:
        model: In `eval()`, on the CPU.
        networks: Its networks, or at least the one that decides.
        executor: What runs them.
        threads: How many cores are at work.
        callers: How many slices are under way at a time.

    Attributes:
        executor: As given.
        passed_over: As for `Engine`.
        threads: As given.
    """

    passed_over = ""

    def __init__(
        self, model: RoutedSegmenter, networks: Deciding, executor: str, threads: int, callers: int
    ) -> None:
        self.executor, self.threads = executor, threads
        # its parts are found by name, of which type checkers know nothing
        self._model: Any = model
        self._networks: Any = networks
        self._process = os.getpid()
        self._pool = single_threaded_workers(threads)
        self._callers = self._pool if callers == threads else single_threaded_workers(callers)

    def segment(self, slices: Tensor) -> Segmentation:
        """Routes every slice and labels it.

        Args:
            slices: [N, C, H, W] on the CPU, H and W multiples of the stride, at least
                `smallest_side`; of any memory layout, contiguous float32 ones are not copied.

        Returns:
            A `Segmentation`.

        Raises:
            ValueError: If the shape does not fit, or a slice holds NaN or infinite values.
            RuntimeError: In a process that was forked after the engine was made.
        """
        if os.getpid() != self._process:
            raise RuntimeError(
                "this engine was made before the process was forked and its threads are not here; "
                "make one in each process, or start processes by spawn"
            )
        self._model.check(slices)
        self._prepare(*slices.shape[2:])
        result = Segmentation.skipped(slices, self._model.num_stages)
        images = slices.detach().float().contiguous().numpy()
        seen = np.flatnonzero(list(self._pool.map(holds_signal, images)))
        if not len(seen):
            return result
        views = self._views(images, seen)
        logits = self._in_batches(self._networks.decide, views, np.arange(len(seen)))
        check_shape("the deciding network", logits, (len(seen), len(self._model.routes)))
        routes = logits.argmax(1)
        result.decisions[seen] = torch.from_numpy(routes)
        self._locate(views, routes, seen, result)
        parts = [part.numpy() for part in result]

        def run(index: int) -> None:
            self._segment(images[index], *(part[index] for part in parts))

        list(self._callers.map(run, seen[routes > 0]))
        return result

    def _prepare(self, height: int, width: int) -> None:  # noqa: B027  (nothing by default)
        """Gets ready for slices of a size, beside other work."""

    def _locate(  # noqa: B027  (nothing to do without crops)
        self, views: Sequence[Array], routes: Array, seen: Array, result: Segmentation
    ) -> None:
        """Fills in the offsets of cropped slices, given the views and routes of those `seen`."""

    @abstractmethod
    def _segment(
        self, image: Array, labels: Array, route: int, offset: Array, num_bits: Array
    ) -> None:
        """Fills in labels [H, W] and widths [S] of one slice [C, H, W] that is not skipped."""

    def _views(self, images: Array, indices: Array) -> Sequence[Array]:
        """Returns what the decision networks see of the images at N indices, N of [C, h, w]."""
        scale = self._model.decision_scale
        if scale == 1:
            return [images[index] for index in indices]
        return list(self._pool.map(lambda index: shrink(images[index], scale), indices))

    def _in_batches(
        self, network: Callable[[Array], Array], views: Sequence[Array], chosen: Array
    ) -> Array:
        """Returns a decision network's logits [N, K] of N chosen views [C, h, w]."""

        def run(start: int) -> Array:
            some = [views[index] for index in chosen[start : start + DECISIONS]]
            batch = np.empty((DECISIONS, *some[0].shape), np.float32)
            np.stack(some, out=batch[: len(some)])
            batch[len(some) :] = 0
            # a sum is read faster than all are asked
            if not np.isfinite(batch.sum()) and not np.isfinite(batch).all():
                raise ValueError(NOT_FINITE)
            return network(batch)[: len(some)].copy()

        return np.concatenate(list(self._callers.map(run, range(0, len(chosen), DECISIONS))))


def single_threaded_workers(count: int) -> ThreadPoolExecutor:
    """Starts threads inside of which PyTorch uses one core; outside nothing changes.

    For a moment the process's number is 1 for threads that ask for it for the first time.
    """
    with _STARTING:
        return _single_threaded_workers(count)


def _single_threaded_workers(count: int) -> ThreadPoolExecutor:
    usual = torch.get_num_threads()
    started = threading.Barrier(count + 1)

    def start() -> None:
        # a thread that has not asked before takes the process's number at its first operation
        torch.get_num_threads()
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(count, thread_name_prefix="meddanet", initializer=start)
    try:
        for _ in range(count):
            pool.submit(started.wait)
        started.wait()
        started.wait()
    except BaseException:
        # those that wait for one that could not be started
        started.abort()
        pool.shutdown(wait=False)
        raise
    finally:
        # the worker's call reached threads that are started later as well
        torch.set_num_threads(usual)
    return pool


def holds_signal(image: Array) -> bool:
    """Tells whether anything of an image [C, H, W] is not zero."""
    # the middle rows answer for nearly all slices without reading the rest
    return bool(image[:, image.shape[1] // 2].any() or image.any())


def shrink(image: Array, scale: int) -> Array:
    """Averages [C, H, W] over squares of `scale` pixels."""
    if scale == 1:
        return image
    channels, height, width = image.shape
    # rows in one pass over the image; then columns, which numpy adds faster than it reduces them
    rows = image.reshape(channels, height // scale, scale, width).sum(2)
    columns = rows.reshape(channels, height // scale, width // scale, scale)
    summed = columns[..., 0] + columns[..., 1]
    for index in range(2, scale):
        summed += columns[..., index]
    summed *= np.float32(1 / scale**2)
    return summed
