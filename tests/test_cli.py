"""The command from arguments to files, with a tiny untrained model on tiny phantoms."""

import gzip
import json
import os
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from meddanet.build import build_med_danet_v2
from meddanet.cli import main
from meddanet.data import load_volume
from meddanet.data.phantom import write_phantom
from meddanet.layers import quantized_layers
from meddanet.predictor import VolumePredictor
from meddanet.weights import load_model, save_model


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    model = build_med_danet_v2("unet-12", crop_sizes=(16,))
    for layer in quantized_layers(model).values():
        layer.input_amax.fill_(4.0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_model(model, path, trained_on=["nobody"])
    return path


@pytest.fixture
def cohort(tmp_path):
    folder = tmp_path / "cohort"
    for seed in (0, 1):
        write_phantom(folder, seed=seed, name=f"case_{seed}", shape=(44, 48, 18))
    return folder


def segment(*arguments) -> int:
    return main(["segment", *map(str, arguments)])


def test_a_folder_of_cases(cohort, tmp_path, weights, capsys):
    out = tmp_path / "out"
    assert segment(cohort, "-o", out, "--weights", weights, "--preview") == 0
    for name in ("case_0", "case_1"):
        image = nib.load(out / f"{name}.nii.gz")
        source = nib.load(cohort / name / f"{name}_flair.nii.gz")
        assert image.shape == source.shape and image.get_data_dtype() == np.uint8
        assert np.array_equal(image.affine, source.affine)
        assert set(np.unique(image.dataobj)) <= {0, 1, 2, 4}
        report = json.loads((out / f"{name}.json").read_text())
        assert sum(report["decisions"].values()) == 18 == len(report["slices"]["decision"])
        assert 0 < report["share_of_static"]["mac"] < 1.1
        assert Image.open(out / f"{name}.png").size[0] > 100
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_finished_cases_are_skipped_and_redone_on_demand(cohort, tmp_path, weights, capsys):
    out = tmp_path / "out"
    assert segment(cohort / "case_0", "-o", out, "--weights", weights) == 0
    first = (out / "case_0.json").stat().st_mtime_ns
    assert segment(cohort, "-o", out, "--weights", weights) == 0
    assert (out / "case_0.json").stat().st_mtime_ns == first
    assert "1 finished before" in capsys.readouterr().err
    assert segment(cohort, "-o", out, "--weights", weights, "--overwrite") == 0
    assert (out / "case_0.json").stat().st_mtime_ns != first


def test_labels_in_another_convention_are_the_same_tissue(cohort, tmp_path, weights):
    for convention in ("brats2021", "brats2023"):
        out = tmp_path / convention
        assert segment(cohort / "case_0", "-o", out, "--weights", weights,
                       "--labels", convention) == 0
    a, b = (np.asarray(nib.load(tmp_path / c / "case_0.nii.gz").dataobj)
            for c in ("brats2021", "brats2023"))
    assert np.array_equal(np.where(a == 4, 3, a), b)


def break_modality(folder, how):
    name = folder.name
    path = folder / f"{name}_t1.nii.gz"
    image = nib.load(path)
    data = np.asarray(image.dataobj).astype(np.float32)
    if how == "missing":
        path.unlink()
    elif how == "shape":
        nib.save(nib.Nifti1Image(data[:-2], image.affine), path)
    elif how == "affine":
        moved = image.affine.copy()
        moved[0, 3] += 5
        nib.save(nib.Nifti1Image(data, moved), path)
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-4000])
    elif how == "nan":
        data[20, 20, 9] = np.nan
        nib.save(nib.Nifti1Image(data, image.affine), path)
    elif how == "inf":
        data[20, 20, 9] = np.inf
        nib.save(nib.Nifti1Image(data, image.affine), path)
    elif how == "2-D":
        nib.save(nib.Nifti1Image(data[:, :, 0], image.affine), path)
    elif how == "header":
        raw = bytearray(gzip.decompress(path.read_bytes()))
        raw[42:48] = np.array([30000, 30000, 3000], "<i2").tobytes()
        path.write_bytes(gzip.compress(bytes(raw)))
    elif how == "labels":
        seg = folder / f"{name}_seg.nii.gz"
        path.write_bytes(seg.read_bytes())


