"""One training step of Med-DANet V2 on the CPU against the straightforward way to write it.

    pytest benchmarks/test_training_step.py --benchmark-only

The straightforward way is that of the published code: a Python loop over the samples in every
convolution whose width is chosen, quantisation out of plain operations differentiated by autograd,
crop and paste by `F.affine_grid` and `F.grid_sample`, PyTorch's default layout. Both ways take
whole steps (forward, loss, backward, Adam) on the same batch, in float32 and under bfloat16's
autocast, all four in turns, so that ratios are of interleaved runs. Two kinds of step:

    joint      policy, position and both branches on every sample, as the papers train
    quantised  a step of the crop and one of the whole branch, as the recipe trains
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from volumes import write_results

from meddanet import layers, med_danet_v2
from meddanet.bench import time_interleaved
from meddanet.build import build_med_danet_v2
from meddanet.devices import emulates_bfloat16
from meddanet.layers import set_quantization
from meddanet.objectives import OBJECTIVES
from meddanet.recipe import PhaseConfig

ROUNDS, BATCH, SIDE, CROP = 5, 8, 128, 96
# steps of each kind: the recipe's take the branches in turn
STEPS = {"joint": 1, "quantised": 2}


class OneBatch:
    """The same windows again and again: a bright disc in noise."""

    bit_weight = 0.05

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
        disc = ((rows - 60) ** 2 + (columns - 70) ** 2 < 20**2).long()
        # a batch of crops is half as large again
        self.labels = disc.repeat(BATCH + BATCH // 2, 1, 1)
        noise = torch.randn(len(self.labels), 4, SIDE, SIDE, generator=generator)
        self.images = noise + 3 * self.labels[:, None]

    def window_batch(self, size: int, at_least: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (images [size, 4, 128, 128], labels)."""
        return self.images[:size], self.labels[:size]

    def jitter(self, count: int, most: int) -> torch.Tensor:
        """Returns no shift at all, [count, 2]."""
        return torch.zeros(count, 2)


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
):
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


def make_steps(kind: str, layout: torch.memory_format, half: bool, quantize: bool = True):
    """Returns a function that makes a round of steps and returns losses and gradient norms."""
    torch.manual_seed(0)
    model = build_med_danet_v2("unet-16", crop_sizes=(CROP,)).to(memory_format=layout).train()
    model.segmenter.dropout.p = 0.0
    # as drawn, every sample would choose 16 bit: a mean that lies between makes both widths run
    with torch.no_grad():
        for selector in model.bit_selectors:
            weight = selector.linear.weight
            weight += 0.02 * torch.randn(weight.shape)
            selector.linear.bias.zero_()
    set_quantization(model, quantize=quantize, update_range=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, amsgrad=True)
    phase = PhaseConfig(kind, 1, batch=BATCH, cost_weight=0.06, oracle_weight=0)
    batches = OneBatch()

    def steps() -> list[tuple[float, float]]:
        torch.manual_seed(1)
        found = []
        for index in range(STEPS[kind]):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = OBJECTIVES[kind](model, batches, index, phase)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            gradients = [p.grad for p in model.segmenter.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            optimizer.step()
            found.append((loss.item(), norm.item()))
        return found

    return steps


def plainly(steps):
    """Returns the same steps by the straightforward parts."""

    def run():
        with pytest.MonkeyPatch.context() as patch:
            straightforward(patch)
            return steps()

    return run


@pytest.mark.parametrize("kind", list(STEPS))
def test_training_step_against_straightforward(benchmark, kind):
    """Seconds per round of steps, and ratios; the first one's losses and gradients agree."""
    runs = {}
    halves = {"float32": False, "bfloat16": True}
    if emulates_bfloat16(torch.device("cpu")):
        # six to eleven times slower: minutes, for what nobody should do
        del halves["bfloat16"]
    for name, half in halves.items():
        runs[f"ours, {name}"] = make_steps(kind, torch.channels_last, half)
        runs[f"straightforward, {name}"] = plainly(
            make_steps(kind, torch.contiguous_format, half)
        )
    # quality first: the same loss and gradient, but for the finer 16-bit grid and rounding; policy
    # and position network amplify these, their random weights turn noise into other codes
    first = {name: run()[0] for name, run in runs.items()}
    loss, norm = first["straightforward, float32"]
    assert first["ours, float32"] == (
        pytest.approx(loss, rel=1e-3), pytest.approx(norm, rel=1e-2)
    )
    if "bfloat16" in halves:
        assert first["ours, bfloat16"][0] == pytest.approx(loss, rel=1e-2)
    # what is left to gain: the same steps with nothing quantised
    runs["ours, float32, not quantised"] = make_steps(kind, torch.channels_last, False, False)
    runs["ours, float32, not quantised"]()
    times = time_interleaved(runs, ROUNDS, warm_up=False)
    benchmark.pedantic(runs["ours, float32"], rounds=1)
    ours = times["ours, float32"]["seconds"]
    content = {
        "batch": BATCH, "window": SIDE, "crop": CROP, "steps": STEPS[kind], "times": times,
        "ratio_to_ours": {name: round(t["seconds"] / ours, 3) for name, t in times.items()},
    }
    benchmark.extra_info.update(content)
    write_results(f"training step, {kind}", content)
    print(content["ratio_to_ours"])
