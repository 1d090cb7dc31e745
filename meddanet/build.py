"""Builds models from plain numbers; the only place that knows sizes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from operator import index

from torch import nn

from .layers import BitSelector, quantized_layers, set_quantization
from .med_danet import MedDANet
from .med_danet_v2 import MedDANetV2
from .networks.decision import MobileNetV2, ShuffleNetV2
from .networks.ghostnet import GhostNet
from .networks.heatmap import HeatmapLocator
from .networks.transbts import TransBTS
from .networks.unet import UNet

SEGMENTERS: dict[str, Callable[..., UNet]] = {
    "unet-12": partial(UNet, 12),
    "unet-16": partial(UNet, 16),
    "transbts-light": partial(TransBTS, 16, layers=1),
    "transbts": partial(TransBTS, 16, layers=4),
}
DECISION_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "shufflenetv2-m": partial(ShuffleNetV2, (12, 24, 48, 96, 256)),
    "shufflenetv2": partial(ShuffleNetV2, (24, 48, 96, 192, 1024)),
    "mobilenetv2": MobileNetV2,
    "ghostnet": partial(GhostNet, 0.5),
}


def build_segmenter(name: str, in_channels: int = 4, num_classes: int = 4) -> UNet:
    """Builds a 2-D segmenter in full precision.

    Args:
        name: "unet-12", "unet-16", "transbts-light" or "transbts" (V1's M1 to M4; V2's baselines
            are the second and the third), or a U-Net of any other base width, such as "unet-8".
        in_channels: Channels of the image.
        num_classes: Classes, background included.

    Returns:
        A module that maps [N, in_channels, H, W] to logits [N, num_classes, H, W].

    Raises:
        ValueError: If the name is unknown.
    """
    build = SEGMENTERS.get(name)
    if build is None and (width := re.fullmatch(r"unet-([1-9]\d{0,3})", name)):
        build = partial(UNet, int(width[1]))
    if build is None:
        known = ", ".join(SEGMENTERS)
        raise ValueError(f"unknown segmenter {name!r}; known are {known}, or any unet-WIDTH")
    model = build(in_channels, num_classes)
    set_quantization(model, quantize=False, update_range=True)
    return model


def build_decision_network(name: str, num_classes: int, in_channels: int = 4) -> nn.Module:
    """Builds a decision network in full precision.

    Args:
        name: "shufflenetv2-m", "shufflenetv2", "mobilenetv2" or "ghostnet" (V1 Table 5).
        num_classes: Outputs K.
        in_channels: Channels of the image.

    Returns:
        A module that maps [N, in_channels, H, W] to [N, K].

    Raises:
        ValueError: If the name is unknown.
    """
    if name not in DECISION_NETWORKS:
        known = ", ".join(DECISION_NETWORKS)
        raise ValueError(f"unknown decision network {name!r}; known are {known}")
    model = DECISION_NETWORKS[name](num_classes, in_channels)
    set_quantization(model, quantize=False, update_range=True)
    return model


def build_position_network(name: str, in_channels: int = 4, size: float = 48) -> nn.Module:
    """Builds a network that says where a crop goes, in full precision.

    Args:
        name: "heatmap", or a name for `build_decision_network`, as in the paper.
        in_channels: Channels of the image.
        size: Side of the smallest crop, in pixels of the image that the network sees.

    Returns:
        A module that maps [N, in_channels, H, W] to logits [N, 2], (y, x).

    Raises:
        ValueError: If the name is unknown.
    """
    if name != "heatmap":
        return build_decision_network(name, 2, in_channels)
    model = HeatmapLocator((12, 24, 48, 96, 256), in_channels, size)
    set_quantization(model, quantize=False, update_range=True)
    return model


def build_med_danet(
    bank: Sequence[str] = ("unet-12", "unet-16", "transbts-light", "transbts"),
    in_channels: int = 4,
    num_classes: int = 4,
    decision_network: str = "shufflenetv2-m",
) -> MedDANet:
    """Builds Med-DANet in full precision.

    Args:
        bank: Names for `build_segmenter`, cheapest first; the default is the paper's M1 to M4.
        in_channels: Channels of the image.
        num_classes: Classes, background included.
        decision_network: Name for `build_decision_network`.

    Raises:
        ValueError: If a name is unknown or the bank is empty.

    Source: Med-DANet, sections 3 and 4.1.
    """
    in_channels, num_classes = map(index, (in_channels, num_classes))  # as `config` is written
    members = [build_segmenter(name, in_channels, num_classes) for name in bank]
    model = MedDANet(
        bank=nn.ModuleList(members),
        decision=build_decision_network(decision_network, 1 + len(members), in_channels),
        in_channels=in_channels,
        num_classes=num_classes,
        stride=UNet.stride,
    )
    model.config = {
        "bank": list(bank), "in_channels": in_channels, "num_classes": num_classes,
        "decision_network": decision_network,
    }
    return model


def build_med_danet_v2(
    segmenter: str = "unet-16",
    in_channels: int = 4,
    num_classes: int = 4,
    crop_sizes: tuple[int, ...] = (96,),
    num_bits: tuple[int, ...] = (8, 16),
    decision_network: str = "shufflenetv2-m",
    decision_scale: int = 1,
    quantize_decisions: bool = True,
    position_network: str | None = None,
) -> MedDANetV2:
    """Builds Med-DANet V2 with everything on the quantisation grid.

    Encoder stages follow their bit selectors; every other layer has 8-bit weights and inputs, the
    policy and position networks included unless they are exempt.

    Args:
        segmenter: Name for `build_segmenter`.
        in_channels: Channels of the image.
        num_classes: Classes, background included.
        crop_sizes: Sides of the crops in pixels, ascending multiples of 8.
        num_bits: Widths the selectors choose from.
        decision_network: Name for `build_decision_network`, of the policy network, and of the
            position network unless that has another.
        decision_scale: Both see the slice averaged over squares of this many pixels.
        quantize_decisions: False keeps both in float: on depthwise layers a range per tensor is
            coarse enough to change decisions.
        position_network: Name for `build_position_network`; None = as in the paper.

    Raises:
        ValueError: If a name is unknown, or a crop size, a width or the scale does not fit.

    Source: Med-DANet V2, sections 3 and 4.1.
    """
    # plain numbers, as `config` is written; numpy's have no JSON
    in_channels, num_classes, decision_scale = map(
        index, (in_channels, num_classes, decision_scale)
    )
    crop_sizes, num_bits = tuple(map(index, crop_sizes)), tuple(map(index, num_bits))
    network = build_segmenter(segmenter, in_channels, num_classes)
    if list(crop_sizes) != sorted(set(crop_sizes)) or any(p % network.stride for p in crop_sizes):
        raise ValueError(
            f"crop_sizes must ascend and be multiples of {network.stride}, got {crop_sizes}"
        )
    if not num_bits or not all(2 <= width <= 16 for width in num_bits):
        raise ValueError(f"num_bits must be one or more widths from 2 to 16, got {num_bits}")
    if decision_scale < 1 or network.stride % decision_scale:
        raise ValueError(
            f"decision_scale must divide the stride {network.stride}, got {decision_scale}"
        )
    model = MedDANetV2(
        segmenter=network,
        policy=build_decision_network(decision_network, 2 + len(crop_sizes), in_channels),
        position=build_position_network(
            position_network or decision_network, in_channels,
            min(crop_sizes, default=0) / decision_scale,
        ),
        bit_selectors=nn.ModuleList(
            BitSelector(channels, in_channels, num_bits) for channels in network.stage_channels
        ),
        crop_last_stages=nn.ModuleList(deepcopy(network.last_stage) for _ in crop_sizes),
        crop_sizes=crop_sizes,
        decision_scale=decision_scale,
    )
    model.config = {
        "segmenter": segmenter, "in_channels": in_channels, "num_classes": num_classes,
        "crop_sizes": list(crop_sizes), "num_bits": list(num_bits),
        "decision_network": decision_network, "decision_scale": decision_scale,
        "quantize_decisions": quantize_decisions, "position_network": position_network,
    }
    for decider in (model.policy, model.position):
        for layer in quantized_layers(decider).values():
            layer.exempt = not quantize_decisions
    set_quantization(model, quantize=True, update_range=True)
    return model


MODELS: dict[str, Callable[..., MedDANet | MedDANetV2]] = {
    "med-danet": build_med_danet, "med-danet-v2": build_med_danet_v2,
}
