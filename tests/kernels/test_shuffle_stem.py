"""shuffle_stem against the layers of the stem that training uses, in float64."""

from __future__ import annotations

from copy import deepcopy
from importlib import import_module

import pytest
import torch
from torch import nn

from meddanet.build import build_decision_network
from meddanet.engine.decisions import _OneKernel, answers, frozen
from meddanet.kernels import pack_stem, shuffle_stem, shuffle_stem_reference
from meddanet.layers import quantized_layers, set_quantization
from meddanet.networks.decision import ShuffleStem

pytestmark = pytest.mark.usefixtures("nan_poisoning")
LAST = torch.channels_last
# of both shipped widths, and some that no power of two divides
STEMS = [(4, 12), (4, 24), (1, 12), (3, 5), (21, 20), (28, 40)]


@torch.no_grad()
def folded(cin, cout, dtype):
    """A stem whose norm, folded, leaves a weight and a bias of some size, in a dtype."""
    stem = ShuffleStem(cin, cout).double().eval()
    set_quantization(stem, quantize=False, update_range=False)
    nn.init.normal_(stem[0].weight, 0, (9 * cin) ** -0.5)
    stem[0].bias = nn.Parameter(torch.empty(cout, dtype=torch.float64).uniform_(-1, 1))
    stem[1] = nn.Identity()
    return stem.to(dtype)


def packed(stem):
    return pack_stem(stem[0].weight, stem[0].bias)


def image(cin, dtype, *, samples=3, size=(13, 18)):
    return torch.randn(samples, cin, *size).to(dtype).contiguous(memory_format=LAST)


@torch.no_grad()
def check(stem, x, tolerances, narrow):
    """Both functions as exact as the layers in the same dtype."""
    exact = deepcopy(stem).double()(x.double())
    if x.dtype == torch.bfloat16:  # which the interpreter cuts off
        native = narrow(deepcopy(stem).float()(x.float()), x.dtype)
    else:
        native = stem(x)
    for function in (shuffle_stem, shuffle_stem_reference):
        out = function(x, packed(stem))
        assert out.is_contiguous(memory_format=LAST) or function is shuffle_stem_reference
        tolerances.reduction(out, native=native, exact=exact)


@pytest.mark.parametrize("shape", STEMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_against_the_layers(shape, dtype, tolerances, narrow):
    check(folded(*shape, dtype), image(shape[0], dtype), tolerances, narrow)


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 6), (2, 2), (3, 4), (5, 7), (8, 8), (16, 11)], ids=str
)
def test_sides_of_every_remainder(size, tolerances, narrow):
    """All border, and one program a sample."""
    x = image(4, torch.float16, samples=6, size=size)
    check(folded(4, 12, torch.float16), x, tolerances, narrow)


@pytest.mark.parametrize("height", [21, 24, 25, 26, 27, 28, 49, 72])
def test_heights_of_several_programs(height, tolerances, narrow):
    """Six pooled rows each; the last has one or all of them, and any row of the input is last."""
    x = image(4, torch.float16, samples=2, size=(height, 7))
    check(folded(4, 12, torch.float16), x, tolerances, narrow)


@pytest.mark.parametrize("width", [61, 63, 64, 65, 66, 124, 130])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_widths_of_several_programs(width, dtype, tolerances, narrow):
    """Sixteen pooled columns each, and six rows: the corners of programs, too."""
    x = image(4, dtype, samples=2, size=(26, width))
    check(folded(4, 12, dtype), x, tolerances, narrow)


