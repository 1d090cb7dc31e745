"""The operations on a GPU, where there is one, against float64 references on the CPU.

Elsewhere the same tests run on the CPU; those marked `long` repeat there, interpreted, what the
operations' own tests look at. `benchmarks/gpu.sh sanitize` runs this file under compute-sanitizer:
few shapes, none a multiple of a block.
"""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from meddanet.build import build_decision_network, build_position_network
from meddanet.engine.decisions import _OneKernel, answers, frozen
from meddanet.kernels import (
    affine_paste,
    affine_paste_reference,
    bilinear_crop,
    bilinear_crop_reference,
    encode,
    encode_reference,
    fake_quant_conv2d,
    fake_quant_conv2d_reference,
    fake_quantize,
    fake_quantize_reference,
    heat_head,
    join_codes,
    label_head,
    label_head_reference,
    pack_conv,
    pack_heat_head,
    pack_pooled_head,
    pack_stage,
    pack_stem,
    pack_unit,
    pooled_head,
    quant_conv2d,
    quant_conv2d_reference,
    route_slices,
    route_slices_reference,
    select_bits,
    select_bits_reference,
    shuffle_stage,
    shuffle_stage_reference,
    shuffle_stem,
    shuffle_stem_reference,
    use_backend,
    view_slices,
    view_slices_reference,
)
from meddanet.kernels.bitmask import unpack_bits
from meddanet.kernels.input_codes import decode_input, encode_input
from meddanet.kernels.route_call import new_frames
from meddanet.networks.decision import ShuffleUnit
from meddanet.networks.heatmap import EDGE, HeatCentre, play_shares

pytestmark = pytest.mark.usefixtures("nan_poisoning", "as_users_run")
LAST, DENSE = torch.channels_last, torch.contiguous_format
LARGEST = float(np.finfo(np.float32).max)


def leaf(device, *shape, layout=DENSE):
    """A float32 tensor on the device that wants a gradient."""
    x = torch.randn(*shape).to(device)
    x = x.contiguous(memory_format=layout) if x.dim() == 4 else x
    return x.requires_grad_()


def long(value):
    """A parameter that a GPU is to have in any case."""
    return pytest.param(value, marks=pytest.mark.long)


def with_gradients(op, leaves, grad):
    """Returns the output of op(*leaves) and its gradients by the leaves."""
    out = op(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.device, out.dtype))


def compare(op, reference, leaves, tolerances):
    """Output and all gradients, twice: as exact as PyTorch's own, and the same bit for bit."""

    def host(dtype):
        return [x.detach().cpu().to(dtype).requires_grad_() for x in leaves]

    with torch.no_grad():
        grad = torch.randn(reference(*host(torch.float32)).shape)
    exact = with_gradients(reference, host(torch.float64), grad)
    native = with_gradients(reference, host(torch.float32), grad)
    runs = [with_gradients(op, leaves, grad) for _ in range(2)]
    for actual, again, own, right in zip(*runs, native, exact, strict=True):
        assert torch.equal(actual, again)
        tolerances.reduction(actual.cpu(), native=own, exact=right)


@pytest.mark.parametrize("layout", [DENSE, LAST])
@pytest.mark.parametrize("size", [5, (21, 9)])
def test_crop_and_paste(device, layout, size, tolerances):
    x, offset = leaf(device, 3, 5, 13, 17, layout=layout), leaf(device, 3, 2)
    for op, reference in ((bilinear_crop, bilinear_crop_reference),
                          (affine_paste, affine_paste_reference)):
        compare(
            lambda x, o, op=op: op(x, o, size),
            lambda x, o, reference=reference: reference(x, o, size),
            [x, offset], tolerances,
        )


