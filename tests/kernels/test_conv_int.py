"""quant_conv2d against loops over integers in numpy, and against the fake-quantised path."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from meddanet.kernels import (
    encode,
    fake_quantize,
    join_codes,
    norm_affine,
    pack_conv,
    quant_conv2d,
    quant_conv2d_reference,
    split_codes,
    use_backend,
)
from meddanet.kernels.conv_call import ConvCall, checked_call, is_mild
from meddanet.kernels.pairs import split_floats
from meddanet.networks.unet import ResidualBlock

pytestmark = pytest.mark.usefixtures("nan_poisoning")

QMAX = {2: 1, 3: 3, 4: 7, 5: 15, 8: 127, 9: 255, 12: 2047, 16: 32639}
F32 = np.float32


@dataclass(frozen=True)
class Case:
    """One convolution and what follows it; widths are one int for all, or one per sample."""

    channels: tuple[int, int] = (4, 8)
    size: tuple[int, int] = (5, 7)
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    transposed: bool = False
    bits: int | tuple[int, ...] = 8
    packed: tuple[int, ...] = (8, 16)
    residual: torch.dtype | None = None
    stream: torch.dtype | None = torch.float32
    affine: bool = False
    relu: bool = False
    out_bits: int | tuple[int, ...] | None = 8
    slots: tuple[int, ...] | None = None
    count: int | None = None
    per_channel: bool = False
    batch: int = 2

    @property
    def widths(self):
        return [self.bits] * self.batch if isinstance(self.bits, int) else list(self.bits)


CASES = {
    "3x3": Case(),
    "stem, 4 channels, stride 2": Case(channels=(4, 16), stride=2, size=(6, 9)),
    "16 channels, more pixels than a block": Case(channels=(16, 16), size=(13, 17), batch=1),
    "16 bits": Case(bits=16, out_bits=16, size=(4, 5)),
    "16 bits in, 8 out": Case(bits=16, channels=(16, 4), size=(3, 4), relu=True),
    "8 bits in, 16 out": Case(out_bits=16, channels=(4, 16)),
    "one width per sample": Case(bits=(8, 16, 8), out_bits=(16, 8, 8), batch=3, affine=True),
    "widths between": Case(bits=(3, 12), packed=(4, 12), out_bits=(12, 5)),
    "pre-activation block, first": Case(channels=(16, 16), relu=True, stream=None),
    "pre-activation block, second": Case(
        channels=(16, 16), residual=torch.float32, affine=True, relu=True
    ),
    "second, 16 bits": Case(
        bits=16, out_bits=16, residual=torch.float16, affine=True, relu=True, stream=torch.float16
    ),
    "residual in bfloat16, no codes": Case(
        residual=torch.bfloat16, stream=torch.bfloat16, out_bits=None, relu=True
    ),
    "1x1": Case(kernel=1, padding=0, channels=(32, 16), size=(3, 5)),
    "1x1, 64 channels": Case(kernel=1, padding=0, channels=(64, 12), size=(1, 3)),
    "64 channels, one range per channel": Case(channels=(64, 20), size=(3, 3), per_channel=True),
    "few channels": Case(channels=(3, 5), size=(3, 4)),
    "no padding, stride 2": Case(padding=0, stride=2, size=(7, 6)),
    "transposed, one range per channel": Case(
        kernel=2, stride=2, padding=0, transposed=True, size=(2, 3), per_channel=True
    ),
    "transposed 2x2": Case(kernel=2, stride=2, padding=0, transposed=True, size=(3, 5)),
    "transposed 4x4, padding 1": Case(
        kernel=4, stride=2, padding=1, transposed=True, size=(3, 5)
    ),
    "transposed 2x2, 16 bits": Case(
        kernel=2, stride=2, padding=0, transposed=True, size=(2, 3), bits=(16, 8),
        channels=(16, 16), out_bits=(8, 16), relu=True,
    ),
    "slots permuted, the last unused": Case(
        batch=3, bits=(16, 8, 16), slots=(2, 0, 1, 1), count=3, out_bits=(8, 16, 8, 8),
        residual=torch.float32,
    ),
    "count 0": Case(count=0),
    "more counted than there are": Case(count=9),
    "empty batch": Case(batch=0),
    "one pixel": Case(size=(1, 1)),
    "one channel": Case(channels=(1, 1)),
    "wider than two tiles of channels": Case(kernel=1, padding=0, channels=(4, 130), size=(2, 2)),
}


def loops(x, w, stride, padding, transposed):
    """The convolution of integers as its definition says, one product at a time."""
    n, c_in, height, width = x.shape
    k = w.shape[2]
    if transposed:
        out = np.zeros((n, w.shape[1], (height - 1) * stride + k, (width - 1) * stride + k), int)
        for y, i, dy, dx in itertools.product(range(height), range(width), range(k), range(k)):
            taps = np.einsum("nc,co->no", x[:, :, y, i], w[:, :, dy, dx])
            out[:, :, y * stride + dy, i * stride + dx] += taps
        ends = slice(padding, -padding or None)
        return out[:, :, ends, ends]
    rows, columns = ((s + 2 * padding - k) // stride + 1 for s in (height, width))
    out = np.zeros((n, len(w), rows, columns), int)
    for y, i, dy, dx in itertools.product(range(rows), range(columns), range(k), range(k)):
        from_y, from_x = y * stride + dy - padding, i * stride + dx - padding
        if 0 <= from_y < height and 0 <= from_x < width:
            out[:, :, y, i] += np.einsum("nc,oc->no", x[:, :, from_y, from_x], w[:, :, dy, dx])
    return out


def weight_codes(weight, bits, per_channel, transposed=False):
    """The grid, restated: integer codes and the step of each output channel."""
    others = (0, 2, 3) if transposed else (1, 2, 3)
    axes = others if per_channel else None
    amax = np.abs(weight).max(axes, keepdims=True)
    step = (amax / F32(QMAX[bits])).astype(F32)
    return np.rint(weight / step).astype(np.int64), step.reshape(-1)


class Problem:
    """Random tensors of a case, and what must come out of it in float64."""

    def __init__(self, case: Case) -> None:
        self.case = case
        c_in, c_out = case.channels
        shape = (c_in, c_out) if case.transposed else (c_out, c_in)
        self.weight = torch.randn(*shape, case.kernel, case.kernel)
        self.bias, self.norm = torch.randn(c_out), (torch.rand(c_out) + 0.5, torch.randn(c_out))
        self.largest = np.array([QMAX[b] for b in case.widths], dtype=np.int64)
        limits = self.largest[:, None, None, None]
        draw = np.random.uniform(-1.2, 1.2, (case.batch, c_in, *case.size))
        self.codes = np.clip(np.rint(draw * limits), -limits, limits).astype(np.int64)
        self.amax = torch.tensor(0.7)
        self.slots = list(case.slots or range(case.batch))
        self.used = min(case.count if case.count is not None else 99, len(self.slots))
        self.affine = (torch.randn(c_out), torch.randn(c_out)) if case.affine else None
        self.output_amax = torch.tensor(1.7)
        self.sums = [self.sum_of(n) for n in self.slots]
        size = (self.sums[0] if self.sums else self.sum_of(None))[0].shape
        self.residual = case.residual and torch.randn(len(self.slots), *size).to(case.residual)

    def sum_of(self, n):
        """The exact sum and scale of one sample, float64 [Cout, Hout, Wout]; None: its shape."""
        case = self.case
        bits = case.packed[0] if n is None else case.widths[n]
        packed = min(p for p in case.packed if p >= bits and (p > 8) == (bits > 8))
        codes, step = weight_codes(
            self.weight.numpy(), packed, case.per_channel, case.transposed
        )
        x = np.zeros((1, *self.codes.shape[1:]), int) if n is None else self.codes[n : n + 1]
        total = loops(x, codes, case.stride, case.padding, case.transposed)[0]
        gain, shift = (t.double().numpy() for t in self.norm)
        scale = np.float64(F32(self.amax) / F32(QMAX[bits])) * (np.float64(step) * gain)
        offset = self.bias.double().numpy() * gain + shift
        return total, scale.reshape(-1, 1, 1), offset.reshape(-1, 1, 1)

    def values(self, slot, dtype):
        """The sum and what is quantised, each product and sum rounded to `dtype`, in order."""
        total, scale, offset = (v.astype(dtype) for v in self.sums[slot])
        value = total * scale + offset
        if self.residual is not None:
            value = value + self.residual[slot].to(torch.float64).numpy().astype(dtype)
        stream = value
        if self.affine is not None:
            gain, shift = (t.double().numpy()[:, None, None].astype(dtype) for t in self.affine)
            value = value * gain + shift
        return stream, np.maximum(value, 0).astype(dtype) if self.case.relu else value

    def codes_of(self, slot, value, width):
        """The grid in float32, restated."""
        step = F32(self.output_amax) / F32(QMAX[width])
        return np.rint(value.astype(F32) / step).clip(-QMAX[width], QMAX[width]), step

    def run(self, function=quant_conv2d):
        case = self.case
        planes = split_codes(torch.from_numpy(self.codes))
        conv = pack_conv(
            self.weight, self.bias, case.stride, case.padding, num_bits=case.packed,
            per_channel=case.per_channel, transposed=case.transposed, norm=self.norm,
        )
        wide = not isinstance(case.bits, int) or case.bits > 8
        tensor = lambda v: torch.tensor(v) if isinstance(v, tuple) else v  # noqa: E731
        return function(
            planes if wide else planes[0],
            conv,
            self.amax,
            num_bits=tensor(case.bits),
            residual=self.residual,
            stream=case.stream,
            affine=self.affine,
            relu=case.relu,
            output_amax=None if case.out_bits is None else self.output_amax,
            output_num_bits=8 if case.out_bits is None else tensor(case.out_bits),
            slots=None if case.slots is None else torch.tensor(case.slots),
            count=None if case.count is None else torch.tensor([case.count]),
        )

    def slots_of(self, result):
        """Yields (slot, width, stream, codes) of the slots in use; the others must be zero."""
        out_bits = self.case.out_bits
        widths = out_bits if isinstance(out_bits, tuple) else [out_bits] * len(self.slots)
        assert (result.stream is None) == (self.case.stream is None)
        assert (result.codes is None) == (out_bits is None)
        for output in result:
            assert output is None or not output.transpose(0, -4)[self.used :].any()
        for slot in range(self.used):
            stream = None if result.stream is None else result.stream[slot]
            codes = None
            if result.codes is not None:
                planes = result.codes if result.codes.dim() == 5 else result.codes[None]
                codes = join_codes(planes[:, slot : slot + 1])[0]
            yield slot, widths[slot], stream, codes

    def check(self, result, narrow) -> None:
        """Every bit is that of the stated arithmetic."""
        for slot, width, stream, codes in self.slots_of(result):
            total, value = self.values(slot, np.float64 if (width or 0) > 8 else F32)
            if stream is not None:
                wanted = narrow(torch.from_numpy(total.astype(F32)), self.case.stream)
                assert torch.equal(stream, wanted)
            if codes is not None:
                assert np.array_equal(codes.numpy(), self.codes_of(slot, value, width)[0])


@pytest.mark.parametrize("name", CASES)
def test_against_loops_over_integers(name, narrow):
    problem = Problem(CASES[name])
    problem.check(problem.run(), narrow)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.channels[0] <= 16])
def test_a_step_through_the_sums_may_reach_beyond_them(name, backend, narrow, monkeypatch):
    """A block size that `benchmarks/tune.py` tries: K is no multiple of it."""
    if backend == "triton":
        from meddanet.kernels import conv_int_triton

        usual = conv_int_triton.blocks
        monkeypatch.setattr(
            conv_int_triton, "blocks", lambda *given: {**usual(*given), "BLOCK_K": 64}
        )
    problem = Problem(CASES[name])
    problem.check(problem.run(), narrow)


@pytest.mark.parametrize(
    "name", ["one width per sample", "widths between", "transposed 2x2, 16 bits",
             "slots permuted, the last unused", "8 bits in, 16 out"],
)
def test_parts_of_a_tile(name, backend, narrow, monkeypatch):
    """More pixels than a part has, and rows of which the last parts have none."""
    if backend == "triton":
        from meddanet.kernels import conv_int_triton

        usual = conv_int_triton.blocks
        parts = {"BLOCK_M": 64, "BLOCK_N": 64, "PART_M": 32, "PART_N": 16}
        monkeypatch.setattr(
            conv_int_triton, "blocks", lambda *given: {**usual(*given), **parts}
        )
    problem = Problem(replace(CASES[name], size=(6, 7)))
    problem.check(problem.run(), narrow)


@pytest.mark.parametrize("name", ["one width per sample", "slots permuted, the last unused"])
def test_tiles_of_128_channels_on_an_h200(name, backend, narrow, monkeypatch):
    """Which no other card has: more pixels than one tile takes."""
    problem = Problem(replace(CASES[name], channels=(128, 128), size=(5, 14)))
    if backend == "triton":
        from meddanet.kernels import conv_int_triton

        chosen, usual = [], conv_int_triton.blocks
        monkeypatch.setattr(conv_int_triton, "architecture", lambda device: 90)
        monkeypatch.setattr(
            conv_int_triton, "blocks", lambda *given: chosen.append(usual(*given)) or chosen[-1]
        )
    problem.check(problem.run(), narrow)
    if backend == "triton":
        sizes = [(one["BLOCK_M"], one["BLOCK_N"], one["BLOCK_K"]) for one in chosen]
        assert sizes == [(64, 128, 128)]


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.out_bits == 8])
def test_8_bit_codes_are_those_of_float64_but_at_ties(name, tolerances):
    problem = Problem(CASES[name])
    for slot, width, _, codes in problem.slots_of(problem.run()):
        _, value = problem.values(slot, np.float64)
        quotient = torch.from_numpy(value / float(problem.codes_of(slot, value, width)[1]))
        tolerances.codes(codes, quotient.round().clamp(-127, 127), quotient=quotient)


# the interpreter cuts bfloat16 off where a GPU rounds to nearest
@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.stream != torch.bfloat16])
def test_executors_agree(name, backend):
    case = CASES[name]
    problem = Problem(case)
    for actual, wanted in zip(problem.run(), problem.run(quant_conv2d_reference), strict=True):
        assert actual is None or actual.stride() == wanted.stride()
        if actual is not None and actual.dtype == torch.int8:
            assert torch.equal(actual, wanted)
        elif actual is not None:
            torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_largest_codes_sum_up_exactly(bits, transposed):
    # 9 * 64 products of 32639^2 need 40 bits, of 127^2 24
    largest, one = QMAX[bits], torch.ones(())
    codes = torch.full((1, 64, 3, 3), largest)
    weight = torch.tensor([1.0, -1.0]).expand(64, 2).T.reshape(2, 64, 1, 1).expand(-1, -1, 3, 3)
    geometry = {"padding": 1}
    if transposed:
        weight, geometry = weight.transpose(0, 1)[..., :2, :2], {"stride": 2, "transposed": True}
    conv = pack_conv(weight, num_bits=bits, **geometry)
    planes = split_codes(codes) if bits > 8 else codes.to(torch.int8)
    stream = quant_conv2d(planes, conv, one * largest, num_bits=bits, stream=torch.float32).stream
    signs = weight.long().numpy() * largest
    total = loops(codes.numpy(), signs, 1 + transposed, 1 - transposed, transposed)
    assert np.abs(total).max() == largest**2 * 64 * (1 if transposed else 9)
    # the input's step is 1, the weights' 1 / largest
    assert np.array_equal(stream.numpy(), total.astype(F32) * (F32(1) / F32(largest)))


def test_16_bit_codes_are_those_of_float64_but_at_ties(tolerances):
    case = Case(channels=(4, 32), size=(14, 16), bits=16, out_bits=16, affine=True,
                residual=torch.float32, batch=1)
    problem = Problem(case)
    problem.output_amax = torch.tensor(9.0)
    _, value = problem.values(0, np.float64)
    codes = join_codes(problem.run().codes)[0]
    assert (codes.abs() < 32639).float().mean() > 0.5
    quotient = torch.from_numpy(value / float(F32(9) / F32(32639)))
    tolerances.codes(codes, quotient.round().clamp(-32639, 32639), quotient=quotient)


@pytest.mark.parametrize("bits", [2, 8, 9, 16])
def test_codes_and_sums_are_those_of_the_fake_quantised_path(bits, tolerances):
    x, weight, bias = torch.randn(2, 4, 6, 5), torch.randn(8, 4, 3, 3), torch.randn(8)
    amax = x.abs().max() * 0.8
    codes = encode(x, amax, bits)
    whole = join_codes(codes) if bits > 8 else codes
    assert torch.equal(whole * (amax / QMAX[bits]), fake_quantize(x, bits, amax))
    conv = pack_conv(weight, bias, padding=1, num_bits=bits)
    actual = quant_conv2d(codes, conv, amax, num_bits=bits, stream=torch.float32).stream
    values = fake_quantize(x, bits, amax), fake_quantize(weight, bits)
    native = torch.nn.functional.conv2d(*values, bias, padding=1)
    exact = torch.nn.functional.conv2d(*(v.double() for v in values), bias.double(), padding=1)
    tolerances.reduction(actual, native=native, exact=exact)


@pytest.fixture
def launches(monkeypatch, backend):
    """Names of the kernels launched, where kernels are."""
    names: list[str] = []
    if backend == "triton":
        from meddanet.kernels import conv_int_triton

        kernel = conv_int_triton.conv_kernel

        class Counted:
            def __getitem__(self, grid):
                names.append("conv_kernel")
                return kernel[grid]

        monkeypatch.setattr(conv_int_triton, "conv_kernel", Counted())
    return names


class Operations(TorchDispatchMode):
    """Records every operation but those that only look at memory in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not any(result.alias_info for result in func._schema.returns):
            self.called.append(str(func))
        return func(*args, **(kwargs or {}))


