"""The schedules by name against what paper and published code say, worked out by hand."""

import json
import re
import threading
import warnings
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from meddanet.arguments import parse_command, train_config
from meddanet.batches import Batches
from meddanet.build import build_med_danet_v2
from meddanet.checkpoint import Progress
from meddanet.cli import main
from meddanet.commands import train as train_command
from meddanet.data.slices import read_cache, write_cache
from meddanet.dataset import prepare_dataset
from meddanet.layers import set_quantization
from meddanet.losses import papers_dice_loss
from meddanet.monitor import Monitor, dice_per_class, swallowed_background
from meddanet.objectives import OBJECTIVES, joint, route_costs
from meddanet.phase import phase_share, run_phase, segmenter_loss, train_parts
from meddanet.recipe import AugmentConfig, PhaseConfig, TrainConfig
from meddanet.schedules import RECIPES

pytestmark = pytest.mark.usefixtures("few_units")


def test_the_papers_epochs_share_one_schedule():
    """224,000 steps of 640 an epoch, as the code counts them (spec: 5 volume batches of 128)."""
    paper = [phase.in_steps(640) for phase in RECIPES["paper"]()]
    assert [phase.steps for phase in paper] == [128_000, 64_000, 32_000]
    official = [phase.in_steps(640) for phase in RECIPES["official"]()]
    assert [phase.steps for phase in official] == [96_000, 96_000, 32_000]
    # lr * (1 - (it - warm) / (max - warm))^0.9, max = 350 epochs, at the start of epoch 150
    expected = 2e-4 * (1 - (96_000 - 640) / (224_000 - 640)) ** 0.9
    rate = official[1].learning_rate * phase_share(0, official[1], Progress())
    assert rate == pytest.approx(expected)
    # the policy restarts at ten times the rate and falls over its own 50 epochs
    assert official[2].learning_rate == pytest.approx(2e-3)
    assert phase_share(0, official[2], Progress()) == pytest.approx(1 / 640)
    assert phase_share(640, official[2], Progress()) == 1
    assert phase_share(31_999, official[2], Progress()) < 1e-3


def test_official_weights_are_those_of_the_code():
    first, second, third = RECIPES["official"]()
    # phase 2: 1.5e-4 times the sum over 15 samples of G_crop + G_whole
    shares = {"crop": 0.6 / 1.068, "whole": 1.0}
    ours = second.branch_cost_weight * (shares["crop"] + shares["whole"])
    assert ours == pytest.approx(1.5e-4 * 15 * (0.6 + 1.068))
    # phase 3: (Dc + Dw + 2 (D + 0.02 * sum over 15 of G)) / 4
    assert third.branch_weight / 2 == 1 / 4 and third.mixed_weight == 2 / 4
    assert third.cost_weight * 1.0 == pytest.approx(2 / 4 * 0.02 * 15 * 1.068)
    assert (first.mixed_weight, first.cost_weight, first.oracle_weight) == (0, 0, 0)
    assert "policy" not in first.parts and third.parts == ("policy",)


def test_paths_are_kept_as_text(tmp_path):
    """As a configuration and a command line have them: a path has no JSON."""
    places = {name: tmp_path / name for name in ("data", "out", "cache", "start")}
    texts = {name: str(path) for name, path in places.items()}
    config = TrainConfig(**places)
    assert config == TrainConfig(**texts)
    assert texts.items() <= json.loads(json.dumps(asdict(config))).items()
    typed = [f"--{name}={text}" for name, text in texts.items()]
    assert train_config(parse_command(["train", *typed]).train) == config


def test_the_papers_dice_by_hand():
    labels = torch.tensor([[[0, 1], [1, 2]]])
    probability = F.one_hot(torch.tensor([[[0, 1], [0, 0]]]), 4).movedim(-1, 1).double()
    # classes 1, 2, 3: overlap 1 of 1 + 2; 0 of 0 + 1; absent, which costs 1 all the same
    assert papers_dice_loss(probability, labels) == pytest.approx(1 - 2 / 3 + 2, abs=1e-4)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_med_danet_v2("unet-12", 1, 3, crop_sizes=(16,))


@pytest.fixture
def batches(decathlon, tmp_path):
    prepare_dataset(TrainConfig(str(decathlon), str(tmp_path)))
    cases = [read_cache(f"disc_{number:03d}", tmp_path / "cache") for number in (1, 2)]
    return Batches(cases, window=None, canvas=(32, 32))


