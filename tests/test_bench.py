"""Timing in turns, with a clock that tells what the test wants."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from meddanet import bench, machine
from meddanet.bench import ratios, static_network, time_interleaved
from meddanet.build import build_med_danet_v2
from meddanet.layers import quantized_layers


def test_contestants_take_turns_and_medians_are_theirs(monkeypatch):
    now = 0.0
    calls = []
    durations = {"slow": iter([9, 4, 8, 6]), "quick": iter([9, 1, 2, 30])}

    def contestant(name):
        def run():
            nonlocal now
            calls.append(name)
            now += next(durations[name])
        return run

    monkeypatch.setattr(bench.time, "perf_counter", lambda: now)
    monkeypatch.setattr(bench.time, "process_time", lambda: 2 * now)
    times = time_interleaved({name: contestant(name) for name in durations}, rounds=3)
    assert calls == ["slow", "quick"] * 4
    assert times["slow"] == {"seconds": 6, "fastest": 4, "slowest": 8, "cpu_seconds": 12}
    assert times["quick"] == {"seconds": 2, "fastest": 1, "slowest": 30, "cpu_seconds": 4}
    assert ratios(times, "quick") == {"slow": {"seconds": 3, "cpu_seconds": 3}}
    durations["slow"], durations["quick"] = iter([3]), iter([1])
    calls.clear()
    told = []
    warm = time_interleaved({name: contestant(name) for name in durations}, 1, False, told.append)
    assert told == ["round 1 of 1"]
    assert calls == ["slow", "quick"] and warm["slow"]["seconds"] == 3
    with pytest.raises(ValueError, match="rounds is 0, expected at least 1"):
        time_interleaved({}, 0)


def test_the_static_network_is_a_copy_in_full_precision():
    model = build_med_danet_v2("unet-12", crop_sizes=(16,)).eval()
    static = static_network(model)
    assert not any(layer.quantize for layer in quantized_layers(static).values())
    assert all(layer.quantize for layer in quantized_layers(model).values())
    slices = torch.randn(3, 4, 32, 32)
    with torch.no_grad():
        expected = static(slices).argmax(1).to(torch.uint8)
    for way in (bench.slice_by_slice, bench.batched, bench.batched_channels_last):
        assert torch.equal(way(static, slices), expected)


def test_peers_that_answer_otherwise_are_not_timed():
    lesion = torch.zeros(2, 8, 8, dtype=torch.uint8)
    lesion[:, 2:6, 2:6] = 1
    other = lesion.clone()
    other[0, 2, 2:4] = 0  # 30 of 32 voxels: Dice 60 / 62
    runs = {"first": lambda: lesion, "alike": lambda: 3 * lesion, "off": lambda: other}
    dice, wrong = bench.same_answers({**runs, "empty": lambda: 0 * lesion})
    assert dice == {"first": 1, "alike": 1, "off": pytest.approx(60 / 62), "empty": 0}
    assert wrong.keys() == {"off", "empty"}
    assert wrong["off"] == "its lesion has Dice 0.968 with that of first, expected 0.98 or more"


def test_the_machine_names_the_runtimes_that_are_there(monkeypatch):
    def installed(name):
        if name == "openvino":
            return "2026.4"
        raise machine.PackageNotFoundError(name)

    monkeypatch.setattr(machine, "version", installed)
    facts = machine.machine()
    assert facts["openvino"] == "2026.4" and "onnxruntime" not in facts
    assert facts["date"] > "2026" and facts["date"].endswith(" UTC")


def test_a_gpu_is_asked_by_its_own_name(monkeypatch):
    """nvidia-smi may number GPUs otherwise than PyTorch, and may not be there."""
    card = SimpleNamespace(
        name="NVIDIA GeForce RTX 4090", major=8, minor=9, multi_processor_count=128,
        total_memory=25_386_352_640, uuid="1d2e3f",
    )
    asked = []

    def answer(command, **options):
        asked.append(command)
        return SimpleNamespace(stdout="580.159.04, 2520, 3105, 450.00\n")

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(machine.subprocess, "run", answer)
    facts = machine.gpu(0)
    assert facts["device"].endswith("RTX 4090") and facts["capability"] == "8.9"
    assert facts["memory_gb"] == 25.4 and facts["driver"] == "580.159.04"
    assert (facts["sm_clock"], facts["largest_sm_clock"], facts["power_limit"]) == (
        "2520", "3105", "450.00"
    )
    assert "--id=GPU-1d2e3f" in asked[0]

    def missing(command, **options):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(machine.subprocess, "run", missing)
    assert machine.gpu(0)["driver"] == machine.gpu(0)["power_limit"] == "unknown"
