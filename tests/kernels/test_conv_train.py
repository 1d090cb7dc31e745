"""fake_quant_conv2d against F.conv2d on values rounded by hand, in float64, sample by sample."""

import math

import pytest
import torch
import torch.nn.functional as F

from meddanet.kernels import fake_quant_conv2d, fake_quant_conv2d_reference, fake_quantize


def on_grid(x, num_bits, amax):
    """The contract's grid, written out: float32, but float64 for float64; the values as float64."""
    x = x if x.dtype == torch.float64 else x.float()
    largest = 32639 if num_bits == 16 else 2 ** (num_bits - 1) - 1
    step = torch.as_tensor(amax, dtype=x.dtype) / largest
    return ((x / step).round().clamp(-largest, largest) * step).double()


def weight_on_grid(weight, num_bits, per_channel=False):
    axes = (1, 2, 3) if per_channel else (0, 1, 2, 3)
    return on_grid(weight, num_bits, weight.abs().amax(axes, keepdim=True))


# (Cin, Cout, kernel), arguments of the convolution, input size
CASES = {
    "3x3": ((4, 6, 3), {"padding": 1}, (9, 7)),
    "1x1": ((5, 3, 1), {}, (4, 6)),
    "stride 2": ((4, 6, 3), {"padding": (1, 0), "stride": 2}, (9, 8)),
    "dilated": ((3, 2, 3), {"padding": "same", "dilation": (2, 1)}, (8, 7)),
    "even kernel, same": ((3, 2, 2), {"padding": "same"}, (5, 6)),
    "valid": ((3, 2, 2), {"padding": "valid", "stride": (1, 2)}, (5, 6)),
    "depthwise": ((6, 6, 3), {"padding": 1, "groups": 6}, (6, 5)),
    "grouped": ((6, 4, 3), {"padding": 1, "groups": 2, "stride": 2}, (7, 7)),
}
cases = pytest.mark.parametrize("name", CASES)
pytestmark = [
    pytest.mark.usefixtures("nan_poisoning"),
    # pytorch says so once per process
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]
WIDTHS = [8, 16, 3, 8, 16]


def tensors(name, dtype=torch.float32):
    (inside, outside, kernel), arguments, size = CASES[name]
    input = torch.randn(5, inside, *size, dtype=dtype)
    channels = inside // arguments.get("groups", 1)
    weight = torch.randn(outside, channels, kernel, kernel, dtype=dtype)
    return input, weight, torch.randn(outside, dtype=dtype), arguments


@cases
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_one_width_is_conv2d_on_rounded_weights(name, per_channel, layout, tolerances):
    input, weight, bias, arguments = tensors(name)
    input = input.contiguous(memory_format=layout)
    rounded = weight_on_grid(weight, 4, per_channel)
    exact = F.conv2d(input.double(), rounded, bias.double(), **arguments)
    native = F.conv2d(input, rounded.float(), bias, **arguments)
    for num_bits in (4, torch.full((5,), 4), torch.full((5,), 4.0)):
        out = fake_quant_conv2d(
            input, weight, bias, **arguments, num_bits=num_bits, per_channel=per_channel
        )
        tolerances.reduction(out, native=native, exact=exact)


@cases
@pytest.mark.parametrize("per_channel", [False, True])
def test_each_sample_has_its_own_width(name, per_channel, tolerances):
    input, weight, bias, arguments = tensors(name)
    rounded = [weight_on_grid(weight, b, per_channel) for b in WIDTHS]
    pairs = list(zip(input.split(1), rounded, strict=True))
    exact = torch.cat([F.conv2d(x.double(), w, bias.double(), **arguments) for x, w in pairs])
    native = torch.cat([F.conv2d(x, w.float(), bias, **arguments) for x, w in pairs])
    for num_bits in (torch.tensor(WIDTHS), torch.tensor(WIDTHS, dtype=torch.float32)):
        out = fake_quant_conv2d(
            input, weight, bias, **arguments, num_bits=num_bits, per_channel=per_channel
        )
        tolerances.reduction(out, native=native, exact=exact)


