"""The training convolution on codes: what it computes, what it keeps, and which forward it takes.

Without Triton's interpreter the integer forward is oneDNN's, where this CPU has exact sums.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from meddanet.kernels import (
    conv_train_op,
    fake_quant_conv2d,
    fake_quantize,
    forward_way,
    onednn,
    use_backend,
)
from meddanet.kernels.bitmask import unpack_bits
from meddanet.kernels.input_codes import decode_input, encode_input

pytestmark = pytest.mark.usefixtures("nan_poisoning")

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
LAST, DENSE = torch.channels_last, torch.contiguous_format
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def largest(bits):
    return 32639 if bits == 16 else 2 ** (bits - 1) - 1


def codes_by_hand(x, bits, amax):
    """The contract's grid for one sample, in float32 (float64 for float64)."""
    x = x if x.dtype == torch.float64 else x.float()
    step = torch.as_tensor(amax, dtype=x.dtype) / largest(bits)
    return (x / step).round().clamp(-largest(bits), largest(bits)), step


def joined(planes):
    low = planes[0].long()
    return low if len(planes) == 1 else low + 256 * planes[1].long()


# codes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", [DENSE, LAST])
@pytest.mark.parametrize("widths", [8, 16, [3, 8, 16]], ids=["8", "16", "per sample"])
@pytest.mark.parametrize("given_range", [True, False])
def test_codes_values_and_bits(dtype, layout, widths, given_range, narrow):
    # more than a block, and no multiple of a byte
    x = torch.randn(3, 5, 13, 17).to(dtype).contiguous(memory_format=layout)
    bits = widths if isinstance(widths, int) else torch.tensor(widths)
    amax = torch.tensor([1.5]) if given_range else x.abs().amax((1, 2, 3))
    planes = 1 if widths == 8 else 2
    made = encode_input(x, bits, amax, planes=planes, values=dtype, mask=True)
    each = [widths] * 3 if isinstance(widths, int) else widths
    for n, b in enumerate(each):
        limit = amax[n if len(amax) > 1 else 0]
        codes, step = codes_by_hand(x[n], b, limit)
        assert torch.equal(joined(made.planes[:, n]), codes.long())
        assert torch.equal(made.values[n], narrow(codes * step, dtype))
        assert made.ranges[n] == limit.to(made.ranges.dtype)
    inside = unpack_bits(made.packed, x)
    assert torch.equal(inside, x.to(made.ranges.dtype).abs() <= amax.reshape(-1, 1, 1, 1))
    assert made.values.is_contiguous(memory_format=layout)
    assert made.planes[0].is_contiguous(memory_format=layout)
    num_bits, width = (None, widths) if isinstance(widths, int) else (bits, 0)
    again = decode_input(made.planes, num_bits, width, made.ranges, dtype)
    assert torch.equal(again, made.values) and again.stride() == made.values.stride()


def test_what_is_not_asked_for_is_empty():
    x = torch.randn(2, 3, 4, 4)
    made = encode_input(x, 8, torch.ones(1), planes=0, values=None, mask=False)
    assert not made.planes.numel() and not made.values.numel() and not made.packed.numel()


