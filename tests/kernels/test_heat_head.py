"""heat_head against the layers of `HeatmapLocator` that training uses, in float64."""

from __future__ import annotations

from copy import deepcopy
from importlib import import_module

import pytest
import torch
from torch import nn

from meddanet.build import build_position_network
from meddanet.engine.decisions import answers, frozen
from meddanet.kernels import heat_head, heat_head_reference, pack_heat_head
from meddanet.layers import set_quantization
from meddanet.networks.heatmap import EDGE, HeatCentre, play_shares
from meddanet.weights import load_model

pytestmark = pytest.mark.usefixtures("nan_poisoning")
LAST = torch.channels_last
# channels, those of the layer before the map: both shipped widths, and some that are padded
HEADS = [(48, 64), (96, 64), (5, 7), (33, 20)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SIZE = 48


class Head(nn.Module):
    """What follows the stages of `HeatmapLocator`, its norm folded."""

    @torch.no_grad()
    def __init__(self, channels, hidden, dtype, spread=3.0):
        super().__init__()
        self.last = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.ReLU())
        self.map = nn.Conv2d(hidden, 1, 1)
        self.centre = HeatCentre(SIZE)
        nn.init.normal_(self.last[0].weight, 0, channels**-0.5)
        self.last[0].bias.uniform_(-1, 1)
        # a map of some height, so that centres differ
        nn.init.normal_(self.map.weight, 0, spread * hidden**-0.5)
        self.map.bias.fill_(0.25)
        self.centre.gain.copy_(torch.tensor([1.25, 0.75]))
        self.to(dtype)

    def forward(self, x, view):
        return self.centre(self.map(self.last(x)), view)


def packed(head):
    last = head.last[0].weight, head.last[0].bias
    return pack_heat_head(last, head.map.weight, head.centre.gain, EDGE)


def image(channels, dtype, *, samples=5, size=(8, 8)):
    return torch.randn(samples, channels, *size).to(dtype).contiguous(memory_format=LAST)


def view_of(x):
    """An image of which x is the map, on the device that has no memory."""
    return torch.empty(len(x), 1, 16 * x.shape[2], 16 * x.shape[3], device="meta")


def plays_of(x):
    return play_shares(view_of(x).shape[2:], SIZE)


@torch.no_grad()
def check(head, x, tolerances):
    """Both functions as exact as the layers in the same dtype."""
    native, exact = head(x, view_of(x)), deepcopy(head).double()(x.double(), view_of(x))
    for function in (heat_head, heat_head_reference):
        out = function(x, packed(head), plays_of(x))
        assert out.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
        tolerances.reduction(out, native=native.to(out.dtype), exact=exact)
    return exact


@pytest.mark.parametrize("shape", HEADS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_layers(shape, dtype, tolerances):
    exact = check(Head(*shape, dtype), image(shape[0], dtype), tolerances)
    assert exact.std(0).min() > 0.05, "one place for all proves nothing"


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 9), (9, 1), (5, 7), (13, 5), (15, 16), (2, 100)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_maps_of_every_size(size, dtype, tolerances):
    """A cell, a part of a block of 64, several blocks with the last one in part."""
    check(Head(48, 64, dtype), image(48, dtype, size=size), tolerances)


