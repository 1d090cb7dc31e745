"""The whole network on a GPU: Med-DANet V2's routing against the static U-Net of the same weights.

    benchmarks/gpu.sh network
    MEDDANET_DRY_RUN=1 pytest benchmarks/test_network.py

155 normalised slices of a phantom lie on the device, label slices come out there. Files, transfers
and normalisation take no part; `test_volume.py` times a volume with them on the CPU.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from timing import DEVICE, DRY_RUN
from torch import Tensor, nn

from meddanet.data import normalize
from meddanet.data.phantom import make_phantom
from meddanet.engine import CHUNK
from meddanet.layers import set_quantization
from meddanet.metrics import dice_score
from meddanet.routing import channels_last
from meddanet.weights import load_model

# the dry run takes two slices of the least size that holds a crop
SHAPE = (96, 96, 16) if DRY_RUN else (240, 240, 155)

pytestmark = [
    pytest.mark.skipif(
        DEVICE.type == "cpu" and not DRY_RUN, reason="no GPU; MEDDANET_DRY_RUN=1 runs it small"
    ),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def labels_of(network: nn.Module, slices: Tensor, batch: int) -> Tensor:
    """Runs a static network batch by batch: label slices [D, H, W]."""
    return torch.cat([network(part).argmax(1).to(torch.uint8) for part in slices.split(batch)])


@torch.inference_mode()
def test_slices_to_labels(measure):
    """All slices of one volume, decisions included."""
    phantom = make_phantom(0, SHAPE)
    images = normalize(np.round(phantom.data).clip(0)).transpose(3, 0, 1, 2)
    taken = slice(8, 10) if DRY_RUN else slice(None)
    slices = channels_last(torch.from_numpy(images[taken].copy()).to(DEVICE))
    truth = phantom.labels.transpose(2, 0, 1)[taken] > 0
    model = load_model("brats2021").to(DEVICE)
    static = load_model("brats2021").segmenter.to(DEVICE)
    set_quantization(static, quantize=False, update_range=False)
    half = load_model("brats2021").segmenter.to(DEVICE, torch.float16)
    set_quantization(half, quantize=False, update_range=False)
    slices16 = slices.half()
    compiled = half if DRY_RUN else torch.compile(half)

    def ours() -> Tensor:
        return torch.cat([model.segment(part).labels for part in slices.split(CHUNK)])

    providers = {
        "MedDANetV2.segment": ours,
        "static fp32, slice by slice": lambda: labels_of(static, slices, 1),
        "static fp32, batched": lambda: labels_of(static, slices, CHUNK),
        "static fp16, batched": lambda: labels_of(half, slices16, CHUNK),
        "static fp16, batched, compiled": lambda: labels_of(compiled, slices16, CHUNK),
    }
    dice = {
        name: round(float(dice_score(run().cpu().numpy() > 0, truth)), 4)
        for name, run in providers.items()
    }
    # what is faster must not tell the tumour worse than the peers do
    if not DRY_RUN:
        assert dice["MedDANetV2.segment"] >= max(dice.values()) - 0.01
    decisions = torch.cat([model.segment(part).decisions for part in slices.split(CHUNK)])
    measure(
        "slices to labels", "MedDANetV2.segment", providers, shape=list(slices.shape),
        whole_tumour_dice=dice, timing={"capture": False, "rounds": 2 if DRY_RUN else 10},
        decisions=dict(zip(model.routes, decisions.bincount(minlength=3).tolist(), strict=True)),
    )  # fmt: skip
