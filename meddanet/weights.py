"""Weights as safetensors files that say what they are."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .build import build_med_danet_v2
from .layers import quantized_layers, set_quantization
from .med_danet_v2 import MedDANetV2
from .version import __version__

PRETRAINED = Path(__file__).parent / "pretrained"
_RANGE = "quantization.{}.input_amax"


def pretrained_names() -> list[str]:
    """Returns the names of the weights that came with the package."""
    return sorted(path.stem for path in PRETRAINED.glob("*.safetensors"))


def save_model(
    model: MedDANetV2,
    path: str | Path,
    *,
    modalities: tuple[str, ...] = ("flair", "t1ce", "t1", "t2"),
    label_convention: str = "brats2021",
    **notes: object,
) -> None:
    """Writes weights, input ranges and what is needed to use them; complete or not at all.

    Args:
        model: Built by `build_med_danet_v2`.
        path: Ends in .safetensors.
        modalities: Order of the input channels.
        label_convention: What the classes mean.
        **notes: Anything else worth knowing, such as the training split; stored as JSON.
    """
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    for name, layer in quantized_layers(model).items():
        tensors[_RANGE.format(name)] = layer.input_amax.clone()
    facts = {
        "architecture": model.config, "modalities": list(modalities),
        "label_convention": label_convention, "normalisation": "z-score in the joint brain mask",
        "spacing_mm": [1.0, 1.0, 1.0], "meddanet": __version__, **notes,
    }
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    save_file(tensors, partial, {key: json.dumps(value) for key, value in facts.items()})
    os.replace(partial, path)


def load_model(path_or_name: str | Path = "brats2021") -> MedDANetV2:
    """Loads a model, ready to segment.

    Args:
        path_or_name: A .safetensors file written by `save_model`, or the name of shipped weights.

    Returns:
        The model in `eval()`, input ranges fixed, with the file's facts in `model.metadata`.

    Raises:
        ValueError: If there is no such file or name, or the file is not one of ours.
    """
    path = Path(path_or_name)
    if path.suffix != ".safetensors":
        path = PRETRAINED / f"{path_or_name}.safetensors"
    if not path.is_file():
        names = ", ".join(pretrained_names()) or "none"
        raise ValueError(f"{path_or_name}: no such weights; shipped are: {names}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a meddanet weights file ({error})") from error
    if "architecture" not in metadata:
        raise ValueError(f"{path}: says nothing of its architecture; was it written by save_model?")
    model = build_med_danet_v2(**metadata["architecture"])
    layers = quantized_layers(model)
    ranges = {_RANGE.format(name): layer for name, layer in layers.items()}
    missing = sorted((ranges.keys() | model.state_dict().keys()) ^ tensors.keys())
    if missing:
        raise ValueError(f"{path}: does not fit its architecture, first at {missing[0]}")
    for name, layer in ranges.items():
        layer.input_amax.copy_(tensors.pop(name))
    model.load_state_dict(tensors)
    model.metadata = metadata
    set_quantization(model, quantize=True, update_range=False)
    return model.eval().to(memory_format=torch.channels_last)
