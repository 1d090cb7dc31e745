"""The papers' 3-D rivals as MONAI has them, on a whole volume: seconds, multiply-adds, memory.

    python benchmarks/context.py CASE [--networks V-Net,...] [--windows N] [--out FILE.json]

Outside of `make bench`, since one volume takes a 3-D network minutes on a CPU. Every network runs
in a process of its own, untrained (weights change neither time nor memory), float32, over the
windows of MONAI's `sliding_window_inference`: 128^3, overlap 0.5, one window at a time, as in
MONAI's BraTS tutorials. The volume lies normalised in memory; label voxels come out. Beside them,
in the same way, this package's engine with the shipped weights.

"seconds" is wall time, "cpu_seconds" the processor time of all threads, which other work on the
machine disturbs less. With --windows N only the first N windows run and the volume's seconds are
those of their median, times the number of windows: such rows say "estimated_from_windows"; with
--windows 0 nothing runs and multiply-adds are counted alone.
Multiply-adds are half of what PyTorch's FlopCounterMode counts, biases and norms left out.
With --out, the rows measured are put into the file and others that it holds are left alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memory import read_memory, reset_peak
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from meddanet.data import find_cases, load_volume, to_slices
from meddanet.machine import machine
from meddanet.predictor import VolumePredictor
from meddanet.weights import load_model

ROI, OVERLAP = (128, 128, 128), 0.5
LEVELS = {"channels": (16, 32, 64, 128, 256), "strides": (2, 2, 2, 2)}
# row: (class, arguments beside 4 modalities and 4 classes); the class's defaults where none are
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "3-D U-Net": ("BasicUNet", {"spatial_dims": 3}),
    "V-Net": ("VNet", {}),
    "Attention U-Net": ("AttentionUnet", {"spatial_dims": 3, **LEVELS}),
    "SwinUNETR": ("SwinUNETR", {"feature_size": 48}),
}
OURS = "Med-DANet V2"
# G "FLOPs" per case of V2's Tables 1 and 2: 128 slices of 128x128, one multiply-add counted once
PAPER_G = {"3-D U-Net": 1669.53, "V-Net": 749.29, "Attention U-Net": 132.67, OURS: 19.36}


class Enough(Exception):
    """As many windows as wanted have run."""


class Windows:
    """A network that keeps the times of its calls.

    Args:
        network: From windows to logits.
        limit: How many calls; the next one raises `Enough`.
    """

    def __init__(self, network: nn.Module, limit: int) -> None:
        self.network, self.limit = network, limit
        self.times: list[tuple[float, float]] = []

    def __call__(self, window: Tensor) -> Tensor:
        """Returns the logits of a window."""
        if len(self.times) == self.limit:
            raise Enough
        began, cpu = time.perf_counter(), time.process_time()
        output = self.network(window)
        self.times.append((time.perf_counter() - began, time.process_time() - cpu))
        return output


def windows_of(image: Tensor) -> int:
    """Counts the windows over a volume [1, C, H, W, D]."""
    from monai.inferers import sliding_window_inference

    count = 0

    def nothing(window: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return window[:, :1]

    sliding_window_inference(image, ROI, 1, nothing, OVERLAP)
    return count


@torch.inference_mode()
def count_macs(network: nn.Module) -> int:
    """Counts the multiply-adds of one window; nothing is computed."""
    with FlopCounterMode(display=False) as counter:
        deepcopy(network).to("meta")(torch.empty(1, 4, *ROI, device="meta"))
    return counter.get_total_flops() // 2


@torch.inference_mode()
def network_row(name: str, image: Tensor, limit: int | None) -> dict[str, Any]:
    """Runs a network of MONAI over the windows of a volume [1, 4, H, W, D]."""
    import monai
    from monai.inferers import sliding_window_inference

    kind, arguments = NETWORKS[name]
    torch.manual_seed(0)
    network = getattr(monai.networks.nets, kind)(in_channels=4, out_channels=4, **arguments).eval()
    count, macs = windows_of(image), count_macs(network)
    facts = {
        "network": f"monai {monai.__version__} {kind}", "arguments": arguments,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "roi": ROI, "overlap": OVERLAP, "windows": count,
        "macs_per_window": macs, "macs": macs * count,
    }
    if limit == 0:
        return facts
    windows = Windows(network, min(limit or count, count))
    reset_peak()
    began, cpu = time.perf_counter(), time.process_time()
    try:
        sliding_window_inference(image, ROI, 1, windows, OVERLAP).argmax(1).to(torch.uint8)
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
        estimated = {}
    except Enough:
        wall, busy = zip(*windows.times, strict=True)
        seconds, cpu_seconds = (count * statistics.median(times) for times in (wall, busy))
        estimated = {"estimated_from_windows": len(windows.times)}
    return {
        **facts, **estimated, "seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 2),
        "window_seconds": [[round(part, 3) for part in pair] for pair in windows.times],
        "peak_mb": read_memory()["peak_mb"],
    }


def engine_row(volume: Any) -> dict[str, Any]:
    """Runs this package's engine on the same slices, its graphs compiled before."""
    predictor = VolumePredictor(load_model(), "cpu")
    slices = predictor.fitted(torch.from_numpy(to_slices(predictor.ordered(volume))))
    cost = predictor.predict(volume).cost
    reset_peak()
    began, cpu = time.perf_counter(), time.process_time()
    predictor.engine.segment(slices)
    return {
        "network": f"engine, executor {predictor.engine.executor}",
        "seconds": round(time.perf_counter() - began, 3),
        "cpu_seconds": round(time.process_time() - cpu, 3),
        "peak_mb": read_memory()["peak_mb"], "macs": round(cost["mac"]),
    }


def measure(name: str, path: Path, limit: int | None) -> dict[str, Any]:
    """Returns the row of one network on one case, in this process."""
    volume = load_volume(find_cases(path)[0])
    if name == OURS:
        row = engine_row(volume)
    else:
        image = torch.from_numpy(np.moveaxis(to_slices(volume), 0, -1).copy())
        row = network_row(name, image[None], limit)
    return {"case": volume.name, "paper_g": PAPER_G.get(name), "machine": machine(), **row}


def in_own_process(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Runs `measure` in a fresh process, whose memory nothing else has touched."""
    command = [sys.executable, __file__, str(options.case), "--threads", str(options.threads)]
    if options.windows is not None:
        command += ["--windows", str(options.windows)]
    run = subprocess.run([*command, "--here", name], stdout=subprocess.PIPE, text=True)
    if run.returncode:
        sys.exit(f"{name}: its process ended with {run.returncode}")
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    """Measures the rows asked for and stores each as soon as it is there."""
    names = [*NETWORKS, OURS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", type=Path)
    parser.add_argument("--networks", default=",".join(names), help=f"of {', '.join(names)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--windows", type=int, help="runs so many of a network's windows only")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--here", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.here:
        print(json.dumps(measure(options.here, options.case, options.windows)))
        return
    chosen = options.networks.split(",")
    if unknown := set(chosen) - set(names):
        parser.error(f"--networks: unknown {', '.join(unknown)}; expected of {', '.join(names)}")
    for name in chosen:
        row = in_own_process(name, options)
        found = ("seconds", "cpu_seconds", "peak_mb", "macs")
        print(f"{name}: {({key: row[key] for key in found if key in row})}", flush=True)
        if options.out:
            known = json.loads(options.out.read_text()) if options.out.exists() else {"rows": {}}
            known["command"] = f"python benchmarks/context.py CASE --threads {options.threads}"
            known["rows"][name] = row
            options.out.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