@pytest.mark.parametrize("layout", [DENSE, LAST])
@pytest.mark.parametrize("widths", [8, [4, 16, 8]], ids=["one width", "per sample"])
@pytest.mark.parametrize("given", [True, False], ids=["range given", "own range"])
def test_fake_quantize(device, layout, widths, given):
    """Codes and masks hang on float32 arithmetic: the CPU's, in the same precision, is right."""
    x = leaf(device, 3, 5, 13, 17, layout=layout)
    amax = torch.tensor(1.5) if given else None
    bits = widths if isinstance(widths, int) else torch.tensor(widths)
    host = x.detach().cpu().requires_grad_()
    expected = fake_quantize_reference(host, bits, amax)
    on_device = [None if v is None else v.to(device) if isinstance(v, torch.Tensor) else v
                 for v in (bits, amax)]
    out = fake_quantize(x, *on_device)
    grad = torch.randn(3, 5, 13, 17)
    assert torch.equal(out.cpu(), expected)
    (actual,) = torch.autograd.grad(out, x, grad.to(device))
    assert torch.equal(actual.cpu(), torch.autograd.grad(expected, host, grad)[0])


def test_width_gradient(device, tolerances):
    x = leaf(device, 3, 5, 13, 17)
    bits = torch.tensor([4.0, 16.0, 8.0], device=device, requires_grad=True)
    compare(fake_quantize, fake_quantize_reference, [x, bits], tolerances)


@pytest.mark.parametrize("widths", [8, [8, 16, 8]], ids=["one width", "per sample"])
def test_training_convolution(device, widths, tolerances):
    x, weight = leaf(device, 3, 5, 13, 17, layout=LAST), leaf(device, 7, 5, 3, 3)

    def run(op, x, weight):
        bits = widths if isinstance(widths, int) else torch.tensor(widths, device=x.device)
        return op(
            x, weight, stride=2, padding=1, num_bits=bits, input_num_bits=8,
            input_amax=torch.tensor(2.0, device=x.device),
        )

    compare(
        lambda x, w: run(fake_quant_conv2d, x, w),
        lambda x, w: run(fake_quant_conv2d_reference, x, w), [x, weight], tolerances,
    )


CONVOLUTIONS = {
    "3x3": ((7, 5, 3, 3), {"padding": 1}),
    "3x3 stride 2": ((20, 16, 3, 3), {"padding": 1, "stride": 2}),
    "1x1": ((4, 64, 1, 1), {}),
    "transposed": ((16, 9, 2, 2), {"stride": 2, "transposed": True}),
}


@pytest.mark.parametrize("num_bits", [8, 16, [8, 16, 5]])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_integer_convolution(device, name, num_bits, tolerances):
    """Codes, stream and everything between, with routing read on the device."""
    shape, geometry = CONVOLUTIONS[name]
    mixed = not isinstance(num_bits, int)
    weight = torch.randn(shape) / 8
    conv = pack_conv(weight, torch.randn(shape[1 if "transposed" in geometry else 0]),
                     num_bits=(5, 8, 16) if mixed else num_bits, **geometry)
    channels = shape[0] if "transposed" in geometry else shape[1]
    bits = torch.tensor(num_bits) if mixed else num_bits
    x = torch.randn(3, channels, 11, 14)
    codes, amax = encode(x, torch.tensor(2.0), bits), torch.tensor([2.0])
    slots, count = torch.tensor([2, 0, 1, 1]), torch.tensor([3])

    def run(op, where):
        def to(value):
            return value.to(where) if isinstance(value, torch.Tensor) else value

        out_bits = to(bits[slots]) if mixed else bits
        return op(
            to(codes), conv.to(where), to(amax), num_bits=to(bits), stream=torch.float32,
            relu=True, output_amax=to(torch.tensor([3.0])), output_num_bits=out_bits,
            slots=to(slots), count=to(count),
            affine=(to(torch.rand(conv.out_channels) + 0.5), to(torch.zeros(conv.out_channels))),
        )

    torch.manual_seed(1)
    actual = run(quant_conv2d, device)
    torch.manual_seed(1)
    expected = run(quant_conv2d_reference, torch.device("cpu"))
    tolerances.elementwise(actual.stream.cpu(), expected.stream)
    assert torch.equal(actual.codes.cpu(), expected.codes)


