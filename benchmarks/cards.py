"""Graphics cards as their vendor describes them, and what launches cost on one."""

from __future__ import annotations

from dataclasses import dataclass

# a kernel without work in a CUDA graph on an H200: the shortest "width" of the groups without
# slices in results/gpu_launches_h200_*.json
LAUNCH_SECONDS = 1.13e-6
# the launches of 72000 programs without work in results/gpu_launches_h200_00000_at_5fda279.json
PROGRAM_SECONDS = 0.6e-9


@dataclass(frozen=True)
class Card:
    """Published peaks of one card.

    Attributes:
        arch: Its code, such as "sm_89".
        multiprocessors: How many SMs.
        gigahertz: Boost clock.
        gigabytes_per_second: Memory bandwidth.
        tera_ops: int8 on tensor cores, without sparsity; half precision has half of it.
        source: Where the vendor says so.
        devices: What PyTorch calls it, whole: a "Laptop GPU" or "D" is another card.
    """

    arch: str
    multiprocessors: int
    gigahertz: float
    gigabytes_per_second: float
    tera_ops: float
    source: str
    devices: tuple[str, ...] = ()


CARDS = {
    "RTX 3090": Card("sm_86", 82, 1.695, 936, 284,
                     "NVIDIA Ampere GA102 GPU Architecture, whitepaper V2, Appendix A",
                     ("NVIDIA GeForce RTX 3090",)),
    "RTX 4090": Card("sm_89", 128, 2.52, 1008, 660.6,
                     "NVIDIA Ada GPU Architecture, whitepaper V2, Appendix A",
                     ("NVIDIA GeForce RTX 4090",)),
    "RTX 5090": Card("sm_120", 170, 2.407, 1792, 838,
                     "NVIDIA RTX Blackwell GPU Architecture, whitepaper V1, Appendix A",
                     ("NVIDIA GeForce RTX 5090",)),
    "L40S": Card("sm_89", 142, 2.52, 864, 733,
                 "NVIDIA L40S datasheet; clock and SMs: NVIDIA Ada GPU Architecture, whitepaper",
                 ("NVIDIA L40S",)),
    "A100 80 GB": Card("sm_80", 108, 1.41, 2039, 624,
                       "NVIDIA A100 datasheet; NVIDIA A100 Architecture, whitepaper V1, Table 4",
                       ("NVIDIA A100-SXM4-80GB",)),
    "H200": Card("sm_90", 132, 1.83, 4800, 1979,
                 "NVIDIA H200 datasheet; clock and SMs: NVIDIA H100 Architecture, whitepaper",
                 ("NVIDIA H200",)),
}


def known_card(device: str) -> Card | None:
    """Returns the card that PyTorch calls so, or None."""
    return next((card for card in CARDS.values() if device in card.devices), None)
