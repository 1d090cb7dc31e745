"""What a warp goes through: a kernel's instructions, and what each waits for and takes.

The way is the shortest through the code that adds up all of a program's products. What an
instruction waits for stands in its own bits (since sm_70): how many clocks until the warp's next
one, which of six scoreboards it sets, and which it waits for. Assumed are how long memory takes and
for how many clocks an instruction keeps its unit busy (`Costs`, `UNITS`, `_step`).

A load of codes takes as long as L2 where its tap starts a new row of pixels, else as long as L1,
but not less than the row's first load; whatever else a program loads comes from L1, but for what is
added to a sum. Not in it are memory's bandwidth, the fetching of instructions, and what tensor
cores read from shared memory themselves (IGMMA).
"""

from __future__ import annotations

import heapq
import re
from dataclasses import dataclass
from typing import NamedTuple

# address, condition, name, modifiers, operands, and the upper half of the encoding, of which
# `sass.py` needs less
_LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(@!?\w+\s+)?([A-Z][A-Z0-9]*)((?:\.[A-Z0-9_]+)*)([^;/]*);?"
    r"\s*\}?\s*/\* 0x[0-9a-f]{16} \*/\s*\n\s*/\* 0x([0-9a-f]{16}) \*/",
    re.MULTILINE,
)
_TARGET = re.compile(r"\b0x([0-9a-f]+)\b")
_SHAPE = re.compile(r"(\d+)x(\d+)x(\d+)")
# products that one IMMA of a warp adds up
PRODUCT = 16 * 8 * 32

# by instruction: the unit that it takes, and for how many clocks
UNITS = {
    name: (unit, busy)
    for unit, busy, names in (
        ("integer", 2, ("LOP3", "ISETP", "IADD3", "SEL", "PRMT", "SHF", "LEA", "IMNMX", "VIMNMX")),
        ("integer", 2, ("IABS", "SGXT", "PLOP3", "POPC", "FSETP", "FSEL", "FMNMX", "R2P", "P2R")),
        ("integer", 2, ("BMSK", "VOTE", "FLO", "I2FP", "VIADD", "FCHK", "I2IP", "F2FP")),
        ("float", 1, ("FFMA", "FMUL", "FADD", "HADD2", "HFMA2", "HMUL2")),
        ("float", 2, ("IMAD", "IDP")),
        ("special", 2, ("I2F", "F2I", "F2F", "FRND")),
        ("special", 8, ("MUFU",)),
        ("constants", 2, ("LDC", "ULDC", "S2R", "S2UR", "CS2R")),
        ("uniform", 2, ("UIADD3", "UIMAD", "ULOP3", "USHF", "UMOV", "USEL", "UISETP", "ULEA")),
        ("uniform", 2, ("R2UR", "UPRMT", "USGXT")),
    )
    for name in names
}
_LATENCY = {"special": 20, "constants": 30, "uniform": 12}
_MEMORY = ("LDG", "LDGSTS", "STG", "LDS", "STS", "LDSM", "STSM", "SHFL")


@dataclass(frozen=True)
class Costs:
    """What is assumed of an architecture, in clocks.

    Attributes:
        l1: Of a load that hits L1.
        l2: Of one that does not.
        product: For which `PRODUCT` keeps a scheduler's tensor core busy.
        barrier: From the last warp's arrival to the first one's next instruction.
        start: From a program's end to the first instruction of the next one.
    """

    l1: int = 36
    l2: int = 280
    product: int = 4
    barrier: int = 20
    start: int = 200


class Instruction(NamedTuple):
    """One line of the disassembly."""

    name: str
    modifiers: str
    always: bool
    predicated: bool
    target: int | None
    products: int
    stall: int
    writes: int
    reads: int
    waits: int
    groups: int


def disassembled(code: str) -> list[Instruction]:
    """Returns the instructions in the output of `cuobjdump -sass` for one kernel."""
    found = _LINE.findall(code)
    index = {int(address, 16): place for place, (address, *_) in enumerate(found)}
    listed = []
    for _, condition, name, modifiers, operands, upper in found:
        bits = int(upper, 16) >> 41
        jumps = name == "BRA" or (name == "CALL" and condition)
        target = _TARGET.search(operands) if jumps else None
        groups = re.search(r"SB\d, 0x(\w+)", operands) if name == "DEPBAR" else None
        listed.append(Instruction(
            name, modifiers, not condition and not (name == "BRA" and "," in operands),
            bool(condition), None if target is None else index.get(int(target[1], 16)),
            _products(name, modifiers + operands), bits & 15, bits >> 5 & 7, bits >> 8 & 7,
            bits >> 11 & 63, int(groups[1], 16) if groups else 0,
        ))
    return listed