def residual_block(bits):
    """A block of U-Net-16 in eval(), its norms and ranges set."""
    block = ResidualBlock(16).eval()
    for norm in (block.norm1, block.norm2):
        torch.nn.init.normal_(norm.weight, 1.0, 0.2)
        torch.nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    for conv, amax in ((block.conv1, 2.5), (block.conv2, 1.5)):
        conv.num_bits = conv.input_num_bits = bits
        conv.input_amax.fill_(amax)
    return block.requires_grad_(False)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_preactivation_block_is_two_calls_with_nothing_between(
    bits, tolerances, launches, backend
):
    block, x = residual_block(bits), torch.randn(2, 16, 6, 7)
    first = pack_conv(block.conv1.weight, block.conv1.bias, padding=1, num_bits=bits,
                      norm=norm_affine(block.norm2))
    second = pack_conv(block.conv2.weight, block.conv2.bias, padding=1, num_bits=bits)
    amax = [conv.input_amax.reshape(1) for conv in (block.conv1, block.conv2)]
    activated = block.norm1(x).relu()
    codes = encode(activated, amax[0], bits)
    stream = x.contiguous(memory_format=torch.channels_last)

    with Operations() as operations:
        middle = quant_conv2d(codes, first, amax[0], num_bits=bits, relu=True,
                              output_amax=amax[1], output_num_bits=bits)
        result = quant_conv2d(middle.codes, second, amax[1], num_bits=bits, residual=stream,
                              stream=torch.float32)
    assert operations.called == ["meddanet.quant_conv2d.default"] * 2
    assert launches == ["conv_kernel"] * (2 if backend == "triton" else 0)

    # the fake-quantised path: the layers' own grids, sums and norms in float64
    exact = copy.deepcopy(block).double()
    convolve = torch.nn.functional.conv2d
    values = fake_quantize(activated, bits, amax[0]), fake_quantize(block.conv1.weight, bits)
    hidden = convolve(*(v.double() for v in values), exact.conv1.bias, padding=1)
    hidden = exact.norm2(hidden).relu()
    quotient = hidden / float(amax[1] / QMAX[bits])
    ours = join_codes(middle.codes) if bits > 8 else middle.codes
    tolerances.codes(ours, quotient.round().clamp(max=QMAX[bits]), quotient=quotient)
    values = ours * (amax[1] / QMAX[bits]), fake_quantize(block.conv2.weight, bits)
    tolerances.reduction(
        result.stream,
        native=x + convolve(*values, block.conv2.bias, padding=1),
        exact=x + convolve(*(v.double() for v in values), exact.conv2.bias, padding=1),
    )
    # and the layers as they stand, in float32: their own sums move a few hidden codes by a step
    step = amax[1].item() / QMAX[bits]
    reach = step * values[1].abs().sum((1, 2, 3)).max().item()
    assert (result.stream - block(x)).abs().max() <= reach + 1e-5