@pytest.mark.parametrize("num_bits", [8, [8, 16, 5]], ids=["one width", "per sample"])
def test_training_codes(device, num_bits):
    """What a training convolution keeps of its input, and reads back; the CPU is right."""
    bits = num_bits if isinstance(num_bits, int) else torch.tensor(num_bits)
    planes = 1 if isinstance(num_bits, int) else 2
    x, amax = torch.randn(3, 5, 13, 17).contiguous(memory_format=LAST), torch.tensor([1.5])

    def run(where):
        on = [v.to(where) if isinstance(v, torch.Tensor) else v for v in (x, bits, amax)]
        made = encode_input(*on, planes=planes, values=torch.float32, mask=True)
        widths = (on[1], 0) if planes == 2 else (None, bits)
        # bits beyond the last element say nothing
        mask = unpack_bits(made.packed, on[0])
        read = decode_input(made.planes, *widths, made.ranges, torch.float32)
        return made.planes, made.values, mask, made.ranges, read

    actual = run(device)
    with use_backend("reference"):
        expected = run(torch.device("cpu"))
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one.cpu(), other)


@pytest.mark.parametrize("num_bits", [3, 8, 16])
@pytest.mark.parametrize("amax", [1e-41, 3e-36, 2e-30, 0.37, 1.0, 5e4, 3e38, LARGEST])
def test_codes_are_those_of_a_correctly_rounded_division(device, num_bits, amax):
    """Next to every tie, beyond the range and at what is no number."""
    largest = np.float32(32639 if num_bits == 16 else 2 ** (num_bits - 1) - 1)
    step = np.float32(amax) / largest
    whole = np.unique(np.linspace(-largest - 2, largest + 2, 1999).round())
    with np.errstate(over="ignore"):
        ties = (whole + 0.5).astype(np.float32) * step
    near = ties[:, None].view(np.int32) + np.arange(-3, 4)
    anywhere = np.random.uniform(-1, 1, 5000).astype(np.float32) * np.float32(amax)
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan, amax, -amax, 1e-45], np.float32)
    x = np.concatenate([near.astype(np.int32).view(np.float32).ravel(), anywhere, special])
    with np.errstate(all="ignore"):
        quotient = x / step if step > 0 else np.zeros_like(x)
    expected = np.nan_to_num(np.rint(quotient.clip(-largest, largest)), nan=0).astype(np.int64)
    image = torch.from_numpy(x).reshape(1, 1, 1, -1).to(device)
    codes = encode(image, torch.tensor([amax], device=device), num_bits).cpu()
    codes = join_codes(codes) if num_bits > 8 else codes
    assert np.array_equal(codes.flatten().numpy(), expected)


@pytest.mark.parametrize("layout", [DENSE, LAST])
@pytest.mark.parametrize("num_bits", [8, [8, 16, 5, 8]], ids=["one width", "per slot"])
def test_encode_of_shifted_slots(device, layout, num_bits):
    """Views that reach beyond every side of their slice, some slots not in use."""
    x = torch.randn(3, 5, 13, 17).contiguous(memory_format=layout)
    bits = num_bits if isinstance(num_bits, int) else torch.tensor(num_bits)
    routing = {
        "offset": torch.tensor([[-2, 3], [5, 11], [0, -4], [1, 1]]),
        "slots": torch.tensor([2, 0, 0, 1]), "count": torch.tensor([3]),
    }
    amax = torch.tensor([2.0])

    def run(op, where):
        to = {name: value.to(where) for name, value in routing.items()}
        width = bits if isinstance(bits, int) else bits.to(where)
        affine = torch.linspace(0.5, 1.5, 5).to(where), torch.linspace(-1, 1, 5).to(where)
        return op(x.to(where), amax.to(where), width, size=(9, 11), affine=affine, relu=True, **to)

    actual, expected = run(encode, device), run(encode_reference, torch.device("cpu"))
    assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("quantised", [True, False], ids=["codes", "floats"])
