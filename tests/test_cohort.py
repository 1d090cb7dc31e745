"""A folder run reads ahead and writes behind, in bounded memory, and no case stops another."""

from __future__ import annotations

import json
import os
import shutil
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from meddanet import cases, cohort, finished
from meddanet.cases import ReadAhead
from meddanet.cohort import segment_case, segment_cases
from meddanet.data import Case, Volume, VolumeError, lock, storage
from meddanet.predictor import Prediction

MRI = ("flair", "t1ce", "t1", "t2")


VOLUME = Volume(np.ones((4, 8, 8, 3), np.float32), np.eye(4), None, MRI, "brats2021", "a")


WITH_PICTURE = finished.Request("", "", {}, preview=True)


class Engine:
    executor = "none"


class Predictor:
    """Labels everything alike; refuses the cases it is told to."""

    device, engine, window_hu = "cpu", Engine(), None

    def __init__(
        self, bad: tuple[str, ...] = (), error: Exception | None = None, label: int = 0
    ) -> None:
        self.bad, self.error, self.label = bad, error, label
        self.at_work = threading.Event()

    def predict(self, volume: Volume) -> Prediction:
        self.at_work.set()
        if volume.name in self.bad:
            raise self.error or VolumeError(f"{volume.name}: refused")
        depth = volume.data.shape[3]
        labels = np.full(volume.data.shape[1:], self.label, np.uint8)
        kinds = "mac", "paper", "static_mac", "static_paper", "scaled_paper", "bit_operations"
        macs = {key: 1.0 for key in kinds}
        return Prediction(
            labels, "brats2021", ("skip", "whole"), (), np.zeros(depth, int), np.zeros((depth, 2)),
            np.zeros((depth, 4), int), macs, {"normalise": 0.0, "network": 0.0, "total": 0.0},
        )


def case(name: str) -> Case:
    files = {modality: Path(f"/nowhere/{name}_{modality}.nii.gz") for modality in MRI}
    return Case(name, files, "brats2021", MRI)