def _products(name: str, rest: str) -> int:
    """Returns how many times `PRODUCT` a warp adds up."""
    if name == "IGMMA" and (shape := _SHAPE.search(rest)):
        rows, columns, depth = map(int, shape.groups())
        return rows * columns * depth // 4 // PRODUCT
    return int(name == "IMMA")


def shortest_way(listed: list[Instruction], products: int) -> list[Instruction]:
    """Returns the fewest instructions to the end that add up so many times `PRODUCT`.

    Raises:
        ValueError: If there is no such way.
    """
    queue, before, best = [(0, 0, 0)], {}, {(0, 0): 0}
    while queue:
        count, place, done = heapq.heappop(queue)
        if best[place, done] != count:
            continue
        one = listed[place]
        total = done + one.products
        if one.name == "EXIT" and one.always and total == products:
            way, state = [], (place, done)
            while state is not None:
                way.append(listed[state[0]])
                state = before.get(state)
            return way[::-1]
        onwards = [] if one.name in ("BRA", "RET", "EXIT") and one.always else [place + 1]
        for after in [*onwards, *([] if one.target is None else [one.target])]:
            state = after, total
            if total <= products and after < len(listed) and count + 1 < best.get(state, 1 << 60):
                best[state], before[state] = count + 1, (place, done)
                heapq.heappush(queue, (count + 1, *state))
    raise ValueError(f"no way through the code adds up {products} products")


class Step(NamedTuple):
    """An instruction on its way: what it occupies, and what it waits for.

    Attributes:
        unit: Of its scheduler.
        busy: Clocks for which that is not free.
        latency: Clocks until its result is there.
        shared: Clocks on the way to L1 and shared memory, 0 if it does not go there.
        kind: What else is to be known: its name, "row" for a load that misses L1, "same row" for
            one that may wait for it.
        code: The instruction.
    """

    unit: str
    busy: int
    latency: int
    shared: int
    kind: str
    code: Instruction


def steps_of(way: list[Instruction], costs: Costs) -> list[Step]:
    """Returns what every instruction on a way takes."""
    last = max((place for place, one in enumerate(way) if one.products), default=-1)
    codes = [
        place for place, one in enumerate(way[:last])
        if one.name in ("LDG", "LDGSTS") and one.predicated and _bytes(one) >= 4
    ]
    # in the order of K: nine taps, three to a row
    taps = {place: 9 * number // len(codes) for number, place in enumerate(codes)}
    return [_step(one, taps.get(place), place, costs) for place, one in enumerate(way)]


def _bytes(one: Instruction) -> int:
    """Returns the bytes that a thread loads or stores."""
    for size, ending in ((16, ".128"), (8, ".64"), (2, "16"), (1, "8")):
        if re.search(rf"{re.escape(ending)}(\.|$)", one.modifiers):
            return size
    return 4


def _step(one: Instruction, tap: int | None, place: int, costs: Costs) -> Step:
    name = one.name
    unit, busy = UNITS.get(name, ("other", 1))
    latency, shared, kind = _LATENCY.get(unit, 20), 0, name
    if name in _MEMORY:
        unit = "memory"
        shared = _lines(one)
        latency = {"LDG": costs.l1, "LDGSTS": costs.l1 + 30, "LDS": 24, "LDSM": 28, "SHFL": 24}.get(
            name, 10
        )
        if name == "LDG" and (tap is not None or (one.predicated and _bytes(one) >= 4)):
            kind = "same row" if tap is not None and tap % 3 else "row"
        elif name == "LDGSTS" and tap is not None and tap % 3 == 0:
            latency = costs.l2
        elif name == "LDG" and place < 40:
            latency = 60
    elif name == "IMMA":
        unit, busy, latency = "tensor core", costs.product, 30
    return Step(unit, busy, latency, shared, kind, one)


def _lines(one: Instruction) -> int:
    """Returns how many times 128 bytes a warp moves."""
    if one.name in ("LDSM", "STSM"):
        return next((n for n in (4, 2) if f".{n}" in one.modifiers), 1)
    return 2 if one.name == "SHFL" else max(1, 32 * _bytes(one) // 128)