@pytest.mark.parametrize("cell", [0, 3, 70, 149], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_one_hot_cell(cell, dtype):
    """Of 10 rows and 15 columns, in every block: its own place, worked by hand, and the edges."""
    x = torch.zeros(1, 1, 10, 15, dtype=dtype)
    x[0, 0, cell // 15, cell % 15] = 100
    last = torch.ones(1, 1, 1, 1, dtype=dtype), torch.zeros(1)
    head = pack_heat_head(last, torch.full((1, 1, 1, 1), 2.0), torch.tensor([1.0, 0.5]), 1 / 64)
    found = heat_head(x, head, (0.75, 0.5)).sigmoid()
    row, column = (cell // 15 + 0.5) / 10 - 0.5, (cell % 15 + 0.5) / 15 - 0.5
    expected = torch.tensor([[0.5 + row / 0.75, 0.5 + 0.5 * column / 0.5]]).clamp(1 / 64, 63 / 64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_heights_that_an_exponential_does_not_have():
    """Differences count, not heights: also where a later block of 64 is far higher or lower."""
    last = torch.eye(2)[:, :, None, None], torch.zeros(2)
    head = pack_heat_head(last, torch.tensor([1.0, -1.0]).reshape(1, 2, 1, 1), torch.ones(2), EDGE)
    heat = torch.randn(3, 10, 15)
    heat[0] += 3e4
    heat[1] -= 3e4
    heat[2, 5:] += 500
    x = torch.stack([heat.clamp(min=0), (-heat).clamp(min=0)], 1)
    expected = HeatCentre(SIZE)(heat[:, None].double(), view_of(x))
    found = heat_head(x, head, plays_of(x))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_a_nan_goes_to_its_sample_alone(dtype, value):
    """In the first and in the last of several blocks; of an infinite heat the layers make one."""
    x, head = image(48, dtype, size=(9, 10)), Head(48, 64, dtype)
    x[1, 7, 8, 9], x[3, 0, 0, 0] = value, value
    found = heat_head(x, packed(head), plays_of(x)).isnan()
    assert torch.equal(found, head(x, view_of(x)).isnan())
    assert found.all(1).tolist() == [0, 1, 0, 1, 0]


@torch.no_grad()
def test_any_layout(tolerances):
    head, x = packed(Head(20, 40, torch.float16)), image(20, torch.float16, size=(3, 6))
    expected = heat_head(x, head, plays_of(x))
    wider = torch.cat([x, x], 1).contiguous(memory_format=LAST)
    for view in (x.contiguous(), wider[:, :20], x.mT.contiguous().mT):
        # PyTorch's layers sum up in an order that hangs on the layout
        tolerances.elementwise(heat_head(view, head, plays_of(x)), expected)
    assert heat_head(x[:0], head, plays_of(x)).shape == (0, 2)


@torch.no_grad()
def test_samples_that_are_not_seen(backend):
    head, x = packed(Head(48, 64, torch.float16)), image(48, torch.float16)
    seen = torch.tensor([0, 1, 1, 0, 7], dtype=torch.int32)
    expected, found = heat_head(x, head, plays_of(x)), heat_head(x, head, plays_of(x), seen)
    assert torch.equal(found[seen > 0], expected[seen > 0])
    # what memory held before is NaN here
    assert found[seen == 0].isnan().all() == (backend == "triton")


@torch.no_grad()
@pytest.mark.parametrize(("shape", "dtype"), [
    ((129, 16), torch.float16), ((16, 129), torch.float16), ((65, 16), torch.float32),
], ids=str)
def test_large_heads_run_in_the_reference(shape, dtype, monkeypatch):
    # wherever Triton runs; the kernel would raise, as nothing launches it
    module = import_module("meddanet.kernels.heat_head")
    monkeypatch.setattr(module, "triton_runs", lambda input: True)
    monkeypatch.setattr("meddanet.kernels.heat_head_triton.run", None)
    head, x = packed(Head(*shape, dtype)), image(shape[0], dtype, samples=1)
    assert torch.equal(heat_head(x, head, plays_of(x)), heat_head_reference(x, head, plays_of(x)))


@torch.no_grad()
@pytest.mark.parametrize("size", [(40, 72), (66, 80)], ids=str)
def test_a_network_answers_as_its_layers_do(size, backend):
    """Views of any size, each with its own free play; a crop of 32 pixels."""
    network = build_position_network("heatmap", 4, size=32).double().eval()
    set_quantization(network, quantize=False, update_range=False)
    x = image(4, torch.float32, samples=3, size=size)
    # an untrained map is flat
    network.map.weight.mul_(4 / network.heat(x.double()).std())
    network.centre.gain.copy_(torch.tensor([0.1, 0.2]))
    small, seen = frozen(network, torch.float32), torch.tensor([1, 0, 1], dtype=torch.int32)
    found, exact = answers(small, x, seen), network(x.double())
    assert exact.std(0).min() > 5e-4
    torch.testing.assert_close(found[seen > 0].double(), exact[seen > 0], rtol=0, atol=5e-5)
    torch.testing.assert_close(frozen(network, torch.float64)(x.double()), exact)
    # what memory held before is NaN here
    assert found[1].isnan().all() == (backend == "triton")


@torch.no_grad()
def test_the_shipped_network_in_half_precision(tolerances):
    """All of it, as a GPU runs it: no worse than its layers in float16 are."""
    network = load_model().position.float().eval()
    x = image(4, torch.float16, samples=3, size=(72, 80))
    exact, native = (deepcopy(network).to(dtype)(x.to(dtype)) for dtype in (torch.float64, x.dtype))
    found = frozen(network, torch.float16)(x)
    assert found.dtype == torch.float32 and exact.std(0).min() > 0.02
    tolerances.reduction(found.half(), native=native, exact=exact)


def test_padding_is_zero():
    head = packed(Head(17, 40, torch.float16))
    assert head.weight.shape == (32, 64) and head.weight.dtype == torch.float16
    for tensor in (head.bias, head.map_weight):
        assert tensor.shape == (64,) and tensor.dtype == torch.float32 and not tensor[40:].any()
    assert not head.weight[17:].any() and not head.weight[:, 40:].any()
    assert head.gain.tolist() == [1.25, 0.75] and (head.in_channels, head.edge) == (17, EDGE)
    there = head.to("meta")
    assert all(tensor.is_meta for tensor in there[:4]) and there[4:] == head[4:]


LAYER = torch.zeros(6, 4, 1, 1), torch.zeros(6)
MAP, GAIN = torch.zeros(1, 6, 1, 1), torch.ones(2)


@pytest.mark.parametrize(
    ("last", "more", "message"),
    [
        ((torch.zeros(6, 4, 3, 3), LAYER[1]), (MAP, GAIN, EDGE), r"be \[L, Cin, 1, 1\]"),
        ((LAYER[0], torch.zeros(5)), (MAP, GAIN, EDGE), r"bias of last must be \[6\], got \[5\]"),
        (LAYER, (torch.zeros(1, 5, 1, 1), GAIN, EDGE), r"map_weight must be \[1, 6, 1, 1\]"),
        (LAYER, (MAP, torch.ones(3), EDGE), r"gain \[2\], got \[1, 6, 1, 1\] and \[3\]"),
        (LAYER, (MAP, GAIN, 0.5), "edge must lie between 0 and 0.5, got 0.5"),
    ],
)
def test_weights_that_do_not_fit(last, more, message):
    with pytest.raises(ValueError, match=message):
        pack_heat_head(last, *more)


@pytest.mark.parametrize(
    ("x", "plays", "message"),
    [
        (torch.zeros(4, 9, 9), (1, 1), r"input must be \[N, 4, H, W\], got \[4, 9, 9\]"),
        (torch.zeros(1, 4, 9, 9).half(), (1, 1), "float16 on cpu, the head is packed in"),
        (torch.zeros(1, 4, 9, 9), (1, 0.0), r"plays must be two shares above 0, got \[1, 0.0\]"),
        (torch.zeros(1, 4, 9, 9), (1, float("nan")), r"plays must be two shares above 0"),
        (torch.zeros(1, 4, 9, 9), (1,), r"plays must be two shares above 0, got \[1\]"),
    ],
)
def test_inputs_that_do_not_fit(x, plays, message):
    head = pack_heat_head(LAYER, MAP, GAIN, EDGE)
    for function in (heat_head, heat_head_reference):
        with pytest.raises(ValueError, match=message):
            function(x, head, plays)


def test_flags_that_do_not_fit():
    head = pack_heat_head(LAYER, MAP, GAIN, EDGE)
    with pytest.raises(ValueError, match=r"seen must be int32 \[1\] on cpu, got torch.float32"):
        heat_head(torch.zeros(1, 4, 9, 9), head, (1, 1), torch.ones(1))


def test_a_map_of_too_many_elements():
    pytest.importorskip("triton")
    from meddanet.kernels.heat_head_triton import run

    head = packed(Head(16, 16, torch.float16))
    x = torch.empty(1, 16, 16384, 8192, dtype=torch.float16, device="meta")
    with pytest.raises(ValueError, match=r"maps of \[16, 16384, 8192\] have too many elements"):
        run(torch.empty(1, 2), x, *head[:4], (0.5, 0.5), EDGE)
