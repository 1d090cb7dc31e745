"""The inference engine: what `VolumePredictor` and `meddanet segment` run a model with."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from ..layers import quantized_layers
from ..med_danet_v2 import MedDANetV2
from ..routing import RoutedSegmenter, Segmentation, channels_last
from .routing import SliceEngine

EXECUTORS = ("auto", "openvino", "torch", "eager")
CHUNK = 16


class Engine(Protocol):
    """A model, ready to run.

    Attributes:
        executor: "openvino", "torch" or "eager".
    """

    executor: str

    def segment(self, slices: Tensor) -> Segmentation:
        """Segments slices [N, C, H, W] float32 on the CPU; see `RoutedSegmenter.segment`."""


class EagerEngine:
    """A model's own `segment` on any device, a bounded number of slices at a time."""

    executor = "eager"

    def __init__(self, model: RoutedSegmenter, device: torch.device) -> None:
        self._model, self._device = model, device

    def segment(self, slices: Tensor) -> Segmentation:
        """Segments slices [N, C, H, W] on the CPU; see `RoutedSegmenter.segment`."""
        chunks = (channels_last(chunk.to(self._device)) for chunk in slices.split(CHUNK))
        parts = [[part.cpu() for part in self._model.segment(chunk)] for chunk in chunks]
        return Segmentation(*map(torch.cat, zip(*parts, strict=True)))


def compile_engine(
    model: RoutedSegmenter, device: str | torch.device = "auto", executor: str = "auto"
) -> Engine:
    """Prepares a model for inference; later changes of its weights do not reach the engine.

    Args:
        model: Trained, in `eval()`.
        device: "auto", "cpu", "cuda" or "cuda:N".
        executor: On a CPU "openvino" (int8 graphs; needs the extra `cpu`), "torch" (oneDNN int8 and
            float32), "eager" (the model's own layers), or "auto": the first of these that this
            machine, installation and model allow. On a GPU, and for V1's bank, only "eager" so far.

    Returns:
        An engine whose `segment` answers as the model's own does, up to rounding at ties. On a
        CPU it works on as many slices at a time as `torch.get_num_threads()` says now.

    Raises:
        ValueError: If the device is not there, or the executor unknown, not installed or not able
            to run the model, or a quantised layer has no input range.
    """
    if executor not in EXECUTORS:
        raise ValueError(f"executor is {executor!r}, expected one of {', '.join(EXECUTORS)}")
    place = resolve_device(device)
    if place.type != "cpu" and executor not in ("auto", "eager"):
        raise ValueError(f"executor {executor} runs on the CPU only; use device cpu")
    if executor in ("openvino", "torch") and not isinstance(model, MedDANetV2):
        raise ValueError(f"executor {executor} runs MedDANetV2 only; use auto or eager")
    if place.type != "cpu" or executor == "eager" or not isinstance(model, MedDANetV2):
        return EagerEngine(model.eval().to(place), place)
    model = model.eval().cpu()
    _check_ranges(model)
    if executor == "torch":
        return _torch_engine(model)
    try:
        return _openvino_engine(model)
    except ValueError:
        if executor == "openvino":
            raise
        return _torch_engine(model)


def _openvino_engine(model: MedDANetV2) -> SliceEngine:
    if find_spec("openvino") is None:
        raise ValueError(
            'executor openvino: OpenVINO is not installed; pip install "meddanet[cpu]"'
        )
    from .openvino_networks import OpenVINONetworks

    threads = torch.get_num_threads()
    return SliceEngine(model, OpenVINONetworks(model, threads), "openvino", threads)


def _torch_engine(model: MedDANetV2) -> SliceEngine:
    from .torch_networks import TorchNetworks

    return SliceEngine(model, TorchNetworks(model), "torch", torch.get_num_threads())


def _check_ranges(model: MedDANetV2) -> None:
    for name, layer in quantized_layers(model).items():
        if layer.quantize and not 0 < float(layer.input_amax) < float("inf"):
            raise ValueError(
                f"layer {name} has no input range; train the model before it is compiled"
            )


def resolve_device(name: str | torch.device) -> torch.device:
    """Returns the device that a name means on this machine.

    Raises:
        ValueError: If there is none.
    """
    if str(name) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}, expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name}: this machine has {torch.cuda.device_count()} CUDA GPUs; use cpu"
        )
    return device
