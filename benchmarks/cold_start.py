"""What precompiled kernels save a fresh process.

    python benchmarks/cold_start.py RESULT.json [--arch 89] [--rounds 5]

Every round starts processes with an empty Triton cache, one with entries that `aot.build` made for
the architecture, the others without. Without a GPU a process makes every listed kernel ready as the
JIT does up to the driver: listing, then compiling, one after the other or in threads side by side,
or reading each (`triton.compile`). Not in that time: starting Python and importing torch and triton
(told apart), loading code onto a device, and the C launcher that Triton builds once per machine.
"kernels_ready_cpu" is the processor time of compiling or reading alone, which other work on the
machine hardly moves. With a GPU it is the first call of the engine's `segment` with the shipped
weights, and the second one is told beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton

from meddanet.kernels import aot, precompiled

READY = """
import json, resource, sys, time
began = time.perf_counter()
import torch, triton
imported = time.perf_counter()
from meddanet.kernels import variants
from meddanet.kernels.side_by_side import compile_in_threads
listed = variants.variants(int(sys.argv[1]))
def cpu():
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)
busy = cpu()
if sys.argv[2] == "side by side":
    list(compile_in_threads(listed))
for variant in listed:
    variant.compile()
print(json.dumps({"import": imported - began, "kernels_ready": time.perf_counter() - imported,
                  "kernels_ready_cpu": cpu() - busy, "kernels": len(listed)}))
"""
SEGMENT = """
import json, sys, time
began = time.perf_counter()
import torch
from meddanet.engine import compile_engine, triton_engine
from meddanet.weights import load_model
engine = compile_engine(load_model(), "cuda", "triton")
slices = torch.randn(16, 4, 240, 240)
if sys.argv[2] == "one after the other":
    triton_engine.compile_side_by_side = lambda launch: None
times = {"import": time.perf_counter() - began}
for name in ("first_segment", "second_segment"):
    began = time.perf_counter()
    engine.segment(slices)
    times[name] = time.perf_counter() - began
print(json.dumps(times))
"""


ALONE, TOGETHER, BEFORE = "one after the other", "side by side", "precompiled"


def fresh_process(code: str, arch: int, way: str, home: Path) -> dict[str, float]:
    """Runs code with an empty Triton cache and a user's folder that may hold entries."""
    with tempfile.TemporaryDirectory() as cache:
        variables = {"TRITON_CACHE_DIR": cache, "XDG_CACHE_HOME": str(home)}
        run = subprocess.run(
            [sys.executable, "-c", code, str(arch), way],
            env=os.environ | variables, capture_output=True, text=True, check=True,
        )
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    """Measures and writes the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--arch", type=int, default=89, help="without a GPU: which one")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if precompiled.PACKAGED.exists():
        sys.exit(f"{precompiled.PACKAGED} has entries that both sides would find: remove it")
    gpu = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    arch = 10 * gpu[0] + gpu[1] if gpu else options.arch
    rows: dict[str, list[dict[str, float]]] = {way: [] for way in (ALONE, TOGETHER, BEFORE)}
    facts = {
        "command": " ".join(["python", "benchmarks/cold_start.py", *sys.argv[1:]]),
        "measured": "first and second segment" if gpu else "every listed kernel ready, no GPU",
        "device": torch.cuda.get_device_name() if gpu else f"none, for sm_{arch}",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "python": platform.python_version(), "torch": torch.__version__,
        "triton": triton.__version__,
    }
    with tempfile.TemporaryDirectory() as home, tempfile.TemporaryDirectory() as empty:
        aot.build([arch], Path(home) / "meddanet" / "kernels")
        for done in range(1, options.rounds + 1):
            for way, runs in rows.items():
                folder = Path(home if way == BEFORE else empty)
                runs.append(fresh_process(SEGMENT if gpu else READY, arch, way, folder))
            write(options.result, facts | {"rounds": done}, rows)


def write(path: Path, facts: dict, rows: dict[str, list[dict[str, float]]]) -> None:
    """Writes and prints the medians of the rounds so far."""
    medians = {
        name: {key: round(statistics.median(r[key] for r in runs), 3) for key in runs[0]}
        for name, runs in rows.items()
    }
    content = facts | {"median_seconds": medians, "rows": rows}
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(medians, indent=1), flush=True)


if __name__ == "__main__":
    main()
