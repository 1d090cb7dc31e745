"""V1: routing of a bank, its cost, its weights file, and volumes through it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from meddanet.build import build_decision_network, build_med_danet, build_segmenter
from meddanet.cost import cost_table, count_macs
from meddanet.data import Volume
from meddanet.med_danet import MedDANet
from meddanet.predictor import VolumePredictor
from meddanet.preview import write_preview
from meddanet.report import case_report
from meddanet.weights import load_model, save_model

pytestmark = pytest.mark.usefixtures("few_units")

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


class FixedLogits(nn.Module):
    """A decision network whose answer for each slice is written in the slice's first pixel."""

    def forward(self, slices: torch.Tensor) -> torch.Tensor:
        return 9.0 * torch.eye(3)[slices[:, 0, 0, 0].round().long()]


@pytest.fixture
def model() -> MedDANet:
    torch.manual_seed(0)
    model = build_med_danet(("unet-4", "transbts-light"), in_channels=2, num_classes=3)
    model.decision = FixedLogits()
    return model.eval()


def slices_for(decisions: list[int], side: tuple[int, int] = (24, 32)) -> torch.Tensor:
    slices = torch.randn(len(decisions), 2, *side, generator=torch.Generator().manual_seed(1))
    slices[:, 0, 0, 0] = torch.tensor(decisions, dtype=torch.float32)
    return slices


@torch.no_grad()
def test_segment_is_slice_by_slice_what_the_chosen_member_says(model):
    decisions = [0, 2, 1, 2, 0, 1, 1]
    slices = slices_for(decisions)
    result = model.segment(slices)
    assert result.decisions.tolist() == decisions
    assert result.labels.dtype == torch.uint8 and result.offsets.shape == (7, 2)
    assert not result.offsets.any() and result.num_bits.shape == (7, 0)
    for index, decision in enumerate(decisions):
        if decision == 0:
            assert not result.labels[index].any()
            continue
        wanted = model.bank[decision - 1](slices[index : index + 1]).argmax(1)[0]
        # rounding differs with the batch only where two logits tie
        assert (result.labels[index] != wanted).float().mean() < 1e-3


@torch.no_grad()
def test_each_member_runs_once_on_its_slices_and_on_no_other(model):
    batches: dict[int, list[int]] = {0: [], 1: []}
    for number, member in enumerate(model.bank):
        member.register_forward_hook(
            lambda module, args, output, number=number: batches[number].append(len(args[0]))
        )
    model.segment(slices_for([0, 2, 1, 2, 0, 2]))
    assert batches == {0: [1], 1: [3]}
    blank = slices_for([2, 2])
    blank[:] = 0
    seen: list[int] = []
    model.decision.register_forward_hook(lambda module, args, output: seen.append(1))
    assert not model.segment(blank).labels.any()
    assert batches == {0: [1], 1: [3]} and seen == []


@torch.no_grad()
def test_results_are_deterministic_and_do_not_depend_on_neighbours():
    torch.manual_seed(3)
    model = build_med_danet(("unet-4", "unet-8"), in_channels=2, num_classes=3)
    nn.init.normal_(model.decision.classifier.weight)  # decisions that differ from slice to slice
    for module in model.modules():  # in the state of a trained one: statistics of such slices
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    slices = torch.randn(12, 2, 32, 40) * torch.linspace(0.2, 3, 12)[:, None, None, None]
    model.train()
    with torch.no_grad():
        model(slices)
    model.eval()
    first, second = model.segment(slices), model.segment(slices)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len(first.decisions.unique()) > 1
    shuffled = torch.randperm(12)
    other = model.segment(slices[shuffled])
    assert torch.equal(other.decisions, first.decisions[shuffled])
    assert (other.labels != first.labels[shuffled]).float().mean() < 1e-3
    for index in range(12):
        alone = model.segment(slices[index : index + 1])
        assert torch.equal(alone.decisions[0], first.decisions[index])
        assert (alone.labels[0] != first.labels[index]).float().mean() < 1e-3


@torch.no_grad()
def test_windows_vote_and_skipping_ones_vote_for_background(model):
    slices = slices_for([1], (24, 24))
    slices[0, 0] = 0.0
    slices[0, 0, 0, 0] = 1.0  # only the first window reads decision 1
    result = model.segment_windows(slices, window=16)
    origins = [(y, x) for y in (0, 5, 8) for x in (0, 5, 8)]
    assert result.decisions[0].tolist() == [1] + [0] * 8
    assert result.num_bits.shape == (1, 9, 0)
    votes = torch.zeros(3, 24, 24)
    for y, x in origins:
        if (y, x) == (0, 0):
            votes[:, :16, :16] += model.bank[0](slices[:, :, :16, :16]).softmax(1)[0]
        else:
            votes[0, y : y + 16, x : x + 16] += 1
    assert torch.equal(result.labels[0].long(), votes.argmax(0))


def test_forward_is_every_members_answer_and_differentiable(model):
    model.decision = build_decision_network("shufflenetv2-m", 3, in_channels=2)
    slices = slices_for([1, 2])
    out = model(slices)
    assert out.route_logits.shape == (2, 3)
    for logits, member in zip(out.member_logits, model.bank, strict=True):
        assert torch.equal(logits, member(slices)) and logits.shape == (2, 3, 24, 32)
    model.train()
    out = model(slices)
    sum(x.square().mean() for x in [*out.member_logits, out.route_logits]).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.usefixtures("all_units")
