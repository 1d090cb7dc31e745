"""Med-DANet and Med-DANet V2: segment a volume slice by slice, each only as closely as it needs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

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


if TYPE_CHECKING:
    # type checkers and editors follow no __getattr__
    from .build import build_decision_network as build_decision_network
    from .build import build_med_danet as build_med_danet
    from .build import build_med_danet_v2 as build_med_danet_v2
    from .build import build_segmenter as build_segmenter
    from .cost import cost_table as cost_table
    from .cost import count_macs as count_macs
    from .data import Volume as Volume
    from .data import load_volume as load_volume
    from .data import save_volume as save_volume
    from .engine import compile_engine as compile_engine
    from .layers import QuantConv2d as QuantConv2d
    from .layers import QuantConvTranspose2d as QuantConvTranspose2d
    from .layers import QuantLinear as QuantLinear
    from .med_danet import MedDANet as MedDANet
    from .med_danet_v2 import MedDANetV2 as MedDANetV2
    from .metrics import dice_score as dice_score
    from .metrics import hausdorff_distance_95 as hausdorff_distance_95
    from .metrics import surface_dice as surface_dice
    from .predictor import Prediction as Prediction
    from .predictor import VolumePredictor as VolumePredictor
    from .weights import load_model as load_model
    from .weights import save_model as save_model
else:

    def __getattr__(name: str) -> Any:
        if name not in _PUBLIC:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
