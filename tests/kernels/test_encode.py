"""encode against fake_quantize, float64 arithmetic and slices cut by hand."""

from __future__ import annotations

import math
import os

import pytest
import torch
import torch.nn.functional as F

from meddanet.kernels import encode, encode_reference, encode_triton, fake_quantize, join_codes
from meddanet.kernels.backend import triton_runs
from meddanet.kernels.encode import run_reference
from meddanet.kernels.encode_call import EncodeCall

pytestmark = pytest.mark.usefixtures("nan_poisoning")
ONE = torch.ones(())
LAYOUTS = [torch.channels_last, torch.contiguous_format]


def whole(codes: torch.Tensor) -> torch.Tensor:
    return join_codes(codes[None] if codes.dim() == 4 else codes)


def shifted(image: torch.Tensor, y: int, x: int, size: tuple[int, int]) -> torch.Tensor:
    """[C, H, W] read from (y, x) on, zeros outside, by padding far and cutting."""
    far = 40
    return F.pad(image, [far] * 4)[:, far + y :, far + x :][:, : size[0], : size[1]]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["last", "planar"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("widths", [8, 16, [8, 16, 4]], ids=["8", "16", "mixed"])
def test_codes_times_step_are_the_fake_quantised_values(layout, dtype, widths):
    x = torch.randn(3, 5, 7, 9).to(dtype).contiguous(memory_format=layout)
    bits = widths if isinstance(widths, int) else torch.tensor(widths)
    amax = torch.tensor(1.5, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    codes = whole(encode(x, amax, bits))
    widths = [widths] * 3 if isinstance(widths, int) else widths
    for n, width in enumerate(widths):
        step = amax / (32639 if width == 16 else 2 ** (width - 1) - 1)
        wide = x[n : n + 1].to(amax.dtype)
        expected = (fake_quantize(wide, width, amax) / step).round()[0].to(torch.int16)
        assert torch.equal(codes[n], expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["last", "planar"])
@pytest.mark.parametrize("num_bits", [8, 16])
def test_the_norm_and_the_relu(layout, num_bits, tolerances):
    x = torch.randn(2, 20, 9, 11).contiguous(memory_format=layout)
    gain, shift = torch.rand(20, dtype=torch.float64) + 0.5, torch.randn(20, dtype=torch.float64)
    codes = encode(x, ONE * 2, num_bits, affine=(gain, shift), relu=True)
    value = (x.double() * gain[:, None, None] + shift[:, None, None]).relu()
    largest = {8: 127, 16: 32639}[num_bits]
    # a float32 product and sum: the toss-ups reach a few roundings of the larger term
    step = float(torch.tensor(2.0) / largest)
    quotient = (value / step).clamp(-largest, largest)
    difference = (whole(codes).long() - quotient.round().long()).abs()
    near = (quotient - quotient.floor() - 0.5).abs() <= 1e-6 * largest
    assert int(difference.max()) <= 1 and not bool(((difference == 1) & ~near).any())
    reference = encode_reference(x, ONE * 2, num_bits, affine=(gain, shift), relu=True)
    assert torch.equal(codes, reference)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["last", "planar"])
@pytest.mark.parametrize("size", [(4, 6), (12, 15), (1, 1), None], ids=str)
@pytest.mark.parametrize("count", [None, 0, 2, 9])
def test_slots_offsets_and_count(layout, size, count):
    x = torch.randn(3, 4, 8, 10).contiguous(memory_format=layout)
    slots, offset = torch.tensor([2, 0, 2, 1]), torch.tensor([[1, 2], [-3, 5], [7, -9], [30, 0]])
    used = None if count is None else torch.tensor([count])
    codes = encode(x, ONE * 3, offset=offset, size=size, slots=slots, count=used)
    size = size or (8, 10)
    assert codes.shape == (4, 4, *size) and codes.stride(1) == 1
    for m, (n, (top, left)) in enumerate(zip(slots.tolist(), offset.tolist(), strict=True)):
        view = shifted(x[n], top, left, size)
        expected = (view / (ONE * 3 / 127)).round().clamp(-127, 127).to(torch.int8)
        unused = count is not None and m >= count
        assert torch.equal(codes[m], torch.zeros_like(expected) if unused else expected)


# where nothing is read
masked = pytest.mark.skipif(
    os.environ.get("MEDDANET_OVERFLOWS") == "1", reason="products with such an offset overflow"
)


@masked
@pytest.mark.parametrize("far", [2**31 - 1, 2**31, 2**32, 2**40])
def test_an_offset_of_more_than_32_bits_is_far_outside(far):
    offset = torch.tensor([[far, 0], [0, -far], [0, 0]])
    codes = encode(torch.ones(3, 4, 3, 2), ONE, offset=offset, count=torch.tensor([far]))
    assert codes.flatten(1).any(1).tolist() == [False, False, True]


def test_what_lies_outside_goes_through_the_norm():
    codes = encode(
        torch.ones(1, 2, 2, 2), ONE, affine=(torch.ones(2), torch.tensor([0.5, -0.5])), relu=True,
        offset=torch.tensor([[5, 5]]),
    )
    assert codes[0, :, 0, 0].tolist() == [64, 0]  # 63.5 is a tie: to even


@pytest.mark.parametrize("num_bits", [8, 16])
def test_quotients_at_ties(num_bits):
    """The numbers around (k + 1/2) step: code by code as correctly rounded quotients have them."""
    largest = {8: 127, 16: 32639}[num_bits]
    amax = torch.rand(96) * 10 + 1
    step = (amax / largest)[:, None, None, None]
    tie = torch.arange(127.0) if num_bits == 8 else torch.randint(largest, (127,)).float()
    x = ((tie + 0.5) * step.double()).float()
    above = x.nextafter(ONE * math.inf)
    below = x.nextafter(ONE * 0)
    x = torch.cat([below.nextafter(ONE * 0), below, x, above, above.nextafter(ONE * math.inf)], 1)
    expected = (x / step).round().clamp(-largest, largest)
    assert torch.equal(whole(encode(x, amax, num_bits)).float(), expected)
    # a product with the reciprocal alone takes other sides
    assert not torch.equal((x * (1 / step)).round().clamp(-largest, largest), expected)


def test_slots_whose_codes_are_there_are_left_alone():
    x = torch.randn(3, 4, 40, 9)
    bits = torch.tensor([16, 8, 4], dtype=torch.int32)
    wanted = encode(x, ONE * 3, bits)
    call = EncodeCall(x, ONE.reshape(1) * 3, (40, 9), bits, done=8)
    for function in (run_reference, *([encode_triton.run] if triton_runs(x) else [])):
        codes = torch.full((2, 3, 40, 9, 4), 77, dtype=torch.int8).permute(0, 1, 4, 2, 3)
        function(call, codes)
        assert torch.equal(codes[:, 0], wanted[:, 0]) and torch.equal(codes[0, 2], wanted[0, 2])
        assert (codes[:, 1] == 77).all()


def test_what_has_no_code():
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.5]).reshape(1, 4, 1, 1)
    assert encode(x, ONE).flatten().tolist() == [0, 127, -127, 64]
    assert not encode(x[:, 3:], ONE * 0).any() and not encode(x[:, 3:], ONE * math.inf).any()
    codes = whole(encode(x[:, 3:].expand(3, 1, 1, 1), ONE, torch.tensor([1, 8, 17])))
    assert codes.flatten().tolist() == [0, 64, 0]


