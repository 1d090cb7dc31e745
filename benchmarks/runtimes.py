"""Other runtimes for the static U-Net of the same weights: what a user of a CPU would reach for.

Each `*_static` returns a run over the slices that it is given, or raises `Unavailable` saying why
it cannot; `by_nibabel` is the script around one.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from meddanet.bench import static_network
from meddanet.data import MODALITIES, Case, from_classes
from meddanet.engine.unreported import unreported
from meddanet.layers import set_quantization
from meddanet.med_danet_v2 import MedDANetV2

Labels = np.ndarray
Run = Callable[..., Labels]


class Unavailable(Exception):
    """A peer that this machine or installation does not have."""


def require(name: str) -> Any:
    """Returns a module, or raises `Unavailable`."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"{name} is not installed") from error


def openvino_static(model: MedDANetV2, slices: np.ndarray, num_bits: int) -> Run:
    """OpenVINO, one slice per stream, no stream idle; 8 bit by this package's codes and ranges.

    Args:
        model: Whose segmenter it is.
        slices: [N, C, H, W].
        num_bits: 8, or 32 for float32.

    Returns:
        A run over these slices, or over others of their shape that it is called with.
    """
    with unreported():
        ov = require("openvino")
    from openvino import opset13 as ops

    from meddanet.engine.openvino_graphs import exact_sums, to_labels
    from meddanet.engine.opset import record, translate

    network = static_network(model)
    if num_bits == 8:
        set_quantization(network, quantize=True, update_range=False)
    image = ops.parameter([1, *slices.shape[1:]], np.float32)
    core = ov.Core()
    (logits,) = translate(record(network), [image], exact_sums(core))
    labels = to_labels(logits)
    threads = torch.get_num_threads()
    compiled = core.compile_model(
        ov.Model([labels], [image]), "CPU",
        {"NUM_STREAMS": str(threads), "INFERENCE_NUM_THREADS": threads,
         "INFERENCE_PRECISION_HINT": "f32", "ENABLE_CPU_PINNING": False},
    )
    # one request that waits for every stream: 3 % faster than none
    queue = ov.AsyncInferQueue(compiled, 2 * threads)
    result = np.empty((len(slices), *slices.shape[2:]), np.uint8)

    def keep(request: Any, index: int) -> None:
        result[index] = request.get_output_tensor(0).data[0]

    queue.set_callback(keep)

    def run(images: np.ndarray = slices) -> Labels:
        for index in range(len(images)):
            queue.start_async([ov.Tensor(images[index : index + 1], shared_memory=True)], index)
        queue.wait_all()
        return result

    return run


def onnxruntime_static(
    model: MedDANetV2, slices: np.ndarray, num_bits: int, folder: Path
) -> Run:
    """ONNX Runtime, a slice per thread; 8 bit by its own quantisation, every 12th slice seen.

    Two slices at a time on a thread each are faster than one on two, most of all with 8 bit.
    """
    runtime = require("onnxruntime")
    require("onnx"), require("onnxscript")
    path = folder / "static.onnx"
    if not path.exists():
        network = static_network(model).to(memory_format=torch.contiguous_format)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                network, (torch.from_numpy(slices[:1]),), path, dynamo=True, verbose=False,
                input_names=["slices"], external_data=False,
            )
    if num_bits == 8:
        path = _quantized(path, slices[::12], folder / "static-int8.onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    callers = ThreadPoolExecutor(torch.get_num_threads())

    def label(part: np.ndarray) -> Labels:
        return session.run(None, {"slices": part})[0].argmax(1).astype(np.uint8)

    def run() -> Labels:
        return np.concatenate(list(callers.map(label, np.split(slices, len(slices)))))

    return run


def _quantized(path: Path, slices: np.ndarray, target: Path) -> Path:
    quantization = require("onnxruntime.quantization")

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.waiting = iter(np.split(slices, len(slices)))

        def get_next(self) -> dict[str, np.ndarray] | None:
            part = next(self.waiting, None)
            return None if part is None else {"slices": part}

    quantization.quantize_static(str(path), str(target), Reader(), per_channel=True)
    return target


def by_nibabel(case: Case, network: Callable[[torch.Tensor], np.ndarray], folder: Path) -> None:
    """What a script around nibabel and numpy does."""
    # the network's order; that of the files is another one
    images = [nib.load(case.files[name]) for name in MODALITIES]
    data = np.stack([image.get_fdata(dtype=np.float32) for image in images])
    mask = data.sum(0) > 0
    for channel in data:
        inside = channel[mask]
        channel[mask] = (inside - inside.mean()) / inside.std()
        channel[~mask] = 0
    slices = np.ascontiguousarray(np.moveaxis(data, -1, 0))
    labels = np.moveaxis(np.asarray(network(torch.from_numpy(slices))), 0, -1)
    labels = from_classes(labels.astype(np.uint8), "brats2021")
    nib.save(nib.Nifti1Image(labels, images[0].affine), folder / "labels.nii.gz")
