"""The cases of a run are found, checked and read ahead of the work."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from meddanet import cases
from meddanet.cases import ReadAhead, gather_cases, output_folder
from meddanet.data import MODALITIES, Case, VolumeError


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


def touch(folder: Path, *names: str) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return [str(folder / name) for name in names]


@pytest.mark.parametrize("endings", [
    ("-seg", "-t1c", "-t1n", "-t2f", "-t2w"), ("_flair", "_seg", "_t1", "_t1ce", "_t2"),
    ("_0000", "_0001", "_0002"),
])
def test_files_of_one_folder_make_the_cases_of_the_folder(tmp_path, endings):
    """As a shell lists them, in whatever order."""
    names = [f"{case}{ending}.nii" for case in "ab" for ending in endings]
    files = touch(tmp_path / "x", *names)
    expected, none = gather_cases([str(tmp_path / "x")])
    assert not none and [case.name for case in expected] == ["a", "b"]
    assert gather_cases(files) == (expected, [])
    turned, none = gather_cases(files[::-1])
    assert not none and sorted(case.name for case in turned) == ["a", "b"]
    assert {frozenset(case.files.items()) for case in turned} == {
        frozenset(case.files.items()) for case in expected
    }


def test_files_named_one_by_one_are_told_apart(tmp_path):
    files = touch(tmp_path / "x", "a_t1.nii", "a_t1.nii.gz", "b_seg.nii", "scan.nii")
    found, errors = gather_cases([*files, *touch(tmp_path / "y", "a_t2.nii")])
    assert [case.name for case in found] == ["a", "b_seg", "scan"]
    assert [path.name for path in found[0].doubled] == ["a_t1.nii", "a_t1.nii.gz"]
    (error,) = errors
    assert str(error).startswith(f"{tmp_path / 'y'}: case a has the name of the one in ")


def test_the_same_files_count_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = touch(Path("x"), "a_t1.nii", "a_t2.nii", "scan_0000.nii")
    expected, _ = gather_cases(["x"])
    Path("link").symlink_to("x")
    others = ["x", "x/", "link", "x/../x", str(tmp_path / "x"), "link/a_t1.nii"]
    assert gather_cases(["x", *others, *files]) == (expected, [])
    # what was named in part before too
    found, errors = gather_cases([files[0], "link/a_t1.nii", "x"])
    assert not errors and [set(case.files) for case in found] == [{"t1", "t2"}, {"0000"}]


def test_two_processes_try_the_same_output_folder(tmp_path, monkeypatch):
    """Another one takes the probe away between our two steps, as one that clears the folder."""
    touch = Path.touch

    def touch_and_lose(path, **options):
        touch(path, **options)
        path.unlink()

    monkeypatch.setattr(Path, "touch", touch_and_lose)
    assert output_folder(tmp_path / "out").is_dir()


@pytest.fixture
def reading(monkeypatch) -> dict[str, threading.Event]:
    """Tells of every case when its reading begins."""
    begun = {name: threading.Event() for name in "abc"}
    monkeypatch.setattr(cases, "load_volume", lambda case, _: begun[case.name].set())
    monkeypatch.setattr(cases, "image_digests", lambda _: {})
    return begun


def case(name: str) -> Case:
    return Case(name, {"t1": Path(f"/nowhere/{name}_t1.nii.gz")}, "brats2021", ("t1",))


def test_an_output_folder_of_too_long_a_name(tmp_path):
    with pytest.raises(VolumeError, match=r"cannot write there \(File name too long\); name"):
        output_folder(tmp_path / ("n" * 300))


def test_an_output_folder_that_is_a_dead_link(tmp_path):
    (tmp_path / "out").symlink_to("nowhere")
    with pytest.raises(VolumeError, match="/out: is a link that leads nowhere; name another"):
        output_folder(tmp_path / "out")
    assert not (tmp_path / "nowhere").exists()


def test_the_first_case_is_read_at_once_and_the_others_one_ahead(reading, tmp_path):
    with ReadAhead([case(name) for name in "abc"], tmp_path) as readings:
        assert reading["a"].wait(20) and not reading["b"].wait(0.1)
        turns = iter(readings)
        assert next(turns)[0].name == "a"
        assert reading["b"].wait(20) and not reading["c"].wait(0.1)
        assert [found.name for found, _ in turns] == ["b", "c"]
        assert list(readings) == [], "each case once"


def test_an_error_does_not_wait_for_what_is_being_read(tmp_path, monkeypatch):
    """Such as one in the arguments, which is found while the first case is read."""
    found, read = threading.Event(), []
    monkeypatch.setattr(cases, "image_digests", lambda _: {})
    monkeypatch.setattr(cases, "load_volume", lambda *_: read.append(found.wait(20)))
    with pytest.raises(KeyError), ReadAhead([case(name) for name in "ab"], tmp_path) as readings:
        raise KeyError
    found.set()
    (_, reading) = readings._ahead
    assert reading.exception(20) is None and read == [True]


def test_the_command_reads_its_first_case_without_pytorch(tmp_path):
    """Else there would be nothing to read ahead of."""
    for name in MODALITIES:
        image = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
        nib.save(nib.Nifti1Image(image, np.eye(4)), tmp_path / f"a_{name}.nii.gz")
    script = """
import sys
from pathlib import Path
import meddanet.commands.segment
from meddanet.cases import gather_cases, read_case
(case,), _ = gather_cases(sys.argv[1:])
print(read_case(case, Path("absent")).volume.data.shape, "torch" in sys.modules)
"""
    told = subprocess.check_output([sys.executable, "-c", script, str(tmp_path)], text=True)
    assert told == "(4, 3, 4, 5) False\n"
