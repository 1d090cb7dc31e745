"""What the decisions of one case were worth, against the truth and against constants."""

from __future__ import annotations

import numpy as np
import torch

from meddanet.data import canonical, to_slices
from meddanet.objectives import centred_offset, oracle_route


def inside(lesion: np.ndarray, offsets: np.ndarray, size: int) -> int:
    """Counts the lesion's pixels [N, H, W] within the crop at `offsets` [N, 2] of each slice."""
    corners = offsets.round().astype(int)
    return sum(
        int(mask[max(y, 0) : y + size, max(x, 0) : x + size].sum())
        for mask, (y, x) in zip(lesion, corners, strict=True)
    )


def brain_centred(brain: np.ndarray, size: int) -> np.ndarray:
    """Offsets [N, 2] of crops centred on the centroid of each slice's brain [N, H, W]."""
    limit = np.array(brain.shape[1:]) - size
    centroids = [np.argwhere(mask).mean(0) if mask.any() else limit / 2 for mask in brain]
    return np.clip(np.reshape(centroids, (-1, 2)) + 0.5 - size / 2, 0, limit)


def decision_report(model, prediction, volume, truth: np.ndarray) -> dict:
    """Compares the routes with the oracle's and the crops with constant ones.

    Args:
        model: A `MedDANetV2`.
        prediction: Of the volume, decided per slice.
        volume: The case.
        truth: Classes [H, W, D] in the volume's voxel order.

    Returns:
        "routes": slices per route; "confusion": rows the oracle's route, columns the model's;
        "tumour_voxels", of which "skipped" and "outside_crop"; "missed_slices": tumour slices that
        were skipped; "crop_coverage": share of the tumour's voxels inside the crop, on the slices
        that were cropped, for the model's place and for constant ones; "num_bits": per stage, how
        often each width was chosen.
    """
    lesion = canonical(truth, volume.affine).transpose(2, 0, 1) > 0
    brain = to_slices(volume).any(1)
    decisions, routes = prediction.decisions, prediction.routes
    oracle = oracle_route(torch.from_numpy(lesion.astype(np.uint8)), model.crop_sizes).numpy()
    confusion = np.zeros((len(routes), len(routes)), int)
    np.add.at(confusion, (oracle, decisions), 1)
    voxels = lesion.sum((1, 2))
    counts = {"outside_crop": 0, "model": 0, "best": 0, "image centre": 0, "brain centroid": 0}
    cropped = 0
    for index, size in enumerate(model.crop_sizes):
        chosen = decisions == index + 1
        part, total = lesion[chosen], int(voxels[chosen].sum())
        middle = np.tile((np.array(part.shape[1:]) - size) / 2, (len(part), 1))
        places = {
            "model": prediction.offsets[chosen], "image centre": middle,
            "brain centroid": brain_centred(brain[chosen], size),
            "best": centred_offset(torch.from_numpy(part.astype(np.uint8)), size).numpy(),
        }
        for place, offsets in places.items():
            counts[place] += inside(part, offsets, size)
        cropped += total
        counts["outside_crop"] += total - inside(part, prediction.offsets[chosen], size)
    ran = prediction.num_bits[decisions > 0]
    return {
        "routes": {name: int((decisions == index).sum()) for index, name in enumerate(routes)},
        "confusion": confusion.tolist(),
        "tumour_voxels": int(voxels.sum()),
        "skipped": int(voxels[decisions == 0].sum()),
        "outside_crop": counts.pop("outside_crop"),
        "missed_slices": int(((decisions == 0) & (voxels > 0)).sum()),
        "cropped_voxels": cropped,
        "crop_coverage": {place: n / cropped if cropped else None for place, n in counts.items()},
        "num_bits": [
            dict(zip(*(x.tolist() for x in np.unique(stage, return_counts=True)), strict=True))
            for stage in ran.T
        ],
    }
