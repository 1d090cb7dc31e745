"""A tolerance that cannot fail is no tolerance: each rule passes and fails where it should."""

import numpy as np
import pytest
import torch

EXACT = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)


def test_elementwise_rejects_an_error_of_ten_float32_epsilons(tolerances):
    expected = EXACT.float()
    tolerances.elementwise(expected.clone(), expected)
    with pytest.raises(AssertionError, match="not close"):
        tolerances.elementwise(expected * (1 + 1e-4), expected)


def test_elementwise_has_no_rule_for_half(tolerances):
    with pytest.raises(AssertionError, match="no rule"):
        tolerances.elementwise(EXACT.half(), EXACT.half())


def test_reduction_allows_twice_the_native_error(tolerances):
    native = (EXACT + 1e-3).float()
    tolerances.reduction((EXACT - 1.9e-3).float(), native=native, exact=EXACT)
    with pytest.raises(AssertionError, match="error"):
        tolerances.reduction((EXACT - 2.1e-3).float(), native=native, exact=EXACT)


def test_reduction_rejects_nan(tolerances):
    native = EXACT.float()
    with pytest.raises(AssertionError, match="nan"):
        tolerances.reduction(native * float("nan"), native=native, exact=EXACT)


def test_codes_may_differ_by_one_at_a_tie_and_nowhere_else(tolerances):
    quotient = torch.full((2000,), 3.2, dtype=torch.float64)
    quotient[0] = 4.5
    expected = quotient.round().to(torch.int8)
    at_tie, elsewhere, two_steps = expected.clone(), expected.clone(), expected.clone()
    at_tie[0] += 1
    elsewhere[1] += 1
    two_steps[0] += 2
    tolerances.codes(expected, expected, quotient=quotient)
    tolerances.codes(at_tie, expected, quotient=quotient)
    for wrong in (elsewhere, two_steps):
        with pytest.raises(AssertionError, match="1 of 2000"):
            tolerances.codes(wrong, expected, quotient=quotient)


def test_codes_bound_the_share_of_ties(tolerances):
    quotient = torch.full((100,), 4.5, dtype=torch.float64)
    expected = quotient.round().to(torch.int8)
    with pytest.raises(AssertionError, match="1.00e[+]00"):
        tolerances.codes(expected + 1, expected, quotient=quotient)


def test_labels_are_equal_unless_a_share_is_stated(tolerances):
    expected = np.zeros((10, 10), np.uint8)
    actual = expected.copy()
    actual[0, 0] = 1
    tolerances.labels(actual, expected, share=0.01)
    with pytest.raises(AssertionError, match="1.00e-02"):
        tolerances.labels(actual, expected)


def test_nan_poisoning_fills_uninitialised_memory(nan_poisoning):
    assert torch.empty(3).isnan().all()
    assert (torch.empty(3, dtype=torch.int8) == 127).all()
