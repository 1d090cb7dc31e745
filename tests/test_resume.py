"""A run that was stopped, anywhere and by anything, ends in the same bits as one that was not."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from meddanet import phase as phase_module
from meddanet.batches import Batches
from meddanet.build import build_med_danet_v2, build_segmenter
from meddanet.checkpoint import Progress, load_checkpoint, save_checkpoint
from meddanet.data import VolumeError
from meddanet.data.slices import read_cache
from meddanet.dataset import prepare_dataset
from meddanet.engine import compile_engine
from meddanet.monitor import Monitor
from meddanet.networks.decision import ShuffleNetV2
from meddanet.objectives import OBJECTIVES, Objective
from meddanet.phase import phase_share, run_phase, schedule
from meddanet.recipe import PhaseConfig, TrainConfig
from meddanet.training import compile_parts, train
from meddanet.weights import load_model

pytestmark = pytest.mark.usefixtures("few_units")

KILLED_IN_ITS_FOURTH_CHECKPOINT = """
import os, signal, sys, json
from meddanet.networks.decision import ShuffleNetV2
from meddanet.recipe import AugmentConfig, DecisionConfig, PhaseConfig, TrainConfig
from meddanet.training import train

sync, written = os.fsync, 0

def fsync(descriptor):
    global written
    size = os.fstat(descriptor).st_size
    written += size > 100_000  # checkpoints, not tables
    if written == 4:
        os.ftruncate(descriptor, size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    sync(descriptor)

os.fsync = fsync
values, ShuffleNetV2.repeats = map(json.loads, sys.argv[1:])
values["phases"] = [PhaseConfig(**phase) for phase in values["phases"]]
values["augment"] = AugmentConfig(**values["augment"])
values["decision"] = DecisionConfig(**values["decision"])
train(TrainConfig(**values))
"""


@pytest.fixture
def config(decathlon, tmp_path) -> TrainConfig:
    """Two steps that learn ranges, two with the Gumbel choice, a checkpoint after each."""
    return TrainConfig(
        str(decathlon), str(tmp_path / "run"), cache=str(tmp_path / "cache"), window=None,
        segmenter="unet-4", crop_sizes=(16,), baseline=None, threads=1, device="cpu",
        checkpoint_steps=1, validate_every=0,
        phases=[
            PhaseConfig("quantised", 2, batch=2, autocast="bfloat16"),
            PhaseConfig("joint", 2, batch=2, arithmetic="learning"),
        ],
    )


def result(folder) -> dict[str, torch.Tensor]:
    content = torch.load(folder / "1-joint.pt", weights_only=True)
    optimizer = {
        f"{number}.{name}": value
        for number, state in content["optimizer"]["state"].items() for name, value in state.items()
    }
    ranges = {f"range.{name}": value for name, value in content["input_amax"].items()}
    return {**content["model"], **ranges, **optimizer}


def log_of(folder) -> list[dict]:
    """What a run noted of its phases, but the time they took."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").open()]
    return [{key: value for key, value in row.items() if key != "cpu_seconds"} for row in rows]


def assert_same_bits(one, other):
    assert one.keys() == other.keys() and len(one) > 100
    for name in one:
        assert torch.equal(one[name], other[name]), name


def kill_in_a_write(config):
    """Trains in a process that dies with half of its last checkpoint written."""
    child = subprocess.run(
        [
            sys.executable, "-c", KILLED_IN_ITS_FOURTH_CHECKPOINT, json.dumps(asdict(config)),
            json.dumps(ShuffleNetV2.repeats),
        ],
        capture_output=True, text=True,
    )
    assert child.returncode == -9, child.stderr
    run = Path(config.out)
    assert len(list(run.glob(".*.partial"))) == 1
    # the third is there, whole: one step of the second phase
    assert torch.load(run / "1-joint.pt", weights_only=True)["progress"]["step"] == 1


@pytest.fixture
def steps(monkeypatch) -> SimpleNamespace:
    """Counts the steps "made"; those whose numbers are in "broken" are interrupted."""
    make_step, counted = phase_module._make_step, SimpleNamespace(made=0, broken=())

    def step(*args):
        counted.made += 1
        if counted.made in counted.broken:
            raise KeyboardInterrupt
        return make_step(*args)

    monkeypatch.setattr(phase_module, "_make_step", step)
    return counted


