"""What no value may break: zeros, NaN, infinities, 1e30, the smallest numbers, empty batches.

Every operation against a statement of its own, element by element, in numpy or plain Python.
"""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meddanet.kernels import (
    affine_paste,
    bilinear_crop,
    encode,
    fake_quantize,
    join_codes,
    label_head,
    pack_conv,
    quant_conv2d,
    split_codes,
)

pytestmark = [
    pytest.mark.usefixtures("nan_poisoning"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid|divide by zero) :RuntimeWarning"),
]
few = settings(max_examples=12 if os.environ.get("TRITON_INTERPRET") == "1" else 60)

SPECIAL = [0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf, 1e30, -1e30, 1e-45, 1e-38]
values = st.one_of(st.sampled_from(SPECIAL), st.floats(-4, 4, width=32))
F32 = np.float32


def qmax(bits):
    return 32639 if bits == 16 else 2 ** (bits - 1) - 1


def on_grid(x, bits, amax):
    """The contract's grid for one number, with its rules for what is no number."""
    step = F32(math.nan if math.isinf(amax) else amax) / F32(qmax(bits))
    if step == 0:
        # nothing finite lies on this grid but 0; an infinity in such a range is no number
        return F32(0) if math.isfinite(x) else F32(math.nan)
    code = np.rint(F32(x) / step)
    return np.clip(code, -qmax(bits), qmax(bits)) * step


def same(actual, expected):
    np.testing.assert_array_equal(np.asarray(actual, F32), np.asarray(expected, F32))


@given(
    rows=st.lists(st.lists(values, min_size=5, max_size=5), max_size=4),
    bits=st.lists(st.integers(2, 16), min_size=4, max_size=4),
    given_range=st.one_of(st.none(), st.sampled_from([abs(v) for v in SPECIAL])),
    flipped=st.booleans(),
)
@few
def test_fake_quantize(rows, bits, given_range, flipped):
    x = torch.tensor(rows, dtype=torch.float32).reshape(len(rows), 5)
    # every second element of a wider tensor, or a dense one
    laid = torch.stack([x, -x], -1)[..., 0] if flipped else x
    amax = None if given_range is None else torch.tensor(given_range)
    out = fake_quantize(laid, torch.tensor(bits[: len(rows)]), amax)
    for n, row in enumerate(x.tolist()):
        own = math.nan if any(map(math.isnan, row)) else max(map(abs, row))
        limit = own if given_range is None else F32(given_range)
        same(out[n], [on_grid(v, bits[n], limit) for v in row])


@given(
    batch=st.integers(0, 2),
    bits=st.sampled_from([2, 8, 16]),
    amax=st.sampled_from([abs(v) for v in SPECIAL]),
    output_amax=st.sampled_from([abs(v) for v in SPECIAL]),
    residual=values,
    relu=st.booleans(),
)
@few
def test_quant_conv2d(batch, bits, amax, output_amax, residual, relu):
    """A 1x1 of one channel and weight 1: the stream is code * step + residual."""
    largest = qmax(bits)
    codes = torch.tensor([[largest, -1, 0]]).expand(batch, 3).reshape(batch, 1, 1, 3)
    planes = split_codes(codes) if bits == 16 else codes.to(torch.int8)
    conv = pack_conv(torch.ones(1, 1, 1, 1), num_bits=bits)
    result = quant_conv2d(
        planes, conv, torch.tensor(amax), num_bits=bits, stream=torch.float32, relu=relu,
        residual=torch.full((batch, 1, 1, 3), residual), output_amax=torch.tensor(output_amax),
    )
    assert result.stream.shape == result.codes.shape == (batch, 1, 1, 3)
    step = F32(math.nan if math.isinf(amax) else amax) / F32(largest)
    scale = F32(np.float64(step) * np.float64(F32(1) / F32(largest)))
    for n in range(batch):
        sums = [F32(int(code) * largest) for code in codes[n].flatten()]
        stream = [s * scale + F32(0) + F32(residual) for s in sums]
        same(result.stream[n].flatten(), stream)
        activated = [F32(0) if relu and v < 0 else v for v in stream]
        wanted = [on_grid(v, 8, output_amax) for v in activated]
        step_out = F32(output_amax) / F32(127)
        whole = [0 if math.isnan(w) or step_out == 0 else round(float(w / step_out))
                 for w in wanted]
        assert result.codes[n].flatten().tolist() == whole


@given(x=st.lists(values, min_size=6, max_size=6), bits=st.sampled_from([8, 16]),
       amax=st.sampled_from([abs(v) for v in SPECIAL]))
@few
def test_encode(x, bits, amax):
    image = torch.tensor(x, dtype=torch.float32).reshape(1, 2, 1, 3)
    codes = encode(image, torch.tensor(amax), bits)
    codes = join_codes(codes) if bits == 16 else codes
    step = F32(math.nan if math.isinf(amax) else amax) / F32(qmax(bits))
    for actual, value in zip(codes.flatten().tolist(), x, strict=True):
        quotient = F32(value) / step if step != 0 else F32(0)
        wanted = 0 if math.isnan(quotient) else np.clip(np.rint(quotient), -qmax(bits), qmax(bits))
        assert actual == wanted


@given(
    source=st.lists(values, min_size=4, max_size=4),
    offset=st.tuples(*[st.one_of(st.sampled_from([0.0, 1.0, -1.0, 0.5, math.nan, math.inf, 1e30]),
                                 st.floats(-3, 3, width=32))] * 2),
    paste=st.booleans(),
    batch=st.integers(0, 2),
)
@few
def test_crop_and_paste(source, offset, paste, batch):
    """Four taps: those outside count as nothing, even where the weight of an infinity is zero."""
    x = torch.tensor(source, dtype=torch.float32).reshape(1, 1, 2, 2).expand(batch, 1, 2, 2)
    where = torch.tensor([offset], dtype=torch.float32).expand(batch, 2)
    out = (affine_paste if paste else bilinear_crop)(x, where, 3)
    assert out.shape == (batch, 1, 3, 3)
    shift = [-v if paste else v for v in where[:1].flatten().tolist()] if batch else []
    for n, i, j in np.ndindex(batch, 3, 3):
        y, column = i + shift[0], j + shift[1]
        if math.isnan(y) or math.isnan(column):
            assert out[n, 0, i, j].isnan()
            continue
        if max(abs(y), abs(column)) > 9:
            assert out[n, 0, i, j] == 0
            continue
        taps = [
            (1 - abs(y - r)) * (1 - abs(column - c)) * float(x[n, 0, r, c])
            for r in (0, 1) for c in (0, 1) if abs(y - r) < 1 and abs(column - c) < 1
        ]
        wanted = sum(taps)
        finite = all(map(math.isfinite, source))
        if finite:
            bound = 1e-5 * sum(map(abs, taps)) + 1e-6
            assert abs(float(out[n, 0, i, j]) - wanted) <= bound
        elif not math.isfinite(wanted):
            assert not math.isfinite(float(out[n, 0, i, j])), "never a silent number"


@given(scores=st.lists(values, min_size=3, max_size=3), batch=st.integers(0, 2))
@few
def test_head(scores, batch):
    bias = torch.tensor(scores, dtype=torch.float32)
    labels = label_head(
        torch.zeros(batch, 2, 1, 1), torch.zeros(3, 2), bias, size=1,
        offset=torch.zeros(batch, 2, dtype=torch.int64),
    )
    # numpy's argmax ranks a NaN highest and takes the first of equals, too
    assert labels.flatten().tolist() == [int(np.argmax(bias.numpy()))] * batch
