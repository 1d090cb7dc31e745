"""Axial slices for training: an uncompressed, memory-mapped cache, and what is drawn from it.

Every case is decompressed and normalised once; epochs then read slices from disk through the page
cache, so that memory stays bounded whatever the number of cases.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .storage import write_bytes
from .volume import VolumeError

_KINDS = ("labels", "seen", "images")


@dataclass(frozen=True)
class CachedCase:
    """One case on disk.

    Attributes:
        name: Case name.
        folder: The cache.
        brain: Indices of slices that hold any signal.
        lesion: Indices of slices that hold any label.
    """

    name: str
    folder: Path
    brain: np.ndarray
    lesion: np.ndarray

    # mapped anew each time: a map holds a file handle, and a thousand cases hold too many
    @property
    def images(self) -> np.ndarray:
        """Memory map [D, C, H, W] float16, normalised."""
        return _load(self.folder / f"{self.name}.images.npy", "r")

    @property
    def labels(self) -> np.ndarray:
        """Memory map [D, H, W] uint8, classes."""
        return _load(self.folder / f"{self.name}.labels.npy", "r")


def write_cache(name: str, images: np.ndarray, labels: np.ndarray, folder: Path) -> None:
    """Stores slices [D, C, H, W] and classes [D, H, W] as `<name>.{images,labels,seen}.npy`."""
    folder.mkdir(parents=True, exist_ok=True)
    seen = np.stack([images.any(axis=(1, 2, 3)), labels.any(axis=(1, 2))])
    arrays = {
        "labels": labels.astype(np.uint8), "seen": seen, "images": images.astype(np.float16)
    }
    for kind in _KINDS:
        stream = io.BytesIO()
        np.save(stream, arrays[kind])
        write_bytes(folder / f"{name}.{kind}.npy", stream.getbuffer())


def is_cached(name: str, folder: Path) -> bool:
    """Tells whether a case lies in the cache, complete."""
    return all((folder / f"{name}.{kind}.npy").exists() for kind in _KINDS)


def read_cache(name: str, folder: Path) -> CachedCase:
    """Returns a cached case.

    Raises:
        FileNotFoundError: If the case was not cached.
        VolumeError: If its file is damaged.
    """
    seen, labelled = _load(folder / f"{name}.seen.npy")
    return CachedCase(name, folder, np.flatnonzero(seen), np.flatnonzero(labelled))


def _load(path: Path, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    try:
        return np.load(path, mmap_mode)
    except (ValueError, EOFError) as error:
        raise VolumeError(f"{path}: is damaged; delete it to cache its case again") from error


def folds(
    names: list[str], count: int, fold: int, patient: str | None = None
) -> tuple[list[str], list[str]]:
    """Splits cases into (training, held out): those of every `count`-th patient are held out.

    Args:
        names: Case names.
        count: Number of folds; 0 holds out nobody.
        fold: Which of them is held out.
        patient: Regular expression whose first group, or whole match, is the patient in a name.
            None keeps the timepoints of one BraTS 2023 patient together, `BraTS-GLI-00005-100` and
            `-101`; every other case is a patient.

    Raises:
        ValueError: If `fold` is not below `count`, nobody is held out or left to train on, or a
            name holds no patient.
    """
    if count and not 0 <= fold < count:
        raise ValueError(f"fold is {fold}, expected 0 to {count - 1} of {count} folds")
    patient_of = {name: _patient(name, patient) for name in names}
    patients = sorted(set(patient_of.values()))
    chosen = set(patients[fold::count]) if count else set()
    if count and not chosen:
        raise ValueError(
            f"fold {fold} of {count} holds out nobody of {len(patients)} patients; name a fold "
            f"below {len(patients)}, or 0 folds to train on all"
        )
    training = sorted(name for name in names if patient_of[name] not in chosen)
    if not training:
        raise ValueError(f"{len(patients)} patients leave none to train on; name 0 folds")
    return training, sorted(set(names) - set(training))


def _patient(name: str, pattern: str | None) -> str:
    if pattern is None:
        match = re.fullmatch(r"(BraTS-\w+-\d{5})-\d{3}", name)
        return match[1] if match else name
    try:
        match = re.search(pattern, name)
    except re.error as error:
        raise ValueError(
            f"patient is {pattern!r}, expected a regular expression such as ([A-Z]+_\\d+) ({error})"
        ) from error
    found = match and match[1 if match.re.groups else 0]
    if not found:
        raise ValueError(f"patient is {pattern!r}, expected one that finds a patient in {name}")
    return found


@dataclass
class SliceSampler:
    """Draws batches of whole slices or windows, cases with equal chance.

    What is drawn depends on the generator alone, in a fixed number of draws per sample, so that
    processes that share one draw the same batch and read only their parts of it.

    Attributes:
        cases: Cached cases.
        lesion_share: Share of samples drawn from slices with a lesion; the rest comes from all
            slices that hold brain. None samples all brain slices alike.
        window: Side of the window cut around a random lesion (or brain) pixel, anywhere where
            `lesion_share` is None; None = whole slice.
        canvas: Height and width that smaller slices are padded to, at the bottom and right;
            slices of one batch have to agree.
        phantoms: Synthetic cases to mix in.
        phantom_share: Share of samples drawn from them.
        drawn: Case and slice of each sample of the last batch.
    """

    cases: list[CachedCase]
    lesion_share: float | None = None
    window: int | None = None
    canvas: tuple[int, int] = (0, 0)
    phantoms: list[CachedCase] = field(default_factory=list)
    phantom_share: float = 0.05
    drawn: list[str] = field(default_factory=list, init=False)

    def batch(
        self, random: np.random.Generator, size: int, share: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Returns (images float32 [N, C, H, W], labels int64 [N, H, W]).

        Args:
            random: Source of randomness.
            size: Samples drawn.
            share: Which of them are read and returned.
        """
        self.drawn = []
        pairs = [self._sample(draw) for draw in random.random((size, 7))[share]]
        images = torch.from_numpy(np.stack([p[0] for p in pairs]).astype(np.float32))
        labels = torch.from_numpy(np.stack([p[1] for p in pairs]).astype(np.int64))
        return images, labels

    def _sample(self, draw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Turns seven numbers in [0, 1) into one sample."""
        synthetic = self.phantoms and draw[0] < self.phantom_share
        case = _pick(self.phantoms if synthetic else self.cases, draw[1])
        wanted = self.lesion_share is not None and draw[2] < self.lesion_share
        index = int(_pick(case.lesion if wanted and len(case.lesion) else case.brain, draw[3]))
        self.drawn.append(f"{case.name} slice {index}")
        image, label = case.images[index], case.labels[index]
        if self.window is None:
            return pad(image, self.canvas), pad(label, self.canvas)
        limit = np.maximum(np.array(label.shape) - self.window, 0)
        if self.lesion_share is None:
            y, x = np.floor(draw[5:7] * (limit + 1)).astype(int)
        else:
            mask = label > 0 if label.any() else (image != 0).any(0)
            centre = np.array(_pick(np.argwhere(mask), draw[4]))
            reach = self.window // 3
            jitter = np.floor(draw[5:7] * (2 * reach + 1)).astype(int) - reach
            y, x = np.clip(centre + jitter - self.window // 2, 0, limit)
        cut = np.s_[..., y : y + self.window, x : x + self.window]
        full = (self.window, self.window)
        return pad(image[cut], full), pad(label[cut], full)


def _pick(choices: Any, draw: float) -> Any:
    return choices[int(draw * len(choices))]


def pad(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Zero-pads [..., H, W] at the bottom and right to at least `size`."""
    missing = [max(want - have, 0) for want, have in zip(size, array.shape[-2:], strict=True)]
    if not any(missing):
        return array
    return np.pad(array, [(0, 0)] * (array.ndim - 2) + [(0, side) for side in missing])
