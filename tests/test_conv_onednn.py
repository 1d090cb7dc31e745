"""quant_conv2d on oneDNN: sums are the reference's, codes differ at rounding ties alone."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from meddanet.kernels import (
    conv_int_onednn,
    conv_reference,
    encode,
    onednn,
    pack_conv,
    quant_conv2d,
    quant_conv2d_reference,
    use_backend,
)
from meddanet.kernels.backend import onednn_runs
from meddanet.kernels.conv_call import checked_call

ONE = torch.ones(())

exact_cpu = pytest.mark.skipif(not onednn.is_exact(), reason="this CPU's int8 sums are not exact")

CONVS = {
    "3x3": ((16, 8, 3, 3), {"padding": 1}),
    "3x3, stride 2": ((5, 3, 3, 3), {"stride": 2, "padding": 1}),
    "1x1": ((7, 64, 1, 1), {}),
    "5x5 dilated": ((4, 4, 5, 5), {"dilation": 2, "padding": 4}),
    "depthwise": ((8, 1, 3, 3), {"padding": 1, "groups": 8}),
    "transposed": ((8, 4, 2, 2), {"stride": 2, "transposed": True}),
    "long sums": ((4, 512, 3, 3), {"padding": 1}),
}


def packed(name, num_bits=8):
    shape, geometry = CONVS[name]
    transposed = geometry.get("transposed", False)
    channels = shape[0] if transposed else shape[1] * geometry.get("groups", 1)
    bias = torch.randn(shape[1 if transposed else 0])
    return pack_conv(torch.randn(shape), bias, num_bits=num_bits, **geometry), torch.randn(
        3, channels, 9, 10
    )


@exact_cpu
@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("relu", [False, True])
def test_codes_made_by_onednn_differ_at_ties_alone(name, relu, tolerances):
    conv, x = packed(name)
    codes, amax = encode(x, ONE * 3), ONE * 3
    exact = quant_conv2d_reference(codes, conv, amax, stream=torch.float32).stream.double()
    outputs = exact.abs().amax() * 0.7
    with use_backend("onednn"):
        actual = quant_conv2d(codes, conv, amax, relu=relu, output_amax=outputs.float()).codes
    wanted = quant_conv2d_reference(codes, conv, amax, relu=relu, output_amax=outputs.float()).codes
    assert actual.stride() == wanted.stride()
    assert actual.min() >= -127 and wanted.abs().max() == 127
    step = (outputs.float() / 127).double()
    tolerances.codes(actual, wanted, quotient=(exact.clamp(min=0) if relu else exact) / step)


@exact_cpu
@pytest.mark.parametrize("name", CONVS)
def test_everything_else_is_the_reference_bit_for_bit(name):
    conv, x = packed(name, num_bits=(8, 16))
    widths, outputs = torch.tensor([8, 16, 8]), torch.tensor([16, 8, 8])
    codes = encode(x, ONE * 3, widths)
    shape = quant_conv2d_reference(codes, conv, ONE, num_bits=widths, stream=torch.float32).stream
    channels = shape.shape[1]
    epilogue = {
        "residual": torch.randn_like(shape), "stream": torch.float16, "relu": True,
        "affine": (torch.rand(channels), torch.randn(channels)), "output_amax": ONE * 9,
    }
    mixed = {"num_bits": widths, "output_num_bits": outputs, "slots": torch.tensor([1, 2, 0]),
             "count": torch.tensor([2])}
    for arguments in (
        (codes[0], {"stream": torch.float32}),
        (codes[0], {**epilogue, "amax": torch.tensor([1.0, 2.0, 3.0])}),
        (codes, {**epilogue, **mixed}),
    ):
        input, options = arguments
        amax = options.pop("amax", ONE * 3)
        with use_backend("onednn"):
            actual = quant_conv2d(input, conv, amax, **options)
        wanted = quant_conv2d_reference(input, conv, amax, **options)
        for one, other in zip(actual, wanted, strict=True):
            assert one is other is None or torch.equal(one, other)


@exact_cpu
def test_skip_codes_are_the_reference_bit_for_bit():
    """And so are the codes beside them, which alone oneDNN would make itself."""
    conv, x = packed("3x3")
    call = checked_call(
        encode(x, ONE * 3), conv, ONE * 3, num_bits=8, residual=None, stream=None, affine=None,
        relu=True, output_amax=ONE * 9, output_num_bits=8, slots=None, count=None,
    )
    call = replace(call, skip_amax=torch.tensor([5.0]))
    found = []
    for run in (conv_int_onednn.run, conv_reference.run):
        codes, skip = call.new_codes(), call.new_codes()[0]
        run(call, None, codes, skip)
        found.append((codes, skip))
    assert all(map(torch.equal, *found))
    assert found[0][1].min() < 0 < found[0][0].max()


@exact_cpu
def test_weights_are_prepacked_once_and_forgotten_with_their_convolution():
    conv, x = packed("3x3")
    conv_int_onednn._prepacked.clear()
    with use_backend("onednn"):
        for _ in range(2):
            quant_conv2d(encode(x, ONE), conv, ONE, stream=torch.float32)
        assert [len(kept) for kept in conv_int_onednn._prepacked.values()] == [1]
        for side in range(1, conv_int_onednn.KEPT + 3):  # as many sizes of images
            tall = encode(x[..., :1, :].repeat(1, 1, side, 1), ONE)
            quant_conv2d(tall, conv, ONE, stream=torch.float32)
        (kept,) = conv_int_onednn._prepacked.values()
        assert len(kept) == conv_int_onednn.KEPT
        conv.codes.neg_()
        changed = quant_conv2d(encode(x, ONE), conv, ONE, stream=torch.float32).stream
    wanted = quant_conv2d_reference(encode(x, ONE), conv, ONE, stream=torch.float32).stream
    assert torch.equal(changed, wanted)
    del conv
    assert len(conv_int_onednn._prepacked) == 0


def test_threads_that_keep_layouts_do_not_disturb_each_other(monkeypatch):
    """Every layout drives another out, and threads change at every chance."""
    monkeypatch.setattr(conv_int_onednn, "KEPT", 4)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    kept = {}

    def work(thread):
        for number in range(20_000):
            conv_int_onednn._keep(kept, (thread, number), ONE)

    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert len(kept) == 4


@contextmanager
def defaults(device: str, dtype: torch.dtype):
    """PyTorch's defaults, for as long as it lasts."""
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def test_defaults_of_pytorch_change_nothing():
    """The probe took its own failure on another device or dtype for sums that are not exact."""
    if not hasattr(torch.ops.onednn, "qconv2d_pointwise"):
        pytest.skip("this PyTorch has no oneDNN")
    weight = torch.randint(-3, 4, (5, 4, 3, 3), dtype=torch.int8)
    codes = torch.randint(-3, 4, (2, 4, 9, 8))
    geometry = [1, 1], [0, 0], [1, 1], 1
    exact = onednn.is_exact()
    onednn.is_exact.cache_clear()
    with defaults("meta", torch.float64):
        packed = onednn.prepack(weight, *geometry, shape=codes.shape)
        sums = onednn.convolve((codes + onednn.ZERO_POINT).to(torch.uint8), packed, *geometry)
        assert onednn.is_exact() == exact
    # sums so small saturate nowhere
    assert torch.equal(sums.long(), F.conv2d(codes, weight.long()))


