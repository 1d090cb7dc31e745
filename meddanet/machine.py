"""What a timing depends on: processor, GPUs, threads, versions; and when it was."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .version import __version__

RUNTIMES = "openvino", "onnxruntime", "triton"


def machine() -> dict[str, object]:
    """Returns what a timing on this machine depends on, JSON-ready."""
    cards = [gpu(index) for index in range(torch.cuda.device_count())]
    return {
        "processor": _processor(), "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(), "gpus": [card["device"] for card in cards],
        **({"cards": cards} if cards else {}), "platform": platform.platform(),
        "python": platform.python_version(), "torch": torch.__version__, "meddanet": __version__,
        **versions(RUNTIMES), "date": date(),
    }


def gpu(index: int = 0) -> dict[str, object]:
    """Returns what is to be known of a GPU: name, size, driver, clocks (MHz) and power (W)."""
    properties = torch.cuda.get_device_properties(index)
    asked = "driver_version", "clocks.sm", "clocks.max.sm", "power.limit"
    return {
        "device": properties.name, "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9, 1), "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **dict(zip(("driver", "sm_clock", "largest_sm_clock", "power_limit"),
                   _smi(f"GPU-{properties.uuid}", asked), strict=True)),
    }


def _smi(uuid: str, what: tuple[str, ...]) -> list[str]:
    """Asks nvidia-smi, which may number GPUs another way; "unknown" where it does not answer."""
    named = f"--query-gpu={','.join(what)}"
    command = ["nvidia-smi", named, "--format=csv,noheader,nounits", f"--id={uuid}"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ["unknown"] * len(what)
    return [value.strip() for value in found.strip().split(",")]


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
