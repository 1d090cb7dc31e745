"""The operations' tests run on the references, and once more on Triton, interpreted.

`test_interpreted.py` starts that process with TRITON_INTERPRET=1, which must be set before a kernel
is decorated.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

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


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A GPU if there is one, unless Triton interprets; else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() and not INTERPRETING else "cpu")


@pytest.fixture(scope="session")
def narrow() -> Callable[[Tensor, torch.dtype], Tensor]:
    """Rounds float32 values to a dtype as the executor under test does."""

    def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
        if INTERPRETING and dtype == torch.bfloat16:
            # the interpreter cuts bfloat16 off where a GPU rounds to nearest
            values = (values.view(torch.int32) & -(1 << 16)).view(torch.float32)
        return values.to(dtype)

    return rounded