@pytest.mark.parametrize("recipe", ["paper", "official"])
def test_each_phase_moves_its_parts_and_no_others(model, batches, recipe):
    """One step per phase; what moves is what the phase names, the loss is finite."""
    for phase in RECIPES[recipe]():
        phase.batch = 4
        phase.cost_weight = 0.06 if phase.cost_weight is None else phase.cost_weight
        set_quantization(model, quantize=phase.arithmetic != "float", update_range=True)
        train_parts(model, phase.parts)
        model.zero_grad(set_to_none=True)
        batches.seek(3)
        loss = joint(model, batches, 3, phase)
        loss.backward()
        moved = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None}
        if phase.parts:
            assert moved == set(phase.parts), phase
        assert torch.isfinite(loss)


def test_branch_costs_are_the_routes_costs(model):
    bits = [torch.full((2, 4), 8.0), torch.full((2, 4), 16.0)]
    costs = route_costs(model, bits, (32, 32))
    full = route_costs(model, [torch.full((2, 4), 32.0)] * 2, (32, 32))
    assert costs.shape == (2, 3) and full[0, 2] == 1
    assert (costs[:, 0] < costs[:, 1]).all() and (costs[:, 1] < costs[:, 2]).all()


def test_unknown_choices_are_named():
    with pytest.raises(ValueError, match="autocast is 'half', expected one of none, bfloat16"):
        PhaseConfig("static", 1, autocast="half")
    with pytest.raises(ValueError, match="selector_rate is 0, expected more than 0"):
        PhaseConfig("quantised", 1, selector_rate=0)
    with pytest.raises(ValueError, match="parts holds decoder, expected some of segmenter"):
        train_parts(build_med_danet_v2("unet-12"), ("decoder",))


def test_recipe_on_the_command_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--data", "a", "--out", "b", "--recipe", "official", "--print-config"])
    text = capsys.readouterr().out
    assert text.count("objective: joint") == 3 and "steps: 150" in text
    assert "position_network: null" in text
    with pytest.raises(SystemExit):
        main(["train", "--data", "a", "--out", "b", "--recipe", "mine"])
    assert "choose from" in capsys.readouterr().err
    assert main(["train", "--data", "a", "--out", str(tmp_path), "--resume"]) == 1
    assert "holds no run to resume" in capsys.readouterr().err


def test_recipe_in_a_file(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train_command, "train", lambda config: seen.append(config) or "model")
    path = tmp_path / "config.yaml"
    path.write_text("data: a\nout: b\nrecipe: paper\nlabel_map: {5: 1}\nwindow_hu: [-160, 240]\n")
    assert main(["train", "--config", str(path)]) == 0
    papers = AugmentConfig(
        rotation=0, zoom=0, shift=0, intensity=0.1, transplant=0, contrast=0, texture=0
    )
    assert seen[0] == TrainConfig(
        "a", "b", label_map={5: 1}, window_hu=(-160, 240), phases=RECIPES["paper"](),
        augment=papers, position_network=None, crop_sizes=(96,), decision_scale=1,
        quantize_decisions=True, lesion_share=None, phantoms=0,
    )
    # what is asked for stays, be it what the default would be, before or after the recipe
    path.write_text(
        "data: a\nout: b\ncrop_sizes: [96, 128]\nrecipe: paper\naugment: {texture: 0.2}\n"
        "position_network: heatmap\n"
    )
    assert main(["train", "--config", str(path), "--lesion_share", "0.67"]) == 0
    assert seen[1].augment == replace(papers, texture=0.2)
    assert (seen[1].crop_sizes, seen[1].position_network) == ((96, 128), "heatmap")
    assert seen[1].lesion_share == 0.67 and seen[1].phases == RECIPES["paper"]()
    assert main(["train", "--config", str(path), "--recipe", "v1-paper"]) == 0
    assert seen[2].bank == ("unet-12", "unet-16", "transbts-light", "transbts")
    assert seen[2].phases == RECIPES["v1-paper"]() and seen[2].crop_sizes == (96, 128)


