"""What the benchmarks of one run share: imports from beside them, and one file of results."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from meddanet.heap import keep_freed_memory

sys.path.insert(0, str(Path(__file__).parent))

from timing import Results, compare, finish  # noqa: E402


@pytest.fixture(scope="session")
def results() -> Results:
    """What MEDDANET_RESULTS names, or benchmarks/results/gpu.json."""
    default = Path(__file__).parent / "results" / "gpu.json"
    return Results(Path(os.environ.get("MEDDANET_RESULTS") or default))


@pytest.fixture
def measure(benchmark, results) -> Callable[..., dict[str, Any]]:
    """Times providers in turn, keeps the row, and hands ours to pytest-benchmark as well."""

    def run(
        name: str,
        ours: str,
        providers: dict[str, Callable],
        *,
        timing: dict[str, Any],
        **facts: Any,
    ) -> dict[str, Any]:
        row = {"case": name, **facts, **compare(ours, providers, **timing)}
        results.add(row)
        benchmark.extra_info.update(ratios=row["ratios"])
        benchmark.pedantic(lambda: (providers[ours](), finish()), rounds=3, warmup_rounds=1)
        for peer, ratio in row["ratios"].items():
            print(f"{name}: {peer} / {ours}: {ratio}")
        return row

    return run


@pytest.fixture(autouse=True)
def freed_memory() -> None:
    """Keeps it for all contestants alike: PyTorch may be slower without, by up to twice."""
    keep_freed_memory()


@pytest.fixture(autouse=True)
def tried_convolutions() -> None:
    """Lets cuDNN try its algorithms while contestants warm up, instead of guessing."""
    torch.backends.cudnn.benchmark = True


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Makes inputs the same in every run."""
    torch.manual_seed(0)
