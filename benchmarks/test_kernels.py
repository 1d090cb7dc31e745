"""The kernels against what a user would run instead, on the shapes of U-Net-16 and its slices.

    benchmarks/gpu.sh kernels            # on a machine with a GPU
    MEDDANET_DRY_RUN=1 pytest benchmarks/test_kernels.py    # proves the harness, on a CPU

Every case compares its outputs with the reference first, on the very inputs it then times; peers,
whose rounding is their own, have their deviation from ours in the table. The file of results
(MEDDANET_RESULTS, default benchmarks/results/gpu.json) is whole after every case; cases that
lose stay in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peers
import pytest
import torch
import torch.nn.functional as F
from timing import DEVICE, DRY_RUN
from torch import Tensor, nn

from meddanet import kernels

LAST = torch.channels_last
BATCH = 1 if DRY_RUN else 16
# channels and side of the four levels of U-Net-16
LEVELS = [(16, 16), (32, 8)] if DRY_RUN else [(16, 240), (32, 120), (64, 60), (128, 30)]
SIDE, CROP = (40, 24) if DRY_RUN else (240, 96)

pytestmark = [
    pytest.mark.skipif(
        DEVICE.type == "cpu" and not DRY_RUN, reason="no GPU; MEDDANET_DRY_RUN=1 runs it small"
    ),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns normal values, channels last where there are channels."""
    x = torch.randn(*shape, device=DEVICE, dtype=dtype)
    return x.contiguous(memory_format=LAST) if x.dim() == 4 else x


def compiled(function: Callable) -> Callable:
    """Wraps torch.compile; the dry run, which proves the harness, leaves it out."""
    return function if DRY_RUN else torch.compile(function, dynamic=False)


@pytest.fixture(autouse=True)
def compiled_anew() -> None:
    """Lets no case's peers be compiled for shapes of any size because another's had another."""
    if not DRY_RUN:
        torch.compiler.reset()


# integer convolution of inference ------------------------------------------------------------


@pytest.mark.parametrize("num_bits", [8, 16])
@pytest.mark.parametrize(("channels", "side"), LEVELS)
@torch.inference_mode()
def test_integer_convolution(measure, channels, side, num_bits):
    """3x3 convolution + norm + ReLU + requantisation, the first half of a pre-activation block."""
    x = random(BATCH, channels, side, side)
    weight = random(channels, channels, 3, 3) / (9 * channels) ** 0.5
    norm = nn.BatchNorm2d(channels).to(DEVICE).eval()
    norm.running_mean.normal_(0, 0.1), norm.running_var.uniform_(0.5, 2)
    amax, out_amax = x.abs().amax(), torch.tensor(4.0, device=DEVICE)
    conv = kernels.pack_conv(
        weight, padding=1, num_bits=num_bits, norm=kernels.norm_affine(norm)
    )
    codes = kernels.encode(x, amax, num_bits)
    options = {
        "num_bits": num_bits, "relu": True, "output_amax": out_amax, "output_num_bits": num_bits,
    }

    def ours():
        return kernels.quant_conv2d(codes, conv, amax, **options).codes

    def whole(planes: Tensor) -> Tensor:
        return (kernels.join_codes(planes) if planes.dim() == 5 else planes).long()

    expected = whole(kernels.quant_conv2d_reference(codes, conv, amax, **options).codes)
    steps = (whole(ours()) - expected).abs()
    assert steps.amax() <= 1 and steps.count_nonzero() <= 1e-3 * steps.numel()

    largest = 127 if num_bits == 8 else 32639
    out_step = out_amax / largest
    scale, shift = (t.float().reshape(-1, 1, 1, 1) for t in kernels.norm_affine(norm))
    x16, folded = x.half(), (weight * scale).half().contiguous(memory_format=LAST)
    weight16, norm16, bias = weight.half(), _half(norm), shift.flatten()
    on_grid = peers.formula_fake_quantize(weight, weight.abs().amax())
    block = compiled(peers.fake_quant_block)
    providers = {
        "quant_conv2d": ours,
        "fake-quant + cuDNN fp32": lambda: peers.fake_quant_block(x, on_grid, norm, amax, 1, 1),
        "fake-quant + cuDNN fp32, compiled": lambda: block(x, on_grid, norm, amax, 1, 1),
        "fp32, eager": lambda: peers.conv_norm_relu(x, weight, norm, 1, 1),
        "fp16, eager": lambda: peers.conv_norm_relu(x16, weight16, norm16, 1, 1),
        "fp16, folded, compiled": lambda: block16(x16, folded, bias.half()),
    }
    block16 = compiled(lambda x, w, b: F.conv2d(x, w, b, padding=1).relu())
    if DEVICE.type == "cuda":
        providers["fp16, cuDNN fused"] = peers.cudnn_fused(x16, folded, bias.half(), 1, 1)
    if num_bits == 8:
        providers["quantized::conv2d_relu"] = _deferred(
            lambda: peers.quantized_conv(
                codes, float(amax) / 127, weight * scale, bias, float(out_step), 1, 1
            )
        )
    outputs = {name: run for name, run in providers.items() if name != "quant_conv2d"}
    deviations = peers.agreeing(expected.float() * out_step, outputs, bound=0.1)
    item = num_bits // 8
    measure(
        f"integer convolution 3x3, C={channels}, {side}x{side}, {num_bits} bit",
        "quant_conv2d", providers, shape=list(x.shape), deviation=deviations,
        timing={}, bytes=2 * item * x.numel() + conv.codes.numel(),
        operations=2 * 9 * channels * x.numel(),
    )