def test_outputs_go_into_given_buffers(backend):
    """In place over the residual, and codes into one half of a concatenation."""
    from meddanet.kernels import conv_reference

    run = conv_reference.run
    if backend == "triton":
        from meddanet.kernels.conv_int_triton import run
    problem = Problem(replace(CASES["16 bits"], residual=torch.float32))
    wanted = problem.run()
    call = problem.run(lambda *a, **k: (a, k))
    stream = call[1].pop("residual").contiguous(memory_format=torch.channels_last)
    options = {"slots": None, "count": None, **call[1]}
    call = checked_call(*call[0], residual=stream, **options)
    both = torch.zeros(2, 2, 4, 5, 24, dtype=torch.int8).permute(0, 1, 4, 2, 3)
    run(call, stream, both[:, :, 16:])
    assert torch.equal(stream, wanted.stream) and torch.equal(both[:, :, 16:], wanted.codes)
    assert not both[:, :, :16].any()


@pytest.mark.parametrize("name", ["one width per sample", "second, 16 bits", "transposed 2x2"])
def test_skip_codes_are_those_of_the_sum_itself(name, backend):
    """As a call of its own would store them, without affine map and ReLU, at a range of theirs."""
    from meddanet.kernels import conv_reference

    run = conv_reference.run
    if backend == "triton":
        from meddanet.kernels.conv_int_triton import run
    problem = Problem(replace(CASES[name], relu=True, stream=torch.float32))
    expected = problem.run()
    args, options = problem.run(lambda *a, **k: (a, k))
    alone = options | {"affine": None, "relu": False, "output_num_bits": 7}
    wanted = quant_conv2d(*args, **alone | {"output_amax": torch.tensor(0.9)}).codes
    call = checked_call(*args, **{"slots": None, "count": None, **options})
    call = replace(call, skip_amax=torch.tensor([0.9]), skip_num_bits=7)
    planes = call.new_codes()
    skip = torch.zeros(*wanted.shape[:1], *wanted.shape[2:], 2 * wanted.shape[1], dtype=torch.int8)
    skip = skip.permute(0, 3, 1, 2)
    stream = torch.zeros_like(expected.stream)
    run(call, stream, planes, skip[:, : wanted.shape[1]])
    assert torch.equal(skip[:, : wanted.shape[1]], wanted) and wanted.unique().numel() > 50
    assert not skip[:, wanted.shape[1] :].any()
    assert torch.equal(stream, expected.stream)
    assert torch.equal(planes if len(planes) == 2 else planes[0], expected.codes)


