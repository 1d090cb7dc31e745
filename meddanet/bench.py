"""How fast a model is on this machine, against the static network that it makes dynamic.

Every round runs all contestants one after the other, so that a ratio is of neighbours in time.
Besides wall time stands CPU time, which other programs on the machine disturb less.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .data import Volume, to_slices
from .layers import set_quantization
from .machine import machine
from .med_danet_v2 import MedDANetV2
from .metrics import dice_score
from .predictor import VolumePredictor
from .routing import RoutedSegmenter, channels_last, to_memory_format

# slices at a time, and on a GPU
BATCH, GPU_BATCH = 8, 16
# Dice of what two networks call lesion, from which on they are taken for the same
SAME = 0.98
Run = Callable[[], object]
Tell = Callable[[str], object]


def _in_silence(line: str) -> None:
    """Tells nobody."""


def time_interleaved(
    runs: Mapping[str, Run], rounds: int, warm_up: bool = True, tell: Tell = _in_silence
) -> dict[str, dict[str, float]]:
    """Times several contestants in turns.

    Args:
        runs: What to time, by name.
        rounds: How often.
        warm_up: Whether each runs once unmeasured before; False where all have run already.
        tell: Called with a line of progress before each round.

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
    for number in range(rounds):
        tell(f"round {number + 1} of {rounds}")
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


# the static network ----------------------------------------------------------------------------


def static_network(model: MedDANetV2) -> nn.Module:
    """Returns a copy of the model's segmenter in float32: every slice whole, nothing decided."""
    static = deepcopy(model.segmenter).eval()
    set_quantization(static, quantize=False, update_range=False)
    return static


@torch.inference_mode()
def slice_by_slice(network: Callable[[Tensor], Tensor], slices: Tensor) -> Tensor:
    """The way the official code runs: one slice at a time in PyTorch's default layout."""
    return torch.cat([_labels(network(part)) for part in slices.split(1)]).cpu()


@torch.inference_mode()
def batched(network: Callable[[Tensor], Tensor], slices: Tensor) -> Tensor:
    """Several slices at a time in PyTorch's default layout."""
    return torch.cat([_labels(network(part)) for part in _batches(slices)]).cpu()


@torch.inference_mode()
def batched_channels_last(network: Callable[[Tensor], Tensor], slices: Tensor) -> Tensor:
    """Several slices at a time with channels last: what a careful user writes."""
    return torch.cat([_labels(network(channels_last(part))) for part in _batches(slices)]).cpu()


def _batches(slices: Tensor) -> tuple[Tensor, ...]:
    return slices.split(GPU_BATCH if slices.is_cuda else BATCH)


def _labels(logits: Tensor) -> Tensor:
    return logits.argmax(1).to(torch.uint8)


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
    tuned = {"torch.compile channels_last": (last, slices)}
    if slices.is_cuda:
        half, halves = deepcopy(last).half(), slices.half()
        runs["eager float16 channels_last"] = lambda: batched_channels_last(half, halves)
        tuned["torch.compile float16 channels_last"] = half, halves
    missing = {}
    for name, (network, given) in tuned.items():
        try:
            runs[name] = _compiled(network, given)
        except Exception as error:  # a missing compiler comes as many kinds of error
            reason = " ".join(str(error).split())[:200]
            missing[name] = f"{type(error).__name__}: {reason}"
    return runs, missing


def _compiled(network: nn.Module, slices: Tensor) -> Run:
    """Compiles a network for batches of one shape, and returns its run over slices."""
    compiled = torch.compile(network)
    batch = len(_batches(slices)[0])
    padded = torch.cat([slices, slices[: -len(slices) % batch]])
    batched_channels_last(compiled, padded[:batch])
    return lambda: batched_channels_last(compiled, padded)[: len(slices)]


def same_answers(runs: Mapping[str, Run]) -> tuple[dict[str, float], dict[str, str]]:
    """Runs each once and compares the labels with those of the first.

    Returns:
        Dice of what is not background, by name, and why those below `SAME` are not to be timed.
    """
    dice: dict[str, float] = {}
    expected = None
    for name, run in runs.items():
        labels = np.asarray(run()) > 0
        expected = labels if expected is None else expected
        dice[name] = float(dice_score(labels, expected))
    first = next(iter(dice), "")
    wrong = {
        name: f"its lesion has Dice {found:.3f} with that of {first}, expected {SAME} or more"
        for name, found in dice.items() if found < SAME
    }
    return dice, wrong


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
    tell: Tell = _in_silence,
) -> dict:
    """Times a model's engine against its static network on one volume, in one run.

    Args:
        model: From `load_model`.
        volume: From `load_volume`.
        device: As for `VolumePredictor`.
        executor: As for `compile_engine`.
        rounds: How often everything is timed.
        tell: Called with lines of progress.

    Returns:
        JSON-ready: "machine", "case", "decisions", "agreement" (Dice of the engine's lesion with
        that of the model's own layers), "static_agreement" (of each static peer's with the first
        one's; what differs is not timed), "times", "ratios", "not_run" with reasons, and "plan",
        the GPU's own time of a recorded plan (`plan_times`).

    Raises:
        ValueError: If the model is not a `MedDANetV2`, or `rounds` is below 1.
    """
    check_rounds(rounds)
    if not isinstance(model, MedDANetV2):
        raise ValueError(f"bench times MedDANetV2 only, these weights are a {type(model).__name__}")
    tell("preparing the engine and the model's own layers")
    predictor = VolumePredictor(model, device, executor=executor)
    reference = VolumePredictor(model, device, executor="eager")
    prediction, expected = predictor.predict(volume), reference.predict(volume)
    slices = torch.from_numpy(to_slices(predictor.ordered(volume), window_hu=predictor.window_hu))
    fitting = predictor.fitted(slices)
    tell("preparing the static networks and comparing their answers")
    peers, not_run = torch_peers(model, fitting.to(predictor.device))
    alike, wrong = same_answers(peers)
    not_run |= wrong
    ours: dict[str, Run] = {
        "engine": lambda: predictor.engine.segment(fitting),
        "predict": lambda: predictor.predict(volume),
    }
    if predictor.device.type == "cuda":
        ours["the model's own layers"] = lambda: reference.engine.segment(fitting)
    # the peers have run once, for their answers
    for run in ours.values():
        run()
    runs = {name: run for name, run in peers.items() if name not in wrong} | ours
    times = time_interleaved(runs, rounds, warm_up=False, tell=tell)
    counts = np.bincount(prediction.decisions.ravel(), minlength=len(prediction.routes))
    return {
        "machine": machine(), "device": str(predictor.device),
        "executor": predictor.engine.executor, "case": volume.name, "shape": list(fitting.shape),
        "decisions": dict(zip(prediction.routes, counts.tolist(), strict=True)),
        "agreement": float(dice_score(prediction.labels > 0, expected.labels > 0)),
        "static_agreement": alike,
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
