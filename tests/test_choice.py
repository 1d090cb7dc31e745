"""V1's choice metric by hand, with the numbers of its published bank."""

import pytest
import torch

from meddanet.choice import choice_metric, slice_dice
from meddanet.metrics import dice_score
from meddanet.recipe import DecisionConfig

# V1 Table 3, G per inference: windows of 128 x 128 and whole slices
WINDOW = (0.605e9, 1.067e9, 2.358e9, 4.979e9)
WHOLE = (2.126e9, 3.752e9, 8.882e9, 19.878e9)
BRATS = ((1, 2, 3), (1, 3), (3,))


@pytest.mark.parametrize(
    ("macs", "shares"),
    [(WINDOW, [0.496, 0.243, 0.145, 0.116]), (WHOLE, [0.315, 0.257, 0.220, 0.207])],
)
def test_the_softmax_of_inverse_costs_in_g(macs, shares):
    values = choice_metric(torch.zeros(1, 4), macs, DecisionConfig(alpha=1.0))
    assert [round(x, 3) for x in values[0].tolist()] == shares


def test_counted_in_single_operations_the_cost_has_no_effect():
    config = DecisionConfig(alpha=1.0, cost_unit=1.0)
    values = choice_metric(torch.zeros(1, 4), WINDOW, config)
    torch.testing.assert_close(values, torch.full((1, 4), 0.25, dtype=torch.float64))


def test_the_variants_of_table_4_by_hand():
    """Two members, Dice 0.8 and 0.9, 0.5 and 1 G, alpha 0.1."""
    scores, macs = torch.tensor([[0.8, 0.9]]), (0.5e9, 1e9)
    e = 2.718281828459045
    share = 1 / (1 + e)  # softmax of (2, 1), the second
    soft = 1 / (1 + e**0.1)  # softmax of (0.8, 0.9), the first
    wanted = {
        (False, True): [0.72 + 0.1 * (1 - share), 0.81 + 0.1 * share],
        (True, True): [0.9 * soft + 0.1 * (1 - share), 0.9 * (1 - soft) + 0.1 * share],
        (False, False): [0.72 + 0.2, 0.81 + 0.1],
        (True, False): [0.9 * soft + 0.2, 0.9 * (1 - soft) + 0.1],
    }
    for (of_scores, of_costs), values in wanted.items():
        config = DecisionConfig(0.1, softmax_scores=of_scores, softmax_costs=of_costs)
        torch.testing.assert_close(
            choice_metric(scores, macs, config), torch.tensor([values], dtype=torch.float64),
            rtol=1e-6, atol=0,
        )


def test_the_argmax_breaks_ties_towards_the_cheap():
    # the cost term of M1 over M2 is 0.001 * (0.496 - 0.243) = 0.00025
    scores = torch.tensor([
        [0.9000, 0.9002, 0.9, 0.9], [0.9000, 0.9004, 0.9, 0.9], [0.1, 0.2, 0.3, 0.9], [1, 1, 1, 1.0]
    ], dtype=torch.float64)
    for alpha, members in ((0.001, [0, 1, 3, 0]), (0, [1, 1, 3, 0]), (1, [0, 0, 0, 0])):
        metric = choice_metric(scores, WINDOW, DecisionConfig(alpha=alpha))
        assert metric.argmax(1).tolist() == members


def test_slice_dice_is_that_of_the_evaluation():
    random = torch.Generator().manual_seed(0)
    prediction, labels = (torch.randint(0, 4, (5, 9, 7), generator=random) for _ in range(2))
    prediction[1], labels[1] = 0, 0  # empty in both
    labels[2] = 0  # empty in one
    labels[3] = prediction[3]
    wanted = [
        sum(dice_score(p.numpy(), t.numpy(), labels=dict(enumerate(BRATS))).values()) / 3
        for p, t in zip(prediction, labels, strict=True)
    ]
    scores = slice_dice(prediction, labels, BRATS)
    assert scores.tolist() == pytest.approx(wanted, abs=1e-6)
    assert scores[1] == 1 and scores[2] == 0 and scores[3] == 1
    torch.testing.assert_close(slice_dice(prediction.to(torch.uint8), labels, BRATS), scores)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"alpha": 1.5}, "alpha is 1.5"), ({"alpha": -0.1}, "alpha is -0.1"),
     ({"cost_unit": 0}, "cost_unit is 0")],
)
def test_numbers_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        DecisionConfig(**arguments)
