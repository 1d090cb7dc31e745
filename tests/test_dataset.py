"""Labelled cases of several kinds: what is cached, what the weights note, what comes back."""

import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from meddanet.arguments import command_parser, train_config
from meddanet.data import VolumeError, find_cases, load_volume
from meddanet.data.phantom import write_phantom
from meddanet.dataset import prepare_dataset
from meddanet.predictor import VolumePredictor
from meddanet.preview import write_preview
from meddanet.recipe import PhaseConfig, TrainConfig
from meddanet.report import case_report
from meddanet.training import train
from meddanet.weights import load_model

pytestmark = pytest.mark.usefixtures("few_units")
SMALL = 72, 80, 40  # of a phantom


def config(data, out, **options) -> TrainConfig:
    return TrainConfig(str(data), str(out), **options)


def test_one_modality_and_its_own_labels(decathlon, tmp_path):
    data = prepare_dataset(config(decathlon, tmp_path / "run"))
    assert data.modalities == ("mri",) and data.num_classes == 3 and not data.phantoms
    assert data.facts == {
        "label_convention": "values", "label_values": {1: 1, 2: 2}, "spacing_mm": [1.0, 1.0, 1.0],
    }
    assert [case.name for case in data.held_out] == ["disc_000"]
    case = data.training[0]
    stored = nib.load(decathlon / "labelsTr" / "disc_001.nii.gz")
    # [D, H, W] in LPS, which this affine is
    np.testing.assert_array_equal(case.labels, np.asarray(stored.dataobj).transpose(2, 0, 1))
    image = np.asarray(nib.load(decathlon / "imagesTr" / "disc_001.nii.gz").dataobj)
    z_score = (image - image.mean()) / image.std()
    np.testing.assert_allclose(case.images[:, 0], z_score.transpose(2, 0, 1), atol=2e-3)
    # the largest of 21..25 by 26..30, on the stride
    assert data.canvas(8, 8) == (32, 32) and data.canvas(8, 40) == (40, 40)
    assert data.canvas(5, 5) == (25, 30)


def test_a_label_map_and_a_hounsfield_window(real_data, tmp_path):
    folder = tmp_path / "ct"
    folder.mkdir()
    scan = nib.load(real_data / "ct" / "example_ct_sm.nii.gz")
    organs = nib.load(real_data / "ct" / "example_seg.nii.gz")
    nib.save(scan, folder / "volume-0.nii.gz")
    nib.save(organs, folder / "segmentation-0.nii.gz")
    settings = config(
        folder, tmp_path / "run", folds=0, label_map={5: 1, 1: 2, 2: 2, 3: 2},
        window_hu=(-160, 240), segmenter="unet-12", crop_sizes=(64,), window=96, baseline=None,
        validate_every=0, phases=[PhaseConfig("static", 1, batch=1)],
    )
    data = prepare_dataset(settings)
    (case,) = data.training
    values, hu = np.asarray(organs.dataobj), np.asarray(scan.dataobj).astype(np.float64)
    assert (case.labels == 1).sum() == (values == 5).sum() > 0
    assert (case.labels == 2).sum() == np.isin(values, (1, 2, 3)).sum() > 0
    scaled = np.clip((hu + 160) / 400, 0, 1)
    # RAS to LPS: both in-plane axes run the other way
    np.testing.assert_allclose(
        case.images[:, 0], scaled[::-1, ::-1].transpose(2, 0, 1), atol=1e-3
    )
    model = load_model(train(settings))
    assert model.metadata["normalisation"] == "hounsfield window"
    assert model.metadata["spacing_mm"] == [3.0, 3.0, 3.0]
    model.policy.classifier.weight.data.zero_()
    seen = []
    model.policy.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    volume = load_volume(find_cases(folder)[0])
    prediction = VolumePredictor(model, executor="eager").predict(volume)
    assert seen[0].min() >= 0 and seen[0].max() <= 1
    # the first value of a class stands for it
    assert prediction.label_values == {1: 5, 2: 1}
    assert set(np.unique(prediction.labels)) <= {0, 1, 5}
    report = case_report(volume, prediction, 1.0)
    assert report["label_values"] == {"label 5": 5, "label 1": 1}
    write_preview(volume, prediction, tmp_path / "p.png")