@torch.no_grad()
@pytest.mark.parametrize("side", [31, 32, 33, 34])
def test_nothing_is_taken_from_outside(side):
    """Where products are below zero: a window that saw past an edge would show the bias."""
    stem = pack_stem(torch.full((2, 1, 3, 3), -1.0), torch.tensor([5.0, 0.5]))
    x = torch.ones(1, 1, side, side)
    # a corner sees four ones, an edge six; an even side ends inside of the image
    out = shuffle_stem(x, stem)
    expected = torch.zeros(1, 2, 8 + side // 33, 8 + side // 33)
    expected[0, 0, 0, 0] = 1
    if side % 2:
        expected[0, 0, 0, -1] = expected[0, 0, -1, 0] = expected[0, 0, -1, -1] = 1
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_worked_by_hand(dtype):
    """Ones convolved with ones count the taps inside; the maximum of nine such counts."""
    weight, bias = torch.ones(2, 1, 3, 3, dtype=dtype), torch.tensor([1.0, -8.0], dtype=dtype)
    # of 3 rows the taps at rows 0 and 2 see two each; of 8 columns those at 2, 4 and 6 see three
    counts = torch.tensor([[6.0, 6.0]])
    out = shuffle_stem(torch.ones(1, 1, 3, 8, dtype=dtype), pack_stem(weight, bias))
    assert torch.equal(out[0, 0], (counts + 1).to(dtype))
    assert torch.equal(out[0, 1], torch.zeros(1, 2, dtype=dtype)), "6 - 8 is cut off"


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("place", [(7, 9), (23, 63), (24, 64), (0, 0), (28, 70)], ids=str)
def test_a_nan_goes_where_the_layers_take_it(dtype, place):
    """Into the windows of several programs, too."""
    stem = folded(4, 12, dtype)
    x = image(4, dtype, samples=2, size=(29, 71))
    x[1, 3, place[0], place[1]] = float("nan")
    found, expected = shuffle_stem(x, packed(stem)), stem(x)
    assert expected.isnan().any() and not expected.isnan().all()
    assert torch.equal(found.isnan(), expected.isnan())


@torch.no_grad()
def test_any_layout():
    stem = packed(folded(4, 12, torch.float16))
    x = image(4, torch.float16)
    expected = shuffle_stem(x, stem)
    wider = torch.cat([x, x], 1).contiguous(memory_format=LAST)
    for view in (x.contiguous(), wider[:, :4], x.mT.contiguous().mT):
        assert torch.equal(shuffle_stem(view, stem), expected)
    assert shuffle_stem(x[:0], stem).shape == expected[:0].shape


@torch.no_grad()
@pytest.mark.parametrize("size", [(5, 7), (40, 36)], ids=str)
def test_samples_that_are_not_seen(size, backend):
    """One program and several for each: the others are as ever."""
    stem, x = packed(folded(4, 12, torch.float16)), image(4, torch.float16, samples=10, size=size)
    seen = (torch.arange(10) % 5 > 3).int()
    expected, found = shuffle_stem(x, stem), shuffle_stem(x, stem, seen)
    assert torch.equal(found[seen > 0], expected[seen > 0])
    # what memory held before is NaN here
    assert found[seen == 0].isnan().all() == (backend == "triton")
    nothing = shuffle_stem(x, stem, torch.zeros_like(seen))
    assert nothing.isnan().all() == (backend == "triton")


@torch.no_grad()
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((29, 12), torch.float16), ((4, 257), torch.float16), ((22, 12), torch.float32)],
)
def test_large_stems_run_in_the_reference(shape, dtype, monkeypatch):
    # wherever Triton runs; the kernel would raise, as nothing launches it
    module = import_module("meddanet.kernels.shuffle_stem")
    monkeypatch.setattr(module, "triton_runs", lambda input: True)
    monkeypatch.setattr("meddanet.kernels.shuffle_stem_triton.run", None)
    stem, x = folded(*shape, dtype), image(shape[0], dtype, samples=1)
    assert torch.equal(shuffle_stem(x, packed(stem)), shuffle_stem_reference(x, packed(stem)))


