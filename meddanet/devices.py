"""Where tensors live, by name."""

from __future__ import annotations

import torch


def resolve_device(name: str | torch.device) -> torch.device:
    """Returns the device that "auto", "cpu", "cuda" or "cuda:N" means on this machine.

    A GPU has its number, since the current one is each thread's own.

    Raises:
        ValueError: If the name is none of these or the device is not there.
    """
    if str(name) == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}, expected auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}, expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name}: this machine has {torch.cuda.device_count()} CUDA GPUs; use cpu"
        )
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def emulates_bfloat16(device: torch.device) -> bool:
    """Tells whether a device is a CPU that computes in bfloat16 several times slower than without.

    PyTorch, asked by oneDNN's own question, says so of x86 without AVX-512.
    """
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return device.type == "cpu" and supported is not None and not supported()
