"""Tries block sizes, warps and registers of the decision networks' stages on a GPU.

    python benchmarks/tune_stage.py RESULT.json [--case FOLDER] [--rounds 10]

One volume is routed, then the policy, the position network and both side by side are timed as the
plan runs them, with the rule's own choice first: GPU times of a CUDA graph of ten runs. Answers
must stay near those of the first, for products may be summed in another order.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from plan_launches import (
    arguments,
    captured,
    microseconds,
    plan_holding,
    slices_of,
    stop_without_gpu,
)
from timing import environment

from meddanet import load_model
from meddanet.engine import compile_engine
from meddanet.kernels import shuffle_stage_triton as stage
from meddanet.kernels.side_by_side import compile_side_by_side

# pixels of a block times the square of its widest row, as a power of two; warps; registers
VARIANTS = [
    (17, 8, None), (17, 8, 80), (17, 8, 64), (18, 16, None), (18, 16, 64), (17, 16, None),
    (17, 4, None), (16, 4, None), (18, 8, None),
    # fewer than 64 pixels: on sm_90 without wgmma, before which all stores are waited for
    (15, 8, None), (15, 4, None), (15, 2, None),
]
REPEATS = 10


class Bounded:
    """The kernel with a bound on its registers."""

    def __init__(self, kernel: Any, registers: int) -> None:
        self.kernel, self.registers = kernel, registers

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return lambda *arguments, **constants: self.kernel[grid](
            *arguments, **constants, maxnreg=self.registers
        )


@torch.no_grad()
def main() -> None:
    """Measures, writes a row per variant, and prints it."""
    options = arguments(__doc__, 10).parse_args()
    stop_without_gpu()
    name, slices, _ = slices_of(options.case)
    engine: Any = compile_engine(load_model(), "cuda", "triton")
    plan, _ = plan_holding(engine, slices)
    plan.run()
    runs = {
        "decide_us": plan._decide, "locate_us": plan._locate,
        "both_us": lambda: plan._side_by_side(*plan._deciding),
    }
    answers = plan._routes, plan._places
    right = [answer[: len(slices)].clone() for answer in answers]
    held = plan._seen[: len(slices)] != 0
    kernel, rows, facts = stage.shuffle_stage_kernel, [], environment()
    for power, warps, registers in VARIANTS:
        stage.AREA, stage.WARPS = 1 << power, warps
        stage.shuffle_stage_kernel = kernel if registers is None else Bounded(kernel, registers)
        compile_side_by_side(runs["both_us"])
        for answer in answers:
            answer.fill_(float("nan"))
        runs["both_us"]()
        for answer, expected in zip(answers, right, strict=True):
            found = answer[: len(slices)][held]
            torch.testing.assert_close(found, expected[held], rtol=0.02, atol=0.02)
        times = {
            label: round(microseconds(captured(run, REPEATS), options.rounds) / REPEATS, 1)
            for label, run in runs.items()
        }
        rows.append({"area": 1 << power, "warps": warps, "registers": registers, **times})
        print(rows[-1], flush=True)
        content = {
            "command": "python benchmarks/tune_stage.py RESULT.json --case CASE", "case": name,
            "environment": facts, "rows": rows,
        }
        options.result.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
