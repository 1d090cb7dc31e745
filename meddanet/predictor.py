"""From a volume in memory to a label map, slice by slice."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from .cost import CostTable, cost_tables
from .data import (
    LABELS,
    Volume,
    VolumeError,
    from_classes,
    from_slices,
    to_slices,
)
from .data.labels import label_facts, result_convention
from .data.on_device import to_slices_on
from .devices import resolve_device
from .doubts import doubts_about, doubts_about_frame
from .engine import CHUNK, compile_engine
from .engine.slices import holds_signal
from .frame import Frame, frame_of
from .routing import (
    RoutedSegmenter,
    Segmentation,
    channels_last,
    check_routed,
    to_memory_format,
    window_corners,
)


@dataclass(frozen=True, eq=False)  # as a Volume
class Prediction:
    """What a volume was found to hold, and what finding it took; M = windows per slice, or absent.

    Slices are axial, in canonical order: from inferior to superior, y toward Left, x toward
    Posterior.

    Attributes:
        labels: [H, W, D] uint8 in the input's voxel order and label convention.
        label_convention: Key of `LABELS` that the values follow, or "values": the training data's.
        routes: Names that `decisions` index.
        windows: (y, x) corner of each of the M windows in pixels; empty where whole slices were
            decided on.
        decisions: [D] or [D, M] int64.
        offsets: [D, 2] or [D, M, 2] float32, (y, x) of the crop in pixels of the slice or window,
            below 0 where it begins before that does; 0 where none was made.
        num_bits: [D, S] or [D, M, S] int64 widths per encoder stage, 0 where it did not run.
        cost: "mac" and "paper": multiply-adds of the case, deciding networks included;
            "static_mac" and "static_paper": of the same network, of a bank its dearest member, on
            every whole slice (or window);
            "scaled_paper": "paper" with encoder stages scaled by b / 32;
            "bit_operations": "mac" times weight bits times input bits, layer by layer, where layers
            in float have 32.
        timings: Seconds: "normalise", "network" (normalised slices to label slices), "total".
        label_values: Class -> value in `labels`; None = the convention's.
    """

    labels: np.ndarray
    label_convention: str
    routes: tuple[str, ...]
    windows: tuple[tuple[int, int], ...]
    decisions: np.ndarray
    offsets: np.ndarray
    num_bits: np.ndarray
    cost: dict[str, float]
    timings: dict[str, float]
    label_values: Mapping[int, int] | None = None


class VolumePredictor:
    """Segments volumes with one model.

    Args:
        model: From `load_model`, `build_med_danet` or `build_med_danet_v2`; moved to the device and
            put in `eval()`. But for windows a copy of it runs, as it is now: see `compile_engine`.
        device: "auto", "cpu", "cuda" or "cuda:N".
        window: None decides per slice; a number decides per overlapping window of that side and
            averages, the papers' protocol (128).
        labels: Label convention of the result. None = the input's where its naming tells one, else
            the one the model was trained on.
        executor: What runs the networks, as in `compile_engine`; windows are always run eagerly.

    Raises:
        ValueError: If the model routes no slices, the device is not there, the window does not fit
            the model, the convention is unknown or has too few labels for the model's classes, or
            the executor cannot run the model.
    """

    def __init__(
        self,
        model: RoutedSegmenter,
        device: str | torch.device = "auto",
        window: int | None = None,
        labels: str | None = None,
        executor: str = "auto",
    ) -> None:
        check_routed(model)
        if labels is not None:
            label_facts(labels, None, (), model.num_classes)
        if window is not None:
            if not isinstance(window, Integral):
                raise ValueError(f"window is {window!r}, expected None or a whole number of pixels")
            window = int(window)
            if window % model.stride or window < model.smallest_side:
                raise ValueError(
                    f"window is {window}, expected a multiple of {model.stride} that is at least "
                    f"{model.smallest_side}"
                )
        if window is not None and executor not in ("auto", "eager"):
            raise ValueError(f"executor {executor} runs no windows; use auto or eager with them")
        self.device = resolve_device(device)
        self.model = to_memory_format(model.eval().to(self.device), torch.channels_last)
        self.engine = compile_engine(model, self.device, "eager" if window else executor)
        self.window = window
        self.labels = labels
        self._tables: dict[tuple, dict[str, CostTable]] = {}
        facts = getattr(model, "metadata", {})
        if labels is not None and "label_values" in facts:
            raise ValueError(
                f"label convention {labels} is for brain tumours; the model's labels are "
                f"{', '.join(map(str, facts['label_values'].values()))}, leave it out"
            )
        self.modalities = tuple(facts.get("modalities", ()))
        self.spacing = facts.get("spacing_mm")
        self.window_hu = facts.get("window_hu")
        # windows go over whatever there is
        self.canvas = tuple(canvas) if (canvas := facts.get("canvas")) and not window else None
        self.centre = facts.get("centre")
        told = facts.get("label_convention"), facts.get("label_values")
        # what nobody has told hangs on the volume's modalities
        self.label_facts = (
            label_facts(*told, self.modalities, model.num_classes) if any(told) else None
        )

    def predict(self, volume: Volume) -> Prediction:
        """Segments one volume.

        Args:
            volume: From `load_volume`; its modalities are put into the model's order.

        Raises:
            VolumeError: If a modality is missing, voxels are NaN or infinite, or a window is larger
                than the slices.
        """
        began = time.perf_counter()
        ordered = self.ordered(volume)
        for doubt in doubts_about(ordered, self.spacing, self.window_hu):
            warnings.warn(f"{volume.name}: {doubt}", stacklevel=2)
        slices = self._slices(ordered)
        channels, height, width = slices.shape[1:]
        self._check_window(volume, slices)
        try:
            frame, slices = self._framed(slices)
        except torch.OutOfMemoryError:
            frame, slices = self._framed(slices.cpu())
        least = self.model.smallest_side, self.model.stride
        for doubt in doubts_about_frame(frame, self.canvas, *least):
            warnings.warn(f"{volume.name}: {doubt}", stacklevel=2)
        seen = self._seen(slices)
        normalised = time.perf_counter()
        result = self._segment(slices)
        labels = frame.put_back(result.labels, (height, width))
        labelled = time.perf_counter()
        convention, values = self._label_values(volume)
        sides = (self.window, self.window) if self.window else (frame.height, frame.width)
        cost = self._cost((1, channels, *sides), seen, result)
        finished = time.perf_counter()
        return Prediction(
            labels=from_classes(from_slices(labels.numpy(), volume), values),
            label_convention=convention,
            routes=self.model.routes,
            windows=self._windows(frame.height, frame.width),
            decisions=result.decisions.numpy(),
            offsets=self._in_slices(result, frame).numpy(),
            num_bits=result.num_bits.numpy(),
            cost=cost,
            timings={
                "normalise": normalised - began,
                "network": labelled - normalised,
                "total": finished - began,
            },
            label_values=values,
        )

    def _label_values(self, volume: Volume) -> tuple[str, Mapping[int, int]]:
        """Returns the convention of the result and its class -> value."""
        facts = self.label_facts or label_facts(
            self.labels, None, volume.modalities, self.model.num_classes
        )
        if "label_values" in facts:
            return facts["label_convention"], facts["label_values"]
        convention = result_convention(
            self.labels, volume.convention, volume.modalities, facts["label_convention"]
        )
        return convention, LABELS[convention]

    def _slices(self, volume: Volume) -> Tensor:
        """Returns the normalised slices [D, C, H, W] of a volume, where the networks run."""
        if self.device.type != "cpu":
            # what the device has no room for is uploaded in parts
            with suppress(torch.OutOfMemoryError):
                return to_slices_on(self.device, volume, self.window_hu)
        return torch.from_numpy(to_slices(volume, torch.get_num_threads(), self.window_hu))

    def _segment(self, slices: Tensor) -> Segmentation:
        """Segments slices of a size that the network takes; the result is on the CPU.

        Where they lie on the device and leave no room for the work there, they are taken away.
        """
        if slices.device.type != "cpu":
            with suppress(torch.OutOfMemoryError):
                return self._segment_there(slices)
            held, slices = slices, slices.cpu()
            # whoever still refers to them
            held.untyped_storage().resize_(0)
        return self._segment_there(slices)

    def _segment_there(self, slices: Tensor) -> Segmentation:
        if self.window is None:
            return self.engine.segment(slices)
        parts = []
        for chunk in slices.split(CHUNK):
            chunk = chunk.to(self.device, next(self.model.parameters()).dtype)
            with torch.autocast(self.device.type, enabled=False):
                part = self.model.segment_windows(channels_last(chunk), self.window)
            parts.append([tensor.cpu() for tensor in part])
        return Segmentation.joined(parts)

    def fitted(self, slices: Tensor) -> Tensor:
        """Cuts and pads slices [D, C, H, W] to what the networks see of them."""
        return self._framed(slices)[1]

    def _framed(self, slices: Tensor) -> tuple[Frame, Tensor]:
        """Returns which part of slices the networks see, and that part."""
        smallest = max(self.window or 0, self.model.smallest_side)
        frame = frame_of(slices, self.model.stride, smallest, self.canvas, self.centre)
        return frame, frame.take(slices)

    def _windows(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        if self.window is None:
            return ()
        return window_corners(height, width, self.window)

    def ordered(self, volume: Volume) -> Volume:
        """Puts the modalities of a volume into the model's order.

        Raises:
            VolumeError: If one is missing.
        """
        if not self.modalities and len(volume.modalities) == self.model.in_channels:
            return volume
        missing = [name for name in self.modalities if name not in volume.modalities]
        if missing or not self.modalities:
            needed = ", ".join(self.modalities) or f"{self.model.in_channels} channels"
            raise VolumeError(
                f"{volume.name}: modality {', '.join(missing) or 'count'} is missing; the model "
                f"needs {needed}, the case has {', '.join(volume.modalities)}"
            )
        if volume.modalities == self.modalities:
            return volume
        order = [volume.modalities.index(name) for name in self.modalities]
        return replace(volume, data=volume.data[order], modalities=self.modalities)

    def _check_window(self, volume: Volume, slices: Tensor) -> None:
        """Refuses windows that show little but padding, in which the model finds nothing."""
        if self.window is None:
            return
        whole = frame_of(slices, self.model.stride, self.model.smallest_side)
        if self.window > (most := max(whole.height, whole.width)):
            raise VolumeError(
                f"{volume.name}: window is {self.window}, larger than its slices of "
                f"{slices.shape[2]} x {slices.shape[3]} pixels; name at most {most}, or none for "
                "whole slices"
            )

    def _cost(
        self, shape: tuple[int, ...], seen: Tensor, result: Segmentation
    ) -> dict[str, float]:
        """Adds up what every slice (or window) of a shape took; one without signal took nothing."""
        seen = seen.flatten()
        route, bits = result.decisions.flatten(), result.num_bits.flatten(0, -2).double()
        cost: dict[str, float] = {}
        if shape not in self._tables:
            self._tables[shape] = cost_tables(self.model, shape)
        tables = self._tables[shape]
        for convention, table in tables.items():
            cost[convention] = (table.slice_macs(route) * seen).sum().item()
            cost[f"static_{convention}"] = float(table.static_macs() * len(route))
        scaled = tables["paper"].slice_cost(route, bits)
        cost["scaled_paper"] = (scaled * seen).sum().item()
        operations = tables["mac"].slice_bit_operations(route, bits)
        cost["bit_operations"] = (operations * seen).sum().item()
        return cost

    def _in_slices(self, result: Segmentation, frame: Frame) -> Tensor:
        """Returns offsets of crops in slices, which are found in a frame of theirs."""
        crop = [route.startswith("crop-") for route in self.model.routes]
        crops, corner = (torch.tensor(x, device="cpu") for x in (crop, [frame.top, frame.left]))
        return result.offsets + crops[result.decisions][..., None] * corner

    def _seen(self, slices: Tensor) -> Tensor:
        """Tells which slices [D] or windows [D, M] hold any signal: only these are decided on."""
        if self.window is None:
            if slices.device.type == "cpu":
                seen = [holds_signal(image) for image in slices.numpy()]
                return torch.tensor(seen, dtype=torch.bool, device="cpu")
            return slices.flatten(1).any(1).cpu()
        signal = (slices != 0).any(1)
        views = [
            signal[:, y : y + self.window, x : x + self.window].flatten(1).any(1)
            for y, x in self._windows(*slices.shape[2:])
        ]
        return torch.stack(views, 1).cpu()
