"""Objectives, sampling and phases of training, on hand-made cases small enough to reason about."""

import json
import math
import operator
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from meddanet import run_checks
from meddanet.batches import Batches
from meddanet.build import build_med_danet_v2
from meddanet.cost import cost_table
from meddanet.data.phantom import write_phantom
from meddanet.data.slices import SliceSampler, folds, read_cache, write_cache
from meddanet.devices import emulates_bfloat16
from meddanet.kernels.per_width import conv_per_width
from meddanet.layers import set_quantization
from meddanet.losses import dice_loss
from meddanet.med_danet_v2 import TrainingOutput
from meddanet.monitor import Monitor
from meddanet.objectives import (
    OBJECTIVES,
    centred_offset,
    heat_loss,
    inside_crop,
    lesion_box,
    oracle_loss,
    oracle_route,
    relative_cost,
)
from meddanet.phase import run_phase, schedule
from meddanet.recipe import AugmentConfig, PhaseConfig, TrainConfig
from meddanet.training import train
from meddanet.weights import load_model

pytestmark = pytest.mark.usefixtures("few_units")


def labels_with_boxes(*boxes: tuple[int, int, int, int] | None, side: int = 64) -> torch.Tensor:
    """One [side, side] label map per (top, left, height, width), None for no lesion."""
    labels = torch.zeros(len(boxes), side, side, dtype=torch.long)
    for label, box in zip(labels, boxes, strict=True):
        if box is not None:
            top, left, height, width = box
            label[top, left] = label[top + height - 1, left + width - 1] = 2
    return labels


