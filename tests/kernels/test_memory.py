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
    with pytest.raises(InterpreterError, match="written where another program reads"):
        copied(x[4:], x[:7])


@pytest.mark.parametrize(
    "kernel, wrong", [(back_kernel, "touched again"), (twice_kernel, "written twice")]
)
def test_threads_of_one_program(kernel, wrong):
    """Their order is the compiler's: what one stores, another cannot read back."""
    with pytest.raises(InterpreterError, match=wrong):
        kernel[(1,)](torch.zeros(4))