def test_label_head(device, quantised):
    """Regions that overhang their slice; labels of integers are exact, floats have no ties here."""
    x = torch.randn(3, 16, 9, 11).contiguous(memory_format=LAST)
    conv = pack_conv(torch.randn(4, 16, 1, 1), torch.randn(4))
    weights = (conv,) if quantised else (torch.randn(4, 16), torch.randn(4))
    input = encode(x, torch.tensor([2.0])) if quantised else x
    amax = {"amax": torch.tensor([2.0])} if quantised else {}
    routing = {
        "offset": torch.tensor([[-2, 3], [12, 10], [4, 0]]), "slots": torch.tensor([1, 0, 1]),
        "count": torch.tensor([2]),
    }

    def run(op, where):
        to = {name: value.to(where) for name, value in {**routing, **amax}.items()}
        return op(input.to(where), *(w.to(where) for w in weights), size=20, slices=2, **to)

    assert torch.equal(
        run(label_head, device).cpu(), run(label_head_reference, torch.device("cpu"))
    )


def test_select_bits(device):
    """Views of few pixels and of several chunks; logits lie far apart."""
    image, feature = torch.randn(2, 4, 48, 56), torch.randn(3, 16, 37, 41)
    feature *= torch.tensor([0.2, 1.0, 5.0])[:, None, None, None]
    weight, bias = torch.zeros(2, 24), torch.tensor([0.0, -1.7])
    weight[1, 8:] = 1 / 16
    routing = {"offset": torch.tensor([[0, 0], [8, 15], [3, 2]]),
               "slots": torch.tensor([1, 0, 1]), "count": torch.tensor([3])}

    def run(op, where):
        to = {name: value.to(where) for name, value in routing.items()}
        fixed = (v.to(where) for v in (image, feature, weight, bias, torch.tensor([8, 16])))
        return op(*fixed, size=(40, 41), **to)

    actual = run(select_bits, device).cpu()
    assert actual.tolist() == [8, 8, 16] and torch.equal(actual, run(select_bits_reference, "cpu"))


@pytest.mark.parametrize("scale", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_view_slices(device, scale, dtype):
    """Squares that several programs share, one slice blank but for its last pixel, one blank."""
    images = torch.randn(5, 4, 67, 81)
    images[1:3], images[1, 3, -1, -1], images[3, 0, 0, 0] = 0, 1, float("nan")
    view, seen = view_slices(images.to(device), scale, dtype)
    expected, flags = view_slices_reference(images, scale, dtype)
    torch.testing.assert_close(view.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    assert view.is_contiguous(memory_format=LAST)
    assert torch.equal(seen.cpu(), flags) and flags.tolist() == [1, 1, 0, 1, 1]


@pytest.mark.parametrize("samples", [1, 3, 160, 257])
def test_route_slices(device, samples):
    """Every route, NaN among logits and places; no offset lies near a half."""
    frames = new_frames((40, 57), 8, (8, 24), (4, 6), "cpu")
    logits, places = torch.randn(samples, 4), torch.randint(-12, 12, (samples, 2)) / 4 + 0.03
    logits[2::5, 1], places[1::7, 0] = float("nan"), float("nan")
    seen = (torch.rand(samples) < 0.9).int()
    given = logits, places, seen, frames
    actual, expected = route_slices(*(t.to(device) for t in given)), route_slices_reference(*given)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, long(torch.float32)])
