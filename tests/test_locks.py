"""Two processes that want one folder: one run per OUT, and a shared cache that loses nothing."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from meddanet.data import lock as lock_module
from meddanet.data.lock import clear_leftovers, hold
from meddanet.dataset import prepare_dataset
from meddanet.recipe import PhaseConfig, TrainConfig
from meddanet.training import train

pytest.importorskip("fcntl")

TRAIN = """
import json, sys
from meddanet.recipe import AugmentConfig, DecisionConfig, PhaseConfig, TrainConfig
from meddanet.training import train

values = json.loads(sys.argv[1])
values["phases"] = [PhaseConfig(**phase) for phase in values["phases"]]
values["augment"] = AugmentConfig(**values["augment"])
values["decision"] = DecisionConfig(**values["decision"])
train(TrainConfig(**values))
"""

FILL_IN_TWO_HALVES = """
import sys, time
from pathlib import Path
from meddanet import cache as cache_module, dataset
from meddanet.recipe import TrainConfig

data, cache, started, go = map(Path, sys.argv[1:])
cache_case = cache_module._cache_case

def slowly(*arguments):
    started.touch()
    while not go.exists():
        time.sleep(0.01)
    return cache_case(*arguments)

cache_module._cache_case = slowly
dataset.prepare_dataset(TrainConfig(str(data), str(cache.parent), cache=str(cache)))
"""


def wait_for(path: Path, child: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert child.poll() is None and time.monotonic() < deadline, child.communicate()
        time.sleep(0.02)


def test_a_second_run_in_one_folder_is_refused_and_harms_nothing(decathlon, tmp_path):
    run = tmp_path / "run"
    config = TrainConfig(
        str(decathlon), str(run), cache=str(tmp_path / "cache"), window=None, segmenter="unet-12",
        crop_sizes=(16,), baseline=None, threads=1, device="cpu", checkpoint_steps=1,
        validate_every=0, phases=[PhaseConfig("static", 100_000, batch=2)],
    )
    child = subprocess.Popen(
        [sys.executable, "-c", TRAIN, json.dumps(asdict(config))], stderr=subprocess.PIPE
    )
    try:
        wait_for(run / "0-static.pt", child)
        # what the run that lives is about to write
        partial = run / ".model.safetensors.1.partial"
        partial.touch()
        with pytest.raises(ValueError, match=f"^another run is using {run}; .*another out$"):
            train(replace(config, phases=[PhaseConfig("static", 1, batch=2)]))
        assert partial.exists() and child.poll() is None
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    # the system lets go of a killed run's folder, and what it left is cleared
    done = torch.load(run / "0-static.pt", weights_only=True)["progress"]["step"]
    config.phases[0].steps = done + 1
    assert train(config).exists() and not partial.exists()


def test_runs_that_fill_one_cache_lose_no_case(decathlon, tmp_path):
    other, cache = tmp_path / "Task05_Other", tmp_path / "shared" / "cache"
    for kind in ("imagesTr", "labelsTr"):
        (other / kind).mkdir(parents=True)
        for path in (decathlon / kind).iterdir():
            (other / kind / path.name.replace("disc", "other")).symlink_to(path)
    (other / "dataset.json").symlink_to(decathlon / "dataset.json")
    started, go = tmp_path / "started", tmp_path / "go"
    child = subprocess.Popen(
        [sys.executable, "-c", FILL_IN_TWO_HALVES, decathlon, cache, started, go],
        stderr=subprocess.PIPE,
    )
    wait_for(started, child)
    threading.Timer(0.5, go.touch).start()
    with pytest.warns(UserWarning, match=f"{cache}: another run is filling it; waiting"):
        data = prepare_dataset(TrainConfig(str(other), str(tmp_path / "run"), cache=str(cache)))
    _, messages = child.communicate(timeout=120)
    assert child.returncode == 0, messages
    assert len(data.training) + len(data.held_out) == 5
    names = {f"{kind}_{number:03d}" for kind in ("disc", "other") for number in range(5)}
    assert json.loads((cache / "cases.json").read_text())["cases"].keys() == names
    files = {path.name for path in cache.iterdir()} - {"cases.json", "cache.lock"}
    kinds = ("images", "labels", "seen")
    assert files == {f"{name}.{kind}.npy" for name in names for kind in kinds}


def test_only_a_runs_own_leftovers_are_cleared(tmp_path):
    ours = [
        ".config.json.7.partial", ".disc_000.images.npy.0f3.partial", ".0-static.pt.7.partial",
    ]
    others = [
        ".mine.partial", ".thesis.docx.123.partial", "a.json.7.partial", ".a.pt.g.partial",
        ".a.nii.gz.3c.partial",
    ]
    for name in (*ours, *others):
        (tmp_path / name).touch()
    with hold(tmp_path / "run.lock"):
        left = {path.name for path in tmp_path.iterdir()}
    assert left == {*others, "run.lock"}


def test_what_others_may_still_write_is_left(tmp_path):
    """A run beside may be at it; a day later none is."""
    new, old, others = (tmp_path / f".{name}.partial" for name in ("a.nii.gz.1", "b.json.2", "x.y"))
    for path in (new, old, others):
        path.touch()
    for path in (old, others):
        os.utime(path, (0, 0))
    clear_leftovers(tmp_path, days=1)
    assert sorted(tmp_path.iterdir()) == sorted([new, others])


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    left = tmp_path / ".a.1.partial"
    left.touch()
    monkeypatch.setattr(lock_module.fcntl, "flock", unsupported)
    with hold(tmp_path / "run.lock"), hold(tmp_path / "run.lock"):
        assert left.exists()
    monkeypatch.setattr(lock_module, "fcntl", None)
    with hold(tmp_path / "run.lock"), hold(tmp_path / "run.lock", wait=True):
        assert left.exists()


ONE_AT_A_TIME = """
import sys, time
from pathlib import Path
from meddanet.data.lock import alone_in

folder = Path(sys.argv[1])
for _ in range(50):
    with alone_in(folder):
        number = int((folder / "count").read_text())
        time.sleep(0.001)
        (folder / "count").write_text(str(number + 1))
"""


def test_processes_go_one_at_a_time_and_leave_no_file(tmp_path):
    (tmp_path / "count").write_text("0")
    command = [sys.executable, "-c", ONE_AT_A_TIME, str(tmp_path)]
    children = [subprocess.Popen(command) for _ in range(2)]
    assert [child.wait(timeout=120) for child in children] == [0, 0]
    assert (tmp_path / "count").read_text() == "100"
    assert [path.name for path in tmp_path.iterdir()] == ["count"]