def make_ct(task, shift):
    """Makes the Decathlon task one of CT and adds to its intensities."""
    (task / "dataset.json").write_text('{"modality": {"0": "CT"}}')
    for path in (task / "imagesTr").iterdir():
        image = nib.load(path)
        nib.save(nib.Nifti1Image(image.get_fdata(dtype=np.float32) + shift, image.affine), path)


def test_a_ct_with_negative_values_needs_a_window(decathlon, tmp_path):
    """The mask of the z-score, above 0, would take fat and lung for background."""
    make_ct(decathlon, -100)
    settings = config(decathlon, tmp_path / "run")
    wanted = r"^disc_000: is a CT with negative values, .*--window_hu '(\[-160, 240\])'$"
    with pytest.raises(VolumeError, match=wanted) as caught:
        prepare_dataset(settings)
    pasted = re.search(r"--window_hu '([^']+)'", str(caught.value))[1]
    parsed = command_parser().parse_args(
        ["train", "--data", "a", "--out", "b", "--window_hu", pasted]
    )
    window = train_config(parsed["train"]).window_hu
    case = prepare_dataset(replace(settings, window_hu=window)).training[0]
    hu = nib.load(decathlon / "imagesTr" / f"{case.name}.nii.gz").get_fdata()
    assert hu.min() < 0
    scaled = np.clip((hu + 160) / 400, 0, 1)
    np.testing.assert_allclose(case.images[:, 0], scaled.transpose(2, 0, 1), atol=1e-3)


def test_a_ct_without_negative_values_may_be_z_scored(decathlon, tmp_path):
    make_ct(decathlon, 1000)
    data = prepare_dataset(config(decathlon, tmp_path / "run"))
    assert data.modalities == ("ct",) and "normalisation" not in data.facts


def test_a_ct_with_an_offset_is_a_warning(decathlon, tmp_path):
    """In one case alone, whose windowed values are no anatomy: all are at the window's top."""
    make_ct(decathlon, -300)
    path = decathlon / "imagesTr" / "disc_003.nii.gz"
    image = nib.load(path)
    nib.save(nib.Nifti1Image(image.get_fdata(dtype=np.float32) + 1024, image.affine), path)
    with pytest.warns(UserWarning, match="Hounsfield") as caught:
        data = prepare_dataset(config(decathlon, tmp_path / "run", window_hu=(-300, 240)))
    (message,) = [str(warning.message) for warning in caught]
    assert re.match(r"disc_003: its values begin at 7\d\d\.?\d*, while air", message)
    assert all((case.images[:].min() == 1) == (case.name == "disc_003") for case in data.training)


def test_labels_of_another_name_are_named(real_data, tmp_path):
    (folder := tmp_path / "ct").mkdir()
    for name, there in (("volume-0", "example_ct_sm"), ("liver-0", "example_seg")):
        shutil.copy(real_data / "ct" / f"{there}.nii.gz", folder / f"{name}.nii.gz")
    settings = config(folder, tmp_path / "run", folds=0, label_map={5: 1}, window_hu=(-160, 240))
    with pytest.raises(VolumeError) as refused:
        prepare_dataset(settings)
    assert str(refused.value) == (
        f"{folder}: no case has a label file, named x_seg, x-seg, labelsTr/x or, beside volume-0, "
        "segmentation-0; there are cases without labels (volume-0), NIfTI files that belong to no "
        "case (liver-0.nii.gz)"
    )
    (folder / "liver-0.nii.gz").rename(folder / "segmentation-0.nii.gz")
    assert [case.name for case in prepare_dataset(settings).training] == ["volume-0"]


