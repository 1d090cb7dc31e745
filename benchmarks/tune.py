"""Tries block sizes of the recorded plan's integer convolutions on a GPU and tells the best ones.

    python benchmarks/tune.py RESULT.json [--case FOLDER] [--rounds 8] [--whole] [--channels 64]

One volume is routed, then every class of convolutions (channels, taps, stride, pixels, widths) is
launched with every candidate: outputs must stay the same bit for bit, times are GPU times of a
CUDA graph of the launch alone. Candidates compile beforehand, on all cores. What is printed is a
line per class: what `blocks()` in `kernels/conv_int_triton.py` says now, and the best found.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import product
from typing import Any

import torch
from plan_launches import (
    REPEATS,
    arguments,
    captured,
    every_slice_whole,
    microseconds,
    plan_holding,
    slices_of,
    stop_without_gpu,
)
from timing import environment
from torch import Tensor

from meddanet import load_model
from meddanet.engine import compile_engine
from meddanet.engine.lowering import Launch
from meddanet.engine.plan import Plan, PlannedModel
from meddanet.kernels import conv_int_triton, variants
from meddanet.kernels.backend import architecture
from meddanet.kernels.conv_call import ConvCall

Sizes = dict[str, Any]


def candidates(launch: Any) -> Iterator[Sizes]:
    """Yields block sizes that fit a convolution; chunks of moments that are stored are given."""
    call: ConvCall = launch.run.args[0]
    rows, depth = call.conv.codes.shape[2:]
    chunk = conv_int_triton.new_moments(call)[1] if _moments(launch) else None
    wide, channels = len(call.input) == 2, call.conv.in_channels
    columns = [n for n in (16, 32, 64, 128) if min(rows, 32) <= n <= max(16, rows)]
    chunks = [k for k in (64, 128) if depth % k == 0 and channels % k == 0] or [32]
    if channels <= 16 and depth <= 160:
        # fewer waits for loads, some of them for nothing: the last block reaches beyond K
        chunks = [k for k in (32, 64, 128, 256) if k < 2 * depth]
    for m, n, k, warps in product((32, 64, 128, 256), columns, chunks, (2, 4, 8)):
        sums = m * n / (32 * warps)
        if not 16 <= sums <= 128 or m * k / (32 * warps) > 128 or m * n < 512 * warps // 2:
            continue
        if chunk not in (None, m):
            continue
        parts = (min(m, 32), 16) if chunk is None else (m, max(16, n // 2))
        # copies ahead in a loop, as of 16 bits, or loads where it is unrolled, as of 8 alone
        looped = wide or depth > 18 * k
        for stages, ahead in ((1, 2), (3, 2)) if looped else ((1, 1), (1, 2)):
            sizes = {"BLOCK_M": m, "BLOCK_N": n, "PART_M": parts[0], "PART_N": parts[1]}
            loads = {"BLOCK_K": k, "STAGES": stages, "AHEAD": ahead}
            yield sizes | loads | {"num_warps": warps, "maxnreg": None}


def _moments(launch: Any) -> bool:
    return len(launch.run.args) > 4 and launch.run.args[4] is not None


def class_of(launch: Any) -> tuple:
    """Returns what a table of block sizes could tell apart."""
    call: ConvCall = launch.run.args[0]
    conv = call.conv
    height, width = call.input.shape[3:] if conv.transposed else call.output_size
    rows, depth = conv.codes.shape[2:]
    return (conv.in_channels, rows, depth, conv.stride[0], conv.transposed, len(call.input) == 2,
            height * width, call.skip_amax is not None, _moments(launch))


class Tuned:
    """One class of convolutions: a launch of it, and what it stores."""

    def __init__(self, launch: Launch) -> None:
        self.launch: Any = launch
        # not moments, whose last bits hang on the order of sums
        self.call, *outputs = launch.run.args[:4]
        self.outputs: list[Tensor] = [output for output in outputs if output is not None]
        self.before = [output.clone() for output in self.outputs]
        # the rule's choice, as `blocks` is called by the launcher
        seen: list[Sizes] = []

        def watch(*arguments: Any) -> Sizes:
            seen.append(original(*arguments))
            return seen[-1]

        conv_int_triton.blocks = watch
        self.right = self._outputs()
        self.default = seen[0]

    def _outputs(self) -> list[Tensor]:
        """Returns the bits of what a launch stores; slots not in use may hold NaN."""
        for output, before in zip(self.outputs, self.before, strict=True):
            output.copy_(before)
        self.launch.run()
        kinds = {torch.float16: torch.int16, torch.float32: torch.int32}
        return [out.view(kinds.get(out.dtype, out.dtype)).clone() for out in self.outputs]

    def time(self, sizes: Sizes, rounds: int) -> float:
        """Returns microseconds; infinity where sizes do not run, or change a bit."""
        conv_int_triton.blocks = lambda *arguments: sizes
        try:
            same = all(map(torch.equal, self._outputs(), self.right))
            if not same:
                print(f"{self.launch.name} with {sizes}: another result", flush=True)
                return float("inf")
            return microseconds(captured(self.launch.run, REPEATS), rounds) / REPEATS
        except Exception as error:  # too much shared memory, too many registers
            print(f"{self.launch.name} with {sizes}: {type(error).__name__}", flush=True)
            return float("inf")


original: Callable[..., Sizes] = conv_int_triton.blocks


def classes(slices: Tensor, whole: bool) -> dict[tuple, list[Launch]]:
    """Returns the convolutions of the groups in use by their classes."""
    engine: Any = compile_engine(load_model(), "cuda", "triton")
    plan, _ = plan_holding(engine, slices, roomy=whole)
    (every_slice_whole(plan) if whole else plan.run)()
    found: dict[tuple, list[Launch]] = {}
    for group in plan.groups:
        if not int(group.count):
            continue
        for launch in group.launches:
            if launch.run.func is conv_int_triton.run:
                found.setdefault(class_of(launch), []).append(launch)
    return found


def compile_part(arch: int, part: int, parts: int, channels: int) -> None:
    """Compiles every so-many-th candidate into the JIT's cache, from a plan without memory."""
    planned, plans = PlannedModel(load_model(), torch.device("cpu")), []
    variants.record(arch, "plan", lambda: plans.append(Plan(planned, 8, (240, 240), roomy=False)))
    found: dict[tuple, Launch] = {}
    for launch in plans[0].groups[0].launches:
        if launch.run.func is conv_int_triton.run:
            found.setdefault(class_of(launch), launch)
    listed = [(launch, sizes) for key, launch in found.items() if key[0] >= channels
              for sizes in candidates(launch)]
    for launch, sizes in listed[part::parts]:
        conv_int_triton.blocks = lambda *arguments, sizes=sizes: sizes
        for variant in variants.record(arch, launch.name, launch.run):
            with suppress(Exception):  # its turn to be timed will tell
                variant.compile()


