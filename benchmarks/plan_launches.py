"""Times every launch of the engine's recorded plan by itself, on a GPU.

    python benchmarks/plan_launches.py RESULT.json [--case FOLDER] [--rounds 20]

One volume's slices are routed, then each launch is captured alone, REPEATS times in a CUDA graph,
and that graph is timed by events: GPU time per launch with warm caches and without gaps, the slots
in use being those of the volume. Beside it stands the whole plan's replay, and a replay in which
every slice that holds anything is taken whole and nothing is decided. Without a case it is a
phantom. A launch may be several kernels: a decision network is one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import between_events, environment
from torch import Tensor

from meddanet import load_model, load_volume
from meddanet.data import canonical, find_cases, load_labels, normalize, to_slices
from meddanet.data.phantom import make_phantom
from meddanet.engine import compile_engine
from meddanet.engine.decisions import answers
from meddanet.predictor import VolumePredictor

REPEATS = 20


def slices_of(case: Path | None) -> tuple[str, Tensor, np.ndarray]:
    """Returns name, normalised slices [D, C, H, W] and lesion [D, H, W] of a case, or a phantom.

    Args:
        case: The folder of a labelled case; None = a phantom of the usual size.
    """
    if case is None:
        phantom = make_phantom(0, (240, 240, 155))
        images = normalize(phantom.data).transpose(3, 0, 1, 2)
        lesion = phantom.labels.transpose(2, 0, 1) > 0
        return "phantom", torch.from_numpy(images.copy()), lesion
    predictor = VolumePredictor(load_model(), "cpu", executor="eager")
    found = find_cases(case)[0]
    volume = load_volume(found)
    slices = predictor.fitted(torch.from_numpy(to_slices(predictor.ordered(volume))))
    labels = canonical(load_labels(str(found.label), like=volume), volume.affine)
    return volume.name, slices, labels.transpose(2, 0, 1) > 0


def arguments(doc: str, rounds: int) -> argparse.ArgumentParser:
    """Returns what the commands that work on one case's plan take: result, case and rounds."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--case", type=Path, help="a folder of NIfTI files; else a phantom")
    parser.add_argument("--rounds", type=int, default=rounds)
    return parser


def stop_without_gpu() -> None:
    """Ends a command that needs a GPU where there is none."""
    if not torch.cuda.is_available():
        sys.exit(f"{Path(sys.argv[0]).name}: PyTorch sees no CUDA GPU")


def plan_holding(
    engine: Any, slices: Tensor, roomy: bool | None = None
) -> tuple[Any, Callable[[], Any]]:
    """Returns an engine's plan with slices in its buffer, and what runs it; `roomy` as there."""
    plan, replay = engine.plan(len(slices), *slices.shape[2:], roomy=roomy)
    plan.images.zero_()[: len(slices)].copy_(slices)
    return plan, replay


def captured(run: Callable[[], object], repeats: int) -> Callable[[], None]:
    """Returns the replay of a graph of so many calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(repeats):
            run()
    return graph.replay


def microseconds(run: Callable[[], object], rounds: int) -> float:
    """Returns the median GPU time of a call."""
    return 1e3 * statistics.median(between_events(run) for _ in range(rounds))


def every_slice_whole(plan: Any) -> Callable[[], None]:
    """Returns a run of the plan without the decision networks, in which no slice is cropped."""

    def run() -> None:
        plan._routes.zero_()[:, -1] = 1
        for launch in plan.launches:
            if launch.name not in ("decide", "locate"):
                launch.run()

    return run


def parts_of(network: Any, view: Tensor, seen: Tensor, rounds: int) -> dict[str, float]:
    """Returns the times of a decision network's layers, those of its `stages` one by one."""
    found, x = {}, view
    for name, child in network.named_children():
        # of a network whose head is no operation, what follows the maps is left out
        if name in ("classifier", "centre"):
            break
        for number, layer in enumerate(child if name == "stages" else [child]):
            label = f"{name} {number}" if name == "stages" else name
            more = network.asked(view) if name == "head" else ()
            run = partial(answers, layer, x, seen, *more)
            found[label] = round(microseconds(captured(run, REPEATS), rounds) / REPEATS, 2)
            x = run()
    return found


def measure(slices: Tensor, rounds: int) -> dict[str, Any]:
    """Returns the times of the whole plan, of its routes and of every launch."""
    engine: Any = compile_engine(load_model(), "cuda", "triton")
    engine.segment(slices)
    plan, replay = plan_holding(engine, slices)
    with torch.no_grad():
        plan.run()
        whole = microseconds(replay, rounds)
        decisions = plan.decisions[: len(slices)].bincount(minlength=len(plan.groups) + 1).tolist()
        launches, widths = [], plan.num_bits.clone()
        for launch in plan.launches:
            # repeats of a block add to its stream: widths must be the volume's again
            plan.run()
            time = microseconds(captured(launch.run, REPEATS), rounds) / REPEATS
            launches.append((launch.name, time))
        plan.run()
        assert torch.equal(plan.num_bits, widths), "the volume's widths have changed"
        planned = plan._planned
        networks = {
            name: parts_of(getattr(planned, name), plan._view, plan._seen, rounds)
            for name in ("policy", "position")
        }
        roomy, _ = plan_holding(engine, slices, roomy=True)
        roomy.run()
        all_whole = microseconds(captured(every_slice_whole(roomy), 1), rounds)
    parts: dict[str, float] = {}
    for name, time in launches:
        part = name.split(":")[0] if ":" in name else "decisions and routing"
        parts[part] = parts.get(part, 0) + time
    return {
        "capacity": plan.capacity, "roomy": plan.roomy, "slices": len(slices),
        "decisions": decisions, "replay_us": round(whole, 1),
        "every_slice_whole_us": round(all_whole, 1),
        "sum_of_launches_us": round(sum(parts.values()), 1),
        "parts_us": {name: round(time, 1) for name, time in parts.items()},
        "networks_us": networks, "launches_us": [[name, round(time, 2)] for name, time in launches],
    }


def main() -> None:
    """Measures, writes and prints what takes longest."""
    options = arguments(__doc__, 20).parse_args()
    stop_without_gpu()
    name, slices, _ = slices_of(options.case)
    found = {
        "command": "python benchmarks/plan_launches.py RESULT.json --case CASE",
        "environment": environment(), "case": name, **measure(slices, options.rounds),
    }
    options.result.write_text(json.dumps(found, indent=1) + "\n")
    for name, time in sorted(found["launches_us"], key=lambda row: -row[1])[:40]:
        print(f"{time:9.2f} us  {name}")
    told = "decisions", "replay_us", "every_slice_whole_us", "parts_us", "networks_us"
    print(json.dumps({key: found[key] for key in told}))


if __name__ == "__main__":
    main()