def test_lists_of_phases_replace_each_other(tmp_path, monkeypatch):
    """Five of them where the defaults have five; then one of one, and a baseline."""
    seen = []
    monkeypatch.setattr(train_command, "train", lambda config: seen.append(config) or "model")
    path = tmp_path / "config.yaml"
    phases = [{"objective": name, "steps": 3} for name in ("static", "joint", "decisions")]
    content = {"phases": [*phases, *phases[:2]], "baseline": {"objective": "static", "steps": 2}}
    assert len(content["phases"]) == len(TrainConfig("", "").phases)
    path.write_text(json.dumps(content))
    base = ["train", "--data", "a", "--out", "b", "--config", str(path)]
    assert main(base) == 0
    assert seen[0].phases == [PhaseConfig(**phase) for phase in content["phases"]]
    assert seen[0].baseline == PhaseConfig("static", 2)
    own = [{"objective": "joint", "steps": 1, "parts": ["policy"]}] * 5
    assert main([*base, "--phases", json.dumps(own)]) == 0
    assert seen[1].phases == [PhaseConfig("joint", 1, parts=("policy",))] * 5
    assert main([*base, "--phases", '[{"objective": "static", "steps": 7}]']) == 0
    assert seen[2].phases == [PhaseConfig("static", 7)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--phases", "[{objective: static, steps: 0}]"],
         "phases.0.steps is 0, expected more than 0"),
        (["--phases", "[{objective: static, steps: 1}, {objective: static, steps: 1, batch: 0}]"],
         "phases.1.batch is 0, expected a whole number, 1 or more"),
        (["--phases", "[]"], "phases is empty, expected at least one"),
        (["--baseline", "{objective: static, steps: many}"], "baseline.steps is 'many', expected"),
        (["--seed", "-1"], "seed is -1, expected a whole number, 0 or more"),
        (["--folds", "-1"], "folds is -1, expected a whole number"),
        (["--margin", "-3"], "margin is -3"),
        (["--augment.transplant", "7"], "transplant is 7.0, expected 0 to 1"),
        (["--checkpoint_minutes", "0"], "checkpoint_minutes is 0.0, expected more than 0"),
        (["--decision.alpha", "2"], "alpha is 2.0, expected 0 to 1"),
        (["--lesion_share", "1.5"], "lesion_share is 1.5, expected 0 to 1"),
    ],
)
def test_values_that_cannot_be(options, message, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", "--data", "a", "--out", str(out), *options]) == 1
    assert message in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--phases", "[{objective: static, steps: 1, stepz: 1}]"],
         "phases.0.stepz is unknown, expected some of objective, steps"),
        (["--phases", "[{steps: 1}]"], "phases.0 has no objective"),
        (["--baseline", "{objective: static}"], "baseline has no steps"),
        (["--baseline.stepz", "5"], "baseline.stepz is unknown"),
        (["--phases.0.steps", "5"], "--phases.0.steps: phases are given as one list, by --phases"),
        # which would change the last phase alone
        (["--phases.steps=5"], "--phases.steps: phases are given as one list, by --phases"),
        (["--augment.zooom", "0.1"], "zooom"),
    ],
)
def test_fields_that_are_not_there_are_usage_errors(options, message, tmp_path, capsys):
    out = tmp_path / "run"
    try:
        code = main(["train", "--data", "a", "--out", str(out), *options])
    except SystemExit as stop:
        code = stop.code
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2 and not out.exists()
    assert line.startswith("meddanet: error: ") and message in line


def test_the_list_of_phases_that_an_error_shows_can_be_given(capsys):
    assert main(["train", "--data", "a", "--out", "b", "--phases.0.steps", "5"]) == 2
    shown = re.search(r"--phases '([^']+)'", capsys.readouterr().err)[1].replace(", ...", "")
    options = parse_command(["train", "--data", "a", "--out", "b", "--phases", shown])
    assert train_config(options["train"]).phases == [PhaseConfig("static", 100)]


def test_dice_and_swallowed_background_by_hand():
    # rows truth, columns found
    counts = np.array([[30, 10, 60, 0], [2, 6, 0, 0], [0, 0, 8, 0], [0, 0, 0, 0]])
    assert dice_per_class(counts) == {
        "1": round(2 * 6 / (8 + 16), 4), "2": round(2 * 8 / (8 + 68), 4), "3": None
    }
    assert swallowed_background(np.zeros(4, int), counts[0]) == {"1": 0.1, "2": 0.6, "3": 0.0}
    # 100 pixels of air, 20 with signal: 15 of 20 are more than 15 of 120
    expected = {"1": 0.75, "2": 0.0}
    assert swallowed_background(np.array([100, 0, 0]), np.array([5, 15, 0])) == expected
    # a class that takes the air alone: 60 of 80, none of those with signal
    assert swallowed_background(np.array([0, 60, 0]), np.array([20, 0, 0])) == expected


