"""Wall time per volume on the CPU: `VolumePredictor` against the same U-Net run eagerly on all slices.

    pytest benchmarks --benchmark-only

Every round times the peers and then the predictor on the same volume, so that the ratio in
`extra_info` is of interleaved runs. Uses a real case where `../shared/data` is, the phantom elsewhere.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import pytest
import torch

from meddanet.data import find_cases, from_slices, load_labels, load_volume, to_slices
from meddanet.data.phantom import write_phantom
from meddanet.layers import set_quantization
from meddanet.metrics import dice_score
from meddanet.predictor import VolumePredictor
from meddanet.weights import load_model

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "brats2021" / "BraTS2021_00000"
ROUNDS = 3


def eager_slice_by_slice(segmenter, slices):
    """The way the official code runs: one slice at a time, PyTorch's default layout."""
    return torch.cat([segmenter(part).argmax(1).to(torch.uint8) for part in slices.split(1)])


def eager_batched(segmenter, slices):
    """Batches of 8 in channels_last: what a careful user writes."""
    parts = [part.contiguous(memory_format=torch.channels_last) for part in slices.split(8)]
    return torch.cat([segmenter(part).argmax(1).to(torch.uint8) for part in parts])


PEERS = {"slice by slice": eager_slice_by_slice, "batched channels_last": eager_batched}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A case not trained on, or the phantom."""
    folder = REAL if REAL.exists() else write_phantom(tmp_path_factory.mktemp("phantom"))
    return find_cases(folder)[0]


@torch.inference_mode()
def test_volume_against_static_eager(benchmark, case):
    """Network time of the dynamic model against the static float32 U-Net of the same weights."""
    volume = load_volume(case)
    truth = load_labels(case.label, like=volume) > 0
    predictor = VolumePredictor(load_model("brats2021"), device="cpu")
    static = load_model("brats2021").segmenter.eval()
    set_quantization(static, quantize=False, update_range=False)
    slices = torch.from_numpy(to_slices(volume))
    times = {name: [] for name in [*PEERS, "network", "predict"]}

    def run_peers():
        for name, peer in PEERS.items():
            began = time.perf_counter()
            peer(static, slices)
            times[name].append(time.perf_counter() - began)

    def run():
        began = time.perf_counter()
        prediction = predictor.predict(volume)
        times["predict"].append(time.perf_counter() - began)
        times["network"].append(prediction.timings["network"])
        return prediction

    # quality first: what is faster must not tell the tumour worse than the peer does
    whole = from_slices(eager_batched(static, slices).numpy(), volume) > 0
    dynamic = run().labels > 0
    quality = {"dynamic": dice_score(dynamic, truth), "static": dice_score(whole, truth)}
    assert quality["dynamic"] >= quality["static"] - 0.01
    times["predict"].clear(), times["network"].clear()
    benchmark.pedantic(run, setup=run_peers, rounds=ROUNDS, warmup_rounds=0)
    median = {name: statistics.median(values) for name, values in times.items()}
    ratios = {
        f"{name} / {ours}": round(median[name] / median[ours], 2)
        for name in PEERS for ours in ("predict", "network")
    }
    benchmark.extra_info.update(
        case=volume.name, threads=torch.get_num_threads(), torch=torch.__version__,
        whole_tumour_dice={name: round(float(value), 4) for name, value in quality.items()},
        whole_tumour_agreement=round(float(dice_score(dynamic, whole)), 4),
        median_seconds={name: round(value, 3) for name, value in median.items()}, ratio=ratios,
    )
    print(median, ratios)