@pytest.fixture
def cases(tmp_path):
    """Two cases of 6 slices: noise in a disc, a bright square lesion in slices 2 and 3."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:64, :64] - 32
    disc = rows**2 + columns**2 < 28**2
    for name in ("a", "b"):
        images = random.normal(size=(6, 2, 64, 64)).astype(np.float32) * disc
        labels = np.zeros((6, 64, 64), np.uint8)
        labels[2:4, 24:34, 28:38] = 1
        images[:, :, :, :] += 4 * labels[:, None]
        images[0] = 0
        write_cache(name, images, labels, tmp_path)
    return [read_cache(name, tmp_path) for name in ("a", "b")]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_med_danet_v2("unet-4", in_channels=2, num_classes=2, crop_sizes=(24,))


def test_lesion_box_route_and_offset_by_hand():
    labels = labels_with_boxes((10, 20, 5, 8), None, (0, 60, 30, 4), (3, 3, 20, 55), (50, 2, 1, 1))
    first, last, present = lesion_box(labels)
    assert first[0].tolist() == [10, 20] and last[0].tolist() == [14, 27]
    assert present.tolist() == [True, False, True, True, True]
    assert oracle_route(labels, (24, 40)).tolist() == [1, 0, 2, 3, 1]
    # boxes of 8, 30, 55 and 1 pixels and as many to spare on both sides
    assert oracle_route(labels, (24, 40), margin=5).tolist() == [1, 0, 2, 3, 1]
    assert oracle_route(labels, (24, 40), margin=8).tolist() == [1, 0, 3, 3, 1]
    assert oracle_route(labels, (24, 40), margin=9).tolist() == [2, 0, 3, 3, 1]
    # centred: (10 + 15 - 24) / 2 = 0.5, (20 + 28 - 24) / 2 = 12; at the far edge kept inside
    assert centred_offset(labels, 24)[0].tolist() == [0.5, 12.0]
    assert centred_offset(labels, 24)[2].tolist() == [3.0, 40.0]


def test_the_heat_belongs_into_the_lesions_box_by_hand():
    labels = torch.zeros(2, 32, 48, dtype=torch.long)
    labels[0, 0, 16], labels[0, 15, 31] = 1, 3
    heat = torch.zeros(2, 1, 2, 3)
    assert heat_loss(heat, labels).tolist() == pytest.approx([math.log(6)] * 2)
    heat[0, 0, 0, 1] = 20.0
    assert heat_loss(heat, labels)[0].item() == pytest.approx(0, abs=1e-6)
    # half of the box in another cell: half of the heat is in the wrong place
    labels[0, 15, 31], labels[0, 31, 31] = 0, 1
    assert heat_loss(heat, labels)[0].item() == pytest.approx(10, rel=1e-6)


def test_decisions_are_weighed_by_the_lesion_by_hand(model):
    """An empty slice weighs 1, one of the mean lesion 3, one of much more 4."""
    labels = torch.zeros(3, 64, 64, dtype=torch.long)
    labels[1, 4:6, 4:6], labels[2, 30:50, 30:50] = 1, 1
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.5, 1.0, 0.0], [0.0, 0.0, 3.0]])

    class Fixed(torch.nn.Module):
        def __init__(self, answer):
            super().__init__()
            self.answer = answer

        def forward(self, slices):
            return self.answer

    model.policy, model.position = Fixed(logits), Fixed(torch.zeros(3, 2))
    loss = oracle_loss(model, torch.zeros(3, 2, 64, 64), labels).item()
    # routes are skip and twice the crop; areas 4 and 400, 202 in the mean
    wanted = [0, 1, 1]
    log_sum = [math.log(sum(map(math.exp, row))) for row in logits.tolist()]
    each = [log_sum[n] - logits[n, route].item() for n, route in enumerate(wanted)]
    weight = [1, 1 + 2 * 4 / 202, 1 + 2 * 1.5]
    expected = sum(map(operator.mul, each, weight)) / sum(weight)
    # place 0.5 of the free play of 40 is 20, wanted are the ends 0 and 28, in crops of 24 pixels
    miss = [20 / 24, 8 / 24]
    expected += 2 * sum(distance - 0.05 / 2 for distance in miss) / 2
    assert loss == pytest.approx(expected, rel=1e-5)


def test_a_position_network_with_a_map_learns_from_it(cases):
    model = build_med_danet_v2(
        "unet-12", in_channels=2, num_classes=2, crop_sizes=(24,), position_network="heatmap"
    ).train()
    set_quantization(model, quantize=False, update_range=True)
    batches = Batches(cases)
    batches.seek(0)
    images, labels = batches.slice_batch(8)
    # no crop fits a lesion from border to border: the map is what is left to learn from
    labels[:, ::63, :] = 1
    oracle_loss(model, images, labels).backward()
    # softmax does not see the map's bias, and the gain is the crop's matter
    gradients = {name: p.grad for name, p in model.position.named_parameters()}
    assert not gradients.pop("centre.gain").any() and gradients.pop("map.bias").abs().max() < 1e-6
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())


def test_the_bit_selectors_may_learn_faster(model, cases, tmp_path):
    """Adam's first step moves a weight by its rate, whatever the gradient."""
    set_quantization(model, quantize=True, update_range=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    phase = PhaseConfig(
        "quantised", 1, batch=2, learning_rate=1e-3, warm_up=0, selector_rate=10,
        parts=("segmenter", "crop_last_stages", "bit_selectors"),
    )
    run_phase(
        model, OBJECTIVES["quantised"], replace(phase, oracle_weight=0),
        Batches(cases, window=32, bit_weight=1.0), tmp_path / "0.pt", Monitor(tmp_path),
    )
    moved = {
        name: (value - before[name]).abs().max().item()
        for name, value in model.state_dict().items() if name.endswith("weight")
    }
    assert moved["bit_selectors.0.linear.weight"] == pytest.approx(1e-2, rel=1e-2)
    assert moved["segmenter.init.weight"] == pytest.approx(1e-3, rel=1e-2)


def test_decisions_see_lesions_as_they_are(cases):
    """Windows may get other contrasts and textures; the slices of the decision networks do not."""
    strong = AugmentConfig(intensity=0.0, transplant=1.0, contrast=1.0, texture=1.0)
    plain = Batches(cases, augment=replace(strong, transplant=0, contrast=0, texture=0))
    varied = Batches(cases, augment=strong)
    for batches in (plain, varied):
        batches.seek(3)
    for one, other in zip(plain.slice_batch(4), varied.slice_batch(4), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(plain.window_batch(4)[0], varied.window_batch(4)[0])


def test_a_ct_is_shifted_by_standard_deviations_of_its_own(tmp_path):
    """Values 0..1 as a Hounsfield window leaves them, where 0.25 are 100 of 400 units."""
    images = 0.5 + 0.02 * np.random.default_rng(0).normal(size=(6, 1, 64, 64)).astype(np.float32)
    write_cache("a", images, np.zeros((6, 64, 64), np.uint8), tmp_path)
    alone = AugmentConfig(rotation=0, zoom=0, shift=0, transplant=0, contrast=0, texture=0)

    def farthest(z_scores: bool) -> float:
        batches = Batches([read_cache("a", tmp_path)], augment=alone, z_scores=z_scores)
        batches.seek(0)
        return (batches.slice_batch(16)[0].mean((2, 3)) - 0.5).abs().max().item()

    # by a quarter of 0.02 at most, and the mean of a slice's noise
    assert 0.001 < farthest(z_scores=False) < 0.25 * 0.02 + 0.002 and farthest(z_scores=True) > 0.1


def test_inside_crop_keeps_the_crop_alone():
    labels = torch.ones(1, 8, 8, dtype=torch.long)
    kept = inside_crop(labels, torch.tensor([[2.0, 3.0]]), 4)
    wanted = torch.zeros(1, 8, 8, dtype=torch.long)
    wanted[0, 2:6, 3:7] = 1
    assert torch.equal(kept, wanted)


def test_folds_hold_out_every_patient_once():
    names = [f"p{index}" for index in range(13)]
    held_out = [name for fold in range(5) for name in folds(names, 5, fold)[1]]
    assert sorted(held_out) == sorted(names)
    training, held = folds(names, 5, 2)
    assert set(training) | set(held) == set(names) and not set(training) & set(held)


def test_a_fold_that_holds_out_nobody_is_refused():
    names = [f"p{index}" for index in range(8)]
    assert folds(names, 20, 7)[1] == ["p7"]
    wanted = "^fold 8 of 20 holds out nobody of 8 patients; name a fold below 8, or 0 folds"
    with pytest.raises(ValueError, match=wanted):
        folds(names, 20, 8)
    # it is patients that count: four of two timepoints
    with pytest.raises(ValueError, match="fold 4 of 5 holds out nobody of 4 patients"):
        folds([f"q{n // 2}_{n % 2}" for n in range(8)], 5, 4, r"q\d")
    assert folds(names, 0, 0) == (names, [])


def test_the_cases_of_a_patient_stay_together():
    """Five patients of one to three timepoints; by sorted patient, every second from the first."""
    points = {"A_1": 2, "A_10": 1, "A_2": 3, "B_1": 1, "B_2": 2}
    names = [f"TCGA_{p}_tp{t}" for p, count in points.items() for t in range(count)]
    held = ["TCGA_A_1_tp0", "TCGA_A_1_tp1", "TCGA_A_2_tp0", "TCGA_A_2_tp1", "TCGA_A_2_tp2"]
    # the first group, or the whole match
    for pattern in (r"TCGA_(\w_\d+)_tp", r"[AB]_\d+"):
        training, held_out = folds(names, 2, 0, pattern)
        assert held_out == [*held, "TCGA_B_2_tp0", "TCGA_B_2_tp1"]
        assert sorted(training + held_out) == sorted(names)
    # without, every case is a patient but for BraTS 2023's
    assert folds(names, 2, 0)[1] == sorted(names)[::2]
    glioma = [f"BraTS-GLI-0000{patient}-{point}" for patient in (1, 2) for point in (100, 101)]
    assert folds(glioma, 2, 0)[1] == glioma[:2] == folds(glioma, 2, 0, r"GLI-\d+")[1]


@pytest.mark.parametrize(
    ("pattern", "text"),
    [(r"TCGA_(\d+)", "finds a patient in p1"), ("(p", "expected a regular expression"),
     ("q?", "finds a patient in p1"), ("p1(x)?", "finds a patient in p1")],
)
def test_a_pattern_that_finds_no_patient(pattern, text):
    with pytest.raises(ValueError, match=f"patient is {re.escape(repr(pattern))}, .*{text}"):
        folds(["p1", "TCGA_001_tp1"], 2, 0, pattern)


def test_the_sampler_keeps_its_shares(cases):
    sampler = SliceSampler(cases, lesion_share=0.5, window=32)
    _, labels = sampler.batch(np.random.default_rng(3), 400)
    # half from the 2 lesion slices, the other half 2 of 5 brain slices: 0.5 + 0.5 * 0.4
    share = labels.flatten(1).any(1).double().mean().item()
    assert share == pytest.approx(0.7, abs=0.1)
    assert labels.shape == (400, 32, 32)
    again = sampler.batch(np.random.default_rng(3), 400)[1]
    assert torch.equal(labels, again)
    # another process reads its own part of the same draw, and names what it read
    share = sampler.batch(np.random.default_rng(3), 400, slice(1, None, 4))[1]
    assert torch.equal(share, labels[1::4]) and len(sampler.drawn) == 100
    assert set(sampler.drawn) <= {f"{name} slice {z}" for name in "ab" for z in range(1, 6)}


def test_windows_lie_about_the_lesion(tmp_path):
    """As often above as below, and never without it; a share of lesions is what it says."""
    labels = np.zeros((8, 96, 96), np.uint8)
    labels[5, 50, 41] = 1
    # every pixel tells where it lies
    images = np.stack([np.indices((96, 96)) + 1.0] * 8).astype(np.float32)
    write_cache("one", images, labels, tmp_path)
    case = read_cache("one", tmp_path)
    found, labels = SliceSampler([case], lesion_share=1.0, window=24).batch(
        np.random.default_rng(0), 600
    )
    assert labels.flatten(1).sum(1).tolist() == [1] * 600
    places = labels.nonzero()[:, 1:].double()
    # the middle, and a third of the window to both sides
    assert (places.mean(0) - 12).abs().max() < 1 and places.min() == 4 and places.max() == 20
    assert torch.equal(places, torch.tensor([51.0, 42.0]) - found[:, :, 0, 0].double())
    for wanted in (0.2, 0.8):
        some = SliceSampler([case], lesion_share=wanted, window=24)
        share = some.batch(np.random.default_rng(1), 800)[1].flatten(1).any(1).double().mean()
        # one of the eight others' slices is the lesion's, too
        assert share.item() == pytest.approx(wanted + (1 - wanted) / 8, abs=0.05)


def test_small_slices_are_padded_at_the_bottom_and_right(tmp_path):
    images = np.arange(1.0, 106).reshape(1, 1, 7, 15)
    write_cache("odd", images, (images[:, 0] > 60).astype(np.uint8), tmp_path)
    case = read_cache("odd", tmp_path)
    for sampler in (SliceSampler([case], canvas=(8, 16)), SliceSampler([case], window=16)):
        image, label = sampler.batch(np.random.default_rng(0), 1)
        height, width = image.shape[2:]
        assert (height, width) == ((16, 16) if sampler.window else (8, 16))
        assert torch.equal(image[0, 0, :7, :15].double(), torch.from_numpy(images[0, 0]))
        assert image[0, 0, 7:].abs().sum() == image[0, 0, :, 15:].abs().sum() == 0
        assert torch.equal(label[0] > 0, image[0, 0] > 60)


@pytest.mark.parametrize("objective", ["segmenter", "quantised", "joint"])
def test_a_crop_as_large_as_the_window_sees_the_canvas_around_it(cases, model, objective):
    """Else its last stage never learns what an empty canvas is, and labels it by chance."""
    seen = []

    def note(stage, inputs):
        if not inputs[0].is_meta:  # counting the cost runs a copy
            seen.append(inputs[0].detach())

    model.crop_last_stages[0].register_forward_pre_hook(note)
    set_quantization(model, quantize=objective != "segmenter", update_range=True)
    phase = PhaseConfig(objective, 1, batch=4, oracle_weight=0)
    batches = Batches(cases, seed=0, window=24)
    for step in range(2):
        batches.seek(step)
        OBJECTIVES[objective](model, batches, step, phase).backward()
    assert seen and all((canvas == 0).all(1).flatten(1).any(1).all() for canvas in seen)


def test_d6_the_cost_is_a_mean_over_samples(model):
    def output(batch: int) -> TrainingOutput:
        choice = torch.tensor([[0.0, 1.0, 0.0]]).repeat(batch, 1)
        bits = [torch.full((batch, 4), 8.0), torch.full((batch, 4), 16.0)]
        return TrainingOutput([], None, choice, None, None, bits)

    assert relative_cost(model, output(1)).mean() == pytest.approx(
        relative_cost(model, output(15)).mean().item()
    )


def test_relative_cost_is_differentiable_in_choice_and_width(model):
    choice = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], requires_grad=True)
    bits = [torch.full((2, 4), 8.0, requires_grad=True) for _ in range(2)]
    cost = relative_cost(model, TrainingOutput([], None, choice, None, None, bits))
    cost.sum().backward()
    assert (choice.grad[:, 2] > choice.grad[:, 1]).all() and (choice.grad[:, 1] > 0).all()
    assert (bits[0].grad[0] > 0).all() and (bits[1].grad[1] > 0).all()
    assert bits[0].grad[1].abs().max() == 0


