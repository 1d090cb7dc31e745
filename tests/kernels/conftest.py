"""The operations' tests run on the references, and once more on Triton, interpreted.

`make test` starts that process with TRITON_INTERPRET=1, which must be set before a kernel
is decorated.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor

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