def test_a_class_that_swallows_the_background_is_named(batches, tmp_path):
    monitor = Monitor(tmp_path, batches.cases, every=1, slices=4, num_classes=3, canvas=(32, 32))
    everything_two = lambda slices: torch.full((len(slices), 32, 32), 2)  # noqa: E731
    with pytest.warns(UserWarning, match="0-x, step 7: class 2 takes 100% of the background"):
        monitor.look("0-x", 7, everything_two, torch.device("cpu"))
    (line,) = (tmp_path / "validation.jsonl").read_text().splitlines()
    row = json.loads(line)
    truth = np.stack([np.pad(c.labels[z], [(0, 32 - s) for s in c.labels[z].shape])
                      for c, z in monitor.samples])
    share = (truth == 2).sum() / truth.size
    assert row["dice"]["2"] == pytest.approx(2 * share / (share + 1), abs=1e-4)
    assert row["dice"]["1"] == 0


def test_a_class_that_swallows_the_brain_is_named_however_much_air_there_is(tmp_path):
    """Every pixel with signal is called 2: 16 of them, 12 background, in 144 pixels."""
    images, labels = np.zeros((1, 2, 12, 12), np.float32), np.zeros((1, 12, 12), np.uint8)
    # half of the brain is seen in the second channel alone
    images[0, 0, 2:4, 3:7], images[0, 1, 4:6, 3:7] = -1.5, 0.5
    labels[0, 3:5, 4:6] = [[1, 2], [2, 2]]
    write_cache("brain", images, labels, tmp_path)
    monitor = Monitor(tmp_path, [read_cache("brain", tmp_path)], every=1, canvas=(16, 16))
    brain_two = lambda slices: 2 * (slices != 0).any(1).long()  # noqa: E731
    for loss, advice in (("dice", "see dice[+]ce"), ("dice+ce", "lower learning_rate")):
        text = f"class 2 takes 100% of .*; the phase's loss is {re.escape(loss)}, .*{advice}"
        with pytest.warns(UserWarning, match=text):
            monitor.look("0-x", 7, brain_two, torch.device("cpu"), loss)
    row = json.loads((tmp_path / "validation.jsonl").read_text().splitlines()[0])
    assert row["swallowed_background"] == {"1": 0.0, "2": 1.0, "3": 0.0}
    # Dice counts every pixel: class 2 is found 16 times and there 3 times
    assert row["dice"] == {"1": 0.0, "2": round(2 * 3 / 19, 4), "3": None}
    # six of the twelve are no alarm
    few = lambda slices: 2 * (slices[:, 0] != 0).long()  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor.look("0-x", 8, few, torch.device("cpu"))
    row = json.loads((tmp_path / "validation.jsonl").read_text().splitlines()[-1])
    assert row["swallowed_background"]["2"] == 0.5


@pytest.mark.parametrize(
    ("objective", "parts"),
    [
        ("static", ()), ("static", ("segmenter",)), ("joint", ()), ("joint", ("bit_selectors",)),
        ("joint", ("policy",)), ("decisions", ()), ("decisions", ("policy", "position")),
    ],
)
def test_a_loss_is_blamed_where_it_trains_what_segments(model, batches, tmp_path, objective, parts):
    """What segments is the segmenter, its last stages and the widths that they are run with."""

    def segmenting() -> list[torch.Tensor]:
        deciding = ("policy.", "position.")
        state = model.state_dict().items()
        return [value.clone() for name, value in state if not name.startswith(deciding)]

    phase = PhaseConfig(objective, 1, batch=2, parts=parts, oracle_weight=0, loss="dice")
    monitor = Monitor(tmp_path, batches.cases, every=1, slices=2, num_classes=3, canvas=(32, 32))
    set_quantization(model, quantize=objective == "joint", update_range=True)
    everything_two = lambda slices: torch.full((len(slices), 32, 32), 2)  # noqa: E731
    before = segmenting()
    with pytest.warns(UserWarning, match="class 2 takes 100%") as warned:
        run_phase(
            model, OBJECTIVES[objective], phase, batches, None, monitor, name="x",
            predict=everything_two,
        )
    moved = any(not torch.equal(a, b) for a, b in zip(before, segmenting(), strict=True))
    (text,) = [str(w.message) for w in warned if "class 2 takes" in str(w.message)]
    cause = "the phase's loss is dice" if moved else "this phase trains decisions alone"
    assert text.partition("slices; ")[2].startswith(f"{cause}, ")