@pytest.mark.parametrize("out_bits", [8, 16, (16, 8, 8)], ids=str)
def test_nobody_reads_the_high_plane_of_a_narrow_sample(out_bits, backend):
    problem = Problem(Case(bits=(8, 16, 8), out_bits=out_bits, batch=3, channels=(16, 40)))
    (planes, *others), options = problem.run(lambda *a, **k: (a, k))
    wanted = quant_conv2d(planes, *others, **options)
    planes = (planes if planes.dim() == 5 else split_codes(planes)).clone()
    planes[1, ::2] = 77
    found = quant_conv2d(planes, *others, **options)
    assert torch.equal(found.codes, wanted.codes) and torch.equal(found.stream, wanted.stream)


@pytest.mark.parametrize("name", ["one width per sample", "second, 16 bits", "3x3"])
def test_what_is_not_asked_after_changes_nothing(name, backend):
    """Constants and steps like these: the same to the bit."""
    if backend != "triton":
        pytest.skip("what asks is the Triton kernel")
    from meddanet.kernels.conv_int_triton import run
    args, options = Problem(CASES[name]).run(lambda *a, **k: (a, k))
    call = checked_call(*args, **{"slots": None, "count": None, **options})
    assert is_mild(call.amax, 8, call.conv.scale, call.conv.bias)
    found = []
    for mild in (False, True):
        found.append((call.new_stream(torch.float32), call.new_codes()))
        run(replace(call, mild=mild), *found[-1])
    assert all(map(torch.equal, *found)) and found[0][1].unique().numel() > 20


