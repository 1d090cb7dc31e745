"""The command that runs a list of configurations, on a task of seconds."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from meddanet.arguments import command_parser, train_config
from meddanet.build import build_segmenter
from meddanet.cost import count_macs
from meddanet.recipe import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_is_one(file):
    options = command_parser().parse_args(
        ["train", "--config", str(file), "--data", "a", "--out", "b"]
    )
    config = train_config(options["train"])
    assert config != TrainConfig("a", "b") or file.stem in ("policy-96", "quantisation-8-16",
                                                            "backbone-unet-16")


def test_a_list_of_runs_makes_a_table(decathlon, tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text("""
window: null
segmenter: unet-12
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
    command = [
        sys.executable, str(ROOT / "benchmarks" / "ablations.py"), str(decathlon),
        str(tmp_path / "out"), str(tmp_path / "policy-16.yaml"), str(tmp_path / "policy-24.yaml"),
        "--base", str(base), "--json", str(tmp_path / "r.json"), "--table", str(tmp_path / "t.md"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    rows = results["policy-16"]
    assert list(rows) == ["static", "S", "Q", "S+Q"] and set(rows["S"]) == {"0"}
    (held_out,) = rows["static"]["0"]["dice"]
    assert held_out == "disc_000"
    assert set(rows["S"]["0"]["dice"][held_out]) == {"class 1", "class 2"}
    static = count_macs(build_segmenter("unet-12", 1, 3), (1, 1, 32, 32)) / 1e6
    assert rows["static"]["0"]["slice_mega"]["mac"] == pytest.approx(static, abs=1e-3)
    assert rows["Q"]["0"]["routes"] == {"skip": 0, "crop-16": 0, "whole": 5}
    assert sum(rows["S+Q"]["0"]["routes"].values()) == 5
    costs = [rows[row]["0"]["slice_mega"] for row in rows]
    assert np.all([cost["scaled_paper"] > 0 for cost in costs])
    # 8 or 16 bit of 32 in the stages, all the rest in full
    assert costs[2]["scaled_paper"] < costs[0]["scaled_paper"]
    table = (tmp_path / "t.md").read_text().splitlines()
    assert len(table) == 2 + 8 and table[2].startswith("| policy-16 | static | 1 |")