def test_the_papers_bank_is_the_default():
    with torch.device("meta"):
        model = build_med_danet()
    assert model.routes == ("skip", "M1", "M2", "M3", "M4")
    assert model.config["bank"] == ["unet-12", "unet-16", "transbts-light", "transbts"]
    table = cost_table(model, (1, 4, 128, 128), "paper")
    # V1 Table 3, per inference, and 0.078 / 16 for the decision network on every route
    deciding = table.parts["skip"]["decision"]
    assert table.parts["skip"] == {"decision": deciding}
    assert f"{16 * deciding / 1e9:.3f}" == "0.078"
    members = [f"{(table.macs(r) - deciding) / 1e9:.3f}" for r in table.routes[1:]]
    assert members == ["0.605", "1.067", "2.358", "4.979"]
    assert table.stages == () and "transformer" in table.parts["M3"]
    assert table.static_macs() == table.macs("M4") - deciding
    assert count_macs(model, (2, 4, 128, 128), "paper") == 2 * table.macs("M4")
    assert "M4: 79." in table.render()


class Foreign(nn.Module):
    """A segmenter made elsewhere: nothing but a function of slices."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2, 3, 3, padding=1)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.layer(input)


@torch.no_grad()
def test_any_segmenter_can_be_a_member():
    bank = nn.ModuleList([Foreign(), build_segmenter("unet-4", 2, 3)])
    model = MedDANet(bank=bank, decision=FixedLogits(), in_channels=2, num_classes=3).eval()
    slices = slices_for([1, 2, 0])
    labels = model.segment(slices).labels
    assert torch.equal(labels[0].long(), bank[0](slices[:1]).argmax(1)[0])
    table = cost_table(model, (1, 2, 24, 32), "mac")
    assert table.parts["M1"] == {"M1": 9 * 2 * 3 * 24 * 32}
    assert table.macs("M2") == count_macs(bank[1], (1, 2, 24, 32))


@torch.no_grad()
def test_weights_come_back_and_volumes_go_through(tmp_path, tolerances):
    torch.manual_seed(0)
    model = build_med_danet(("unet-4", "unet-8"), in_channels=1, num_classes=3).eval()
    nn.init.normal_(model.decision.classifier.weight)
    path = tmp_path / "bank.safetensors"
    save_model(model, path, modalities=("mri",), label_convention="brats2023", fold=2)
    loaded = load_model(path)
    assert isinstance(loaded, MedDANet) and not loaded.training
    assert loaded.metadata["fold"] == 2 and loaded.routes == model.routes
    slices = torch.randn(4, 1, 24, 32)
    for ours, theirs in zip(model(slices).member_logits, loaded(slices).member_logits, strict=True):
        tolerances.elementwise(theirs, ours)
    # neither on the stride nor brain tumours, although the naming is the Decathlon's
    data = np.random.default_rng(0).uniform(1, 9, (1, 21, 30, 7)).astype(np.float32)
    volume = Volume(data, LPS, None, ("mri",), "msd", "hippocampus_001")
    prediction = VolumePredictor(loaded, "cpu").predict(volume)
    assert prediction.label_convention == "brats2023"
    padded = torch.zeros(7, 1, 24, 32)
    normal = torch.from_numpy((data - data.mean()) / data.std()).permute(3, 0, 1, 2)
    padded[:, :, :21, :30] = normal
    wanted = loaded.segment(padded)
    assert prediction.decisions.tolist() == wanted.decisions.tolist()
    expected = wanted.labels[:, :21, :30].permute(1, 2, 0).numpy()
    tolerances.labels(prediction.labels, expected, share=1e-3)
    macs = {r: cost_table(loaded, (1, 1, 24, 32)).macs(r) for r in loaded.routes}
    assert prediction.cost["mac"] == sum(macs[loaded.routes[d]] for d in prediction.decisions)
    assert prediction.cost["static_mac"] == 7 * count_macs(loaded.bank[1], (1, 1, 24, 32))
    assert prediction.cost["scaled_paper"] == pytest.approx(prediction.cost["paper"])
    report = json.loads(json.dumps(case_report(volume, prediction, 1.0)))
    assert list(report["decisions"]) == ["skip", "M1", "M2"]
    assert sum(report["decisions"].values()) == 7
    write_preview(volume, prediction, tmp_path / "preview.png")
    assert (tmp_path / "preview.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build_med_danet(()), "the bank is empty"),
        (lambda: build_med_danet(("unet-4", "vgg")), "unknown segmenter 'vgg'"),
        (lambda: build_med_danet(("unet-4",)).segment(torch.ones(1, 4, 20, 24)), "pad to 24x24"),
        (lambda: build_med_danet(("unet-4",)).segment(torch.ones(1, 3, 16, 16)), r"\[N, 4, H, W\]"),
        (lambda: VolumePredictor(build_med_danet(("unet-4",)), "cpu", window=12), "window is 12"),
    ],
)
def test_bad_requests_name_the_cure(call, message):
    with pytest.raises(ValueError, match=message):
        call()
