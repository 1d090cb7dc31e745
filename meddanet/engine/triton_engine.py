"""Volumes through recorded plans: chunks, transfers, and CUDA graphs around what a plan records.

On a GPU chunks are uploaded on a stream of their own from pinned memory, each while the one before
is computed, and labels go back without waiting; the host waits once, for the last of them. A volume
of a single chunk, as a head is, is uploaded to where it is computed, before that begins. Slices
that lie on the GPU already are copied into the plan's buffer between the runs.
"""

from __future__ import annotations

import gc
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from ..kernels.backend import build_errors
from ..kernels.side_by_side import compile_side_by_side
from ..med_danet_v2 import MedDANetV2
from ..routing import Segmentation
from .immovable import Immovable
from .plan import CAPTURED, Plan, PlannedModel, overflows

# slices of a chunk: a few, an L2 cache's worth, a head; others were not tried on a GPU
CAPACITIES = (8, 32, 160)
# slices that are uploaded at a time
PIECE = 16
# plans, of one capacity and size of slices each, whose buffers are kept
KEPT = 2
# a capture sees what every thread of the process does on its device
_CAPTURING = threading.Lock()


class TritonEngine(Immovable):
    """Segments slices as `MedDANetV2.segment` does; see `compile_engine`.

    Args:
        model: In `eval()`, every quantised layer with a range.
        device: A CUDA device with its index, or the CPU under TRITON_INTERPRET=1.
        capacities: Slices of a chunk that plans are made for, ascending.

    Raises:
        ValueError: If the model has no integer form.
    """

    executor = "triton"
    passed_over = ""

    def __init__(
        self, model: MedDANetV2, device: torch.device, capacities: tuple[int, ...] = CAPACITIES
    ) -> None:
        self.device, self.capacities = device, capacities
        self._model = model
        self._planned = PlannedModel(model, device)
        self._plans: OrderedDict[tuple[int, int, int, bool], tuple[Plan, Callable[[], Any]]]
        self._plans = OrderedDict()
        # whether the last volume needed a plan in which every route takes all slices
        self._roomy = False
        self._lock = threading.Lock()
        self._compiled = device.type == "cpu"

    def segment(self, slices: Tensor) -> Segmentation:
        """Routes every slice and labels it.

        Args:
            slices: [N, C, H, W] on the CPU or on the GPU, H and W multiples of the stride, at least
                the largest crop.

        Returns:
            A `Segmentation` on the CPU.

        Raises:
            ValueError: If the shape does not fit.
        """
        self._model.check(slices)
        images = slices.detach().float()
        # buffers are static: one volume at a time; dtypes are the plan's, not the caller's autocast
        with self._lock, torch.autocast(self.device.type, enabled=False):
            if not len(images):
                return Segmentation.skipped(images, self._model.num_stages)
            if self.device.type == "cuda":
                with torch.cuda.device(self.device):
                    return self._with_room(images, self._segment_on_gpu)
            return self._with_room(images, self._segment_here)

    def _with_room(
        self, images: Tensor, segment: Callable[[Tensor, Plan, Callable[[], Any]], Segmentation]
    ) -> Segmentation:
        """Segments by a plan with room for all slices where the small one has too little."""
        count, _, height, width = images.shape
        plan, run = self.plan(count, height, width)
        result, capacity, roomy = segment(images, plan, run), plan.capacity, plan.roomy
        # so that its memory can be had for another one
        del plan, run
        chunks, routes = result.decisions.split(capacity), len(self._model.routes)
        needed = any(overflows(chunk, capacity, routes) for chunk in chunks)
        if needed and not roomy:
            result = segment(images, *self.plan(count, height, width, roomy=True))
        self._roomy = needed
        return result

    def plan(
        self, count: int, height: int, width: int, roomy: bool | None = None
    ) -> tuple[Plan, Callable[[], Any]]:
        """Returns the plan for `count` slices of a size, or as many as fit, and what runs it.

        Args:
            count: Slices.
            height: Of a slice.
            width: Of a slice.
            roomy: Whether every route takes all slices; None = if the last volume segmented needed
                it. Without, a run may leave slices unlabelled: see `plan.overflows`.
        """
        wanted = next((c for c in self.capacities if c >= count), self.capacities[-1])
        key = wanted, height, width, self._roomy if roomy is None else roomy
        if key not in self._plans:
            while len(self._plans) >= KEPT:
                self._plans.popitem(last=False)
                # launches and buffers refer to each other
                gc.collect()
            on_gpu = self.device.type == "cuda"
            with torch.cuda.device(self.device) if on_gpu else nullcontext():
                self._plans[key] = self._make(*key)
        self._plans.move_to_end(key)
        return self._plans[key]

    def _make(
        self, capacity: int, height: int, width: int, roomy: bool
    ) -> tuple[Plan, Callable[[], Any]]:
        smaller = [c for c in self.capacities if c < capacity]
        plan = None
        try:
            # buffers outlive the mode in which the first volume happens to be segmented
            with torch.inference_mode(False), torch.autocast(self.device.type, enabled=False):
                self._compile(height, width)
                plan = Plan(self._planned, capacity, (height, width), roomy)
                return plan, plan.run if self.device.type == "cpu" else captured(plan)
        except build_errors() as error:
            told = " ".join(str(error).split())
            raise RuntimeError(
                f"executor triton: a kernel cannot be built for this GPU ({told}); use executor "
                "eager"
            ) from error
        except RuntimeError as error:
            # where a kernel is loaded or a graph made it is told in words alone
            full = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
            if not full:
                raise
            if not smaller and not self._plans:
                raise torch.OutOfMemoryError(str(error)) from error
        plan = None
        # what is missing may be what other plans hold
        shrink = not self._plans
        self._plans.clear()
        gc.collect()
        torch.cuda.empty_cache()
        return self._make(smaller[-1] if shrink else capacity, height, width, roomy)

    def _compile(self, height: int, width: int) -> None:
        """Has the first plan's kernels compiled; those of a small one are those of all."""
        if not self._compiled:

            def launch() -> None:
                # what is no kernel runs, on streams as a capture's
                with _CAPTURING:
                    Plan(self._planned, self.capacities[0], (height, width)).run()

            compile_side_by_side(launch)
            # its launches and buffers refer to each other
            gc.collect()
            self._compiled = True

    def _segment_here(self, images: Tensor, plan: Plan, run: Callable[[], Any]) -> Segmentation:
        """The chunks one after the other, by plain copies."""
        result = Segmentation.skipped(images, self._model.num_stages)
        for part, chunk in _chunks(images, plan.capacity):
            plan.images[: len(chunk)].copy_(chunk)
            plan.images[len(chunk) :].zero_()
            run()
            _copy_out(plan, result, part)
        return result

    def _segment_on_gpu(self, images: Tensor, plan: Plan, run: Callable[[], Any]) -> Segmentation:
        """The next chunk's upload beside this one's work; a single chunk needs no staging."""
        empty = Segmentation.skipped(images, self._model.num_stages)
        result = Segmentation(*(part.pin_memory() for part in empty))
        compute = torch.cuda.Stream()
        # what lies on the GPU is copied between the runs
        upload = compute if images.is_cuda else torch.cuda.Stream()
        several = len(images) > plan.capacity and not images.is_cuda
        staged = [torch.empty_like(plan.images) for _ in range(2)] if several else [plan.images]
        taken = [torch.cuda.Event() for _ in staged]
        compute.wait_stream(torch.cuda.current_stream())
        upload.wait_stream(torch.cuda.current_stream())
        try:
            turns = cycle(zip(staged, taken, strict=True))
            chunks = _chunks(images, plan.capacity)
            for (part, chunk), (stage, done) in zip(chunks, turns, strict=False):
                with torch.cuda.stream(upload):
                    upload.wait_event(done)
                    # a piece is copied into pinned memory while the last one is uploaded
                    for onto, piece in zip(stage.split(PIECE), chunk.split(PIECE), strict=False):
                        source = piece if piece.is_cuda else piece.pin_memory()
                        onto[: len(piece)].copy_(source, non_blocking=True)
                    stage[len(chunk) :].zero_()
                compute.wait_stream(upload)
                with torch.cuda.stream(compute):
                    # nothing is copied where the stage is the buffer itself
                    plan.images.copy_(stage)
                    done.record(compute)
                    run()
                    _copy_out(plan, result, part)
        finally:
            # buffers are free for the next volume, whatever happened
            for stream in (upload, compute):
                stream.record_event().synchronize()
        return result


def captured(plan: Plan) -> Callable[[], None]:
    """Returns the replay of a CUDA graph of a plan.

    One at a time, from its first launch on: PyTorch hands out a stream again that another thread's
    capture may be on.
    """
    with _CAPTURING:
        stream = torch.cuda.Stream(priority=CAPTURED)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # kernels are compiled and algorithms chosen before anything is recorded
            plan.run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # PyTorch's own default stream lies on the device that captured first
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            plan.run()
    return graph.replay


def _chunks(images: Tensor, capacity: int) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(images), capacity):
        part = slice(start, min(start + capacity, len(images)))
        yield part, images[part]


def _copy_out(plan: Plan, result: Segmentation, part: slice) -> None:
    """Copies a chunk's answers to where they belong; on a GPU without waiting."""
    count = part.stop - part.start
    answers = plan.labels, plan.decisions, plan.offsets, plan.num_bits.T.long().contiguous()
    for target, source in zip(result, answers, strict=True):
        target[part].copy_(source[:count], non_blocking=True)