def _half(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    copy = nn.BatchNorm2d(norm.num_features).to(DEVICE)
    copy.load_state_dict(norm.state_dict())
    return copy.half().eval()


def _deferred(make: Callable[[], Callable]) -> Callable:
    """Prepares a peer at its first call, so that one that cannot run fails in its own row."""
    ready: list[Callable] = []

    def run():
        if not ready:
            ready.append(make())
        return ready[0]()

    return run


@pytest.mark.parametrize("side", [SIDE, CROP], ids=["whole", "crop"])
@torch.inference_mode()
def test_head(measure, side):
    """The last 1x1 convolution and argmax of codes, into byte labels of a whole slice."""
    x, bias = random(BATCH, 16, side, side), random(4)
    weight, amax = random(4, 16, 1, 1), torch.tensor(3.0, device=DEVICE)
    conv, codes = kernels.pack_conv(weight, bias), kernels.encode(x, amax)
    # int32, as a plan has it: others are converted first
    corner = torch.full((BATCH, 2), (SIDE - side) // 2, dtype=torch.int32, device=DEVICE)
    options = {"offset": corner, "size": SIDE, "amax": amax}
    values, quantised = kernels.fake_quantize(x, 8, amax), kernels.fake_quantize(weight, 8)
    expected = kernels.label_head_reference(codes, conv, **options)

    def ours() -> Tensor:
        return kernels.label_head(codes, conv, **options)

    assert torch.equal(ours(), expected)
    fused = compiled(peers.eager_head)
    providers = {"label_head": ours}
    for name, head in (("eager", peers.eager_head), ("compiled", fused)):
        for dtype in (torch.float32, torch.float16):
            inputs = [t.to(dtype) for t in (values, quantised, bias)]
            kind = f"1x1, argmax, uint8, paste: {name} {str(dtype).removeprefix('torch.')}"
            providers[kind] = lambda head=head, inputs=inputs: peers.placed(
                head(*inputs), (SIDE - side) // 2, SIDE
            )
    deviations = {
        name: round((run() != expected).float().mean().item(), 6) for name, run in providers.items()
    }
    # half precision may turn a near tie between two classes
    assert max(deviations.values()) < 0.01
    measure(
        f"head, 16 channels to labels, {side}x{side}", "label_head", providers, timing={},
        shape=list(x.shape), differing_labels=deviations, bytes=17 * BATCH * side**2,
    )


# training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "step"])
@pytest.mark.parametrize(("channels", "side"), LEVELS[:2])
def test_fake_quantised_convolution(measure, channels, side, backward):
    """A training step of one convolution with 8-bit weights and inputs of a fixed range."""
    batch = 1 if DRY_RUN else 8
    x = random(batch, channels, side, side).requires_grad_()
    weight = (random(channels, channels, 3, 3) / (9 * channels) ** 0.5).requires_grad_()
    amax, grad = x.detach().abs().amax(), random(batch, channels, side, side)

    def ours():
        return kernels.fake_quant_conv2d(
            x, weight, None, 1, 1, num_bits=8, input_num_bits=8, input_amax=amax
        )

    def eager(quantize: Callable = peers.eager_fake_quantize):
        return F.conv2d(quantize(x, amax), quantize(weight, weight.detach().abs().amax()),
                        padding=1)

    def eager16():
        half = torch.float16 if DEVICE.type == "cuda" else torch.bfloat16
        with torch.autocast(DEVICE.type, half):
            return eager()

    written = compiled(lambda: eager(peers.formula_fake_quantize))
    forward = {
        "fake_quant_conv2d": ours, "fake_quantize operator + cuDNN fp32": eager,
        "fake_quantize operator + cuDNN, autocast": eager16,
        "written out, compiled": written,
    }
    expected = kernels.fake_quant_conv2d_reference(
        x.double(), weight.double(), None, 1, 1, num_bits=8, input_num_bits=8,
        input_amax=amax.double(),
    )
    assert peers.deviation(ours(), expected) < 1e-3
    outputs = {name: run for name, run in forward.items() if name != "fake_quant_conv2d"}
    with torch.no_grad():
        deviations = peers.agreeing(expected, outputs, bound=0.02)

    def step(run: Callable[[], Tensor]) -> Callable[[], None]:
        return lambda: torch.autograd.grad(run(), (x, weight), grad)

    providers = {name: step(run) for name, run in forward.items()} if backward else forward
    name = f"training convolution 3x3, C={channels}, {side}x{side}"
    measure(
        f"{name}, {'step' if backward else 'forward'}", "fake_quant_conv2d", providers,
        shape=list(x.shape), deviation=deviations, timing={"capture": not backward},
    )


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "step"])
def test_fake_quantize(measure, backward):
    """Fake-quantisation of one full-size feature, range fixed."""
    x = random(BATCH, *(LEVELS[0][0], LEVELS[0][1], LEVELS[0][1])).requires_grad_()
    amax, grad = torch.tensor(2.0, device=DEVICE), random(*x.shape)
    written = compiled(peers.formula_fake_quantize)
    forward = {
        "fake_quantize": lambda: kernels.fake_quantize(x, 8, amax),
        "PyTorch's operator": lambda: peers.eager_fake_quantize(x, amax),
        "written out, eager": lambda: peers.formula_fake_quantize(x, amax),
        "written out, compiled": lambda: written(x, amax),
    }
    expected = kernels.fake_quantize_reference(x.detach(), 8, amax)
    torch.testing.assert_close(forward["fake_quantize"]().detach(), expected, rtol=0, atol=0)
    deviations = peers.agreeing(expected, dict(list(forward.items())[1:]), bound=1e-2)

    def step(run: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(run(), x, grad)

    providers = {name: step(run) for name, run in forward.items()} if backward else forward
    measure(
        f"fake_quantize, {'step' if backward else 'forward'}", "fake_quantize", providers,
        shape=list(x.shape), deviation=deviations, timing={"capture": not backward},
        bytes=(16 if backward else 8) * x.numel(),
    )


# crop and paste ------------------------------------------------------------------------------


def _offsets(batch: int) -> Tensor:
    """Fractional offsets that keep the crop inside, where all peers agree."""
    return torch.rand(batch, 2, device=DEVICE) * (SIDE - CROP - 2) + 1


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "step"])
@pytest.mark.parametrize("batch", [1, 2] if DRY_RUN else [1, 16, 155])
@pytest.mark.parametrize("operation", ["crop", "paste"])
def test_crop_and_paste(measure, operation, batch, backward):
    """The image's crop (4 channels), the features' paste (16): forward, or with both gradients."""
    crop = operation == "crop"
    x = random(batch, *((4, SIDE, SIDE) if crop else (16, CROP, CROP))).requires_grad_()
    offset, size = _offsets(batch).requires_grad_(), CROP if crop else SIDE
    op = kernels.bilinear_crop if crop else kernels.affine_paste
    peer = peers.grid_crop if crop else peers.grid_paste
    fused = compiled(peer)
    forward = {
        op.__name__: lambda: op(x, offset, size),
        "affine_grid + grid_sample": lambda: peer(x, offset, size),
        "affine_grid + grid_sample, compiled": lambda: fused(x, offset, size),
    }
    if crop:
        # it would convert channels last at every call
        plain = x.detach().contiguous().requires_grad_()
        forward["roi_align"] = lambda: peers.roi_align_crop(plain, offset, size)
    reference = getattr(kernels, f"{op.__name__}_reference")
    expected = reference(x.detach().double(), offset.detach().double(), size)
    torch.testing.assert_close(forward[op.__name__]().detach().double(), expected,
                               rtol=1e-4, atol=1e-4)
    deviations = peers.agreeing(expected, dict(list(forward.items())[1:]), bound=1e-3)
    grad = random(*expected.shape)

    def step(run: Callable[[], Tensor], wanted: tuple[Tensor, ...]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(run(), wanted, grad)

    if backward:
        # roi_align has no gradient by the boxes
        providers = {name: step(run, (x, offset)) for name, run in forward.items()}
        if crop:
            providers["roi_align"] = step(forward["roi_align"], (plain,))
    else:
        providers = forward
    measure(
        f"{operation}, N={batch}, {'step' if backward else 'forward'}", op.__name__, providers,
        shape=list(x.shape), deviation=deviations, timing={"capture": not backward},
        bytes=None if backward else 4 * x.shape[1] * batch * (CROP**2 + size**2),
    )