@torch.no_grad()
def test_a_quantised_stem_keeps_its_layers():
    network = build_decision_network("shufflenetv2-m", 4, 4).double().eval()
    set_quantization(network, quantize=False, update_range=False)
    assert isinstance(frozen(network, torch.float64).stem, _OneKernel)
    layer = quantized_layers(network)["stem.0"]
    layer.quantize = True
    layer.input_amax.fill_(4.0)
    small, x = frozen(network, torch.float64), torch.randn(2, 4, 40, 32, dtype=torch.float64)
    assert isinstance(small.stem, ShuffleStem)
    torch.testing.assert_close(small(x), network(x), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_network_leaves_out_what_is_not_seen(backend):
    network = build_decision_network("shufflenetv2-m", 4, 4).eval()
    set_quantization(network, quantize=False, update_range=False)
    small, view = frozen(network, torch.float32), image(4, torch.float32, samples=2, size=(40, 48))
    seen = torch.tensor([0, 1], dtype=torch.int32)
    found, expected = answers(small, view, seen), small(view)
    assert not expected.isnan().any(), "the next call knows nothing of it"
    assert torch.equal(found[seen > 0], expected[seen > 0])
    # what memory held before is NaN here
    assert found[0].isnan().all() == (backend == "triton")


def test_padding_is_zero():
    stem = packed(folded(3, 5, torch.float16))
    assert stem.weight.shape == (32, 16) and stem.weight.dtype == torch.float16
    assert stem.bias.shape == (16,) and stem.bias.dtype == torch.float32
    assert not stem.weight[27:].any() and not stem.weight[:, 5:].any() and not stem.bias[5:].any()
    assert (stem.in_channels, stem.out_channels) == (3, 5)


@pytest.mark.parametrize(
    ("weight", "bias", "message"),
    [
        (torch.zeros(6, 4, 1, 1), torch.zeros(6), r"weight must be \[Cout, Cin, 3, 3\]"),
        (torch.zeros(6, 4, 3, 3).int(), torch.zeros(6), "got torch.int32"),
        (torch.zeros(6, 4, 3, 3), torch.zeros(5), r"bias must be \[6\], got \[5\]"),
    ],
)
def test_weights_that_do_not_fit(weight, bias, message):
    with pytest.raises(ValueError, match=message):
        pack_stem(weight, bias)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(4, 9, 9), r"input must be \[N, 4, H, W\], got \[4, 9, 9\]"),
        (torch.zeros(1, 3, 9, 9), r"input must be \[N, 4, H, W\], got \[1, 3, 9, 9\]"),
        (torch.zeros(1, 4, 9, 9).half(), "input is torch.float16 on cpu, the stem is packed in"),
        (torch.zeros(1, 4, 9, 9, device="meta"), "input is torch.float32 on meta"),
    ],
)
def test_inputs_that_do_not_fit(x, message):
    stem = pack_stem(torch.zeros(6, 4, 3, 3), torch.zeros(6))
    for function in (shuffle_stem, shuffle_stem_reference):
        with pytest.raises(ValueError, match=message):
            function(x, stem)


@pytest.mark.parametrize("seen", [
    torch.ones(2, dtype=torch.int32), torch.ones(1), torch.ones(1, dtype=torch.int32, device="meta")
], ids=["samples", "dtype", "device"])
def test_flags_that_do_not_fit(seen):
    stem = pack_stem(torch.zeros(6, 4, 3, 3), torch.zeros(6))
    with pytest.raises(ValueError, match=r"seen must be int32 \[1\] on cpu, got"):
        shuffle_stem(torch.zeros(1, 4, 9, 9), stem, seen)


def test_a_batch_of_too_many_pixels():
    pytest.importorskip("triton")
    from meddanet.kernels.shuffle_stem_triton import run

    x = torch.empty(1, 4, 46341, 46341, dtype=torch.float16, device="meta")
    stem = packed(folded(4, 12, torch.float16))
    with pytest.raises(ValueError, match="too many pixels for one launch"):
        run(x[:, :, ::4, ::4], x, stem.weight, stem.bias)
