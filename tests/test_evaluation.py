"""Pairs of label maps, their conventions and scores, against values worked out by hand."""

from __future__ import annotations

import csv
import json
import math
import re
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from meddanet.data import VolumeError
from meddanet.evaluation import (
    check_groups,
    compare,
    counted_scores,
    json_ready,
    mean_scores,
    parse_groups,
    write_csv,
)
from meddanet.pairs import find_pairs, unpaired

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


def write_report(labels: Path, facts: dict[str, object]) -> Path:
    """Writes what `segment` leaves beside a label file."""
    name = labels.name.removesuffix(".gz").removesuffix(".nii")
    path = labels.with_name(f"{name}.json")
    path.write_text(json.dumps({"case": name, "versions": {"meddanet": "1"}, **facts}))
    return path


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
    assert scores["hd95_mm"]["WT"] == 0 and scores["surface_dice"]["WT"] == 1
    # voxels of 2 x 1 x 3 mm
    assert scores["volume_ml"] == {"WT": 0.024, "TC": 0.018, "ET": 0.012}
    assert scores["reference_ml"] == {"WT": 0.024, "TC": 0.012, "ET": 0.006}


def test_distances_are_in_millimetres(tmp_path):
    ours = write(tmp_path / "a.nii.gz", {(1, 4, 3): 4})
    truth = write(tmp_path / "r" / "a.nii.gz", {(6, 4, 3): 4})
    # the same voxel, five voxels of 2 mm away
    assert compare(the_pair(ours, truth))["hd95_mm"] == pytest.approx(dict.fromkeys(
        ("WT", "TC", "ET"), 10.0
    ))
    assert compare(the_pair(ours, truth))["dice"] == {"WT": 0, "TC": 0, "ET": 0}


def test_a_tilted_gantry(tmp_path, recwarn):
    """Its voxels are no boxes: 2 x 1 mm, 3 mm apart, each slice shifted against the one below."""
    for shift, told in ((0.05, 0), (2.0, 1)):
        affine = SPACING.copy()
        affine[1, 2] = shift
        ours = write(tmp_path / "a.nii", {(1, 4, 3): 4}, affine)
        truth = write(tmp_path / "r" / "a.nii", {(1, 4, 3): 4}, affine)
        scores = compare(the_pair(ours, truth))
        assert scores["volume_ml"]["WT"] == scores["reference_ml"]["WT"] == 0.006
        assert len(recwarn) == told
    # atan(2 / 3)
    assert str(recwarn[0].message).startswith(f"{truth}: its voxel axes are 34 degrees off right")


def in_metres(path: Path) -> None:
    image = nib.load(path)
    image.header.set_xyzt_units("meter")
    nib.save(nib.Nifti1Image(np.array(image.dataobj), None, image.header), path)


@pytest.mark.parametrize("prediction_too", [True, False])
def test_files_in_metres(tmp_path, prediction_too):
    """Both, or the reference alone: the grid is the same."""
    affine = SPACING @ np.diag([0.001, 0.001, 0.001, 1])
    ours = write(tmp_path / "a.nii", {(1, 4, 3): 4}, affine if prediction_too else SPACING)
    truth = write(tmp_path / "r" / "a.nii", {(6, 4, 3): 4}, affine)
    for path in (ours, truth)[0 if prediction_too else 1 :]:
        in_metres(path)
    scores = compare(the_pair(ours, truth))
    assert scores["hd95_mm"]["WT"] == pytest.approx(10) and scores["volume_ml"]["WT"] == 0.006


def test_the_same_numbers_in_another_unit_are_another_grid(tmp_path):
    ours = write(tmp_path / "a.nii", {(1, 4, 3): 4})
    truth = write(tmp_path / "r" / "a.nii", {(6, 4, 3): 4})
    in_metres(truth)
    with pytest.raises(VolumeError, match="the affine differs by up to 2997 mm"):
        compare(the_pair(ours, truth))


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