def test_v1_decisions_are_not_blamed_for_what_the_bank_does():
    assert segmenter_loss(PhaseConfig("decision", 1, parts=("decision",))) is None
    assert segmenter_loss(PhaseConfig("bank", 1, parts=("bank",), loss="dice")) == "dice"


def test_tensorboard(model, batches, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monitor = Monitor(
        tmp_path, batches.cases, every=2, slices=2, num_classes=3, canvas=(32, 32), tensorboard=True
    )
    phase = PhaseConfig("decisions", 2, batch=2)
    set_quantization(model, quantize=False, update_range=True)
    from meddanet.objectives import decisions

    run_phase(
        model, decisions, phase, batches, tmp_path / "0-decisions.pt", monitor,
        predict=lambda slices: torch.zeros(len(slices), 32, 32, dtype=torch.long),
    )
    events = reader.EventAccumulator(str(tmp_path / "tensorboard" / "0-decisions"))
    events.Reload()
    loss = json.loads((tmp_path / "log.jsonl").read_text())["loss"]
    assert events.Scalars("loss")[0].value == pytest.approx(loss)
    assert "learning_rate" in events.Tags()["scalars"]
    assert events.Scalars("dice/1")[0].value == 0


@pytest.mark.parametrize("name", ["log.jsonl", "validation.jsonl"])
def test_half_a_line_is_dropped_wherever_it_ends(tmp_path, name):
    """A killed process may stop after any character, a closing brace within the line too."""
    monitor = Monitor(tmp_path)
    for phase, step in (("0-static", 9), ("1-joint", 3), ("1-joint", 4)):
        monitor.log(phase, step, name, dice={"1": 0.0, "2": 0.5})
    whole = (tmp_path / name).read_text()
    *kept, _ = whole.splitlines(keepends=True)
    last = '{"phase": "0-static", "step": 10, "dice": {"1": 0.0, "2": 0.5}, "lost": {}}'
    assert json.loads(last)
    for length in range(1, len(last)):
        (tmp_path / name).write_text(whole + last[:length])
        monitor.rewind("1-joint", 3)
        assert (tmp_path / name).read_text() == "".join(kept)
    # whole but for the line's end
    (tmp_path / name).write_text(whole + last)
    monitor.rewind("1-joint", 3)
    assert (tmp_path / name).read_text() == "".join(kept) + last + "\n"


def test_tensorboard_has_one_thread_for_all_phases(tmp_path):
    pytest.importorskip("tensorboard")
    monitor = Monitor(tmp_path, tensorboard=True)
    monitor.rewind("0-static", 0)
    threads = threading.active_count()
    for number in range(1, 4):
        monitor.rewind(f"{number}-joint", 0)
    assert threading.active_count() == threads


def test_tensorboard_holds_a_step_once_after_a_kill(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def log(phase: str, after: int, steps: range, loss: float) -> None:
        monitor = Monitor(tmp_path, tensorboard=True)
        monitor.rewind(phase, after)
        for step in steps:
            monitor.log(phase, step, loss=loss)

    log("0-static", 0, range(1, 7), 0.5)
    log("1-joint", 0, range(1, 6), 0.25)  # killed after step 5, its checkpoint stands at 3
    log("1-joint", 3, range(4, 9), 0.125)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for phase, expected in (
        ("0-static", [0.5] * 6), ("1-joint", [0.25] * 3 + [0.125] * 5),
    ):
        events = reader.EventAccumulator(str(tmp_path / "tensorboard" / phase))
        events.Reload()
        scalars = [(event.step, event.value) for event in events.Scalars("loss")]
        assert scalars == list(enumerate(expected, 1))
        assert scalars == [(row["step"], row["loss"]) for row in rows if row["phase"] == phase]
