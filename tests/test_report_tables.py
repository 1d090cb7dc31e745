"""README's and docs' tables are what the committed results give; marks are filled and no more."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

report = pytest.importorskip("report")
committed = pytest.importorskip("committed")
tables = pytest.importorskip("tables")
gpu_tables = pytest.importorskip("gpu_tables")
curves = pytest.importorskip("curves")

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def results(tmp_path) -> committed.Results:
    """A folder of hand-made numbers."""

    def row(dice: float, mac: float) -> dict:
        regions = ("WT", "TC", "ET")
        return {"dice": dict.fromkeys(regions, dice), "hd95_mm": dict.fromkeys(regions, 3.0),
                "mac": mac, "paper": 2 * mac, "scaled_paper": mac / 2}

    def case(dice: float) -> dict:
        decisions = {
            "routes": {"skip": 2, "crop-96": 5, "whole": 2},
            "confusion": [[1, 1, 0], [1, 4, 1], [0, 0, 1]],
            "missed_slices": 1, "skipped": 25, "tumour_voxels": 100,
            "crop_coverage": {"model": 0.5, "image centre": 0.25, "brain centroid": None},
            "num_bits": [{"8": 4, "16": 2}],
        }
        rows = {"S": row(dice, 1e9), "S+Q": row(dice, 1e9), "whole": row(1.0, 4e9)}
        return {"run": "fold0", "rows": rows, "decisions": decisions}

    cases = {"BraTS2021_00002": case(0.75), "BraTS2021_00001": case(0.25)}
    (tmp_path / "brats2021.json").write_text(json.dumps({"cases": cases}))
    return committed.Results(tmp_path)


def test_the_machine_measured_last_is_shown(tmp_path):
    def write(name: str, capability: str = "avx512", **environment) -> None:
        level = {"times": {}, **environment, "case": name}
        path = tmp_path / f"cpu_{name}_{capability}_2threads.json"
        path.write_text(json.dumps({"network a": level}))

    write("z")
    assert committed.Results(tmp_path).networks[0]["case"] == "z"
    write("b", environment={"date": "2026-11-26 12:00:00 UTC"})
    # neither by name nor, without a date, before one that has it
    write("c", environment={"date": "2026-09-30 12:00:00 UTC"})
    # of the same name, but another kind
    write("b", "avx2", environment={"date": "2026-11-28 12:00:00 UTC"})
    assert committed.Results(tmp_path).networks[0]["case"] == "b"
    assert len(committed.Results(tmp_path).networks) == 1
    write("d", "avx2", environment={"date": "2026-11-29 12:00:00 UTC"})
    assert committed.Results(tmp_path, "avx2").networks[0]["case"] == "d"


def test_kernels_of_a_cpu_stand_beside_their_peers(tmp_path):
    path = tmp_path / "cpu_a_avx512_2threads.json"
    path.write_text(json.dumps({"end to end": {}}))
    assert tables.cpu_kernels(committed.Results(tmp_path)) == "None has been measured yet."
    level = {
        "ours": "label_head", "ratios": {"layers": {"wall_ms": 2.0}},
        "providers": {"label_head": {"wall_ms": {"median": 1.5}}, "other": {"failed": "absent"}},
    }
    path.write_text(json.dumps({"end to end": {}, "kernel head": level}))
    found = cells(tables.cpu_kernels(committed.Results(tmp_path)), 2)
    assert found == ["head", "label_head", "1.50", "layers 2.0x; other did not run"]


def test_every_level_tells_when_and_of_what_it_is(tmp_path, monkeypatch):
    volumes = pytest.importorskip("volumes")
    monkeypatch.setattr(volumes, "RESULTS", tmp_path)
    volumes.write_results("end to end", {"case": "a"})
    path = volumes.write_results("network a", {"case": "a"})
    content = json.loads(path.read_text())
    for level in content.values():
        assert level["environment"]["date"] == committed.measured({"": level}) > "2026"
        assert level["environment"]["commit"] and level["environment"]["torch"]
        assert level["case"] == "a"
    capability = level["machine"]["capability"].lower()
    assert committed.Results(tmp_path, capability).speed == content


def cells(table: str, line: int) -> list[str]:
    return [cell.strip() for cell in table.splitlines()[line].strip("|").split("|")]


def test_tables_by_hand(results):
    table = tables.headline(results.accuracy)
    assert cells(table, 0)[0] == "mean of 2 held-out cases"
    # both cases' mean; 2 G as the papers count, half of the true ones at b / 32
    assert cells(table, 2) == ["Med-DANet V2", "0.500", "0.500", "0.500", "1.0", "2.0", "0.5"]
    # float32 is 32 / 32 of the papers' count, whatever the file says
    assert cells(table, 3) == ["whole", "1.000", "1.000", "1.000", "4.0", "8.0", "8.0"]
    assert len(table.splitlines()) == 4, "a row that no case has is left out"
    table = tables.accuracy(results.accuracy)
    assert [cells(table, n)[0] for n in (2, 3, 4)] == ["whole", "S", "S+Q"]
    assert cells(tables.decisions(results.accuracy), 2) == [
        "00001", "1 of 7", "25.0 %", "1 of 2", "50.0 %", "25.0 %", "", "8: 4/16: 2",
    ]
    assert cells(tables.accuracy_cases(results.accuracy), 2)[-1] == "2 skip, 5 crop, 2 whole"
    # two cases alike
    assert cells(tables.confusion(results.accuracy), 3) == ["**crop-96**", "2", "8", "2"]


def test_differences_by_hand():
    def case(run: str, ours: float, plain: float) -> dict:
        rows = {"S+Q": ours, "whole": 0.5, "static": plain}
        return {"run": run, "rows": {
            row: {"dice": dict.fromkeys(("WT", "TC", "ET"), x),
                  "hd95_mm": dict.fromkeys(("WT", "TC", "ET"), 10 * x)} for row, x in rows.items()
        }}

    cases = {"a": case("0", 0.5, 0.5), "b": case("0", 0.7, 0.5), "c": case("1", 0.8, 0.4)}
    table = tables.differences(cases)
    # 0, 20 and 30 points: 16.7 with a deviation of 15.3; folds 10 and 30
    assert cells(table, 2)[:3] == ["whole", "Dice, points", "+16.7 (8.8, 10.0)"]
    # 0, 2 and 4 mm; folds 1 and 4
    assert cells(table, 5)[:3] == ["plain", "HD95, mm", "+2.0 (1.2, 1.5)"]


def test_ablations_by_hand(tmp_path):
    fold = {"dice": {"a": {"WT": 0.5}, "b": {"WT": 0.7}},
            "slice_mega": {"mac": 10.0, "scaled_paper": 4.0}}
    other = {"dice": {"c": {"WT": 0.9}}, "slice_mega": {"mac": 20.0, "scaled_paper": 6.0}}
    seconds = {"0": {"0-static": 9.0}}
    kinds = {"S": {}, "S+Q": {"0": fold, "1": other}, "training CPU seconds": seconds}
    content = {"machine": {}, "results": {"skip-96": kinds}}
    (tmp_path / "policy.json").write_text(json.dumps(content))
    table = tables.ablations(committed.Results(tmp_path))
    assert cells(table, 4) == ["skip-96", "S+Q", "3", "2", "0.7000", "15.00", "5.00"]


def test_only_the_marked_parts_change(results):
    text = "a\n<!-- table: headline -->\nold | text\n<!-- end of table -->\nb <!-- no table -->\n"
    new = report.updated(text, results)
    assert new == text.replace("old | text", tables.headline(results.accuracy))
    assert report.updated(new, results) == new
    with pytest.raises(ValueError, match="table 'other' is unknown, expected one of speed"):
        report.updated(text.replace("headline", "other"), results)
    with pytest.raises(ValueError, match="a table has no <!-- end of table -->"):
        report.updated(text.replace("<!-- end of table -->", ""), results)


def test_the_committed_tables_are_those_of_the_committed_results(tmp_path, monkeypatch):
    """A copy of the documents, made anew without matplotlib, is equal to them."""
    for path in report.documents(ROOT):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(report.BLOCK.sub(rf"<!-- table: \1 -->\n{report.END}", path.read_text()))
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "results").symlink_to(RESULTS)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["report.py", "--tables"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.main() == 0
    without = "import sys; sys.modules['matplotlib'] = None; import report"
    subprocess.run([sys.executable, "-c", without], cwd=ROOT / "benchmarks", check=True)
    marked = 0
    for path in report.documents(ROOT):
        committed = path.read_text()
        assert (tmp_path / path.relative_to(ROOT)).read_text() == committed, (
            f"{path.name} differs: python benchmarks/report.py"
        )
        marked += committed.count("<!-- table: ")
    assert marked >= 8


@pytest.fixture
def unknown_card(tmp_path) -> committed.Results:
    """The committed results, and those of a card whose peaks nobody has entered."""
    timing = pytest.importorskip("timing")
    shutil.copytree(RESULTS, tmp_path / "results")
    device = "NVIDIA GeForce Made-Up 9000"
    name = timing.card_name(device)
    assert name == "made-up-9000" and timing.card_name("NVIDIA H200") == "h200"

    def write(part: str, **content) -> None:
        facts = {"environment": {"device": device, "commit": "abc"}, **content}
        (tmp_path / "results" / f"gpu_{part}_{name}.json").write_text(json.dumps(facts))

    times: dict = {kind: {"median": 0.02} for kind in ("cold_ms", "wall_ms")}
    queued = {**times, "queued": True}
    case = {
        "case": "head", "volume": "phantom", "ours": "label_head", "bytes": 1e6, "operations": 1e9,
        "ratios": {"eager": {"cold_ms": 2.0}},
        "providers": {"label_head": queued, "eager": times, "absent": {"failed": "no such thing"}},
    }
    write("kernels", cases=[case])
    write("network", cases=[{**case, "not_run": {"TensorRT": "not installed"}}])
    launches = json.loads((RESULTS / "gpu_launches_h200_00000.json").read_text())
    write("launches", **{k: v for k, v in launches.items() if k != "environment"})
    return committed.Results(tmp_path / "results")


@pytest.mark.parametrize(("part", "kinds"), [
    ("kernels", ["gpu_kernels", "forward_way"]), ("tune", ["gpu_tune", "gpu_tune_stage"]),
    ("tuned", ["gpu_network_tuned"]),
    ("network", ["gpu_network", "gpu_launches", "cold_start"]),
])
def test_the_gpus_script_names_files_as_they_are_read(part, kinds, tmp_path):
    """A stand-in for Python tells a card's name, and else what it was called with."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\n[ "$1" = -c ] && case $2 in *card_name*) echo made-up-9000; exit;; esac\n'
        'echo "$MEDDANET_RESULTS" "$@"\n'
    )
    python.chmod(0o755)
    case = {"MEDDANET_CASE": "/data/BraTS2021_00000"}
    facts = {**os.environ, "PYTHON": str(python), "OUT": str(tmp_path / "out"), **case}
    run = subprocess.run(
        ["bash", ROOT / "benchmarks" / "gpu.sh", part], env=facts, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    for kind in kinds:
        suffix = "_00000" if kind == "gpu_launches" else ""
        assert str(tmp_path / "out" / f"{kind}_made-up-9000{suffix}.json") in run.stdout


def test_a_card_without_known_peaks_has_its_times_and_no_share(unknown_card):
    found = cells(gpu_tables.gpu_kernels(unknown_card), 2)
    assert found == ["NVIDIA GeForce Made-Up 9000", "head", "20.0", "",
                     "eager ≤ 2.00x; absent did not run"]
    (line, other) = [n for n, row in enumerate(gpu_tables.gpu_network(unknown_card).splitlines())
                     if "Made-Up 9000 | phantom" in row and "0.02" in row]
    # of launches that outlast the queue the time between events is a bound
    network = gpu_tables.gpu_network(unknown_card)
    assert cells(network, line)[3:5] == ["**label_head**", "0.02"]
    assert cells(network, other)[3:5] == ["eager", "≤ 0.02"]
    assert "phantom | head | TensorRT |  |  | not installed |" in network
    assert "Made-Up 9000 | abc" in gpu_tables.gpu_launches(unknown_card)
    assert "Made-Up" not in gpu_tables.gpu_bounds(unknown_card)
    assert gpu_tables.gpu_kernels(committed.Results(RESULTS)) == "None has been measured yet."


def test_files_that_owners_of_cards_send_are_rows_of_one_table(tmp_path):
    """The second card's engine has no recorded plan, and no contestant was compiled there."""

    def write(name: str, device: str, plan: dict, **seconds: float) -> None:
        content = {
            "machine": {"gpus": ["Small", "Large"]}, "device": device, "case": "BraTS2021_00007",
            "plan": plan, "times": {name: {"seconds": found} for name, found in seconds.items()},
        }
        (tmp_path / f"gpu_bench_{name}.json").write_text(json.dumps(content))

    write("a", "cuda:1", {"seconds": 0.0015}, eager=0.6, compiled=0.25, engine=0.005, predict=0.03)
    write("b", "cuda", {}, eager=0.9, engine=0.01, predict=0.04)
    table = gpu_tables.gpu_bench(committed.Results(tmp_path))
    assert cells(table, 0)[5:] == ["eager", "compiled"]
    large, small = cells(table, 2), cells(table, 3)
    assert large == ["Large", "00007", "1.50", "**5.0**", "30", "600 (120x)", "250 (50x)"]
    assert small == ["Small", "00007", "not run", "**10.0**", "40", "900 (90x)", "not run"]


@pytest.mark.parametrize("held", [True, False])
def test_a_queue_holds_if_the_first_launch_is_still_waiting(held, monkeypatch):
    timing = pytest.importorskip("timing")
    calls = []

    class Event:
        def record(self):
            calls.append("record")

        def query(self):
            calls.append("query")
            return not held

    for name, stand_in in {"Event": Event, "_sleep": lambda cycles: calls.append("sleep"),
                           "synchronize": lambda: calls.append("wait")}.items():
        monkeypatch.setattr(timing.torch.cuda, name, stand_in, raising=False)
    assert timing.queue_holds(lambda: calls.append("launch")) is held
    assert calls == ["sleep", "record", "launch", "query", "wait"]


def test_every_figure_that_documents_show_is_there():
    for path in report.documents(ROOT):
        for part in path.read_text().split("](")[1:]:
            target = part.split(")")[0].split("#")[0]
            if target.endswith((".svg", ".png")):
                assert (path.parent / target).is_file(), f"{path.name}: {target} is missing"


def test_figures_are_drawn_from_the_results(unknown_card, tmp_path):
    pytest.importorskip("matplotlib")
    import plots

    drawn = plots.draw(unknown_card, tmp_path)
    assert {path.stem for path in drawn} >= {"time_per_volume", "accuracy_against_cost", "roofline"}
    assert all(path.read_text().rstrip().endswith("</svg>") for path in drawn)


def test_curves_of_several_runs(tmp_path):
    for name, losses in (("fold0", [2.0, 1.0]), ("fold1", [3.0])):
        run = tmp_path / name
        run.mkdir()
        lines = [
            json.dumps({"phase": "static", "step": 50 * (n + 1), "loss": loss, "cpu_seconds": n})
            for n, loss in enumerate(losses)
        ]
        # a killed process leaves half a line
        (run / "log.jsonl").write_text("\n".join([*lines, '{"phase": "sta']))
    looked = {"phase": "static", "step": 50, "dice": {"1": 0.2, "2": None, "3": 0.6}}
    (tmp_path / "fold0" / "validation.jsonl").write_text(json.dumps(looked) + "\n")
    found = curves.curves(tmp_path / "fold0")
    assert found == {"static": {"step": [50, 100], "loss": [2.0, 1.0], "cpu_seconds": [0, 1],
                                "dice": [(50, 0.4)]}}
    assert curves.curves(tmp_path / "fold1")["static"]["loss"] == [3.0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no log.jsonl with steps"):
        curves.curves(tmp_path / "empty")