@pytest.mark.parametrize("branch", [12, 48, long(96)])
@pytest.mark.parametrize("units", [1, 2, long(7)])
@pytest.mark.parametrize("halved", [True, False], ids=["stride 2", "stride 1"])
def test_shuffle_stage(device, halved, units, branch, dtype, tolerances):
    """Maps that programs take in parts, the last one not full."""

    def layer(*shape):
        fan_in = shape[1] * shape[2] * shape[3]
        return (torch.randn(shape) / fan_in**0.5).to(dtype), torch.randn(shape[0]).to(dtype)

    def depth():
        return layer(branch, 1, 3, 3)

    def point():
        return layer(branch, branch, 1, 1)

    def unit(halved):
        return pack_unit(point(), depth(), point(), (depth(), point()) if halved else ())

    # interpreted, every unit of a sample takes a fifth of a second
    on_gpu = device.type == "cuda"
    samples, *size = (5, 15, 19) if on_gpu else (2, 5, 7)
    units = units if on_gpu else min(units, 3)
    stage = pack_stage([unit(halved), *(unit(False) for _ in range(units - 1))])
    x = torch.randn(samples, stage.in_channels, *size).to(dtype).contiguous(memory_format=LAST)
    exact_stage = stage._replace(
        first=tuple(t.double() for t in stage.first), rest=tuple(t.double() for t in stage.rest)
    )
    actual, again = (shuffle_stage(x.to(device), stage.to(device)) for _ in range(2))
    assert torch.equal(actual, again)
    tolerances.reduction(
        actual.cpu(), native=shuffle_stage_reference(x, stage),
        exact=shuffle_stage_reference(x.double(), exact_stage),
    )


def many(device: torch.device, there: int, here: int) -> int:
    """As many as a GPU is to have, or few: an interpreted program takes a tenth of a second."""
    return there if device.type == "cuda" else here


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("size", [long((120, 120)), (13, 18)], ids=str)
def test_shuffle_stem(device, size, dtype, tolerances):
    """Programs whose rows and columns reach beyond the output."""
    weight, bias = (torch.randn(12, 4, 3, 3) / 6).to(dtype), torch.randn(12).to(dtype)
    stem, exact_stem = pack_stem(weight, bias), pack_stem(weight.double(), bias.double())
    x = torch.randn(many(device, 5, 2), 4, *size).to(dtype).contiguous(memory_format=LAST)
    actual, again = (shuffle_stem(x.to(device), stem.to(device)) for _ in range(2))
    assert torch.equal(actual, again)
    tolerances.reduction(
        actual.cpu(), native=shuffle_stem_reference(x, stem),
        exact=shuffle_stem_reference(x.double(), exact_stem),
    )


def head_layers(channels, hidden, dtype):
    """Weight and bias of a head's first layer."""
    weight = torch.randn(hidden, channels, 1, 1) / channels**0.5
    return weight.to(dtype), torch.randn(hidden).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("size", [(4, 4), long((7, 9))], ids=str)
