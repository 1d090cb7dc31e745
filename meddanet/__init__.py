"""Med-DANet and Med-DANet V2: segment a volume slice by slice, each only as closely as it needs."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .version import __version__

# public name -> its module; loaded on first use, so that importing the package costs nothing
_PUBLIC = {
    "MedDANet": "med_danet",
    "MedDANetV2": "med_danet_v2",
    "Prediction": "predictor",
    "QuantConv2d": "layers",
    "QuantConvTranspose2d": "layers",
    "QuantLinear": "layers",
    "Volume": "data",
    "VolumePredictor": "predictor",
    "build_decision_network": "build",
    "build_med_danet": "build",
    "build_med_danet_v2": "build",
    "build_segmenter": "build",
    "compile_engine": "engine",
    "cost_table": "cost",
    "count_macs": "cost",
    "dice_score": "metrics",
    "hausdorff_distance_95": "metrics",
    "load_model": "weights",
    "load_volume": "data",
    "save_model": "weights",
    "save_volume": "data",
    "surface_dice": "metrics",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