def compile_beforehand(channels: int) -> None:
    """Compiles all candidates, in a process per core."""
    arch = architecture(torch.device("cuda"))
    parts = os.cpu_count() or 1
    running = [
        subprocess.Popen(
            [sys.executable, __file__, "-", "--compile", f"{arch},{part},{parts}",
             "--channels", str(channels)],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        )
        for part in range(parts)
    ]
    for process in running:
        process.wait()


@torch.no_grad()
def main() -> None:
    """Measures, writes a row per class, and prints the best."""
    parser = arguments(__doc__, 8)
    parser.add_argument("--whole", action="store_true", help="every slice whole, none cropped")
    parser.add_argument("--channels", type=int, default=0, help="at the least, going in")
    parser.add_argument("--compile", help="arch,part,parts: what a process of its own does")
    options = parser.parse_args()
    if options.compile:
        return compile_part(*map(int, options.compile.split(",")), options.channels)
    stop_without_gpu()
    compile_beforehand(options.channels)
    name, slices, _ = slices_of(options.case)
    found = {
        key: launches for key, launches in classes(slices, options.whole).items()
        if key[0] >= options.channels
    }
    rows, facts = [], environment()
    for key, launches in found.items():
        # made in its turn: it reads what a class before it stored last
        one = Tuned(launches[0])
        conv_int_triton.blocks = original
        tried = [one.default, *candidates(one.launch)]
        times = sorted(
            ((one.time(sizes, options.rounds), number) for number, sizes in enumerate(tried))
        )
        now = next(time for time, number in times if number == 0)
        rows.append({
            "class": list(key), "launches": [launch.name for launch in launches],
            "now_us": round(now, 2), "now": one.default,
            "best": [[round(time, 2), tried[number]] for time, number in times[:12]],
        })
        best = times[0]
        print(f"{one.launch.name} {key}: {now:.1f} -> {best[0]:.1f} us x {len(launches)}, "
              f"{one.default} -> {tried[best[1]]}", flush=True)
        content = {
            "command": "python benchmarks/tune.py RESULT.json --case CASE", "case": name,
            "whole": options.whole, "classes": len(found), "environment": facts, "rows": rows,
        }
        options.result.write_text(json.dumps(content, indent=1) + "\n")
    conv_int_triton.blocks = original


if __name__ == "__main__":
    main()