def test_worked_by_hand():
    # weights 3, 1 at 3 bits: range 3, codes +-3, step 1; weight 1.4 rounds to 1
    weight = torch.tensor([[[[3.0]], [[1.4]]]])
    input = torch.tensor([[[[2.0, -1.0]], [[10.0, 5.0]]]])
    out = fake_quant_conv2d(input, weight, torch.tensor([0.5]), num_bits=3)
    assert out.tolist() == [[[[16.5, 2.5]]]]
    # the input at 2 bits: range 10, codes -1, 0, 1
    out = fake_quant_conv2d(input, weight, num_bits=3, input_num_bits=2)
    assert out.tolist() == [[[[10.0, 0.0]]]]


@pytest.mark.parametrize("widths", [8, torch.tensor(WIDTHS)], ids=["int", "per-sample"])
@pytest.mark.parametrize("amax", [None, 1.5])
def test_the_input_is_quantised_by_each_samples_range_or_a_given_one(widths, amax, tolerances):
    input, weight, _, arguments = tensors("3x3")
    each = [8] * 5 if isinstance(widths, int) else WIDTHS
    rounded = torch.cat(
        [on_grid(x, b, amax or x.abs().max()) for x, b in zip(input.split(1), each, strict=True)]
    )
    wanted_weight = weight_on_grid(weight, 8)
    out = fake_quant_conv2d(
        input, weight, **arguments, num_bits=8, input_num_bits=widths,
        input_amax=None if amax is None else torch.tensor(amax),
    )
    tolerances.reduction(
        out,
        native=F.conv2d(rounded.float(), wanted_weight.float(), **arguments),
        exact=F.conv2d(rounded, wanted_weight, **arguments),
    )


@cases
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("learnt", [False, True])
def test_gradients_worked_out_in_float64(name, per_channel, learnt):
    """Input and weight: conv2d's own on rounded weights; widths: the contract's formula."""
    input, weight, bias, arguments = tensors(name, torch.float64)
    leaves = [t.clone().requires_grad_() for t in (input, weight, bias)]
    widths = torch.tensor(WIDTHS, dtype=torch.float32 if learnt else torch.int64)
    if learnt:
        leaves.append(widths.requires_grad_())
    out = fake_quant_conv2d(*leaves[:3], **arguments, num_bits=widths, per_channel=per_channel)
    grad = torch.randn_like(out)
    actual = torch.autograd.grad(out, leaves, grad)

    sums = torch.zeros_like(weight)
    for n, b in enumerate(WIDTHS):
        x = input[n : n + 1].clone().requires_grad_()
        rounded = weight_on_grid(weight, b, per_channel).requires_grad_()
        y = F.conv2d(x, rounded, bias, **arguments)
        g = grad[n : n + 1]
        by_x, by_weight = torch.autograd.grad(y, (x, rounded), g)
        torch.testing.assert_close(actual[0][n : n + 1], by_x)
        sums += by_weight
        if learnt:
            error = F.conv2d(x, weight - rounded, None, **arguments)
            by_width = math.log(2) * (g * error).sum().item()
            assert actual[3][n].item() == pytest.approx(by_width, rel=1e-6)
    torch.testing.assert_close(actual[1], sums)
    torch.testing.assert_close(actual[2], grad.sum((0, 2, 3)))


@pytest.mark.parametrize(
    "widths",
    [8, 16, torch.tensor(WIDTHS), torch.full((5,), 8), torch.tensor(WIDTHS).double()],
    ids=["8", "16", "per-sample", "all 8", "learnt"],
)
@pytest.mark.parametrize("name", ["stride 2", "even kernel, same"])
def test_every_result_is_the_references(widths, name):
    input, weight, bias, arguments = tensors(name, torch.float64)
    learnt = isinstance(widths, torch.Tensor) and widths.is_floating_point()
    results = []
    for function in (fake_quant_conv2d, fake_quant_conv2d_reference):
        leaves = [t.clone().requires_grad_() for t in (input, weight, bias)]
        num_bits = widths.clone().requires_grad_() if learnt else widths
        leaves += [num_bits] if learnt else []
        out = function(
            *leaves[:3], **arguments, num_bits=num_bits, input_num_bits=num_bits,
            input_amax=torch.tensor(1.0), per_channel=True,
        )
        results.append((out, *torch.autograd.grad(out, leaves, torch.ones_like(out))))
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_a_sample_does_not_depend_on_its_neighbours(tolerances):
    input, weight, bias, arguments = tensors("3x3")
    widths = torch.tensor(WIDTHS)
    together = fake_quant_conv2d(
        input, weight, bias, **arguments, num_bits=widths, input_num_bits=widths
    )
    for n in range(5):
        one = slice(n, n + 1)
        alone = fake_quant_conv2d(
            input[one], weight, bias, **arguments, num_bits=widths[one], input_num_bits=widths[one]
        )
        tolerances.elementwise(together[one], alone)