@pytest.mark.parametrize(("bits", "planes", "most"), [(8, 2, 1), (3, 2, 1), (16, 3, 2), (8, -1, 1)])
def test_planes_that_codes_do_not_have_are_refused(bits, planes, most):
    """They would be left as the memory was."""
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match=f"planes is {planes}, codes of {bits} bits .* to {most}"):
        encode_input(x, bits, torch.ones(1), planes=planes, values=None, mask=False)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_nan_marks_its_samples_range(bits):
    x = torch.randn(3, 4, 20, 20)
    x[1, 3, 19, 19] = math.nan
    made = encode_input(x, bits, torch.ones(1), planes=bits // 8, values=None, mask=True)
    assert made.ranges.isnan().tolist() == [False, True, False]
    values = decode_input(made.planes, None, bits, made.ranges, torch.float32)
    assert values.isnan().flatten(1).all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("amax", [0.0, math.inf, math.nan])
def test_a_range_of_zero_or_none(amax):
    x, ranges = torch.randn(2, 3, 4, 4), torch.tensor([amax, 1.0])
    made = encode_input(x, 8, ranges, planes=1, values=torch.float32, mask=True)
    assert torch.equal(made.values[1], fake_quantize(x[1], 8, torch.tensor(1.0)))
    values = decode_input(made.planes, None, 8, made.ranges, torch.float32)
    for first in (made.values[0], values[0]):
        assert not first.any() if amax == 0 else first.isnan().all()
    assert not unpack_bits(made.packed, x)[0].any()


# the convolution -----------------------------------------------------------------------------


@pytest.fixture(params=["codes", "values"])
def way(request, monkeypatch, backend):
    """Makes every convolution that can run on codes do so, or none; counts those that did."""
    return _forced(request.param, monkeypatch, backend)


@pytest.fixture
def on_codes(monkeypatch, backend):
    return _forced("codes", monkeypatch, backend)


def _forced(name, monkeypatch, backend):
    if name == "codes" and backend != "triton":
        if not onednn.is_exact():
            pytest.skip("this CPU's int8 sums are not exact")
        # the fixture `backend` goes back to the former choice
        use_backend("onednn")
    ran: list[int] = []
    run = conv_train_op.conv_on_codes

    def counted(planes, *arguments):
        ran.append(planes.shape[1])
        return run(planes, *arguments)

    monkeypatch.setattr(conv_train_op, "conv_on_codes", counted)
    table = dict.fromkeys(_every_class(), 2.0 if name == "codes" else 0.5)
    monkeypatch.setattr(forward_way, "SPEED_UP", table)
    return name, ran


def _every_class():
    return [
        forward_way.ShapeClass(device, bytes, kernel, stride, channels)
        for device in ("cpu", "sm_00") for bytes in (1, 2) for kernel in (1, 3)
        for stride in (1, 2) for channels in (4, 8, 16, 32, 64, 128)
    ]


# (Cin, Cout, kernel), arguments of the convolution, input size, range of the input
GEOMETRIES = {
    "3x3": ((4, 6, 3), {"padding": 1}, (6, 7), 1.2),
    "stride 2": ((16, 5, 3), {"padding": 1, "stride": 2}, (7, 6), None),
    "1x1": ((3, 4, 1), {}, (5, 4), 1.2),
    "no padding, per channel": ((5, 3, 3), {}, (5, 6), None),
}
WIDTHS = {
    "8 bit": (8, 8), "16 bit": (16, 16), "4 and 7 bit": (4, 7),
    "per sample": ([8, 16, 5], [8, 16, 5]), "weights per sample": ([8, 3, 8], 8),
}


def each(widths):
    return [widths] * 3 if isinstance(widths, int) else widths


def as_argument(widths):
    return widths if isinstance(widths, int) else torch.tensor(widths)


def written_out(x, weight, bias, geometry, grad, widths, amax, per_channel, dtype):
    """Output and gradients of PyTorch's convolution on values rounded by hand, in a dtype."""
    pairs = list(zip(*(each(w) for w in widths), strict=True))
    out, by_input = (torch.zeros_like(t, dtype=dtype) for t in (grad, x))
    by_weight = torch.zeros_like(weight, dtype=dtype)
    for w, b in set(pairs):
        n = [i for i, pair in enumerate(pairs) if pair == (w, b)]
        limit = x[n].abs().amax((1, 2, 3), True) if amax is None else amax
        codes, step = codes_by_hand(x[n], b, limit)
        axes = (1, 2, 3) if per_channel else (0, 1, 2, 3)
        weight_codes, weight_step = codes_by_hand(weight, w, weight.abs().amax(axes, True))
        values = (codes.to(dtype) * step).requires_grad_()
        rounded = (weight_codes.to(dtype) * weight_step).requires_grad_()
        y = F.conv2d(values, rounded, bias.to(dtype), **geometry)
        grads = torch.autograd.grad(y, (values, rounded), grad[n].to(dtype))
        out[n], by_input[n] = y.detach(), grads[0] * (x[n].abs() <= limit)
        by_weight += grads[1]
    return out, by_input, by_weight, grad.to(dtype).sum((0, 2, 3))


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("widths", WIDTHS)
def test_output_and_gradients_are_those_of_float64(way, name, widths, tolerances):
    (c_in, c_out, kernel), geometry, size, amax = GEOMETRIES[name]
    per_channel, layout = name.endswith("channel"), DENSE if name == "1x1" else LAST
    x, bias = torch.randn(3, c_in, *size).contiguous(memory_format=layout), torch.randn(c_out)
    weight = torch.randn(c_out, c_in, kernel, kernel)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    weight_bits, input_bits = WIDTHS[widths]
    out = fake_quant_conv2d(
        *leaves, **geometry, num_bits=as_argument(weight_bits),
        input_num_bits=as_argument(input_bits), per_channel=per_channel,
        input_amax=None if amax is None else torch.tensor(amax),
    )
    grad = torch.randn_like(out)
    actual = out.detach(), *torch.autograd.grad(out, leaves, grad)
    native, exact = (
        written_out(x, weight, bias, geometry, grad, WIDTHS[widths], amax, per_channel, dtype)
        for dtype in (torch.float32, torch.float64)
    )
    for ours, theirs, right in zip(actual, native, exact, strict=True):
        tolerances.reduction(ours, native=theirs, exact=right)
    chosen, ran = way
    assert sum(ran) == (3 if chosen == "codes" else 0)
    assert out.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", [DENSE, LAST])
def test_widths_that_learn_keep_their_gradient(way, layout):
    """ln 2 * sum(g_in * (x - fq(x))) and ln 2 * <g, conv(x, w - fq(w))>, both written out."""
    x = torch.randn(3, 4, 6, 7).contiguous(memory_format=layout)
    weight, widths = torch.randn(6, 4, 3, 3), [8, 16, 5]
    bits, input_bits = (torch.tensor(widths, dtype=torch.float32) for _ in range(2))
    leaves = [t.requires_grad_() for t in (x.clone(), weight.clone(), bits, input_bits)]
    out = fake_quant_conv2d(leaves[0], leaves[1], padding=1, num_bits=bits,
                            input_num_bits=input_bits, input_amax=torch.tensor(1.5))
    grad = torch.randn_like(out)
    _, _, by_bits, by_input_bits = torch.autograd.grad(out, leaves, grad)
    for n, b in enumerate(widths):
        codes, step = codes_by_hand(x[n : n + 1], b, 1.5)
        weight_codes, weight_step = codes_by_hand(weight, b, weight.abs().max())
        values = (codes.double() * step).requires_grad_()
        rounded, g = weight_codes.double() * weight_step, grad[n : n + 1].double()
        y = F.conv2d(values, rounded, padding=1)
        (g_in,) = torch.autograd.grad(y, values, g)
        with torch.no_grad():
            slope = F.conv2d(values, weight.double() - rounded, padding=1)
            wanted = (g * slope).sum() * math.log(2), (
                g_in * (x[n : n + 1].double() - values)).sum() * math.log(2)
        # sums of a few hundred float32 products
        for actual, exact in zip((by_bits[n], by_input_bits[n]), wanted, strict=True):
            assert actual.item() == pytest.approx(exact.item(), rel=1e-4, abs=1e-5)


def saved_bytes(run, parameters):
    """Bytes that autograd keeps for the backward pass, parameters left out, each storage once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    for parameter in parameters:
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(kept.values()), out


@pytest.mark.parametrize(("bits", "least"), [(8, 4.0), (16, 2.0)])
@pytest.mark.parametrize("amax", [None, torch.tensor(1.5)], ids=["own range", "given range"])
def test_codes_are_kept_instead_of_values(way, bits, least, amax):
    x = torch.randn(2, 16, 24, 24).contiguous(memory_format=LAST).requires_grad_()
    weight = torch.randn(8, 16, 3, 3, requires_grad=True)

    def pytorchs():
        values = torch.fake_quantize_per_tensor_affine(x, 0.01, 0, -127, 127)
        return F.conv2d(values, weight, padding=1)

    def ours():
        return fake_quant_conv2d(x, weight, padding=1, num_bits=bits, input_num_bits=bits,
                                 input_amax=amax)

    theirs, _ = saved_bytes(pytorchs, [weight])
    kept, _ = saved_bytes(ours, [weight])
    # values of four bytes and a mask of one; codes, a range per sample, and a bit
    assert theirs == 5 * x.numel()
    assert kept == x.numel() * bits // 8 + 4 * 2 + (0 if amax is None else x.numel() // 8)
    print(f"{bits} bit: {kept} bytes instead of {theirs}, {theirs / kept:.2f} times less")
    assert theirs / kept >= least


def test_a_width_that_learns_keeps_the_input_alone(way):
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    weight, bits = torch.randn(4, 4, 3, 3), torch.full((2,), 8.0, requires_grad=True)
    kept, _ = saved_bytes(
        lambda: fake_quant_conv2d(x, weight, num_bits=bits, input_num_bits=bits), [weight, bits]
    )
    assert kept == 4 * x.numel() + 4 * 2


def test_nothing_is_kept_where_nothing_learns(monkeypatch):
    asked = []
    encode = conv_train_op.encode_input

    def seen(*arguments, **options):
        asked.append(options)
        return encode(*arguments, **options)

    monkeypatch.setattr(conv_train_op, "encode_input", seen)
    x, weight = torch.randn(2, 4, 5, 5, requires_grad=True), torch.randn(4, 4, 1, 1)
    with torch.no_grad():
        fake_quant_conv2d(x, weight, num_bits=8, input_num_bits=8, input_amax=torch.ones(1))
    fake_quant_conv2d(x.detach(), weight, num_bits=8, input_num_bits=8)
    fake_quant_conv2d(x, weight, num_bits=8, input_num_bits=8)
    fake_quant_conv2d(x, weight, num_bits=8, input_num_bits=8, input_amax=torch.ones(1))
    assert [(o["planes"], o["mask"]) for o in asked] == [
        (0, False), (0, False), (1, False), (1, True)
    ]


def test_special_values(way):
    x, weight = torch.randn(4, 4, 5, 5), torch.randn(6, 4, 3, 3)
    x[0] = 0
    x[1, 0, 2, 2], x[2, 0, 2, 2] = math.nan, math.inf
    leaf = x.requires_grad_()
    for widths in (8, 16, torch.tensor([8, 8, 16, 16])):
        out = fake_quant_conv2d(leaf, weight, padding=1, num_bits=widths, input_num_bits=widths)
        assert out.isnan().flatten(1).all(1).tolist() == [False, True, True, False]
        assert not out[0].any() and out[3].isfinite().all()
        out[3].sum().backward()
        large = fake_quant_conv2d(leaf[3:], weight * 1e30, num_bits=8, input_num_bits=8)
        assert large.isfinite().all() and large.abs().max() > 1e29
        large = fake_quant_conv2d(leaf[3:] * 1e30, weight, num_bits=16, input_num_bits=16)
        assert large.isfinite().all() and large.abs().max() > 1e29
    # an infinity saturates in a range that is given; a NaN never becomes a number
    out = fake_quant_conv2d(x, weight, padding=1, num_bits=8, input_num_bits=8,
                            input_amax=torch.tensor(1.0))
    assert out[[0, 2, 3]].isfinite().all() and out[1, :, 1:4, 1:4].isnan().all()
    for zero in (weight * 0, weight * math.nan):
        out = fake_quant_conv2d(x[3:], zero, num_bits=8, input_num_bits=8)
        assert out.isnan().all() if zero.isnan().all() else not out.any()


def test_one_bad_weight_spoils_its_range(way):
    x, weight = torch.randn(2, 4, 5, 5), torch.randn(3, 4, 3, 3)
    weight[1, 0, 0, 0] = math.inf
    out = fake_quant_conv2d(x, weight, num_bits=8, input_num_bits=8, per_channel=True)
    assert out.isnan().all((0, 2, 3)).tolist() == [False, True, False]
    assert out[:, [0, 2]].isfinite().all()
    assert fake_quant_conv2d(x, weight, num_bits=8, input_num_bits=8).isnan().all()


@pytest.mark.parametrize("widths", [8, torch.zeros(0)], ids=["one width", "per sample"])
def test_an_empty_batch(way, widths):
    leaves = [torch.zeros(0, 4, 7, 7, requires_grad=True), torch.randn(6, 4, 3, 3,
              requires_grad=True), torch.randn(6, requires_grad=True)]
    out = fake_quant_conv2d(*leaves, stride=2, padding=1, num_bits=widths, input_num_bits=widths)
    assert out.shape == (0, 6, 4, 4)
    out.sum().backward()
    assert leaves[0].grad.shape == (0, 4, 7, 7) and not leaves[1].grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(way, dtype, tolerances, narrow):
    x, weight = torch.randn(2, 4, 6, 6).to(dtype), torch.randn(5, 4, 3, 3).to(dtype)
    codes, step = codes_by_hand(x, 8, 1.5)
    weight_codes, weight_step = codes_by_hand(weight, 8, weight.abs().max())
    out = fake_quant_conv2d(x, weight, num_bits=8, input_num_bits=8, input_amax=torch.tensor(1.5))
    assert out.dtype == dtype
    exact = F.conv2d(codes.double() * step, weight_codes.double() * weight_step)
    native = F.conv2d((codes * step).to(dtype), (weight_codes * weight_step).to(dtype))
    tolerances.reduction(out, native=native, exact=exact)


def test_autocast_keeps_the_float32_grid(way):
    leaves = [torch.randn(2, 4, 6, 6).requires_grad_(), torch.randn(5, 4, 3, 3).requires_grad_()]
    arguments = {"num_bits": 8, "input_num_bits": 8, "input_amax": torch.tensor(1.5)}
    with torch.autocast("cpu", torch.bfloat16):
        out = fake_quant_conv2d(*leaves, **arguments)
    wanted = fake_quant_conv2d(*leaves, **arguments)
    assert out.dtype == torch.bfloat16
    # each value, weight, sum and result is rounded to 8 bits
    assert (out - wanted).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * wanted.abs().max()
    grads = torch.autograd.grad(out.sum(), leaves)
    assert [g.dtype for g in grads] == [torch.float32] * 2


@given(
    channels=st.tuples(st.sampled_from([1, 3, 4, 16]), st.sampled_from([1, 4, 17])),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    geometry=st.sampled_from([(1, 1, 0), (3, 1, 1), (3, 2, 1), (1, 2, 0), (3, 1, 2)]),
    bits=st.sampled_from([(2, 3), (8, 8), (5, 8), (9, 16), (16, 16)]),
    scale=st.sampled_from([1e-20, 1.0, 1e15]),
    layout=st.sampled_from([LAST, DENSE]),
    seed=st.integers(0, 99),
)
@settings(max_examples=15 if INTERPRETING else 40)
def test_any_shape_width_and_layout(channels, size, geometry, bits, scale, layout, seed):
    """The sum of codes in whole numbers, by float64 convolution, which holds them all."""
    torch.manual_seed(seed)
    kernel, stride, padding = geometry
    x = torch.randn(2, channels[0], *size).contiguous(memory_format=layout) * scale
    weight = torch.randn(channels[1], channels[0], kernel, kernel)
    codes, step = codes_by_hand(x, bits[1], scale)
    weight_codes, weight_step = codes_by_hand(weight, bits[0], weight.abs().max())
    exact = F.conv2d(codes.double(), weight_codes.double(), None, stride, padding)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward_way, "SPEED_UP", dict.fromkeys(_every_class(), 2.0))
        out = fake_quant_conv2d(x, weight, None, stride, padding, num_bits=bits[0],
                                input_num_bits=bits[1], input_amax=torch.tensor(scale))
    wanted = exact * (step.double() * weight_step.double())
    bound = F.conv2d(codes.double().abs(), weight_codes.double().abs(), None, stride, padding)
    # float rounding of products and sums, relative to the sum of magnitudes
    error = (out.double() - wanted).abs()
    assert (error <= 2e-6 * bound * step.double() * weight_step.double()).all()


# which way -----------------------------------------------------------------------------------


def class_of(x, weight, **geometry):
    stride, padding, dilation = (geometry.get(k, v) for k, v in
                                 (("stride", 1), ("padding", 1), ("dilation", 1)))
    values = [stride] * 2 + [padding] * 2 + [dilation] * 2 + [geometry.get("groups", 1)]
    return forward_way.shape_class(x, weight, values, 1)


def test_classes_of_shapes(on_codes, backend):
    device = "sm_00" if backend == "triton" else "cpu"
    x, weight = torch.zeros(1, 24, 8, 8), torch.zeros(4, 24, 3, 3)
    assert class_of(x, weight) == (device, 1, 3, 1, 16)
    assert class_of(x, weight, stride=2) == (device, 1, 3, 2, 16)
    assert class_of(x[:, :3], weight[:, :3]).channels == 4
    assert class_of(torch.zeros(1, 300, 8, 8), torch.zeros(4, 300, 1, 1)).channels == 128
    for other in (
        class_of(x, weight, dilation=2), class_of(x, weight[:, :1], groups=24),
        class_of(x, weight, stride=3), class_of(x, torch.zeros(4, 24, 5, 5)),
        class_of(x.double(), weight), class_of(x[:0], weight),
        class_of(x, torch.zeros(4, 24, 1, 3)),
    ):
        assert other is None


def test_codes_of_unlike_bytes_and_unlisted_classes_take_values(on_codes, monkeypatch):
    _, ran = on_codes
    x, weight = torch.randn(2, 4, 5, 5), torch.randn(4, 4, 3, 3)
    mixed = [(8, 16), (16, 8), (torch.tensor([8, 16]), 8)]
    for num_bits, input_num_bits in mixed:
        fake_quant_conv2d(x, weight, num_bits=num_bits, input_num_bits=input_num_bits)
    # the sample whose weight and input have one byte each
    assert ran == [1]
    # a range that changes inside of a sample
    fake_quant_conv2d(x, weight, num_bits=8, input_num_bits=8, input_amax=torch.rand(1, 4, 1, 1))
    monkeypatch.setattr(forward_way, "SPEED_UP", {})
    fake_quant_conv2d(x, weight, num_bits=8, input_num_bits=8)
    assert ran == [1]


def test_the_table_is_what_was_measured():
    """Every number stands in the file of results that its command wrote, and no GPU is in it."""
    path = RESULTS / "forward_way_cpu_amd-epyc.json"
    rows = json.loads(path.read_text())["cases"]
    measured = {
        tuple(row["class"]): round(row["step"]["ratios"]["values"]["cpu_ms"], 2) for row in rows
    }
    assert measured == {tuple(found): ratio for found, ratio in forward_way.SPEED_UP.items()}
    assert {found.device for found in forward_way.SPEED_UP} == {"cpu"}
