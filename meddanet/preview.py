"""A picture of a case: slices through its lesion with their crops, and every slice's decision."""

from __future__ import annotations

import io
import math
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .data import Volume, canonical
from .data.axes import lps_axes
from .data.storage import Writer, write_bytes
from .predictor import Prediction
from .report import class_names, class_values

COLOURS = {1: (66, 135, 245), 2: (76, 187, 112), 3: (244, 179, 62)}
ROUTE_COLOURS = ((52, 56, 64), (76, 187, 112), (244, 179, 62), (226, 95, 84), (180, 110, 220))
_INK, _PALE, _PAPER = (235, 235, 235), (200, 200, 200), (18, 20, 24)
# slices in each of two rows
_COLUMNS = 4
# so many classes have room beside the title
_LEGEND = 5
_MARGIN, _HEADER, _STRIP = 8, 30, 54
# pixels: a tile's width below which title and legend have no room, a side that is made no longer
_LEAST, _MOST = 164, 1024


def write_preview(
    volume: Volume, prediction: Prediction, path: Path,
    write: Writer = write_bytes, window_hu: tuple[float, float] | None = None,
) -> None:
    """Draws labelled slices through the lesion, the crops, and a strip of all decisions.

    Args:
        volume: The input; its FLAIR, or else its first channel, is the background picture.
        prediction: Its prediction.
        path: PNG to write.
        write: What writes the bytes.
        window_hu: The model's Hounsfield window, which the picture shows; None: from 0 up to the
            brightest.

    Raises:
        VolumeError: If the file cannot be written.
    """
    channel = volume.modalities.index("flair") if "flair" in volume.modalities else 0
    image = canonical(volume.data[channel], volume.affine)
    classes = np.zeros_like(prediction.labels)
    for k, value in class_values(prediction).items():
        classes[prediction.labels == value] = k
    classes = canonical(classes, volume.affine)
    black, white = window_hu or (0.0, _brightest(image))
    tile_size = _tile_size(volume)
    tiles = [
        _tile(
            (image[:, :, index] - black) / (white - black), classes[:, :, index], prediction,
            index, tile_size,
        )
        for index in _slices_to_show(classes, 2 * _COLUMNS)
    ]
    width, height = tiles[0].size
    size = (
        _COLUMNS * (width + _MARGIN) + _MARGIN,
        _HEADER + 2 * (height + _MARGIN) + _STRIP + _MARGIN,
    )
    sheet = Image.new("RGB", size, _PAPER)
    for number, tile in enumerate(tiles):
        row, column = divmod(number, _COLUMNS)
        corner = _MARGIN + column * (width + _MARGIN), _HEADER + row * (height + _MARGIN)
        sheet.paste(tile, corner)
    draw = ImageDraw.Draw(sheet)
    _header(draw, volume.name, prediction, sheet.width - _MARGIN)
    _strip(draw, prediction, _MARGIN, sheet.height - _STRIP, sheet.width - _MARGIN)
    content = io.BytesIO()
    sheet.save(content, "PNG")
    write(path, content.getvalue())


def _brightest(image: np.ndarray) -> float:
    """Returns what is white in a picture that is black at 0; a few voxels are brighter."""
    return float(np.percentile(image[image > 0], 99.5)) if (image > 0).any() else 1.0


