"""pooled_head against the layers of ShuffleNetV2 that training uses, in float64."""

from __future__ import annotations

from copy import deepcopy
from importlib import import_module

import pytest
import torch
from torch import nn

from meddanet.build import build_decision_network, build_position_network
from meddanet.engine.decisions import _OneKernel, answers, frozen
from meddanet.kernels import pack_pooled_head, pooled_head, pooled_head_reference
from meddanet.layers import quantized_layers, set_quantization
from meddanet.networks.decision import ShuffleNetV2
from meddanet.networks.heatmap import HeatmapLocator

pytestmark = pytest.mark.usefixtures("nan_poisoning")
LAST = torch.channels_last
# channels, those of the wide layer, answers: both shipped widths, and some that no power of two has
HEADS = [(96, 256, 4), (192, 1024, 4), (5, 7, 1), (17, 40, 3), (130, 65, 9)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


class Head(nn.Module):
    """What follows the stages of ShuffleNetV2, its norm folded; sums of answers stay wide."""

    @torch.no_grad()
    def __init__(self, channels, hidden, outputs, dtype, bias=False):
        super().__init__()
        self.last = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.ReLU())
        self.classifier = nn.Linear(hidden, outputs, bias=bias)
        # half of the wide layer is cut off, and answers are of some size
        nn.init.normal_(self.last[0].weight, 0, channels**-0.5)
        self.last[0].bias.uniform_(-1, 1)
        nn.init.normal_(self.classifier.weight)
        self.to(dtype)

    def forward(self, x):
        pooled = self.last(x).mean((2, 3))
        wide = torch.promote_types(x.dtype, torch.float32)
        sums = pooled.to(wide) @ self.classifier.weight.to(wide).T
        return sums if self.classifier.bias is None else sums + self.classifier.bias.to(wide)


def packed(head):
    last, classifier = head.last[0], head.classifier
    return pack_pooled_head((last.weight, last.bias), classifier.weight, classifier.bias)


def image(channels, dtype, *, samples=5, size=(4, 4)):
    return torch.randn(samples, channels, *size).to(dtype).contiguous(memory_format=LAST)


@torch.no_grad()
def check(head, x, tolerances):
    """Both functions as exact as the layers in the same dtype, and that in a wider one."""
    native, exact = head(x), deepcopy(head).double()(x.double())
    for function in (pooled_head, pooled_head_reference):
        out = function(x, packed(head))
        assert out.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
        tolerances.reduction(out, native=native, exact=exact)