@pytest.fixture(autouse=True)
def no_files() -> Iterator[None]:
    """The cases' files are nowhere."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (cases, finished):
            patch.setattr(module, "image_digests", lambda _: {})
        yield


@pytest.fixture
def volumes(monkeypatch) -> list[weakref.ref]:
    """Makes reading return a small volume, or raise for names that hold "unreadable"."""
    alive: list[weakref.ref] = []

    def load(source: Case, modalities) -> Volume:
        if "unreadable" in source.name:
            raise VolumeError(f"{source.name}: cannot be read")
        volume = replace(VOLUME, data=VOLUME.data.copy(), name=source.name)
        alive.append(weakref.ref(volume.data))
        return volume

    monkeypatch.setattr(cases, "load_volume", load)
    return alive


def run(names: list[str], predictor: Predictor, out: Path) -> list:
    with ReadAhead([case(name) for name in names], out) as readings:
        outcomes = segment_cases(readings, predictor, weights="none")
        return [(done.name, outcome) for done, outcome in outcomes]


def test_cases_come_back_in_order_with_their_errors(volumes, tmp_path):
    names = ["a", "unreadable", "b", "refused", "c"]
    outcomes = run(names, Predictor(("refused",)), tmp_path)
    assert [name for name, _ in outcomes] == names
    assert [isinstance(outcome, Exception) for _, outcome in outcomes] == [0, 1, 0, 1, 0]
    assert str(outcomes[1][1]) == "unreadable: cannot be read"
    assert str(outcomes[3][1]) == "refused: refused"
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == [f"{name}.{ending}" for name in "abc" for ending in ("json", "nii.gz")]


def test_a_label_file_that_cannot_be_written_is_that_cases_error(volumes, tmp_path):
    (tmp_path / "b.nii.gz").mkdir()
    outcomes = dict(run(["a", "b", "c"], Predictor(), tmp_path))
    assert isinstance(outcomes["b"], (VolumeError, OSError))
    assert not (tmp_path / "b.json").exists() and (tmp_path / "c.json").exists()


def test_a_name_that_is_too_long_is_that_cases_error(volumes, tmp_path):
    (_, error), (_, done) = run(["b" * 250, "c"], Predictor(), tmp_path)
    assert str(error).endswith("cannot be written (File name too long); give it a shorter name")
    assert isinstance(done, dict)


def test_an_error_of_the_program_itself_ends_the_run(volumes, tmp_path):
    with pytest.raises(ZeroDivisionError):
        run(["a", "b"], Predictor(("a",), ZeroDivisionError()), tmp_path)


def test_no_more_than_three_volumes_are_alive(volumes, tmp_path):
    most = 0

    class Watching(Predictor):
        def predict(self, volume):
            nonlocal most
            most = max(most, sum(reference() is not None for reference in volumes))
            return super().predict(volume)

    names = [f"case{index}" for index in range(8)]
    assert len(run(names, Watching(), tmp_path)) == len(volumes) == 8
    assert most <= 3
    assert sum(reference() is not None for reference in volumes) <= 1


def test_reading_and_writing_overlap_with_the_work(volumes, tmp_path, monkeypatch):
    """Deadlocks, and so fails by its time limit, unless all three go on at once."""
    limit, meet = 20, threading.Barrier(3)
    load, save = cases.load_volume, cohort.save_volume

    def reading(source, modalities):
        if source.name == "third":
            meet.wait(limit)
        return load(source, modalities)

    def writing(labels, path, *others):
        if path.name.startswith("first"):
            meet.wait(limit)
        save(labels, path, *others)

    class Meeting(Predictor):
        def predict(self, volume):
            if volume.name == "second":
                meet.wait(limit)
            return super().predict(volume)

    monkeypatch.setattr(cases, "load_volume", reading)
    monkeypatch.setattr(cohort, "save_volume", writing)
    outcomes = run(["first", "second", "third"], Meeting(), tmp_path)
    assert not any(isinstance(outcome, Exception) for _, outcome in outcomes)


def test_no_cases_are_no_work(tmp_path):
    assert run([], Predictor(), tmp_path) == []


def sources(folder: Path, *names: str) -> list[Path]:
    """Files of somebody else."""
    for name in names:
        (folder / name).write_text(name)
    return [folder / name for name in names]


@pytest.mark.parametrize("name", ["b.nii.gz", "b.json", "b.png"])
def test_files_of_others_are_kept(volumes, tmp_path, name):
    (path,) = sources(tmp_path, name)
    outcomes = dict(run(["a", "b", "c"], Predictor(), tmp_path))
    assert isinstance(outcomes["b"], VolumeError) and str(outcomes["b"]) == (
        f"{path}: was not written by meddanet; name another folder with -o, or replace it with "
        "--overwrite"
    )
    assert path.read_text() == name
    written = {f"{other}.{ending}" for other in "ac" for ending in ("json", "nii.gz")}
    assert {path.name for path in tmp_path.iterdir()} == {name} | written


def test_overwriting_replaces_what_it_writes_and_nothing_else(volumes, tmp_path):
    labels, report, picture = sources(tmp_path, "b.nii.gz", "b.json", "b.png")
    with ReadAhead([case("b")], tmp_path, overwrite=True) as readings:
        ((_, outcome),) = segment_cases(readings, Predictor(), weights="")
    assert json.loads(report.read_text()) == outcome and labels.read_bytes()[:2] == b"\x1f\x8b"
    assert picture.read_text() == "b.png"


def test_labels_that_were_corrected_by_hand_are_kept(volumes, tmp_path):
    """Whatever makes the case be segmented again; untouched ones are replaced."""
    labels = tmp_path / "a.nii.gz"
    run(["a", "b"], Predictor(), tmp_path)
    nib.save(nib.Nifti1Image(np.ones(VOLUME.data.shape[1:], np.uint8), np.eye(4)), labels)
    corrected = labels.read_bytes()
    outcomes = dict(run(["a", "b"], Predictor(), tmp_path))
    assert isinstance(outcomes["b"], dict) and str(outcomes["a"]) == (
        f"{labels}: was changed after meddanet wrote it; name another folder with -o, or replace "
        "it with --overwrite"
    )
    assert labels.read_bytes() == corrected
    with ReadAhead([case("a")], tmp_path, overwrite=True) as readings:
        list(segment_cases(readings, Predictor(), weights=""))
    assert labels.read_bytes() != corrected


def test_an_overwriting_that_fails_makes_nothing_meddanets(volumes, tmp_path, monkeypatch):
    (labels,) = sources(tmp_path, "b.nii.gz")

    def full(*_):
        raise VolumeError("no room")

    monkeypatch.setattr(cohort, "save_volume", full)
    with ReadAhead([case("b")], tmp_path, overwrite=True) as readings:
        list(segment_cases(readings, Predictor(), weights=""))
    monkeypatch.undo()
    monkeypatch.setattr(cases, "load_volume", lambda *_: VOLUME)
    ((_, error),) = run(["b"], Predictor(), tmp_path)
    assert "was not written by meddanet" in str(error) and labels.read_text() == "b.nii.gz"


@pytest.fixture
def once(volumes, tmp_path) -> tuple[Path, dict[str, bytes]]:
    """A folder with the results of a case, and what is in it."""
    out = tmp_path / "out"
    out.mkdir()
    segment_case(case("a"), Predictor(), out, weights="", preview=True)
    return out, contents(out)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("step", range(4))
def test_what_there_was_stays_where_the_disk_is_full(once, monkeypatch, step):
    """Whichever of labels, picture, report and mark has no room."""
    out, before = once
    sync, calls = os.fsync, []

    def full(number):
        calls.append(number)
        if len(calls) > step:
            raise OSError(28, "No space left on device")
        sync(number)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(VolumeError, match="make room on the disk"):
        segment_case(case("a"), Predictor(label=1), out, weights="", preview=True)
    assert contents(out) == before and finished.is_finished(case("a"), out, WITH_PICTURE)


@pytest.fixture(params=[True, False], ids=["over old results", "over none"])
def killed(request, once, tmp_path, monkeypatch) -> list[Path]:
    """The folder before and after each step that puts a file in place."""
    out, (replace, copies) = once[0], (os.replace, [])
    if not request.param:
        shutil.rmtree(out)
        out.mkdir()

    def watched(*paths):
        for act in (lambda: None, lambda: replace(*paths)):
            act()
            copies.append(shutil.copytree(out, tmp_path / f"copy{len(copies)}"))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", watched)
        segment_case(case("a"), Predictor(label=1), out, weights="", preview=True)
    assert len(copies) == 8 and set(contents(out)) == {"a.nii.gz", "a.json", "a.png"}
    return copies


def test_a_run_that_is_killed_while_it_writes_goes_on(killed):
    for index, copy in enumerate(killed):
        # before its mark the old results are all there
        whole = index == 0 and (copy / "a.json").exists()
        assert finished.is_finished(case("a"), copy, WITH_PICTURE) == whole
        segment_case(case("a"), Predictor(label=1), copy, weights="", preview=True)
        # what the killed process had not put in place yet stays beside them
        assert {path.name for path in copy.glob("[!.]*")} == {"a.nii.gz", "a.json", "a.png"}
        assert {path.suffix for path in copy.glob(".*")} <= {".partial"}
        assert (nib.load(copy / "a.nii.gz").get_fdata() == 1).all()


def test_labels_that_were_corrected_after_a_run_was_killed_are_kept(killed):
    for copy in killed:
        labels = copy / "a.nii.gz"
        labels.write_bytes(b"corrected")
        with pytest.raises(VolumeError, match=r"was changed after|was not written by"):
            segment_case(case("a"), Predictor(), copy, weights="", preview=True)
        assert labels.read_bytes() == b"corrected"


class Beside(Predictor):
    """Somebody puts a file of one's own in place while the case is predicted."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def predict(self, volume: Volume) -> Prediction:
        self.path.write_text("mine")
        return super().predict(volume)


