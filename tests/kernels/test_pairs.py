"""Pairs of float32 against float64 and exact fractions."""

from fractions import Fraction

import torch

from meddanet.kernels.pairs import join_floats, split_floats


def test_a_pair_holds_48_bits() -> None:
    torch.manual_seed(0)
    values = torch.randn(3, 1000, dtype=torch.float64) * 10.0 ** torch.randint(-20, 20, (3, 1000))

    pairs = split_floats(values)

    assert pairs.shape == (3, 2, 1000) and pairs.dtype == torch.float32
    assert torch.equal(pairs[:, 0], values.float())
    for value, head, tail in zip(*(t.flatten().tolist() for t in (values, *pairs.unbind(1))),
                                 strict=True):
        assert abs(Fraction(head) + Fraction(tail) - Fraction(value)) <= abs(value) * 2.0**-48
    assert torch.equal(join_floats(pairs), pairs[:, 0].double() + pairs[:, 1].double())
    assert torch.equal(join_floats(pairs, torch.float32), values.float())


def test_float32_is_its_own_head() -> None:
    values = torch.tensor([1.5, -0.1, float("inf"), float("nan")])

    pairs = split_floats(values)

    assert torch.equal(pairs[0, :3], values[:3]) and not pairs[1].any()
    assert torch.equal(join_floats(pairs)[:3], values.double()[:3])


def test_what_is_not_finite_stays() -> None:
    # the last one is beyond float32
    values = torch.tensor([float("inf"), float("-inf"), float("nan"), 1e300], dtype=torch.float64)

    inf, minus_inf, nan, large = join_floats(split_floats(values)).tolist()

    assert (inf, minus_inf, large) == (float("inf"), -float("inf"), float("inf")) and nan != nan
