"""Dice, HD95 and surface Dice: by hand, DeepMind's published cases, empty masks, bad arguments."""

import math

import numpy as np
import pytest
from scipy.spatial.distance import dice as scipy_dissimilarity

from meddanet.metrics import brats_regions, dice_score, hausdorff_distance_95, surface_dice

METRICS = [dice_score, hausdorff_distance_95, surface_dice]


def mask_of(*voxels, shape=(12, 13, 14)):
    mask = np.zeros(shape, bool)
    for voxel in voxels:
        mask[voxel] = True
    return mask


# Dice


def test_dice_by_hand():
    a = np.array([1, 1, 1, 0, 0], bool)
    b = np.array([0, 1, 1, 1, 0], bool)
    assert dice_score(a, b) == 2 * 2 / 6


def test_dice_regions_join_values():
    a, b = np.array([0, 1, 2, 4, 4]), np.array([0, 4, 2, 4, 0], np.uint8)
    scores = dice_score(a, b, labels=brats_regions("brats2021"))
    assert scores == {"WT": 6 / 7, "TC": 4 / 5, "ET": 2 / 4}


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64])
def test_dice_of_labels_agrees_with_scipy(dtype):
    random = np.random.default_rng(0)
    # a label beyond 255, as parcellations have, and one layout each
    a, b = (random.choice([0, 1, 2, 3, 100], (7, 8, 9)).astype(dtype) for _ in range(2))
    if dtype != np.uint8:
        a[a == 100], b[b == 100] = 1000, 1000
    scores = dice_score(a, np.asfortranarray(b), labels={"two": 2, "rest": [1, 100, 1000]})
    for name, values in (("two", [2]), ("rest", [1, 100, 1000])):
        dissimilarity = scipy_dissimilarity(np.isin(a, values).ravel(), np.isin(b, values).ravel())
        assert scores[name] == pytest.approx(1 - dissimilarity)


def test_regions_of_each_convention():
    # necrotic core, oedema, enhancing tumour: 1, 2, 4 / 1, 2, 3 / 2, 1, 3
    assert brats_regions("brats2021") == {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}
    assert brats_regions("brats2023") == {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}
    assert brats_regions("msd") == {"WT": (2, 1, 3), "TC": (2, 3), "ET": (3,)}
    with pytest.raises(ValueError, match="expected one of brats2021"):
        brats_regions("brats")


# surfaces


def test_deepminds_two_voxels():
    # elements at the voxels' corners: z = 4, 5 and 6, 7, so half of them 1 mm apart, half 2 mm
    a, b = mask_of((5, 6, 4)), mask_of((5, 6, 6))
    assert hausdorff_distance_95(a, b, spacing=(3, 2, 1)) == pytest.approx(2.0)
    assert surface_dice(a, b, 1, spacing=(3, 2, 1)) == pytest.approx(0.5)
    assert surface_dice(a, b, 0.99, spacing=(3, 2, 1)) == 0.0
    assert dice_score(a, b) == 0.0


def test_deepminds_two_cuboids():
    a, b = np.zeros((2, 100, 100, 100), bool)
    a[:50], b[:51] = True, True
    assert hausdorff_distance_95(a, b, spacing=(2, 1, 1)) == pytest.approx(2.0)
    assert surface_dice(a, b, 1, spacing=(2, 1, 1)) == pytest.approx(0.836, abs=5e-4)
    assert dice_score(a, b) == pytest.approx(0.990, abs=5e-4)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_voxels_along_each_axis(axis):
    # voxel 2 and voxel 8: the far corners lie 6 voxels from the other's nearest corner
    spacing = (0.5, 1.25, 3.0)
    a, b = mask_of((2, 2, 2)), mask_of(tuple(8 if k == axis else 2 for k in range(3)))
    assert hausdorff_distance_95(a, b, spacing=spacing) == pytest.approx(6 * spacing[axis])


def test_voxels_apart_along_all_axes():
    # nearest corners differ by (2, 3, 5), farthest pairs of corner and nearest by (3, 4, 6)
    a, b = mask_of((1, 1, 1)), mask_of((4, 5, 7))
    assert hausdorff_distance_95(a, b) == pytest.approx(math.sqrt(3**2 + 4**2 + 6**2))
    assert surface_dice(a, b, math.sqrt(2**2 + 3**2 + 5**2)) == pytest.approx(1 / 8)


def test_area_not_number_of_elements_counts():
    # a cube of 3: 6 x 4 unit squares, 24 edge pieces of sqrt(1/2), 8 corners of sqrt(3) / 8
    cube = mask_of((slice(1, 4), slice(1, 4), slice(1, 4)))
    cube_area, voxel_area = 24 + 24 * math.sqrt(0.5) + math.sqrt(3), math.sqrt(3)
    one, two = cube | mask_of((2, 2, 10)), cube | mask_of((2, 2, 10), (2, 10, 2))
    # one stray voxel, 6 and 7 mm off: 8 of 64 elements, but 3.9 % of the area
    assert voxel_area / (cube_area + voxel_area) < 0.05 < 8 / 64
    assert hausdorff_distance_95(one, cube) == 0.0
    # two: 3.7 % of the area lies 7 mm off and as much 6 mm off
    assert hausdorff_distance_95(two, cube) == hausdorff_distance_95(cube, two) == 6.0
    assert surface_dice(one, cube) == pytest.approx(2 * cube_area / (2 * cube_area + voxel_area))


