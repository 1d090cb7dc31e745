"""The operations' tests run on the references, and once more on Triton, interpreted.

`make test` starts that process with TRITON_INTERPRET=1, which must be set before a kernel
is decorated.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor
from torch.utils._pytree import tree_leaves

from meddanet.kernels import use_backend

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

# an interpreted program takes milliseconds, and a loaded machine knows no deadlines
settings.register_profile("kernels", max_examples=20 if INTERPRETING else 100, deadline=None)
settings.load_profile("kernels")


@pytest.fixture(autouse=True)
def backend() -> Iterator[str]:
    """The executor under test."""
    name = "triton" if INTERPRETING else "reference"
    with use_backend(name):
        yield name


class Memory:
    """What a launch has read and written, byte by byte; refuses what a GPU may do otherwise.

    Programs run in any order and the threads of each side by side, so nothing that a launch writes
    may be touched a second time, nor be read elsewhere than at the same place of the same program.
    A barrier settles what a program has touched: from then on it may touch it again, at any place,
    and no other program may where either of them writes.

    Args:
        tensors: The launch's arguments: nothing beside them may be touched.

    Attributes:
        starts: int64 [n], the addresses of the memory that they lie in, overlaps joined.
        readers: For each an int64 [bytes]: 0, the program and place that have read it since the
            program's last barrier, ANYWHERE as the place for several, or -1 for several programs.
        written: For each a bool [bytes], likewise.
        settled: For each an int64 [bytes]: 0, the program that touched it before a barrier of its
            own, or -1 for several.
        kept: For each a bool [bytes]: whether it was written then.
    """

    ANYWHERE = 0xFFFFFFFF

    def __init__(self, tensors: list[Tensor]) -> None:
        spans: list[tuple[int, int]] = []
        for tensor in sorted(tensors, key=Tensor.data_ptr):
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            length = 1 + sum((size - 1) * stride for size, stride in steps)
            start = tensor.data_ptr()
            end = start + length * tensor.element_size()
            if spans and start < spans[-1][1]:
                spans[-1] = spans[-1][0], max(spans[-1][1], end)
            elif tensor.numel():
                spans.append((start, end))
        self.starts = np.array([start for start, _ in spans])
        self.readers = [np.zeros(end - start, np.int64) for start, end in spans]
        self.written = [np.zeros(end - start, bool) for start, end in spans]
        self.settled = [np.zeros(end - start, np.int64) for start, end in spans]
        self.kept = [np.zeros(end - start, bool) for start, end in spans]
        # of the program that runs
        self._program, self._recent = 0, list[tuple[int, np.ndarray]]()

    def touch(self, pointers, mask, size: int, program: int, stores: bool) -> None:
        """Notes an access of `size` bytes at each of `pointers` by a program, numbered from 1."""
        if program != self._program:
            self._program, self._recent = program, []
        addresses = pointers[mask].astype(np.int64)
        # places are those of a tile: which thread has which is up to the compiler
        readers = (program << 32) + np.flatnonzero(mask)
        if not len(addresses):
            return
        ends = addresses.min(), addresses.max()
        first, last = np.searchsorted(self.starts, ends, "right") - 1
        assert first >= 0, "an address before all arguments"
        if first == last:  # as nearly always
            return self._touch(first, addresses, size, readers[:, None], stores)
        spans = np.searchsorted(self.starts, addresses, "right") - 1
        for span in np.unique(spans):
            here = spans == span
            self._touch(span, addresses[here], size, readers[here, None], stores)

    def _touch(self, span: int, addresses, size: int, reader, stores: bool) -> None:
        readers, written = self.readers[span], self.written[span]
        first = addresses - self.starts[span]
        past = first.max() + size - len(written)
        assert past <= 0, f"{past} bytes past an argument of {len(written)}"
        touched = first[:, None] + np.arange(size)
        self._recent.append((span, touched))
        assert not written[touched].any(), "touched again after it was written"
        owner, program = self.settled[span][touched], self._program
        others = (owner != 0) & (owner != program)
        assert not (others & (stores | self.kept[span][touched])).any(), "another program's"
        before = readers[touched]
        alone = (before == 0) | (before == reader)
        readers[touched] = reader
        alone &= readers[touched] == reader  # where an address is there twice, the last one is left
        if stores:
            assert alone.all(), "written twice, or where another program or thread reads"
            written[touched] = True
        else:
            ours = (before == 0) | (before >> 32 == program)
            several = np.where(ours, program << 32 | self.ANYWHERE, -1)
            readers[touched[~alone]] = several[~alone]

    def barrier(self, program: int) -> None:
        """Settles what a program, numbered from 1, has touched since its last barrier."""
        recent, self._recent = self._recent if program == self._program else [], []
        for span, touched in recent:
            settled, kept = self.settled[span], self.kept[span]
            readers, written = self.readers[span], self.written[span]
            owner = settled[touched]
            settled[touched] = np.where((owner == 0) | (owner == program), program, -1)
            kept[touched] |= written[touched]
            written[touched] = False
            # what several programs have read stays so
            readers[touched] = np.where(readers[touched] < 0, -1, 0)


@pytest.fixture(autouse=True, scope="session")
def watch() -> list[Memory]:
    """Watches what interpreted kernels do to memory, launch by launch."""
    launches: list[Memory] = []
    if not INTERPRETING:
        return launches
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    def watched_call(self, *args, **kwargs):
        leaves = tree_leaves((args, kwargs))
        launches.append(Memory([leaf for leaf in leaves if isinstance(leaf, Tensor)]))
        return call(self, *args, **kwargs)

    def program_of(builder):
        (x, y, z), (_, height, depth) = builder.grid_idx, builder.grid_dim
        return 1 + (x * height + y) * depth + z

    def watched_access(theirs, stores):
        def access(self, pointers, *args):
            mask = args[1 if stores else 0].data
            program = program_of(self)
            size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            launches[-1].touch(pointers.data, mask, size, program, stores)
            return theirs(self, pointers, *args)

        return access

    def watched_barrier(self):
        launches[-1].barrier(program_of(self))

    def unwatched(self, *args):
        raise NotImplementedError("atomic operations are not watched")

    call, builder = GridExecutor.__call__, InterpreterBuilder
    GridExecutor.__call__ = watched_call
    builder.create_masked_load = watched_access(builder.create_masked_load, stores=False)
    builder.create_masked_store = watched_access(builder.create_masked_store, stores=True)
    builder.create_barrier = watched_barrier
    builder.create_atomic_cas = builder.create_atomic_rmw = unwatched
    return launches


@pytest.fixture(autouse=True)
def launched(watch) -> list[Memory]:
    """The memory of what the test has launched so far, interpreted."""
    watch.clear()
    return watch


@pytest.fixture(autouse=True, scope="session")
def in_a_third_of_the_time() -> None:
    """Spares the interpreter what it does for nothing."""
    if not INTERPRETING:
        return
    from triton.runtime import interpreter

    # a look for integer overflows of which it does not tell unless it is asked to
    builder, asked = interpreter.interpreter_builder, os.environ.get("MEDDANET_OVERFLOWS") == "1"
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=asked, debug=asked)
    # changes to triton.language, made and undone for every launch and function that it calls:
    # here all is interpreted, so that they stay
    theirs, changed = interpreter._patch_lang, set()
    nothing_to_undo = SimpleNamespace(restore=lambda: None)

    def patch_lang(function):
        module = id(function.__globals__)
        if module not in changed:
            theirs(function)
            changed.add(module)
        return nothing_to_undo

    interpreter._patch_lang = patch_lang
    make_types_once()


def make_types_once() -> None:
    """Lets the interpreter, which makes a type and a shape for every value, make each kind once."""
    from triton.language import core
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    np_dtype, block_type, tensor, broadcast = (
        interpreter._get_np_dtype, core.block_type.__init__, core.tensor.__init__,
        TritonSemantic.broadcast_impl_value,
    )
    dtypes, types, shapes = {}, {}, {}

    def get_np_dtype(kind):
        name = kind.scalar.name
        if name not in dtypes:
            dtypes[name] = np_dtype(kind)
        return dtypes[name]

    def init_block_type(self, element_ty, shape):
        sizes = *map(int, shape),
        key = element_ty.name, getattr(element_ty, "address_space", 0), sizes
        if key not in types:
            block_type(self, element_ty, shape)
            types[key] = {**vars(self), "sizes": sizes}
        vars(self).update(types[key])

    def init_tensor(self, handle, kind):
        sizes = vars(kind).get("sizes", ())  # their own shapes take long to compare
        if sizes not in shapes:
            tensor(self, handle, kind)
            shapes[sizes] = {"shape": self.shape, "numel": self.numel}
        vars(self).update(shapes[sizes], handle=handle, type=kind, dtype=kind.scalar)

    def broadcast_impl_value(self, left, right):
        sizes = vars(left.type).get("sizes")
        if sizes is not None and sizes == vars(right.type).get("sizes"):
            return left, right
        return broadcast(self, left, right)

    interpreter._get_np_dtype = get_np_dtype
    core.block_type.__init__, core.tensor.__init__ = init_block_type, init_tensor
    TritonSemantic.broadcast_impl_value = broadcast_impl_value


@pytest.fixture(autouse=True, scope="session")
def fused() -> None:
    """Makes the interpreter's fused multiply-add round once, as a GPU's and newer tritons' does."""
    if not INTERPRETING:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    theirs = InterpreterBuilder.create_fma

    def create_fma(self, x, y, z):
        if z.data.dtype != np.float32:
            return theirs(self, x, y, z)
        # float64 holds the product, and with z = -float32(product) the sum
        exact = x.data.astype(np.float64) * y.data + z.data
        return TensorHandle(exact.astype(np.float32), z.dtype.scalar)

    InterpreterBuilder.create_fma = create_fma


@pytest.fixture(autouse=True, scope="session")
def bfloat16_products() -> None:
    """Makes the interpreter multiply matrices of bfloat16, not of the integers that hold them."""
    if not INTERPRETING:
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    theirs = InterpreterBuilder.create_dot

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        bits = x.data.view(np.uint16).astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self, a, b, *others):
        return theirs(self, widened(a), widened(b), *others)

    InterpreterBuilder.create_dot = create_dot


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A GPU if there is one, unless Triton interprets; else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() and not INTERPRETING else "cpu")


@pytest.fixture
def as_users_run(backend, device) -> Iterator[None]:
    """On a GPU what users get there; elsewhere what runs all other tests."""
    with use_backend("auto" if device.type == "cuda" else backend):
        yield


@pytest.fixture(scope="session")
def narrow() -> Callable[[Tensor, torch.dtype], Tensor]:
    """Rounds float32 values to a dtype as the executor under test does."""

    def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
        if INTERPRETING and dtype == torch.bfloat16:
            # the interpreter cuts bfloat16 off where a GPU rounds to nearest
            values = (values.view(torch.int32) & -(1 << 16)).view(torch.float32)
        return values.to(dtype)

    return rounded