def write_labels(task, number, change):
    """Changes one label file of the Decathlon task in place."""
    path = task / "labelsTr" / f"disc_{number:03d}.nii.gz"
    image = nib.load(path)
    labels = np.asarray(image.dataobj).copy()
    change(labels)
    nib.save(nib.Nifti1Image(labels, image.affine), path)


def test_a_class_without_a_voxel_is_refused(decathlon, tmp_path):
    """The task's values are 1 and 2."""
    for label_map, classes in (({7: 1}, "1"), ({1: 1, 7: 2, 8: 3}, "2, 3")):
        out = tmp_path / str(len(label_map))
        with pytest.raises(VolumeError, match=rf"labels hold 1, 2, none .* class {classes};"):
            prepare_dataset(config(decathlon, out, label_map=label_map))
    for number in range(5):
        write_labels(decathlon, number, lambda labels: labels.fill(0))
    with pytest.raises(VolumeError, match="no case has a labelled voxel"):
        prepare_dataset(config(decathlon, tmp_path / "empty"))


@pytest.mark.parametrize(
    ("label_map", "classes"),
    [({2: 9}, "9; expected 1"), ({1: 1, 2: 3}, "1, 3; expected 1, 2"), ({2: 0}, "none; expected")],
)
def test_the_classes_of_a_label_map_have_no_gap(decathlon, tmp_path, label_map, classes):
    with pytest.raises(ValueError, match=f"label_map is .*, whose classes are {classes}"):
        prepare_dataset(config(decathlon, tmp_path / "run", label_map=label_map))


def test_background_is_no_label(decathlon, tmp_path):
    """Of a label map neither what becomes background nor what has been it."""
    labels = prepare_dataset(config(decathlon, tmp_path / "a", label_map={0: 0, 1: 0, 2: 1}))
    assert labels.facts["label_values"] == {1: 2} and labels.num_classes == 2
    with pytest.raises(ValueError, match="but value 0 is background; leave it out"):
        prepare_dataset(config(decathlon, tmp_path / "b", label_map={0: 1, 2: 2}))


def test_a_stray_value_is_no_class(decathlon, tmp_path):
    write_labels(decathlon, 3, lambda labels: labels.__setitem__((0, 0, 0), 200))
    stray = r"hold 1, 2, 200 \(200 in disc_003\), expected 1, 2 .*'\{1: 1, 2: 2, 200: 3\}'"
    with pytest.raises(VolumeError, match=stray):
        prepare_dataset(config(decathlon, tmp_path / "run"))
    mapped = config(decathlon, tmp_path / "mapped", label_map={1: 1, 2: 2})
    assert prepare_dataset(mapped).num_classes == 3


def test_what_is_not_trained_on_is_told(decathlon, tmp_path):
    for number in (2, 4):
        (decathlon / "labelsTr" / f"disc_{number:03d}.nii.gz").unlink()
    deep = decathlon / "a" / "b" / "c" / "d" / "e" / "f"
    deep.mkdir(parents=True)
    faulty = decathlon / "study" / "imagesTr"
    faulty.mkdir(parents=True)
    (faulty.parent / "dataset.json").write_text("{")
    for path in (*(decathlon / f"x{number}.nii.gz" for number in range(5)), faulty / "y.nii.gz"):
        shutil.copy(decathlon / "imagesTr" / "disc_000.nii.gz", path)
    with pytest.warns(UserWarning) as warned:
        data = prepare_dataset(config(decathlon, tmp_path / "run"))
    (text,) = [str(warning.message) for warning in warned]
    assert text == (
        f"{decathlon}: 3 labelled cases, 2 to train on and 1 held out; left out are "
        "cases without labels (disc_002, disc_004), NIfTI files that belong to no case "
        "(x0.nii.gz, x1.nii.gz, x2.nii.gz, x3.nii.gz and 1 more), "
        "folders too deep to look into (a/b/c/d/e/f), folders with a fault (study/imagesTr)"
    )
    assert (len(data.training), len(data.held_out)) == (2, 1)


