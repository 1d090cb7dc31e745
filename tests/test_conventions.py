"""Which files make a case, and what the numbers in label files mean."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from meddanet.data import (
    Case,
    VolumeError,
    canonical_modality,
    case_from_files,
    detect_label_convention,
    find_cases,
    from_classes,
    load_volume,
    to_classes,
)
from meddanet.data.sources import unnamed_channels
from meddanet.data.survey import survey

MRI = ("flair", "t1ce", "t1", "t2")


def touch(folder: Path, *names: str) -> list[Path]:
    paths = [folder / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return paths


def brats2021(folder: Path, name: str, suffix: str = ".nii.gz") -> None:
    touch(folder / name, *(f"{name}_{kind}{suffix}" for kind in (*MRI, "seg")))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("FLAIR t2f T2-FLAIR", "flair"),
        ("t1ce T1c T1gd", "t1ce"),
        ("T1 t1n T1w", "t1"),
        ("T2 t2w", "t2"),
        ("CT ct", "ct"),
    ],
)
def test_modality_names_of_every_convention_meet(names: str, expected: str) -> None:
    assert {canonical_modality(name) for name in names.split()} == {expected}


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_brats_2017_to_2021(tmp_path: Path, suffix: str) -> None:
    brats2021(tmp_path, "BraTS20_Training_0355", suffix)
    folder = tmp_path / "BraTS20_Training_0355"
    # macOS companions, Kaggle's odd label of case 355 and an earlier result are no images
    touch(folder, "._BraTS20_Training_0355_t1.nii", "W39_1998.09.19_Segm.nii", "result_003.nii.gz")
    (case,) = find_cases(folder)
    assert (case.name, case.convention) == ("BraTS20_Training_0355", "brats2021")
    assert case.modalities == MRI
    assert case.files == {kind: folder / f"{case.name}_{kind}{suffix}" for kind in MRI}
    assert case.label == folder / f"{case.name}_seg{suffix}"
    assert case.folder == folder


def test_brats_2023(tmp_path: Path) -> None:
    name = "BraTS-GLI-00000-000"
    touch(tmp_path / name, *(f"{name}-{kind}.nii.gz" for kind in ("t1n", "t1c", "t2w", "t2f")))
    (case,) = find_cases(tmp_path)
    assert (case.name, case.convention, case.label) == (name, "brats2023", None)
    assert {key: path.name[-10:-7] for key, path in case.files.items()} == {
        "t1": "t1n", "t1ce": "t1c", "t2": "t2w", "flair": "t2f",
    }


def test_a_name_with_a_line_break_is_a_name(tmp_path: Path) -> None:
    for kind in ("flair", "t1ce", "t1", "t2"):
        (tmp_path / f"a\nb_{kind}.nii.gz").touch()
    (tmp_path / "c\nd_0000.nii.gz").touch()
    assert [case.name for case in find_cases(tmp_path)] == ["a\nb", "c\nd"]


def test_graded_folders_are_walked_and_sorted(tmp_path: Path) -> None:
    brats2021(tmp_path / "LGG", "BraTS19_TCIA_1")
    brats2021(tmp_path / "HGG", "BraTS19_CBICA_2")
    touch(tmp_path, "survival_data.csv", "name_mapping.csv")
    assert [case.name for case in find_cases(tmp_path)] == ["BraTS19_CBICA_2", "BraTS19_TCIA_1"]


def test_an_incomplete_case_is_still_found(tmp_path: Path) -> None:
    touch(tmp_path, "a/a_flair.nii.gz", "a/a_t1.nii.gz")
    (case,) = find_cases(tmp_path)
    assert sorted(case.files) == ["flair", "t1"] and case.modalities == MRI


def test_decathlon(tmp_path: Path) -> None:
    touch(tmp_path, "imagesTr/BRATS_001.nii.gz", "imagesTr/._BRATS_001.nii.gz")
    touch(tmp_path, "labelsTr/BRATS_001.nii.gz", "imagesTs/BRATS_485.nii.gz")
    first, second = find_cases(tmp_path)
    # without dataset.json, the published order of Task01
    assert first == Case(
        "BRATS_001", tmp_path / "imagesTr/BRATS_001.nii.gz", "msd", ("flair", "t1", "t1ce", "t2"),
        tmp_path / "labelsTr/BRATS_001.nii.gz",
    )
    assert second.label is None
    (tmp_path / "dataset.json").write_text(
        json.dumps({"modality": {"1": "T1gd", "0": "T2w", "10": "FLAIR", "2": "T1w"}})
    )
    assert find_cases(tmp_path)[0].modalities == ("t2", "t1ce", "t1", "flair")


def test_decathlon_tasks_with_other_names_need_an_images_folder(tmp_path: Path) -> None:
    touch(tmp_path, "images/hippocampus_001.nii.gz", "labels/hippocampus_001.nii.gz")
    (case,) = find_cases(tmp_path)
    assert case.modalities == () and case.label == tmp_path / "labels/hippocampus_001.nii.gz"
    touch(tmp_path, "elsewhere/hippocampus_001.nii.gz")
    with pytest.raises(VolumeError, match="hippocampus_001"):
        find_cases(tmp_path / "elsewhere")


def test_nnunet(tmp_path: Path) -> None:
    files = touch(tmp_path / "imagesTs", *(f"BraTS_007_000{index}.nii.gz" for index in range(4)))
    (label,) = touch(tmp_path, "labelsTs/BraTS_007.nii.gz")
    (case,) = find_cases(tmp_path / "imagesTs")
    assert case.files == {f"000{index}": path for index, path in enumerate(files)}
    assert (case.name, case.modalities, case.label) == ("BraTS_007", (), label)
    channels = {"0": "T1", "1": "T1ce", "2": "T2", "3": "FLAIR"}
    (tmp_path / "dataset.json").write_text(json.dumps({"channel_names": channels}))
    (case,) = find_cases(tmp_path / "imagesTs")
    assert case.modalities == ("t1", "t1ce", "t2", "flair")
    assert case.files == dict(zip(case.modalities, files, strict=True))


def test_four_digits_that_do_not_count_from_zero_are_no_channels(tmp_path: Path) -> None:
    touch(tmp_path, "imagesTr/scan_0012.nii.gz", "imagesTr/scan_0013.nii.gz")
    assert [case.name for case in find_cases(tmp_path)] == ["scan_0012", "scan_0013"]
    touch(tmp_path, "out/scan_0012.nii.gz")
    with pytest.raises(VolumeError, match="no case found among scan_0012"):
        find_cases(tmp_path / "out")


@pytest.mark.parametrize("content", ["{", "[]", '{"name": "x"}', '{"modality": ["FLAIR"]}'])
def test_a_dataset_json_without_channels_is_named(tmp_path: Path, content: str) -> None:
    touch(tmp_path, "imagesTr/BRATS_001.nii.gz")
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(VolumeError, match=r"dataset\.json: holds no channel order"):
        find_cases(tmp_path)


def test_names_that_tell_the_channels_need_no_dataset_json(tmp_path: Path) -> None:
    brats2021(tmp_path, "p1")
    (tmp_path / "dataset.json").write_text('{"name": "a copy"}')
    (case,) = find_cases(tmp_path)
    assert case.modalities == MRI


ORDERED = ("flair", "t1", "t1ce", "t2")


@pytest.mark.parametrize(("convention", "told", "given", "expected"), [
    ("msd", (), ORDERED, ORDERED),
    ("msd", ORDERED, None, None),
    ("msd", ORDERED, ("FLAIR", "T1w", "T1gd", "T2w"), None),
    ("msd", ORDERED, MRI, "flair, t1, t1ce, t2 by its dataset.json or name, by --modalities flair"),
    ("nnunet", ORDERED, MRI, "leave that out"),
    ("brats2021", MRI, ORDERED, None),  # names of files have no order
    ("brats2021", MRI, ("flair", "t1"), "flair, t1ce, t1, t2 by its name, by --modalities flair"),
    ("lits", ("ct",), MRI, "ct by its name"),
])
def test_channels_of_which_names_and_user_tell(convention, told, given, expected) -> None:
    case = Case("p", Path("p.nii"), convention, told)
    if isinstance(expected, str):
        with pytest.raises(VolumeError, match=f"^p: .*{expected}"):
            unnamed_channels(case, given)
    else:
        assert unnamed_channels(case, given) == expected


def test_lits(tmp_path: Path) -> None:
    touch(tmp_path, "volume-2.nii", "segmentation-2.nii", "volume-10.nii", "test-volume-2.nii")
    cases = {case.name: case for case in find_cases(tmp_path)}
    assert sorted(cases) == ["test-volume-2", "volume-10", "volume-2"]
    assert cases["volume-2"].files == {"ct": tmp_path / "volume-2.nii"}
    assert cases["volume-2"].label == tmp_path / "segmentation-2.nii"
    assert cases["test-volume-2"].label is None


def test_named_files_keep_the_convention_that_their_names_share(tmp_path: Path) -> None:
    flair, t1 = touch(tmp_path, "p1_flair.nii.gz", "p1_t1.nii.gz")
    case = case_from_files({"T1w": t1, "FLAIR": str(flair)})
    assert (case.name, case.convention, case.modalities) == ("p1", "brats2021", ("t1", "flair"))
    case = case_from_files({"t1": t1, "flair": tmp_path / "other.nii.gz"}, name="patient")
    assert (case.name, case.convention) == ("patient", "files")
    for files in ({}, {"t1": t1, "T1w": t1}):
        with pytest.raises(VolumeError, match="each modality once"):
            case_from_files(files)


def test_cases_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for patient in ("anna", "bert"):
        touch(tmp_path, *(f"{patient}/brain_{kind}.nii.gz" for kind in MRI))
    assert [case.name for case in find_cases(tmp_path)] == ["anna_brain", "bert_brain"]
    # by as many as it takes
    touch(tmp_path, *(f"again/anna/brain_{kind}.nii.gz" for kind in MRI))
    assert [(case.name, case.folder) for case in find_cases(tmp_path)] == [
        ("again_anna_brain", tmp_path / "again/anna"),
        ("bert_brain", tmp_path / "bert"),
        (f"{tmp_path.name}_anna_brain", tmp_path / "anna"),
    ]
    for names in ({"dup/a/X/X_t1.nii", "dup/b/X/X_t1.nii"}, {"a_X/X_t1.nii", "a/X_t1.nii"}):
        folder = tmp_path / str(len(names)) / min(names)[:3]
        touch(folder, *names)
        assert len({case.name for case in find_cases(folder)}) == 2


@pytest.mark.parametrize("names", [
    ("two_t1.nii", "two_t1.nii.gz"), ("two_t1.nii", "two-t1n.nii"), ("two_seg.nii", "two_SEG.nii"),
    ("volume-2.nii", "volume-2.nii.gz"), ("BRATS_001.nii", "BRATS_001.nii.gz"),
    ("p_0000.nii", "p_0000.nii.gz"), ("imagesTr/s_0012.nii", "imagesTr/s_0012.nii.gz"),
])
def test_files_of_which_a_case_has_two_are_named(tmp_path: Path, names: tuple[str, str]) -> None:
    """And the other cases go on."""
    touch(tmp_path, *names, "two_t2.nii", *(f"good_{kind}.nii" for kind in MRI))
    cases = find_cases(tmp_path)
    (good,) = (case for case in cases if case.name == "good")
    assert not good.doubled
    (doubled,) = (case for case in cases if case.doubled)
    assert {path.relative_to(tmp_path).as_posix() for path in doubled.doubled} == set(names)
    with pytest.raises(VolumeError) as caught:
        load_volume(doubled, MRI)
    assert all(Path(name).name in str(caught.value) for name in names)


def test_what_belongs_to_no_case_is_told(tmp_path: Path) -> None:
    brats2021(tmp_path, "p")
    touch(tmp_path, "imagesTr/BRATS_1.nii", "labelsTr/BRATS_1.nii", "labelsTr/other.nii")
    touch(tmp_path, "p/._x.nii", "p/W39_1998.09.19_Segm.nii", "segmentation-3.nii", "notes.txt")
    touch(tmp_path, "1/2/3/4/5/q_t1.nii")
    assert survey(tmp_path).left_out(tmp_path) == ""
    touch(tmp_path, "a.nii", "b.nii", "c.nii", "scan.nii.gz", "p/q_0007.nii", "1/2/3/4/5/6/r.nii")
    assert survey(tmp_path).left_out(tmp_path) == (
        f"{tmp_path}: 6 left out, NIfTI files that belong to no case (a.nii, b.nii, c.nii, "
        "scan.nii.gz and 1 more) and folders too deep to look into (1/2/3/4/5/6); name them as "
        "inputs of their own, or rename them"
    )


def test_what_is_not_read_and_what_is_not_there_are_told(tmp_path: Path) -> None:
    """Files of other forms, and links of data that were not fetched or of a disk that is away."""
    brats2021(tmp_path, "p")
    touch(tmp_path, "a_flair.nii.bz2", "b.hdr", "b.img", "c.nii.zst", "notes.txt")
    (tmp_path / "d.nii.xz").symlink_to("/disk/d.nii.xz")
    (tmp_path / "p" / "p.json").symlink_to("/disk/p.json")
    assert survey(tmp_path).left_out(tmp_path) == (
        f"{tmp_path}: 4 left out, files to convert to .nii.gz first (a_flair.nii.bz2, b.hdr, "
        "c.nii.zst, d.nii.xz)"
    )
    away = tmp_path / "W39_1998.09.19"
    away.symlink_to("/disk/q")
    found = survey(tmp_path)
    assert [case.name for case in found.cases] == ["p"]
    assert found.left_out(tmp_path).endswith(
        f"and folders with a fault ({away.name}); {away}: is a link to /disk/q, which is not there"
    )
    with pytest.raises(VolumeError, match=f"^{away}: is a link to /disk/q, which is not there$"):
        find_cases(away)


def test_images_that_were_not_fetched_are_a_case_that_cannot_be_read(tmp_path: Path) -> None:
    brats2021(tmp_path, "p")
    image = tmp_path / "p" / "p_t2.nii.gz"
    image.unlink()
    image.symlink_to("../.git/annex/objects/p_t2.nii.gz")
    (case,) = find_cases(tmp_path)
    assert set(case.files) == set(MRI)
    with pytest.raises(VolumeError, match=f"^{image}: cannot be read .No such file"):
        load_volume({"t2": case.files["t2"]})


def test_a_folder_with_a_fault_stops_no_other(tmp_path: Path, monkeypatch) -> None:
    brats2021(tmp_path, "p")
    long = "b" * 235
    touch(tmp_path / long, *(f"{long}_{kind}.nii" for kind in MRI))
    touch(tmp_path, "study/imagesTr/BRATS_1.nii", "lost+found/x")
    (tmp_path / "study" / "dataset.json").write_text("{")
    listing = Path.iterdir

    def refuse(folder: Path):
        if folder.name == "lost+found":
            raise PermissionError(13, "Permission denied", str(folder))
        return listing(folder)

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.warns(UserWarning, match="lost.found: cannot be listed .* its cases are left out"):
        assert len(find_cases(tmp_path)) == 2
    found = survey(tmp_path)
    assert [case.name for case in found.cases] == [long, "p"]
    lost, images = tmp_path / "lost+found", tmp_path / "study" / "imagesTr"
    assert found.left_out(tmp_path) == (
        f"{tmp_path}: 2 left out, folders with a fault (lost+found, study/imagesTr); {lost}: "
        "cannot be listed (Permission denied)"
    )
    assert "holds no channel order" in str(found.faulty[images])
    with pytest.raises(VolumeError, match=f"^{images.parent}/dataset.json: holds no channel order"):
        find_cases(images)
    with pytest.raises(VolumeError, match="cannot be listed"):
        find_cases(lost)


def test_a_folder_that_may_not_be_entered_stops_no_other(tmp_path: Path, monkeypatch) -> None:
    """It can be listed, but nothing can be asked of what lies in it."""
    brats2021(tmp_path, "p")
    touch(tmp_path, "locked/x")
    asking = Path.is_dir

    def refuse(path: Path) -> bool:
        if path.parent.name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return asking(path)

    monkeypatch.setattr(Path, "is_dir", refuse)
    found = survey(tmp_path)
    assert [case.name for case in found.cases] == ["p"] and "locked" in found.left_out(tmp_path)


def test_a_folder_is_walked_once_whatever_leads_there(tmp_path: Path) -> None:
    """A case counted twice would be segmented twice, or trained on and held out."""
    brats2021(tmp_path / "cohort", "p")
    (tmp_path / "cohort" / "p" / "self").symlink_to(".")
    (tmp_path / "cohort" / "up").symlink_to("..")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "elsewhere").symlink_to(tmp_path / "cohort" / "p")
    found = survey(tmp_path)
    assert [case.name for case in found.cases] == ["p"]
    assert found.left_out(tmp_path) == ""


def test_results_are_no_inputs(tmp_path: Path) -> None:
    """Wherever they are; not even those of a run that was ended between labels and report."""
    touch(tmp_path, "imagesTr/BRATS_1.nii.gz", "volume-2.nii")
    before = survey(tmp_path)
    touch(tmp_path, "out/BRATS_1.nii.gz", "volume-2.nii.gz", "out/BRATS_2.nii.gz")
    (tmp_path / "out" / ".BRATS_2.nii.gz.unfinished").write_text(hashlib.sha256(b"").hexdigest())
    assert len(survey(tmp_path).cases) == 3
    for report in ("out/BRATS_1.json", "volume-2.json"):
        name = Path(report).stem
        (tmp_path / report).write_text(json.dumps({"case": name, "versions": {"meddanet": "1"}}))
    assert survey(tmp_path) == before


def test_what_holds_no_case_says_what_was_found(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    touch(tmp_path, "unknown/scan.nii.gz", "unknown/readme.txt", "labels/p_seg.nii.gz")
    for path, text in (
        (tmp_path / "empty", "the folder is empty"),
        (tmp_path / "unknown", "no case found among readme.txt, scan.nii.gz"),
        (tmp_path / "labels", "no case found among p_seg.nii.gz"),
        (tmp_path / "absent", "no such file or folder"),
    ):
        with pytest.raises(VolumeError) as caught:
            find_cases(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: {text}") and "\n" not in message
        assert path.name == "absent" or "_t1ce" in message


# classes 0 background, 1 necrosis, 2 oedema, 3 enhancing tumour; values from each challenge's page
FILE_VALUES = {"brats2021": [0, 1, 2, 4], "brats2023": [0, 1, 2, 3], "msd": [0, 2, 1, 3]}


@pytest.mark.parametrize("convention", FILE_VALUES)
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_values_and_classes(convention: str, dtype: type) -> None:
    values = np.array(FILE_VALUES[convention], dtype).reshape(2, 2)
    classes = to_classes(values, convention)
    np.testing.assert_array_equal(classes, [[0, 1], [2, 3]])
    np.testing.assert_array_equal(from_classes(classes, convention), values)
    assert classes.dtype == from_classes(classes, convention).dtype == np.uint8


@pytest.mark.parametrize(
    "table",
    [
        {1: 2, 2: 1, 3: 3}, {3: 255}, {1: 7, 4: 1},
        {k: 256 - k for k in range(1, 10)}, {k: k for k in range(1, 200)},
    ],
    ids=str,
)
def test_values_of_ones_own(table: dict[int, int]) -> None:
    rng = np.random.default_rng(0)
    classes = np.asfortranarray(rng.choice(np.array([0, *table], np.uint8), (6, 5, 40)))
    given = classes.copy()
    values = from_classes(classes, table)
    expected = [{0: 0, **table}[value] for value in given.ravel().tolist()]
    assert values.ravel().tolist() == expected and values.flags.f_contiguous
    np.testing.assert_array_equal(classes, given)


@pytest.mark.parametrize(
    ("values", "convention", "text"),
    [
        ([0, 3], "brats2021", "brats2023"),
        ([0, 4], "brats2023", "resection cavity"),
        ([0, 4], "msd", "resection cavity"),
        ([0, 7], "brats2021", r"values \[7\]"),
        ([0, 1.5], "brats2021", "whole numbers"),
        ([0, -1], "brats2021", "whole numbers"),
        ([0, 257], "brats2021", "whole numbers"),
        ([0, np.nan], "brats2021", "whole numbers"),
    ],
)
def test_values_of_another_convention_are_refused(
    values: list[float], convention: str, text: str
) -> None:
    with pytest.raises(VolumeError, match=text):
        to_classes(np.array(values), convention)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="'brats2022', expected one of brats2021, brats2023, msd"):
        to_classes(np.zeros(2, np.uint8), "brats2022")
    with pytest.raises(ValueError, match=r"classes \[4\] have no value; expected 0 or one of"):
        from_classes(np.array([0, 4], np.uint8), "brats2021")
    with pytest.raises(ValueError, match=r"classes \[2\] have no value"):
        from_classes(np.arange(4), {1: 5, 3: 7})
    assert from_classes(np.array([0, 1, 3]), {1: 5, 3: 7}).tolist() == [0, 5, 7]


def case_of(convention: str, modalities: tuple[str, ...] = MRI) -> Case:
    return Case("p1", {}, convention, modalities)


@pytest.mark.parametrize("convention", FILE_VALUES)
def test_the_naming_decides_the_label_convention(convention: str) -> None:
    assert detect_label_convention(case_of(convention)) == convention
    assert detect_label_convention(case_of(convention), FILE_VALUES[convention]) == convention


@pytest.mark.parametrize("naming", ["nnunet", "files"])
def test_values_decide_only_where_one_convention_fits(naming: str) -> None:
    assert detect_label_convention(case_of(naming), [0, 1, 4]) == "brats2021"
    for values in ([], [0, 1, 2], [0, 3], [5]):
        with pytest.raises(VolumeError, match="p1: .* choose one of"):
            detect_label_convention(case_of(naming), values)


@pytest.mark.parametrize(("convention", "value"), [("brats2021", 3), ("brats2023", 4), ("msd", 4)])
def test_values_that_contradict_the_naming_are_refused(convention: str, value: int) -> None:
    with pytest.raises(VolumeError, match=f"p1: values .*{value}.* {convention}"):
        detect_label_convention(case_of(convention), [0, 1, value])


def test_other_organs_have_no_tumour_labels() -> None:
    with pytest.raises(VolumeError, match="modalities ct have no brain tumour labels"):
        detect_label_convention(case_of("lits", ("ct",)), [0, 1, 2])


def test_the_real_cases_are_found(real_data: Path) -> None:
    cases = find_cases(real_data / "brats2021")
    assert len(cases) == 15 and all(set(case.files) == set(MRI) and case.label for case in cases)
    hippocampi = find_cases(real_data / "hippocampus")
    assert len(hippocampi) == 208 and all(case.label for case in hippocampi)


def test_one_file_for_several_modalities_is_refused(tmp_path: Path, monkeypatch) -> None:
    """By whatever path."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.nii", "b.nii"):
        Path(name).touch()
    Path("link.nii").symlink_to("a.nii")
    given = {"flair": "a.nii", "t1": "b.nii", "t2": tmp_path / "link.nii"}
    with pytest.raises(VolumeError) as error:
        case_from_files(given)
    assert str(error.value) == "named files: flair, t2 are all a.nii; expected a file of each"
    assert case_from_files({**given, "t2": "c.nii"}).modalities == ("flair", "t1", "t2")
