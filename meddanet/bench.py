"""How fast a model is on this machine, against the static network that it makes dynamic.

Every round runs all contestants one after the other, so that a ratio is of neighbours in time.
Besides wall time stands CPU time, which other programs on the machine disturb less.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from copy import deepcopy
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .data import Volume, to_slices
from .layers import set_quantization
from .med_danet_v2 import MedDANetV2
from .metrics import dice_score
from .predictor import VolumePredictor
from .routing import RoutedSegmenter, channels_last, to_memory_format
from .version import __version__

BATCH = 8
RUNTIMES = "openvino", "onnxruntime", "triton"
Run = Callable[[], object]


def time_interleaved(
    runs: Mapping[str, Run], rounds: int, warm_up: bool = True
) -> dict[str, dict[str, float]]:
    """Times several contestants in turns.

    Args:
        runs: What to time, by name.
        rounds: How often.
        warm_up: Whether each runs once unmeasured before; False where all have run already.

    Returns:
        For each name "seconds" (median of wall time), "fastest", "slowest" and "cpu_seconds"
        (median of the processor time of all threads).

    Raises:
        ValueError: If `rounds` is below 1.
    """
    check_rounds(rounds)
    for run in runs.values() if warm_up else ():
        run()
    wall: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began, cpu_began = time.perf_counter(), time.process_time()
            run()
            wall[name].append(time.perf_counter() - began)
            cpu[name].append(time.process_time() - cpu_began)
    return {
        name: {
            "seconds": statistics.median(wall[name]),
            "fastest": min(wall[name]),
            "slowest": max(wall[name]),
            "cpu_seconds": statistics.median(cpu[name]),
        }
        for name in runs
    }


def check_rounds(rounds: int) -> None:
    """Raises ValueError unless something is timed at all."""
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}, expected at least 1")


def ratios(times: Mapping[str, Mapping[str, float]], base: str) -> dict[str, dict[str, float]]:
    """Returns how many times as long as `base` each contestant takes, in wall and CPU time."""
    return {
        name: {
            key: round(found[key] / times[base][key], 2) for key in ("seconds", "cpu_seconds")
        }
        for name, found in times.items() if name != base
    }


def machine() -> dict[str, object]:
    """Returns what a timing depends on: processor, threads, versions; and when it was."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "processor": _processor(), "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(), "gpus": gpus, "platform": platform.platform(),
        "python": platform.python_version(), "torch": torch.__version__, "meddanet": __version__,
        **versions(RUNTIMES), "date": date(),
    }  # fmt: skip


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Returns the versions of those packages that are installed."""
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def date() -> str:
    """Returns the present date and time, in a form that sorts as time goes."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "")


# the static network ----------------------------------------------------------------------------


def static_network(model: MedDANetV2) -> nn.Module:
    """Returns a copy of the model's segmenter in float32: every slice whole, nothing decided."""
    static = deepcopy(model.segmenter).eval()
    set_quantization(static, quantize=False, update_range=False)
    return static


@torch.inference_mode()
def slice_by_slice(network: Callable[[Tensor], Tensor], slices: Tensor) -> Tensor:
    """The way the official code runs: one slice at a time in PyTorch's default layout."""
    return torch.cat([_labels(network(part)) for part in slices.split(1)])


@torch.inference_mode()
def batched(network: Callable[[Tensor], Tensor], slices: Tensor) -> Tensor:
    """Eight slices at a time in PyTorch's default layout."""
    return torch.cat([_labels(network(part)) for part in slices.split(BATCH)])


@torch.inference_mode()
def batched_channels_last(network: Callable[[Tensor], Tensor], slices: Tensor) -> Tensor:
    """Eight slices at a time with channels last: what a careful user writes."""
    return torch.cat([_labels(network(channels_last(part))) for part in slices.split(BATCH)])


def _labels(logits: Tensor) -> Tensor:
    return logits.argmax(1).to(torch.uint8).cpu()


def torch_peers(model: MedDANetV2, slices: Tensor) -> tuple[dict[str, Run], dict[str, str]]:
    """Returns the static network as PyTorch runs it, by name, and why others cannot run here.

    Args:
        model: Whose segmenter it is; it runs where the slices are.
        slices: [N, C, H, W].
    """
    # contiguous once more: loaded weights have their channels last already
    plain = to_memory_format(static_network(model).to(slices.device), torch.contiguous_format)
    last = to_memory_format(deepcopy(plain), torch.channels_last)
    runs: dict[str, Run] = {
        "eager slice by slice": lambda: slice_by_slice(plain, slices),
        "eager batched": lambda: batched(plain, slices),
        "eager channels_last": lambda: batched_channels_last(last, slices),
    }
    if slices.is_cuda:
        half, halves = deepcopy(last).half(), slices.half()
        runs["eager float16 channels_last"] = lambda: batched_channels_last(half, halves)
    compiled = torch.compile(last)
    padded = torch.cat([slices, slices[: -len(slices) % BATCH]])  # one shape, compiled once
    try:
        batched_channels_last(compiled, padded[:BATCH])
    except Exception as error:  # a missing compiler comes as many kinds of error
        reason = " ".join(str(error).split())[:200]
        return runs, {"torch.compile channels_last": f"{type(error).__name__}: {reason}"}
    runs["torch.compile channels_last"] = (
        lambda: batched_channels_last(compiled, padded)[: len(slices)]
    )
    return runs, {}


