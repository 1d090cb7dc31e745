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
def roundoff() -> Callable[[torch.dtype], float]:
    """The largest relative error of one rounding to a dtype."""

    def of(dtype: torch.dtype) -> float:
        # the interpreter cuts bfloat16 off where a GPU rounds to nearest
        cut_off = INTERPRETING and dtype == torch.bfloat16
        return torch.finfo(dtype).eps / (1 if cut_off else 2)

    return of
