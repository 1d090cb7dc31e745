"""The JSON report and the picture of a hand-made prediction."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFont

from meddanet.data import Volume, VolumeError
from meddanet.data.storage import write_json
from meddanet.predictor import Prediction
from meddanet.preview import COLOURS, ROUTE_COLOURS, write_preview
from meddanet.report import case_report

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
SHAPE = (60, 50, 20)


def volume(affine: np.ndarray = LPS, shape: tuple[int, ...] = SHAPE) -> Volume:
    data = np.zeros((2, *shape), np.float32)
    data[1] = 200
    data[1, 0, 0] = 100
    return Volume(data, affine, None, ("t1", "flair"), "brats2021", "patient")


def prediction(labels: np.ndarray, decisions: list[int]) -> Prediction:
    depth = len(decisions)
    offsets = np.zeros((depth, 2), np.float32)
    offsets[np.array(decisions) == 1] = (12, 30)
    return Prediction(
        labels=labels, label_convention="brats2021", routes=("skip", "crop-16", "whole"),
        windows=(), decisions=np.array(decisions), offsets=offsets,
        num_bits=np.array(decisions)[:, None].clip(0, 1) * np.array([[8, 16]]),
        cost={"mac": 250.0, "paper": 400.0, "static_mac": 1000.0, "static_paper": 1200.0,
              "scaled_paper": 100.5, "bit_operations": 16000.0},
        timings={"normalise": 0.25, "network": 1.0, "total": 1.5},
    )


@pytest.fixture
def lesion() -> Prediction:
    """Oedema (2) in slices 6 to 13, one voxel of core (1) and three of enhancing tumour (4)."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[20:24, 33:39, 6:14] = 2
    labels[22, 35, 10], labels[22, 36:39, 10] = 1, 4
    return prediction(labels, [0] * 6 + [1] * 7 + [2] + [0] * 6)


def test_the_report_by_hand(lesion):
    report = case_report(volume(np.diag([-2.0, -1.0, 5.0, 1.0])), lesion, 2.0, weights="tiny")
    assert report["case"] == "patient" and report["run"] == {"weights": "tiny"}
    assert report["shape"] == [60, 50, 20] and report["spacing_mm"] == [2.0, 1.0, 5.0]
    assert report["decisions"] == {"skip": 12, "crop-16": 7, "whole": 1}
    # voxels of 10 mm^3: 4 * 6 * 8 - 4 of oedema
    assert report["volume_ml"] == {
        "necrotic core": 0.01, "oedema": 1.88, "enhancing tumour": 0.03,
    }
    assert report["label_values"] == {"necrotic core": 1, "oedema": 2, "enhancing tumour": 4}
    assert report["share_of_static"] == {"mac": 0.25, "paper": 0.3333}
    assert report["macs"] == {
        "mac": 250, "paper": 400, "static_mac": 1000, "static_paper": 1200, "scaled_paper": 100
    }
    assert report["bit_operations"] == 16000
    assert report["seconds"] == {
        "normalise": 0.25, "network": 1.0, "total": 1.5, "file_to_file": 2.0,
    }
    slices = report["slices"]
    assert slices["decision"][5:8] == [0, 1, 1] and slices["decision"][13] == 2
    assert slices["offset"][5:7] == [[0, 0], [12, 30]]
    assert slices["num_bits"][5:7] == [[0, 0], [8, 16]]
    assert report["versions"].keys() == {"meddanet", "torch", "python"}


def test_volumes_of_a_tilted_gantry(lesion):
    """Slices of 2 x 1 mm, 5 mm apart, each shifted by 3 mm against the one below."""
    tilted = np.diag([-2.0, -1.0, 5.0, 1.0])
    tilted[1, 2] = 3
    assert case_report(volume(tilted), lesion, 2.0)["volume_ml"]["oedema"] == 1.88


def test_json_reads_back_and_keeps_long_lists_on_one_line(lesion, tmp_path):
    report = case_report(volume(), lesion, 2.0)
    path = tmp_path / "patient.json"
    write_json(report, path)
    assert json.loads(path.read_text()) == report
    lines = path.read_text().splitlines()
    assert len(lines) < 60 and any(line.startswith('    "decision": [0, 0') for line in lines)
    with pytest.raises(VolumeError, match="cannot be written"):
        write_json(report, tmp_path / "absent" / "patient.json")


def picture(volume: Volume, prediction: Prediction, tmp_path) -> np.ndarray:
    path = tmp_path / "patient.png"
    write_preview(volume, prediction, path)
    assert [p.name for p in tmp_path.iterdir()] == ["patient.png"]
    return np.asarray(Image.open(path))


# as many pixels as a voxel of SHAPE takes along each side: tiles are at least 164 wide or high
ZOOM = 3