def test_widths_carry_the_rounding_noise_of_a_straight_through_sum():
    input, weight, _, arguments = tensors("3x3")
    noisy = torch.tensor([8.0000005, 15.999999, 3.0, 7.9999995, 16.000002])
    out = fake_quant_conv2d(input, weight, **arguments, num_bits=noisy)
    wanted = fake_quant_conv2d(input, weight, **arguments, num_bits=torch.tensor(WIDTHS))
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("learnt", [False, True])
def test_an_empty_batch(learnt):
    input, weight, bias, arguments = tensors("stride 2")
    leaves = [t.requires_grad_() for t in (input[:0].clone(), weight, bias)]
    widths = torch.zeros(0, requires_grad=learnt)
    out = fake_quant_conv2d(*leaves, **arguments, num_bits=widths, input_num_bits=8)
    assert out.shape == (0, 6, 5, 3)
    out.sum().backward()
    assert not weight.grad.any() and not bias.grad.any()


@pytest.mark.parametrize("shape", [(0, 4, 9, 7), (0, 4, 0, 7), (2, 4, 0, 7)])
def test_nothing_within_a_given_range(shape):
    """A backward pass keeps a bit per element: none here."""
    x, amax = torch.zeros(shape, requires_grad=True), torch.tensor(1.0)
    fake_quantize(x, 8, amax).sum().backward()
    assert x.grad.shape == shape
    if shape[2]:
        weight = torch.ones(2, 4, 3, 3, requires_grad=True)
        out = fake_quant_conv2d(x, weight, num_bits=8, input_num_bits=8, input_amax=amax)
        out.sum().backward()
        assert out.shape == (0, 2, 7, 5) and not weight.grad.any()


def test_special_values():
    input, weight, _, arguments = tensors("3x3")
    assert not fake_quant_conv2d(input, weight * 0, **arguments, num_bits=8).any()
    widths = torch.tensor(WIDTHS)
    large = fake_quant_conv2d(input, weight * 1e30, **arguments, num_bits=widths)
    assert large.isfinite().all() and large.abs().max() > 1e30
    weight[0, 0, 0, 0] = math.nan
    assert fake_quant_conv2d(input, weight, **arguments, num_bits=widths).isnan().all()
    input[1, 0, 0, 0] = math.inf
    out = fake_quant_conv2d(input, weight * 0 + 1, **arguments, num_bits=8, input_num_bits=8)
    assert out.isnan().all()  # 0 * NaN of the weight
    out = fake_quant_conv2d(
        input, torch.ones_like(weight), **arguments, num_bits=8, input_num_bits=8
    )
    assert out.isnan().flatten(1).all(1).tolist() == [False, True, False, False, False]
    assert out[0].isfinite().all()


@pytest.mark.parametrize("amax", [-1.0, math.inf])
def test_nothing_is_inside_of_a_range_that_is_none(amax):
    x, weight = torch.randn(2, 4, 5, 5, requires_grad=True), torch.randn(3, 4, 3, 3)
    out = fake_quant_conv2d(
        x, weight, num_bits=8, input_num_bits=8, input_amax=torch.tensor(amax)
    )
    out.sum().backward()
    assert out.isnan().all() if amax > 0 else not out.any()
    assert not x.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_bits", [8, torch.tensor(WIDTHS)], ids=["int", "per-sample"])
