"""The command from arguments to files, with a tiny untrained model on tiny phantoms."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from meddanet import cases, engine, predictor
from meddanet.arguments import EXECUTORS, LABEL_CONVENTIONS, command_parser
from meddanet.build import build_med_danet, build_med_danet_v2
from meddanet.cli import main
from meddanet.commands import demo as demo_command
from meddanet.commands import train as train_command
from meddanet.data import LABELS, find_cases
from meddanet.data.phantom import write_phantom
from meddanet.data.sources import named_by_model
from meddanet.finished import Request, is_finished
from meddanet.layers import quantized_layers
from meddanet.recipe import PhaseConfig, TrainConfig
from meddanet.weight_files import read_facts
from meddanet.weights import save_model

pytestmark = pytest.mark.usefixtures("few_units")

ROOT = Path(__file__).resolve().parents[1]
MRI = ("flair", "t1ce", "t1", "t2")
SHAPE = (44, 48, 18)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    model = build_med_danet_v2("unet-12", crop_sizes=(16,))
    for layer in quantized_layers(model).values():
        layer.input_amax.fill_(4.0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_model(model, path, trained_on=["nobody"])
    return path


@pytest.fixture(scope="module", autouse=True)
def prepare_once() -> Iterator[None]:
    """Counts and compiles a model once, instead of once per command."""

    def once(prepare: Callable) -> Callable:
        made = {}

        @functools.wraps(prepare)
        def prepared(model, *arguments):
            weights = b"".join(value.numpy().tobytes() for value in model.state_dict().values())
            around = torch.get_num_threads(), sys.modules.get("openvino", "not yet") is None
            key = str(model.config), hashlib.sha256(weights).digest(), around, *map(str, arguments)
            if key not in made:
                made[key] = prepare(model, *arguments)
            return made[key]

        return prepared

    with pytest.MonkeyPatch.context() as patch:
        for name in ("cost_tables", "compile_engine"):
            patch.setattr(predictor, name, once(getattr(predictor, name)))
        yield


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    for seed in (0, 1):
        write_phantom(folder, seed=seed, name=f"case_{seed}", shape=SHAPE)
    return folder


@pytest.fixture
def cohort(phantoms, tmp_path) -> Path:
    return Path(shutil.copytree(phantoms, tmp_path / "cohort"))


@pytest.fixture
def segment(weights, capsys) -> Callable[..., tuple[int, list[str], list[str]]]:
    """Runs `meddanet segment`; returns the exit code and the lines of stdout and stderr.

    But for the one on stderr that says what runs the networks, which hangs on the machine.
    """

    def run(*arguments: object) -> tuple[int, list[str], list[str]]:
        chosen = [] if "--weights" in arguments else ["--weights", weights]
        try:
            code = main(["segment", *map(str, [*arguments, *chosen])])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        messages = captured.err.splitlines()
        others = [line for line in messages if not line.startswith("running on ")]
        assert len(messages) - len(others) <= 1
        return code, captured.out.splitlines(), others

    return run


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def values(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def test_a_folder_of_cases(cohort, tmp_path, segment):
    out = tmp_path / "new" / "out"
    code, results, messages = segment(cohort, "-o", out, "--preview")
    assert code == 0 and messages == ["2 of 2 cases done"]
    assert [line.split()[0] for line in results] == [f"{out}/case_{i}.nii.gz" for i in (0, 1)]
    assert names(out) == [f"case_{i}.{e}" for i in (0, 1) for e in ("json", "nii.gz", "png")]
    for name in ("case_0", "case_1"):
        image, source = (
            nib.load(p) for p in (out / f"{name}.nii.gz", cohort / name / f"{name}_flair.nii.gz")
        )
        assert image.shape == source.shape and image.get_data_dtype() == np.uint8
        assert np.array_equal(image.affine, source.affine)
        assert set(np.unique(image.dataobj)) <= {0, 1, 2, 4}
        report = json.loads((out / f"{name}.json").read_text())
        assert sum(report["decisions"].values()) == 18 == len(report["slices"]["decision"])
        assert report["run"]["device"] in ("cpu", "cuda") and report["run"]["weights"]
        assert 0 < report["share_of_static"]["mac"] < 1.1
        # four columns of 44 and two rows of 48 pixels, four times as large, with their margins
        assert Image.open(out / f"{name}.png").size == (4 * 184 + 8, 30 + 2 * 200 + 54 + 8)


@pytest.mark.parametrize("installed", [True, False])
def test_what_runs_is_told_once(cohort, weights, tmp_path, capsys, monkeypatch, installed):
    """On stderr; with the reason where the fastest executor is not there."""
    if not installed:
        monkeypatch.setitem(sys.modules, "openvino", None)
    elif not find_spec("openvino"):
        pytest.skip("OpenVINO is not installed")
    given = ["segment", str(cohort), "-o", str(tmp_path), "--weights", str(weights)]
    assert main([*given, "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    executor, reason = ("openvino", "") if installed else (
        "torch", "; executor openvino, the fastest on a CPU: openvino is not installed; "
        'pip install "meddanet[cpu]"',
    )
    threads = torch.get_num_threads()
    assert captured.err.splitlines()[0] == f"running on {executor}, {threads} threads{reason}"
    assert captured.err.count("running on") == 1 and "running on" not in captured.out
    assert main(given) == 0
    assert "running on" not in capsys.readouterr().err, "nothing runs"


def test_finished_cases_are_skipped_and_redone_on_demand(cohort, tmp_path, segment):
    out = tmp_path / "out"
    assert segment(cohort / "case_0", "-o", out)[0] == 0
    first = (out / "case_0.json").stat().st_mtime_ns
    code, results, messages = segment(cohort, "-o", out)
    assert code == 0 and len(results) == 1 and "1 finished before" in messages[0]
    assert (out / "case_0.json").stat().st_mtime_ns == first
    assert segment(cohort, "-o", out)[1] == []
    # a case whose labels or report are gone, or whose picture is wanted now, is not finished
    (out / "case_1.nii.gz").unlink()
    assert len(segment(cohort, "-o", out)[1]) == 1
    assert len(segment(cohort, "-o", out, "--preview")[1]) == 2
    code, results, _ = segment(cohort, "-o", out, "--overwrite")
    assert code == 0 and len(results) == 2
    assert (out / "case_0.json").stat().st_mtime_ns != first
    assert not (out / "case_0.png").exists(), "the picture of an older run is stale"


def test_another_patient_of_the_same_name_is_not_finished(cohort, tmp_path, segment):
    """Not even with files of the same size and time; the same files elsewhere are the same."""
    out, moved = tmp_path / "out", tmp_path / "moved" / "case_0"
    assert segment(cohort / "case_0", "-o", out)[0] == 0
    shutil.copytree(cohort / "case_0", moved, copy_function=shutil.copyfile)
    assert segment(moved, "-o", out) == (
        0, [], ["1 finished before, skipped (see --overwrite)"],
    )
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    scan, times = moved / "case_0_t2.nii.gz", (moved / "case_0_t2.nii.gz").stat()
    content = bytearray(scan.read_bytes())
    content[4] ^= 1  # of the time in gzip's header
    scan.write_bytes(content)
    os.utime(scan, ns=(times.st_atime_ns, times.st_mtime_ns))
    refusal = (
        f"meddanet: error: case_0: {out}/case_0.json is of other images (t2); name another folder "
        "with -o, or replace it with --overwrite"
    )
    for more in ([], ["--preview"]):
        assert segment(moved, "-o", out, *more) == (1, [], [refusal])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    # the others go on
    shutil.copytree(cohort / "case_1", moved.parent / "case_1")
    code, results, messages = segment(moved.parent, "-o", out)
    assert code == 1 and len(results) == 1 and messages == [refusal]
    assert segment(moved, "-o", out, "--overwrite")[0] == 0 == segment(moved, "-o", out)[0]


@pytest.mark.parametrize("content", [b"", b"corrected"])
def test_labels_that_were_changed_are_not_finished(cohort, tmp_path, segment, content):
    """And the other cases are."""
    out, labels = tmp_path / "out", tmp_path / "out" / "case_0.nii.gz"
    assert segment(cohort, "-o", out)[0] == 0
    labels.write_bytes(content)
    assert segment(cohort, "-o", out) == (1, [], [
        f"meddanet: error: {labels}: was changed after meddanet wrote it; name another folder with "
        "-o, or replace it with --overwrite",
        "1 finished before, skipped (see --overwrite)",
    ])
    assert labels.read_bytes() == content
    assert segment(cohort, "-o", out, "--overwrite")[0] == 0 == segment(cohort, "-o", out)[0]


def test_a_report_of_an_older_version_is_as_good(cohort, tmp_path, segment):
    out = tmp_path / "out"
    assert segment(cohort / "case_0", "-o", out)[0] == 0
    report = json.loads((out / "case_0.json").read_text())
    del report["images_sha256"]
    (out / "case_0.json").write_text(json.dumps(report))
    assert segment(cohort / "case_0", "-o", out) == (
        0, [], ["1 finished before, skipped (see --overwrite)"],
    )


def test_the_report_tells_which_images_it_is_of(cohort, tmp_path, segment):
    assert segment(cohort / "case_0", "-o", tmp_path)[0] == 0
    files = {kind: cohort / "case_0" / f"case_0_{kind}.nii.gz" for kind in MRI}
    assert json.loads((tmp_path / "case_0.json").read_text())["images_sha256"] == {
        kind: hashlib.sha256(path.read_bytes()).hexdigest() for kind, path in files.items()
    }


@pytest.mark.parametrize(("before", "now", "difference"), [
    ([], ["--labels", "msd"], "of labels in brats2021, not in msd"),
    (["--labels", "brats2023"], [], "of labels in brats2023, not in brats2021"),
    ([], ["--window", "40"], "of whole slices, not of windows of 40"),
    (["--window", "32"], ["--window", "40"], "of windows of 32, not of windows of 40"),
    (["--window", "40"], [], "of windows of 40, not of whole slices"),
    ([], ["--labels", "brats2021"], None),
    (["--labels", "brats2021"], [], None),
    (["--window", "24"], ["--window", "24"], None),
])
def test_a_result_of_other_options_is_not_finished(
    cohort, tmp_path, segment, before, now, difference
):
    out, case = tmp_path / "out", cohort / "case_0"
    assert segment(case, "-o", out, *before)[0] == 0
    left = {path.name: path.read_bytes() for path in out.iterdir()}
    expected = (0, [], ["1 finished before, skipped (see --overwrite)"]) if not difference else (
        1, [], [f"meddanet: error: case_0: {out}/case_0.json is {difference}; name another folder "
                "with -o, or replace it with --overwrite"],
    )
    assert segment(case, "-o", out, *now) == expected
    if difference:
        assert segment(case, "-o", out, "--preview", *now) == expected
    assert {path.name: path.read_bytes() for path in out.iterdir()} == left
    if difference:
        assert segment(case, "-o", out, "--overwrite", *now)[0] == 0
        assert segment(case, "-o", out, *now)[2][0].startswith("1 finished before")


def test_a_result_of_other_weights_is_not_finished(
    cohort, weights, tmp_path, segment, monkeypatch
):
    """By their bytes, wherever they lie and whatever they are called."""
    monkeypatch.chdir(tmp_path)
    case, done = cohort / "case_0", (0, [], ["1 finished before, skipped (see --overwrite)"])
    shutil.copy(weights, "w.safetensors")
    assert segment(case, "-o", "out", "--weights", "w.safetensors")[0] == 0
    assert segment(case, "-o", "out") == done
    code, _, (message,) = segment(case, "-o", "out", "--weights", "brats2021")
    assert code == 1 and message.startswith(
        "meddanet: error: case_0: out/case_0.json is of weights w.safetensors, not brats2021; name"
    )
    for name in ("nosuch", "cohort/absent.safetensors"):
        code, _, (message,) = segment(case, "-o", "out", "--weights", name)
        assert code == 1 and message.startswith(f"meddanet: error: {name}: no such weights; ")
    torch.manual_seed(1)
    save_model(build_med_danet_v2("unet-12", crop_sizes=(16,)), "w.safetensors")
    code, _, (message,) = segment(case, "-o", "out", "--weights", "w.safetensors")
    assert code == 1 and "of weights w.safetensors, not those that have this name now" in message
    # an older report has their name
    report = json.loads(Path("out/case_0.json").read_text())
    del report["run"]["weights_sha256"], report["run"]["window"]
    Path("out/case_0.json").write_text(json.dumps(report))
    for name in ("w.safetensors", tmp_path / "w.safetensors"):
        assert segment(case, "-o", "out", "--weights", name) == done
    assert segment(case, "-o", "out")[0] == 1


def test_channels_in_another_order_are_not_finished(cohort, tmp_path, segment):
    parts = [nib.load(cohort / "case_0" / f"case_0_{kind}.nii.gz") for kind in MRI]
    data = np.stack([np.asarray(part.dataobj) for part in parts], -1)
    nib.save(nib.Nifti1Image(data, parts[0].affine), scan := tmp_path / "scan.nii.gz")
    given = [scan, "-o", tmp_path / "out", "--modalities"]
    assert segment(*given, ",".join(MRI))[0] == 0
    assert segment(*given, "FLAIR,t1gd,t1,t2")[2][0].startswith("1 finished before")
    code, _, (message,) = segment(*given, "t2,t1ce,t1,flair")
    assert code == 1 and "is of channels flair, t1ce, t1, t2, not t2, t1ce, t1, flair" in message


def test_labels_in_another_convention_are_the_same_tissue(cohort, tmp_path, segment):
    for convention in LABEL_CONVENTIONS:
        out = tmp_path / convention
        assert segment(cohort / "case_0", "-o", out, "--labels", convention)[0] == 0
    first, second, third = (values(tmp_path / c / "case_0.nii.gz") for c in LABEL_CONVENTIONS)
    assert np.array_equal(second, np.array([0, 1, 2, 0, 3], np.uint8)[first])
    assert np.array_equal(third, np.array([0, 2, 1, 0, 3], np.uint8)[first])


def test_named_files_make_one_case(cohort, tmp_path, segment):
    folder, plain = cohort / "case_0", tmp_path / "plain"
    plain.mkdir()
    files = {kind: plain / f"scan{n}.nii.gz" for n, kind in enumerate(MRI)}
    for kind, path in files.items():
        shutil.copy(folder / f"case_0_{kind}.nii.gz", path)
    out = tmp_path / "out"
    # in any order, by any of a modality's names
    given = [f"T2w={files['t2']}", f"t1={files['t1']}", f"t1gd={files['t1ce']}"]
    assert segment(*given, f"t2_flair={files['flair']}", "-o", out)[0] == 0
    assert segment(folder, "-o", out)[0] == 0
    assert np.array_equal(values(out / "scan3.nii.gz"), values(out / "case_0.nii.gz"))
    code, _, messages = segment(*given, given[0], "-o", out)
    assert code == 1 and "T2w is named twice" in messages[0]


def test_the_only_channel_is_what_a_model_of_one_modality_takes(cohort, tmp_path, segment):
    model = build_med_danet_v2("unet-2", in_channels=1, num_classes=3, crop_sizes=(16,))
    weights = tmp_path / "own.safetensors"
    save_model(model, weights, modalities=("MRI",), label_values={1: 7, 2: 9})
    scan = shutil.copy(cohort / "case_0" / "case_0_t1.nii.gz", tmp_path / "scan.nii.gz")
    options = ["--weights", weights, "--executor", "eager", "-o"]
    assert segment(scan, *options, tmp_path / "a")[0] == 0
    assert segment(scan, *options, tmp_path / "a")[2][0].startswith("1 finished before")
    assert segment(scan, *options, tmp_path / "b", "--modalities", "mri")[0] == 0
    found, named = (values(tmp_path / out / "scan.nii.gz") for out in "ab")
    assert np.array_equal(found, named) and set(np.unique(found)) <= {0, 7, 9}
    assert json.loads((tmp_path / "a" / "scan.json").read_text())["modalities"] == ["mri"]
    # weights of before said "brats2021" beside label values, and so did their reports
    report = tmp_path / "a" / "scan.json"
    told = json.loads(report.read_text())
    assert told["label_convention"] == "values"
    facts = {**read_facts(weights), "label_convention": "brats2021"}
    asked = Request(str(weights), told["run"]["weights_sha256"], facts)
    (case,) = find_cases(scan)
    case = named_by_model(case, facts["modalities"])
    for convention in ("values", "brats2021"):
        report.write_text(json.dumps({**told, "label_convention": convention}))
        assert is_finished(case, tmp_path / "a", asked)
    # two channels are not one
    both = np.stack([np.asarray(nib.load(scan).dataobj)] * 2, -1)
    nib.save(nib.Nifti1Image(both, np.eye(4)), two := tmp_path / "two.nii.gz")
    code, _, messages = segment(two, *options, tmp_path / "c")
    assert code == 1 and "number of channels is 2, expected 1" in messages[0]


def test_channels_that_only_the_user_can_name(cohort, tmp_path, segment):
    parts = [nib.load(cohort / "case_0" / f"case_0_{kind}.nii.gz") for kind in MRI[::-1]]
    data = np.stack([np.asarray(part.dataobj) for part in parts], -1)
    nib.save(nib.Nifti1Image(data, parts[0].affine), tmp_path / "scan.nii.gz")
    out = tmp_path / "out"
    code, _, messages = segment(tmp_path / "scan.nii.gz", "-o", out)
    assert code == 1 and "channels are is unknown; name them in their order" in messages[0]
    assert "--modalities flair,t1ce,t1,t2" in messages[0]
    order = ", ".join(MRI[::-1])
    assert segment(tmp_path / "scan.nii.gz", "-o", out, "--modalities", order)[0] == 0
    assert segment(cohort / "case_0", "-o", out)[0] == 0
    assert np.array_equal(values(out / "scan.nii.gz"), values(out / "case_0.nii.gz"))


def test_windows(cohort, tmp_path, segment):
    assert segment(cohort / "case_0", "-o", tmp_path, "--window", "24", "--preview")[0] == 0
    report = json.loads((tmp_path / "case_0.json").read_text())
    # 44 pads to 48: (48 - 24) / 8 + 1 = 4 windows per axis
    assert np.shape(report["slices"]["decision"]) == (18, 16)
    assert len(report["windows"]) == 16


def spoil(folder: Path, how: str) -> None:
    """Makes one modality of a case unusable."""
    path = folder / f"{folder.name}_t1.nii.gz"
    image = nib.load(path)
    data, affine = np.asarray(image.dataobj).astype(np.float32), image.affine.copy()
    if how == "missing":
        return path.unlink()
    if how == "truncated":
        return path.write_bytes(path.read_bytes()[:-4000])
    if how == "labels":
        return path.write_bytes((folder / f"{folder.name}_seg.nii.gz").read_bytes())
    if how == "header":
        raw = bytearray(gzip.decompress(path.read_bytes()))
        raw[42:48] = np.array([30000, 30000, 3000], "<i2").tobytes()
        return path.write_bytes(gzip.compress(bytes(raw)))
    if how == "shape":
        data = data[:-2]
    if how == "affine":
        affine[0, 3] += 5
    if how == "2-D":
        data = data[:, :, 0]
    if how in ("nan", "inf"):
        data[20, 20, 9] = float(how)
    nib.save(nib.Nifti1Image(data, affine), path)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"case_0: modality t1 is missing; expected flair, t1ce, t1, t2"),
        ("shape", r"case_0_t1.nii.gz: shape \(42, 48, 18\) differs from \(44, 48, 18\)"),
        ("affine", r"case_0_t1.nii.gz: the affine differs by up to 5"),
        ("truncated", r"case_0_t1.nii.gz: the gzip data is truncated"),
        ("nan", r"case_0_t1.nii.gz: 1 voxels are NaN or infinite"),
        ("inf", r"case_0_t1.nii.gz: 1 voxels are NaN or infinite"),
        ("2-D", r"case_0_t1.nii.gz: is 2-D"),
        ("header", r"case_0_t1.nii.gz: the header asks for \d+ bytes but the file holds"),
        ("labels", r"case_0_t1.nii.gz: holds only the values .* label file"),
    ],
)
def test_a_bad_case_is_one_line_and_the_rest_is_done(cohort, tmp_path, segment, how, message):
    spoil(cohort / "case_0", how)
    code, results, messages = segment(cohort, "-o", tmp_path / "out")
    assert code == 1 and len(results) == 1
    assert messages[-1] == "1 of 2 cases done" and len(messages) == 2
    assert re.match("meddanet: error: .*" + message, messages[0])
    assert names(tmp_path / "out") == ["case_1.json", "case_1.nii.gz"]


def test_a_label_file_alone_is_no_image(cohort, tmp_path, segment):
    code, _, messages = segment(cohort / "case_0" / "case_0_seg.nii.gz", "-o", tmp_path / "out")
    assert code == 1 and "is a label file; expected an image" in messages[0]


@pytest.mark.parametrize(
    ("what", "message"),
    [("empty", "the folder is empty"), ("unknown", "no case found among brain.nii"),
     ("absent", "no such file or folder")],
)
def test_inputs_that_hold_no_case(cohort, tmp_path, segment, what, message):
    folder = tmp_path / "input"
    if what != "absent":
        folder.mkdir()
    if what == "unknown":
        nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.float32), np.eye(4)), folder / "brain.nii")
    code, results, messages = segment(folder, cohort / "case_1", "-o", tmp_path / "out")
    assert code == 1 and len(messages) == 1 and len(results) == 1
    assert messages[0].startswith(f"meddanet: error: {folder}: {message}")


def test_two_cases_of_one_name(cohort, tmp_path, segment):
    other = shutil.copytree(cohort / "case_0", tmp_path / "other" / "case_0")
    inputs = [cohort / "case_0", cohort / "case_0", other]
    code, results, messages = segment(*inputs, "-o", tmp_path / "out")
    assert code == 1 and len(results) == 1
    assert f"{other}: case case_0 has the name of the one in {cohort / 'case_0'}" in messages[0]


def test_the_input_is_never_overwritten(tmp_path, segment):
    data = np.random.default_rng(0).integers(0, 900, (16, 16, 4, 4)).astype(np.int16)
    path = tmp_path / "BRATS_001.nii.gz"
    nib.save(nib.Nifti1Image(data, np.eye(4)), path)
    code, _, messages = segment(path, "-o", tmp_path / "out", "--modalities", ",".join(MRI))
    assert code == 1 and "by its dataset.json or name, by --modalities flair, t1ce" in messages[0]
    before = path.read_bytes()
    code, _, messages = segment(path, "-o", tmp_path)
    assert code == 1 and "belongs to the input itself; name another folder" in messages[0]
    assert path.read_bytes() == before


def test_the_labels_of_the_input_are_never_overwritten(tmp_path, segment):
    """The Decathlon's references are named as the results are."""
    random = np.random.default_rng(0)
    for folder, shape in (("imagesTr", (16, 16, 4, 4)), ("labelsTr", (16, 16, 4))):
        (tmp_path / folder).mkdir()
        data = random.integers(0, 3, shape).astype(np.uint8 if folder == "labelsTr" else np.int16)
        nib.save(nib.Nifti1Image(data, np.eye(4)), tmp_path / folder / "BRATS_001.nii.gz")
    reference = tmp_path / "labelsTr" / "BRATS_001.nii.gz"
    before = reference.read_bytes()
    code, _, messages = segment(tmp_path / "imagesTr", "-o", tmp_path / "labelsTr")
    assert code == 1 and "belongs to the input itself; name another folder" in messages[0]
    # nor those of another folder
    scan = shutil.copy(tmp_path / "imagesTr" / "BRATS_001.nii.gz", tmp_path)
    code, _, messages = segment(scan, "-o", tmp_path / "labelsTr")
    assert code == 1 and f"{reference}: was not written by meddanet; name another" in messages[0]
    assert reference.read_bytes() == before and names(reference.parent) == [reference.name]


