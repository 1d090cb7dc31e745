"""How many whole slices at a time: as many as a GPU's L2 cache holds.

A launch reads what the one before it has written. Of all slices of a head that lies in memory, of a
few in the L2 cache, at the price of the launches for each turn. By prediction that pays off where
memory is slow beside arithmetic, as on graphics cards: see docs/engine.md.
"""

from __future__ import annotations

import torch

# how much of the cache maps of the finest resolution may fill: those of the others, images and
# weights take as much again
SHARE = 0.5
# bits; what is wider is stacked memory, fast enough to be no limit
WIDEST_BUS = 512


def cache_of(device: torch.device) -> int:
    """Returns the bytes of L2 cache that these maps may take; 0: they need not stay there."""
    if device.type != "cuda":
        return 0
    found = torch.cuda.get_device_properties(device)
    return 0 if found.memory_bus_width > WIDEST_BUS else int(SHARE * found.L2_cache_size)


def slots_of(cache: int, channels: int, size: tuple[int, int], room: int) -> int:
    """Returns how many slots whole slices take at a time; all of them where turns save nothing.

    Args:
        cache: Bytes, of `cache_of`.
        channels: Of the finest resolution.
        size: (height, width) of a slice.
        room: How many slots there are.
    """
    # the stream of two bytes and the codes that come in, that lie between and that the skip keeps
    slots = cache // (5 * channels * size[0] * size[1])
    return slots if 1 < slots < room else room