def test_an_image_that_was_not_fetched_is_named(decathlon, tmp_path):
    """Left out it would move the other cases to other folds."""
    away = decathlon / "imagesTr" / "disc_002.nii.gz"
    away.unlink()
    away.symlink_to("../.git/annex/objects/disc_002.nii.gz")
    with pytest.raises(VolumeError, match=f"^{away}: cannot be read .No such file"):
        prepare_dataset(config(decathlon, tmp_path / "run"))


def test_where_the_body_lies_is_known_where_slices_have_one_size(decathlon, tmp_path):
    data = prepare_dataset(config(decathlon, tmp_path / "run"))
    assert len({case.labels.shape[1:] for case in data.training}) > 1 and data.placement() == {}

    def case(top: int, left: int) -> SimpleNamespace:
        images = np.zeros((9, 1, 40, 48), np.float16)
        images[::8, :, top : top + 10, left : left + 20] = 1
        return SimpleNamespace(images=images, labels=np.zeros((9, 40, 48)))

    known = replace(data, training=[case(4, 8), case(8, 12), case(40, 0)])
    assert known.placement() == {"canvas": (40, 48), "centre": (11.0, 20.0)}
    assert replace(data, training=[case(40, 0)]).placement() == {}


def test_what_a_refusal_advises_can_be_done_in_the_same_folder(decathlon, tmp_path):
    """Labels with a gap are found when all cases are cached, and so may be one negative value."""
    settings = config(decathlon, tmp_path / "run")
    for number in range(5):
        write_labels(decathlon, number, lambda labels: np.multiply(labels, 2, out=labels))
    with pytest.raises(VolumeError, match=r"--label_map '\{2: 1, 4: 2\}'"):
        prepare_dataset(settings)
    settings = replace(settings, label_map={2: 1, 4: 2})
    (decathlon / "dataset.json").write_text('{"modality": {"0": "CT"}}')
    path = decathlon / "imagesTr" / "disc_004.nii.gz"
    image = nib.load(path)
    nib.save(nib.Nifti1Image(image.get_fdata(dtype=np.float32) - 100, image.affine), path)
    with pytest.raises(VolumeError, match="disc_004: is a CT with negative values"):
        prepare_dataset(settings)
    data = prepare_dataset(replace(settings, window_hu=(-160, 240)))
    assert data.num_classes == 3 and data.facts["label_values"] == {1: 2, 2: 4}
    assert all(case.labels.max() == 2 for case in (*data.training, *data.held_out))
    # from now on the cache is that run's
    with pytest.raises(ValueError, match="was made with window_hu .*, not None"):
        prepare_dataset(settings)