def test_what_is_mild():
    one = torch.ones(1)
    assert is_mild(one, 8, one) and is_mild(one * 0, 8) and is_mild(one * 127e-30, 8)
    assert not is_mild(one * 126e-30, 8) and not is_mild(one * 1.28e32, 8)
    assert not is_mild(one * math.nan, 8) and not is_mild(one * math.inf, 8)
    assert not is_mild(one, 8, one, one * math.inf) and not is_mild(one, 8, one * math.nan)
    # a scale that is finite, but not times the step
    assert not is_mild(one * 127e29, 8, one * 1e13) and is_mild(one, 8, one * 1e13)


@pytest.mark.parametrize("bits", [8, [16, 8, 8]], ids=str)
@pytest.mark.parametrize("channels", [3, 16, 40])
def test_moments_of_the_sum(bits, channels, backend):
    """Chunk by chunk, the last one shorter, about a mean that squares alone would not survive."""
    if backend != "triton":
        pytest.skip("what stores moments is the Triton kernel")
    from meddanet.kernels.conv_int_triton import new_moments, run
    weight, bias = torch.randn(channels, 5, 3, 3), torch.full((channels,), 300.0)
    conv = pack_conv(weight, bias, 1, 1, num_bits=(8, 16) if isinstance(bits, list) else 8)
    widths = torch.tensor(bits, dtype=torch.int32) if isinstance(bits, list) else bits
    planes = torch.randint(-127, 128, (2, 3, 19, 21, 5), dtype=torch.int8).permute(0, 1, 4, 2, 3)
    planes = planes if isinstance(bits, list) else planes[:1]
    call = ConvCall(
        planes, conv, torch.ones(1), widths, output_amax=torch.ones(1), count=torch.tensor([2])
    )
    moments, length = new_moments(call)
    moments.fill_(7)
    stream = call.new_stream(torch.float32)
    run(call, stream, call.new_codes(), None, moments)
    chunks = stream.flatten(2).double().split(length, 2)
    assert moments.shape == (3, len(chunks), 2, channels) and len(chunks) > 1
    for n, chunk in enumerate(chunks):
        mean = chunk[:2].mean(2)
        torch.testing.assert_close(moments[:2, n, 0].double(), mean, rtol=1e-6, atol=1e-6)
        deviation = chunk[:2].var(2, correction=0) * chunk.shape[2]
        torch.testing.assert_close(moments[:2, n, 1].double(), deviation, rtol=2e-5, atol=1e-8)
    assert (moments[2] == 7).all(), "a slot that is not in use is left alone"


