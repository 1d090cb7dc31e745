"""Files from outside: nothing of theirs is run, waited for or passed on to a terminal."""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import pytest

from meddanet.arguments import error_line
from meddanet.cases import output_folder
from meddanet.cli import main
from meddanet.data import VolumeError, find_cases
from meddanet.data.lock import hold
from meddanet.data.results import is_result, read_report
from meddanet.data.storage import read_record
from meddanet.evaluation import compare, write_csv
from meddanet.messages import say
from meddanet.pairs import find_pairs
from meddanet.weight_files import check_facts, facts_in

needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
NAMED = '{"class_path": "named_by_a_file.Any"}'


@pytest.mark.parametrize("how", ["config", "augment", "phases"])
def test_nothing_is_imported_that_a_file_names(how, tmp_path, monkeypatch, capsys):
    (tmp_path / "named_by_a_file.py").write_text("class Any: pass")
    monkeypatch.syspath_prepend(tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text(f"augment: {NAMED}")
    value = {
        "config": str(config), "augment": NAMED,
        "phases": f"[{{objective: static, steps: {NAMED}}}]",
    }[how]
    with pytest.raises(SystemExit) as stop:
        main(["train", "--data", "d", "--out", str(tmp_path / "o"), f"--{how}", value])
    assert stop.value.code == 2 and "named_by_a_file" not in sys.modules
    assert capsys.readouterr().err.startswith("meddanet: error: ")


def test_aliases_which_grow_by_the_power_are_not_read(tmp_path, capsys):
    lines = [f"- &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    config = tmp_path / "config.yaml"
    config.write_text("\n".join(["patient:", "- &a0 [1]", *lines]))
    with pytest.raises(SystemExit):
        main(["train", "--data", "d", "--out", str(tmp_path / "o"), "--config", str(config)])
    assert "aliases (*name) are not read" in capsys.readouterr().err


@pytest.mark.parametrize(("phase", "message"), [
    ("{objective: [1], steps: 1}", "phases.0.objective is [1], expected a name"),
    ("{objective: joint, steps: 1, parts: 5}", "phases.0.parts is 5, expected a list"),
])
def test_phases_of_other_types(phase, message, tmp_path, capsys):
    arguments = ["train", "--data", "d", "--out", str(tmp_path), "--phases", f"[{phase}]"]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@needs_pipes
@pytest.mark.parametrize("name", ["a.json", ".a.nii.gz.unfinished"])
def test_a_pipe_that_nobody_writes_to_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    assert not is_result(tmp_path / "a.nii.gz")
    with pytest.raises(OSError, match="is no regular file"):
        read_record(tmp_path / name, "remove it")
    with pytest.raises(OSError, match="is no regular file"):
        hold(tmp_path / name)


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="there is no endless file here")
def test_reports_without_an_end_are_none(tmp_path):
    (tmp_path / "a.json").symlink_to("/dev/zero")
    with open(tmp_path / "b.json", "wb") as file:
        file.truncate(1 << 40)
    assert read_report(tmp_path / "a.json") == read_report(tmp_path / "b.json") == {}


def test_json_that_is_nested_too_deeply_names_its_file(tmp_path):
    deep = "[" * 100_000
    (tmp_path / "p_0000.nii.gz").touch()
    (tmp_path / "dataset.json").write_text('{"channel_names": ' + deep)
    with pytest.raises(VolumeError, match="dataset.json: holds no channel order"):
        find_cases(tmp_path)
    (tmp_path / "cases.json").write_text(deep)
    with pytest.raises(VolumeError, match="cases.json: is damaged .*; delete it"):
        read_record(tmp_path / "cases.json", "delete it")

    class Weights:
        def metadata(self) -> dict[str, str]:
            return {"canvas": deep}

    with pytest.raises(ValueError, match="w.safetensors: is not a meddanet weights file"):
        facts_in(Weights(), tmp_path / "w.safetensors")


def test_a_label_convention_is_a_name():
    with pytest.raises(ValueError, match="label_convention is {'a': 1}, expected a name"):
        check_facts({"label_convention": {"a": 1}})


def test_control_characters_are_shown_as_such(capsys):
    say("a\x1b[2K\nmean of 9 of 9 cases")
    assert capsys.readouterr().out == "a\\x1b[2K\\nmean of 9 of 9 cases\n"
    assert error_line("\x1b]0;t\x07 \x9b \u202e é") == (
        "meddanet: error: \\x1b]0;t\\x07 \\x9b \\u202e é"
    )
    assert error_line(MemoryError()) == "meddanet: error: not enough memory"


def test_a_spreadsheet_takes_no_name_for_a_formula(tmp_path):
    table = {"=SUM(1)": {"dice": {"WT": 0.5}}}
    write_csv(table, tmp_path / "t.csv", missing=["@a", "b"])
    rows = (tmp_path / "t.csv").read_text().splitlines()
    assert rows[1:] == ["'=SUM(1),0.5", "'@a,", "b,"]


def test_a_report_cannot_make_a_prediction_perfect(scans, tmp_path):
    """By regions that are in neither file."""
    for folder, value in (("p", 77), ("r", 4)):
        labels = np.zeros(scans.SHAPE, np.uint8)
        labels[1, 1, 1] = value
        scans.write(tmp_path / folder / "c.nii.gz", labels)
    report = {
        "case": "c", "versions": {"meddanet": "0.1.0"}, "label_convention": "values",
        "label_values": {"WT": 101, "TC": 102},
    }
    (tmp_path / "p" / "c.json").write_text(json.dumps(report))
    (pair,) = find_pairs(tmp_path / "p", tmp_path / "r")
    with pytest.raises(VolumeError, match=r"labels 101, 102, the reference has others \(4\)"):
        compare(pair)


def test_the_trial_of_an_output_folder_follows_no_link(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".meddanet-write-test").symlink_to(tmp_path / "elsewhere")
    output_folder(tmp_path / "out")
    assert not (tmp_path / "elsewhere").exists()