@pytest.mark.parametrize("modality", ["T1", "T2"])
def test_one_modality_is_no_glioma_whatever_its_name(decathlon, tmp_path, modality):
    (decathlon / "dataset.json").write_text(json.dumps({"modality": {"0": modality}}))
    settings = config(decathlon, tmp_path / "run")
    # a cache of a version that swapped the values, as in the brain tumour task
    prepare_dataset(settings)
    cache = tmp_path / "run" / "cache"
    table = json.loads((cache / "cases.json").read_text())
    for name, row in table["cases"].items():
        row["gliomas"], row["highest"] = True, 2
        del row["values"]
        labels = np.load(cache / f"{name}.labels.npy")
        np.save(cache / f"{name}.labels.npy", np.array([0, 2, 1], np.uint8)[labels])
    (cache / "cases.json").write_text(json.dumps(table))
    data = prepare_dataset(settings)
    assert data.num_classes == 3 and data.facts["label_values"] == {1: 1, 2: 2}
    for case in (*data.training, *data.held_out):
        stored = np.asarray(nib.load(decathlon / "labelsTr" / f"{case.name}.nii.gz").dataobj)
        np.testing.assert_array_equal(case.labels, stored.transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("convention", "values"), [("brats2023", [0, 1, 2, 0, 3]), ("msd", [0, 2, 1, 0, 3])]
)
def test_gliomas_in_nnunet_layout_train_as_the_error_says(tmp_path, convention, values):
    """A phantom, whose own label file has 1, 2 and 4, as each convention writes it."""
    source = write_phantom(tmp_path / "source", seed=1, name="p", shape=SMALL)
    task = tmp_path / "Dataset001"
    for kind in ("imagesTr", "labelsTr"):
        (task / kind).mkdir(parents=True)
    channels = {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}
    (task / "dataset.json").write_text(json.dumps({"channel_names": channels}))
    for number, kind in enumerate(("flair", "t1", "t1ce", "t2")):
        image = source / f"p_{kind}.nii.gz"
        (task / "imagesTr" / f"p_{number:04d}.nii.gz").symlink_to(image)
    stored = nib.load(source / "p_seg.nii.gz")
    truth = np.asarray(stored.dataobj)
    labels = np.array(values, np.uint8)[truth]
    nib.save(nib.Nifti1Image(labels, stored.affine), task / "labelsTr" / "p.nii.gz")
    settings = config(task, tmp_path / "run", folds=0)
    with pytest.raises(VolumeError, match="p: .* label convention") as caught:
        prepare_dataset(settings)
    # the mapping, as it would be pasted
    pasted = re.search(rf"--label_map '([^']+)' \({convention}\)", str(caught.value))[1]
    parsed = command_parser().parse_args(
        ["train", "--data", "a", "--out", "b", "--label_map", pasted]
    )
    data = prepare_dataset(replace(settings, label_map=train_config(parsed["train"]).label_map))
    assert data.modalities == ("flair", "t1ce", "t1", "t2") and data.num_classes == 4
    classes = np.array([0, 1, 2, 0, 3])[truth].transpose(2, 0, 1)
    np.testing.assert_array_equal(data.training[0].labels, classes)
    # predictions get the values of the label files back
    assert data.facts["label_values"] == {1: values[1], 2: values[2], 3: values[4]}


def test_other_settings_do_not_get_the_old_cache(decathlon, tmp_path):
    first = config(decathlon, tmp_path / "run")
    prepare_dataset(first)
    with pytest.raises(ValueError, match="cache: was made with label_map None, not .*'1': 1"):
        prepare_dataset(replace(first, label_map={1: 1}))
    merged = replace(first, label_map={2: 1}, cache=str(tmp_path / "other"))
    assert prepare_dataset(merged).num_classes == 2


def test_a_half_written_cache_is_completed(decathlon, tmp_path):
    settings = config(decathlon, tmp_path / "run")
    prepare_dataset(settings)
    cache = tmp_path / "run" / "cache"
    kept, lost = cache / "disc_001.images.npy", cache / "disc_002.images.npy"
    lost.unlink()
    before = kept.stat().st_mtime_ns
    assert len(prepare_dataset(settings).training) == 4
    assert kept.stat().st_mtime_ns == before and lost.exists()


def test_a_file_that_changed_is_cached_again(decathlon, tmp_path):
    settings = config(decathlon, tmp_path / "run")
    prepare_dataset(settings)
    path = decathlon / "labelsTr" / "disc_001.nii.gz"
    labels = nib.load(path)
    nib.save(nib.Nifti1Image(np.zeros(labels.shape, np.uint8), labels.affine), path)
    with pytest.warns(UserWarning, match="1 cases, such as disc_001, had files of another size"):
        data = prepare_dataset(settings)
    case = next(c for c in data.training if c.name == "disc_001")
    assert not case.labels.any() and not len(case.lesion)