@pytest.mark.parametrize("scanned", ["", "a"])
def test_references_without_their_scans(tmp_path, scanned):
    """One of the cases or all of them, in folders of their own or of an archive's layout."""
    places = {"a": "a/a_seg", "b": "b/b_seg", "c": "graded/c/c-seg", "d": "d_seg"}
    for place in places.values():
        write(tmp_path / "r" / f"{place}.nii.gz", {(1, 1, 1): 4})
    for name in scanned:
        write_scan(tmp_path / "r" / name / f"{name}_flair.nii.gz")
    for name in "abc":
        write(tmp_path / "out" / f"{name}.nii.gz", {(1, 1, 1): 4})
    pairs = find_pairs(tmp_path / "out", tmp_path / "r")
    assert {pair.name: pair.reference for pair in pairs} == {
        name: tmp_path / "r" / f"{places[name]}.nii.gz" for name in "abc"
    }
    assert all(compare(pair)["dice"]["ET"] == 1 for pair in pairs)
    assert unpaired(pairs, tmp_path / "out", tmp_path / "r") == {
        "without_prediction": ["d"], "without_reference": [],
    }


def test_references_without_scans_are_told_apart_as_cases_are(tmp_path):
    for patient in ("anna", "bert"):
        write(tmp_path / "r" / patient / "brain_seg.nii", {(1, 1, 1): 4})
        write(tmp_path / "out" / f"{patient}_brain.nii", {(1, 1, 1): 4})
    write(tmp_path / "r" / "bert" / "brain_seg.nii.gz", {(1, 1, 1): 4})
    anna, bert = find_pairs(tmp_path / "out", tmp_path / "r")
    assert anna.reference == tmp_path / "r" / "anna" / "brain_seg.nii" and not anna.doubled
    assert [path.name for path in bert.doubled] == ["brain_seg.nii", "brain_seg.nii.gz"]


def test_labels_that_may_be_predictions_are_no_references(tmp_path):
    """No file is scored against itself, nor against what an earlier run left of a case."""
    root = tmp_path / "r"
    write_scan(root / "a" / "a_flair.nii.gz")
    write(root / "a" / "a_seg.nii.gz", {(1, 1, 1): 4})
    write_scan(root / "b" / "b_flair.nii.gz")
    for folder in ("new", "old"):
        for name in "ab":
            write(root / folder / f"{name}_seg.nii.gz", {(1, 1, 1): 4})
    write(root / "new" / "c_seg.nii.gz", {(1, 1, 1): 4})
    apart = f"{root}: labels of b lie in {root}/old, apart from the scans; if they are"
    with pytest.warns(UserWarning, match=re.escape(apart)):
        (pair,) = pairs = find_pairs(root / "new", root)
    assert pair.reference == root / "a" / "a_seg.nii.gz"
    with pytest.warns(UserWarning, match=re.escape(apart)):
        assert unpaired(pairs, root / "new", root) == {
            "without_prediction": [], "without_reference": ["b", "c"],
        }


def test_labels_in_a_folder_of_their_own_are_told(tmp_path):
    """As of LiTS, volumes in one folder and segmentations in another."""
    root = tmp_path / "lits"
    write_scan(root / "volumes" / "volume-0.nii.gz")
    write(root / "segmentations" / "segmentation-0.nii.gz", {(1, 1, 1): 1})
    ours = write(tmp_path / "out" / "volume-0.nii.gz", {(1, 1, 1): 1})
    told = f"{root}: labels of volume-0 lie in {root}/segmentations, apart from the scans; if"
    with pytest.raises(VolumeError, match=re.escape(told)):
        find_pairs(ours.parent, root)
    (pair,) = find_pairs(ours.parent, root / "segmentations")
    assert pair.reference.name == "segmentation-0.nii.gz"