@pytest.mark.parametrize(
    ("how", "message"),
    [("missing", "t1"), ("shape", "shape"), ("affine", "affine"), ("truncated", "_t1.nii.gz"),
     ("nan", "NaN"), ("inf", "infinite"), ("2-D", "2-D"), ("header", "the header asks for"),
     ("labels", "label")],
)
def test_a_bad_case_is_one_line_and_the_rest_is_done(
    cohort, tmp_path, weights, capsys, how, message
):
    out = tmp_path / "out"
    break_modality(cohort / "case_0", how)
    assert segment(cohort, "-o", out, "--weights", weights) == 1
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if "error" in line]
    assert len(errors) == 1 and message in errors[0] and "case_0" in errors[0]
    assert "Traceback" not in captured.err
    assert sorted(p.name for p in out.iterdir()) == ["case_1.json", "case_1.nii.gz"]


@pytest.mark.parametrize("what", ["empty", "unknown", "absent"])
def test_inputs_that_hold_no_case(tmp_path, weights, capsys, what):
    folder = tmp_path / "input"
    if what != "absent":
        folder.mkdir()
    if what == "unknown":
        nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.float32), np.eye(4)), folder / "brain.nii")
    assert segment(folder, "-o", tmp_path / "out", "--weights", weights) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("meddanet: error: ") and "\n" not in error and str(folder) in error


def test_an_output_folder_that_cannot_be_written(cohort, tmp_path, weights, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    assert segment(cohort, "-o", blocked / "out", "--weights", weights) == 1
    assert "cannot write there" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_output_folder(cohort, tmp_path, weights, capsys):
    out = tmp_path / "out"
    out.mkdir(mode=0o500)
    assert segment(cohort, "-o", out, "--weights", weights) == 1
    assert "cannot write there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [(["--device", "cuda:77"], "cuda"), (["--labels", "brats1999"], "brats1999"),
     (["--weights", "nothing"], "nothing"), (["--window", "17"], "multiple of 8")],
)
def test_options_that_cannot_be(cohort, tmp_path, weights, capsys, extra, message):
    arguments = [cohort, "-o", tmp_path / "out", "--weights", weights, *extra]
    assert segment(*arguments) == 1
    assert message in capsys.readouterr().err


def test_a_usage_error_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["segment"])
    assert stop.value.code == 2


def test_evaluate_by_hand(tmp_path, capsys):
    def write(path, values):
        path.parent.mkdir(parents=True, exist_ok=True)
        data = np.zeros((8, 8, 8), np.uint8)
        data.reshape(-1)[: len(values)] = values
        nib.save(nib.Nifti1Image(data, np.eye(4)), path)

    write(tmp_path / "pred.nii.gz", [1, 2, 4, 4])
    write(tmp_path / "ref.nii.gz", [1, 2, 2, 4])
    table = tmp_path / "table.json"
    assert main(["evaluate", str(tmp_path / "pred.nii.gz"), str(tmp_path / "ref.nii.gz"),
                 "--json", str(table)]) == 0
    # TC: 3 against 2 voxels, 2 shared; ET: 2 against 1, 1 shared
    mean = json.loads(table.read_text())["mean"]
    assert mean == pytest.approx({"WT": 1.0, "TC": 4 / 5, "ET": 2 / 3})
    assert "TC 0.8000" in capsys.readouterr().out


def test_help_is_quick_because_torch_stays_out():
    code = (
        "import sys; from meddanet.cli import _parser; _parser().format_help();"
        "assert 'torch' not in sys.modules and 'nibabel' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_windows_and_slices_give_labels_of_the_input_shape(cohort, weights):
    volume = load_volume(cohort / "case_0")
    sliced = VolumePredictor(load_model(weights)).predict(volume)
    windowed = VolumePredictor(load_model(weights), window=24).predict(volume)
    assert sliced.labels.shape == windowed.labels.shape == (44, 48, 18)
    # 44 pads to 48: (48 - 24) / 8 + 1 = 4 windows per axis
    assert windowed.decisions.shape == (18, 16) and windowed.num_bits.shape == (18, 16, 4)
    again = VolumePredictor(load_model(weights)).predict(volume)
    assert np.array_equal(sliced.labels, again.labels)


def test_weights_round_trip_and_say_what_is_wrong(weights, tmp_path):
    model = load_model(weights)
    assert model.metadata["trained_on"] == ["nobody"]
    assert model.segmenter.init.input_amax.item() == 4.0
    save_model(model, tmp_path / "copy.safetensors")
    copy = load_model(tmp_path / "copy.safetensors").state_dict()
    assert all(torch.equal(value, copy[name]) for name, value in model.state_dict().items())
    (tmp_path / "junk.safetensors").write_bytes(b"junk" * 10)
    with pytest.raises(ValueError, match="not a meddanet weights file"):
        load_model(tmp_path / "junk.safetensors")
    with pytest.raises(ValueError, match="no such weights"):
        load_model("brats1999")
