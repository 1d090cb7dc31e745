"""Two gloo processes against one: equal gradients and weights, and what happens when one dies."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from meddanet.batches import Batches
from meddanet.build import build_med_danet_v2
from meddanet.cli import main
from meddanet.data.lock import hold
from meddanet.data.slices import read_cache
from meddanet.dataset import prepare_dataset
from meddanet.layers import set_quantization
from meddanet.monitor import Monitor
from meddanet.networks.decision import ShuffleNetV2
from meddanet.objectives import OBJECTIVES
from meddanet.phase import run_phase
from meddanet.recipe import PhaseConfig, TrainConfig

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

# a thread of gloo's that lets go of a tensor while Python ends aborts the process now and then
THREADS = """
from pathlib import Path

def threads():
    names = []
    for task in Path("/proc/self/task").glob("*/comm"):
        try:
            names.append(task.read_text())
        except OSError:  # it has just ended
            pass
    return [name for name in names if "gloo" in name]
"""
NONE_LEFT = """
assert inside and not threads(), (inside, threads())
"""

TWO_RUNS = """
import sys
sys.path.insert(0, {tests!r})
from test_distributed import learning_run, exact_run
from meddanet.distributed import process_group

with process_group("cpu"):
    exact_run(Path(sys.argv[1]), Path(sys.argv[2]))
    learning_run(Path(sys.argv[1]), Path(sys.argv[2]))
    inside = threads()  # by now they have named themselves
"""

# as on two machines of which each has its own disk
TWO_DISKS = """
import sys
sys.path.insert(0, {tests!r})
from test_distributed import static_run
from meddanet.dataset import prepare_dataset
from meddanet.distributed import process_group, rank
from meddanet.recipe import TrainConfig

data, cache, out = map(Path, sys.argv[1:])
messages = []
with process_group("cpu"):
    number = rank()
    own = out / f"disk-{{number}}"
    for task in (
        lambda: prepare_dataset(TrainConfig(str(data), str(own), cache=str(own / "cache"))),
        lambda: static_run(cache, own, 3),
    ):
        try:
            task()
        except ValueError as error:
            messages.append(str(error))
    inside = threads()
(out / f"messages-{{number}}").write_text("\\n".join(messages))
"""

# what the first process does alone fails or kills it
FIRST_FAILS = """
import os, sys, time
from pathlib import Path
from meddanet.distributed import first_alone, process_group
from meddanet.run_folder import hold_run

task, out = sys.argv[1], Path(sys.argv[2])
number, began = os.environ["RANK"], time.monotonic()

def work():
    if task == "lock":
        with hold_run(out / "run"):
            return
    with first_alone() as first:
        if first:
            time.sleep(1)
            if task == "kill":
                os.kill(os.getpid(), 9)
            raise ValueError("the first process cannot")

message = "nothing"
try:
    with process_group("cpu"):
        work()
except (ValueError, ConnectionError) as error:
    message = f"{type(error).__name__}: {error}"
(out / f"message-{number}").write_text(message)
assert time.monotonic() - began < 20
"""

ONE_DIES = """
import os, sys
from pathlib import Path
from meddanet.cli import main

