"""What every kernel launch of the integer route moves and computes, from its shape alone.

A launch reads its codes, residual and weights from memory once and writes stream and codes once:
taps that overlap are served by the caches, and nothing stays in L2 from one launch to the next.
Codes out are as wide as codes in: an 8-bit code is one byte, a 16-bit one two, and two of these
cost four 8-bit products. The tiles, and with them the traffic of shared memory and the instructions
that warps issue, are those of the compiled kernels (`results/kernels_compiled.json`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

# how a convolution's kernel calls its tile, and the parts of it where codes have 16 bits
TILE, PART = ("BLOCK_M", "BLOCK_N"), ("PART_M", "PART_N")
SHAPE_CLASS = re.compile(r"(?P<name>.+), (?P<c_in>\d+) to (?P<c_out>\d+) channels, (?P<side>\d+)")


@dataclass(frozen=True)
class Work:
    """One launch, or several alike.

    Attributes:
        name: What it is.
        bytes: Read from and written to memory.
        operations: Integer (or half-precision) operations, two per multiply-add.
        shared_bytes: Through an SM's L1 and shared memory.
        instructions: Issued by all warps, at the least: as if all slots had 8 bits, and loops other
            than a convolution's ran once, and programs of several tiles were several; 0 where that
            is not known.
        half: Whether operations are half-precision ones, at half of the integer rate.
        launches: How many kernels these are.
        programs: How many programs they are in all, those that find nothing to do included; 0 where
            that is not known.
    """

    name: str
    bytes: float
    operations: float = 0.0
    shared_bytes: float = 0.0
    instructions: float = 0.0
    half: bool = False
    launches: int = 1
    programs: int = 0


@dataclass(frozen=True)
class Convolution:
    """A convolution of U-Net-16 as `quant_conv2d` launches it, on square inputs.

    Attributes:
        name: Its class in `kernels_compiled.json`.
        c_in, c_out, kernel, side: Channels, taps per side, side of the input in pixels.
        stride: As usual.
        stage: The encoder stage whose width it has; None: 8 bit.
        residual, stream, codes, skip: Whether it reads a residual, stores the stream (half
            precision both), stores codes, stores codes of 8 bits in any case, for a skip connection
            or before the width of a stage is known.
        moments: Whether it stores two float32 per channel and tile.
        times: How often it runs.
    """

    name: str
    c_in: int
    c_out: int
    kernel: int
    side: int
    stride: int = 1
    stage: int | None = None
    residual: bool = False
    stream: bool = False
    codes: bool = True
    skip: bool = False
    moments: bool = False
    times: int = 1

    @property
    def label(self) -> str:
        """The name as the table of compiled kernels has it, without the routing."""
        return f"{self.name}, {self.c_in} to {self.c_out} channels, {self.side}"

    def work(self, samples: int, num_bits: int, tile: dict[str, Any] | None) -> Work:
        """Returns one launch over `samples` slices, all of this width."""
        width = 2 if num_bits > 8 else 1
        out_side, taps = self.side // self.stride, self.kernel**2
        macs = taps * self.c_in * self.c_out * out_side**2
        outputs = self.c_out * out_side**2
        moved = width * self.c_in * self.side**2 + outputs * (
            2 * (self.residual + self.stream) + width * self.codes + self.skip
        )
        if self.moments and tile is not None:
            moved += 2 * 4 * self.c_out * -(-(out_side**2) // int(tile["constants"]["BLOCK_M"]))
        weights = width * taps * self.c_in * self.c_out
        shared, issued = (0.0, 0.0) if tile is None else self._on_chip(tile, out_side, width)
        return Work(
            f"{self.label}, {num_bits} bit", samples * moved + weights,
            samples * 2 * macs * width**2, samples * shared, samples * issued,
        )

    def _on_chip(self, tile: dict[str, Any], out_side: int, width: int) -> tuple[float, float]:
        """Bytes through L1 and shared memory per slice, and instructions issued.

        Tiles are read in, stored, and read as fragments.
        """
        sizes = {key: int(tile["constants"][key]) for key in (*TILE, *PART, "K")}

        def programs_of(m: int, n: int) -> int:
            return -(-(out_side**2) // m) * -(-self.c_out // n)

        block_m, block_n = (sizes[key] for key in (TILE if width == 1 else PART))
        # asynchronous copies, of codes of two bytes, go there without passing the registers
        in_and_stored = 1 if width == 2 and "LDGSTS" in tile["of_these"] else 2
        moved = in_and_stored * (block_m + block_n) + _fragments(tile, block_m, block_n)
        issued = programs_of(*(sizes[key] for key in TILE)) * tile["num_warps"] * tile["issued"]
        return programs_of(block_m, block_n) * width * sizes["K"] * moved, issued


def _fragments(tile: dict[str, Any], block_m: int, block_n: int) -> int:
    """Returns how many rows of K tensor cores read from shared memory, at the least."""
    if "IGMMA" in tile["of_these"] and block_m >= 64:
        # four warps together, 64 pixels at a time
        return block_m + block_n * (block_m // 64)
    # warps side by side along pixels read the same weights, along channels the same pixels
    along = [n for n in (1, 2, 4, 8) if tile["num_warps"] % n == 0]
    return min(block_m * (tile["num_warps"] // n) + block_n * n for n in along)


@dataclass(frozen=True)
class WayUp:
    """A way up of U-Net-16: three convolutions of 8 bit as one launch, on square inputs.

    Attributes:
        channels: Of the output; the input has twice as many.
        side: Of the skip, in pixels; the input has half of it.
        tile: Of the output, which the patch is a part of; None: `side`.
        stage, times: As in `Convolution`.
    """

    channels: int
    side: int
    tile: int | None = None
    stage: None = None
    times: int = 1

    @property
    def label(self) -> str:
        """Its class in `kernels_compiled.json`."""
        return f"way up{' on a tile' if self.tile else ''}, {self.channels} channels"

    def work(self, samples: int, num_bits: int, tile: dict[str, Any] | None) -> Work:
        """Returns one launch over `samples` slices; `num_bits` is 8."""
        c, below, outputs = self.channels, (self.side // 2) ** 2, (self.tile or self.side) ** 2
        moved = below * (2 * c + 4 * c) + outputs * (2 * c + c)
        # to c channels, to four pixels, and twice as many channels of those to c
        macs = below * c * c * (2 + 4 + 4 * 2)
        shared, issued = (0.0, 0.0) if tile is None else self._on_chip(tile)
        return Work(
            f"{self.label}, {self.side}, {num_bits} bit", samples * moved + c * c * (2 + 4 + 2),
            samples * 2 * macs, samples * shared, samples * issued,
        )

    def _on_chip(self, tile: dict[str, Any]) -> tuple[float, float]:
        """As in `Convolution`; each warp reads all weights, those of fuse once per product."""
        names = "BLOCK_M", "BLOCK_C", "COLUMNS"
        block_m, c, columns = (int(tile["constants"][name]) for name in names)
        pixels = (self.tile // 2 + 1) ** 2 if self.tile else (self.side // 2) ** 2
        programs, warps = -(-pixels // block_m), tile["num_warps"]
        weights = 2 * c * c + 4 * c * columns + 4 * c // columns * 2 * columns**2
        moved = 3 * block_m * (2 * c + 4 * c) + (2 + warps) * weights
        return programs * moved, programs * warps * tile["issued"]


def unet(full: int) -> Iterator[Convolution | WayUp]:
    """Yields convolutions and ways up of U-Net-16 on slices of one side, up to the last stage."""
    entry = {"stream": True, "codes": False, "skip": True, "moments": True}
    yield Convolution("first convolution", 4, 16, 3, full, **entry)
    for level, blocks in enumerate((1, 2, 2, 4)):
        c, side = 16 << level, full >> level
        block = Convolution("encoder block, first", c, c, 3, side, stage=level)
        yield replace(block, times=blocks)
        second = replace(block, residual=True)
        if blocks > 1:
            between = replace(second, name="encoder block, second", stream=True)
            yield replace(between, times=blocks - 1)
        if level == 3:
            # nothing is concatenated with it
            yield replace(second, name="encoder block, last")
        else:
            yield replace(second, name="encoder block, last of its stage", skip=True)
            yield Convolution("down", c, 2 * c, 3, side, stride=2, stage=level, **entry)
    for level in (2, 1, 0):
        c, side = 16 << level, full >> level
        yield WayUp(c, side)
        if level:
            yield from last_stage(c, side)


def last_stage(channels: int, side: int) -> Iterator[Convolution]:
    """Yields the convolutions of a decoder block."""
    first = Convolution("decoder block, first", channels, channels, 3, side)
    yield first
    yield replace(first, name="decoder block, second", residual=True)


class Tiles:
    """Finds a launch's compiled kernel; where a convolution's size has none, the nearest one's.

    Args:
        variants: Rows of `kernels_compiled.json`.
        arch: Such as "sm_89".
    """

    def __init__(self, variants: list[dict[str, Any]], arch: str) -> None:
        own = [row for row in variants if row["arch"] == arch]
        self.others = {row["shape_class"]: row for row in own}
        self.rows: dict[tuple, dict[int, dict[str, Any]]] = {}
        for row in own:
            if match := SHAPE_CLASS.fullmatch(row["shape_class"]):
                name, c_in, c_out, side = match.groups()
                self.rows.setdefault((name, int(c_in), int(c_out)), {})[int(side)] = row

    def __call__(self, convolution: Convolution | WayUp) -> dict[str, Any] | None:
        """Returns the row of the table; None where no such kernel was compiled."""
        if isinstance(convolution, WayUp):
            return self.others.get(convolution.label)
        known = self.rows.get((convolution.name, convolution.c_in, convolution.c_out))
        return known and known[min(known, key=lambda side: abs(side - convolution.side))]

    def instructions(self, shape_class: str, pixels: int) -> float:
        """Returns what warps issue for so many pixels of a slot, by a kernel in tiles of pixels."""
        row = self.others[shape_class]
        programs = -(-pixels // int(row["constants"]["BLOCK_M"]))
        return programs * row["num_warps"] * row["issued"]


def one_launch(name: str, parts: Iterable[Work]) -> Work:
    """Slots of several widths in one launch."""
    parts = list(parts)
    return Work(
        name, sum(part.bytes for part in parts), sum(part.operations for part in parts),
        sum(part.shared_bytes for part in parts), sum(part.instructions for part in parts),
    )