def test_scale_times_step_is_rounded_alike_everywhere():
    """Where the tail's own rounding crosses a tie: the float32 next to that of exact arithmetic."""
    conv = pack_conv(torch.ones(1, 1, 1, 1))
    conv = conv._replace(
        scale=split_floats(torch.tensor([[0.009130979517503263]], dtype=torch.float64)),
        bias=torch.zeros(2, 1),
    )
    codes = torch.arange(1, 128, dtype=torch.int8).reshape(1, 1, 1, -1)
    codes = codes.contiguous(memory_format=torch.channels_last)
    amax = torch.tensor(0.03324348106980324) * 127
    actual = quant_conv2d(codes, conv, amax, stream=torch.float32).stream
    with use_backend("reference"):
        assert torch.equal(actual, quant_conv2d(codes, conv, amax, stream=torch.float32).stream)


@pytest.mark.parametrize("out_bits", [8, 16])
def test_infinities_have_the_largest_codes(out_bits):
    conv, one = pack_conv(torch.ones(3, 1, 1, 1)), torch.ones(())
    residual = torch.tensor([math.inf, -math.inf, 0.25]).reshape(1, 3, 1, 1)
    codes = torch.zeros(1, 1, 1, 1, dtype=torch.int8)
    result = quant_conv2d(codes, conv, one, residual=residual, stream=torch.float32,
                          output_amax=one, output_num_bits=out_bits)
    largest = QMAX[out_bits]
    found = join_codes(result.codes) if out_bits > 8 else result.codes
    assert found.flatten().tolist() == [largest, -largest, 32 if out_bits == 8 else 8160]
    assert torch.equal(result.stream, residual)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_step_of_zero_gives_zeros(bits):
    x = torch.randn(1, 4, 3, 3)
    conv = pack_conv(torch.randn(4, 4, 1, 1), num_bits=bits)
    zero, one = torch.zeros(()), torch.ones(())
    result = quant_conv2d(encode(x, zero, bits), conv, zero, num_bits=bits, stream=torch.float32,
                          output_amax=one)
    assert not result.stream.any() and not result.codes.any()
    result = quant_conv2d(encode(x, one, bits), conv, one, num_bits=bits, output_amax=zero,
                          output_num_bits=bits)
    assert not result.codes.any()


@pytest.mark.parametrize("out_bits", [8, 16])
def test_what_is_not_finite_stays_in_its_pixel_and_has_code_0(out_bits):
    x, conv = torch.randn(1, 4, 3, 3), pack_conv(torch.randn(4, 4, 1, 1))
    residual = torch.zeros(1, 4, 3, 3)
    residual[0, 1, 2, 0] = math.nan
    residual[0, 2, 1, 1] = math.inf
    one = torch.ones(())
    result = quant_conv2d(encode(x, one), conv, one, residual=residual, stream=torch.float32,
                          affine=(torch.ones(4), torch.zeros(4)), relu=True, output_amax=one,
                          output_num_bits=out_bits)
    assert torch.equal(result.stream.isfinite(), residual.isfinite())
    codes = join_codes(result.codes) if out_bits == 16 else result.codes
    assert codes[0, 1, 2, 0] == 0


@pytest.mark.parametrize("amax", [math.nan, math.inf, -math.inf])
def test_a_range_that_is_no_range_gives_nan(amax):
    x, conv = torch.randn(2, 4, 3, 3), pack_conv(torch.randn(4, 4, 1, 1))
    ranges = torch.tensor([1.0, amax])
    stream = quant_conv2d(encode(x, torch.ones(())), conv, ranges, stream=torch.float32).stream
    assert stream.isnan().flatten(1).all(1).tolist() == [False, True]
    assert not stream[0].isnan().any()