def tile(sheet: np.ndarray, number: int) -> np.ndarray:
    """Tile `number` as [H, W, 3] in the order of the volume: a picture's columns are rows H."""
    row, column = divmod(number, 4)
    height, width = ZOOM * SHAPE[0], ZOOM * SHAPE[1]
    top, left = 30 + row * (width + 8), 8 + column * (height + 8)
    return sheet[top : top + width, left : left + height].transpose(1, 0, 2)


def voxels(sheet: np.ndarray, number: int) -> np.ndarray:
    """Tile `number`, the central pixel of each voxel."""
    return tile(sheet, number)[ZOOM // 2 :: ZOOM, ZOOM // 2 :: ZOOM]


def mixed(colour: tuple[int, int, int]) -> list[int]:
    return [int(0.45 * 255 + 0.55 * part) for part in colour]


def test_the_picture_shows_labels_crop_and_grey_values(lesion, tmp_path):
    sheet = picture(volume(), lesion, tmp_path)
    # the lesion fills 8 slices, so the 8 tiles are slices 6 to 13; slice 10 is tile 4
    shown = voxels(sheet, 4)
    assert shown[22, 35].tolist() == mixed(COLOURS[1])
    assert shown[22, 37].tolist() == mixed(COLOURS[3])
    assert shown[20, 33].tolist() == mixed(COLOURS[2])
    assert shown[50, 48].tolist() == [255] * 3 and shown[45, 20].tolist() == [255] * 3
    # FLAIR is the background though t1 comes first; its dimmest line is half as bright
    assert shown[0, 0].tolist() == [127] * 3
    # on a dark picture the frame of the crop stands out, around the voxels y 12..27, x 30..45
    dark = volume()
    dark.data[1] = 1
    dark.data[1, :5] = 1000
    framed = tile(picture(dark, lesion, tmp_path), 4)
    for y, x in [(36, 90), (83, 137), (36, 120), (60, 137)]:
        assert framed[y, x].tolist() == [255] * 3
    assert framed[84, 138].max() < 5 and framed[42, 129].max() < 5


def test_a_ct_is_shown_in_the_models_window(tmp_path):
    """Fat, liver and tumour in one slice with air below them and bone far above them."""
    hounsfield = {-1000: 0, -100: 38, 40: 127, 100: 165, 240: 255, 1200: 255}
    scan = Volume(np.zeros((1, *SHAPE), np.float32), LPS, None, ("ct",), "lits", "patient")
    for index, value in enumerate(hounsfield):
        scan.data[0, 8 * index : 8 * index + 8] = value
    path = tmp_path / "ct.png"
    nothing = prediction(np.zeros(SHAPE, np.uint8), [2] * 20)
    write_preview(scan, nothing, path, window_hu=(-160, 240))
    # below the label
    greys = voxels(np.asarray(Image.open(path)), 0)[4:48:8, 40]
    assert greys.tolist() == [[grey] * 3 for grey in hounsfield.values()]


@pytest.mark.parametrize(("name", "shown"), [
    ("M\u00fcller 3", "Muller 3"), ("Mu\u0308ller 3", "Muller 3"), ("\u8133-1", r"\u8133-1"),
    ("c\u00f8d\udcff", r"c\xf8d\udcff"), ("a\nb\x1b", r"a\nb\x1b"),
])
def test_a_name_is_shown_by_letters_that_the_font_has(lesion, tmp_path, name, shown):
    font, none = ImageFont.load_default(), bytes(ImageFont.load_default().getmask("\uffff"))
    assert all(bytes(font.getmask(letter)) != none for letter in shown)
    drawn, expected = (
        picture(replace(volume(), name=title), lesion, tmp_path) for title in (name, shown)
    )
    assert np.array_equal(drawn, expected)


def test_the_picture_is_turned_to_the_usual_view(lesion, tmp_path):
    usual = picture(volume(), lesion, tmp_path)
    flipped = lesion.labels[::-1, :, ::-1].transpose(2, 0, 1)
    affine = np.eye(4)
    affine[:3, :3] = [[0, 1, 0], [0, 0, -1], [-1, 0, 0]]  # voxel axes: down, right, back
    other = volume(affine, (20, 60, 50))
    other.data[1] = 200
    other.data[1, :, -1, 0] = 100
    turned = prediction(flipped, lesion.decisions.tolist())
    assert np.array_equal(picture(other, turned, tmp_path), usual)


@pytest.mark.parametrize(("shape", "spacing", "size"), [
    # BraTS as it always was; sagittal and coronal slices 5 mm apart have true proportions
    ((240, 240), (1, 1), (240, 240)),
    ((48, 240), (5, 1), (240, 240)),
    ((512, 60), (0.4, 4), (512, 600)),
    # what is small is larger; what is huge or very flat becomes no poster
    ((5, 4), (1, 1), (165, 132)),
    ((1200, 900), (1, 1), (1200, 900)),
    ((240, 240), (1, 1000), (1, 1024)),
])
def test_tiles_have_the_proportions_of_the_body(tmp_path, shape, spacing, size):
    scan = volume(np.diag([-spacing[0], -spacing[1], 1.0, 1.0]), (*shape, 2))
    scan.data[1] = 200
    whole = prediction(np.zeros((*shape, 2), np.uint8), [2, 2])
    sheet = picture(scan, whole, tmp_path)
    bright = (sheet[30:-62] == 255).all(2)
    columns, rows = np.flatnonzero(bright.any(0)), np.flatnonzero(bright.any(1))
    assert rows[-1] - rows[0] + 1 == size[1]
    # the first two tiles are the volume's slices, beside each other in columns of 164 or more
    assert columns[-1] - columns[0] + 1 == size[0] + max(size[0], 164) + 8
    assert sheet.shape[1] >= 690


def test_a_crop_is_drawn_where_it_lies_on_a_stretched_slice(tmp_path):
    scan = volume(np.diag([-5.0, -1.0, 1.0, 1.0]), (40, 200, 2))
    scan.data[1] = 1
    scan.data[1, 39] = 1000
    result = prediction(np.zeros((40, 200, 2), np.uint8), [1, 1])
    for offset, corners in (((12, 30), (60, 139, 30, 45)), ((-3, 190), (0, 64, 190, 199))):
        shown = replace(result, offsets=np.array([offset] * 2, np.float32))
        first = picture(scan, shown, tmp_path)[30 : 30 + 200, 8 : 8 + 190].transpose(1, 0, 2)
        # below the label
        framed = (first == 255).all(2) & (np.arange(200) > 20)
        left, right = np.flatnonzero(framed.any(1))[[0, -1]]
        top, bottom = np.flatnonzero(framed.any(0))[[0, -1]]
        assert (left, right, top, bottom) == corners


def test_a_long_name_leaves_room_for_the_legend(lesion, tmp_path):
    short, long = (
        picture(replace(volume(), name=name), lesion, tmp_path)[:30] for name in ("", 90 * "long ")
    )
    # the legend of three classes is 265 pixels wide
    legend = slice(short.shape[1] - 8 - 265, None)
    assert np.array_equal(long[:, legend], short[:, legend]) and not np.array_equal(long, short)
    assert (long[:, -8:] == long[0, 0]).all()


def test_the_strip_has_one_bar_per_slice(lesion, tmp_path):
    sheet = picture(volume(), lesion, tmp_path)
    top, width = sheet.shape[0] - 54 + 10, sheet.shape[1] - 16
    bars = [sheet[top, 8 + int((index + 0.4) * width / 20)].tolist() for index in range(20)]
    assert bars == [list(ROUTE_COLOURS[d]) for d in lesion.decisions]


def test_the_strip_of_more_slices_than_pixels(tmp_path):
    scan, labels = volume(shape=(30, 20, 900)), np.zeros((30, 20, 900), np.uint8)
    sheet = picture(scan, prediction(labels, [0] * 450 + [2] * 450), tmp_path)
    bars = sheet[sheet.shape[0] - 54 + 10, 8:-8]
    half = len(bars) // 2
    assert (bars[: half - 1] == ROUTE_COLOURS[0]).all()
    assert (bars[half + 1 :] == ROUTE_COLOURS[2]).all()


@pytest.mark.parametrize("place", [None, (0, 1), (19, 20), (0, 20)])
def test_any_lesion_gets_eight_tiles(tmp_path, place):
    labels = np.zeros(SHAPE, np.uint8)
    if place:
        labels[20:30, 20:30, slice(*place)] = 1
    sheet = picture(volume(), prediction(labels, [2] * 20), tmp_path)
    blue = [(voxels(sheet, n)[25, 25] == mixed(COLOURS[1])).all() for n in range(8)]
    assert sum(blue) == (0 if place is None else min(place[1] - place[0], 8))
    assert all(voxels(sheet, n)[50, 40].tolist() == [255] * 3 for n in range(8))


def test_windows_and_few_slices_are_drawn_too(tmp_path):
    windows = tuple((y, x) for y in (0, 8) for x in (0, 8))
    small = replace(
        prediction(np.zeros((60, 50, 3), np.uint8), [0, 0, 0]), windows=windows,
        decisions=np.array([[0, 0, 0, 0], [0, 1, 0, 0], [2, 0, 1, 0]]),
        offsets=np.zeros((3, 4, 2), np.float32), num_bits=np.zeros((3, 4, 2), np.int64),
    )
    scan = volume(shape=(60, 50, 3))
    assert picture(scan, small, tmp_path).shape == (30 + 2 * 158 + 54 + 8, 4 * 188 + 8, 3)
    report = case_report(scan, small, 1.0)
    assert report["decisions"] == {"skip": 9, "crop-16": 2, "whole": 1}
    assert report["windows"] == [[0, 0], [0, 8], [8, 0], [8, 8]]
    assert report["slices"]["decision"][2] == [2, 0, 1, 0]