def test_references_in_a_decathlon_folder(tmp_path):
    data = np.random.default_rng(0).integers(0, 900, (8, 9, 6, 4)).astype(np.int16)
    task = tmp_path / "Task01"
    (task / "imagesTr").mkdir(parents=True)
    nib.save(nib.Nifti1Image(data, SPACING), task / "imagesTr" / "BRATS_001.nii.gz")
    # oedema is 1 and core 2 there; the prediction says the same tissue in brats2021 numbers
    write(task / "labelsTr" / "BRATS_001.nii.gz", {(1, 1, 1): 1, (2, 2, 2): 2, (3, 3, 3): 3})
    ours = write(tmp_path / "out" / "BRATS_001.nii.gz", {(1, 1, 1): 2, (2, 2, 2): 1, (3, 3, 3): 4})
    (pair,) = find_pairs(tmp_path / "out", task)
    # named as the scan is, which predictions within the task are not taken for
    within = write(task / "p" / "BRATS_001.nii.gz", {(1, 1, 1): 2})
    (inner,) = find_pairs(within.parent, task)
    assert (inner.prediction, inner.reference) == (within, pair.reference)
    assert not any(unpaired([inner], within.parent, task).values())
    wanted = r"values 1, 2, 4 are not those of the msd convention, .* by --prediction-labels$"
    with pytest.raises(VolumeError, match=wanted):
        compare(pair)
    assert compare(pair, predicted="brats2021")["dice"] == {"WT": 1, "TC": 1, "ET": 1}
    write_report(ours, {"label_convention": "brats2021"})
    # what a report says goes first
    assert compare(pair, predicted="msd")["dice"] == {"WT": 1, "TC": 1, "ET": 1}
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
    wanted = f"^{ours}: the affine differs by up to 7 mm from that of volume {truth}; expected"
    with pytest.raises(VolumeError, match=wanted):
        compare(the_pair(ours, truth))
    ours = write(tmp_path / "a.nii.gz", {(1, 1, 1): 4}, shape=(8, 9, 5))
    with pytest.raises(VolumeError, match=r"a.nii.gz: shape \(8, 9, 5\) differs"):
        compare(the_pair(ours, truth))


def test_a_prediction_in_another_voxel_order_is_scored(tmp_path):
    """Five voxels of 2 mm, three of 1 mm and two of 3 mm apart, whichever the order."""
    truth = write(tmp_path / "r" / "a.nii.gz", {(1, 4, 3): 4})
    ours = write(tmp_path / "a.nii.gz", {(6, 7, 5): 4})
    for order in ("LAS", "RAS", "SPL"):
        image = nib.load(ours)
        turn = nib.orientations.ornt_transform(
            nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(tuple(order))
        )
        turned = nib.Nifti1Image(np.asarray(image.dataobj), image.affine).as_reoriented(turn)
        nib.save(turned, tmp_path / "turned.nii")
        assert "".join(nib.aff2axcodes(nib.load(tmp_path / "turned.nii").affine)) == order
        scores = compare(the_pair(tmp_path / "turned.nii", truth))
        # of eight corners each, the farthest are as far apart as the voxels
        assert scores["hd95_mm"]["ET"] == pytest.approx(math.hypot(10, 3, 6))
        assert scores["volume_ml"]["ET"] == 0.006 and scores["dice"]["ET"] == 0
        turned = nib.load(truth).as_reoriented(turn)
        nib.save(turned, tmp_path / "turned.nii")
        assert compare(the_pair(tmp_path / "turned.nii", truth))["dice"]["ET"] == 1


def test_what_belongs_to_nothing(tmp_path):
    ours = write(tmp_path / "out" / "a.nii.gz", {})
    (tmp_path / "empty").mkdir()
    with pytest.raises(VolumeError, match="no such file or folder"):
        find_pairs(ours, tmp_path / "absent")
    with pytest.raises(VolumeError, match="/empty: holds no labelled case and no label file; exp"):
        find_pairs(tmp_path / "out", tmp_path / "empty")
    write(tmp_path / "r" / "b" / "b_seg.nii.gz", {})
    with pytest.raises(VolumeError, match="/out: holds no <case>.nii.gz for any labelled case of"):
        find_pairs(tmp_path / "out", tmp_path / "r")
    with pytest.raises(VolumeError, match="is one file; expected a folder"):
        find_pairs(tmp_path / "out", ours)


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    """It may hold what is looked for."""
    ours = write(tmp_path / "p" / "a.nii.gz", {})
    truth = write(tmp_path / "r" / "cases" / "a" / "a_seg.nii.gz", {})
    locked, iterdir = [ours.parent], Path.iterdir

    def listing(folder):
        if folder in locked:
            raise PermissionError(13, "Permission denied", str(folder))
        return iterdir(folder)

    monkeypatch.setattr(Path, "iterdir", listing)
    with pytest.raises(VolumeError, match=r"/p: cannot be listed \(Permission denied\)$"):
        find_pairs(ours.parent, tmp_path / "r")
    locked[0] = truth.parent
    with pytest.raises(VolumeError, match=r"/cases/a: cannot be listed \(Permission denied\)$"):
        find_pairs(ours.parent, tmp_path / "r")


