"""The cases of a run are found, checked and read ahead of the work."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from meddanet import cases
from meddanet.cases import ReadAhead, gather_cases, output_folder
from meddanet.data import Case


def test_gathering_tells_what_it_leaves_out(tmp_path):
    for name in ("a_t1.nii", "scan.nii"):
        (tmp_path / name).touch()
    found, (error,) = gather_cases([str(tmp_path)])
    assert [case.name for case in found] == ["a"]
    assert str(error).startswith(f"{tmp_path}: 1 left out, NIfTI files that belong to no case (sca")


def test_an_existing_path_is_no_named_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("site=A").mkdir()
    Path("site=A/a_t1.nii").touch()
    (found,), errors = gather_cases(["site=A"])
    assert found.files == {"t1": Path("site=A/a_t1.nii")} and not errors


def test_two_processes_try_the_same_output_folder(tmp_path, monkeypatch):
    """The other one takes its probe away between our two steps."""
    touch = Path.touch

    def touch_and_lose(path, *arguments):
        touch(path, *arguments)
        path.unlink()

    monkeypatch.setattr(Path, "touch", touch_and_lose)
    assert output_folder(tmp_path / "out").is_dir()


@pytest.fixture
def reading(monkeypatch) -> dict[str, threading.Event]:
    """Tells of every case when its reading begins."""
    begun = {name: threading.Event() for name in "abc"}
    monkeypatch.setattr(cases, "load_volume", lambda case, _: begun[case.name].set())
    return begun


def case(name: str) -> Case:
    return Case(name, {"t1": Path(f"/nowhere/{name}_t1.nii.gz")}, "brats2021", ("t1",))


def test_the_first_case_is_read_at_once_and_the_others_one_ahead(reading, tmp_path):
    with ReadAhead([case(name) for name in "abc"], tmp_path) as readings:
        assert reading["a"].wait(20) and not reading["b"].wait(0.1)
        turns = iter(readings)
        assert next(turns)[0].name == "a"
        assert reading["b"].wait(20) and not reading["c"].wait(0.1)
        assert [found.name for found, _ in turns] == ["b", "c"]
        assert list(readings) == [], "each case once"


def test_what_is_being_read_is_waited_for(tmp_path, monkeypatch):
    """Also where an error ends the run before anybody has asked for the case."""
    begun, ended = threading.Event(), threading.Event()

    def load(*_):
        begun.set()
        time.sleep(0.05)
        ended.set()

    monkeypatch.setattr(cases, "load_volume", load)
    with pytest.raises(KeyError), ReadAhead([case("a")], tmp_path):
        assert begun.wait(20)
        raise KeyError
    assert ended.is_set()


def test_cases_are_read_without_pytorch():
    """Else there would be nothing to read ahead of."""
    script = "import sys, meddanet.cases; print('torch' in sys.modules)"
    told = subprocess.check_output([sys.executable, "-c", script], text=True)
    assert told == "False\n"
