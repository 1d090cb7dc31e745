"""The inference engine: what `VolumePredictor` and `meddanet segment` run a model with."""

from __future__ import annotations

from copy import deepcopy
from typing import Protocol

import torch
from torch import Tensor, nn

from ..devices import resolve_device
from ..kernels.backend import chosen_backend, import_fault, triton_fault
from ..layers import quantized_layers
from ..med_danet import MedDANet
from ..med_danet_v2 import MedDANetV2
from ..networks.transbts import TransBTS
from ..networks.unet import UNet
from ..routing import RoutedSegmenter, Segmentation, channels_last, check_routed
from .bank import BankEngine
from .immovable import Immovable
from .routing import CropEngine
from .slices import NOT_FINITE, SliceEngine
from .unreported import unreported

EXECUTORS = ("auto", "openvino", "torch", "triton", "eager")
CHUNK = 16
# what executors other than eager run one by one: see `networks.unet.UNet`
SEGMENTER_PARTS = ("init", "dropout", "encoder", "decode", "stage_channels")
# and what they run in place of
PARTED = ("features", "encode")


class Engine(Protocol):
    """A model, ready to run.

    Attributes:
        executor: "openvino", "torch", "triton" or "eager".
        passed_over: Why "auto" took none that comes before it; "" where it took the first.
    """

    executor: str
    passed_over: str

    def segment(self, slices: Tensor) -> Segmentation:
        """Segments slices [N, C, H, W] float32, on the CPU or where the networks run.

        See `RoutedSegmenter.segment`; what it returns is on the CPU.

        Raises:
            ValueError: If the shape does not fit, or values are NaN or infinite; "triton", which
                never waits for the GPU, does not ask after these.
        """


class EagerEngine(Immovable):
    """A model's own `segment` on any device, a bounded number of slices at a time."""

    executor = "eager"
    passed_over = ""

    def __init__(self, model: RoutedSegmenter, device: torch.device) -> None:
        self._model, self._device = model, device

    def segment(self, slices: Tensor) -> Segmentation:
        """Segments slices [N, C, H, W] on any device; see `Engine.segment`."""
        self._model.check(slices)
        slices = slices.float()
        if not slices.isfinite().all():
            raise ValueError(NOT_FINITE)
        chunks = (channels_last(chunk.to(self._device)) for chunk in slices.split(CHUNK))
        # float32 whatever the caller's autocast is, as in every executor
        with torch.autocast(self._device.type, enabled=False):
            parts = [[part.cpu() for part in self._model.segment(chunk)] for chunk in chunks]
        return Segmentation.joined(parts)


def compile_engine(
    model: RoutedSegmenter, device: str | torch.device = "auto", executor: str = "auto"
) -> Engine:
    """Prepares a copy of a model for inference: later changes of its weights do not reach it.

    Args:
        model: Trained; stays as it is, in its mode, dtype and on its device. Its copy is float32.
        device: "auto", "cpu", "cuda" or "cuda:N".
        executor: On a CPU "openvino" (graphs in int8 where the machine's sums are exact, else in
            float32; needs the extra `cpu`), "torch" (oneDNN int8, likewise, and float32), "eager"
            (the model's own layers), or "auto": the first of these that this machine, installation
            and model allow. On a GPU "triton" (a recorded plan of this package's integer kernels;
            compute capability 8.0, V2 with U-Net segmenters, every layer of theirs quantised),
            "eager", or "auto", likewise. V2 with a segmenter without the
            parts of `UNet` or with `features` or `encode` of its own, V1 with members other than
            `UNet` and `TransBTS`, V1 on a GPU and subclasses of either run in "eager" alone. Under
            TRITON_INTERPRET=1 "triton" runs on the CPU too, very slowly, for tests.

    What `use_backend` says is read here by "torch", which takes oneDNN's int8 under "auto" and
    "onednn" alone, and by "triton", which runs under "auto" and "triton" alone; by "eager" whenever
    it segments, as by the model itself; by "openvino", whose graphs are its own, never.

    Returns:
        An engine whose `segment` answers as the model's own does, up to rounding at ties; "triton"
        rounds the decision networks and the residual stream to float16. On a CPU it works on as
        many slices at a time as `torch.get_num_threads()` says now. Its `executor` and
        `passed_over` say what "auto" chose, and why nothing before it. It can be neither pickled
        nor copied: send the model, and make an engine in each process.

    Raises:
        ValueError: If the model is no `RoutedSegmenter`, the device not there, or the executor
            unknown, not installed or not able to run the model there, or a quantised layer has no
            input range.
    """
    if executor not in EXECUTORS:
        raise ValueError(f"executor is {executor!r}, expected one of {', '.join(EXECUTORS)}")
    check_routed(model)
    place = resolve_device(device)
    misfit = _misfit(model, place.type != "cpu" or executor == "triton")
    if misfit and executor not in ("auto", "eager"):
        raise ValueError(f"executor {executor} {misfit}; use auto or eager")
    if place.type != "cpu" and executor in ("openvino", "torch"):
        raise ValueError(f"executor {executor} runs on the CPU only; use device cpu")
    # slices are float32; weights of lower precision lose nothing
    model = deepcopy(model).eval().float()
    if executor == "eager":
        return EagerEngine(model.to(place), place)
    if misfit:
        return _instead(EagerEngine(model.to(place), place), f"any other executor {misfit}")
    _check_ranges(model)
    if executor == "triton":
        return _triton_engine(model, place)
    if place.type != "cpu":
        return _gpu_engine(model, place)
    model = model.cpu()
    if executor == "torch":
        return _torch_engine(model)
    try:
        return _openvino_engine(model)
    except ValueError as error:
        if executor == "openvino":
            raise
        return _instead(_torch_engine(model), error)


