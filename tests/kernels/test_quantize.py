"""fake_quantize against cases worked by hand, exact rational arithmetic and PyTorch's own op."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meddanet.kernels import fake_quantize, fake_quantize_reference

pytestmark = pytest.mark.usefixtures("nan_poisoning")

QMAX = {2: 1, 3: 3, 4: 7, 8: 127, 12: 2047, 15: 16383, 16: 32639}
finite = st.floats(-1e6, 1e6, width=32)


def rounded_by_hand(value: float, num_bits: int, amax: float) -> float:
    """The contract's grid in float32: every quotient is exact until its one stated rounding."""
    largest = QMAX[num_bits]
    step = np.float32(amax) / np.float32(largest)
    quotient = np.float32(value) / step
    code = max(-largest, min(largest, round(Fraction(float(quotient)))))  # round: half to even
    return float(np.float32(code) * step)


def test_codes_worked_by_hand():
    # 3 bits: codes -3..3; a range of 3 makes the step 1, so values are their own quotients
    x = torch.tensor([-3.0, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 2.51, 3.0, 7.0, -99.0])
    wanted = torch.tensor([-3.0, -2.0, -2.0, 0.0, 0.0, 2.0, 2.0, 3.0, 3.0, 3.0, -3.0])
    assert torch.equal(fake_quantize(x, 3, torch.tensor(3.0)), wanted)


@pytest.mark.parametrize("num_bits", QMAX)
def test_the_largest_code_of_each_width(num_bits):
    largest = float(QMAX[num_bits])
    x = torch.tensor([largest, largest - 1, largest + 1, -largest - 9, 0.4])
    wanted = torch.tensor([largest, largest - 1, largest, -largest, 0.0])
    assert torch.equal(fake_quantize(x, num_bits, torch.tensor(largest)), wanted)


@pytest.mark.parametrize("num_bits", [2, 8, 16])
def test_float32_values_are_those_of_exact_arithmetic(num_bits):
    x = torch.randn(3, 4, 5)
    amax = x.abs().max().item()
    wanted = [rounded_by_hand(value, num_bits, amax) for value in x.flatten().tolist()]
    assert fake_quantize(x, num_bits).flatten().tolist() == wanted


def test_codes_agree_with_pytorch_except_at_ties(tolerances):
    x = torch.randn(5000)
    amax = x.abs().max()
    step = (amax / 127).item()
    native = torch.fake_quantize_per_tensor_affine(x, step, 0, -127, 127)
    codes = (fake_quantize(x, 8) / step).round().int()
    # pytorch multiplies by 1 / step in float32, one more rounding than a division
    tolerances.codes(codes, (native / step).round().int(), quotient=x.double() / step)


def test_the_whole_tensor_shares_a_range_for_an_int_each_sample_for_a_tensor():
    x = torch.tensor([[127.0, 63.4], [1.0, 0.5]])
    assert torch.equal(fake_quantize(x, 8), torch.tensor([[127.0, 63.0], [1.0, 0.0]]))
    per_sample = fake_quantize(x, torch.tensor([8, 2]))
    assert torch.equal(per_sample, torch.tensor([[127.0, 63.0], [1.0, 0.0]]))
    per_sample = fake_quantize(x, torch.tensor([2, 8]))
    assert per_sample[0].tolist() == [127.0, 0.0]
    assert per_sample[1].tolist() == [rounded_by_hand(v, 8, 1.0) for v in (1.0, 0.5)]


@pytest.mark.parametrize("shape", [(), (1,), (3, 1, 1, 1), (1, 4, 1, 1), (3, 4, 5, 6), (6,)])
@pytest.mark.parametrize("per_sample", [False, True])
def test_every_range_that_broadcasts(shape, per_sample):
    x, amax = torch.randn(3, 4, 5, 6), torch.rand(shape) + 0.5
    num_bits = torch.tensor([4, 8, 16]) if per_sample else 8
    widths = [4, 8, 16] if per_sample else [8] * 3
    ranges = amax.expand(x.shape)
    wanted = [
        [rounded_by_hand(v, b, a) for v, a in zip(xs, ranges_n, strict=True)]
        for b, xs, ranges_n in zip(
            widths, x.flatten(1).tolist(), ranges.flatten(1).tolist(), strict=True
        )
    ]
    assert fake_quantize(x, num_bits, amax).flatten(1).tolist() == wanted


