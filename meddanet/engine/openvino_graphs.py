"""Compiled OpenVINO graphs: one per part of a model and shape of its inputs.

Each graph takes one slice and runs on one thread; as many streams as threads run side by side.
"""

from __future__ import annotations

import ctypes
import os
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any
from weakref import WeakSet, WeakValueDictionary

import numpy as np

from .operations import Node, constant, integers
from .opset import Exact, Recorded, translate
from .slices import Array
from .unreported import unreported

with unreported():
    import openvino as ov
    from openvino import opset13 as ops

Requests = OrderedDict[Any, tuple[ov.CompiledModel, ov.InferRequest, list[np.ndarray]]]
Part = tuple[Any, ...]  # name, and where there are several: index, bit width
Key = tuple[Part, tuple[tuple[int, ...], ...]]  # a part and the shapes of its inputs


class Graphs(ABC):
    """Builds, compiles, keeps and runs the graphs of one model.

    Args:
        threads: How many calls run at a time; others wait.
        kept: How many graphs a thread keeps.

    Attributes:
        exact: What runs on codes here.
    """

    def __init__(self, threads: int, kept: int) -> None:
        self._threads, self._kept = threads, kept
        self._core = ov.Core()
        self.exact = exact_sums(self._core)
        # one per graph, so that several are compiled at a time, each once
        self._locks: defaultdict[Key, threading.Lock] = defaultdict(threading.Lock)
        # a graph lives as long as a thread has a request of it, or until one asks for it
        self._graphs: WeakValueDictionary[Key, ov.CompiledModel] = WeakValueDictionary()
        self._expected: OrderedDict[Key, ov.CompiledModel] = OrderedDict()
        # by thread; not local to them, since a fork destroys what dead threads had
        self._requests: dict[int, Requests] = {}
        _ALL.add(self)

    @abstractmethod
    def _outputs(self, part: Part, inputs: list[Node]) -> list[Node]:
        """Builds a part's graph over its inputs; raises ValueError where that cannot be done."""

    def translated(
        self, recorded: Recorded, inputs: list[Node], channels_last: bool = False
    ) -> list[Node]:
        """Adds a module's forward pass to a graph, as `opset.translate` does."""
        return translate(recorded, inputs, self.exact, channels_last)

    def _run(self, part: Part, *inputs: Array) -> list[Array]:
        inputs = tuple(x if x.ndim == 4 else x[None] for x in inputs)
        key = (part, *(x.shape for x in inputs))
        requests = self._requests.setdefault(threading.get_ident(), OrderedDict())
        if key not in requests:
            graph = self.compiled(*key)
            request = graph.create_infer_request()
            requests[key] = graph, request, [tensor.data for tensor in request.output_tensors]
            if len(requests) > self._kept:
                requests.popitem(last=False)
        requests.move_to_end(key)
        _, request, outputs = requests[key]
        for index, value in enumerate(inputs):
            request.set_input_tensor(index, ov.Tensor(value, shared_memory=True))
        request.infer()
        return outputs

    def compiled(self, part: Part, *shapes: tuple[int, ...]) -> ov.CompiledModel:
        """Returns the compiled graph of a part, made where no thread has it."""
        key = part, shapes
        with self._locks[key]:
            graph = self._expected.pop(key, None) or self._graphs.get(key)
            if graph is None:
                graph = self._graphs[key] = self._compile(key)
            return graph

    def _compile(self, key: Key) -> ov.CompiledModel:
        part, shapes = key
        return self._core.compile_model(
            self.graph(part, *shapes), "CPU", _configuration(self._threads)
        )

    def expect(self, keys: Sequence[Key]) -> None:
        """Compiles graphs that are likely to be asked for, on the other cores if there are any.

        What fails here fails again, and is told, when it is asked for.
        """

        def run(key: Key) -> None:
            with self._locks[key]:
                if key not in self._graphs:
                    self._graphs[key] = self._expected[key] = self._compile(key)
            if len(self._expected) > self._kept:
                # nobody may ever ask for the oldest
                with suppress(KeyError):
                    self._expected.popitem(last=False)

        if self._threads > 1:
            pool = ThreadPoolExecutor(self._threads - 1, thread_name_prefix="meddanet-compile")
            for key in keys:
                pool.submit(run, key)
            pool.shutdown(wait=False)

    def graph(self, part: Part, *shapes: tuple[int, ...]) -> ov.Model:
        """Builds a part's graph for inputs of these shapes."""
        inputs = [ops.parameter(list(shape), np.float32) for shape in shapes]
        return ov.Model(self._outputs(part, inputs), inputs, "-".join(map(str, part)))


# of every engine there is
_ALL: WeakSet[Graphs] = WeakSet()


def _keep_in_child() -> None:
    """Has a forked process keep what it will never run, as its destructors wait for lost threads.

    Without it the child hangs for ever where it deletes an engine, or Python an unreachable one.
    """
    for graphs in _ALL:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(graphs))


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_keep_in_child)


def exact_sums(core: ov.Core) -> Exact:
    """Finds out, by trying codes of +-127, which int8 sums come out exact on this machine."""
    if _sums_are_exact(core, -128, (127, -127)):
        return Exact(unsigned=True, signed=True)
    return Exact(unsigned=_sums_are_exact(core, 0, (127,)), signed=False)


def _sums_are_exact(core: ov.Core, lowest: int, codes: tuple[int, ...]) -> bool:
    """Tries a convolution of images that are one code throughout, of 256 from `lowest` on."""
    image = ops.parameter([1, 32, 6, 6], np.float32)
    ends = constant(lowest), constant(lowest + 255)
    kernel = np.where(np.arange(32 * 8 * 9) % 3 == 1, -127, 127).reshape(8, 32, 3, 3)
    weight = ops.convert(ops.constant(kernel.astype(np.int8)), "f32")
    pads = [0, 0]
    sums = ops.convolution(
        ops.fake_quantize(image, *ends, *ends, 256), ops.multiply(weight, constant(1)),
        [1, 1], pads, pads, [1, 1],
    )
    compiled = core.compile_model(ov.Model([sums], [image]), "CPU", _configuration(1))
    each = np.broadcast_to(kernel.sum((1, 2, 3))[:, None, None], (8, 4, 4))
    return all(
        np.array_equal(compiled([np.full((1, 32, 6, 6), code, np.float32)])[0][0], code * each)
        for code in codes
    )


def _configuration(threads: int) -> dict[str, Any]:
    return {
        "NUM_STREAMS": str(threads), "INFERENCE_NUM_THREADS": threads,
        # the residual stream stays float32; a pinned thread waits while others use its core
        "INFERENCE_PRECISION_HINT": "f32", "ENABLE_CPU_PINNING": False,
        # int8 weights say nothing of inputs that have more than 8 bits
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    }


def to_labels(logits: Node) -> Node:
    """Returns the first of the largest logits, uint8 [1, H, W], of logits [1, K, H, W]."""
    classes, height, width = list(logits.get_output_shape(0))[1:]
    # class after class whole vectors are compared, pixel by pixel it takes twenty times as long
    planes = ops.reshape(logits, integers(1, classes, height * width), False)
    k = ops.constant(np.int64(1))
    best = ops.topk(planes, k, 1, "max", "value", "i32", stable=True).output(1)
    return ops.convert(ops.reshape(best, integers(1, height, width), False), "u8")
