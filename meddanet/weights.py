"""Weights as safetensors files that say what they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from .build import build_med_danet, build_med_danet_v2
from .data.conventions import MODALITIES, canonical_modality
from .data.labels import label_facts
from .data.storage import write_bytes
from .layers import quantized_layers
from .routing import RoutedSegmenter, to_memory_format
from .version import __version__
from .weight_files import ENDING, check_facts, facts_in, locate, weight_errors

_BUILDERS: dict[str, Callable[..., RoutedSegmenter]] = {
    "MedDANet": build_med_danet, "MedDANetV2": build_med_danet_v2,
}
_RANGE = "quantization.{}.input_amax"


def save_model(
    model: RoutedSegmenter,
    path: str | Path,
    *,
    modalities: Sequence[str] | None = None,
    label_convention: str | None = None,
    **notes: Any,
) -> None:
    """Writes weights, input ranges and what is needed to use them; complete or not at all.

    What the file says from which a model was loaded is kept, but for what is given here.

    Args:
        model: Built by `build_med_danet` or `build_med_danet_v2`.
        path: Ends in .safetensors.
        modalities: Order of the input channels; by default flair, t1ce, t1, t2.
        label_convention: What the classes mean, a key of `LABELS`; by default brats2021 for four
            classes of a brain's modalities. Any others, "values", are written as `label_values`
            says, or class k as k.
        **notes: Anything else worth knowing, such as the training split; stored as JSON. These are
            used: `label_values` (class -> value in label files), `window_hu` (Hounsfield values
            that become 0 and 1), `spacing_mm` (of the training data, three numbers), `canvas` and
            `centre` (size in pixels of the training slices, and of the body's place in them).

    Raises:
        ValueError: If the name's ending, the number of modalities or what the labels are does not
            fit, a note has no JSON, another form than told here or a name that the file uses
            itself, neither builder has made the model, or a part of it has been replaced by one
            that its `config` does not build.
        VolumeError: If the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ENDING:
        raise ValueError(f"{path}: expected a name that ends in {ENDING}")
    tensors = _tensors_as_built(model)
    known = getattr(model, "metadata", {})
    own = {
        "model": type(model).__name__,
        "architecture": model.config,
        "modalities": _names(modalities or known.get("modalities", MODALITIES), model.in_channels),
        "meddanet": __version__,
    }
    if taken := sorted(own.keys() & notes.keys()):
        raise ValueError(
            f"notes are called {', '.join(taken)}, which is what save_model itself writes; name "
            "them otherwise"
        )
    facts = {
        "normalisation": "z-score in the joint brain mask",
        "spacing_mm": [1.0, 1.0, 1.0],
        **known,
        **notes,
        **own,
    }
    values = notes.get("label_values")
    if values is None and label_convention in (None, "values"):
        label_convention = label_convention or known.get("label_convention")
        values = known.get("label_values")
    elif values is not None:
        _check_values(label_convention, values, model.num_classes)
    facts.pop("label_values", None)
    facts |= label_facts(label_convention, values, facts["modalities"], model.num_classes)
    try:
        texts = {key: json.dumps(value) for key, value in facts.items()}
    except TypeError as error:
        raise ValueError(f"notes: {error}; expected what JSON has") from error
    check_facts(facts)
    tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
    write_bytes(path, _in_order(save(tensors, texts)))


def _tensors_as_built(model: RoutedSegmenter) -> dict[str, Tensor]:
    """Returns a model's tensors by their names in the file.

    Raises:
        ValueError: If they are not those that `load_model` would look for.
    """
    kind = type(model).__name__
    if kind not in _BUILDERS or not hasattr(model, "config"):
        raise ValueError(
            f"save_model keeps what build_med_danet or build_med_danet_v2 has made; of this "
            f"{kind} keep the state_dict and the ranges (docs/kernels.md)"
        )
    tensors = _tensors(model)
    if odd := _misfits(tensors, _tensors(_built(kind, model.config))):
        raise ValueError(
            f"model is not what its config builds: {len(odd)} tensors differ, first {odd[0]}; "
            "build one with the part that was changed, or keep state_dict and ranges "
            "(docs/kernels.md)"
        )
    return tensors


def _check_values(convention: str | None, values: Any, num_classes: int) -> None:
    """Raises ValueError unless values, which are given, are for classes and stand alone."""
    if convention not in (None, "values"):
        raise ValueError(f"label_convention is {convention} beside label_values; give one of them")
    odd = set(map(str, values)) - set(map(str, range(1, num_classes)))
    if odd and isinstance(values, Mapping):
        raise ValueError(
            f"label_values are of {', '.join(sorted(odd))}, expected classes 1 to {num_classes - 1}"
        )


def _in_order(file: bytes) -> bytes:
    """Sorts the facts of a safetensors file, which come in another order each time.

    So the same weights make the same file, by whose SHA-256 results are known.
    """
    start = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors lie on eights
    return len(text).to_bytes(8, "little") + text + file[start:]


def _names(modalities: Sequence[str], count: int) -> list[str]:
    """Returns the names of the input channels as `load_volume` has them."""
    if isinstance(modalities, str) or len(modalities) != count:
        given = modalities if isinstance(modalities, str) else ", ".join(modalities)
        raise ValueError(f"modalities are {given}, expected {count} names, one a channel")
    return list(map(canonical_modality, modalities))


def load_model(path_or_name: str | Path = "brats2021") -> RoutedSegmenter:
    """Loads a model, ready to segment.

    Args:
        path_or_name: A .safetensors file written by `save_model`, or the name of shipped weights.

    Returns:
        The model on the CPU, in float32, whatever PyTorch's defaults are; in `eval()`, input ranges
        fixed, with the file's facts in `model.metadata`.

    Raises:
        ValueError: If there is no such file or name, or the file is not one of ours.
    """
    path = locate(path_or_name)
    metadata, tensors = _read(path)
    try:
        # older files name no model; they are of V2
        model = _built(metadata.get("model", "MedDANetV2"), metadata["architecture"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        problem = " ".join(str(error).split())
        raise ValueError(
            f"{path}: its architecture is not one that meddanet {__version__} builds ({problem}); "
            "expected a file written by save_model"
        ) from error
    own = _tensors(model)
    if odd := _misfits(own, tensors):
        raise ValueError(
            f"{path}: {len(odd)} tensors do not fit its architecture, first {odd[0]}; "
            "expected a file written by save_model"
        )
    _copy(tensors, own, own.keys())
    model.metadata = metadata
    for layer in quantized_layers(model).values():
        layer.update_range = False
    return to_memory_format(model.eval(), torch.channels_last)


def _built(kind: str, architecture: dict[str, Any]) -> RoutedSegmenter:
    """Builds a model for its architecture's sake, on the CPU and in float32."""
    # no weight stays: the caller's defaults and generator have no part in it
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        return _BUILDERS[kind](**architecture).float()


def take_weights(
    model: RoutedSegmenter, path_or_name: str | Path, parts: tuple[str, ...] = ()
) -> tuple[list[str], dict[str, Any]]:
    """Copies into a model what fits it by name and shape, input ranges included.

    Args:
        model: Of any architecture; changed in place.
        path_or_name: As for `load_model`.
        parts: Of the model, the only ones that take anything; () = all.

    Returns:
        The names of the model's tensors that stay as they are, and the facts of the file.

    Raises:
        ValueError: If there is no such file or name, or nothing fits.
    """
    path = locate(path_or_name)
    facts, tensors = _read(path)
    if "modalities" not in facts:
        raise ValueError(f"{path}: does not say what it is; expected a file written by save_model")
    own = _tensors(model)
    fitting = _fitting(own, tensors)
    if parts:
        fitting = {name for name in fitting if part_of(name) in parts}
    if not any(own[name].dim() > 1 for name in fitting):
        raise ValueError(
            f"{path}: none of its weights fits this {type(model).__name__}; expected weights of "
            "the same segmenter and number of modalities"
        )
    _copy(tensors, own, fitting)
    return [name for name in own if name not in fitting], facts


def part_of(name: str) -> str:
    """Returns which part of a model a tensor belongs to, by its name in the file."""
    return name.removeprefix(_RANGE.partition("{}")[0]).partition(".")[0]


def _tensors(model: RoutedSegmenter) -> dict[str, Tensor]:
    """Returns parameters, buffers and input ranges by their name in the file, sharing memory."""
    layers = quantized_layers(model)
    ranges = {_RANGE.format(name): layer.input_amax for name, layer in layers.items()}
    return {**model.state_dict(), **ranges}


def _fitting(own: dict[str, Tensor], theirs: dict[str, Tensor]) -> set[str]:
    """Returns the names under which both have a tensor of the same shape."""
    both = own.keys() & theirs.keys()
    return {name for name in both if own[name].shape == theirs[name].shape}


def _misfits(own: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """Returns the names under which one has a tensor and the other none of the same shape."""
    return sorted((own.keys() | theirs.keys()) - _fitting(own, theirs))


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor], names: Iterable[str]) -> None:
    for name in names:
        target[name].copy_(source[name])


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    with weight_errors(path), safe_open(path, framework="pt") as file:
        return facts_in(file, path), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