def _instead(engine: Engine, reason: object) -> Engine:
    """Notes why "auto" comes to an engine that is not its first choice."""
    engine.passed_over = str(reason)
    return engine


def _misfit(model: RoutedSegmenter, in_plan: bool) -> str:
    """Returns why no executor but eager runs a model, in a plan or slice by slice; "" if one may.

    What others run part by part must be no more than these parts: not a subclass.
    """
    if type(model) is MedDANet and not in_plan:
        return _misfit_in_bank(model)
    if type(model) is not MedDANetV2:
        return f"runs {'' if in_plan else 'MedDANet and '}MedDANetV2 only"
    missing = [name for name in SEGMENTER_PARTS if not hasattr(model.segmenter, name)]
    if missing:
        return f"needs a segmenter with {', '.join(missing)}"
    own = [name for name in PARTED if not _is_unets(model.segmenter, name)]
    return f"runs the parts of UNet, not a segmenter's own {' and '.join(own)}" if own else ""


def _is_unets(segmenter: nn.Module, method: str) -> bool:
    """Tells whether a method is UNet's, neither overridden nor replaced on the instance."""
    return getattr(getattr(segmenter, method, None), "__func__", None) is getattr(UNet, method)


def _misfit_in_bank(model: MedDANet) -> str:
    for member in model.bank:
        if type(member) not in (UNet, TransBTS):
            return f"runs banks of UNet and TransBTS only, not of {type(member).__name__}"
    return ""


def _gpu_engine(model: RoutedSegmenter, place: torch.device) -> Engine:
    try:
        return _triton_engine(model, place)
    except ValueError as error:
        return _instead(EagerEngine(model.to(place), place), error)


def _triton_engine(model: RoutedSegmenter, place: torch.device) -> Engine:
    check_triton(place)
    from .triton_engine import TritonEngine

    assert isinstance(model, MedDANetV2), "all others are misfits"
    return TritonEngine(model, place)


def check_triton(place: torch.device) -> None:
    """Raises ValueError, with the cure, unless Triton's kernels run on a device."""
    if chosen_backend() not in ("auto", "triton"):
        raise ValueError(
            f"executor triton: backend {chosen_backend()} is chosen; use_backend auto or triton"
        )
    if fault := import_fault("triton", "triton"):
        raise ValueError(f"executor triton: {fault}")
    from triton import knobs

    if (place.type == "cpu") != bool(knobs.runtime.interpret):
        raise ValueError(
            "executor triton runs on CUDA GPUs, and on the CPU under TRITON_INTERPRET=1 alone; "
            "use auto or eager"
        )
    if place.type == "cuda" and torch.cuda.get_device_capability(place) < (8, 0):
        major, minor = torch.cuda.get_device_capability(place)
        raise ValueError(
            f"executor triton needs compute capability 8.0, this GPU has {major}.{minor}; use eager"
        )
    if place.type == "cuda" and (fault := triton_fault(place)):
        raise ValueError(f"executor triton: {fault}")


def _openvino_engine(model: RoutedSegmenter) -> SliceEngine:
    with unreported():
        fault = import_fault("openvino", '"meddanet[cpu]"')
    if fault:
        raise ValueError(f"executor openvino, the fastest on a CPU: {fault}")
    from .openvino_bank import OpenVINOBank
    from .openvino_networks import OpenVINONetworks

    threads = torch.get_num_threads()
    # the graphs have threads of their own; one caller for each leaves these idle in between
    options = "openvino", threads, 2 * threads
    try:
        if isinstance(model, MedDANet):
            return BankEngine(model, OpenVINOBank(model, threads), *options)
        assert isinstance(model, MedDANetV2), "all others are misfits"
        return CropEngine(model, OpenVINONetworks(model, threads), *options)
    except RuntimeError as error:  # as of an installation without the CPU's plugin
        told = " ".join(str(error).split())
        raise ValueError(f"executor openvino: {told}; use executor torch") from error


def _torch_engine(model: RoutedSegmenter) -> SliceEngine:
    from .torch_networks import TorchBank, TorchNetworks

    threads = torch.get_num_threads()
    if isinstance(model, MedDANet):
        return BankEngine(model, TorchBank(model), "torch", threads, threads)
    assert isinstance(model, MedDANetV2), "all others are misfits"
    return CropEngine(model, TorchNetworks(model), "torch", threads, threads)


def _check_ranges(model: RoutedSegmenter) -> None:
    for name, layer in quantized_layers(model).items():
        if layer.quantize and not 0 < float(layer.input_amax) < float("inf"):
            raise ValueError(
                f"layer {name} has no input range; train the model before it is compiled, or "
                "use executor eager"
            )