def test_a_stopped_run_goes_on_bit_for_bit(config, tmp_path, steps):
    """In the middle of a write, and between any two steps; and makes no step twice."""
    straight, killed, interrupted = (
        replace(config, out=str(tmp_path / name)) for name in ("straight", "killed", "interrupted")
    )
    train(straight)
    kill_in_a_write(killed)
    steps.made, steps.broken = 0, (2, 5)
    for _ in steps.broken:
        with pytest.raises(KeyboardInterrupt):
            train(interrupted)
    expected, log = result(tmp_path / "straight"), log_of(tmp_path / "straight")
    assert len(log) == 2
    for stopped in (killed, interrupted):
        steps.made, steps.broken = 0, ()
        train(stopped)
        assert steps.made == 1
        out = Path(stopped.out)
        assert_same_bits(result(out), expected)
        assert log_of(out) == log and not list(out.glob(".*"))


def test_a_finished_phase_goes_on_when_it_is_given_more_steps(config, tmp_path):
    for phase in config.phases:
        phase.steps = 1
    train(config)
    config.phases[1].steps = 2
    train(config)
    last = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()][-1]
    assert last["step"] == 2
    config.phases[1].steps = 1
    with pytest.raises(ValueError, match=r"1-joint.pt: has 2 steps done, more than the 1 asked"):
        train(config)
    config.phases[0].steps, config.phases[1].steps = 9, 2
    with pytest.raises(ValueError, match=r"1-joint.pt: was trained from fewer steps than the 9"):
        train(config)
    # nor is a phase repeated under one that was built on it
    next((tmp_path / "run").glob("0-*.pt")).unlink()
    with pytest.raises(ValueError, match=r"delete 1-joint.pt and what follows it"):
        train(config)


def test_what_cannot_be_trained_is_not_kept(config, tmp_path):
    """A refused configuration does not bind the next call."""
    config.phases, window = config.phases[:1], config.window
    config.window = 20
    with pytest.raises(ValueError, match="window is 20, expected a multiple of 8"):
        train(config)
    config.window, right = window, config.phases
    wrong = {
        "phases.1.objective is 'decision', expected one of .* where a bank is named":
            PhaseConfig("decision", 1),
        "phases.1.parts holds polic, expected some of segmenter, ":
            PhaseConfig("joint", 1, parts=("polic",)),
    }
    for message, phase in wrong.items():
        with pytest.raises(ValueError, match=message):
            train(replace(config, phases=[*right, phase]))
    with pytest.raises(ValueError, match="phases.0.stay is .* for each of 2 members"):
        bank = [PhaseConfig("bank", 1, stay=(1, 1, 1))]
        train(replace(config, bank=("unet-2", "unet-4"), phases=bank))
    with pytest.raises(ValueError, match="baseline.objective is 'joint', expected static"):
        train(replace(config, baseline=PhaseConfig("joint", 1)))
    assert not list((tmp_path / "run").glob("*.pt"))
    with pytest.warns(UserWarning, match="cost_weight acts in phases `joint` alone"):
        assert train(replace(config, cost_weight=0.1)).exists()


def test_another_configuration_is_refused_by_name(config):
    config.phases = [PhaseConfig("static", 1, batch=2), PhaseConfig("decisions", 1, batch=2)]
    train(config)
    for field, value, named in (
        ("seed", 5, "config.json: seed is 0 in the run that is there, and 5 is asked for"),
        ("num_bits", (4, 8), r"num_bits is \[8, 16\]"),
        ("fold", 1, "config.json: fold is 0 in the run that is there, and 1 is asked for"),
        ("phases", [PhaseConfig("static", 1, batch=4), config.phases[1]], "phases.0.batch is 2"),
        ("phases", config.phases[:1], "phases.1.objective is 'decisions' .* nothing is asked"),
    ):
        with pytest.raises(ValueError, match=named):
            train(replace(config, **{field: value}))


def test_a_refused_configuration_leaves_the_cache_as_it_was(config, tmp_path):
    """Else it would be bound to what the run has not."""
    config.phases = [PhaseConfig("static", 1, batch=2)]
    train(config)
    for name in ("cases.json", "disc_001.labels.npy"):
        (tmp_path / "cache" / name).unlink()
    with pytest.raises(ValueError, match="config.json: label_map.1 is nothing|label_map is None"):
        train(replace(config, label_map={1: 1, 2: 1}))
    assert not (tmp_path / "cache" / "cases.json").exists()
    train(config)


