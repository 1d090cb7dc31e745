"""label_head against a loop over pixels and classes, and against convolution, argmax and paste."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from meddanet.kernels import encode, label_head, label_head_reference, pack_conv, quant_conv2d

pytestmark = pytest.mark.usefixtures("nan_poisoning")

ONE = torch.ones(())
# where nothing is read
masked = pytest.mark.skipif(
    os.environ.get("MEDDANET_OVERFLOWS") == "1", reason="products with such an offset overflow"
)


def by_loops(scores, offset, size, slices, slots, used):
    """Labels pixel by pixel from scores [M, K, h, w]: the first largest class wins."""
    labels = np.zeros((slices, *size), np.uint8)
    for m in range(used):
        for i, j in np.ndindex(*scores.shape[2:]):
            y, x = offset[m][0] + i, offset[m][1] + j
            if 0 <= y < size[0] and 0 <= x < size[1]:
                values = [float(v) for v in scores[m, :, i, j]]
                labels[slots[m], y, x] = values.index(max(values))
    return labels


def problem(samples=2, channels=16, classes=4, region=(5, 6), codes=True):
    """A feature with its weights in both forms, and its exact scores (float64)."""
    x = torch.randn(samples, channels, *region)
    weight, bias = torch.randn(classes, channels, 1, 1), torch.randn(classes)
    if not codes:
        exact = F.conv2d(x.double(), weight.double(), bias.double())
        return x, {"weight": weight, "bias": bias}, exact
    conv = pack_conv(weight, bias)
    quantised = encode(x, ONE * 2)
    step, grid = np.float32(2) / np.float32(127), weight.abs().max() / 127
    weights = (weight / grid).round()
    exact = F.conv2d(quantised.double(), weights.double()) * float(step) * float(grid)
    return quantised, {"weight": conv, "amax": ONE * 2}, exact + bias.double()[:, None, None]


@pytest.mark.parametrize("codes", [True, False], ids=["codes", "floats"])
@pytest.mark.parametrize(
    ("shape", "size", "offset"),
    [
        pytest.param({}, (8, 9), [[1, 2], [0, 0]], id="inside"),
        pytest.param({}, (8, 9), [[-3, 4], [6, -2]], id="partly outside"),
        pytest.param({}, (4, 3), [[-1, -2], [-9, 99]], id="larger than the slice, far outside"),
        pytest.param({}, (8, 9), [[2**32, 0], [1, -(2**32)]], id="beyond 32 bits", marks=masked),
        pytest.param({"region": (1, 1), "channels": 3, "classes": 2}, (2, 2), [[0, 1], [1, 1]],
                     id="one pixel, three channels"),
        pytest.param({"region": (13, 33), "channels": 20, "classes": 7}, (13, 33), [[0, 0]] * 2,
                     id="more than a block"),
        pytest.param({"classes": 1}, (6, 6), [[0, 0], [0, 0]], id="one class"),
    ],
)
def test_against_loops(codes, shape, size, offset):
    x, weights, exact = problem(codes=codes, **shape)
    labels = label_head(x, **weights, offset=torch.tensor(offset), size=size)
    assert labels.dtype == torch.uint8 and labels.shape == (2, *size)
    assert np.array_equal(labels.numpy(), by_loops(exact, offset, size, 2, [0, 1], 2))


@pytest.mark.parametrize("count", [None, 0, 1, 2, 7])
def test_slots_and_count(count):
    x, weights, exact = problem()
    labels = label_head(
        x, **weights, offset=torch.tensor([[0, 0], [2, 1]]), size=(7, 7), slices=4,
        slots=torch.tensor([3, 1]), count=None if count is None else torch.tensor([count]),
    )
    used = 2 if count is None else min(count, 2)
    assert np.array_equal(
        labels.numpy(), by_loops(exact, [[0, 0], [2, 1]], (7, 7), 4, [3, 1], used)
    )


@pytest.mark.parametrize("offset", [(0, 0), (1, 0), (0, 2), (2, 3), (1, 1), (-2, -1), (9, 1)])
def test_a_margin_stays_unwritten_but_at_the_border(offset):
    x, weights, _ = problem(samples=1, classes=2)
    # every pixel that is written is 1
    weights["weight"] = weights["weight"]._replace(bias=torch.tensor([[-1e9, 0.0], [0, 0]]))
    (y, x0), (rows, columns), (height, width) = offset, (7, 9), (5, 6)
    labels = label_head(x, **weights, offset=torch.tensor([offset]), size=(7, 9), margin=2)
    expected = np.zeros((1, rows, columns), np.uint8)
    for i, j in np.ndindex(height, width):
        spoiled = (y > 0 and i < 2) or (y + height < rows and i >= height - 2)
        spoiled |= (x0 > 0 and j < 2) or (x0 + width < columns and j >= width - 2)
        if not spoiled and 0 <= y + i < rows and 0 <= x0 + j < columns:
            expected[0, y + i, x0 + j] = 1
    assert np.array_equal(labels.numpy(), expected)


def test_a_negative_range_leaves_the_bias():
    x, weights, _ = problem()
    nowhere = torch.zeros(2, 2, dtype=torch.int32)
    labels = label_head(x, weights["weight"], amax=-ONE, offset=nowhere, size=(5, 6))
    assert (labels == int(weights["weight"].bias[0].argmax())).all()


def test_it_is_the_unfused_path():
    x, weights, _ = problem(classes=6)
    stream = quant_conv2d(x, weights["weight"], weights["amax"], stream=torch.float32).stream
    labels = label_head(x, **weights, offset=torch.zeros(2, 2, dtype=torch.int64), size=(5, 6))
    assert torch.equal(labels, stream.argmax(1).to(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_score_in_float32(dtype):
    x, weights, _ = problem(codes=False)
    x = x.to(dtype)
    labels = label_head(x, **weights, offset=torch.zeros(2, 2, dtype=torch.int32), size=(5, 6))
    exact = F.conv2d(x.double(), weights["weight"].double(), weights["bias"].double())
    assert torch.equal(labels, exact.argmax(1).to(torch.uint8))


@pytest.mark.parametrize("codes", [True, False], ids=["codes", "floats"])
def test_the_first_of_equal_classes_wins(codes):
    x = torch.ones(1, 4, 1, 1)
    weight = torch.tensor([0.0, 1.0, 1.0, 0.5])[:, None, None, None].expand(4, 4, 1, 1)
    x, weights = (encode(x, ONE), {"weight": pack_conv(weight), "amax": ONE}) if codes else (
        x, {"weight": weight})
    offset = torch.zeros(1, 2, dtype=torch.int64)
    assert label_head(x, **weights, offset=offset, size=1).item() == 1


@pytest.mark.parametrize("row", [[1, math.nan, 2], [math.nan, 9, 9], [1, 2, math.nan],
                                 [1, math.nan, math.nan], [math.inf, math.nan, math.inf],
                                 [-math.inf, -math.inf, -1], [-math.inf] * 3])
def test_what_is_not_finite_ranks_as_in_argmax(row):
    scores = torch.tensor(row, dtype=torch.float32)
    labels = label_head(torch.zeros(1, 2, 1, 1), torch.zeros(3, 2), scores,
                        offset=torch.zeros(1, 2, dtype=torch.int64), size=1)
    assert labels.item() == scores.argmax().item()


def test_every_layout_and_no_region_at_all():
    x, weights, _ = problem()
    offset = torch.zeros(2, 2, dtype=torch.int64)
    wanted = label_head(x, **weights, offset=offset, size=(5, 6))
    wider = torch.cat([x, x.flip(1)], 1).contiguous(memory_format=torch.channels_last)
    for layout in (x.contiguous(), wider[:, :16]):
        assert torch.equal(label_head(layout, **weights, offset=offset, size=(5, 6)), wanted)
    labels = label_head(x[:0], **weights, offset=offset[:0], size=(5, 6), slices=3)
    assert labels.shape == (3, 5, 6) and not labels.any()


@given(
    codes=st.booleans(),
    channels=st.sampled_from([1, 4, 17]),
    classes=st.integers(1, 5),
    offset=st.lists(st.tuples(st.integers(-4, 7), st.integers(-4, 7)), min_size=2, max_size=2),
    region=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    seed=st.integers(0, 99),
)
def test_any_region(codes, channels, classes, offset, region, seed):
    torch.manual_seed(seed)
    x, weights, exact = problem(2, channels, classes, region, codes)
    arguments = {**weights, "offset": torch.tensor(offset), "size": (6, 5)}
    labels = label_head(x, **arguments)
    assert torch.equal(labels, label_head_reference(x, **arguments))
    assert np.array_equal(labels.numpy(), by_loops(exact, offset, (6, 5), 2, [0, 1], 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(1, 4, 2)}, r"input must be \[M, C, h, w\]"),
        ({"input": torch.zeros(1, 4, 2, 2, dtype=torch.int8)}, "take a floating-point input"),
        ({"input": torch.zeros(1, 5, 2, 2)}, "5 channels, weights take 4"),
        ({"weight": torch.zeros(3, 4, 3, 3)}, r"weights \[K, C\]"),
        ({"weight": torch.zeros(257, 4)}, "1 to 256 classes"),
        ({"weight": pack_conv(torch.ones(3, 4, 1, 1))}, "take int8 codes"),
        ({"offset": torch.zeros(1, 2)}, "offset must be whole numbers"),
        ({"offset": torch.zeros(2, 2, dtype=torch.int32)}, "offset must be"),
        ({"slots": torch.zeros(2, dtype=torch.int32)}, r"slots must be \[1\]"),
        ({"slices": 0}, "1 regions need as many slices"),
        ({"bias": torch.zeros(1)}, r"bias must be \[3\], got shape \[1\]"),
        ({"weight": torch.zeros(4)}, r"weights \[K, C\]"),
        ({"margin": -1}, "margin must be at least 0"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"input": torch.zeros(1, 4, 2, 2), "weight": torch.ones(3, 4), "size": 4,
                 "offset": torch.zeros(1, 2, dtype=torch.int32), **change}
    for function in (label_head, label_head_reference):
        with pytest.raises(ValueError, match=message):
            function(**arguments)


@pytest.mark.parametrize("change", [{"kernel": 3}, {"bits": 9}, {"bias": torch.ones(3)}])
def test_packed_weights_that_are_no_head(change):
    kernel = change.get("kernel", 1)
    conv = pack_conv(torch.ones(3, 4, kernel, kernel), num_bits=(8, 16))
    with pytest.raises(ValueError, match="packed weights must be a 1x1"):
        label_head(torch.zeros(1, 4, 2, 2, dtype=torch.int8), conv, change.get("bias"), size=4,
                   offset=torch.zeros(1, 2, dtype=torch.int32), amax=ONE,
                   num_bits=change.get("bits", 8))