def test_the_table(tmp_path):
    table = {
        "a": {"dice": {"WT": 0.5, "ET": 1.0}, "hd95_mm": {"WT": 4.0, "ET": 0.0}},
        "b": {"dice": {"WT": 0.75, "ET": 0.0}, "hd95_mm": {"WT": 1.0, "ET": 373.13}},
    }
    assert mean_scores(table) == {
        "dice": {"WT": 0.625, "ET": 0.5}, "hd95_mm": {"WT": 2.5, "ET": 373.13 / 2},
    }
    assert counted_scores(table)["dice"] == {"WT": 2, "ET": 2}
    write_csv(table, tmp_path / "table.csv", missing=["c"])
    with open(tmp_path / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[1] == {
        "case": "b", "dice_WT": "0.75", "dice_ET": "0.0", "hd95_mm_WT": "1.0",
        "hd95_mm_ET": "373.13",
    }
    # a case without scores has its row
    assert len(rows) == 3 and rows[2].pop("case") == "c" and set(rows[2].values()) == {""}


def test_any_groups_of_any_values(tmp_path):
    ours = write(tmp_path / "p" / "a.nii.gz", {(1, 1, 1): 7, (2, 1, 1): 9, (3, 1, 1): 200})
    truth = write(tmp_path / "r" / "a.nii.gz", {(1, 1, 1): 9, (2, 1, 1): 9, (3, 1, 1): 200})
    groups = parse_groups("both=7,9; nine = 9;far=200;none=8")
    assert groups == {"both": (7, 9), "nine": (9,), "far": (200,), "none": (8,)}
    scores = compare(the_pair(ours, truth), groups=groups)
    assert scores["dice"] == {"both": 1, "nine": pytest.approx(2 / 3), "far": 1, "none": 1}
    for wrong in ("", "WT", "WT=", "WT=1,a", "WT=1,,2", "=1"):
        told = f"^groups hold '{wrong}', expected a form such as WT=1,2,4;TC=1,4"
        with pytest.raises(ValueError, match=told):
            parse_groups(f"ET=4;{wrong}")
    with pytest.raises(ValueError, match="groups name WT twice"):
        parse_groups("WT=1;WT=2")


def test_a_group_that_occurs_nowhere_is_an_error(tmp_path, recwarn):
    """Label 4 taken for label 3: nothing in both files would be a perfect score."""
    for name, value in (("a", 4), ("b", 2)):
        for side in ("p", "r"):
            write(tmp_path / side / f"{name}.nii.gz", {(1, 1, 1): 1, (2, 1, 1): value})
    pairs = find_pairs(tmp_path / "p", tmp_path / "r")
    wrong = parse_groups("WT=1,2,3;ET=3;far=7,8")
    with pytest.raises(VolumeError) as error:
        check_groups(wrong, pairs)
    assert str(error.value) == (
        "--groups ET=3;far=7,8: found in no prediction and no reference, which hold the label "
        "values 1, 2, 4; name those, or leave the group out"
    )
    # b alone has no 4 in either file, but the run does
    check_groups(parse_groups("WT=1,2,4;ET=4"), pairs)
    assert not recwarn.list
    assert compare(pairs[1], groups={"ET": (4,)})["dice"] == {"ET": 1}
    with pytest.raises(VolumeError, match="--groups ET=4: .* label values 1, 2;"):
        check_groups({"ET": (4,)}, pairs[1:])
    with pytest.warns(UserWarning, match="^label values in no group of --groups: 1, 2$"):
        check_groups({"ET": (4,)}, pairs)


def test_one_side_is_enough_for_a_group_to_occur(tmp_path):
    ours = write(tmp_path / "p" / "a.nii.gz", {(1, 1, 1): 1})
    truth = write(tmp_path / "r" / "a.nii.gz", {(1, 1, 1): 2})
    check_groups({"found": (1,), "missed": (2,)}, [the_pair(ours, truth)])
    # a file that cannot be read is another error
    ours.write_bytes(b"")
    check_groups({"missed": (2,)}, [the_pair(ours, truth)])
    truth.write_bytes(b"")
    check_groups({"missed": (2,)}, [the_pair(ours, truth)])


def test_a_report_of_other_labels_makes_them_regions(tmp_path):
    ours = write(tmp_path / "p" / "a.nii.gz", {(1, 1, 1): 5})
    truth = write(tmp_path / "r" / "a.nii.gz", {(1, 1, 1): 5, (2, 2, 2): 1})
    report = {"label_convention": "values", "label_values": {"label 1": 1, "label 5": 5}}
    write_report(ours, report)
    assert compare(the_pair(ours, truth))["dice"] == {"label 1": 0, "label 5": 1}


def test_labels_that_training_has_merged_are_told_of(tmp_path):
    """Of a label map {1: 1, 2: 1} the report knows 1 alone, and the reference holds both."""
    ours = write(tmp_path / "p" / "a.nii.gz", {(1, 1, 1): 1, (2, 2, 2): 1})
    truth = write(tmp_path / "r" / "a.nii.gz", {(1, 1, 1): 1, (2, 2, 2): 2})
    report = {"label_convention": "values", "label_values": {"label 1": 1}}
    write_report(ours, report)
    with pytest.warns(UserWarning, match="^label values 2 of references are none .* background;"):
        compare(the_pair(ours, truth))
    merged = compare(the_pair(ours, truth), groups={"label 1": (1, 2)})
    assert merged["dice"] == {"label 1": 1}


def test_a_report_beside_the_reference_tells_of_both(tmp_path):
    """As beside the predictions of another model that are taken for the reference."""
    ours = write(tmp_path / "p" / "a.nii.gz", {(1, 1, 1): 5})
    truth = write(tmp_path / "r" / "a.nii.gz", {(1, 1, 1): 5, (2, 2, 2): 1})
    pair = the_pair(ours, truth)
    write_report(
        truth, {"label_convention": "values", "label_values": {"label 1": 1, "label 5": 5}}
    )
    assert compare(pair)["dice"] == {"label 1": 0, "label 5": 1}
    # what the prediction's own report says goes first, unless it cannot be compared
    report = {"label_convention": "values", "label_values": {"five": 5}}
    write_report(ours, report)
    with pytest.warns(UserWarning, match="^label values 1 of references are none"):
        assert compare(pair)["dice"] == {"five": 1}
    write_report(ours, {"label_convention": "msd"})
    with pytest.raises(VolumeError, match=f"^{ours}: holds the labels of msd .*, {truth} others;"):
        compare(pair)
    ours.with_name("a.json").unlink()
    for report in ({}, {"label_values": {"one": [1]}}, {"label_values": {}}):
        write_report(truth, {"label_convention": "values", **report})
        with pytest.raises(VolumeError, match=f"^{truth}: .* names no label_values; see --groups"):
            compare(pair)


@pytest.mark.parametrize("content", [
    '{"label_convention": "msd"}', '{"label_convention": ["x"]}', '{"label_convention": "hello"}',
    '{"case": "a", "versions": "1", "label_convention": "msd"}', '["case"]', '"case"', "{",
    '{"case": "a", "versions": {"python": "3"}, "label_convention": "msd"}', "[" * 100_000,
])
@pytest.mark.parametrize("side", ["p", "r"])
def test_a_json_that_is_no_report_tells_nothing(tmp_path, side, content):
    """As a scanner's or another program's: core is 1 and oedema 2 as without it, not as in MSD."""
    files = {
        folder: write(tmp_path / folder / "a.nii", {(1, 1, 1): 1, (2, 2, 2): 2, (3, 3, 3): 4})
        for folder in "pr"
    }
    files[side].with_name("a.json").write_text(content)
    scores = compare(the_pair(files["p"], files["r"]))
    assert scores["dice"] == {"WT": 1, "TC": 1, "ET": 1}


@pytest.mark.parametrize("convention", ["hello", ["x"], {"x": 1}, 3])
def test_a_report_of_an_unknown_convention_is_named(tmp_path, convention):
    ours, truth = (write(tmp_path / side / "a.nii.gz", {(1, 1, 1): 4}) for side in "pr")
    for labels in (ours, truth):
        report = write_report(labels, {"label_convention": convention})
        with pytest.raises(VolumeError) as error:
            compare(the_pair(ours, truth))
        assert str(error.value) == (
            f"{report}: label_convention is {convention!r}, expected one of brats2021, brats2023, "
            "msd, values; without the file, --labels or --prediction-labels tell it"
        )
        # who names the regions asks no report
        assert compare(the_pair(ours, truth), groups={"ET": (4,)})["dice"] == {"ET": 1}
        report.unlink()


def test_the_rule_nan_drops_no_missed_structure(tmp_path):
    ours = write(tmp_path / "p" / "a.nii.gz", {(1, 1, 1): 1})
    truth = write(tmp_path / "r" / "a.nii.gz", {(1, 1, 1): 1, (2, 2, 2): 2})
    groups = {"one": (1,), "missed": (2,), "absent": (3,)}
    scores = compare(the_pair(ours, truth), groups=groups, empty="nan")
    assert scores["dice"]["missed"] == 0 and scores["hd95_mm"]["missed"] == math.inf
    assert math.isnan(scores["dice"]["absent"]) and math.isnan(scores["hd95_mm"]["absent"])
    found = compare(the_pair(truth, truth), groups=groups, empty="nan")
    mean = mean_scores({"a": scores, "b": found})
    assert mean["hd95_mm"]["missed"] == math.inf and mean["dice"]["missed"] == 0.5
    assert math.isnan(mean["dice"]["absent"])
    ready = json.loads(json.dumps(json_ready(mean), allow_nan=False))
    assert ready["dice"]["absent"] is None and ready["hd95_mm"]["missed"] == "inf"
    assert ready["dice"]["missed"] == 0.5


def test_what_is_on_one_side_only_is_named(tmp_path):
    for folder, names in (("p", "ab"), ("r", "bcd")):
        for name in names:
            write(tmp_path / folder / f"{name}.nii.gz", {(1, 1, 1): 1})
    pairs = find_pairs(tmp_path / "p", tmp_path / "r")
    assert unpaired(pairs, tmp_path / "p", tmp_path / "r") == {
        "without_prediction": ["c", "d"], "without_reference": ["a"],
    }
    # who names one file asks for no other
    one = tmp_path / "p" / "b.nii.gz"
    assert not any(unpaired(find_pairs(one, tmp_path / "r"), one, tmp_path / "r").values())


def test_lits_naming(tmp_path):
    """volume-0 and its segmentation-0 are one case, with and without the scans beside."""
    lits, loose, out = (tmp_path / name for name in ("lits", "loose", "out"))
    for number in (0, 1):
        write_scan(lits / f"volume-{number}.nii")
        write(lits / f"segmentation-{number}.nii", {(1, 1, 1): 1, (2, 2, 2): 2})
        write(loose / f"segmentation-{number}.nii", {(1, 1, 1): 1})
        write(out / f"volume-{number}.nii.gz", {(1, 1, 1): 1, (3, 3, 3): 2})
    write(lits / "segmentation-7.nii", {})  # its scan is not there
    for references, missing in ((lits, ["volume-7"]), (loose, [])):
        pairs = find_pairs(out, references)
        assert [pair.name for pair in pairs] == ["volume-0", "volume-1"]
        assert pairs[1].reference == references / "segmentation-1.nii"
        assert unpaired(pairs, out, references) == {
            "without_prediction": missing, "without_reference": [],
        }
    groups = {"liver": (1, 2), "tumour": (2,)}
    scores = [compare(find_pairs(out, folder)[0], groups=groups) for folder in (lits, loose)]
    assert [s["dice"] for s in scores] == [
        {"liver": 0.5, "tumour": 0}, {"liver": pytest.approx(2 / 3), "tumour": 0},
    ]
    # named alike on both sides
    assert [pair.name for pair in find_pairs(loose, lits)] == ["volume-0", "volume-1"]


def test_other_labels_than_a_brain_tumours_need_groups(tmp_path):
    lits, out = tmp_path / "lits", tmp_path / "out"
    write_scan(lits / "volume-0.nii")
    # the values alone could be a brain tumour's
    truth = write(lits / "segmentation-0.nii", {(1, 1, 1): 1, (2, 2, 2): 2})
    ours = write(out / "volume-0.nii.gz", {})
    wanted = r"label values \(1, 2\) are no brain tumour's; name regions with --groups, such as"
    with pytest.raises(VolumeError, match=wanted):
        compare(the_pair(ours, truth))
    write(lits / "segmentation-0.nii", {})
    with pytest.raises(VolumeError, match=r"label values \(none\) are no brain tumour's"):
        compare(the_pair(ours, truth))
    organs = write(tmp_path / "organs.nii.gz", {(i, 1, k): 3 + i + 8 * k
                                                for i in range(8) for k in range(2)})
    many = r"values \(3, 4, 5, 6, 7, 8, 9, 10, 11, 12 and 6 more\) are no brain tumour's"
    with pytest.raises(VolumeError, match=many):
        compare(the_pair(ours, organs))
    undecided = write(tmp_path / "brain.nii.gz", {(1, 1, 1): 3})
    with pytest.raises(VolumeError, match="choose one of brats2023, msd: .* see --labels and"):
        compare(the_pair(ours, undecided))


@pytest.mark.parametrize("channels", [None, ["T1"], ["FLAIR", "T1w"]])
def test_an_organ_in_decathlon_layout_is_no_brain_tumour(tmp_path, channels):
    """Its values, 1 and 2, could be; without channels or with one or two MR ones, nothing tells."""
    task = tmp_path / "Task04"
    data = np.random.default_rng(0).integers(0, 900, (8, 9, 6)).astype(np.int16)
    (task / "imagesTr").mkdir(parents=True)
    nib.save(nib.Nifti1Image(data, SPACING), task / "imagesTr" / "hippocampus_001.nii.gz")
    halves = {(1, 1, 1): 1, (2, 2, 2): 2}
    write(task / "labelsTr" / "hippocampus_001.nii.gz", halves)
    if channels:
        names = dict(enumerate(channels))
        (task / "dataset.json").write_text(json.dumps({"channel_names": names}))
    (pair,) = find_pairs(write(tmp_path / "out" / "hippocampus_001.nii.gz", halves), task)
    wanted = r"values \(1, 2\) are no brain tumour's; .* --groups, such as .*, or .* by --labels"
    with pytest.raises(VolumeError, match=wanted):
        compare(pair)
    assert compare(pair, groups={"front": (1,)})["dice"] == {"front": 1}
    # who knows that they are one says so
    assert compare(pair, "msd")["dice"].keys() == {"WT", "TC", "ET"}


def test_scans_beside_loose_labels_are_no_references(tmp_path):
    write_scan(tmp_path / "ct" / "x_scan.nii.gz")
    write(tmp_path / "ct" / "x_seg.nii.gz", {(1, 1, 1): 5})
    write(tmp_path / "out" / "x.nii.gz", {(1, 1, 1): 5})
    pairs = find_pairs(tmp_path / "out", tmp_path / "ct")
    assert [pair.reference.name for pair in pairs] == ["x_seg.nii.gz"]
    assert unpaired(pairs, tmp_path / "out", tmp_path / "ct")["without_prediction"] == []


def test_one_file_named_as_labels_hides_no_other(tmp_path):
    """On either side; of the loose files only what is a scan by its name is left out."""
    for side in ("out", "r"):
        for name in ("a_seg", "b", "ab", "p_0012"):
            write(tmp_path / side / f"{name}.nii.gz", {(1, 1, 1): 4})
        for scan in ("a", "a_ct", "a-scan_2", "c_T1", "d_0000", "d_0001"):
            write_scan(tmp_path / side / f"{scan}.nii.gz")
    pairs = find_pairs(tmp_path / "out", tmp_path / "r")
    assert sorted(pair.name for pair in pairs) == ["a", "ab", "b", "p_0012"]
    assert not any(unpaired(pairs, tmp_path / "out", tmp_path / "r").values())
    # where none is named as labels all are, whatever they are called
    (tmp_path / "out" / "a_seg.nii.gz").unlink()
    assert unpaired([], tmp_path / "out", tmp_path / "r")["without_reference"] == [
        "a", "a-scan_2", "a_ct", "ab", "b", "c_T1", "d_0000", "d_0001", "p_0012",
    ]


def test_what_lies_beside_label_files_is_none(tmp_path):
    truth = write(tmp_path / "r" / "a.nii.gz", {(1, 1, 1): 1})
    truth.with_name("a.nii.gz.md5").touch()
    truth.with_name("b.nii.gz").mkdir()
    ours = write(tmp_path / "out" / "a.nii.gz", {(1, 1, 1): 1})
    ours.rename(ours.with_name("a.NII.GZ"))
    pairs = find_pairs(ours.parent, truth.parent)
    assert [(pair.prediction.name, pair.reference) for pair in pairs] == [("a.NII.GZ", truth)]
    assert not any(unpaired(pairs, ours.parent, truth.parent).values())


@pytest.mark.parametrize("side", ["out", "r"])
@pytest.mark.parametrize(("names", "scans"), [
    (("a.nii", "a.nii.gz"), False), (("a-seg.nii", "a_seg.nii"), False),
    (("a_seg.nii", "a_seg.nii.gz"), True),
])
def test_two_label_maps_of_one_case(tmp_path, side, names, scans):
    """The case has no score, on whichever side they are, and the others have theirs."""
    for folder in ("out", "r"):
        for name in (names[1], names[1].replace("a", "b", 1)):
            write(tmp_path / folder / name, {(1, 1, 1): 4})
    write(tmp_path / side / names[0], {(1, 1, 1): 4})
    if scans:
        for case in "ab":
            write_scan(tmp_path / side / f"{case}_flair.nii")
    twice, once = find_pairs(tmp_path / "out", tmp_path / "r")
    first, second = names
    wanted = rf"/{side}/{second}: is of case a, as {first} is; expected one file per case$"
    with pytest.raises(VolumeError, match=wanted):
        compare(twice)
    assert once.name == "b" and compare(once)["dice"]["WT"] == 1


def test_a_real_pair_agrees_with_deepmind_and_is_quick(real_data):
    """A whole-size pair with all measures, three regions."""
    deepmind = pytest.importorskip("surface_distance")
    cases = ("BraTS2021_00000", "BraTS2021_00002")
    ours, truth = (
        next((real_data / "brats2021" / case).glob("*_seg.nii.gz")) for case in cases
    )
    groups = {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}
    seconds = []
    for _ in range(3):
        began = time.process_time()
        scores = compare(the_pair(ours, truth), groups=groups)
        seconds.append(time.process_time() - began)
    print(f"CPU seconds for one pair: {min(seconds):.2f}")
    # CPU time, so that a busy machine cannot fail it: one core would do
    assert min(seconds) < 2
    a, b = (np.asarray(nib.load(path).dataobj) for path in (ours, truth))
    for region, values in groups.items():
        theirs = deepmind.compute_surface_distances(
            np.isin(a, values), np.isin(b, values), (1.0, 1.0, 1.0)
        )
        assert scores["hd95_mm"][region] == pytest.approx(
            deepmind.compute_robust_hausdorff(theirs, 95)
        )
        assert scores["surface_dice"][region] == pytest.approx(
            deepmind.compute_surface_dice_at_tolerance(theirs, 1.0)
        )
        assert scores["volume_ml"][region] == round(np.isin(a, values).sum() / 1000, 3)