def test_another_split_is_refused(config, decathlon):
    config.phases = [PhaseConfig("static", 1, batch=2)]
    train(config)
    for kind in ("imagesTr", "labelsTr"):
        (decathlon / kind / "disc_001.nii.gz").unlink()
    with pytest.raises(ValueError, match="split.json: trained_on is"):
        train(config)


def test_the_selectors_rate_acts_from_the_next_step_on(config, tmp_path, steps):
    phase = PhaseConfig("joint", 4, batch=2, arithmetic="learning", selector_rate=10.0)
    steps.broken = (3,)
    with pytest.raises(KeyboardInterrupt):
        train(replace(config, phases=[phase]))

    def goes_on_with(rate):
        out = shutil.copytree(config.out, tmp_path / f"to-{rate}")
        return train(replace(config, out=str(out), phases=[replace(phase, selector_rate=rate)]))

    same, faster = (load_model(goes_on_with(rate)).state_dict() for rate in (10.0, 1000.0))
    name = "bit_selectors.0.linear.weight"
    assert not torch.equal(same[name], faster[name])
    # groups of another number are no pace
    with pytest.raises(ValueError, match="selector_rate is 10.0 in the run .* and 1.0 is asked"):
        goes_on_with(1.0)


def test_a_run_from_before_a_field_keeps_what_it_had(config, tmp_path):
    config.phases = [PhaseConfig("static", 1, batch=2)]
    train(replace(config, position_network=None))
    path = tmp_path / "run" / "config.json"
    content = json.loads(path.read_text())
    del content["position_network"], content["patient"], content["phases"][0]["selector_rate"]
    path.write_text(json.dumps(content))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="position_network is None in the run .* 'heatmap' is ask"):
        train(config)
    faster = [replace(config.phases[0], selector_rate=10)]
    with pytest.raises(ValueError, match="selector_rate is 1.0 in the run"):
        train(replace(config, position_network=None, phases=faster))
    with pytest.raises(ValueError, match=r"patient is None in the run .* 'disc_\\\\d\+' is asked"):
        train(replace(config, position_network=None, patient=r"disc_\d+"))
    assert path.read_bytes() == before
    train(replace(config, position_network=None))


