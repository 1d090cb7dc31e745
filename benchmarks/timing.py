"""Times providers of one operation in turn and keeps one JSON of results that grows case by case.

Numbers per provider, each as median, 20th and 80th percentile over the rounds; every round
times every provider once, in turn, so that a clock that drifts meets all alike:

    cold   GPU time between two events, nothing in the L2 cache, launches queued beforehand;
           where "queued" is false they outlast the queue, and the GPU's waiting is in it
    graph  GPU time per replay of a CUDA graph, caches warm; absent where capture fails
    wall   time on the host from the call to the end of its work: what eager code feels
    cpu    processor time of the same call, where there is no GPU: other work moves it little

On a CPU there are the last two alone.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meddanet.machine import RUNTIMES, date, gpu, versions

DRY_RUN = os.environ.get("MEDDANET_DRY_RUN") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not DRY_RUN else "cpu")
ROUNDS = 3 if DRY_RUN else 30
REPLAYS = 10
# twice the largest L2 cache there is, and 1.5 to 2 ms, to hold a layer's whole training step
FLUSH_BYTES, QUEUE_CYCLES = 256 << 20, 3_000_000

Provider = Callable[[], Any]


def commit() -> str:
    """Returns the checkout's commit, "-dirty" where files have changed, or "unknown"."""
    found = _git("describe", "--always", "--abbrev=12")
    # results are written while others are still being measured
    changed = _git("status", "--porcelain", "--untracked-files=no", ":/", ":!results")
    suffix = "-dirty" if changed else ""
    return found + suffix if found else os.environ.get("MEDDANET_COMMIT", "unknown")


def _git(*arguments: str) -> str:
    command, root = ["git", *arguments], Path(__file__).parent
    return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip()


def environment() -> dict[str, Any]:
    """Returns what a result depends on: device, versions, commit."""
    facts: dict[str, Any] = {
        "commit": commit(), "date": date(), "dry_run": DRY_RUN,
        "python": platform.python_version(), "torch": torch.__version__,
        "threads": torch.get_num_threads(), "device": f"CPU, {platform.machine()}",
        **versions((*RUNTIMES, "torchvision", "torch-tensorrt", "tensorrt")),
    }
    if DEVICE.type == "cuda":
        facts |= gpu()
        facts["copy_gb_per_s"] = round(copy_bandwidth(), 1)
    return facts


def card_name(device: str) -> str:
    """Returns what files call a card: "NVIDIA GeForce RTX 4090" is rtx-4090."""
    short = re.sub(r"\b(NVIDIA|GeForce)\b", "", device)
    return re.sub(r"\W+", "-", short.lower()).strip("-")


def copy_bandwidth() -> float:
    """Returns what a plain copy of 1 GiB reaches, in 10^9 bytes read and written per second."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    times = [between_events(lambda: target.copy_(source)) for _ in range(10)]
    return 2 * (1 << 30) / statistics.median(times) / 1e6


def between_events(function: Provider) -> float:
    """Returns milliseconds of GPU time, launches queued before the first one starts."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(QUEUE_CYCLES)
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def queue_holds(function: Provider) -> bool:
    """Tells whether the GPU comes to a call's first launch only when the last one is queued."""
    begin = torch.cuda.Event()
    torch.cuda._sleep(QUEUE_CYCLES)
    begin.record()
    function()
    held = not begin.query()
    torch.cuda.synchronize()
    return held


def _captured(function: Provider) -> Provider | None:
    """Returns the replay of a graph of the function; None where it cannot be captured."""
    try:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            function()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        graph.replay()
        torch.cuda.synchronize()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def finish() -> None:
    """Waits for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


class Stopwatch:
    """All times of one provider.

    Args:
        function: What is timed, without arguments.
        capture: Whether to try a CUDA graph; a backward pass through autograd is left eager.
    """

    def __init__(self, function: Provider, capture: bool) -> None:
        self.function = function
        self.times: dict[str, list[float]] = {}
        for _ in range(3):
            function()
        finish()
        self.graph, self.facts = None, dict[str, Any]()
        if DEVICE.type == "cuda":
            if capture:
                self.graph = _captured(function)
                # which has given the allocator's memory back
                function()
                finish()
            self.facts["queued"] = queue_holds(function)
        self.peak_mb = self._peak()

    def _peak(self) -> float | None:
        """Returns the megabytes that one call takes at most, beyond what is there before."""
        if DEVICE.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.function()
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_allocated() - before) / 1e6, 2)

    def round(self, flush: Tensor | None) -> None:
        """Adds one measurement of each kind, in milliseconds."""
        if flush is not None:
            flush.zero_()
            self._add("cold", between_events(self.function))
            if self.graph is not None:
                replay = self.graph
                total = between_events(lambda: [replay() for _ in range(REPLAYS)])
                self._add("graph", total / REPLAYS)
        finish()
        began, busy = time.perf_counter(), time.process_time()
        self.function()
        finish()
        self._add("wall", 1e3 * (time.perf_counter() - began))
        if DEVICE.type == "cpu":
            self._add("cpu", 1e3 * (time.process_time() - busy))

    def _add(self, kind: str, milliseconds: float) -> None:
        self.times.setdefault(kind, []).append(milliseconds)

    def summary(self) -> dict[str, Any]:
        """Returns median, 20th and 80th percentile of each kind, and what else is known."""
        rows: dict[str, Any] = dict(self.facts)
        for kind, values in self.times.items():
            low, _, _, high = statistics.quantiles(values, n=5, method="inclusive")
            quantiles = (statistics.median(values), low, high)
            rows[f"{kind}_ms"] = dict(
                zip(("median", "p20", "p80"), (round(q, 5) for q in quantiles), strict=True)
            )
        return rows | ({} if self.peak_mb is None else {"peak_mb": self.peak_mb})


class Results:
    """One JSON file: the environment, then a row per case; whole after every case."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = {"environment": environment(), "cases": []}

    def add(self, row: dict[str, Any]) -> None:
        """Appends a row and writes the file anew."""
        self.content["cases"].append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        partial.replace(self.path)


def compare(
    ours: str, providers: dict[str, Provider], capture: bool = True, rounds: int = ROUNDS
) -> dict[str, Any]:
    """Times all providers in turn, in as many rounds.

    A peer that cannot run here has its row too, with the reason instead of numbers.

    Returns:
        "providers": numbers by name; "ratios": by peer and kind, its median over ours (above 1:
        ours is faster).

    Raises:
        Exception: Whatever `ours` raises.
    """
    watches: dict[str, Stopwatch] = {}
    rows: dict[str, Any] = {}
    for name, function in providers.items():
        try:
            watches[name] = Stopwatch(function, capture)
        except Exception as error:
            if name == ours:
                raise
            rows[name] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
    cuda = DEVICE.type == "cuda"
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=DEVICE) if cuda else None
    for number in range(rounds):
        names = list(watches)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            watches[name].round(flush)
    rows |= {name: watch.summary() for name, watch in watches.items()}
    ratios = {
        name: {
            kind: round(row[kind]["median"] / rows[ours][kind]["median"], 3)
            for kind in ("cold_ms", "graph_ms", "wall_ms", "cpu_ms")
            if kind in row and kind in rows[ours]
        }
        for name, row in rows.items()
        if name != ours and "failed" not in row
    }
    clocks = {"sm_clock_after": gpu()["sm_clock"]} if cuda else {}
    return {"ours": ours, "rounds": rounds, "providers": rows, "ratios": ratios, **clocks}
