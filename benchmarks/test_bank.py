"""The members of Med-DANet's bank (V1) in the engine against eager PyTorch, on a CPU.

    pytest benchmarks/test_bank.py --benchmark-only

Untrained members: their cost does not depend on the weights. Eight slices of a real held-out case
where `../shared/data` is, else of a phantom; ranges are those of the same slices.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from volumes import cases, write_results

from meddanet.bench import ratios, slice_by_slice, time_interleaved
from meddanet.build import build_segmenter
from meddanet.data import load_volume, to_slices
from meddanet.engine import Engine, compile_engine
from meddanet.layers import QuantLinear, set_quantization
from meddanet.med_danet import MedDANet

MEMBERS = "unet-12", "unet-16", "transbts-light", "transbts"
SLICES, ROUNDS = 8, 3


class FirstMember(nn.Module):
    """Decides for the first member, whatever a slice shows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = QuantLinear(4, 2)
        self.linear.quantize = False
        with torch.no_grad():
            self.linear.weight.zero_()
            self.linear.bias.copy_(torch.tensor([0.0, 1.0]))

    def forward(self, slices: Tensor) -> Tensor:
        """Maps slices [N, 4, H, W] to route logits [N, 2]."""
        return self.linear(slices.mean((2, 3)))


def engine_of(member: nn.Module) -> Engine:
    """Returns the engine of a bank of one member."""
    bank = nn.ModuleList([member])
    return compile_engine(
        MedDANet(bank=bank, decision=FirstMember(), in_channels=4, num_classes=4), "cpu"
    )


@torch.no_grad()
def calibrate(member: nn.Module, slices: Tensor) -> None:
    """Sets norms and ranges by what the slices show."""
    set_quantization(member, quantize=True, update_range=True)
    member.train()(slices)
    member.eval()
    set_quantization(member, quantize=False, update_range=False)


@pytest.mark.parametrize("name", MEMBERS)
def test_member(benchmark, name, tmp_path):
    """A member in float32 and at 8 bit, beside the same in eager float32."""
    case = cases(tmp_path)[0]
    slices = torch.from_numpy(to_slices(load_volume(case)))
    middle = len(slices) // 2
    slices = slices[middle : middle + SLICES].contiguous()
    member = build_segmenter(name)
    calibrate(member, slices[::4])
    full = engine_of(member)
    set_quantization(member, quantize=True, update_range=False)
    codes = engine_of(member)
    set_quantization(member, quantize=False, update_range=False)
    expected = np.asarray(slice_by_slice(member, slices))
    differing = {
        label: float(np.mean(np.asarray(engine.segment(slices).labels) != expected))
        for label, engine in (("engine", full), ("engine, 8 bit", codes))
    }
    assert differing["engine"] < 1e-3, differing
    runs = {
        "engine": lambda: full.segment(slices),
        "engine, 8 bit": lambda: codes.segment(slices),
        "eager slice by slice": lambda: slice_by_slice(member, slices),
    }
    times = time_interleaved(runs, ROUNDS)
    benchmark.pedantic(runs["engine"], rounds=ROUNDS)
    content = {
        "case": case.name, "shape": list(slices.shape), "executor": full.executor,
        "differing_voxels": differing, "times": times, "ratios": ratios(times, "engine"),
    }
    benchmark.extra_info.update(content)
    write_results(f"bank {name}", content)
