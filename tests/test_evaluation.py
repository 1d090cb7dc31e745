"""Pairs of label maps, their conventions and scores, against values worked out by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from meddanet.data import VolumeError
from meddanet.evaluation import compare, find_pairs, mean_scores, write_csv

SPACING = np.diag([-2.0, -1.0, 3.0, 1.0])


def write(path: Path, values: dict[tuple[int, int, int], int], affine=SPACING, shape=(8, 9, 6)):
    """Writes a label file from {voxel: value}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.zeros(shape, np.uint8)
    for voxel, value in values.items():
        data[voxel] = value
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


def write_scan(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.random.default_rng(0).integers(0, 900, (8, 9, 6)).astype(np.int16)
    nib.save(nib.Nifti1Image(data, SPACING), path)


def the_pair(prediction: Path, reference: Path):
    (pair,) = find_pairs(prediction, reference)
    return pair


def test_scores_by_hand(tmp_path):
    line = [(1, 1, k) for k in range(4)]
    ours = write(tmp_path / "p" / "a.nii.gz", dict(zip(line, (1, 2, 4, 4), strict=True)))
    truth = write(tmp_path / "r" / "a_seg.nii.gz", dict(zip(line, (1, 2, 2, 4), strict=True)))
    scores = compare(the_pair(ours, truth))
    # TC: 3 voxels against 2, 2 of them shared; ET: 2 against 1, 1 shared
    assert scores["dice"] == pytest.approx({"WT": 1.0, "TC": 4 / 5, "ET": 2 / 3})
    assert scores["hd95_mm"]["WT"] == 0


def test_distances_are_in_millimetres(tmp_path):
    ours = write(tmp_path / "a.nii.gz", {(1, 4, 3): 4})
    truth = write(tmp_path / "r" / "a.nii.gz", {(6, 4, 3): 4})
    # the same voxel, five voxels of 2 mm away
    assert compare(the_pair(ours, truth))["hd95_mm"] == pytest.approx(dict.fromkeys(
        ("WT", "TC", "ET"), 10.0
    ))
    assert compare(the_pair(ours, truth))["dice"] == {"WT": 0, "TC": 0, "ET": 0}


def test_structures_that_are_empty(tmp_path):
    ours = write(tmp_path / "a.nii.gz", {})
    nothing = write(tmp_path / "r" / "a.nii.gz", {})
    scores = compare(the_pair(ours, nothing))
    assert scores["dice"] == {"WT": 1, "TC": 1, "ET": 1} and set(scores["hd95_mm"].values()) == {0}
    something = write(tmp_path / "s" / "a.nii.gz", {(1, 1, 1): 4})
    scores = compare(the_pair(ours, something))
    assert scores["dice"] == {"WT": 0, "TC": 0, "ET": 0}
    assert set(scores["hd95_mm"].values()) == {373.13}


def test_references_among_cases(tmp_path):
    for name in ("p1", "p2", "p3"):
        for kind in ("flair", "t1ce", "t1", "t2"):
            write_scan(tmp_path / "cases" / name / f"{name}_{kind}.nii.gz")
        write(tmp_path / "cases" / name / f"{name}_seg.nii.gz", {(1, 1, 1): 2})
    for name in ("p1", "p3", "p9"):
        write(tmp_path / "out" / f"{name}.nii.gz", {(1, 1, 1): 2})
    pairs = find_pairs(tmp_path / "out", tmp_path / "cases")
    assert [pair.name for pair in pairs] == ["p1", "p3"]
    assert pairs[1].reference == tmp_path / "cases" / "p3" / "p3_seg.nii.gz"
    # the naming tells the convention, though 2 alone could be any
    assert compare(pairs[0])["dice"]["TC"] == 1 and compare(pairs[0])["dice"]["WT"] == 1
    one = find_pairs(tmp_path / "out" / "p3.nii.gz", tmp_path / "cases")
    assert [pair.name for pair in one] == ["p3"]


def test_references_in_a_decathlon_folder(tmp_path):
    data = np.random.default_rng(0).integers(0, 900, (8, 9, 6, 4)).astype(np.int16)
    task = tmp_path / "Task01"
    (task / "imagesTr").mkdir(parents=True)
    nib.save(nib.Nifti1Image(data, SPACING), task / "imagesTr" / "BRATS_001.nii.gz")
    # oedema is 1 and core 2 there; the prediction says the same tissue in brats2021 numbers
    write(task / "labelsTr" / "BRATS_001.nii.gz", {(1, 1, 1): 1, (2, 2, 2): 2, (3, 3, 3): 3})
    ours = write(tmp_path / "out" / "BRATS_001.nii.gz", {(1, 1, 1): 2, (2, 2, 2): 1, (3, 3, 3): 4})
    (pair,) = find_pairs(tmp_path / "out", task)
    with pytest.raises(VolumeError, match=r"values \[1, 2, 4\] are not those of the msd"):
        compare(pair)
    ours.with_name("BRATS_001.json").write_text(json.dumps({"label_convention": "brats2021"}))
    assert compare(pair)["dice"] == {"WT": 1, "TC": 1, "ET": 1}
    alone = the_pair(ours, task / "labelsTr" / "BRATS_001.nii.gz")
    with pytest.raises(VolumeError, match="choose one of brats2023, msd"):
        compare(alone)
    assert compare(alone, "msd")["dice"] == {"WT": 1, "TC": 1, "ET": 1}
    # were core and oedema confused, the whole tumour would still agree
    assert compare(alone, "brats2023")["dice"] == pytest.approx({"WT": 1, "TC": 0.5, "ET": 1})


def test_files_that_do_not_lie_on_one_grid(tmp_path):
    truth = write(tmp_path / "r" / "a.nii.gz", {(1, 1, 1): 4})
    moved = SPACING.copy()
    moved[0, 3] = 7
    ours = write(tmp_path / "a.nii.gz", {(1, 1, 1): 4}, moved)
    with pytest.raises(VolumeError, match=r"a.nii.gz: the affine differs by up to 7"):
        compare(the_pair(ours, truth))
    ours = write(tmp_path / "a.nii.gz", {(1, 1, 1): 4}, shape=(8, 9, 5))
    with pytest.raises(VolumeError, match=r"a.nii.gz: shape \(8, 9, 5\) differs"):
        compare(the_pair(ours, truth))


def test_what_belongs_to_nothing(tmp_path):
    ours = write(tmp_path / "out" / "a.nii.gz", {})
    (tmp_path / "empty").mkdir()
    with pytest.raises(VolumeError, match="no such file or folder"):
        find_pairs(ours, tmp_path / "absent")
    with pytest.raises(VolumeError, match="holds no <case>.nii.gz for any labelled case of"):
        find_pairs(tmp_path / "out", tmp_path / "empty")
    with pytest.raises(VolumeError, match="is one file; expected a folder"):
        find_pairs(tmp_path / "out", ours)


def test_the_table(tmp_path):
    table = {
        "a": {"dice": {"WT": 0.5, "ET": 1.0}, "hd95_mm": {"WT": 4.0, "ET": 0.0}},
        "b": {"dice": {"WT": 0.75, "ET": 0.0}, "hd95_mm": {"WT": 1.0, "ET": 373.13}},
    }
    assert mean_scores(table) == {
        "dice": {"WT": 0.625, "ET": 0.5}, "hd95_mm": {"WT": 2.5, "ET": 373.13 / 2},
    }
    write_csv(table, tmp_path / "table.csv")
    with open(tmp_path / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[1] == {
        "case": "b", "dice_WT": "0.75", "dice_ET": "0.0", "hd95_mm_WT": "1.0",
        "hd95_mm_ET": "373.13",
    }
    assert len(rows) == 2