def plan_times(engine: Any, slices: Tensor, rounds: int) -> dict[str, object]:
    """Times the GPU's work of a recorded plan on one volume that lies there already.

    Args:
        engine: Of executor "triton" on a GPU; of any other, nothing is timed.
        slices: [N, C, H, W] on the CPU.
        rounds: How often.

    Returns:
        "slices" of a run, "runs" for a volume, and "seconds", the median of all runs together by
        CUDA events; empty if nothing is timed.
    """
    if engine.executor != "triton" or engine.device.type != "cuda":
        return {}
    plan, run = engine.plan(len(slices), *slices.shape[2:])
    capacity, times = plan.capacity, []
    chunks = [chunk.to(engine.device) for chunk in slices.split(capacity)]
    for _ in range(rounds + 1):
        milliseconds = 0.0
        for chunk in chunks:
            plan.images.zero_()[: len(chunk)].copy_(chunk)
            with torch.cuda.device(engine.device):
                milliseconds += _milliseconds(run)
        times.append(milliseconds / 1000)
    return {"slices": capacity, "runs": len(chunks), "seconds": statistics.median(times[1:])}


def _milliseconds(run: Callable[[], object]) -> float:
    """Returns the time of a call by events of the current GPU."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def bench_volume(
    model: RoutedSegmenter,
    volume: Volume,
    device: str = "auto",
    executor: str = "auto",
    rounds: int = 3,
) -> dict:
    """Times a model's engine against its static network on one volume, in one run.

    Args:
        model: From `load_model`.
        volume: From `load_volume`.
        device: As for `VolumePredictor`.
        executor: As for `compile_engine`.
        rounds: How often everything is timed.

    Returns:
        JSON-ready: "machine", "case", "decisions", "agreement" (Dice of the engine's lesion with
        that of the model's own layers), "times", "ratios", "not_run" with reasons, and "plan", the
        GPU's own time of a recorded plan (`plan_times`).

    Raises:
        ValueError: If the model is not a `MedDANetV2`, or `rounds` is below 1.
    """
    check_rounds(rounds)
    if not isinstance(model, MedDANetV2):
        raise ValueError(f"bench times MedDANetV2 only, these weights are a {type(model).__name__}")
    predictor = VolumePredictor(model, device, executor=executor)
    reference = VolumePredictor(model, device, executor="eager")
    prediction, expected = predictor.predict(volume), reference.predict(volume)
    slices = torch.from_numpy(to_slices(predictor.ordered(volume), window_hu=predictor.window_hu))
    fitting = predictor.fitted(slices)
    peers, not_run = torch_peers(model, fitting.to(predictor.device))
    runs: dict[str, Run] = {
        **peers,
        "engine": lambda: predictor.engine.segment(fitting),
        "predict": lambda: predictor.predict(volume),
    }
    if predictor.device.type == "cuda":
        runs["the model's own layers"] = lambda: reference.engine.segment(fitting)
    times = time_interleaved(runs, rounds)
    counts = np.bincount(prediction.decisions.ravel(), minlength=len(prediction.routes))
    return {
        "machine": machine(), "device": str(predictor.device),
        "executor": predictor.engine.executor, "case": volume.name, "shape": list(fitting.shape),
        "decisions": dict(zip(prediction.routes, counts.tolist(), strict=True)),
        "agreement": float(dice_score(prediction.labels > 0, expected.labels > 0)),
        "rounds": rounds, "times": times, "not_run": not_run,
        "plan": plan_times(predictor.engine, fitting, rounds),
        "ratios": {base: ratios(times, base) for base in ("engine", "predict")},
    }


def render(result: dict) -> str:
    """Returns the result of `bench_volume` as a table: times, and whether the answers agree."""
    lines = [f"{'':28} {'seconds':>8} {'CPU s':>8} {'/ engine':>9}"]
    base = result["times"]["engine"]["seconds"]
    for name, found in result["times"].items():
        seconds, cpu = found["seconds"], found["cpu_seconds"]
        lines.append(f"{name:28} {seconds:8.3f} {cpu:8.3f} {seconds / base:8.1f}x")
    lines.append(
        f"{'agreement':28} {result['agreement']:8.4f}  "
        "Dice of the engine's lesion with that of the model's own layers"
    )
    lines += [f"{name:28} not run: {reason}" for name, reason in result["not_run"].items()]
    if plan := result["plan"]:
        lines.append(
            f"{'recorded plan, GPU time':28} {plan['seconds']:8.5f}  in {plan['runs']} runs of "
            f"{plan['slices']} slices"
        )
    return "\n".join(lines)
