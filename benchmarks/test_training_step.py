"""One training step of Med-DANet V2 on the CPU against the straightforward way to write it.

    pytest benchmarks/test_training_step.py --benchmark-only

The straightforward way is that of the published code, at the same arithmetic: a Python loop over
the samples in every convolution whose width is chosen, quantisation out of plain operations
differentiated by autograd, crop and paste by `F.affine_grid` and `F.grid_sample`, PyTorch's default
layout. Both ways take the whole step (forward with both branches, loss, backward, Adam) on the same
batch, in turns, so that the ratio is of interleaved runs.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch
import torch.nn.functional as F

from meddanet import layers, med_danet_v2
from meddanet.build import build_med_danet_v2
from meddanet.layers import set_quantization
from meddanet.objectives import joint
from meddanet.recipe import PhaseConfig

ROUNDS, BATCH, SIDE = 3, 8, 128
PHASE = PhaseConfig("joint", 1, batch=BATCH, cost_weight=0.06, oracle_weight=0)


class OneBatch:
    """The same windows again and again: a bright disc in noise."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
        disc = ((rows - 60) ** 2 + (columns - 70) ** 2 < 20**2).long()
        self.labels = disc.repeat(BATCH, 1, 1)
        noise = torch.randn(BATCH, 4, SIDE, SIDE, generator=generator)
        self.images = noise + 3 * self.labels[:, None]

    def window_batch(self, size: int, at_least: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the batch."""
        return self.images, self.labels


def plain_quantize(x, num_bits, amax):
    """Eq. 6 as the published code has it: round(x q / a) a / q, straight through the rounding."""
    q = 2 ** (num_bits - 1) - 1
    scaled = x * q / amax
    return (scaled + (scaled.round() - scaled).detach()) * amax / q


def plain_quantize_input(input, num_bits=8, amax=None):
    """One width per sample or for all, each sample's own range where none is given."""
    if isinstance(num_bits, torch.Tensor):
        num_bits = num_bits.reshape(-1, *[1] * (input.dim() - 1))
    if amax is None:
        # nothing lies outside, so nothing is clamped
        amax = input.detach().abs().flatten(1).amax(1).reshape(-1, *[1] * (input.dim() - 1))
    return plain_quantize(input, num_bits, amax.clamp_min(1e-8))


def plain_conv2d(
    input, weight, bias, stride, padding, dilation, groups, *, num_bits, input_num_bits,
    input_amax, per_channel=False,
):  # fmt: skip
    """A quantised convolution, sample by sample where the weights' widths are per sample."""
    input = plain_quantize_input(input, input_num_bits, input_amax)
    amax = weight.detach().abs().amax() + 1e-8
    geometry = (stride, padding, dilation, groups)
    if isinstance(num_bits, int):
        return F.conv2d(input, plain_quantize(weight, num_bits, amax), bias, *geometry)
    outputs = []
    for n in range(len(input)):
        quantised = plain_quantize(weight, num_bits[n], amax)
        outputs.append(F.conv2d(input[n : n + 1], quantised, bias, *geometry))
    return torch.cat(outputs)


def _grid(batch, scale, shift, shape):
    """The sampling grid of output pixels at `scale` of the input's side, moved by `shift`."""
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    move = torch.stack([shift[:, 1], shift[:, 0]], 1)
    theta = torch.cat([theta[:, :, :2], move[:, :, None]], 2)
    return F.affine_grid(theta, [batch, 1, *shape], align_corners=False)


def plain_crop(input, offset, size):
    """Crop by grid_sample: scale P / H, translation -1 + (2 o + P) / H."""
    height = input.shape[2]
    grid = _grid(len(input), size / height, -1 + (2 * offset + size) / height, (size, size))
    return F.grid_sample(input, grid, align_corners=False)


def plain_paste(patch, offset, size):
    """Paste by grid_sample of a canvas that holds the patch at its top left."""
    height, width = size
    canvas = F.pad(patch, (0, width - patch.shape[3], 0, height - patch.shape[2]))
    return F.grid_sample(
        canvas, _grid(len(patch), 1.0, -2 * offset / height, size), align_corners=False
    )


def straightforward(patch: pytest.MonkeyPatch) -> None:
    """Puts the straightforward parts in place of the package's."""
    patch.setattr(layers, "fake_quantize", plain_quantize_input)
    patch.setattr(layers, "fake_quant_conv2d", plain_conv2d)
    patch.setattr(med_danet_v2, "bilinear_crop", plain_crop)
    patch.setattr(med_danet_v2, "affine_paste", plain_paste)
    patch.setattr(med_danet_v2, "channels_last", lambda input: input.contiguous())


def make_step(layout: torch.memory_format):
    """Returns a function that makes one step and returns loss and the segmenter's gradient norm."""
    torch.manual_seed(0)
    model = build_med_danet_v2("unet-16", crop_sizes=(96,)).to(memory_format=layout).train()
    model.segmenter.dropout.p = 0.0
    # as drawn, every sample would choose 16 bit: a mean that lies between makes both widths run
    with torch.no_grad():
        for selector in model.bit_selectors:
            weight = selector.linear.weight
            weight += 0.02 * torch.randn(weight.shape)
            selector.linear.bias.zero_()
    set_quantization(model, quantize=True, update_range=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, amsgrad=True)
    batches = OneBatch()

    def step() -> tuple[float, float]:
        torch.manual_seed(1)
        loss = joint(model, batches, 0, PHASE)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        gradients = [p.grad for p in model.segmenter.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        optimizer.step()
        return loss.item(), norm.item()

    return step


def test_training_step_against_straightforward(benchmark):
    """Seconds per step of both, and their ratio; the first step's loss and gradient agree."""
    ours, plain = make_step(torch.channels_last), make_step(torch.contiguous_format)
    times = {"ours": [], "straightforward": []}

    def run_plain():
        with pytest.MonkeyPatch.context() as patch:
            straightforward(patch)
            began = time.perf_counter()
            result = plain()
            times["straightforward"].append(time.perf_counter() - began)
        return result

    def run():
        began = time.perf_counter()
        result = ours()
        times["ours"].append(time.perf_counter() - began)
        return result

    # quality first: the same loss and gradient, but for the finer 16-bit grid and rounding; policy
    # and position network amplify these, their random weights turn noise into other codes
    (loss, norm), (plain_loss, plain_norm) = run(), run_plain()
    assert loss == pytest.approx(plain_loss, rel=1e-3)
    assert norm == pytest.approx(plain_norm, rel=1e-2)
    for taken in times.values():
        taken.clear()
    benchmark.pedantic(run, setup=lambda: run_plain() and None, rounds=ROUNDS, warmup_rounds=0)
    median = {name: statistics.median(taken) for name, taken in times.items()}
    ratio = median["straightforward"] / median["ours"]
    benchmark.extra_info.update(
        batch=BATCH, window=SIDE, threads=torch.get_num_threads(), torch=torch.__version__,
        median_seconds={name: round(value, 3) for name, value in median.items()},
        ratio=round(ratio, 2),
    )
    print(median, f"ratio {ratio:.2f}")
