"""select_bits against the layers that training uses, in float64."""

from __future__ import annotations

import pytest
import torch

from meddanet.kernels import select_bits, select_bits_reference
from meddanet.layers import BitSelector, image_gradients

pytestmark = pytest.mark.usefixtures("nan_poisoning")


def problem(samples=4, inputs=2, channels=5, image=(20, 22), feature=(9, 7), widths=(8, 16)):
    """A selector that prefers another width for every other slot, images, features."""
    selector = BitSelector(channels, inputs, widths).double()
    torch.nn.init.normal_(selector.linear.weight)
    contrast = torch.linspace(0.1, 3, samples)[:, None, None, None]
    images = torch.randn(samples, inputs, *image) * contrast
    features = torch.randn(samples, channels, *feature) * contrast.flip(0) + 5
    return selector, images, features


@torch.no_grad()
def logits(selector, views, features):
    spread = features.double().flatten(2).std(2, correction=0)
    return selector.linear(torch.cat([image_gradients(views.double()), spread], 1))


@torch.no_grad()
def balance(selector, views, features):
    """Moves the biases so that every width is chosen somewhere, with a margin."""
    found = logits(selector, views, features)
    selector.linear.bias.sub_(found.mean(0))
    top = logits(selector, views, features).topk(2, 1).values
    assert float((top[:, 0] - top[:, 1]).min()) > 1e-4, "a tie proves nothing"


def choose(function, selector, images, features, **options):
    weight, bias = (t.detach().float() for t in (selector.linear.weight, selector.linear.bias))
    return function(images, features, weight, bias, selector.widths, **options)


@pytest.mark.parametrize(
    "shape",
    [{}, {"samples": 1, "inputs": 1, "channels": 1}, {"widths": (2, 8, 16), "samples": 9},
     {"channels": 33, "inputs": 4}, {"image": (8, 8), "feature": (1, 3)},
     {"image": (48, 64), "feature": (48, 64), "channels": 3, "samples": 2}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_against_the_layers(shape, dtype):
    selector, images, features = problem(**shape)
    features = features.to(dtype).contiguous(memory_format=torch.channels_last)
    if len(images) > 1:
        balance(selector, images, features)
    with torch.no_grad():
        expected = selector(image_gradients(images.double()), features.double())
    for function in (select_bits, select_bits_reference):
        found = choose(function, selector, images, features)
        assert found.dtype == torch.int32 and found.tolist() == expected.tolist()
    assert len(images) == 1 or len(expected.unique()) > 1, "one answer proves nothing"


@pytest.mark.parametrize("count", [None, 0, 3, 9])
def test_views_slots_and_count(count):
    selector, images, features = problem(samples=6)
    slots, offset = torch.tensor([5, 0, 3, 3, 1, 2]), torch.randint(0, 9, (6, 2))
    views = torch.stack([
        images[n, :, y : y + 11, x : x + 13]
        for n, (y, x) in zip(slots.tolist(), offset.tolist(), strict=True)
    ])
    balance(selector, views, features)
    with torch.no_grad():
        expected = selector(image_gradients(views.double()), features.double())
    expected[6 if count is None else count :] = 0
    used = None if count is None else torch.tensor([count])
    found = choose(
        select_bits, selector, images, features, slots=slots, offset=offset, size=(11, 13),
        count=used,
    )
    assert found.tolist() == expected.tolist()


def test_a_large_mean_hides_no_spread():
    """Features around 1000 with a spread of 0.5 and 1: squares alone would cancel."""
    selector = BitSelector(1, 1)
    with torch.no_grad():
        selector.linear.weight.copy_(torch.tensor([[0.0, 0, -1], [0, 0, 1]]))
        selector.linear.bias.copy_(torch.tensor([1.5, 0]))
    noise = torch.randn(1, 1, 40, 40)
    noise = (noise - noise.mean()) / noise.std(correction=0)
    features = torch.cat([1000 + 0.5 * noise, 1000 + noise])
    assert choose(select_bits, selector, torch.zeros(2, 1, 8, 8), features).tolist() == [8, 16]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": torch.zeros(1, 2, 2)}, r"must be \[N, C, H, W\] in floating point"),
        ({"weight": torch.zeros(2, 4)}, r"weight must be \[2, 5\] and bias \[2\]"),
        ({"offset": torch.zeros(1, 2)}, "offset must be whole numbers"),
        ({"image": torch.zeros(2, 1, 4, 4)}, r"1 features meet 2 images: give slots \[1\]"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {
        "image": torch.zeros(1, 1, 4, 4), "feature": torch.zeros(1, 3, 2, 2),
        "weight": torch.zeros(2, 5), "bias": torch.zeros(2), "widths": torch.tensor([8, 16]),
        **change,
    }
    for function in (select_bits, select_bits_reference):
        with pytest.raises(ValueError, match=message):
            function(**arguments)
