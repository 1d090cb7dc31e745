"""The whole network on a GPU: Med-DANet V2's routing against the static U-Net of the same weights.

    benchmarks/gpu.sh network            # and tuned: peers that take minutes to build
    MEDDANET_CASE=FOLDER benchmarks/gpu.sh network    # a labelled case instead of a phantom
    MEDDANET_DRY_RUN=1 pytest benchmarks/test_network.py

155 normalised slices lie on the device, label slices come out there; a second test starts and ends
in the host's memory. Files and normalisation take no part; `test_volume.py` times a
volume with them on the CPU. The engine's recorded plan needs a GPU: the dry run leaves it out, and
says so, unless TRITON_INTERPRET=1 interprets it (minutes).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plan_launches import slices_of
from tensorrt_peer import tensorrt_network
from timing import DEVICE, DRY_RUN
from torch import Tensor, nn

from meddanet.bench import same_answers
from meddanet.data import normalize
from meddanet.data.phantom import make_phantom
from meddanet.engine import CHUNK, Engine, compile_engine
from meddanet.layers import set_quantization
from meddanet.metrics import dice_score
from meddanet.routing import channels_last
from meddanet.weights import load_model

# the dry run takes two slices of the least size that holds a crop
SHAPE = 128, 128, 16

pytestmark = [
    pytest.mark.skipif(
        DEVICE.type == "cpu" and not DRY_RUN, reason="no GPU; MEDDANET_DRY_RUN=1 runs it small"
    ),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@torch.inference_mode()
def labels_of(network: nn.Module, slices: Tensor, batch: int) -> Tensor:
    """Runs a static network batch by batch: label slices [D, H, W]."""
    return torch.cat([network(part).argmax(1).to(torch.uint8) for part in slices.split(batch)])


def volume_slices() -> tuple[str, Tensor, np.ndarray]:
    """Returns name, normalised slices [D, C, H, W] on the CPU and the lesion [D, H, W]."""
    if not DRY_RUN:
        case = os.environ.get("MEDDANET_CASE")
        return slices_of(Path(case) if case else None)
    phantom = make_phantom(0, SHAPE)
    images = normalize(phantom.data).transpose(3, 0, 1, 2)[8:10]
    return "phantom", torch.from_numpy(images.copy()), phantom.labels.transpose(2, 0, 1)[8:10] > 0


def plan_engine() -> Engine:
    """Returns the engine of the recorded plan.

    Raises:
        ValueError: If the plan cannot run here.
    """
    return compile_engine(load_model("brats2021"), DEVICE, "triton")


def recorded(slices: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Returns the plan as its launches and as a graph, slices on the device; none without GPU."""
    try:
        engine: Any = plan_engine()
    except ValueError as reason:
        print(f"no recorded plan here: {reason}")
        return {}
    engine.segment(slices.cpu())
    plan, replay = engine.plan(len(slices), *slices.shape[2:])
    if plan.capacity < len(slices):
        print(f"no recorded plan here: memory holds {plan.capacity} slices of a plan")
        return {}
    plan.images.zero_()[: len(slices)].copy_(slices)
    plan.labels.fill_(255)

    def labels_by(run: Callable[[], Any]) -> Tensor:
        run()
        return plan.labels[: len(slices)]

    return {
        "recorded plan": lambda: labels_by(replay),
        "recorded plan, launch by launch": lambda: labels_by(plan.run),
    }


def check_dice(providers: dict[str, Callable[[], Tensor]], truth: np.ndarray) -> dict[str, float]:
    """Returns Dice with the truth; what decides must not tell the tumour worse than its peers.

    The static ones, which decide nothing, must agree with the first of them.
    """
    answers = {}
    for name, run in providers.items():
        labels = run()
        answers[name] = labels.cpu().numpy() > 0
        # a replay that wrote nothing must not answer by what another one left in its buffer
        with torch.inference_mode():
            labels.fill_(255)
    dice = {
        name: round(float(dice_score(answer, truth)), 4) for name, answer in answers.items()
    }
    _, wrong = same_answers(
        {name: lambda a=answer: a for name, answer in answers.items() if "static" in name}
    )
    assert not wrong, wrong
    if not DRY_RUN:
        best = max(dice.values())
        assert all(d >= best - 0.01 for name, d in dice.items() if "static" not in name), dice
    return dice


def static(half: bool) -> nn.Module:
    """Returns the static U-Net in full precision, or half, channels last."""
    network = load_model("brats2021").segmenter
    set_quantization(network, quantize=False, update_range=False)
    dtype = torch.float16 if half else torch.float32
    return network.to(DEVICE, dtype, memory_format=torch.channels_last)


def compiled(network: nn.Module, **options: Any) -> Callable[[Tensor], Tensor]:
    """Wraps torch.compile; the dry run, which proves the harness, leaves it out."""
    return network if DRY_RUN else torch.compile(network, **options)


