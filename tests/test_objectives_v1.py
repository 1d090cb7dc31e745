"""V1's two training steps on hand-made cases."""

from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from meddanet.batches import Batches
from meddanet.build import build_med_danet
from meddanet.data.slices import read_cache, write_cache
from meddanet.losses import papers_segmentation_loss, segmentation_loss
from meddanet.monitor import Monitor
from meddanet.objectives_v1 import DecisionObjective, bank, decision_labels, member_scores
from meddanet.phase import run_phase
from meddanet.recipe import DecisionConfig, PhaseConfig

pytestmark = pytest.mark.usefixtures("few_units")


@pytest.fixture
def batches(tmp_path) -> Batches:
    """One case of 8 slices: noise, and a bright square in the upper half of them."""
    images = np.random.default_rng(0).normal(size=(8, 1, 16, 16)).astype(np.float32)
    labels = np.zeros((8, 16, 16), np.uint8)
    labels[4:, 4:12, 4:12] = 1
    write_cache("a", images + 5 * labels[:, None], labels, tmp_path)
    return Batches([read_cache("a", tmp_path)], seed=0)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_med_danet(("unet-2", "unet-4"), in_channels=1, num_classes=2)


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(module: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(value, before[name]) for name, value in module.state_dict().items())


class Fixed:
    """Batches that are always the same."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels

    def slice_batch(self, size):
        return self.images, self.labels


def test_the_joint_loss_is_the_mean_over_those_still_in(model):
    images, labels = torch.randn(2, 1, 16, 16), torch.randint(0, 2, (2, 16, 16))
    fixed = Fixed(images, labels)
    model.eval()
    alone = [segmentation_loss(member(images), labels) for member in model.bank]
    phase = PhaseConfig("bank", 5, batch=2, stay=(0.6, 1.0), windows=False)
    torch.testing.assert_close(bank(model, fixed, 2, phase), (alone[0] + alone[1]) / 2)
    torch.testing.assert_close(bank(model, fixed, 3, phase), alone[1])
    phase = PhaseConfig("bank", 5, batch=2, stay=(1.0, 0.0), windows=False, loss="dice")
    expected = papers_segmentation_loss(model.bank[0](images), labels)
    torch.testing.assert_close(bank(model, fixed, 0, phase), expected)


def test_a_member_that_has_left_stands_still(model, batches, tmp_path):
    """Neither Adam's momentum nor weight decay nor batch norm's statistics move it."""
    seen = {}

    def note(module, args, output):
        steps = seen.setdefault("steps", [])
        steps.append(snapshot(model.bank[0]))

    model.bank[1].register_forward_hook(note)
    phase = PhaseConfig("bank", 4, batch=2, stay=(0.5, 1.0), windows=False, parts=("bank",))
    before = snapshot(model.decision)
    run_phase(model, bank, phase, batches, None, Monitor(tmp_path))
    # the larger member's forward of step i comes after the smaller one's update of step i - 1
    first, second, third, last = seen["steps"]
    assert any(not torch.equal(first[n], second[n]) for n in first)
    assert all(torch.equal(third[n], last[n]) for n in third)
    assert not changed(model.bank[0], last)
    assert not changed(model.decision, before)


def test_shares_count_the_steps_that_a_phase_has_now(model, batches, tmp_path):
    """Left after 2 of 4 steps; of 12 it has half too, so it is back for those up to the sixth."""
    now, ran = [], []
    model.bank[0].register_forward_hook(lambda *_: ran.append(now[-1]))

    def noting(model, batches, step, phase):
        now.append(step)
        return bank(model, batches, step, phase)

    for steps, expected in ((4, [0, 1]), (12, [0, 1, 4, 5])):
        phase = PhaseConfig("bank", steps, batch=2, stay=(0.5, 1.0), windows=False, parts=("bank",))
        run_phase(model, noting, phase, batches, tmp_path / "bank.pt", Monitor(tmp_path))
        assert ran == expected
    assert now == list(range(12))


def test_a_phase_per_member_trains_each_on_its_own(model, batches, tmp_path):
    for index in range(2):
        before = [snapshot(member) for member in model.bank]
        stay = tuple(float(i == index) for i in range(2))
        phase = PhaseConfig("bank", 2, batch=2, stay=stay, parts=("bank",))
        run_phase(model, bank, phase, batches, None, Monitor(tmp_path))
        moved = [changed(m, b) for m, b in zip(model.bank, before, strict=True)]
        assert moved == [i == index for i in range(2)]


def test_decision_labels_by_hand(model):
    """M1 finds all, M2 finds half: Dice 1 and 2/3; F in G is so small that softmax is (1, 0)."""
    labels = torch.zeros(4, 16, 16, dtype=torch.long)
    labels[1:, :4, :4] = 1

    class Answer(nn.Module):
        def __init__(self, rows: list[int]) -> None:
            super().__init__()
            self.rows = rows

        def forward(self, images):
            found = torch.zeros(len(images), 16, 16, dtype=torch.long)
            for index, which in enumerate(images[:, 0, 0, 0].long()):
                found[index, : self.rows[which], :4] = 1
            return F.one_hot(found, 2).movedim(-1, 1).float()

    images = torch.arange(4.0)[:, None, None, None].expand(4, 1, 16, 16).clone()
    model.bank = nn.ModuleList([Answer([0, 4, 2, 4]), Answer([0, 2, 4, 4])])
    scores = member_scores(model, images[1:], labels[1:])
    torch.testing.assert_close(
        scores, torch.tensor([[1, 2 / 3], [2 / 3, 1], [1, 1]], dtype=torch.float64)
    )
    wanted = decision_labels(model, images, labels, (1e6, 2e6), DecisionConfig(alpha=0.001))
    assert wanted.tolist() == [0, 1, 2, 1]
    # the cheaper one wins as soon as a third of Dice is worth less than the cost
    cheap = decision_labels(model, images, labels, (1e6, 2e6), DecisionConfig(alpha=0.3))
    assert cheap.tolist() == [0, 1, 1, 1]
    nothing = decision_labels(model, images, torch.zeros_like(labels), (1, 2), DecisionConfig())
    assert nothing.tolist() == [0, 0, 0, 0]


def test_the_decision_loss_is_weighted_cross_entropy(model):
    images, labels = torch.randn(3, 1, 16, 16), torch.zeros(3, 16, 16, dtype=torch.long)
    labels[1:, 4:8, 4:8] = 1
    model.eval()
    config = DecisionConfig(route_weights=(0.5, 1.0, 2.0))
    objective = DecisionObjective(model, config)
    phase = PhaseConfig("decision", 1, batch=3, windows=False)
    loss = objective(model, Fixed(images, labels), 0, phase)
    macs = objective.member_macs(model, (1, 16, 16))
    wanted = decision_labels(model, images, labels, macs, config)
    weight = torch.tensor(config.route_weights)[wanted]
    log_p = model.decide(images).log_softmax(1)[torch.arange(3), wanted]
    torch.testing.assert_close(loss, -(weight * log_p).sum() / weight.sum())
    assert objective.counts.tolist() == wanted.bincount(minlength=3).tolist()
    # from 0.8 for skip to 1.2 for the last member, where nothing else is said
    assert DecisionObjective(model, DecisionConfig()).weights.tolist() == pytest.approx(
        [0.8, 1.0, 1.2]
    )


def decide(steps: int) -> PhaseConfig:
    return PhaseConfig(
        "decision", steps, batch=8, learning_rate=5e-3, parts=("decision",), windows=False
    )


def test_the_decision_network_learns_to_skip_and_the_bank_stays(model, batches, tmp_path):
    phase = PhaseConfig("bank", 2, batch=4, parts=("bank",))
    run_phase(model, bank, phase, batches, None, Monitor(tmp_path))
    before = snapshot(model.bank)
    objective = DecisionObjective(model, DecisionConfig())
    run_phase(model, objective, decide(150), batches, None, Monitor(tmp_path))
    assert not changed(model.bank, before)
    assert objective.counts.sum() == 150 * 8
    assert objective.counts[0].item() == pytest.approx(600, abs=70)
    model.eval()
    case = batches.cases[0]
    slices = torch.from_numpy(case.images.astype(np.float32))
    decisions = model.segment(slices).decisions
    assert (decisions[:4] == 0).all() and (decisions[4:] > 0).all()


def test_counting_goes_on_where_a_checkpoint_stands(model, batches, tmp_path):
    whole = DecisionObjective(model, DecisionConfig())
    run_phase(deepcopy(model), whole, decide(4), batches, None, Monitor(tmp_path))

    class Killed(Exception):
        pass

    class Half(DecisionObjective):
        def __call__(self, model, batches, step, phase):
            if step == 2:
                raise Killed
            return super().__call__(model, batches, step, phase)

    file = tmp_path / "decision.pt"
    with pytest.raises(Killed):
        run_phase(
            deepcopy(model), Half(model, DecisionConfig()), decide(4), batches, file,
            Monitor(tmp_path), every=1,
        )
    resumed = DecisionObjective(model, DecisionConfig())
    run_phase(deepcopy(model), resumed, decide(4), batches, file, Monitor(tmp_path))
    assert resumed.counts.tolist() == whole.counts.tolist() and resumed.counts.sum() == 32


@pytest.mark.parametrize("stay", [(1.0,), (1.0, 1.0, 1.0), (0.0, 0.5), (1.0, 1.5)])
def test_shares_that_do_not_fit_the_bank(model, batches, stay):
    with pytest.raises(ValueError, match="expected a share .* for each of 2 members"):
        bank(model, batches, 0, PhaseConfig("bank", 4, batch=2, stay=stay))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 1.0, -1.0)])
def test_weights_that_do_not_fit_the_routes(model, weights):
    with pytest.raises(ValueError, match="expected 3 of them, none negative: skip, M1, M2"):
        DecisionObjective(model, DecisionConfig(route_weights=weights))