def test_a_sample_does_not_depend_on_its_neighbours():
    x = torch.randn(4, 3, 5, 5) * torch.tensor([1.0, 100.0, 1e-3, 1.0])[:, None, None, None]
    widths = torch.tensor([8, 16, 2, 5])
    together = fake_quantize(x, widths)
    for n in range(4):
        assert torch.equal(together[n : n + 1], fake_quantize(x[n : n + 1], widths[n : n + 1]))


def test_widths_carry_the_rounding_noise_of_a_straight_through_sum():
    x = torch.randn(3, 50)
    soft = torch.tensor([8.0000005, 15.999999, 16.000002])
    assert torch.equal(fake_quantize(x, soft), fake_quantize(x, torch.tensor([8, 16, 16])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_range_of_zero_gives_zeros(dtype):
    assert torch.equal(fake_quantize(torch.zeros(2, 3, dtype=dtype), 8), torch.zeros(2, 3))
    x = torch.tensor([1.0, -2.0, 0.0], dtype=dtype)
    assert not fake_quantize(x, 8, torch.zeros((), dtype=dtype)).any()


@pytest.mark.parametrize("shape", [(), (3, 1), (3, 4)], ids=str)
def test_a_negative_range_gives_zeros(shape):
    x = torch.randn(3, 4, requires_grad=True)
    out = fake_quantize(x, 8, torch.full(shape, -2.0))
    out.sum().backward()
    assert not out.any() and not x.grad.any()


@pytest.mark.parametrize("num_bits", [8, torch.tensor([8.0, 8.0], requires_grad=True)])
def test_nothing_is_inside_of_an_infinite_range(num_bits):
    x = torch.tensor([[1.0, math.inf], [0.5, math.nan]], requires_grad=True)
    out = fake_quantize(x, num_bits, torch.tensor(math.inf))
    out.sum().backward()
    assert out.isnan().all() and not x.grad.any()


def test_a_step_that_rounds_to_zero_gives_zeros():
    tiny = torch.tensor([1e-45, -1e-45, 0.0])  # the smallest float32; a 127th of it is no number
    assert tiny[0] > 0 and not fake_quantize(tiny, 8).any()


def test_nan_gives_nan_in_its_sample_and_nowhere_else():
    x = torch.randn(3, 4)
    x[1, 2] = math.nan
    assert fake_quantize(x, 8).isnan().all()
    nan = fake_quantize(x, torch.tensor([8, 8, 8])).isnan()
    assert nan.tolist() == [[False] * 4, [True] * 4, [False] * 4]
    nan = fake_quantize(x, 8, torch.tensor(1.0)).isnan()
    assert nan.nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("infinity", [math.inf, -math.inf])
def test_an_infinity_makes_its_range_nan(infinity):
    x = torch.randn(2, 4)
    x[0, 1] = infinity
    assert fake_quantize(x, 8).isnan().all()
    assert fake_quantize(x, torch.tensor([8, 8])).isnan().all(1).tolist() == [True, False]
    assert fake_quantize(torch.ones(2), 8, torch.tensor(math.inf)).isnan().all()


@pytest.mark.parametrize("amax", [math.nan, math.inf])
def test_only_the_samples_of_a_bad_range_are_nan(amax):
    ranges = torch.tensor([[1.0], [amax]])
    assert fake_quantize(torch.ones(2, 3), 8, ranges).isnan().all(1).tolist() == [False, True]


def test_a_width_off_the_grid_gives_nan():
    widths = torch.tensor([8.0, 1.0, 17.0, math.nan])
    nan = fake_quantize(torch.ones(4, 3), widths).isnan().all(1)
    assert nan.tolist() == [False, True, True, True]


def test_large_values_stay_finite():
    x = torch.tensor([1e30, -1e30, 3e29, 1.0])
    out = fake_quantize(x, 16)
    assert out.tolist() == [rounded_by_hand(v, 16, 1e30) for v in x.tolist()]
    assert out[3] == 0 and out.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0), (0,)])