def test_a_case_that_another_process_finishes_meanwhile(cohort, tmp_path, segment, monkeypatch):
    other, out, read = tmp_path / "other", tmp_path / "out", []
    assert segment(cohort, "-o", other)[0] == 0
    load = cases.load_volume

    def load_and_be_overtaken(case, modalities):
        read.append(case.name)
        for ending in (".nii.gz", ".json"):
            shutil.copy(other / f"case_1{ending}", out)
        return load(case, modalities)

    monkeypatch.setattr(cases, "load_volume", load_and_be_overtaken)
    code, lines, messages = segment(cohort, "-o", out)
    assert code == 0 and read == ["case_0"] and messages == ["2 of 2 cases done"]
    assert [line.split()[0] for line in lines] == [f"{out}/case_{n}.nii.gz" for n in (0, 1)]


def test_an_output_folder_that_cannot_be_made(cohort, tmp_path, segment):
    (tmp_path / "file").write_text("not a folder")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        code, results, messages = segment(cohort, "-o", out, "--weights", "not even looked for")
        assert code == 1 and results == [] and len(messages) == 1
        assert f"{out}: cannot write there" in messages[0]


@pytest.mark.skipif(os.name != "posix", reason="folders are protected in other ways")
def test_a_read_only_output_folder(cohort, segment):
    with tempfile.TemporaryDirectory() as parent:
        out = Path(parent) / "out"
        out.mkdir(mode=0o555)
        Path(parent).chmod(0o755)
        root = os.geteuid() == 0  # who may write anywhere, and becomes nobody for a moment
        os.seteuid(65534 if root else os.geteuid())
        try:
            code, results, messages = segment(cohort, "-o", out)
        finally:
            os.seteuid(0 if root else os.geteuid())
        assert code == 1 and results == []
        assert messages == [
            f"meddanet: error: {out}: cannot write there (Permission denied); "
            "name another folder with --out"
        ]


