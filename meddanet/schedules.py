"""The recipes that have a name: beside the shipped weights' those of the papers and their code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .recipe import PAPERS_AUGMENTATION, PhaseConfig, meddanet_phases


def paper_phases() -> list[PhaseConfig]:
    """Returns the schedule of Med-DANet V2, section 4.1: 200, 100 and 50 epochs.

    Policy and segmenter in full precision; position network and quantised model; everything. One
    poly schedule runs over all three; the loss is Eq. 10 throughout.
    """

    def phase(before: int, epochs: int, arithmetic: str, *parts: str) -> PhaseConfig:
        return PhaseConfig(
            "joint", epochs, "epochs", batch=64, learning_rate=2e-4, warm_up=1,
            schedule_before=before, schedule_after=350 - before - epochs,
            parts=parts, arithmetic=arithmetic, loss="dice", branch_weight=0, oracle_weight=0,
        )

    segmenter = ("segmenter", "crop_last_stages")
    return [
        phase(0, 200, "float", *segmenter, "policy"),
        phase(200, 100, "learning", *segmenter, "bit_selectors", "position"),
        phase(300, 50, "learning"),
    ]


def official_phases() -> list[PhaseConfig]:
    """Returns the schedule of the published code: 150, 150 and 50 epochs.

    Both branches and the position network; the same with bit widths; the policy alone, at ten
    times the rate on a schedule of its own. Its cost weights act on sums over 15 samples in
    G multiply-adds; here they act on means and on shares of a whole window's 1.068 G.
    """
    whole = 1.068
    first = PhaseConfig(
        "joint", 150, "epochs", batch=60, learning_rate=2e-4, warm_up=1, schedule_after=200,
        parts=("segmenter", "crop_last_stages", "position"), arithmetic="float", loss="dice",
        mixed_weight=0, oracle_weight=0, cost_weight=0,
    )
    second = replace(
        first, schedule_before=150, schedule_after=50, arithmetic="learning",
        parts=(*first.parts, "bit_selectors"), branch_cost_weight=15 * 1.5e-4 * whole,
    )
    third = replace(
        first, steps=50, learning_rate=2e-3, schedule_after=0, parts=("policy",),
        arithmetic="learning", branch_weight=0.5, mixed_weight=0.5,
        cost_weight=0.5 * 15 * 0.02 * whole,
    )
    return [first, second, third]


def v1_phases() -> list[PhaseConfig]:
    """Returns the schedule of Med-DANet, section 4.1: 400 epochs of the bank, 50 of the decisions.

    Small members leave after 300 epochs; the paper does not say which are small, here the first two
    of its four.
    """
    bank = PhaseConfig(
        "bank", 400, "epochs", batch=64, learning_rate=1e-4, warm_up=1, loss="dice",
        stay=(0.75, 0.75, 1.0, 1.0),
    )
    return [bank, PhaseConfig("decision", 50, "epochs", batch=64, learning_rate=0.01, warm_up=1)]


RECIPES: dict[str, Callable[[], list[PhaseConfig]]] = {
    "meddanet": meddanet_phases, "paper": paper_phases, "official": official_phases,
    "v1-paper": v1_phases,
}


def recipe_settings(name: str) -> dict[str, Any]:
    """Returns the fields of `TrainConfig` that a recipe sets: phases, and what papers have else.

    Args:
        name: A key of `RECIPES`.
    """
    settings: dict[str, Any] = {"phases": RECIPES[name]()}
    if name == "meddanet":
        return settings
    settings |= {"augment": PAPERS_AUGMENTATION, "lesion_share": None, "phantoms": 0}
    if name == "v1-paper":
        return settings | {"bank": ("unet-12", "unet-16", "transbts-light", "transbts")}
    return settings | {
        "position_network": None, "crop_sizes": (96,), "decision_scale": 1,
        "quantize_decisions": True,
    }