def test_cases_that_do_not_belong_together_or_hold_no_numbers(decathlon, tmp_path):
    write_phantom(decathlon, seed=1, name="brain", shape=SMALL)
    with pytest.raises(VolumeError, match=r"disc_000: modalities is .*mri.* in brain"):
        prepare_dataset(config(decathlon, tmp_path / "a"))
    path = decathlon / "imagesTr" / "disc_003.nii.gz"
    image = nib.load(path)
    data = image.get_fdata(dtype=np.float32)
    data[3, 3, 3] = np.nan
    nib.save(nib.Nifti1Image(data, image.affine), path)
    with pytest.raises(VolumeError, match="disc_003"):
        prepare_dataset(config(decathlon, tmp_path / "b"))
    # what was cached before is not lost
    table = json.loads((tmp_path / "b" / "cache" / "cases.json").read_text())
    assert {"disc_000", "disc_001", "disc_002"} <= table["cases"].keys()


def test_the_parts_of_a_tumour_keep_their_convention(tmp_path):
    write_phantom(tmp_path / "data", seed=1, name="p", shape=SMALL)
    data = prepare_dataset(config(tmp_path / "data", tmp_path / "run", folds=0, phantoms=1))
    assert data.num_classes == 4 and data.facts["label_convention"] == "brats2021"
    assert [case.name for case in data.phantoms] == ["phantom-1000"]
    assert set(np.unique(data.training[0].labels)) == {0, 1, 2, 3}


def test_timepoints_of_a_patient_are_held_out_together(decathlon, tmp_path):
    for kind in ("imagesTr", "labelsTr"):
        for old, new in ((0, "p1_tp1"), (1, "p1_tp2"), (2, "p2_tp1"), (3, "p3_tp1")):
            (decathlon / kind / f"disc_{old:03d}.nii.gz").rename(decathlon / kind / f"{new}.nii.gz")
    settings = config(decathlon, tmp_path / "run", folds=2, patient=r"^([a-z]+_?\d+)")
    split = prepare_dataset(settings).split
    # disc_004, p1, p2, p3: every second from the first
    assert split == {
        "held_out": ["disc_004", "p2_tp1"], "trained_on": ["p1_tp1", "p1_tp2", "p3_tp1"]
    }
    assert prepare_dataset(replace(settings, patient=None, fold=1)).split["held_out"] == [
        "p1_tp1", "p2_tp1"
    ]
    with pytest.raises(ValueError, match="patient is 'p.*', .* finds a patient in disc_004"):
        prepare_dataset(replace(settings, patient=r"p\d", out=str(tmp_path / "no")))
    assert not (tmp_path / "no").exists()  # said before anything is cached


def test_a_window_that_does_not_fit(decathlon, tmp_path):
    with pytest.raises(ValueError, match="window is 20, expected a multiple of 8 .* at least 16"):
        train(config(decathlon, tmp_path / "run", window=20, crop_sizes=(16,)))


def test_hippocampus(real_data, tmp_path):
    """Files without a dataset.json: the channel is named by hand."""
    folder = tmp_path / "task"
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
        for name in ("hippocampus_001", "hippocampus_003", "hippocampus_004"):
            file = f"{name}.nii.gz"
            (folder / kind / file).symlink_to(real_data / "hippocampus" / kind / file)
    settings = config(
        folder, tmp_path / "run", modalities=("mri",), folds=3, window=None, crop_sizes=(24, 32),
        segmenter="unet-12", baseline=None, validate_every=1, validation_slices=4,
        phases=[PhaseConfig("segmenter", 1, batch=2), PhaseConfig("quantised", 3, batch=2)],
    )
    model = load_model(train(settings))
    assert model.routes == ("skip", "crop-24", "crop-32", "whole") and model.num_classes == 3
    looks = (tmp_path / "run" / "validation.jsonl").read_text().splitlines()
    assert len(looks) == 4 and json.loads(looks[0])["dice"].keys() == {"1", "2"}
    (held_out,) = model.metadata["held_out"]
    volume = load_volume(folder / "images" / f"{held_out}.nii.gz", ["mri"])
    prediction = VolumePredictor(model).predict(volume)
    assert prediction.labels.shape == volume.data.shape[1:]