def test_sums_that_saturate_are_found_out(monkeypatch):
    honest = onednn.convolve
    for spoil in (
        lambda total: total.clamp(max=32767.0),
        lambda total: total + (total == total.max()),
    ):
        monkeypatch.setattr(onednn, "convolve", lambda *a, f=spoil, **k: f(honest(*a, **k)))
        onednn.is_exact.cache_clear()
        assert not onednn.is_exact()
    monkeypatch.undo()
    onednn.is_exact.cache_clear()


def test_without_vnni_the_reference_runs():
    # oneDNN's own switch takes the instructions away
    code = (
        "import torch; from meddanet.kernels import use_backend; x = torch.ones(1)\n"
        "from meddanet.kernels.backend import onednn_runs; print(onednn_runs(x))\n"
        "use_backend('onednn'); onednn_runs(x)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                         env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"})
    assert run.stdout.strip() == "False"
    assert "ValueError: backend 'onednn' needs a CPU with exact int8 sums" in run.stderr


@pytest.mark.parametrize(
    ("name", "exact", "runs"),
    [("auto", True, True), ("auto", False, False), ("onednn", True, True),
     ("reference", True, False), ("triton", True, False)],
)
def test_who_runs(monkeypatch, name, exact, runs):
    monkeypatch.setattr(onednn, "is_exact", lambda: exact)
    with use_backend(name):
        assert onednn_runs(ONE) == runs
        assert not onednn_runs(torch.empty(1, device="meta"))
