"""What is written beside the labels of a case: a JSON report."""

from __future__ import annotations

import platform
from collections.abc import Mapping

import numpy as np
import torch

from .data import LABELS, Volume
from .predictor import Prediction
from .version import __version__

NAMES = {1: "necrotic core", 2: "oedema", 3: "enhancing tumour"}


def class_names(prediction: Prediction) -> dict[int, str]:
    """Returns what the classes are called: parts of a tumour, or the values they have in files."""
    if prediction.label_convention in LABELS:
        return NAMES
    return {k: f"label {value}" for k, value in class_values(prediction).items()}


def class_values(prediction: Prediction) -> Mapping[int, int]:
    """Returns the value of each class in the prediction's labels."""
    return prediction.label_values or LABELS[prediction.label_convention]


def case_report(
    volume: Volume, prediction: Prediction, seconds: float, **run: object
) -> dict:
    """Returns the report of one case as JSON-ready values.

    Entries of "slices" are lists over axial slices from inferior to superior, in the order of
    `Prediction`; with windows, lists over windows within.

    Args:
        volume: The input.
        prediction: What `VolumePredictor.predict` returned for it.
        seconds: Wall time of the case from file to file.
        **run: What else is known of the run, such as weights and device; goes under "run".
    """
    values = class_values(prediction)
    names = class_names(prediction)
    counts = np.bincount(prediction.decisions.ravel(), minlength=len(prediction.routes))
    cost = prediction.cost
    return {
        "case": volume.name,
        "versions": {
            "meddanet": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "run": run,
        "shape": list(volume.data.shape[1:]),
        "spacing_mm": [round(side, 4) for side in volume.spacing],
        "modalities": list(volume.modalities),
        "naming": volume.convention,
        "label_convention": prediction.label_convention,
        "label_values": {names[k]: values[k] for k in values},
        "volume_ml": {
            names[k]: round(int((prediction.labels == values[k]).sum()) * volume.voxel_ml, 3)
            for k in values
        },
        "decisions": dict(zip(prediction.routes, counts.tolist(), strict=True)),
        "macs": {key: round(value) for key, value in cost.items() if key != "bit_operations"},
        "bit_operations": round(cost["bit_operations"]),
        "share_of_static": {
            key: round(cost[key] / cost[f"static_{key}"], 4) for key in ("mac", "paper")
        },
        "seconds": {
            key: round(value, 3)
            for key, value in {**prediction.timings, "file_to_file": seconds}.items()
        },
        "windows": [list(corner) for corner in prediction.windows],
        "slices": {
            "decision": prediction.decisions.tolist(),
            "offset": prediction.offsets.astype(int).tolist(),
            "num_bits": prediction.num_bits.tolist(),
        },
    }