def test_half_precision_convolves_the_rounded_values(dtype, num_bits, tolerances):
    input, weight, bias, arguments = (
        t.to(dtype) if isinstance(t, torch.Tensor) else t for t in tensors("3x3")
    )
    each = [8] * 5 if isinstance(num_bits, int) else WIDTHS
    rounded = [weight_on_grid(weight, b).to(dtype) for b in each]
    pairs = list(zip(input.split(1), rounded, strict=True))
    out = fake_quant_conv2d(input, weight, bias, **arguments, num_bits=num_bits)
    tolerances.reduction(
        out,
        native=torch.cat([F.conv2d(x, w, bias, **arguments) for x, w in pairs]),
        exact=torch.cat(
            [F.conv2d(x.double(), w.double(), bias.double(), **arguments) for x, w in pairs]
        ),
    )


@pytest.mark.parametrize("num_bits", [8, torch.tensor(WIDTHS)], ids=["int", "per-sample"])
def test_autocast_convolves_in_its_dtype_on_the_float32_grid(num_bits):
    input, weight, bias, arguments = tensors("3x3")
    leaves = [t.requires_grad_() for t in (input, weight, bias)]
    with torch.autocast("cpu", torch.bfloat16):
        out = fake_quant_conv2d(*leaves, **arguments, num_bits=num_bits)
    assert out.dtype == torch.bfloat16
    each = [8] * 5 if isinstance(num_bits, int) else WIDTHS
    wanted = torch.cat(
        [
            F.conv2d(
                x.bfloat16(), weight_on_grid(weight, b).bfloat16(), bias.bfloat16(), **arguments
            )
            for x, b in zip(input.split(1), each, strict=True)
        ]
    )
    assert (out - wanted).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * wanted.abs().max()
    out.sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)


@pytest.mark.parametrize("num_bits", [8, torch.tensor(WIDTHS)], ids=["int", "per-sample"])
def test_channels_last_stays(num_bits):
    input, weight, _, arguments = tensors("3x3")
    for layout in (torch.channels_last, torch.contiguous_format):
        laid = input.contiguous(memory_format=layout)
        out = fake_quant_conv2d(laid, weight, **arguments, num_bits=num_bits)
        assert out.is_contiguous(memory_format=layout)


def test_wrong_arguments():
    input, weight, _, arguments = tensors("3x3")
    for wrong in (1, 17, 8.0, True, None):
        with pytest.raises(ValueError, match="num_bits must be an int from 2 to 16"):
            fake_quant_conv2d(input, weight, num_bits=wrong)
    with pytest.raises(ValueError, match=r"num_bits must hold one width per sample, shape \[5\]"):
        fake_quant_conv2d(input, weight, num_bits=torch.tensor([8, 8]))
    with pytest.raises(ValueError, match="input_num_bits must hold one width per sample"):
        fake_quant_conv2d(input, weight, num_bits=8, input_num_bits=torch.tensor([8]))
    with pytest.raises(ValueError, match="num_bits must be an int from 2 to 16.* got 20"):
        fake_quant_conv2d(input, weight, num_bits=torch.tensor([8, 8, 8, 8, 20]))
    with pytest.raises(ValueError, match=r"input must be \[N, C, H, W\], got shape \[4, 9, 7\]"):
        fake_quant_conv2d(input[0], weight, num_bits=8)
    with pytest.raises(ValueError, match=r"weight must be \[Cout, 4 / 2, .*\[6, 4, 3, 3\]"):
        fake_quant_conv2d(input, weight, groups=2, num_bits=8)
    with pytest.raises(ValueError, match=r"bias must be \[6\], got shape \[4\]"):
        fake_quant_conv2d(input, weight, torch.zeros(4), num_bits=8)
    for wrong, stride in (("SAME", 1), ("same", 2)):
        with pytest.raises(ValueError, match=f"padding is '{wrong}' with stride {stride}; exp"):
            fake_quant_conv2d(input, weight, None, stride, wrong, num_bits=8, input_num_bits=8)
    with pytest.raises(ValueError, match="floating-point"):
        fake_quant_conv2d(input.int(), weight, num_bits=8, input_num_bits=8)