def test_a_negative_range_is_zero():
    conv = pack_conv(torch.randn(4, 4, 3, 3), bias := torch.randn(4))
    one = torch.ones(())
    codes = encode(torch.randn(1, 4, 3, 3), one)
    result = quant_conv2d(codes, conv, -one, stream=torch.float32, output_amax=-one)
    assert torch.equal(result.stream.flatten(), bias) and not result.codes.any()


@pytest.mark.parametrize("packed", [8, (8, 16)])
def test_a_16_bit_width_with_one_byte_plane_is_no_silent_number(packed, backend):
    conv, one = pack_conv(torch.randn(4, 4, 3, 3), num_bits=packed), torch.ones(())
    codes = encode(torch.randn(2, 4, 5, 5), one)

    def run():
        return quant_conv2d(codes, conv, one, num_bits=torch.tensor([8, 16]), stream=torch.float32)

    if backend == "triton":
        assert run().stream.isnan().flatten(1).all(1).tolist() == [False, True]
    for name in ("reference", "auto"):  # on a CPU oneDNN, where its sums are exact
        with use_backend(name), pytest.raises(ValueError, match="16 bits need two byte planes"):
            run()


def test_ranges_per_sample_follow_their_samples():
    x, conv = torch.randn(3, 4, 3, 3), pack_conv(torch.randn(4, 4, 3, 3), padding=1)
    ranges, outputs = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([3.0, 2.0])
    slots = torch.tensor([2, 0])
    codes = encode(x, ranges, torch.full((3,), 8))[0]
    result = quant_conv2d(codes, conv, ranges, stream=torch.float32, slots=slots,
                          output_amax=outputs)
    for m, n in enumerate((2, 0)):
        alone = quant_conv2d(codes[n : n + 1], conv, ranges[n], stream=torch.float32,
                             output_amax=outputs[m])
        assert torch.equal(result.stream[m], alone.stream[0])
        assert torch.equal(result.codes[m], alone.codes[0])


@pytest.mark.parametrize("form", ["contiguous", "half of a concatenation", "int16", "sliced rows"])
def test_every_layout_of_the_codes(form):
    conv, one = pack_conv(torch.randn(4, 4, 3, 3), padding=1), torch.ones(())
    codes = encode(torch.randn(2, 4, 5, 6), one)
    wanted = quant_conv2d(codes, conv, one, stream=torch.float32).stream
    if form == "contiguous":
        codes = codes.contiguous()
    elif form == "int16":
        codes = codes.to(torch.int16)
    elif form == "sliced rows":
        codes = torch.cat([codes, codes], 2)[:, :, :5]
    else:
        both = torch.cat([codes.flip(0), codes], 1).contiguous(memory_format=torch.channels_last)
        codes = both[:, 4:]
    assert torch.equal(quant_conv2d(codes, conv, one, stream=torch.float32).stream, wanted)


def test_a_sample_does_not_depend_on_its_neighbours():
    problem = Problem(CASES["one width per sample"])
    together = problem.run()
    for n in range(3):
        alone = replace(problem.case, bits=(problem.case.bits[n],), batch=1,
                        out_bits=(problem.case.out_bits[n],))
        problem_n = Problem.__new__(Problem)
        problem_n.__dict__.update(problem.__dict__, case=alone, codes=problem.codes[n : n + 1])
        result = problem_n.run()
        assert torch.equal(result.stream[0], together.stream[n])
        assert torch.equal(join_codes(result.codes)[0], join_codes(together.codes)[n])


@given(st.integers(-32639, 32639))
def test_bytes_and_codes(code):
    planes = split_codes(torch.full((1, 1, 1, 1), code))
    low, high = planes.flatten().tolist()
    assert low + 256 * high == code and -128 <= low <= 127 and abs(high) <= 127
    assert join_codes(planes).item() == code
    assert abs(code) > 127 or high == 0


