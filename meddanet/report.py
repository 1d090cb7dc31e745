"""What is written beside the labels of a case: a JSON report and a preview picture."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .data import LABELS, Volume, canonical, to_classes
from .predictor import Prediction
from .version import __version__

NAMES = {1: "necrotic core", 2: "oedema", 3: "enhancing tumour"}
COLOURS = {1: (66, 135, 245), 2: (76, 187, 112), 3: (244, 179, 62)}
ROUTE_COLOURS = ((52, 56, 64), (76, 187, 112), (244, 179, 62), (226, 95, 84), (180, 110, 220))


def case_report(volume: Volume, prediction: Prediction, seconds: float) -> dict:
    """Returns the report of one case as JSON-ready values.

    Args:
        volume: The input.
        prediction: What `VolumePredictor.predict` returned for it.
        seconds: Wall time of the case from file to file.
    """
    voxel_ml = float(np.prod(volume.spacing)) / 1000
    values = LABELS[prediction.label_convention]
    voxels = {k: int((prediction.labels == values[k]).sum()) for k in NAMES}
    counts = np.bincount(prediction.decisions.ravel(), minlength=len(prediction.routes))
    cost = prediction.cost
    return {
        "case": volume.name,
        "meddanet": __version__,
        "shape": list(volume.data.shape[1:]),
        "spacing_mm": [round(side, 4) for side in volume.spacing],
        "modalities": list(volume.modalities),
        "naming": volume.convention,
        "label_convention": prediction.label_convention,
        "label_values": {NAMES[k]: values[k] for k in NAMES},
        "volume_ml": {NAMES[k]: round(voxels[k] * voxel_ml, 3) for k in NAMES},
        "decisions": dict(zip(prediction.routes, counts.tolist(), strict=True)),
        "macs": {key: int(value) for key, value in cost.items()},
        "share_of_static": {
            key: round(cost[key] / cost[f"static_{key}"], 4) for key in ("mac", "paper")
        },
        "seconds": {**{k: round(v, 3) for k, v in prediction.timings.items()},
                    "file_to_file": round(seconds, 3)},
        "slices": {
            "decision": prediction.decisions.tolist(),
            "offset": prediction.offsets.astype(int).tolist(),
            "num_bits": prediction.num_bits.tolist(),
        },
    }


def write_json(content: dict, path: Path) -> None:
    """Writes JSON that appears under its name only when complete."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


def write_preview(volume: Volume, prediction: Prediction, path: Path, columns: int = 4) -> None:
    """Draws labelled slices through the lesion, the crops, and a strip of all decisions.

    Args:
        volume: The input; its first channel is the background picture.
        prediction: Its prediction.
        path: PNG to write.
        columns: Slices per row, two rows.
    """
    image = canonical(volume.data[0], volume.affine)
    classes = to_classes(prediction.labels, prediction.label_convention)
    classes = canonical(classes, volume.affine)
    chosen = _slices_to_show(classes, 2 * columns)
    white = np.percentile(image[image > 0], 99.5) if (image > 0).any() else 1.0
    tiles = [_tile(image, classes, prediction, index, white) for index in chosen]
    width, height = tiles[0].size
    margin, header, strip = 8, 30, 54
    sheet = Image.new(
        "RGB",
        (columns * (width + margin) + margin, header + 2 * (height + margin) + strip + margin),
        (18, 20, 24),
    )
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        sheet.paste(tile, (margin + column * (width + margin), header + row * (height + margin)))
    draw = ImageDraw.Draw(sheet)
    share = prediction.cost["mac"] / prediction.cost["static_mac"]
    title = f"{volume.name}   {share:.1%} of the multiply-adds of the static network"
    draw.text((margin, 9), title, fill=(235, 235, 235))
    x = sheet.width - margin
    for k in reversed(NAMES):
        x -= 12 + int(draw.textlength(NAMES[k])) + 14
        draw.rectangle((x, 10, x + 9, 19), fill=COLOURS[k])
        draw.text((x + 14, 9), NAMES[k], fill=(200, 200, 200))
    _strip(draw, prediction, margin, sheet.height - strip, sheet.width - margin)
    partial = path.with_name(f".{path.stem}.partial.png")
    sheet.save(partial)
    os.replace(partial, path)


def _slices_to_show(classes: np.ndarray, count: int) -> list[int]:
    """Evenly spaced through the lesion, or through the volume where there is none."""
    present = np.flatnonzero(classes.any(axis=(0, 1)))
    depth = classes.shape[2]
    first, last = (present[0], present[-1]) if len(present) else (depth // 4, 3 * depth // 4)
    return [int(round(z)) for z in np.linspace(first, last, count + 2)[1:-1]]


def _tile(
    image: np.ndarray, classes: np.ndarray, prediction: Prediction, index: int, white: float
) -> Image.Image:
    grey = (np.clip(image[:, :, index] / white, 0, 1) * 255).astype(np.uint8)
    colour = np.repeat(grey[:, :, None], 3, 2).astype(np.float32)
    for k, rgb in COLOURS.items():
        mask = classes[:, :, index] == k
        colour[mask] = 0.45 * colour[mask] + 0.55 * np.array(rgb)
    # LPS rows run left to right: transposed, the picture is in radiological view
    tile = Image.fromarray(colour.astype(np.uint8).transpose(1, 0, 2))
    draw = ImageDraw.Draw(tile)
    label = f"slice {index}"
    if prediction.decisions.ndim == 1:
        route = prediction.routes[prediction.decisions[index]]
        label += f"  {route}"
        if route.startswith("crop-"):
            y, x = prediction.offsets[index]
            side = int(route.removeprefix("crop-")) - 1
            draw.rectangle((y, x, y + side, x + side), outline=(255, 255, 255))
    draw.text((4, 3), label, fill=(235, 235, 235))
    return tile


def _strip(
    draw: ImageDraw.ImageDraw, prediction: Prediction, left: int, top: int, right: int
) -> None:
    """One bar per slice, bottom to top of the head, coloured by its (mean) decision."""
    decisions = prediction.decisions
    if decisions.ndim == 2:
        decisions = decisions.max(1)
    step = (right - left) / len(decisions)
    for index, decision in enumerate(decisions):
        box = (left + index * step, top, left + (index + 1) * step - 1, top + 20)
        draw.rectangle(box, fill=ROUTE_COLOURS[decision % len(ROUTE_COLOURS)])
    x = left
    for number, route in enumerate(prediction.routes):
        count = int((prediction.decisions == number).sum())
        text = f"{route}: {count}"
        draw.rectangle((x, top + 30, x + 9, top + 39), fill=ROUTE_COLOURS[number % 5])
        draw.text((x + 14, top + 28), text, fill=(200, 200, 200))
        x += 34 + int(draw.textlength(text))
