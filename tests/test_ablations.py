"""The command that runs a list of configurations, on a task of seconds."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from meddanet.arguments import parse_command, train_config
from meddanet.build import build_segmenter
from meddanet.cost import count_macs
from meddanet.recipe import PhaseConfig, TrainConfig
from meddanet.weights import load_model

pytestmark = pytest.mark.usefixtures("few_units")

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("no benchmarks here: an sdist has none", allow_module_level=True)

import ablations  # noqa: E402

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_is_one(file):
    """Its phases are those of the file, whatever the defaults have in their place."""
    options = parse_command(["train", "--config", str(file), "--data", "a", "--out", "b"])
    config = train_config(options["train"])
    content = yaml.safe_load(file.read_text())
    for name in ("phases", "baseline"):
        if written := content.get(name):
            phases = written if isinstance(written, list) else [written]
            found = config.phases if name == "phases" else [config.baseline]
            assert found == [PhaseConfig(**_numbers(phase)) for phase in phases]
    assert config != TrainConfig("a", "b") or file.stem in ("policy-96", "quantisation-8-16",
                                                            "backbone-unet-16")


@pytest.fixture
def run(decathlon, tmp_path, monkeypatch) -> Callable[..., None]:
    """The command, on the task, into tmp_path / "out"."""

    def call(*arguments: str | Path) -> None:
        command = ["ablations.py", decathlon, tmp_path / "out", *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        ablations.main()

    return call


def _numbers(phase):
    """YAML 1.1 takes 1e-3 for a text."""
    return {k: float(v) if k == "learning_rate" else v for k, v in phase.items()}


def test_a_list_of_runs_makes_a_table(run, tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text("""
window: null
segmenter: unet-4
validate_every: 0
device: cpu
threads: 1
phases:
- {objective: segmenter, steps: 2, batch: 2}
- {objective: quantised, steps: 1, batch: 2}
baseline: {objective: static, steps: 1, batch: 2}
""")
    for size in (16, 24):
        (tmp_path / f"policy-{size}.yaml").write_text(f"crop_sizes: [{size}]")
    run(
        tmp_path / "policy-16.yaml", tmp_path / "policy-24.yaml", "--base", base,
        "--json", tmp_path / "r.json", "--table", tmp_path / "t.md",
    )
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    rows = results["policy-16"]
    assert list(rows) == ["static", "S", "Q", "S+Q", "training CPU seconds"]
    assert set(rows["S"]) == {"0"}
    (held_out,) = rows["static"]["0"]["dice"]
    assert held_out == "disc_000"
    assert set(rows["S"]["0"]["dice"][held_out]) == {"class 1", "class 2"}
    static = count_macs(build_segmenter("unet-4", 1, 3), (1, 1, 32, 32)) / 1e6
    assert rows["static"]["0"]["slice_mega"]["mac"] == pytest.approx(static, abs=1e-3)
    assert rows["Q"]["0"]["routes"] == {"skip": 0, "crop-16": 0, "whole": 5}
    assert sum(rows["S+Q"]["0"]["routes"].values()) == 5
    costs = [rows[row]["0"]["slice_mega"] for row in list(rows)[:4]]
    assert np.all([cost["scaled_paper"] > 0 for cost in costs])
    # 8 or 16 bit of 32 in the stages, all the rest in full
    assert costs[2]["scaled_paper"] < costs[0]["scaled_paper"]
    table = (tmp_path / "t.md").read_text().splitlines()
    assert len(table) == 2 + 8 and table[2].startswith("| policy-16 | static | 1 |")


def test_runs_start_from_another_configuration(run, tmp_path):
    """The second list starts from the first one's weights; nothing but its selectors is trained."""
    base = {
        "window": None, "segmenter": "unet-4", "crop_sizes": [16], "validate_every": 0,
        "device": "cpu", "threads": 1, "baseline": None,
    }
    parts = {"first": ["segmenter"], "second": ["bit_selectors"]}
    for name, trained in parts.items():
        phase = {"objective": "quantised", "steps": 1, "batch": 2, "parts": trained}
        content = {**base, "phases": [phase]}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(content))
        start = [] if name == "first" else ["--start", "first"]
        run(tmp_path / f"{name}.yaml", *start)
    first, second = (
        load_model(tmp_path / "out" / name / "fold0" / "model.safetensors").segmenter.state_dict()
        for name in parts
    )
    assert all(torch.equal(first[name], second[name]) for name in first if "weight" in name)


def test_what_fails_leaves_the_others_their_rows(run, tmp_path, capsys):
    content = {"window": None, "segmenter": "unet-4", "crop_sizes": [16], "validate_every": 0,
               "device": "cpu", "threads": 1, "baseline": None,
               "phases": [{"objective": "segmenter", "steps": 1, "batch": 2}]}
    for name, changed in (("good", {}), ("bad", {"crop_sizes": [20]}), ("better", {})):
        (tmp_path / f"{name}.yaml").write_text(json.dumps({**content, **changed}))
    files = [tmp_path / f"{name}.yaml" for name in ("good", "bad", "better")]
    with pytest.raises(SystemExit) as stopped:
        run(*files, "--json", tmp_path / "r.json")
    told = "1 runs failed: bad, fold 0: crop_sizes must ascend and be multiples"
    assert str(stopped.value).startswith(told)
    assert list(json.loads((tmp_path / "r.json").read_text())["results"]) == ["good", "better"]
    with pytest.raises(SystemExit) as stopped:
        run(*files, "--json", tmp_path / "nowhere" / "r.json")
    assert stopped.value.code == 2 and "nowhere: is no folder" in capsys.readouterr().err


def test_a_run_of_v1_scores_its_members_and_its_decisions(run, tmp_path):
    config = tmp_path / "v1.yaml"
    config.write_text("""
window: null
bank: [unet-2, unet-4]
validate_every: 0
device: cpu
threads: 1
phases:
- {objective: bank, steps: 2, batch: 2, stay: [0.5, 1.0]}
- {objective: decision, steps: 2, batch: 2, windows: false}
baseline: null
""")
    run(config, "--json", tmp_path / "r.json")
    rows = json.loads((tmp_path / "r.json").read_text())["results"]["v1"]
    assert set(rows.pop("training CPU seconds")["0"]) == {"0-bank", "1-decision"}
    assert list(rows) == ["M1", "M2", "decided", "skips", "oracle"]
    for name, member in (("M1", "unet-2"), ("M2", "unet-4")):
        macs = count_macs(build_segmenter(member, 1, 3), (1, 1, 32, 32)) / 1e6
        # every slice is run, those without signal too; a decision is counted with it
        assert rows[name]["0"]["slice_mega"]["mac"] > macs
        assert rows[name]["0"]["routes"] == {"skip": 0, "M1": 0, "M2": 0, name: 5}
    truth = np.array(rows["oracle"]["0"]["confusion"])
    assert np.array_equal(truth, np.diag(np.diag(truth))) and truth.sum() == 5
    assert rows["skips"]["0"]["routes"]["M1"] == 0
    weights = load_model(tmp_path / "out" / "v1" / "fold0" / "model.safetensors")
    assert sum(weights.metadata["decision_labels"].values()) == 4