def test_d13_costs_come_from_the_model():
    def whole(name: str) -> float:
        model = build_med_danet_v2(name, in_channels=2, num_classes=2, crop_sizes=(24,))
        table = cost_table(model, (1, 2, 64, 64), "mac")
        return table.slice_cost(torch.tensor([2]), torch.full((1, 4), 32.0)).item()

    assert whole("unet-16") > 1.5 * whole("unet-12")


def test_d7_a_phase_moves_only_its_own_parts(model, cases, tmp_path):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    set_quantization(model, quantize=False, update_range=True)
    phase = PhaseConfig("decisions", steps=3, batch=2)
    run_phase(
        model, OBJECTIVES["decisions"], phase, Batches(cases, window=32), tmp_path / "0.pt",
        Monitor(tmp_path),
    )
    for name, value in model.state_dict().items():
        if not name.startswith(("policy.", "position.")):
            assert torch.equal(value, before[name]), name
    assert not torch.equal(model.policy.classifier.weight, before["policy.classifier.weight"])


def test_d7_frozen_parts_stand_still_norms_and_dropout_included(model, cases, tmp_path):
    """The published code's third phase: the losses of all branches, but the policy alone moves."""
    phase = PhaseConfig("joint", 3, batch=4, parts=("policy",), loss="dice", cost_weight=0.3)
    set_quantization(model, quantize=False, update_range=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run_phase(
        model, OBJECTIVES["joint"], phase, Batches(cases, window=32), tmp_path / "0.pt",
        Monitor(tmp_path),
    )
    for name, value in model.state_dict().items():
        if not name.startswith("policy."):
            assert torch.equal(value, before[name]), name
    assert not torch.equal(model.policy.classifier.weight, before["policy.classifier.weight"])


@pytest.mark.parametrize("objective", ["segmenter", "quantised", "joint", "static"])
def test_each_objective_learns(model, cases, tmp_path, objective):
    set_quantization(model, quantize=objective != "static", update_range=True)
    batches = Batches(cases, window=48)
    phase = PhaseConfig(objective, steps=16, batch=2, cost_weight=0.06)
    trained = model.segmenter if objective == "static" else model
    optimizer = torch.optim.Adam(trained.parameters(), lr=3e-3)
    losses = []
    for step in range(16):
        batches.seek(step)
        loss = OBJECTIVES[objective](trained.train(), batches, step, phase)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all()
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])