def test_empty(shape):
    x = torch.zeros(shape, requires_grad=True)
    widths = torch.full((shape[0],), 8.0, requires_grad=True)
    for num_bits in (8, widths):
        out = fake_quantize(x, num_bits)
        assert out.shape == shape
        out.sum().backward()
    assert x.grad.shape == shape and not widths.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_bits", [8, 16])
def test_half_precision_is_the_float32_grid_rounded_once(dtype, num_bits, narrow):
    x = torch.randn(4, 33).to(dtype)
    out = fake_quantize(x, num_bits)
    assert out.dtype == dtype
    amax = x.float().abs().max().item()
    wanted = [rounded_by_hand(v, num_bits, amax) for v in x.float().flatten().tolist()]
    assert torch.equal(out.flatten(), narrow(torch.tensor(wanted), dtype))


def test_float64_uses_its_own_precision():
    x = torch.randn(500, dtype=torch.float64)
    step = x.abs().max().item() / 32639
    wanted = [round(Fraction(v / step)) * step for v in x.tolist()]
    assert fake_quantize(x, 16).tolist() == wanted


LAYOUTS = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "strided": lambda x: torch.stack([x, -x], -1)[..., 0],
    "expanded": lambda x: x[:, :, :1].expand(-1, -1, 5, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("saturates", [False, True])
def test_any_strides(layout, saturates):
    x = LAYOUTS[layout](torch.randn(3, 4, 5, 7))
    amax = torch.tensor(0.7) if saturates else None
    widths = torch.tensor([4, 8, 16])
    results, grad_out = [], torch.randn(x.shape)
    for values in (x, x.contiguous()):
        leaf = values.detach().requires_grad_()
        out = fake_quantize(leaf, widths, amax)
        (grad,) = torch.autograd.grad(out, leaf, grad_out)
        results.append((out, grad))
    (out, grad), (wanted, wanted_grad) = results
    assert torch.equal(out, wanted) and torch.equal(grad, wanted_grad)
    if layout == "channels last":
        assert out.is_contiguous(memory_format=torch.channels_last)


def test_the_input_is_left_alone():
    x = torch.randn(3, 5)
    before = x.clone()
    fake_quantize(x, 8)
    fake_quantize(x, torch.tensor([8, 8, 8]), torch.tensor(0.1))
    assert torch.equal(x, before)


def test_the_gradient_passes_up_to_the_range_inclusive():
    x = torch.tensor([0.0, 0.5, 1.0, 1.0001, -1.0, -1.0001, 7.0], requires_grad=True)
    grad = torch.tensor([3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0])
    fake_quantize(x, 8, torch.tensor(1.0)).backward(grad)
    assert x.grad.tolist() == [3.0, 4.0, 5.0, 0.0, 7.0, 0.0, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("learnt", [False, True])
def test_no_gradient_passes_outside_whatever_it_is(learnt, dtype, bad):
    x = torch.tensor([[0.5, 2.0, -1.0], [-3.0, 0.0, 1.5]], dtype=dtype, requires_grad=True)
    widths = torch.tensor([8.0, 8.0], requires_grad=learnt)
    grad = torch.tensor([[1.0, bad, -2.0], [bad, 3.0, -bad]], dtype=dtype)
    fake_quantize(x, widths, torch.tensor(1.0)).backward(grad)
    assert x.grad.tolist() == [[1.0, 0.0, -2.0], [0.0, 3.0, 0.0]]


@pytest.mark.parametrize("num_bits", [8, torch.tensor([4, 8, 16])], ids=["int", "per-sample"])
def test_without_a_range_every_gradient_passes(num_bits):
    x = torch.randn(3, 37, requires_grad=True)
    grad = torch.randn(3, 37)
    fake_quantize(x, num_bits).backward(grad)
    assert torch.equal(x.grad, grad)


def test_a_range_gets_no_gradient():
    amax = torch.tensor(1.0, requires_grad=True)
    x = torch.randn(9, requires_grad=True)
    fake_quantize(x, 8, amax).sum().backward()
    assert amax.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("saturates", [False, True])
def test_float_widths_receive_the_contracts_gradient(dtype, saturates):
    x = torch.randn(3, 4, 7, 5).to(dtype)
    grad = torch.randn(3, 4, 7, 5).to(dtype)
    amax = torch.tensor(1.5) if saturates else None
    widths = torch.tensor([4.0, 8.0, 16.0], requires_grad=True)
    leaf = x.clone().requires_grad_()
    out = fake_quantize(leaf, widths, amax)
    out.backward(grad)
    terms = grad.double() * (x.double() - out.detach().double())
    wanted = math.log(2) * terms.flatten(1).sum(1)
    assert widths.grad.dtype == torch.float32
    # float32 sums of 140 terms: a few epsilons of the largest partial sum
    bound = 8 * torch.finfo(torch.float32).eps * terms.abs().flatten(1).sum(1)
    assert ((widths.grad.double() - wanted).abs() <= bound).all()
    inside = x.float().abs() <= 1.5 if saturates else torch.ones_like(x, dtype=torch.bool)
    assert torch.equal(leaf.grad, torch.where(inside, grad, 0))


def test_int_widths_carry_no_gradient_and_frozen_inputs_ask_none():
    x = torch.randn(2, 3)
    assert not fake_quantize(x, torch.tensor([8, 8])).requires_grad
    widths = torch.tensor([8.0, 4.0], requires_grad=True)
    fake_quantize(x, widths).sum().backward()
    assert widths.grad.abs().min() > 0


@pytest.mark.parametrize("saturates", [False, True])
@pytest.mark.parametrize("learn_widths", [False, True])
def test_every_result_is_the_references(saturates, learn_widths):
    x, grad = torch.randn(3, 5, 9), torch.randn(3, 5, 9)
    amax = torch.tensor([0.3, 1.0, 9.0])[:, None, None] if saturates else None
    results = []
    for function in (fake_quantize, fake_quantize_reference):
        leaf = x.clone().requires_grad_()
        widths = torch.tensor([3.0, 8.0, 16.0], requires_grad=learn_widths)
        out = function(leaf, widths, amax)
        out.backward(grad)
        results.append((out.detach(), leaf.grad, *([widths.grad] if learn_widths else [])))
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted)


@given(st.lists(finite, min_size=1, max_size=40), st.integers(2, 16))
def test_properties_of_the_grid(values, num_bits):
    x = torch.tensor(values)
    out = fake_quantize(x, num_bits)
    amax = x.abs().max().item()
    largest = QMAX.get(num_bits, 2 ** (num_bits - 1) - 1)
    # half a step, the float32 roundings of quotient and product, and the least number there is
    bound = amax / largest / 2 + 4 * torch.finfo(torch.float32).eps * amax + 2.0**-149
    assert (out - x).abs().max().item() <= bound
    assert torch.equal(fake_quantize(-x, num_bits), -out)
    assert out.unique().numel() <= 2 * largest + 1
    again = fake_quantize(out, num_bits, torch.tensor(amax))
    torch.testing.assert_close(again, out, rtol=1e-6, atol=0)


@pytest.mark.parametrize("num_bits", [1, 17, 8.0, True, "8", None])
def test_a_width_that_is_none(num_bits):
    with pytest.raises(ValueError, match="num_bits must be an int from 2 to 16"):
        fake_quantize(torch.zeros(2, 3), num_bits)


@pytest.mark.parametrize("shape", [(3,), (2, 1), ()])
def test_one_width_per_sample(shape):
    with pytest.raises(ValueError, match=r"num_bits must hold one width per sample, shape \[2\]"):
        fake_quantize(torch.zeros(2, 3), torch.full(shape, 8))


def test_a_range_that_does_not_broadcast():
    with pytest.raises(ValueError, match=r"amax of shape \[2\] does not broadcast .* \[2, 3\]"):
        fake_quantize(torch.zeros(2, 3), 8, torch.ones(2))


def test_integers_are_no_input():
    with pytest.raises(ValueError, match="floating-point"):
        fake_quantize(torch.zeros(2, 3, dtype=torch.int32), 8)