def _slices_to_show(classes: np.ndarray, count: int) -> list[int]:
    """Slices that share out the lesion evenly, or the volume's middle half where there is none."""
    area = np.count_nonzero(classes, axis=(0, 1))
    depth = len(area)
    if not area.any():
        area[depth // 4 : depth - depth // 4] = 1
    step = np.arange(min(count, depth))
    wanted = (step + 0.5) / len(step)
    chosen = np.searchsorted(area.cumsum() / area.sum(), wanted)
    # a lesion of few slices is shown with its neighbours, none of them twice
    chosen = np.maximum.accumulate(chosen - step) + step
    return np.minimum(chosen, depth - len(step) + step).tolist()


def _tile_size(volume: Volume) -> tuple[int, int]:
    """Returns width and height in pixels of an axial slice as the body is; voxels may be flat."""
    axes, _ = lps_axes(volume.affine)
    sides = np.array([volume.data.shape[1 + axis] for axis in axes[:2]])
    spacing = np.array([volume.spacing[axis] for axis in axes[:2]])
    size = sides * spacing / spacing.min()
    if size.max() < _LEAST:
        size *= math.ceil(_LEAST / size.max())
    size *= min(1, max(_MOST, sides.max()) / size.max())
    width, height = size.round().astype(int).clip(min=1).tolist()
    return width, height


def _tile(
    grey: np.ndarray, classes: np.ndarray, prediction: Prediction, index: int, size: tuple[int, int]
) -> Image.Image:
    """Draws one slice [H, W] of grey values 0..1 with its classes and its crop, `size` pixels."""
    colour = np.repeat(np.clip(grey, 0, 1)[:, :, None] * 255, 3, 2)
    for k in np.unique(classes[classes > 0]).tolist():
        mask = classes == k
        colour[mask] = 0.45 * colour[mask] + 0.55 * np.array(_colour(k))
    # LPS rows run left to right: transposed, the picture is in radiological view
    shown = Image.fromarray(colour.astype(np.uint8).transpose(1, 0, 2))
    shown = shown.resize(size, Image.Resampling.NEAREST)
    label = f"slice {index}"
    if not prediction.windows:
        route = prediction.routes[prediction.decisions[index]]
        label += f"  {route}"
        if route.startswith("crop-"):
            zoom, first = np.divide(size, grey.shape), prediction.offsets[index]
            last = first + int(route.removeprefix("crop-"))
            inside = np.clip((first * zoom, last * zoom - 1), 0, np.subtract(size, 1))
            ImageDraw.Draw(shown).rectangle(inside.ravel().tolist(), outline=(255, 255, 255))
    # a label needs more room than a narrow slice has
    tile = Image.new("RGB", (max(size[0], _LEAST), max(size[1], _HEADER)), _PAPER)
    tile.paste(shown, ((tile.width - size[0]) // 2, (tile.height - size[1]) // 2))
    ImageDraw.Draw(tile).text((4, 3), label, fill=_INK, stroke_width=1, stroke_fill=(0, 0, 0))
    return tile


def _header(draw: ImageDraw.ImageDraw, name: str, prediction: Prediction, right: int) -> None:
    names = class_names(prediction)
    for k in sorted(names, reverse=True)[-_LEGEND:]:
        right -= 12 + int(draw.textlength(names[k])) + 14
        draw.rectangle((right, 10, right + 9, 19), fill=_colour(k))
        draw.text((right + 14, 9), names[k], fill=_PALE)
    share = prediction.cost["mac"] / prediction.cost["static_mac"]
    title = f"   {share:.1%} of the multiply-adds of the static network"
    draw.text((_MARGIN, 9), _named(draw, name, title, right - 2 * _MARGIN), fill=_INK)


def _named(draw: ImageDraw.ImageDraw, name: str, title: str, room: int) -> str:
    """Puts a name, or as much of it as the room in pixels allows, before a title."""
    name, more = _drawable(name), ""
    while name and draw.textlength(name + more + title) > room:
        name, more = name[:-1], "..."
    return name + more + title


def _drawable(name: str) -> str:
    """Returns a name in ASCII, all that Pillow's font has: without accents, or escaped."""
    letters = []
    for letter in unicodedata.normalize("NFC", name):
        # its accents follow it
        bare = unicodedata.normalize("NFD", letter)[0]
        shown = bare if bare.isascii() else letter
        # of a line break Pillow would make two lines, which have no length
        letters.append(shown if shown.isprintable() else ascii(shown)[1:-1])
    return "".join(letters).encode("ascii", "backslashreplace").decode()


def _strip(
    draw: ImageDraw.ImageDraw, prediction: Prediction, left: int, top: int, right: int
) -> None:
    """One bar per slice, bottom to top of the head, coloured by its (dearest) decision."""
    decisions = prediction.decisions.reshape(len(prediction.decisions), -1).max(1)
    step = (right - left) / len(decisions)
    for index, decision in enumerate(decisions):
        # at least one pixel, where there are more slices than pixels
        first = left + index * step
        box = (first, top, max(first, first + step - 1), top + 20)
        draw.rectangle(box, fill=ROUTE_COLOURS[decision % len(ROUTE_COLOURS)])
    for number, route in enumerate(prediction.routes):
        text = f"{route}: {int((prediction.decisions == number).sum())}"
        fill = ROUTE_COLOURS[number % len(ROUTE_COLOURS)]
        draw.rectangle((left, top + 30, left + 9, top + 39), fill=fill)
        draw.text((left + 14, top + 28), text, fill=_PALE)
        left += 34 + int(draw.textlength(text))


def _colour(k: int) -> tuple[int, int, int]:
    return COLOURS[1 + (k - 1) % len(COLOURS)]