def test_the_schedule_warms_up_and_falls_to_nothing():
    rates = [schedule(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(1 / 50) and max(rates) == 1.0
    assert rates[525] == pytest.approx(0.5**0.9, rel=1e-3)
    assert rates[-1] < 0.01 and all(a >= b for a, b in zip(rates[50:], rates[51:], strict=False))


def test_a_phase_that_another_continues_keeps_its_rate():
    rates = [schedule(step, 1000, decay=False) for step in range(1000)]
    assert rates[0] == pytest.approx(1 / 50) and set(rates[49:]) == {1.0}


def test_the_whole_recipe_on_a_phantom(tmp_path):
    """Two steps a phase; the baseline continues the static ones; a second call repeats nothing."""
    for seed in (1, 2):
        write_phantom(tmp_path / "data", seed=seed, name=f"case_{seed}", shape=(136, 144, 24))
    config = TrainConfig(
        str(tmp_path / "data"), str(tmp_path / "run"), folds=2, phantoms=0, segmenter="unet-4"
    )
    for phase in [*config.phases, config.baseline]:
        phase.steps, phase.batch = 2, 1
    config.validate_every, config.validation_slices = 2, 4
    path = train(config)
    model = load_model(path)
    assert model.decision_scale == 2 and model.metadata["held_out"] == ["case_1"]
    assert model.metadata["modalities"] == ["flair", "t1ce", "t1", "t2"]
    names = ["0-static", "1-static", "2-segmenter", "3-decisions", "4-quantised", "baseline"]
    for file in ("log.jsonl", "validation.jsonl"):
        assert [json.loads(line)["phase"] for line in (path.parent / file).open()] == names
    first, last = (
        torch.load(path.with_name(name), weights_only=True)["model"]
        for name in ("1-static.pt", "baseline.pt")
    )
    # two steps of Adam at a hundredth of the rate move no weight far
    moved = (last["init.weight"] - first["segmenter.init.weight"]).abs().max()
    assert 0 < moved < 0.01
    written = path.stat().st_mtime_ns, (path.parent / "log.jsonl").read_text()
    train(config)
    assert (path.parent / "log.jsonl").read_text() == written[1]


def test_dice_loss_by_hand():
    labels = torch.tensor([[[0, 1], [1, 2]]])
    probability = F.one_hot(torch.tensor([[[0, 1], [0, 0]]]), 3).movedim(-1, 1).double()
    # class 1: (2 * 1 + 1) / (1 + 2 + 1), class 2: (0 + 1) / (0 + 1 + 1)
    assert dice_loss(probability, labels).item() == pytest.approx(1 - (0.75 + 0.5) / 2)


def test_d9_one_convolution_per_width_not_per_sample():
    calls = []

    def convolve(x, w):
        calls.append(len(x))
        return F.conv2d(x, w)

    widths = torch.tensor([8, 16, 8, 8, 16, 8])
    conv_per_width(convolve, torch.randn(6, 3, 4, 4), torch.randn(2, 3, 1, 1), widths,
                   torch.tensor(1.0))
    assert sorted(calls) == [2, 4]


def test_bfloat16_on_a_cpu_that_has_none_is_a_warning(monkeypatch, recwarn):
    phases = [PhaseConfig("static", 1), PhaseConfig("segmenter", 1, autocast="bfloat16")]
    config = TrainConfig("", "", phases=phases, baseline=None)
    for slow, told in ((False, 0), (True, 1)):
        monkeypatch.setattr(run_checks, "emulates_bfloat16", lambda _, slow=slow: slow)
        run_checks.warn_of_emulation(config, torch.device("cpu"))
        assert len(recwarn) == told
    text = str(recwarn.pop().message)
    assert text.startswith("this CPU has no bfloat16, which phases (1: segmenter) are to comp")
    assert not emulates_bfloat16(torch.device("cuda"))