@given(
    channels=st.tuples(st.sampled_from([1, 3, 4, 16]), st.sampled_from([1, 4, 17])),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    geometry=st.sampled_from([(1, 1, 0), (3, 1, 1), (3, 2, 1), (1, 2, 0), (3, 1, 2)]),
    bits=st.tuples(st.sampled_from([2, 8, 16]), st.sampled_from([5, 9, 16])),
    relu=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_and_width(channels, size, geometry, bits, relu, seed, narrow):
    torch.manual_seed(seed)
    np.random.seed(seed)
    kernel, stride, padding = geometry
    case = Case(channels, size, kernel, stride, padding, bits=bits, out_bits=bits[::-1], relu=relu)
    problem = Problem(case)
    problem.check(problem.run(), narrow)


@pytest.mark.parametrize(
    ("geometry", "channels"),
    [
        pytest.param({"padding": 2, "kernel": 5}, (4, 4), id="5x5"),
        pytest.param({"dilation": 2, "padding": 2}, (4, 4), id="dilation"),
        pytest.param({"groups": 4, "padding": 1}, (4, 8), id="depthwise"),
        pytest.param({"kernel": 3, "stride": 2, "transposed": True}, (4, 4), id="transposed 3x3"),
    ],
)
def test_other_convolutions_take_the_reference_and_say_so_once(geometry, channels, backend):
    from meddanet.kernels import conv_int

    geometry = dict(geometry)
    kernel, transposed = geometry.pop("kernel", 3), geometry.get("transposed", False)
    c_in, c_out = channels
    shape = (c_in, c_out) if transposed else (c_out, c_in // geometry.get("groups", 1))
    weight, x = torch.randn(*shape, kernel, kernel), torch.randn(1, c_in, 6, 7)
    one = torch.ones(())
    conv = pack_conv(weight, **geometry)
    conv_int._say_once.cache_clear()
    run = lambda: quant_conv2d(encode(x, one), conv, one, stream=torch.float32)  # noqa: E731
    if backend == "triton":
        with pytest.warns(UserWarning, match="no kernel for .*reference") as said:
            run(), run()
        assert [warning.category for warning in said].count(UserWarning) == 1
    geometry.pop("transposed", None)
    function = torch.nn.functional.conv_transpose2d if transposed else torch.nn.functional.conv2d
    exact = function(
        fake_quantize(x, 8, one).double(), fake_quantize(weight, 8).double(), **geometry
    )
    torch.testing.assert_close(run().stream, exact.float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(1, 4, 3, 3)}, "input must be codes: int8 or int16"),
        ({"input": torch.zeros(3, 1, 4, 3, 3, dtype=torch.int8)}, "input must be codes"),
        ({"input": torch.zeros(1, 5, 3, 3, dtype=torch.int8)}, "5 channels, weights take 4"),
        ({"num_bits": 16}, "two byte planes"),
        ({"num_bits": 17}, "num_bits must be an int from 2 to 16"),
        ({"num_bits": torch.tensor([8, 8])}, r"shape \[1\]"),
        ({"stream": None}, "neither output"),
        ({"stream": torch.float64}, "stream must be float32"),
        ({"residual": torch.zeros(1, 4, 3, 3)}, "residual must be"),
        ({"residual": torch.zeros(1, 4, 1, 1, dtype=torch.float64)}, "residual must be"),
        ({"affine": (torch.ones(3), torch.ones(4))}, "affine must be"),
        ({"amax": torch.ones(2)}, "amax must hold one value or one per sample, 1"),
        ({"output_amax": torch.ones(2)}, "output_amax must hold"),
        ({"output_num_bits": 1}, "output_num_bits must be"),
        ({"count": torch.ones(1, dtype=torch.bool)}, "slots and count must be whole numbers"),
        ({"input": torch.zeros(1, 4, 2, 2, dtype=torch.int8)}, "smaller than the kernel"),
    ],
)
def test_bad_arguments(change, message):
    conv = pack_conv(torch.ones(4, 4, 3, 3), num_bits=(8, 16))
    arguments = {"input": torch.zeros(1, 4, 3, 3, dtype=torch.int8), "amax": torch.ones(()),
                 "stream": torch.float32, **change}
    for function in (quant_conv2d, quant_conv2d_reference):
        with pytest.raises(ValueError, match=message):
            function(arguments["input"], conv, arguments["amax"],
                     **{k: v for k, v in arguments.items() if k not in ("input", "amax")})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": torch.full((1, 1, 1, 1), math.nan)}, "weight must be 4-D and finite"),
        ({"weight": torch.ones(1, 1)}, "weight must be 4-D"),
        ({"num_bits": (8, 17)}, "widths from 2 to 16"),
        ({"num_bits": ()}, "widths from 2 to 16"),
        ({"transposed": True, "groups": 2}, "packed without groups"),
        ({"bias": torch.zeros(2)}, r"bias must have shape \[1\], got \[2\]"),
        ({"norm": (torch.ones(1), torch.ones(2))}, r"norm must have shape \[1\], got \[1\], \[2\]"),
        ({"groups": 2}, "groups must divide the 1 output channels, got 2"),
    ],
)
def test_weights_that_cannot_be_packed(arguments, message):
    with pytest.raises(ValueError, match=message):
        pack_conv(**{"weight": torch.ones(1, 1, 1, 1), **arguments})


def test_weights_of_a_width_that_is_not_packed():
    conv, one = pack_conv(torch.ones(1, 4, 1, 1), num_bits=8), torch.ones(())
    for width in (16, torch.tensor([16])):
        with pytest.raises(ValueError, match=r"codes of 16 bits meet weights packed for \[8\]"):
            quant_conv2d(encode(torch.ones(1, 4, 1, 1), one, 16), conv, one, num_bits=width,
                         stream=torch.float32)
    with pytest.raises(ValueError, match="running statistics"):
        norm_affine(torch.nn.BatchNorm2d(2, track_running_stats=False))


def test_narrow_weights_serve_wider_codes():
    weight, x, one = torch.randn(4, 4, 1, 1), torch.randn(1, 4, 2, 2), torch.ones(())
    stream = quant_conv2d(encode(x, one), pack_conv(weight, num_bits=4), one, stream=torch.float32)
    exact = torch.nn.functional.conv2d(fake_quantize(x, 8, one).double(),
                                       fake_quantize(weight, 4).double())
    torch.testing.assert_close(stream.stream, exact.float())