def test_a_file_of_others_that_appears_meanwhile_is_kept(volumes, tmp_path):
    path = tmp_path / "a.nii.gz"
    with ReadAhead([case("a")], tmp_path) as readings:
        ((_, error),) = segment_cases(
            readings, Beside(path), asked=finished.Request("", "", {}), weights=""
        )
    assert str(error).startswith(f"{path}: was not written by meddanet")
    assert path.read_text() == "mine" and list(tmp_path.iterdir()) == [path]


def test_results_appear_alone_in_their_folder(volumes, tmp_path, monkeypatch):
    """They wait for another process that is about to write, but not for ever."""
    fcntl = pytest.importorskip("fcntl")
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    labels, free = tmp_path / "a.nii.gz", threading.Event()

    def let_go():
        free.set()
        os.close(handle)

    threading.Timer(0.5, let_go).start()
    segment_case(case("a"), Predictor(), tmp_path, weights="")
    assert free.is_set() and labels.exists()
    monkeypatch.setattr(lock, "_PATIENCE", 0.1)
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    segment_case(case("b"), Predictor(), tmp_path, weights="")
    os.close(handle)
    assert (tmp_path / "b.nii.gz").exists()


class Overtaken(Predictor):
    """Another run writes the case while this one predicts it."""

    def __init__(self, out: Path, label: int, **theirs: object) -> None:
        super().__init__(label=2)
        self.out, self.other, self.theirs = out, Predictor(label=label), theirs

    def predict(self, volume: Volume) -> Prediction:
        segment_case(case(volume.name), self.other, self.out, **self.theirs)
        return super().predict(volume)