def tuned_peers(
    network: nn.Module, slices: Tensor
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """Returns the static network as compilers tune it, by name, and why others cannot run here.

    Args:
        network: In half precision, on the device.
        slices: [D, C, H, W] likewise.
    """
    # one shape, built once
    padded = torch.cat([slices, slices[: -len(slices) % CHUNK]])
    batch = min(CHUNK, len(padded))
    makers = {
        # its CUDA graphs are within
        "compiled max-autotune": lambda: compiled(network, mode="max-autotune", dynamic=False),
        "TensorRT": lambda: tensorrt_network(network, padded[:batch]),
    }
    runs, missing = {}, {}
    for name, make in makers.items():
        label = f"static fp16, batched, {name}"
        try:
            tuned = make()
            labels_of(tuned, padded[:batch], batch)
        except Exception as error:  # what a compiler lacks comes as many kinds of error
            missing[label] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
            print(f"{label}: not run, {missing[label]}")
            continue
        runs[label] = lambda tuned=tuned: labels_of(tuned, padded, batch)[: len(slices)]
    return runs, missing


def test_slices_to_labels(measure):
    """All slices of one volume, decisions included, on the device from end to end."""
    name, images, truth = volume_slices()
    slices = channels_last(images.to(DEVICE))
    model = load_model("brats2021").to(DEVICE)
    full, half = static(False), static(True)
    slices16 = slices.half()
    plain = compiled(half)

    def own_layers() -> Tensor:
        return torch.cat([model.segment(part).labels for part in slices.split(CHUNK)])

    plans = recorded(slices)
    providers = {
        **plans,
        "MedDANetV2.segment": own_layers,
        "static fp32, slice by slice": lambda: labels_of(full, slices, 1),
        "static fp32, batched": lambda: labels_of(full, slices, CHUNK),
        "static fp16, batched": lambda: labels_of(half, slices16, CHUNK),
        "static fp16, batched, compiled": lambda: labels_of(plain, slices16, CHUNK),
    }
    decisions = torch.cat([model.segment(part).decisions for part in slices.split(CHUNK)])
    counts = decisions.bincount(minlength=len(model.routes))
    measure(
        "slices to labels", next(iter(providers)), providers, volume=name, shape=list(slices.shape),
        whole_tumour_dice=check_dice(providers, truth),
        timing={"capture": False, "rounds": 2 if DRY_RUN else 10},
        decisions=dict(zip(model.routes, counts.tolist(), strict=True)),
    )


def test_host_to_host(measure):
    """The same from slices in the host's memory to labels there: what a predictor waits for."""
    name, images, truth = volume_slices()
    half = static(True)
    plain = compiled(half)
    eager = compile_engine(load_model("brats2021"), DEVICE, "eager")

    def through(network: Callable[[Tensor], Tensor]) -> Tensor:
        """Uploads from pinned memory, so that no chunk waits, and fetches labels once."""
        parts = (part.pin_memory() if DEVICE.type == "cuda" else part
                 for part in images.split(CHUNK))
        return torch.cat([
            labels_of(network, channels_last(part.to(DEVICE, non_blocking=True).half()), CHUNK)
            for part in parts
        ]).cpu()

    providers = {
        "engine, eager": lambda: eager.segment(images).labels,
        "static fp16, batched": lambda: through(half),
        "static fp16, batched, compiled": lambda: through(plain),
    }
    try:
        engine = plan_engine()
        providers = {"engine, recorded plan": lambda: engine.segment(images).labels, **providers}
    except ValueError as reason:
        print(f"no recorded plan here: {reason}")
    measure(
        "host to host", next(iter(providers)), providers, volume=name, shape=list(images.shape),
        whole_tumour_dice=check_dice(providers, truth),
        timing={"capture": False, "rounds": 2 if DRY_RUN else 10},
    )


def test_slices_to_labels_tuned(measure):
    """Ours of the first test beside peers that take minutes to build."""
    name, images, truth = volume_slices()
    slices = channels_last(images.to(DEVICE))
    model, half, slices16 = load_model("brats2021").to(DEVICE), static(True), slices.half()

    def own_layers() -> Tensor:
        return torch.cat([model.segment(part).labels for part in slices.split(CHUNK)])

    tuned, not_run = tuned_peers(half, slices16)
    providers = {**(recorded(slices) or {"MedDANetV2.segment": own_layers}), **tuned}
    measure(
        "slices to labels, tuned", next(iter(providers)), providers, volume=name,
        shape=list(slices.shape), whole_tumour_dice=check_dice(providers, truth), not_run=not_run,
        timing={"capture": False, "rounds": 2 if DRY_RUN else 10},
    )
