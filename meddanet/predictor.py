"""From a volume in memory to a label map, slice by slice."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .cost import CONVENTIONS, CostTable, cost_table
from .data import (
    LABELS,
    Volume,
    VolumeError,
    detect_label_convention,
    from_classes,
    from_slices,
    to_slices,
)
from .med_danet_v2 import MedDANetV2, Segmentation

CHUNK = 16


@dataclass(frozen=True)
class Prediction:
    """What a volume was found to hold, and what finding it took; M = windows per slice, or absent.

    Attributes:
        labels: [H, W, D] uint8 in the input's voxel order and label convention.
        label_convention: Key of `LABELS` that the values follow.
        routes: Names that `decisions` index.
        decisions: [D] or [D, M] int64, axial slices in canonical order.
        offsets: [D, 2] or [D, M, 2] float32, (y, x) of the crop in pixels, 0 where none was made.
        num_bits: [D, S] or [D, M, S] int64 widths per encoder stage, 0 where it did not run.
        cost: "mac" and "paper": multiply-adds of the case, deciding networks included;
            "static_mac" and "static_paper": of the same network on every whole slice;
            "scaled_paper": "paper" with encoder stages scaled by b / 32.
        timings: Seconds: "normalise", "network" (normalised slices to label slices), "total".
    """

    labels: np.ndarray
    label_convention: str
    routes: tuple[str, ...]
    decisions: np.ndarray
    offsets: np.ndarray
    num_bits: np.ndarray
    cost: dict[str, float]
    timings: dict[str, float]


class VolumePredictor:
    """Segments volumes with one model.

    Args:
        model: From `load_model` or `build_med_danet_v2`.
        device: "auto", "cpu", "cuda" or "cuda:N".
        window: None decides per slice; a number decides per overlapping window of that side and
            averages, the papers' protocol (128).
        labels: Label convention of the result; None = the input's.

    Raises:
        ValueError: If the device is not there or the convention is unknown.
    """

    def __init__(
        self,
        model: MedDANetV2,
        device: str | torch.device = "auto",
        window: int | None = None,
        labels: str | None = None,
    ) -> None:
        if labels is not None and labels not in LABELS:
            raise ValueError(f"unknown label convention {labels!r}; known are {', '.join(LABELS)}")
        smallest = max(model.crop_sizes, default=model.stride)
        if window is not None and (window % model.stride or window < smallest):
            raise ValueError(
                f"window must be a multiple of {model.stride} and at least {smallest}, got {window}"
            )
        self.device = _device(device)
        self.model = model.eval().to(self.device, memory_format=torch.channels_last)
        self.window = window
        self.labels = labels
        self._tables: dict[tuple, CostTable] = {}
        facts = getattr(model, "metadata", {})
        self.modalities = tuple(facts.get("modalities", ()))
        self.spacing = facts.get("spacing_mm")

    def predict(self, volume: Volume) -> Prediction:
        """Segments one volume.

        Args:
            volume: From `load_volume`; its modalities are put into the model's order.

        Raises:
            VolumeError: If a modality is missing.
        """
        began = time.perf_counter()
        slices = torch.from_numpy(to_slices(self._ordered(volume)))
        normalised = time.perf_counter()
        parts = [self._segment(chunk.to(self.device)) for chunk in slices.split(CHUNK)]
        result = Segmentation(*(torch.cat(part).cpu() for part in zip(*parts, strict=True)))
        labelled = time.perf_counter()
        convention = self.labels or detect_label_convention(volume)
        labels = from_classes(from_slices(result.labels.numpy(), volume), convention)
        return Prediction(
            labels=labels,
            label_convention=convention,
            routes=self.model.routes,
            decisions=result.decisions.numpy(),
            offsets=result.offsets.numpy(),
            num_bits=result.num_bits.numpy(),
            cost=self._cost(slices, result),
            timings={
                "normalise": normalised - began, "network": labelled - normalised,
                "total": time.perf_counter() - began,
            },
        )

    def _segment(self, slices: Tensor) -> Segmentation:
        """Pads to what the network takes, segments, cuts the padding off again."""
        height, width = slices.shape[2:]
        smallest = max(self.window or 0, *self.model.crop_sizes, self.model.stride)
        stride = self.model.stride
        padded = [-(-max(side, smallest) // stride) * stride for side in (height, width)]
        slices = F.pad(slices, (0, padded[1] - width, 0, padded[0] - height))
        if self.window is None:
            result = self.model.segment(slices)
        else:
            result = self.model.segment_windows(slices, self.window)
        return result._replace(labels=result.labels[:, :height, :width])

    def _ordered(self, volume: Volume) -> Volume:
        if not self.modalities or volume.modalities == self.modalities:
            order = range(self.model.in_channels)
        else:
            missing = [m for m in self.modalities if m not in volume.modalities]
            if missing:
                raise VolumeError(
                    f"{volume.name}: modality {missing[0]} is missing; this model needs "
                    f"{', '.join(self.modalities)}, the case has {', '.join(volume.modalities)}"
                )
            order = [volume.modalities.index(m) for m in self.modalities]
        if self.spacing and not np.allclose(volume.spacing, self.spacing, rtol=0.1):
            shown = " x ".join(f"{side:g}" for side in volume.spacing)
            print(
                f"{volume.name}: voxels of {shown} mm; the model was trained on "
                f"{self.spacing[0]:g} mm, expect worse labels", file=sys.stderr,
            )
        if list(order) == list(range(len(volume.modalities))):
            return volume
        return replace(volume, data=volume.data[list(order)], modalities=self.modalities)

    def _table(self, shape: tuple[int, ...], convention: str) -> CostTable:
        key = (shape, convention)
        if key not in self._tables:
            self._tables[key] = cost_table(self.model, shape, convention)
        return self._tables[key]

    def _cost(self, slices: Tensor, result: Segmentation) -> dict[str, float]:
        side = (self.window, self.window) if self.window else tuple(slices.shape[2:])
        stride = self.model.stride
        shape = (1, slices.shape[1], *(-(-s // stride) * stride for s in side))
        views = result.decisions.numel() if self.window else len(slices)
        # a slice without signal never reaches the policy
        seen = (slices != 0).flatten(1).any(1)
        seen = seen.repeat_interleave(views // len(slices)) if self.window else seen
        route = result.decisions.flatten()
        bits = result.num_bits.flatten(0, -2).float()
        cost: dict[str, float] = {}
        for convention in CONVENTIONS:
            table = self._table(shape, convention)
            macs = torch.tensor([float(table.macs(r)) for r in table.routes], dtype=torch.float64)
            cost[convention] = (macs[route] * seen).sum().item()
            policy = table.macs("skip")
            whole = table.macs("whole") - policy - table.parts["whole"].get("selectors", 0)
            cost[f"static_{convention}"] = float(whole * views)
        cost["scaled_paper"] = (table.slice_cost(route, bits).double() * seen).sum().item()
        return cost


def _device(name: str | torch.device) -> torch.device:
    if str(name) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name}: no CUDA GPU is available here; use --device cpu")
    return device