@pytest.mark.parametrize(("theirs", "error"), [
    ({"weights": "mine"}, None),
    ({"weights": "others"}, "a: {}/a.json is of weights others, not mine; name another folder"),
    ({"weights": "mine", "window": 40}, "a: {}/a.json is of windows of 40, not of whole slices;"),
])
def test_results_of_another_run_that_appear_meanwhile_stay(volumes, tmp_path, theirs, error):
    """The same ones are the case's; others are its error, and nobody's loss."""
    asked = finished.Request("mine", "", {})
    with ReadAhead([case("a")], tmp_path) as readings:
        overtaken = Overtaken(tmp_path, 1, **theirs)
        ((_, outcome),) = segment_cases(readings, overtaken, asked=asked, weights="mine")
    if error is None:
        assert outcome == json.loads((tmp_path / "a.json").read_text())
    else:
        assert isinstance(outcome, VolumeError)
        assert str(outcome).startswith(error.format(tmp_path))
    assert (nib.load(tmp_path / "a.nii.gz").get_fdata() == 1).all()
    assert {path.name for path in tmp_path.iterdir()} == {"a.nii.gz", "a.json"}


def test_a_case_that_another_run_has_finished_meanwhile_is_not_read(volumes, tmp_path):
    """As in jobs that share a cohort and a folder of results."""
    asked = finished.Request("mine", "", {})

    class Watched(Predictor):
        seen: list[str] = []

        def predict(self, volume: Volume) -> Prediction:
            self.seen.append(volume.name)
            if volume.name == "a":
                segment_case(case("c"), Predictor(label=1), tmp_path, weights="mine")
            return super().predict(volume)

    ask = partial(finished.is_finished, out=tmp_path, asked=asked)
    with ReadAhead([case(name) for name in "abc"], tmp_path, is_finished=ask) as readings:
        outcomes = list(segment_cases(readings, Watched(), asked=asked, weights="mine"))
    assert Watched.seen == ["a", "b"] and len(volumes) == 3
    assert outcomes[2] == (case("c"), json.loads((tmp_path / "c.json").read_text()))
    assert (nib.load(tmp_path / "c.nii.gz").get_fdata() == 1).all()


def test_results_of_another_run_that_are_gone_again_are_that_cases_error(volumes, tmp_path):
    with ReadAhead([case("a"), case("b")], tmp_path, is_finished=lambda case: True) as readings:
        first, second = segment_cases(readings, Predictor(), weights="")
    for found, outcome in (first, second):
        assert str(outcome).startswith(f"{found.name}: another process had finished it, and its")


def test_two_processes_of_one_number_do_not_meet(tmp_path):
    """As in two containers that share a folder."""
    path = tmp_path / "a.json"
    with storage.Staged() as one, storage.Staged() as other:
        one.write(path, b"one")
        other.write(path, b"other")
        one.appear()
        assert path.read_bytes() == b"one"
        other.appear()
    assert path.read_bytes() == b"other" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("changes", [
    {"run": "fast"}, {"run": {"weights": 3}}, {"images_sha256": ["ab"]}, {"modalities": 4},
])
def test_a_report_that_was_spoilt_is_refused(once, changes):
    out, _ = once
    report = json.loads((out / "a.json").read_text())
    (out / "a.json").write_text(json.dumps({**report, **changes}))
    asked = WITH_PICTURE._replace(modalities=MRI)
    unnamed = Case("a", Path("/nowhere/a.nii.gz"), "files")
    with pytest.raises(VolumeError, match=r"^a: .*a\.json is not as meddanet wrote it; name "):
        finished.is_finished(unnamed, out, asked)
