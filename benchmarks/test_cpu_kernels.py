"""The kernels on a CPU against what a user would run instead, on the shapes of U-Net-16.

    pytest benchmarks/test_cpu_kernels.py --benchmark-only

As `test_kernels.py` does on a GPU: outputs are compared first, on the very inputs that are then
timed in turns; medians. Results are levels of the machine's file, as those of volumes are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peers
import pytest
import torch
import torch.nn.functional as F
from timing import DEVICE, DRY_RUN, compare
from torch import Tensor
from volumes import write_results

from meddanet import kernels
from meddanet.kernels.backend import onednn_runs

BATCH, ROUNDS = (1, 2) if DRY_RUN else (8, 10)
# channels and side of the four levels
LEVELS = [(16, 16), (32, 8)] if DRY_RUN else [(16, 240), (32, 120), (64, 60), (128, 30)]
SIDE, CROP = (40, 24) if DRY_RUN else (240, 96)

pytestmark = [
    pytest.mark.skipif(DEVICE.type != "cpu", reason="there is a GPU: see test_kernels.py"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture
def keep(benchmark) -> Callable[..., None]:
    """Times providers in turn and keeps the row; ours goes to pytest-benchmark as well."""

    def run(name: str, ours: str, providers: dict[str, Callable], **facts: Any) -> None:
        row = facts | compare(ours, providers, capture=False, rounds=ROUNDS)
        benchmark.extra_info.update(ratios=row["ratios"])
        benchmark.pedantic(providers[ours], rounds=3)
        print(f"{name}: {row['ratios']}")
        if not DRY_RUN:
            write_results(f"kernel {name}", row)

    return run


def random(*shape: int) -> Tensor:
    """Returns normal values, channels last."""
    return torch.randn(*shape).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("channels", "side"), LEVELS)
@torch.inference_mode()
def test_integer_convolution(keep, channels, side):
    """3x3 convolution, norm folded, ReLU, codes: oneDNN int8 against float32 and PyTorch's int8."""
    if not onednn_runs(torch.empty(0)):
        pytest.skip("oneDNN's int8 sums are not exact on this CPU")
    x, bias = random(BATCH, channels, side, side), torch.randn(channels)
    weight = random(channels, channels, 3, 3) / (9 * channels) ** 0.5
    amax, out_amax = x.abs().amax(), torch.tensor(4.0)
    conv, codes = kernels.pack_conv(weight, bias, padding=1), kernels.encode(x, amax)
    options = {"relu": True, "output_amax": out_amax}
    step, out_step = float(amax) / 127, float(out_amax) / 127
    providers = {
        "quant_conv2d, oneDNN": lambda: kernels.quant_conv2d(codes, conv, amax, **options).codes,
        "F.conv2d + ReLU, float32": lambda: F.conv2d(x, weight, bias, padding=1).relu(),
        "quantized::conv2d_relu": peers.quantized_conv(codes, step, weight, bias, out_step, 1, 1),
    }
    expected = kernels.quant_conv2d_reference(codes, conv, amax, **options).codes.long()
    steps = (providers["quant_conv2d, oneDNN"]().long() - expected).abs()
    assert steps.amax() <= 1 and steps.count_nonzero() <= 1e-3 * steps.numel()
    others = {name: run for name, run in providers.items() if "oneDNN" not in name}
    # what saturates in our codes does not in float
    inside = {name: lambda run=run: _plain(run()).clamp(max=4.0) for name, run in others.items()}
    keep(
        f"convolution 3x3, C={channels}, {side}x{side}, 8 bit", "quant_conv2d, oneDNN", providers,
        shape=list(x.shape), deviation=peers.agreeing(expected * out_step, inside, bound=0.1),
    )


def _plain(output: Tensor) -> Tensor:
    return output.dequantize() if output.is_quantized else output


@pytest.mark.parametrize("side", [SIDE, CROP], ids=["whole", "crop"])
@torch.inference_mode()
def test_head(keep, side):
    """The last 1x1 convolution, argmax, bytes and their place in a slice, in one call or four."""
    x, bias = random(BATCH, 16, side, side), torch.randn(4)
    weight, amax, corner = torch.randn(4, 16, 1, 1), torch.tensor(3.0), (SIDE - side) // 2
    conv, codes = kernels.pack_conv(weight, bias), kernels.encode(x, amax)
    values, quantised = kernels.fake_quantize(x, 8, amax), kernels.fake_quantize(weight, 8)
    options = {"offset": torch.full((BATCH, 2), corner), "size": SIDE, "amax": amax}
    providers = {
        "label_head": lambda: kernels.label_head(codes, conv, **options),
        "conv2d, argmax, uint8, paste": lambda: peers.placed(
            peers.eager_head(values, quantised, bias), corner, SIDE
        ),
    }
    expected = kernels.label_head_reference(codes, conv, **options)
    differing = {
        name: (run() != expected).float().mean().item() for name, run in providers.items()
    }
    assert max(differing.values()) < 1e-3, differing
    keep(f"head, {side}x{side}", "label_head", providers, shape=list(x.shape),
         differing_labels=differing)


@pytest.mark.parametrize("operation", ["crop", "paste"])
@torch.inference_mode()
def test_crop_and_paste(keep, operation):
    """The image's crop (4 channels) and the features' paste (16) at fractions of a pixel."""
    crop = operation == "crop"
    x = random(BATCH, *((4, SIDE, SIDE) if crop else (16, CROP, CROP)))
    # inside, where all agree
    offset, size = torch.rand(BATCH, 2) * (SIDE - CROP - 2) + 1, CROP if crop else SIDE
    op = kernels.bilinear_crop if crop else kernels.affine_paste
    peer = peers.grid_crop if crop else peers.grid_paste
    providers = {
        op.__name__: lambda: op(x, offset, size),
        "affine_grid + grid_sample": lambda: peer(x, offset, size),
    }
    expected = getattr(kernels, f"{op.__name__}_reference")(x.double(), offset.double(), size)
    keep(f"{operation}, N={BATCH}", op.__name__, providers, shape=list(x.shape),
         deviation=peers.agreeing(expected, providers, bound=1e-3))
