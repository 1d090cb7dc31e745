"""How many instructions a warp issues, read from the disassembled machine code of a kernel.

A GPU issues one instruction per clock to each of a multiprocessor's four schedulers, so that many
are a lower bound on time. Where code branches, the way with the fewest is taken: past the slow
paths of divisions, and, of a kernel for slots of 8 or 16 bits, the way of 8.
"""

from __future__ import annotations

import heapq
import re
from typing import NamedTuple

_LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(@!?\w+\s+)?([A-Z][A-Z0-9]*)([^;/]*)", re.MULTILINE
)
_TARGET = re.compile(r"\b0x([0-9a-f]+)\b")
PRODUCTS = ("IMMA", "IGMMA")


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        name: Without modifiers.
        always: Whether it has no condition.
        target: Index of the instruction that a branch leads to, or None.
    """

    name: str
    always: bool
    target: int | None


def instructions(code: str) -> list[Instruction]:
    """Returns the instructions in the output of `cuobjdump -sass` for one kernel."""
    found = _LINE.findall(code)
    index = {int(address, 16): place for place, (address, *_) in enumerate(found)}
    listed = []
    for _, condition, name, operands in found:
        # a conditional call is how a far branch is written
        jumps = name == "BRA" or (name == "CALL" and condition)
        target = _TARGET.search(operands) if jumps else None
        # a second predicate stands before the target
        always = not condition and not (name == "BRA" and "," in operands)
        place = None if target is None else index.get(int(target[1], 16))
        listed.append(Instruction(name, always, place))
    return listed


def issued(code: str, steps: int = 1) -> int:
    """Counts the instructions of one warp in the output of `cuobjdump -sass` for one kernel.

    Args:
        code: The disassembly.
        steps: How often a loop that multiplies integers runs, a step per turn. Other loops count
            once.

    Raises:
        ValueError: If the code has no way to an unconditional exit.
    """
    listed = instructions(code)
    products = {place for place, (name, *_) in enumerate(listed) if name in PRODUCTS}
    times = [1] * len(listed)
    for place, (_, always, target) in enumerate(listed):
        # a slow path that lies behind jumps back without a condition
        if target is None or target >= place or always:
            continue
        if products & {*range(target, place + 1)}:
            times[target : place + 1] = [steps] * (place + 1 - target)
    return _shortest(listed, times, products)


def _shortest(listed: list[Instruction], times: list[int], products: set[int]) -> int:
    """Returns the instructions of the shortest way to an exit, past a product if there are any."""
    queue, seen = [(times[0], 0, not products)], set()
    while queue:
        count, place, multiplied = heapq.heappop(queue)
        if (place, multiplied) in seen:
            continue
        seen.add((place, multiplied))
        name, always, target = listed[place]
        multiplied |= place in products
        if name == "EXIT" and multiplied and (always or _ends_a_loop(listed, place)):
            return count
        onwards = [] if name in ("BRA", "RET", "EXIT") and always else [place + 1]
        for following in [*onwards, *([] if target is None else [target])]:
            if following < len(listed):
                heapq.heappush(queue, (count + times[following], following, multiplied))
    raise ValueError("the code has no exit: it is not the disassembly of a kernel")


def _ends_a_loop(listed: list[Instruction], place: int) -> bool:
    """Returns whether nothing but the way back follows an exit with a condition."""
    for name, always, target in listed[place + 1 :]:
        if name in ("BRA", "EXIT", "RET", "CALL"):
            return name == "BRA" and always and target is not None and target <= place
    return False