def test_a_run_starts_from_weights(config, tmp_path):
    """Decisions alone are trained: the segmenter stays what it was."""
    first = train(config)
    second = replace(
        config, out=str(tmp_path / "second"), start=str(first), seed=1,
        phases=[PhaseConfig("decisions", 1, batch=2)],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = train(second)
    before, after = (load_model(weights).state_dict() for weights in (first, path))
    differ = {
        name.split(".")[0] for name, value in after.items() if not torch.equal(value, before[name])
    }
    assert differ == {"policy", "position"}
    first.unlink()
    train(second)  # goes on from its own checkpoint
    with pytest.raises(ValueError, match="start is .* in the run that is there, and None is asked"):
        train(replace(second, start=None))


def test_a_run_that_starts_from_other_labels_says_so(config, tmp_path):
    config.phases = [PhaseConfig("static", 1, batch=2)]
    first = train(config)
    swapped = replace(
        config, start=str(first), label_map={1: 2, 2: 1}, out=str(tmp_path / "second"),
        cache=str(tmp_path / "other"),
    )
    told = r"on label values {'1': 1, '2': 2}; here it is {'1': 2, '2': 1}"
    with pytest.warns(UserWarning, match=told):
        train(swapped)


def test_a_run_that_starts_from_other_intensities_says_so(config, tmp_path):
    config.phases = [PhaseConfig("static", 1, batch=2)]
    start, windows = str(train(config)), [(-20.5, 300), (0, 300)]
    told = ["z-scores; here it is a window of -20.5 to 300 HU",
            "a window of -20.5 to 300 HU; here it is a window of 0 to 300 HU"]
    for number, (window, message) in enumerate(zip(windows, told, strict=True)):
        out = str(tmp_path / str(number))
        other = replace(config, start=start, window_hu=window, out=out, cache=None)
        with pytest.warns(UserWarning, match=f"{start}: was trained on {message}$"):
            start = str(train(other))


def stages_of(path):
    """The weights of the whole slice's last stage, and of every crop's."""
    model = load_model(path)
    whole = model.segmenter.last_stage.state_dict()
    return whole, [stage.state_dict() for stage in model.crop_last_stages]


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_crops_keep_what_they_start_from(config, tmp_path):
    """A stage that the weights do not have is the whole slice's, the others are theirs."""
    first = train(config)
    _, (known,) = stages_of(first)
    second = replace(
        config, start=str(first), crop_sizes=(16, 24), out=str(tmp_path / "second"),
        phases=[PhaseConfig("decisions", 1, batch=2)],
    )
    with pytest.warns(UserWarning, match="fits all but .* tensors, first "):
        whole, (smaller, larger) = stages_of(train(second))
    assert not same(known, whole) and same(smaller, known) and same(larger, whole)
    trunk = replace(second, start_parts=("segmenter",), out=str(tmp_path / "trunk"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # the crops' stages are new, and decisions alone are trained
        warnings.filterwarnings("ignore", ".* layers have no input range")
        theirs, crops = stages_of(train(trunk))
    assert same(theirs, whole) and all(same(crop, whole) for crop in crops)
    with pytest.raises(ValueError, match="start_parts holds trunk, expected some of segmenter"):
        train(replace(trunk, start_parts=("trunk",)))


def test_weights_of_float_phases_alone_say_what_runs_them(config, tmp_path):
    quantised, _ = config.phases
    config.phases = [PhaseConfig("segmenter", 1, batch=2)]
    told = r"model.safetensors: \d+ layers have no input range, first segmenter.* --executor eager"
    with pytest.warns(UserWarning, match=told):
        path = train(config)
    with pytest.raises(ValueError, match="no input range"):
        compile_engine(load_model(path), "cpu", "torch")
    compile_engine(load_model(path), "cpu", "eager")
    # what is advised
    config.phases.append(replace(quantised, steps=2, autocast="none"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile_engine(load_model(train(config)), "cpu", "torch")


def test_a_bank_has_no_ranges_to_learn(config):
    config.bank, config.phases = ("unet-2", "unet-4"), [PhaseConfig("bank", 1, batch=2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile_engine(load_model(train(config)), "cpu", "torch")


def test_crops_begin_as_the_whole_slice_once(config, tmp_path):
    """A second phase `segmenter` goes on with the stages that the first one trained."""
    phase = PhaseConfig("segmenter", 2, batch=2, learning_rate=0.01, warm_up=0)
    still = replace(phase, steps=1, learning_rate=1e-12)
    config.phases = [phase, PhaseConfig("decisions", 1, batch=2), still]
    whole, (crop,) = stages_of(train(config))
    name = next(name for name, value in crop.items() if value.dim() == 4)
    assert (crop[name] - whole[name]).abs().max() > 1e-3


def test_a_baseline_is_not_left_behind(config):
    config.phases = [PhaseConfig("static", 1, batch=2)]
    config.baseline = PhaseConfig("static", 1, batch=2)
    train(config)
    config.phases[0].steps = 2
    with pytest.raises(ValueError, match=r"baseline.pt: was trained from fewer steps than the 2"):
        train(config)


def test_what_has_had_no_effect_yet_may_change(config, tmp_path, steps):
    config.phases = [PhaseConfig("static", 3, batch=2), PhaseConfig("decisions", 1, batch=2)]
    steps.broken = (2,)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    static, decisions = config.phases
    with pytest.raises(ValueError, match="phases.0.batch is 2 in the run that is there, and 4"):
        train(replace(config, phases=[replace(static, batch=4), decisions]))
    slower = replace(static, learning_rate=1e-5, schedule_after=2)
    train(replace(config, phases=[slower, replace(decisions, batch=3)]))
    kept = json.loads((tmp_path / "run" / "config.json").read_text())["phases"]
    assert kept[0]["learning_rate"] == 1e-5 and kept[1]["batch"] == 3
    # now both are trained
    with pytest.raises(ValueError, match="phases.0.learning_rate is 1e-05"):
        train(config)


def test_weights_that_know_the_held_out_cases(config, tmp_path):
    first = train(config)
    other = replace(
        config, out=str(tmp_path / "second"), start=str(first), fold=1, num_bits=(8, 12, 16),
        phases=config.phases[:1],
    )
    with pytest.warns(UserWarning) as warned:
        train(other)
    texts = [str(warning.message) for warning in warned]
    assert any("fits all but 8 tensors, first bit_selectors.0.linear.weight" in t for t in texts)
    assert any("1 cases that are held out here, such as disc_001" in text for text in texts)


def test_what_may_differ(config, tmp_path):
    config.phases = [PhaseConfig("static", 1, batch=2)]
    train(config)
    more = [*config.phases, PhaseConfig("decisions", 1, batch=2)]
    train(replace(config, phases=more, checkpoint_minutes=1.0, validate_every=0, device="auto"))
    assert (tmp_path / "run" / "1-decisions.pt").exists()


def test_an_extended_schedule_has_no_jump():
    phase = PhaseConfig("static", steps=1000)
    before = [phase_share(step, phase, Progress()) for step in range(1000)]
    longer = replace(phase, steps=2000)
    extended = Progress(step=1000, ramp_start=1000, ramp_share=before[-1])
    after = [phase_share(step, longer, extended) for step in range(1000, 2000)]
    joined = before + after
    warm_up = 1 / 50
    assert max(abs(a - b) for a, b in zip(joined, joined[1:], strict=False)) <= warm_up + 1e-12
    assert after[60:] == [schedule(step, 2000) for step in range(1060, 2000)]
    assert max(after) == max(after[45:55]) < 0.6 and after[-1] < 0.01


def test_phases_that_share_a_schedule():
    first, second, third = (
        PhaseConfig("joint", steps, warm_up=1, schedule_before=before, schedule_after=after)
        for steps, before, after in ((200, 0, 150), (100, 200, 50), (50, 300, 0))
    )
    shares = [
        phase_share(step, phase, Progress())
        for phase in (first, second, third) for step in range(int(phase.steps))
    ]
    assert shares == [schedule(step, 350, warm_up=1) for step in range(350)]


def test_a_checkpoint_executes_nothing(config, tmp_path):
    class Harm:
        def __reduce__(self):
            return (print, ("executed",))

    path = tmp_path / "0-static.pt"
    torch.save({"model": Harm(), "progress": {}, "input_amax": {}}, path)
    with pytest.raises(ValueError, match="is no checkpoint of this run .* delete it"):
        load_checkpoint(path, torch.nn.Linear(1, 1))


def test_a_checkpoint_of_other_parameters_is_named(config, tmp_path):
    """The same model, but an optimiser that held fewer of its tensors."""
    config.phases = [PhaseConfig("static", 2, batch=2)]
    train(config)
    path = tmp_path / "run" / "0-static.pt"
    content = torch.load(path, weights_only=True)
    content["optimizer"]["param_groups"][0]["params"].pop()
    content["progress"]["step"] = 1
    torch.save(content, path)
    with pytest.raises(ValueError, match=f"{path}: is no checkpoint of this phase .*; delete it"):
        train(config)


def test_a_damaged_checkpoint_is_named_whatever_is_left_of_it(tmp_path):
    model, path = torch.nn.Conv2d(40, 40, 3), tmp_path / "0-static.pt"
    save_checkpoint(path, model, Progress())
    whole = path.read_bytes()
    assert len(whole) > 50_000
    short = [0, 1, 40, 5000, len(whole) // 2, *range(len(whole) - 150, len(whole), 7)]
    for damaged in [*(whole[:length] for length in short), b"\0" * 5000, b"\x80\x02}", b"PK" * 99]:
        path.write_bytes(damaged)
        with pytest.raises(ValueError) as caught:
            load_checkpoint(path, model)
        message = str(caught.value)
        assert re.fullmatch(
            f"{path}: is no checkpoint of this run [(].+[)]; delete it, and those of later phases, "
            "to repeat its phase, or name another out", message
        )
    path.write_bytes(whole)
    load_checkpoint(path, model)


@pytest.mark.parametrize("name", ["run/config.json", "run/split.json", "cache/cases.json"])
def test_a_damaged_table_is_named(config, tmp_path, name):
    config.phases = [PhaseConfig("static", 1, batch=2)]
    train(config)
    path = tmp_path / name
    whole = path.read_bytes()
    for damaged in (b"", whole[:1], whole[: len(whole) // 2], whole[:-2], b"\xff\xfe", b"[1]"):
        path.write_bytes(damaged)
        with pytest.raises(VolumeError, match=f"^{path}: .*; delete it ") as caught:
            train(config)
        assert "\n" not in str(caught.value)
    path.unlink()
    train(config)  # the cure


@pytest.mark.parametrize("damaged", [
    {"settings": {"modalities": None, "label_map": None}, "cases": {"disc_000": {}}},
    {"settings": [], "cases": {}}, {"settings": None, "cases": 1}, {"cases": {}},
])
def test_a_table_with_parts_missing_is_named(config, tmp_path, damaged):
    path = tmp_path / "cache" / "cases.json"
    path.parent.mkdir()
    path.write_text(json.dumps(damaged))
    with pytest.raises(VolumeError, match=f"^{path}: is damaged .*; delete it to have the cache"):
        prepare_dataset(config)


def test_a_row_with_parts_missing_is_made_again(config, tmp_path):
    prepare_dataset(config)
    path = tmp_path / "cache" / "cases.json"
    whole = json.loads(path.read_text())
    for name in ("modalities", "gliomas", "values", "spacing_mm", "files"):
        rows = {**whole["cases"], "disc_001": {**whole["cases"]["disc_001"]}}
        del rows["disc_001"][name]
        path.write_text(json.dumps({**whole, "cases": rows}))
        prepare_dataset(config)
        assert json.loads(path.read_text()) == whole


@pytest.mark.parametrize(
    "name", ["model.safetensors", "log.jsonl", "validation.jsonl", "1-joint.pt", "baseline.pt"]
)
def test_files_of_no_run_are_not_overwritten(config, tmp_path, name):
    path = tmp_path / "run" / name
    path.parent.mkdir()
    path.write_text("mine")
    with pytest.raises(ValueError, match=f"^{path}: has the name of a run's file, .*another out"):
        train(config)
    assert path.read_text() == "mine" and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("content", ['{"phases": []}', '{"phases": [1]}', '{"phases": 1}'])
def test_a_configuration_with_parts_missing_is_named(config, tmp_path, content):
    config.phases = [PhaseConfig("static", 1, batch=2)]
    train(config)
    path = tmp_path / "run" / "config.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"^{path}: is damaged .*; delete it "):
        train(config)
    path.unlink()
    train(config)  # the cure


def test_a_damaged_slice_file_is_named(config, tmp_path):
    config.phases = [PhaseConfig("static", 1, batch=2)]
    train(config)
    config.phases[0].steps = 5
    for kind in ("seen", "images", "labels"):
        path = tmp_path / "cache" / f"disc_001.{kind}.npy"
        whole = path.read_bytes()
        for length in (0, 5, 100, len(whole) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises(VolumeError, match=f"^{path}: is damaged; delete it to cache"):
                data = prepare_dataset(config).training
                case = next(case for case in data if case.name == "disc_001")
                assert len(case.images) == len(case.labels)
        path.unlink()
        prepare_dataset(config)  # the cure
        assert path.read_bytes() == whole


def test_a_number_that_is_not_finite_names_its_batch_and_saves_nothing(config, tmp_path):
    config.phases = [PhaseConfig("static", 40, batch=2)]
    train(replace(config, out=str(tmp_path / "fine"), phases=[PhaseConfig("static", 1, batch=2)]))
    cache = tmp_path / "cache" / "disc_002.images.npy"
    broken = read_cache("disc_002", tmp_path / "cache").images.copy()
    broken[2] = float("nan")
    np.save(cache, broken)
    with pytest.raises(FloatingPointError, match="disc_002 slice 2.*last checkpoint was kept"):
        train(config)
    saved = torch.load(tmp_path / "run" / "0-static.pt", weights_only=True)
    assert all(torch.isfinite(value).all() for value in saved["model"].values())


def test_compiled_and_deterministic_runs_have_the_same_checkpoints(config, tmp_path):
    """With compilation made a no-op, since it takes minutes: names and bits stay."""
    config.phases = [PhaseConfig("segmenter", 2, batch=2), PhaseConfig("joint", 1, batch=2)]
    train(config)
    other = replace(config, out=str(tmp_path / "other"), compile=True, deterministic=True)
    with torch.compiler.set_stance("force_eager"):
        train(other)
    assert_same_bits(result(tmp_path / "run"), result(tmp_path / "other"))


def test_what_a_run_sets_for_its_process_ends_with_it(config, tmp_path, monkeypatch):
    """Though it fails."""
    seen, variable = [], "CUBLAS_WORKSPACE_CONFIG"

    def fail(*_):
        seen.append((
            torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(),
            variable in os.environ,
        ))
        torch.manual_seed(7)
        raise VolumeError("no data")

    monkeypatch.setattr("meddanet.training.prepare_dataset", fail)
    config.phases = [PhaseConfig("static", 1, batch=2)]
    monkeypatch.delenv(variable, raising=False)
    generator = torch.get_rng_state()
    config.threads, config.deterministic = torch.get_num_threads() + 1, True
    with pytest.raises(VolumeError, match="no data"):
        train(config)
    assert seen == [(config.threads, True, True)]
    assert variable not in os.environ and torch.equal(torch.get_rng_state(), generator)
    assert torch.get_num_threads() == config.threads - 1
    assert not torch.are_deterministic_algorithms_enabled()


def test_defaults_of_pytorch_change_nothing(config, tmp_path):
    """A device as torch.set_default_device sets it, on which nothing has values, and a dtype."""
    train(config)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            train(replace(config, out=str(tmp_path / "other")))
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_bits(result(tmp_path / "run"), result(tmp_path / "other"))


def test_more_threads_than_a_process_can_have(config, tmp_path):
    """PyTorch takes any number and the process ends at its first operation."""
    most = 16 * os.cpu_count()
    with pytest.raises(ValueError, match=f"^threads is {most + 1}, expected at most {most} on"):
        train(replace(config, threads=most + 1))
    assert not (tmp_path / "run").exists()


def test_what_is_called_by_other_ways_than_forward_is_compiled_part_by_part(monkeypatch):
    """Training calls the heat map itself, past the forward of its network."""
    model, compiled = build_med_danet_v2("unet-12", position_network="heatmap"), []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    compile_parts(model)
    within = {id(part) for module in compiled for part in module.modules()}
    left = {name for name, part in model.named_modules() if id(part) not in within}
    assert left == {"", "segmenter", "segmenter.encoder", "crop_last_stages", "bit_selectors",
                    "position"}


def test_half_precision_with_loss_scaling(config, tmp_path):
    config.phases = [PhaseConfig("static", 4, batch=2, autocast="float16")]
    train(config)
    state = torch.load(tmp_path / "run" / "0-static.pt", weights_only=True)
    assert state["scaler"]["scale"] >= 1 and state["progress"]["step"] == 4
    assert all(torch.isfinite(value).all() for value in state["model"].values())


def broken_at(steps: range) -> Objective:
    """The objective `static` with a gradient that is not a number at some steps; its loss is."""

    def objective(model, batches, step, phase):
        loss = OBJECTIVES["static"](model, batches, step, phase)
        nothing = next(model.parameters()).sum() * 0
        return loss + nothing.sqrt() if step in steps else loss

    return objective


def half_precision_run(config, tmp_path, objective: Objective) -> dict:
    """Twenty steps in float16, each saved; returns the last checkpoint, whatever ended the run."""
    data, file = prepare_dataset(config), tmp_path / "half.pt"
    batches = Batches(data.training, window=None, canvas=(32, 32))
    phase = PhaseConfig("static", 20, batch=2, autocast="float16")
    torch.manual_seed(0)
    model = build_segmenter("unet-4", 1, 3)
    try:
        run_phase(model, objective, phase, batches, file, Monitor(tmp_path), every=1)
    finally:
        state = torch.load(file, weights_only=True)
    return state


def test_half_precision_skips_a_step_whose_gradient_is_not_finite(config, tmp_path):
    whole = half_precision_run(config, tmp_path, broken_at(range(0)))
    (tmp_path / "half.pt").unlink()
    state = half_precision_run(config, tmp_path, broken_at(range(1, 19, 6)))
    made = [{int(s["step"]) for s in c["optimizer"]["state"].values()} for c in (whole, state)]
    assert made == [{20}, {17}]
    assert state["scaler"]["scale"] == whole["scaler"]["scale"] / 2**3
    assert all(torch.isfinite(value).all() for value in state["model"].values())


def test_half_precision_stops_where_no_scale_makes_the_gradient_finite(config, tmp_path):
    """After 16 halvings of 65536 the gradient is what float32 would have."""
    message = "half: the gradient is nan at step 16, whose batch is disc_.*; the last checkpoint "
    with pytest.raises(FloatingPointError, match=message):
        half_precision_run(config, tmp_path, broken_at(range(20)))
    state = torch.load(tmp_path / "half.pt", weights_only=True)
    assert state["scaler"]["scale"] == 1 and state["progress"]["step"] == 16