@pytest.mark.parametrize("shape", HEADS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_layers(shape, dtype, tolerances):
    check(Head(*shape, dtype), image(shape[0], dtype), tolerances)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (3, 4), (5, 7), (16, 1), (8, 9)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_maps_of_every_size(size, dtype, tolerances):
    """A pixel, a part of a block of 16, several blocks."""
    check(Head(96, 256, 4, dtype), image(96, dtype, size=size), tolerances)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_classifier_with_a_bias(dtype, tolerances):
    head = Head(24, 48, 3, dtype, bias=True)
    nn.init.uniform_(head.classifier.bias, 2, 3)
    check(head, image(24, dtype), tolerances)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_worked_by_hand(dtype):
    """Pixels 1 and -3 into two columns x + 1 and -x: (2, 0) and (0, 3), their means (1, 1.5)."""
    x = torch.tensor([1.0, -3.0], dtype=dtype).reshape(1, 1, 1, 2)
    last = torch.tensor([1.0, -1.0], dtype=dtype).reshape(2, 1, 1, 1), torch.tensor([1.0, 0.0])
    classifier = torch.tensor([[1.0, 0.0], [2.0, 4.0], [-1.0, 1.0]], dtype=dtype)
    out = pooled_head(x, pack_pooled_head(last, classifier))
    assert out.tolist() == [[1.0, 8.0, 0.5]]


def test_nothing_between_is_rounded():
    """A sum that float16 does not have, and its difference from one that it has."""
    last = torch.ones(2, 2, 1, 1).half(), torch.tensor([2.0**-14, 0.0])
    head = pack_pooled_head(last, torch.tensor([[1.0, -1.0]]).half())
    x = torch.ones(1, 2, 1, 1).half()
    assert pooled_head(x, head).item() == pooled_head_reference(x, head).item() == 2.0**-14


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_nan_goes_to_its_sample_alone(dtype):
    x, head = image(96, dtype, size=(5, 7)), Head(96, 256, 4, dtype)
    x[1, 50, 4, 6], x[3, 0, 0, 0] = float("nan"), float("nan")
    found = pooled_head(x, packed(head)).isnan()
    assert torch.equal(found, head(x).isnan()) and found.all(1).tolist() == [0, 1, 0, 1, 0]


@torch.no_grad()
def test_any_layout(tolerances):
    head, x = packed(Head(20, 40, 3, torch.float16)), image(20, torch.float16, size=(3, 6))
    expected = pooled_head(x, head)
    wider = torch.cat([x, x], 1).contiguous(memory_format=LAST)
    for view in (x.contiguous(), wider[:, :20], x.mT.contiguous().mT):
        # PyTorch's layers sum up in an order that hangs on the layout
        tolerances.elementwise(pooled_head(view, head), expected)
    assert pooled_head(x[:0], head).shape == (0, 3)


@torch.no_grad()
def test_samples_that_are_not_seen(backend):
    head, x = packed(Head(96, 256, 4, torch.float16)), image(96, torch.float16)
    seen = torch.tensor([0, 1, 1, 0, 7], dtype=torch.int32)
    expected, found = pooled_head(x, head), pooled_head(x, head, seen)
    assert torch.equal(found[seen > 0], expected[seen > 0])
    # what memory held before is NaN here
    assert found[seen == 0].isnan().all() == (backend == "triton")


@torch.no_grad()
@pytest.mark.parametrize(("shape", "dtype"), [
    ((257, 16, 2), torch.float16), ((129, 16, 2), torch.float32), ((16, 16, 33), torch.float16),
], ids=str)
def test_large_heads_run_in_the_reference(shape, dtype, monkeypatch):
    # wherever Triton runs; the kernel would raise, as nothing launches it
    module = import_module("meddanet.kernels.pooled_head")
    monkeypatch.setattr(module, "triton_runs", lambda input: True)
    monkeypatch.setattr("meddanet.kernels.pooled_head_triton.run", None)
    head, x = packed(Head(*shape, dtype)), image(shape[0], dtype, samples=1)
    assert torch.equal(pooled_head(x, head), pooled_head_reference(x, head))


NETWORKS = {
    ShuffleNetV2: lambda: build_decision_network("shufflenetv2-m", 4, 4),
    HeatmapLocator: lambda: build_position_network("heatmap", 4),
}


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "quantised"),
    [(ShuffleNetV2, "last.0"), (ShuffleNetV2, "classifier"),
     (HeatmapLocator, "last.0"), (HeatmapLocator, "map")],
)
def test_a_quantised_head_keeps_its_layers(kind, quantised):
    """Pooled, or of a map."""
    network = NETWORKS[kind]().double().eval()
    set_quantization(network, quantize=False, update_range=False)
    assert isinstance(frozen(network, torch.float64).head, _OneKernel)
    layer = quantized_layers(network)[quantised]
    layer.quantize = True
    layer.input_amax.fill_(4.0)
    small, x = frozen(network, torch.float64), torch.randn(2, 4, 40, 32, dtype=torch.float64)
    assert isinstance(small, kind)
    torch.testing.assert_close(small(x), network(x), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_network_answers_as_its_layers_do(backend):
    network = build_decision_network("shufflenetv2-m", 4, 4).double().eval()
    nn.init.normal_(network.classifier.weight)
    set_quantization(network, quantize=False, update_range=False)
    small, x = frozen(network, torch.float32), image(4, torch.float32, size=(40, 72))
    seen = torch.tensor([1, 0, 1, 1, 0], dtype=torch.int32)
    found, exact = answers(small, x, seen), network(x.double())
    scale = exact.abs().max().item()
    torch.testing.assert_close(
        found[seen > 0].double(), exact[seen > 0], rtol=0, atol=1e-5 * scale
    )
    # what memory held before is NaN here
    assert found[1].isnan().all() == (backend == "triton")
    assert small.asked(x) == ()


def test_padding_is_zero():
    head = packed(Head(17, 40, 3, torch.float16, bias=True))
    assert head.weight.shape == (32, 64) and head.weight.dtype == torch.float16
    assert head.classifier.shape == (64, 4) and head.classifier.dtype == torch.float16
    assert head.bias.shape == (64,) and head.bias.dtype == torch.float32
    assert head.classifier_bias.shape == (4,) and head.classifier_bias.dtype == torch.float32
    assert not head.weight[17:].any() and not head.weight[:, 40:].any() and not head.bias[40:].any()
    assert not head.classifier[40:].any() and not head.classifier[:, 3:].any()
    assert not head.classifier_bias[3:].any() and (head.in_channels, head.outputs) == (17, 3)
    there = head.to("meta")
    assert all(tensor.is_meta for tensor in there[:4]) and there[4:] == head[4:]
    assert packed(Head(17, 40, 3, torch.float16)).to("meta").classifier_bias is None


LAYER = torch.zeros(6, 4, 1, 1), torch.zeros(6)


@pytest.mark.parametrize(
    ("last", "classifier", "message"),
    [
        ((torch.zeros(6, 4), LAYER[1]), (torch.zeros(3, 6),), r"last must be \[L, Cin, 1, 1\]"),
        ((LAYER[0].int(), LAYER[1]), (torch.zeros(3, 6),), "got torch.int32"),
        ((LAYER[0], torch.zeros(5)), (torch.zeros(3, 6),), r"bias of last must be \[6\], got"),
        (LAYER, (torch.zeros(3, 5),), r"classifier must be \[K, 6\] in torch.float32, got torch"),
        (LAYER, (torch.zeros(3, 6).half(),), r"got torch.float16 \[3, 6\]"),
        (LAYER, (torch.zeros(3, 6), torch.zeros(4)), r"classifier_bias must be \[3\], got \[4\]"),
    ],
)
def test_weights_that_do_not_fit(last, classifier, message):
    with pytest.raises(ValueError, match=message):
        pack_pooled_head(last, *classifier)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(4, 9, 9), r"input must be \[N, 4, H, W\], got \[4, 9, 9\]"),
        (torch.zeros(1, 3, 9, 9), r"input must be \[N, 4, H, W\], got \[1, 3, 9, 9\]"),
        (torch.zeros(1, 4, 9, 9).half(), "input is torch.float16 on cpu, the head is packed in"),
        (torch.zeros(1, 4, 9, 9, device="meta"), "input is torch.float32 on meta"),
    ],
)
def test_inputs_that_do_not_fit(x, message):
    head = pack_pooled_head(LAYER, torch.zeros(3, 6))
    for function in (pooled_head, pooled_head_reference):
        with pytest.raises(ValueError, match=message):
            function(x, head)


def test_flags_that_do_not_fit():
    head = pack_pooled_head(LAYER, torch.zeros(3, 6))
    with pytest.raises(ValueError, match=r"seen must be int32 \[1\] on cpu, got torch.float32"):
        pooled_head(torch.zeros(1, 4, 9, 9), head, torch.ones(1))


def test_a_map_of_too_many_elements():
    pytest.importorskip("triton")
    from meddanet.kernels.pooled_head_triton import run

    head = packed(Head(16, 16, 2, torch.float16))
    x = torch.empty(1, 16, 16384, 8192, dtype=torch.float16, device="meta")
    with pytest.raises(ValueError, match=r"maps of \[16, 16384, 8192\] have too many elements"):
        run(torch.empty(1, 2), x, *head[:4])
