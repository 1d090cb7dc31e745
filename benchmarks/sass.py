"""How many instructions a warp issues, read from the disassembled machine code of a kernel.

A GPU issues one instruction per clock to each of a multiprocessor's four schedulers, so that many
are a lower bound on time. Where code branches, the way with the fewest is taken: past the slow
paths of divisions, and, of those that multiply as much as is said, the shortest.
"""

from __future__ import annotations

import heapq
import math
import re
from typing import NamedTuple

_LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(@!?\w+\s+)?([A-Z][A-Z0-9]*)([^;/]*)", re.MULTILINE
)
_TARGET = re.compile(r"\b0x([0-9a-f]+)\b")
# rows, columns and depth; the second is four warps' together
_PRODUCTS = {"IMMA": re.compile(r"IMMA\.(16)(8)(32)"), "IGMMA": re.compile(r"(64)x(\d+)x(32)")}
_WARPS = {"IMMA": 1, "IGMMA": 4}


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        name: Without modifiers.
        always: Whether it has no condition.
        target: Index of the instruction that a branch leads to, or None.
        products: How many products of integers a warp adds up by it.
    """

    name: str
    always: bool
    target: int | None
    products: int = 0


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
        listed.append(Instruction(name, always, place, _products(name, operands)))
    return listed


def _products(name: str, operands: str) -> int:
    if name not in _PRODUCTS:
        return 0
    # what this does not know is a product all the same
    sizes = _PRODUCTS[name].search(name + operands)
    return math.prod(map(int, sizes.groups())) // _WARPS[name] if sizes else 1


def issued(code: str, steps: int = 1, products: int | None = None) -> int:
    """Counts the instructions of one warp in the output of `cuobjdump -sass` for one kernel.

    Args:
        code: The disassembly.
        steps: How often a loop that multiplies integers runs, a step per turn. Other loops count
            once.
        products: How many products of integers a warp adds up on the way; None: any, but some if
            the code has any.

    Raises:
        ValueError: If the code has no such way to an exit.
    """
    listed = instructions(code)
    onwards = [_following(listed, place) for place in range(len(listed))]
    times = [1] * len(listed)
    for place, body in _loops(onwards).items():
        # once around is enough: how often is said by `times`
        onwards[place] = [following for following in onwards[place] if following > place]
        if any(listed[inside].products for inside in body):
            for inside in body:
                times[inside] = steps
    return _shortest(listed, onwards, times, products)


def _following(listed: list[Instruction], place: int) -> list[int]:
    """Returns where it may go on after an instruction."""
    name, always, target, _ = listed[place]
    found = [] if name in ("BRA", "RET", "EXIT") and always else [place + 1]
    if target is not None:
        found.append(target)
    return [following for following in found if following in range(len(listed))]


def _reached(start: int, onwards: list[list[int]]) -> set[int]:
    """Returns all places that a way from `start` leads to."""
    found, queue = {start}, [start]
    while queue:
        new = set(onwards[queue.pop()]) - found
        found |= new
        queue += new
    return found


def _loops(onwards: list[list[int]]) -> dict[int, set[int]]:
    """Returns the bodies of loops by the place that jumps back.

    A slow path that lies behind jumps back, too, but is not on a way from where it jumps to.
    """
    before: list[list[int]] = [[] for _ in onwards]
    for place, following in enumerate(onwards):
        for after in following:
            before[after].append(place)
    found = {}
    for place, following in enumerate(onwards):
        for head in following:
            if head <= place and place in (reached := _reached(head, onwards)):
                found[place] = reached & _reached(place, before)
    return found


def _shortest(
    listed: list[Instruction], onwards: list[list[int]], times: list[int], products: int | None
) -> int:
    """Returns the instructions of the shortest way to an exit that multiplies so much."""
    some = any(instruction.products for instruction in listed)
    queue, seen = [(times[0], 0, 0)], set()
    while queue:
        count, place, before = heapq.heappop(queue)
        if (place, before) in seen:
            continue
        seen.add((place, before))
        name, always, _, added = listed[place]
        multiplied = before + added * times[place]
        if products is None:
            multiplied = min(multiplied, 1)
        elif multiplied > products:
            continue
        enough = multiplied == (some if products is None else products)
        if name == "EXIT" and enough and (always or _ends_a_loop(listed, onwards, place)):
            return count
        for following in onwards[place]:
            heapq.heappush(queue, (count + times[following], following, multiplied))
    raise ValueError("the code has no such way to an exit: is it the disassembly of a kernel?")


def _ends_a_loop(listed: list[Instruction], onwards: list[list[int]], place: int) -> bool:
    """Returns whether nothing but the way around a loop follows an exit with a condition."""
    while len(onwards[place]) == 1:
        place = onwards[place][0]
    return not onwards[place] and listed[place].name == "BRA"