def test_pooled_head(device, size, dtype, tolerances):
    """A block of pixels and several, the last one not full."""
    last, classifier = head_layers(96, 250, dtype), (torch.randn(3, 250) / 8).to(dtype)
    head = pack_pooled_head(last, classifier).to(device)
    x = torch.randn(many(device, 40, 8), 96, *size).to(dtype).contiguous(memory_format=LAST)

    def layers(x, last, classifier, wide):
        return F.conv2d(x, *last).relu().mean((2, 3)).to(wide) @ classifier.to(wide).T

    actual, again = (pooled_head(x.to(device), head) for _ in range(2))
    assert torch.equal(actual, again)
    exact = layers(x.double(), [t.double() for t in last], classifier, torch.float64)
    tolerances.reduction(
        actual.cpu(), native=layers(x, last, classifier, torch.float32), exact=exact
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("size", [(8, 8), long((13, 9))], ids=str)
def test_heat_head(device, size, dtype, tolerances):
    """A block of pixels and several, the last one not full."""
    last, map_weight = head_layers(48, 60, dtype), (torch.randn(1, 60, 1, 1) / 3).to(dtype)
    centre, view = HeatCentre(48), torch.empty(1, 1, 120, 140, device="meta")
    head = pack_heat_head(last, map_weight, centre.gain, EDGE).to(device)
    x = torch.randn(40, 48, *size).to(dtype).contiguous(memory_format=LAST)

    def layers(x, last, map_weight):
        heat = F.conv2d(F.conv2d(x, *last).relu(), map_weight)
        return centre.to(x.dtype)(heat, view)

    plays = play_shares(view.shape[2:], 48)
    actual, again = (heat_head(x.to(device), head, plays) for _ in range(2))
    assert torch.equal(actual, again)
    with torch.no_grad():
        exact = layers(x.double(), [t.double() for t in last], map_weight.double())
        native = layers(x, last, map_weight).float()
    tolerances.reduction(actual.cpu(), native=native, exact=exact)


@pytest.mark.long
def test_what_is_not_seen_is_left_out(device):
    """Of a chunk of 240 x 240 slices, most of them blank, the others are as ever."""
    network = build_decision_network("shufflenetv2-m", 4, 4).eval()
    small = frozen(network.requires_grad_(False), torch.float16, device)
    samples, side = many(device, 160, 6), many(device, 120, 40)
    view = torch.randn(samples, 4, side, side, device=device).half()
    view = view.contiguous(memory_format=LAST)
    seen = (torch.rand(samples, device=device) < 0.2).int()
    seen[0], seen[1] = 1, 0
    assert torch.equal(answers(small, view, seen)[seen > 0], small(view)[seen > 0])


NETWORKS = {
    "shufflenetv2-m": (lambda: build_decision_network("shufflenetv2-m", 4, 4), 1 + 3 + 1),
    "shufflenetv2": (lambda: build_decision_network("shufflenetv2", 4, 4), 1 + 3 + 1),
    "heatmap": (lambda: build_position_network("heatmap", 4), 1 + 2 + 1),
}


@torch.no_grad()
@pytest.mark.parametrize("name", [
    long(name) if name == "shufflenetv2" else name for name in NETWORKS
])
@pytest.mark.parametrize("dtype", [torch.float16, long(torch.float32), torch.float64])
def test_frozen_decision_networks(device, name, dtype, tolerances):
    """A network with its stem, stages and head as operations, against itself in float64."""
    build, parts = NETWORKS[name]
    network = build().double()
    x = torch.randn(5, 4, 64, 72, dtype=torch.float64).to(dtype)
    for norm in network.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
            torch.nn.init.uniform_(norm.bias, -0.5, 0.5)
            norm.momentum = 1.0  # the statistics of this batch: what a network learns
    network.train()(x.double())
    network.eval()
    small = frozen(network, dtype, device)
    assert sum(isinstance(module, _OneKernel) for module in small.modules()) == parts
    assert not any(isinstance(m, ShuffleUnit | torch.nn.BatchNorm2d) for m in small.modules())
    calls = ((network, x.double()), (deepcopy(network).to(dtype), x),
             (small, x.to(device).contiguous(memory_format=LAST)))
    # a centre of mass would hide most of a map, and its head has a test of its own
    exact, native, found = (
        model.stages(model.stem(x)) if name == "heatmap" else model(x) for model, x in calls
    )
    varied = exact.std(0) > 0.01 * exact.abs().max()
    assert varied.all() or name == "heatmap" and varied.float().mean() > 0.5, "proves nothing"
    # a classifier's sums stay in float32
    tolerances.reduction(found.cpu().to(dtype), native=native, exact=exact)


def test_the_second_gpu(tolerances):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = torch.randn(2, 3, 9, 9)
    offset = torch.tensor([[1.5, 2.0], [0.0, 0.25]])
    with use_backend("auto"):
        out = bilinear_crop(x.to("cuda:1"), offset.to("cuda:1"), 4)
        codes = fake_quantize(x.to("cuda:1"), 8)
    tolerances.elementwise(out.cpu(), bilinear_crop_reference(x, offset, 4))
    assert torch.equal(codes.cpu(), fake_quantize_reference(x, 8))