def test_a_failed_write_leaves_nothing_half_done(cohort, tmp_path, segment, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, _, messages = segment(cohort, "-o", tmp_path / "out")
    assert code == 1 and names(tmp_path / "out") == []
    assert len(messages) == 3
    assert all("(No space left on device); make room on the disk" in m for m in messages[:2])


@pytest.mark.parametrize("error", [MemoryError("no memory"), RuntimeError("no memory")])
def test_a_case_too_large_for_memory(cohort, tmp_path, segment, monkeypatch, error):
    predict = predictor.VolumePredictor.predict

    def sometimes(self, volume):
        if volume.name == "case_0":
            raise error
        return predict(self, volume)

    monkeypatch.setattr(predictor.VolumePredictor, "predict", sometimes)
    code, results, messages = segment(cohort, "-o", tmp_path / "out")
    assert code == 1 and len(results) == 1
    assert messages[0] == "meddanet: error: case_0: no memory"


def test_an_interrupt_is_one_line(cohort, tmp_path, segment, monkeypatch):
    def interrupt(self, volume):
        raise KeyboardInterrupt

    monkeypatch.setattr(predictor.VolumePredictor, "predict", interrupt)
    code, _, messages = segment(cohort, "-o", tmp_path / "out")
    assert code == 1 and messages == ["meddanet: error: interrupted"]


INTERRUPTED_IMPORT = """
import runpy, sys
from importlib.metadata import EntryPoint

module, way = sys.argv[1:3]
sys.argv[1:] = ["info"]

class Interrupt:
    def find_spec(self, name, *_):
        if name == module:
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt())
if way == "-m":
    runpy.run_module("meddanet", run_name="__main__")
else:
    sys.exit(EntryPoint("meddanet", way, "console_scripts").load()())
"""


@pytest.mark.parametrize("module", ["meddanet.cli", "jsonargparse", "meddanet.commands.info"])
@pytest.mark.parametrize("script", [False, True])
def test_an_interrupt_of_the_first_imports_is_one_line(module, script):
    """Of the console script, too, as pyproject.toml names it."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    way = re.search(r'^meddanet = "(.+)"$', project, re.MULTILINE)[1] if script else "-m"
    given = [sys.executable, "-c", INTERRUPTED_IMPORT, module, way]
    run = subprocess.run(given, cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (1, "", "meddanet: error: interrupted\n")


def test_coarse_voxels_are_a_warning(cohort, tmp_path, segment):
    for path in (cohort / "case_0").iterdir():
        image = nib.load(path)
        affine = image.affine @ np.diag([1, 1, 5, 1])
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), affine), path)
    code, results, messages = segment(cohort / "case_0", "-o", tmp_path / "out")
    assert code == 0 and len(results) == 1
    assert len(messages) == 1
    assert messages[0].startswith("meddanet: warning: case_0: its voxels are 1 x 1 x 5 mm")


@pytest.mark.parametrize(
    ("extra", "code", "message"),
    [
        (["--device", "cuda:77"], 1, "device cuda:77: this machine has"),
        (["--weights", "nothing"], 1, "nothing: no such weights; .*brats2021"),
        (["--window", "17"], 1, "window is 17, expected a multiple of 8"),
        (["--device", "gpu"], 2, "device.* gpu"),
        (["--window", "16", "--executor", "torch"], 1, "executor torch runs no windows"),
        (["--executor", "fast"], 2, "invalid choice: 'fast'"),
        (["--labels", "brats1999"], 2, "invalid choice: 'brats1999'"),
        (["--window", "wide"], 2, "window.* wide"),
        (["--colour"], 2, "--colour"),
    ],
)
def test_options_that_cannot_be(cohort, tmp_path, segment, extra, code, message):
    found, results, messages = segment(cohort, "-o", tmp_path / "out", *extra)
    assert found == code and results == [] and len(messages) == 1
    assert re.match(f"meddanet: error: .*{message}", messages[0])


@pytest.mark.parametrize(("arguments", "lacking", "command"), [
    ([], '"command"', ""),
    (["fly"], "'fly'", ""),
    (["segment"], "required: INPUT, -o/--out", " segment"),
    (["segment", "x.nii"], "required: -o/--out", " segment"),
    (["train", "--data", "x"], "required: --out", " train"),
    (["evaluate", "x"], "required: REF", " evaluate"),
])
def test_a_usage_error_exits_with_2(arguments, lacking, command, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert re.fullmatch(
        rf"meddanet: error: .*{lacking}.* \(see meddanet{command} --help\)\n", message
    )


@pytest.mark.parametrize("command", [["segment", "x"], ["train", "--data", "x"], ["demo"]])
def test_an_output_folder_without_a_name(command, tmp_path, monkeypatch, capsys):
    """A script's empty variable is no wish to write here."""
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--out", ""]) == 1
    assert capsys.readouterr().err == (
        "meddanet: error: --out is empty; name a folder, . for the current one\n"
    )
    assert names(tmp_path) == []


@pytest.mark.parametrize(("arguments", "what"), [
    (["segment", "", "-o", "out"], "INPUT is empty; name a folder or a file, . for the"),
    (["segment", "flair=", "-o", "out"], "named files: flair is empty; expected a file, flair=a."),
    (["evaluate", "", "r"], "PRED is empty; name a folder or a file, . for the current folder"),
    (["evaluate", "r", ""], "REF is empty; name a folder or a file, . for the current folder"),
    (["bench", "", "--json", "absent/t.json"], "the case is empty; name a folder or"),
])
def test_an_input_without_a_name(arguments, what, cohort, monkeypatch, capsys):
    """Nor is it one to read everything here."""
    monkeypatch.chdir(cohort)
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(f"meddanet: error: {what}")
    assert captured.err.count("\n") == 1


def test_every_parser_has_the_name_of_the_command(monkeypatch):
    """Those too that jsonargparse makes of the class, under `python -m meddanet`."""
    monkeypatch.setattr(sys, "argv", ["/somewhere/meddanet/__main__.py"])
    parser = command_parser()
    assert parser.prog == type(parser)().prog == "meddanet"


def test_the_conventions_are_those_of_the_data():
    assert set(LABEL_CONVENTIONS) == LABELS.keys()
    assert EXECUTORS == engine.EXECUTORS


def test_scores_are_there_before_pytorch_would_be(tmp_path):
    image = nib.Nifti1Image(np.eye(4, dtype=np.uint8)[..., None].repeat(3, 2), np.eye(4))
    path = str(tmp_path / "a.nii.gz")
    nib.save(image, path)
    code = (
        "import sys; from meddanet.cli import main\n"
        "code = main(['evaluate', *sys.argv[1:], '--labels', 'brats2023'])\n"
        "print(code, 'torch' in sys.modules)"
    )
    told = subprocess.check_output([sys.executable, "-c", code, path, path], text=True)
    assert told.splitlines()[-1] == "0 False" and "mean of 1 of 1 cases" in told


TOLD_AT_THE_END = """
import atexit, sys
atexit.register(print, "taken apart")
from meddanet.cli import entry
entry()
"""


@pytest.mark.parametrize(("arguments", "lines", "code"), [
    (["info"], 5, 0), (["info", "--cost", "nothing"], 1, 1), (["info", "--help"], None, 0),
])
def test_a_command_that_has_succeeded_ends_its_process_at_once(arguments, lines, code):
    """All that it has said is there."""
    run = subprocess.run(
        [sys.executable, "-c", TOLD_AT_THE_END, *arguments], capture_output=True, text=True
    )
    said = run.stdout.splitlines()
    assert run.returncode == code, run.stderr
    assert (said[-1:] == ["taken apart"]) == (arguments != ["info"])
    assert lines is None or len(said) == lines and bool(run.stderr) == bool(code)


@pytest.mark.parametrize(
    "command", [[], ["demo"], ["segment"], ["train"], ["evaluate"], ["info"], ["bench"]]
)
def test_help_is_quick_because_torch_stays_out(command):
    code = (
        "import sys; from meddanet.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as stop: assert stop.code in (0, None)\n"
        "assert not {'torch', 'nibabel', 'numpy'} & sys.modules.keys()"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, *command, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "usage: meddanet" in run.stdout


def test_evaluate(cohort, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    truth = cohort / "case_0" / "case_0_seg.nii.gz"
    shutil.copy(truth, out / "case_0.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.uint8), nib.load(truth).affine),
             out / "case_1.nii.gz")
    table, sheet = tmp_path / "table.json", tmp_path / "table.csv"
    arguments = ["evaluate", str(out), str(cohort), "--json", str(table), "--csv", str(sheet)]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("case_0  Dice WT 1.0000 TC 1.0000 ET 1.0000")
    assert lines[1].startswith("case_1  Dice WT 0.0000")
    assert lines[2].startswith("mean of 2 of 2 cases  Dice WT 0.5000")
    content = json.loads(table.read_text())
    assert content["mean"]["dice"]["WT"] == 0.5 and content["empty_rule"] == "brats"
    assert len(sheet.read_text().splitlines()) == 3
    # what is in neither file of case_1 counts in no mean, and over how many it is taken is said
    labels = np.asarray(nib.load(truth).dataobj).copy()
    labels[0, 0, 0] = 5
    nib.save(nib.Nifti1Image(labels, nib.load(truth).affine), out / "case_0.nii.gz")
    assert main([*arguments, "--empty", "nan", "--groups", "WT=1,2,4;odd=5"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("  (odd of 1)")
    content = json.loads(table.read_text())
    assert content["counted"]["dice"] == {"WT": 2, "odd": 1} and content["empty_rule"] == "nan"
    assert content["groups"] == {"WT": [1, 2, 4], "odd": [5]}
    assert (content["predictions"], content["references"]) == (str(out), str(cohort))
    shutil.copy(truth, out / "case_0.nii.gz")
    # one that cannot be read is reported, the other one is scored
    (out / "case_1.nii.gz").write_bytes(b"")
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1].startswith("mean of 1 of 2 cases  Dice WT 1.0000")
    assert captured.err.startswith(f"meddanet: error: {out}/case_1.nii.gz")
    assert json.loads(table.read_text())["failed"] == ["case_1"]
    assert main(["evaluate", str(out), str(tmp_path / "absent")]) == 1
    assert "absent: no such file or folder" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="a shell closes the streams")
@pytest.mark.parametrize(("closed", "heard"), [
    ("<&- >&-", ["stderr"]), ("2>&-", ["stdout"]), ("<&- >&- 2>&-", []),
])
def test_a_closed_stream_is_as_the_null_device(tmp_path, closed, heard):
    paths = [str(label_files(tmp_path / side, {"a": [4]})) for side in "pr"]
    given = [sys.executable, "-m", "meddanet", "evaluate", *paths, "--labels", "brats2021"]

    def run(*more: str) -> tuple[int, list[str], list[str]]:
        shell = ["sh", "-c", f'"$@" {closed}', "sh"]
        ended = subprocess.run([*shell, *given, *more], capture_output=True, text=True)
        return ended.returncode, ended.stdout.splitlines(), ended.stderr.splitlines()

    code, results, messages = run("--csv", str(tmp_path / "t.csv"))
    assert code == 0 and len(results) == 2 * ("stdout" in heard) and messages == []
    assert len((tmp_path / "t.csv").read_text().splitlines()) == 2
    code, results, messages = run("--tolerance", "-1")
    assert code == 1 and results == [] and len(messages) == ("stderr" in heard)


@pytest.mark.parametrize(("name", "encoding", "shown"), [
    (b"\xff", "utf-8:strict", "\\udcff"), ("ä".encode(), "ascii", "\\xe4"),
    (b"\xff", "utf-8:surrogateescape", "\udcff"),
])
@pytest.mark.skipif(sys.platform != "linux", reason="names are not bytes there")
def test_a_name_that_stdout_cannot_show_is_escaped(tmp_path, name, encoding, shown):
    """And neither it nor the cases after it are lost."""
    for side in ("p", "r"):
        folder = label_files(tmp_path / side, {"z": [4], "a": [4]})
        (folder / "a.nii.gz").rename(folder / os.fsdecode(name + b".nii.gz"))
    given = ["evaluate", "p", "r", "--labels", "brats2021", "--csv", "t.csv"]
    run = subprocess.run(
        [sys.executable, "-X", "utf8", "-m", "meddanet", *given], cwd=tmp_path, text=True,
        capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding},
        encoding="utf-8", errors="surrogateescape",
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert [line.split("  ")[0] for line in run.stdout.splitlines()] == [
        "z", shown, "mean of 2 of 2 cases",
    ]
    assert (tmp_path / "t.csv").read_bytes().splitlines()[2].startswith(name + b",")


def label_files(folder: Path, contents: dict[str, list[int]]) -> Path:
    """Writes label files whose first voxels have the values given."""
    folder.mkdir()
    for name, found in contents.items():
        labels = np.zeros((6, 5, 4), np.uint8)
        labels[: len(found), 2, 2] = found
        nib.save(nib.Nifti1Image(labels, np.eye(4)), folder / f"{name}.nii.gz")
    return folder


def test_evaluate_references_without_prediction(tmp_path, capsys):
    ours = label_files(tmp_path / "p", {"a": [4], "c": [4], "z": [4]})
    truth = label_files(tmp_path / "r", {"a": [4], "b": [4], "c": [0, 4]})
    table, sheet = tmp_path / "table.json", tmp_path / "table.csv"
    files = ["--json", str(table), "--csv", str(sheet)]
    assert main(["evaluate", str(ours), str(truth), *files]) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "1 without reference: z",
        f"meddanet: error: {ours}: holds no prediction of b; segment these too, the mean is "
        "over the others",
    ]
    lines = captured.out.splitlines()
    assert [line.split()[0] for line in lines] == ["a", "c", "mean"]
    assert lines[2].startswith("mean of 2 of 3 cases  Dice WT 0.5000")
    content = json.loads(table.read_text())
    assert (content["scored"], content["expected"]) == (2, 3)
    assert content["without_prediction"] == ["b"] and content["failed"] == []
    assert [row.split(",")[:2] for row in sheet.read_text().splitlines()] == [
        ["case", "dice_WT"], ["a", "1.0"], ["c", "0.0"], ["b", ""],
    ]
    # one file asks for its own reference alone
    assert main(["evaluate", str(ours / "a.nii.gz"), str(truth)]) == 0
    assert "mean of 1 of 1 cases" in capsys.readouterr().out


def test_evaluate_warns_once_of_a_folder_with_a_fault(tmp_path, capsys):
    """And scores the others, though no case has scans."""
    ours = label_files(tmp_path / "p", {"a": [4]})
    truth = label_files(tmp_path / "r", {"a_seg": [4]})
    (truth / "task" / "imagesTr").mkdir(parents=True)
    shutil.copy(ours / "a.nii.gz", truth / "task" / "imagesTr" / "BRATS_1.nii.gz")
    (truth / "task" / "dataset.json").write_text("{")
    assert main(["evaluate", str(ours), str(truth)]) == 0
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert "dataset.json: holds no channel order" in line and line.endswith("cases are left out")
    assert captured.out.splitlines()[-1].startswith("mean of 1 of 1 cases  Dice WT 1.0000")


def test_evaluate_two_predictions_of_one_case(tmp_path, capsys):
    """That case has failed, the others are scored."""
    ours, truth = (label_files(tmp_path / side, {"a": [4], "b": [4]}) for side in "pr")
    shutil.copy(ours / "a.nii.gz", ours / "a.NII.gz")
    table = tmp_path / "table.json"
    assert main(["evaluate", str(ours), str(truth), "--json", str(table)]) == 1
    captured = capsys.readouterr()
    assert captured.err == (
        f"meddanet: error: {ours}/a.nii.gz: is of case a, as a.NII.gz is; expected one file per "
        "case\n"
    )
    assert captured.out.splitlines()[-1].startswith("mean of 1 of 2 cases  Dice WT 1.0000")
    content = json.loads(table.read_text())
    assert content["failed"] == ["a"] and list(content["cases"]) == ["b"]


def test_evaluate_groups_that_occur_nowhere(tmp_path, capsys):
    folders = [str(label_files(tmp_path / side, {"a": [1, 2, 4], "b": [2]})) for side in "pr"]
    assert main(["evaluate", *folders, "--groups", "ET=3"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == (
        "meddanet: error: --groups ET=3: found in no prediction and no reference, which hold the "
        "label values 1, 2, 4; name those, or leave the group out\n"
    )
    assert main(["evaluate", *folders, "--groups", "TC=1,4;ET=4"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "meddanet: warning: label values in no group of --groups: 2\n"
    assert captured.out.splitlines()[1].startswith("b  Dice TC 1.0000 ET 1.0000")


@pytest.mark.parametrize(("arguments", "message"), [
    (["--json", "absent/t.json"], "absent/t.json: cannot be written, expected a file"),
    (["--json", "t.json", "--csv", "absent/t.csv"], "absent/t.csv: cannot be written"),
    (["--csv", "d.csv"], "d.csv: cannot be written, expected a file in a folder that is writable"),
    (["--csv", "t.json"], "--csv t.json: expected a name that ends in .csv"),
    (["--json", "p/a.nii.gz"], "--json p/a.nii.gz: expected a name that ends in .json"),
    (["--json", ""], "--json .: expected a name that ends in .json"),
    (["--json", "p/a.json"], "--json p/a.json: is the name of an input; name another file"),
    (["--json", "p/../r/b.json"], "--json p/../r/b.json: is the name of an input"),
    (["--json", "dataset.json"], "--json dataset.json: is the name of an input"),
    (["--tolerance", "-1"], "tolerance is a length in mm, 0 or more, got -1.0"),
    (["--tolerance", ".inf"], "tolerance is a length in mm, 0 or more, got inf"),
])
def test_evaluate_says_what_is_wrong_before_it_scores(
    arguments, message, tmp_path, monkeypatch, capsys
):
    folders = [str(label_files(tmp_path / side, {"a": [4], "b": [4]})) for side in "pr"]
    (tmp_path / "d.csv").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *folders, *arguments]) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == "" and line.startswith("meddanet: error: ") and message in line
    assert names(tmp_path) == ["d.csv", "p", "r"]
    assert all(names(Path(folder)) == ["a.nii.gz", "b.nii.gz"] for folder in folders)


@pytest.mark.parametrize("lost", ["json", "csv"])
def test_evaluate_writes_one_table_where_the_other_cannot_be(tmp_path, monkeypatch, capsys, lost):
    """As on a disk that filled up while the cases were scored."""
    folders = [str(label_files(tmp_path / side, {"a": [4]})) for side in "pr"]
    replace = os.replace

    def full(source, target):
        if str(target).endswith(lost):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    files = {kind: tmp_path / f"t.{kind}" for kind in ("json", "csv")}
    given = [text for kind, path in files.items() for text in (f"--{kind}", str(path))]
    assert main(["evaluate", *folders, *given]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"meddanet: error: {files.pop(lost)}: cannot be written (No space left")
    assert names(tmp_path) == ["p", "r", *(path.name for path in files.values())]


def test_evaluate_a_cohort_without_enhancing_tumour(tmp_path, capsys):
    """The convention names the region, so that it may be empty in every file."""
    folders = [str(label_files(tmp_path / side, {"a_seg": [1, 2], "b_seg": [2]})) for side in "pr"]
    assert main(["evaluate", *folders, "--labels", "brats2021"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert all("ET 1.0000" in line for line in captured.out.splitlines())


def test_evaluate_predictions_in_another_convention(cohort, tmp_path, capsys):
    """The advice is one that works: the references' names tell theirs."""
    for name in ("case_0", "case_1"):
        truth = nib.load(cohort / name / f"{name}_seg.nii.gz")
        labels = np.array([0, 2, 1, 0, 3], np.uint8)[np.asarray(truth.dataobj)]
        (tmp_path / "p").mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(labels, truth.affine), tmp_path / "p" / f"{name}.nii.gz")
    arguments = ["evaluate", str(tmp_path / "p"), str(cohort)]
    assert main(arguments) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.endswith("of the predictions by --prediction-labels") for line in lines)
    assert main([*arguments, "--prediction-labels", "msd"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and captured.out.count("Dice WT 1.0000 TC 1.0000 ET 1.0000") == 3


def test_train_reads_its_configuration(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(train_command, "train", lambda config: seen.append(config) or "model")
    assert main(["train", "--data", "a", "--out", "b"]) == 0
    assert seen.pop() == TrainConfig("a", "b")
    assert capsys.readouterr().out == "model\n"
    with pytest.raises(SystemExit) as stop:
        main(["train", "--data", "a", "--out", "b", "--seed", "7", "--crop_sizes", "[64, 96]",
              "--phases", "[{objective: static, steps: 3}]", "--print-config"])
    assert stop.value.code in (0, None)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(capsys.readouterr().out)
    assert main(["train", "--config", str(recipe), "--out", "c"]) == 0
    assert seen.pop() == TrainConfig(
        "a", "c", seed=7, crop_sizes=(64, 96), phases=[PhaseConfig("static", 3)]
    )


@pytest.mark.parametrize("given", ["flair,t1ce", "flair, t1ce ", "[flair, t1ce]"])
def test_train_reads_modalities(given, monkeypatch):
    seen = []
    monkeypatch.setattr(train_command, "train", seen.append)
    assert main(["train", "--data", "a", "--out", "b", "--modalities", given]) == 0
    assert list(seen[0].modalities) == ["flair", "t1ce"]


def test_train_asks_for_modalities_as_its_option_is_called(decathlon, tmp_path, capsys):
    (decathlon / "dataset.json").unlink()
    assert main(["train", "--data", str(decathlon), "--out", str(tmp_path / "run")]) == 1
    message = capsys.readouterr().err
    assert "disc_000: what its channels are is unknown" in message
    assert "such as --modalities flair,t1ce,t1,t2" in message


def test_train_on_nothing_is_one_line(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    assert main(["train", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")]) == 1
    assert "the folder is empty" in capsys.readouterr().err


class Lost(io.StringIO):
    """A stream whose file is full, or whose reader is gone."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


def test_a_full_disk_under_stdout_is_said_once(cohort, tmp_path, segment, monkeypatch):
    monkeypatch.setattr(sys, "stdout", lost := Lost(OSError(28, "No space left on device")))
    code, _, messages = segment(cohort, "-o", tmp_path / "out")
    assert code == 1 and len(names(tmp_path / "out")) == 4 and sys.stdout is lost
    assert messages == [
        "meddanet: error: standard output: cannot be written (No space left on device); redirect "
        "it elsewhere, or make room on the disk", "2 of 2 cases done",
    ]


def test_a_closed_stdout_ends_the_command_quietly(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Lost(BrokenPipeError(32, "Broken pipe")))
    with pytest.raises(SystemExit) as stop:
        main(["info"])
    assert stop.value.code == 1 and capsys.readouterr().err == ""


def test_info(capsys):
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert torch.__version__ in shown and "brats2021" in shown
    assert main(["info", "--cost", "unet-16", "--size", "240"]) == 0
    whole = re.findall(r"^whole +([\d,.]+)", capsys.readouterr().out, re.MULTILINE)
    # in millions: true, and as V1 Table 3, Setting 2 has it (3.75 G)
    assert [round(float(w.replace(",", "")), 1) for w in whole] == [3575.8, 3752.3]
    assert main(["info", "--cost", "vgg-16"]) == 1
    assert "unknown segmenter 'vgg-16'" in capsys.readouterr().err
    assert main(["info", "--cost", "unet-16", "--size", "100"]) == 1
    captured = capsys.readouterr()
    assert "multiples of 8" in captured.err and captured.out == ""


def test_info_of_weights(tmp_path, capsys):
    """Read back as YAML; the hash as sha256sum makes it."""
    model = build_med_danet_v2("unet-4", 1, 3, crop_sizes=(24,))
    path = tmp_path / "leber_ü.safetensors"
    own = {"label_values": {"1": 1, "2": 6}, "window_hu": [-160.0, 240.0], "held_out": ["é-1", "2"]}
    save_model(model, path, modalities=("ct",), **own)
    assert main(["info", "--weights", str(path)]) == 0
    told = yaml.safe_load(capsys.readouterr().out)
    assert told["file"] == str(path) and told["modalities"] == ["ct"]
    assert told["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert {name: told[name] for name in own} == own
    assert told["architecture"]["crop_sizes"] == [24] and told["model"] == "MedDANetV2"
    for wrong, message in (("nix", "nix: no such weights"), (__file__, "not a meddanet weights")):
        assert main(["info", "--weights", wrong]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


@pytest.mark.usefixtures("all_units")
@pytest.mark.parametrize(
    ("name", "routes"),
    [
        ("med-danet", ["skip", "M1", "M2", "M3", "M4"]),
        ("med-danet-v2", ["skip", "crop-96", "whole"]),
    ],
)
def test_info_of_whole_models(capsys, name, routes):
    assert main(["info", "--cost", name, "--size", "128"]) == 0
    shown = capsys.readouterr().out.split("as the papers count\n")[1]
    rows = dict(re.findall(r"^(\S+) +([\d,.]+)", shown, re.MULTILINE))
    assert [row for row in rows if row in routes] == routes
    # in millions: the network that decides has 4.90, the dearest routes are V1 Table 3's M4 and M2
    deciding = float(rows["skip"])
    assert deciding == pytest.approx(4.90, abs=0.005)
    expected = {"M4": 4979, "whole": 1067 + 1.2}[routes[-1]]  # V2: and 1.2 of Sobel filters
    assert float(rows[routes[-1]].replace(",", "")) - deciding == pytest.approx(expected, abs=0.5)


def dice(ours: Path, truth: Path, members: tuple[int, ...]) -> float:
    a, b = (np.isin(values(path), members) for path in (ours, truth))
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_bench(cohort, weights, tmp_path, capsys, monkeypatch):
    """Without a compiler, which is not worth its minute here."""

    def no_compiler(*arguments):
        raise RuntimeError("no C++ compiler\nwas found")

    monkeypatch.setattr(torch, "compile", lambda network: no_compiler)
    path = tmp_path / "bench.json"
    code = main(["bench", str(cohort / "case_0"), "--weights", str(weights), "--rounds", "1",
                 "--executor", "torch", "--json", str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert code == 0 and lines[0].startswith("case_0 on ") and "executor torch" in lines[0]
    result = json.loads(path.read_text())
    names = ["eager slice by slice", "eager batched", "eager channels_last", "engine", "predict"]
    assert list(result["times"]) == names and result["shape"] == [18, 4, 48, 48]
    assert result["not_run"] == {
        "torch.compile channels_last": "RuntimeError: no C++ compiler was found"
    }
    assert lines[-1].split(maxsplit=2)[2].startswith("not run: RuntimeError")
    shown = next(line.split() for line in lines if line.startswith("agreement "))
    assert shown[1] == f"{result['agreement']:.4f}" and result["agreement"] > 0.9
    assert sum(result["decisions"].values()) == 18
    assert result["machine"]["torch"] == torch.__version__
    engine, eager = (result["times"][name]["seconds"] for name in ("engine", names[0]))
    assert result["ratios"]["engine"][names[0]]["seconds"] == round(eager / engine, 2)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--rounds", "0"], "rounds is 0, expected at least 1"),
    (["--json", "absent/bench.json"], "absent/bench.json: cannot be written, expected a file"),
    (["--json", "bench"], "--json bench: expected a name that ends in .json"),
    (["--json", "dataset.json"], "--json dataset.json: is the name of an input"),
    (["--weights", "absent.safetensors"], "absent.safetensors"),
])
def test_bench_says_what_is_wrong_before_it_works(
    arguments, message, tmp_path, monkeypatch, capsys
):
    def work(*arguments, **options):
        raise AssertionError("arguments were not looked at first")

    monkeypatch.setattr("meddanet.commands.bench.write_phantom", work)
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("meddanet: error: ") and message in line


def test_bench_takes_the_advice_on_channels(weights, tmp_path, monkeypatch, capsys):
    data = np.random.default_rng(0).integers(0, 900, (16, 16, 4, 4)).astype(np.int16)
    nib.save(nib.Nifti1Image(data, np.eye(4)), tmp_path / "scan.nii")
    given = ["bench", str(tmp_path / "scan.nii"), "--weights", str(weights)]
    assert main(given) == 1
    assert "such as --modalities flair,t1ce,t1,t2" in capsys.readouterr().err
    seen = []

    def stop(model, volume, *others, **named):
        seen.append(volume)
        raise ValueError("seen")

    monkeypatch.setattr("meddanet.commands.bench.bench_volume", stop)
    assert main([*given, "--modalities", "t2,t1,t1ce,flair"]) == 1
    assert seen[0].modalities == ("t2", "t1", "t1ce", "flair")
    np.testing.assert_array_equal(seen[0].data[0], data[..., 0])


def test_bench_refuses_weights_of_v1(cohort, tmp_path, capsys):
    path = tmp_path / "bank.safetensors"
    save_model(build_med_danet(("unet-4",)), path)
    assert main(["bench", str(cohort / "case_0"), "--weights", str(path)]) == 1
    assert "MedDANetV2 only, these weights are a MedDANet" in capsys.readouterr().err


@pytest.mark.usefixtures("all_units")
def test_demo(tmp_path, capsys):
    assert main(["demo", "-o", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    ours = tmp_path / "phantom_000.nii.gz"
    truth = tmp_path / "phantom_000" / "phantom_000_seg.nii.gz"
    assert values(ours).shape == (240, 240, 155)
    for region, members in {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}.items():
        assert f"{region} {dice(ours, truth, members):.4f}" in shown
    assert dice(ours, truth, (1, 2, 4)) > 0.7
    for path in (ours, tmp_path / "phantom_000.json", tmp_path / "phantom_000.png"):
        assert str(path) in shown and path.is_file()


@pytest.mark.parametrize("name", [
    "phantom_000.nii.gz", "phantom_000.png", "phantom_000", "phantom_000/phantom_000_t1.nii.gz",
    "phantom_000/phantom_000_seg.nii.gz", "phantom_000/another_t1.nii", "phantom_000/sub",
])
def test_demo_replaces_its_own_files_alone(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(demo_command, "write_phantom", small := partial(write_phantom, shape=SHAPE))
    own = small(tmp_path, seed=1, name="phantom_000") / "phantom_000_t1.nii.gz"
    out, path = tmp_path / "out", tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    shutil.copy(own, path) if "." in name or name == "phantom_000" else path.mkdir()
    before = sorted(out.rglob("*"))
    assert main(["demo", "-o", str(out)]) == 1
    assert capsys.readouterr().err == (
        f"meddanet: error: {path}: is not as meddanet demo writes it; name another folder with -o\n"
    )
    assert sorted(out.rglob("*")) == before


@pytest.mark.usefixtures("all_units")
def test_demo_runs_again_where_it_ran(tmp_path, monkeypatch, capsys):
    """Also where it was ended, or with files that another machine compressed."""
    monkeypatch.setattr(demo_command, "write_phantom", partial(write_phantom, shape=SHAPE))
    given = ["demo", "-o", str(tmp_path)]
    assert main(given) == 0
    told = capsys.readouterr().out.splitlines()[1:]
    for lost in ("phantom_000.json", "phantom_000.nii.gz", "phantom_000.png"):
        (tmp_path / lost).unlink()
    scan = tmp_path / "phantom_000" / "phantom_000_t1.nii.gz"
    scan.write_bytes(gzip.compress(gzip.decompress(scan.read_bytes()), compresslevel=9))
    for _ in range(2):
        assert main(given) == 0
        assert capsys.readouterr().out.splitlines()[1:] == told
    ours = tmp_path / "phantom_000.nii.gz"
    ours.write_bytes(b"corrected")
    assert main(given) == 1 and ours.read_bytes() == b"corrected"
    assert "is not as meddanet demo writes it" in capsys.readouterr().err


@pytest.mark.usefixtures("all_units")
def test_a_real_case_scores_what_the_results_say(real_data, tmp_path, segment):
    case = real_data / "brats2021" / "BraTS2021_00000"
    assert segment(case, "-o", tmp_path, "--weights", "brats2021")[0] == 0
    ours, truth = tmp_path / f"{case.name}.nii.gz", case / f"{case.name}_seg.nii.gz"
    image, source = nib.load(ours), nib.load(case / f"{case.name}_flair.nii.gz")
    assert image.shape == source.shape and image.get_data_dtype() == np.uint8
    assert np.array_equal(image.affine, source.affine)
    results = json.loads((ROOT / "benchmarks/results/brats2021.json").read_text())
    row = results["cases"][case.name]["rows"]["S+Q"]["dice"]
    for region, members in {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}.items():
        assert dice(ours, truth, members) == pytest.approx(row[region], abs=0.01)
    share = json.loads((tmp_path / f"{case.name}.json").read_text())["share_of_static"]
    assert share["mac"] <= 0.25


@pytest.fixture
def one_kernel(tmp_path, monkeypatch):
    """Shortens the list of kernels to one class, and moves the user's cache folder."""
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("interpreted kernels are not compiled")
    from meddanet.kernels import aot, precompiled, variants

    name, launch = next(iter(variants.shape_classes().items()))
    monkeypatch.setattr(variants, "shape_classes", lambda: {name: launch})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(precompiled, "PACKAGED", tmp_path / "absent")
    monkeypatch.setattr(aot, "PACKAGED", tmp_path / "unwritable" / "compiled")
    return tmp_path / "meddanet" / "kernels"


@pytest.mark.skipif(
    "PYTEST_XDIST_WORKER" in os.environ,
    reason="make test runs it in a process of its own: beside others its compilation may fail",
)
def test_info_kernels(one_kernel, capsys):
    assert main(["info", "--kernels"]) == 0
    assert capsys.readouterr().out.startswith("none precompiled")
    assert main(["info", "--kernels", "--build", "8.6,9.0"]) == 0
    captured = capsys.readouterr()
    assert f"compiled into {one_kernel}" in captured.err
    assert main(["info", "--kernels"]) == 0
    assert capsys.readouterr().out == captured.out
    assert [line.split(",")[0] for line in captured.out.splitlines()] == ["sm_86", "sm_90"]
    assert captured.out.count(f"{one_kernel}: 1 of 1 kernels (") == 2
    (folder,) = one_kernel.iterdir()
    folder.rename(one_kernel / "0.0.1")
    assert main(["info", "--kernels"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all("triton 0.0.1" in line and "1 kernels, unused: triton" in line for line in lines)


@pytest.mark.parametrize("archs", ["8.5", "", "86"])
def test_info_kernels_of_no_architecture(one_kernel, capsys, archs):
    assert main(["info", "--kernels", "--build", archs]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("meddanet: error: ") and "known are 8.0, 8.6" in line


def test_info_kernels_without_triton(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "triton", None)
    for options in ([], ["--build", "8.6"]):
        assert main(["info", "--kernels", *options]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("meddanet: error: compiling kernels needs the package triton: pip")
