"""The watch over what interpreted kernels do to memory sees what it is there for."""

from __future__ import annotations

import os

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="compute-sanitizer watches compiled kernels"
)


@triton.jit
def copy_kernel(x, y, elements, shift, stride, SIZE: tl.constexpr):
    """Copies SIZE elements a program; those of the next one begin `stride` elements further."""
    at = tl.program_id(0) * stride + tl.arange(0, SIZE)
    tl.store(y + at, tl.load(x + at + shift, mask=at < elements), mask=at < elements)


@triton.jit
def back_kernel(x):
    tl.store(x, 1.0)
    tl.store(x + 1, tl.load(x))


@triton.jit
def twice_kernel(x):
    tl.store(x + tl.arange(0, 4) // 2, 1.0)


@triton.jit
def turn_kernel(x):
    at = tl.arange(0, 4)
    tl.store(x + at, tl.load(x + (at + 1) % 4))


@triton.jit
def spread_kernel(x):
    at = tl.arange(0, 4)
    tl.store(x + at, tl.load(x + at * 0), mask=at == 0)


@triton.jit
def either_kernel(x, y, out):
    at = tl.arange(0, 4)
    tl.store(out + at, tl.load(tl.where(at < 2, x + at, y + at)))


@triton.jit
def count_kernel(x):
    tl.atomic_add(x, 1.0)


@triton.jit
def barrier_kernel(x, out, shift, BARRIERS: tl.constexpr):
    """Turns four elements a program twice, then copies those that begin `shift` further."""
    at = tl.arange(0, 4)
    own = x + 4 + tl.program_id(0) * 4
    for first in tl.static_range(2):
        value = tl.load(own + (at + 1) % 4)
        if 2 * first < BARRIERS:
            tl.debug_barrier()
        tl.store(own + at, value)
        if 2 * first + 1 < BARRIERS:
            tl.debug_barrier()
    tl.store(out + tl.program_id(0) * 4 + at, tl.load(own + at + shift))


def copied(x, y, shift=0, stride=4):
    copy_kernel[(2,)](x, y, 7, shift, stride, SIZE=4)
    return y


def test_masked_lanes_and_programs_beside_each_other():
    x = torch.arange(7.0)
    assert torch.equal(copied(x, torch.zeros(7)), x)


def test_in_place():
    """Each program writes what it alone has read."""
    x = torch.arange(7.0)
    assert torch.equal(copied(x, x), torch.arange(7.0))


@pytest.mark.parametrize("shift", [1, -1])
def test_beyond_an_argument(shift):
    """Also where the memory beyond it is the same tensor's."""
    x = torch.arange(20.0)[4:11]
    with pytest.raises(InterpreterError, match="bytes past an argument|before all arguments"):
        copied(x, torch.zeros(7), shift)


def test_two_programs_write_the_same():
    with pytest.raises(InterpreterError, match="touched again after it was written"):
        copied(torch.zeros(7), torch.zeros(7), stride=2)


def test_written_where_another_program_reads():
    x = torch.zeros(12)
    with pytest.raises(InterpreterError, match="where another program or thread reads"):
        copied(x[4:], x[:7])


@pytest.mark.parametrize(("kernel", "wrong"), [
    (back_kernel, "touched again"),
    (twice_kernel, "written twice, or where another"),
    (turn_kernel, "written twice, or where another program or thread reads"),
    (spread_kernel, "written twice, or where another program or thread reads"),
])
def test_threads_of_one_program(kernel, wrong):
    """Their order is the compiler's: none may write what another one reads or writes."""
    with pytest.raises(InterpreterError, match=wrong):
        kernel[(1,)](torch.zeros(4))


def test_a_barrier_settles_what_a_program_has_touched():
    out = torch.zeros(8)
    barrier_kernel[(2,)](torch.arange(16.0), out, 0, BARRIERS=4)
    assert out.tolist() == [6, 7, 4, 5, 10, 11, 8, 9]


@pytest.mark.parametrize(("barriers", "shift", "wrong"), [
    (0, 0, "written twice, or where another program or thread reads"),
    (1, 0, "touched again after it was written"),
    (2, 0, "written twice, or where another program or thread reads"),
    (3, 0, "touched again after it was written"),
    (4, 4, "written twice, or where another program or thread reads"),
    (4, -4, "another program's"),
])
def test_a_barrier_is_one_programs_own(barriers, shift, wrong):
    """Each one that is left out is missed, and none settles what another program has written."""
    with pytest.raises(InterpreterError, match=wrong):
        barrier_kernel[(2,)](torch.arange(16.0), torch.zeros(8), shift, BARRIERS=barriers)


def test_one_load_of_two_arguments():
    x, y, out = torch.arange(4.0), torch.arange(4.0, 8), torch.zeros(4)
    either_kernel[(1,)](x, y, out)
    assert out.tolist() == [0, 1, 6, 7]


def test_atomics_are_refused():
    with pytest.raises(InterpreterError, match="atomic operations are not watched"):
        count_kernel[(1,)](torch.zeros(1))