def test_every_layout_and_no_slot_at_all():
    x = torch.randn(2, 8, 5, 6)
    wanted = encode(x, ONE)
    wider = torch.cat([x, x.flip(1)], 1).contiguous(memory_format=torch.channels_last)
    assert torch.equal(encode(wider[:, :8], ONE), wanted)
    assert torch.equal(encode(x.transpose(2, 3).contiguous().transpose(2, 3), ONE), wanted)
    assert encode(x[:0], ONE).shape == (0, 8, 5, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(1, 2, 2)}, r"input must be \[N, C, H, W\] in floating point"),
        ({"amax": torch.ones(3)}, "amax must hold one value or one per slot, 1"),
        ({"num_bits": 17}, "num_bits must be an int from 2 to 16"),
        ({"affine": (torch.ones(3), torch.ones(2))}, r"affine must be \(gain, shift\)"),
        ({"offset": torch.zeros(1, 2)}, "offset must be whole numbers"),
        ({"slots": torch.zeros(1)}, "slots and count must be whole numbers, got torch.float32"),
        ({"count": torch.ones(1)}, "slots and count must be whole numbers"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"input": torch.zeros(1, 2, 2, 2), "amax": ONE, **change}
    for function in (encode, encode_reference):
        with pytest.raises(ValueError, match=message):
            function(**arguments)


def test_a_negative_range_has_no_codes():
    assert not encode(torch.randn(1, 2, 3, 4), -ONE, 8).any()