Path(sys.argv[1], "pid-" + os.environ["RANK"]).write_text(str(os.getpid()))
sys.exit(main(sys.argv[2:]))
"""


def batches_of(cache, **options) -> Batches:
    cases = [read_cache(f"disc_{number:03d}", cache) for number in (1, 2, 3, 4)]
    return Batches(cases, window=None, canvas=(32, 32), **options)


def tiny_model():
    torch.manual_seed(3)
    with pytest.MonkeyPatch.context() as patch:
        # the decision networks' further units are alike
        patch.setattr(ShuffleNetV2, "repeats", (2, 2, 1))
        model = build_med_danet_v2("unet-12", 1, 3, crop_sizes=(16,))
    model.segmenter.dropout.p = 0.0
    return model


def exact_run(cache, out) -> None:
    """Three steps of everything, both branches, in float64 with frozen norms."""
    torch.set_num_threads(1)
    model = tiny_model().double()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True, module=module: module
    set_quantization(model, quantize=True, update_range=True)
    phase = PhaseConfig("quantised", 3, batch=4)
    batches = batches_of(cache, dtype=torch.float64)
    run_phase(model, OBJECTIVES["quantised"], phase, batches, out / "exact.pt", Monitor(out))


def learning_run(cache, out) -> None:
    """Thirty steps of an ordinary phase."""
    model = tiny_model()
    set_quantization(model, quantize=False, update_range=True)
    phase = PhaseConfig("static", 30, batch=8, learning_rate=3e-3)
    run_phase(
        model, OBJECTIVES["static"], phase, batches_of(cache), out / "learning.pt", Monitor(out)
    )


def static_run(cache, out, steps: int) -> None:
    phase = PhaseConfig("static", steps, batch=2)
    model = tiny_model()
    set_quantization(model, quantize=False, update_range=True)
    run_phase(
        model, OBJECTIVES["static"], phase, batches_of(cache), out / "static.pt", Monitor(out)
    )


@pytest.fixture
def cache(decathlon, tmp_path):
    folder = tmp_path / "cache"
    prepare_dataset(TrainConfig(str(decathlon), str(tmp_path / "run"), cache=str(folder)))
    return folder


def script(tmp_path, text: str) -> str:
    path = tmp_path / "script.py"
    path.write_text(text)
    return str(path)


def test_two_processes_make_the_steps_of_one(cache, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    text = THREADS + TWO_RUNS.format(tests=os.path.dirname(__file__)) + NONE_LEFT
    done = subprocess.run(
        [*LAUNCH, script(tmp_path, text), str(cache), str(two)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    exact_run(cache, one)
    expected, actual = (torch.load(f / "exact.pt", weights_only=True) for f in (one, two))
    before = tiny_model().state_dict()
    moved = [n for n, v in expected["model"].items() if not torch.equal(v, before[n].to(v))]
    assert len(moved) > 100
    for name, value in expected["model"].items():
        torch.testing.assert_close(actual["model"][name], value, msg=name)
    for name, value in expected["input_amax"].items():
        torch.testing.assert_close(actual["input_amax"][name], value, msg=name)
    states = expected["optimizer"]["state"]
    assert states.keys() == actual["optimizer"]["state"].keys() and len(states) > 100
    for number, state in states.items():
        # the running mean of the gradients: nothing but sums of them
        largest = state["exp_avg"].abs().max().item()
        torch.testing.assert_close(
            actual["optimizer"]["state"][number]["exp_avg"], state["exp_avg"],
            rtol=1e-7, atol=1e-9 * largest + 1e-15,
        )
    learning_run(cache, one)
    alone, together = (
        torch.load(f / "learning.pt", weights_only=True)["progress"]["smooth"] for f in (one, two)
    )
    assert together == pytest.approx(alone, rel=0.1)
    # untrained: ln 3 + about 0.75
    assert max(alone, together) < 1.7


@pytest.mark.long
def test_processes_that_share_no_disk_are_told_so(decathlon, cache, tmp_path):
    for number in range(2):
        (tmp_path / f"disk-{number}").mkdir()
    static_run(cache, tmp_path / "disk-0", 2)
    text = THREADS + TWO_DISKS.format(tests=os.path.dirname(__file__)) + NONE_LEFT
    done = subprocess.run(
        [*LAUNCH, script(tmp_path, text), str(decathlon), str(cache), str(tmp_path)],
        capture_output=True, text=True, timeout=120,
    )
    assert done.returncode == 0, done.stderr
    first, second = (
        (tmp_path / f"messages-{number}").read_text().splitlines() for number in range(2)
    )
    shared = "out and cache have to lie on a disk that all machines share"
    # the first process fills its cache, the second finds none
    assert second[0] == (
        f"{tmp_path}/disk-1/cache: lacks cases for process 1 that process 0 has cached; {shared}"
    )
    for number, messages in enumerate((first, second)):
        assert messages[-1] == (
            f"{tmp_path}/disk-{number}/static.pt: has 2 steps done for process 0 and 0 for "
            f"process 1; {shared}"
        )
    assert (len(first), len(second)) == (1, 2)


@pytest.mark.parametrize(("name", "value", "told"), [
    ("WORLD_SIZE", "two", "two"), ("RANK", "foo", "foo"), ("RANK", "-1", "-1"),
    ("RANK", None, "not set"), ("MASTER_PORT", "http", "http"),
])
def test_what_the_environment_says_wrong_is_named(name, value, told, tmp_path, monkeypatch, capsys):
    right = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for variable, content in {**right, name: value}.items():
        if content is None:
            monkeypatch.delenv(variable, raising=False)
        else:
            monkeypatch.setenv(variable, content)
    out = tmp_path / "run"
    assert main(["train", "--data", str(tmp_path), "--out", str(out), "--device", "cpu"]) == 1
    assert capsys.readouterr().err == (
        f"meddanet: error: environment variable {name} is {told}, expected a whole number, as "
        "torchrun sets it; unset WORLD_SIZE and RANK to train as one process\n"
    )
    assert not out.exists()


@pytest.mark.parametrize("task", [
    "kill", pytest.param("raise", marks=pytest.mark.long),
    pytest.param("lock", marks=pytest.mark.long),
])
def test_a_first_process_that_fails_alone_ends_the_others_too(tmp_path, task):
    """Under plain processes, not torchrun, which would kill those that wait for ever."""
    path = script(tmp_path, FIRST_FAILS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    # torchrun's agent keeps the store, which outlives the first process
    store = torch.distributed.TCPStore("127.0.0.1", int(port), 3, True, wait_for_workers=False)
    with hold(tmp_path / "run" / "run.lock"):
        children = [
            subprocess.Popen(
                [sys.executable, path, task, str(tmp_path)], stderr=subprocess.PIPE, text=True,
                env={**os.environ, **shared, "RANK": str(number),
                     "TORCHELASTIC_USE_AGENT_STORE": "True"},
            )
            for number in range(2)
        ]
        try:
            errors = [child.communicate(timeout=60)[1] for child in children]
        finally:
            for child in children:
                child.kill()
    del store
    assert [c.returncode for c in children] == [-9 if task == "kill" else 0, 0], errors
    other = (tmp_path / "message-1").read_text()
    if task == "kill":
        assert other.startswith("ConnectionError: process 1 of 2 stopped because another one ended")
        return
    causes = {
        "raise": "ValueError: the first process cannot",
        "lock": f"ValueError: another run is using {tmp_path}/run; wait until it ends, or name "
        "another out",
    }
    assert (tmp_path / "message-0").read_text() == causes[task]
    assert other == (
        "ConnectionError: process 1 of 2 stopped because process 0 failed; mend what that one "
        "names, then give the same command again"
    )


@pytest.mark.long
def test_one_killed_process_stops_the_others_and_the_run_goes_on(decathlon, tmp_path):
    run = tmp_path / "run"
    arguments = [
        "train", "--data", str(decathlon), "--out", str(run), "--window", "null",
        "--segmenter", "unet-12", "--crop_sizes", "[16]", "--baseline", "null",
        "--checkpoint_steps", "1", "--validate_every", "0", "--device", "cpu", "--threads", "1",
    ]

    def phases(steps: int) -> list[str]:
        return ["--phases", json.dumps([vars(PhaseConfig("static", steps, batch=2))])]

    command = [*LAUNCH, script(tmp_path, ONE_DIES), str(tmp_path), *arguments]
    process = subprocess.Popen(
        [*command, *phases(100_000)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (run / "0-static.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGKILL)
    output, messages = process.communicate(timeout=120)
    assert process.returncode != 0 and not output
    ours = [line for line in messages.splitlines() if line.startswith("meddanet: error")]
    assert len(ours) == 1 and "process 0 of 2 stopped because another one ended" in ours[0]
    assert "give the same command again" in ours[0]
    done = torch.load(run / "0-static.pt", weights_only=True)["progress"]["step"]
    again = subprocess.run([*command, *phases(done + 2)], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert again.stdout == f"{run / 'model.safetensors'}\n"
    assert torch.load(run / "0-static.pt", weights_only=True)["progress"]["step"] == done + 2
    other = subprocess.run([*command, *phases(done), "--seed", "1"], capture_output=True, text=True)
    assert other.returncode != 0 and "config.json: seed is 0 in the run that" in other.stderr
    # which the same command again would not cure
    assert "stopped because another one ended" not in other.stderr
