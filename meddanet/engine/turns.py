"""How many whole slices at a time: as many as a GPU's L2 cache holds.

A launch reads what the one before it has written. Of all slices of a head that lies in memory, of a
few in the L2 cache, at the price of the launches for each turn. By prediction that pays off where
memory is slow beside arithmetic, as on graphics cards: see docs/engine.md.
"""

from __future__ import annotations

import torch

# how much of the cache one resolution's maps may fill: taps and weights want some, too
SHARE = 0.75
# bits; what is wider is stacked memory, fast enough to be no limit
WIDEST_BUS = 512


def cache_of(device: torch.device) -> int:
    """Returns the bytes of a device's L2 cache that slices should stay in; 0: it does not matter.

    Args:
        device: A CUDA device with Triton, or any other.
    """
    if device.type != "cuda":
        return 0
    from triton.runtime import driver

    with torch.cuda.device(device):
        found = driver.active.utils.get_device_properties(torch.cuda.current_device())
    if found["mem_bus_width"] > WIDEST_BUS:
        return 0
    # PyTorch 2.6 and later tell it
    return int(SHARE * getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))


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