@pytest.mark.parametrize("length", [0.3, 0.7, 1.0, 1.1])
def test_the_tolerance_is_inclusive(length):
    # the farthest elements lie 3 voxels off: 3 * 0.3 and 3 * 1.1 are not float32 numbers
    a, b = mask_of((2, 2, 2)), mask_of((2, 2, 5))
    assert surface_dice(a, b, 3 * length, spacing=(1, 1, length)) == pytest.approx(1.0)
    assert surface_dice(a, b, 2.99 * length, spacing=(1, 1, length)) == pytest.approx(0.5)


def test_exactly_95_percent_is_enough():
    # 20 voxels of equal area, one of them not in the reference
    at = [(0, 2 * (k // 10), 2 * (k % 10)) for k in range(19)]
    b = mask_of(*at, shape=(40, 5, 21))
    assert hausdorff_distance_95(b | mask_of((30, 0, 0), shape=b.shape), b) == 0.0


def test_surfaces_of_label_maps():
    a, b = np.zeros((2, 9, 9, 9), np.int16)
    a[2:5, 2:5, 2:5], a[3, 3, 3] = 2, 4
    b[2:5, 2:5, 2:5], b[3, 3, 5] = 2, 4
    regions = {"ET": (4,), "WT": (2, 4)}
    for metric in METRICS:
        by_mask = {name: metric(np.isin(a, v), np.isin(b, v)) for name, v in regions.items()}
        assert metric(a, b, labels=regions) == by_mask
    assert hausdorff_distance_95(a, b, labels=regions)["ET"] == pytest.approx(2.0)


@pytest.mark.parametrize("metric", METRICS)
def test_a_mask_agrees_with_itself(metric):
    mask = mask_of((3, 4, 5), (3, 4, 6), (9, 9, 9))
    assert metric(mask, mask) == (0.0 if metric is hausdorff_distance_95 else 1.0)


# rules and arguments


@pytest.mark.parametrize(
    ("metric", "empty", "both", "one"),
    [
        (dice_score, "brats", 1.0, 0.0),
        (surface_dice, "brats", 1.0, 0.0),
        (hausdorff_distance_95, "brats", 0.0, 373.13),
        (dice_score, "nan", math.nan, 0.0),
        (surface_dice, "nan", math.nan, 0.0),
        (hausdorff_distance_95, "nan", math.nan, math.inf),
    ],
)
def test_the_empty_rules(metric, empty, both, one):
    none, some = mask_of(), mask_of((1, 2, 3))
    assert metric(none, none, empty=empty) == pytest.approx(both, nan_ok=True)
    assert metric(some, none, empty=empty) == metric(none, some, empty=empty) == one
    # the rule is for empty masks only
    assert metric(some, some, empty=empty) == metric(some, some)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("a", "b", "kwargs", "message"),
    [
        (mask_of(), mask_of(shape=(12, 13, 1)), {}, r"shapes differ: .*\(12, 13, 1\)"),
        (np.zeros((2, 2, 2), int), np.zeros((2, 2, 2), int), {}, "need labels={name: "),
        (mask_of(), mask_of().astype(np.uint8), {}, "prediction is bool, reference uint8"),
        (
            np.zeros((2, 2, 2)),
            np.zeros((2, 2, 2)),
            {"labels": {"a": (1,)}},
            "whole numbers .*float",
        ),
        (mask_of(), mask_of(), {"labels": {"a": (1,)}}, "whole numbers .* bool"),
        (np.zeros((2, 2, 2), int), np.zeros((2, 2, 2), int), {"labels": {"a": ()}}, "region 'a'"),
        (mask_of(), mask_of(), {"empty": "monai"}, "empty must be one of brats, nan, got 'monai'"),
    ],
)
def test_wrong_arguments_say_so(metric, a, b, kwargs, message):
    with pytest.raises(ValueError, match=message):
        metric(a, b, **kwargs)


@pytest.mark.parametrize("metric", [hausdorff_distance_95, surface_dice])
def test_surfaces_refuse_what_has_no_geometry(metric):
    with pytest.raises(ValueError, match=r"3-D arrays, got shape \(12, 13\)"):
        metric(mask_of()[..., 0], mask_of()[..., 0])
    for spacing in ((1, 1), (1, 1, 0), (1, 1, math.nan), (1, 1, 1, 2)):
        with pytest.raises(ValueError, match="three positive lengths in mm"):
            metric(mask_of(), mask_of(), spacing=spacing)
    with pytest.raises(ValueError, match="tolerance"):
        surface_dice(mask_of(), mask_of(), -1)
