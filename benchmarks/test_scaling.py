"""How time grows: with the slices that are segmented, in one call, with channels, with cases.

    pytest benchmarks/test_scaling.py --benchmark-only

Every test puts its points into the JSON of this machine, `report.py` draws them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import runtimes
import torch
from torch import Tensor
from volumes import cases, folder_run, write_results

from meddanet.bench import time_interleaved
from meddanet.build import build_med_danet_v2
from meddanet.data import Case, load_volume, to_slices
from meddanet.layers import quantized_layers
from meddanet.predictor import VolumePredictor
from meddanet.weights import load_model

ROUNDS = 3
CHANNELS, SLICES = (8, 12, 16, 24, 32), 8
COHORTS = (1, 2, 4, 8)


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    """A case that the shipped weights have not seen, or a phantom."""
    return cases(tmp_path_factory.mktemp("phantom"))[0]


@pytest.fixture(scope="module")
def predictor() -> VolumePredictor:
    """The shipped weights in the engine of this machine."""
    return VolumePredictor(load_model(), "cpu")


@pytest.fixture(scope="module")
def slices(case, predictor) -> Tensor:
    """The case's normalised slices."""
    return predictor.fitted(torch.from_numpy(to_slices(load_volume(case))))


def keep(benchmark, level: str, points: dict, **facts) -> None:
    """Stores what `report.py` draws."""
    content = {"points": {str(x): round(y, 6) for x, y in points.items()}, **facts}
    benchmark.extra_info.update(content)
    write_results(level, content)


def test_cost_grows_as_the_work(benchmark, case, predictor, slices):
    """Seconds against the number of slices that are segmented, the rest skipped or blank."""
    routed = predictor.engine.segment(slices).decisions
    wanted, skipped = (routed > 0).nonzero().flatten(), (routed == 0).nonzero().flatten()
    counts = sorted({0, len(wanted) // 4, len(wanted) // 2, 3 * len(wanted) // 4, len(wanted)})
    # always as many slices: what is not segmented is replaced by slices that are skipped
    chosen = {
        str(count): torch.cat([wanted[:count], skipped, skipped])[: len(routed)] for count in counts
    }
    runs = {
        name: lambda part=slices[index]: predictor.engine.segment(part)
        for name, index in chosen.items()
    }
    times = time_interleaved(runs, 5)
    seconds = [times[str(count)]["cpu_seconds"] for count in counts]
    slope, start = np.polyfit(counts, seconds, 1)
    fit = np.corrcoef(counts, seconds)[0, 1] ** 2
    benchmark.pedantic(runs[str(counts[-1])], rounds=3)
    content = {
        "case": case.name, "segmented": counts, "times": times, "r_squared": float(fit),
        "cpu_seconds_per_segmented_slice": float(slope), "cpu_seconds_without": float(start),
    }
    benchmark.extra_info.update(content)
    write_results("scaling with slices", content)
    assert fit > 0.98, f"time is not linear in the work: {dict(zip(counts, seconds, strict=True))}"


def test_slices_in_one_call(benchmark, case, predictor, slices):
    """CPU milliseconds per slice, 1 to all of those that are segmented in one call."""
    wanted = (predictor.engine.segment(slices).decisions > 0).nonzero().flatten()
    counts = [n for n in (1, 2, 4, 8, 16, 32) if n <= len(wanted)]
    runs = {
        str(n): lambda part=slices[wanted[:n]]: predictor.engine.segment(part) for n in counts
    }
    times = time_interleaved(runs, 2 * ROUNDS + 1)
    benchmark.pedantic(runs[str(counts[-1])], rounds=ROUNDS)
    points = {n: 1e3 * times[str(n)]["cpu_seconds"] / n for n in counts}
    keep(benchmark, "scaling with batch", points, case=case.name, times=times)


def test_base_channels(benchmark, slices):
    """CPU milliseconds per whole slice of static int8 U-Nets of several widths, untrained."""
    middle = slices[len(slices) // 2 :][:SLICES].numpy()
    runs = {}
    for channels in CHANNELS:
        torch.manual_seed(0)
        model = build_med_danet_v2(f"unet-{channels}", in_channels=middle.shape[1]).eval()
        for layer in quantized_layers(model).values():
            layer.input_amax.fill_(4.0)
        try:
            runs[str(channels)] = runtimes.openvino_static(model, middle, 8)
        except runtimes.Unavailable as reason:
            pytest.skip(str(reason))
    times = time_interleaved(runs, ROUNDS)
    benchmark.pedantic(runs[str(CHANNELS[0])], rounds=ROUNDS)
    points = {n: 1e3 * times[str(n)]["cpu_seconds"] / SLICES for n in CHANNELS}
    keep(benchmark, "scaling with channels", points, times=times)


def test_cases_of_a_folder(benchmark, case, predictor, tmp_path):
    """Seconds per case from files to files, 1 to 8 cases in one run."""
    copies = [replace(case, name=f"copy_{index}") for index in range(max(COHORTS))]
    runs = {str(n): lambda n=n: folder_run(copies[:n], tmp_path, predictor) for n in COHORTS}
    times = time_interleaved(runs, ROUNDS)
    benchmark.pedantic(runs["1"], rounds=1)
    points = {n: times[str(n)]["seconds"] / n for n in COHORTS}
    keep(benchmark, "scaling with cohort", points, case=case.name, times=times)
