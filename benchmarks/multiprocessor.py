"""One multiprocessor running a kernel's machine code, clock by clock: a simulation.

Every scheduler issues one instruction per clock, of the warp that can go first; loads, stores and
shared memory share one way of 128 bytes per clock. Programs start as others end; all do the same
(`warp_way.py`).
"""

from __future__ import annotations

import math

from warp_way import Costs, Step

# how many clocks the way to memory may be behind before nothing more is sent there
_QUEUE = 40


class _Warp:
    """Where a warp is, and when its next instruction may go."""

    def __init__(self, program: int) -> None:
        self.program = program
        self.restart(0)

    def restart(self, clock: int) -> None:
        """Begins at the first instruction."""
        self.place, self.ready, self.row, self.copied = 0, clock, 0, 0
        self.boards: list[int] = [0] * 6
        # when each group of asynchronous copies is there
        self.groups: list[int] = []
        self.waiting = self.ended = False


class _Multiprocessor:
    """Four schedulers, and what their warps share."""

    def __init__(self, steps: list[Step], warps: int, resident: int, costs: Costs) -> None:
        self.steps, self.warps, self.costs = steps, warps, costs
        everyone = [_Warp(number // warps) for number in range(resident * warps)]
        self.teams = [everyone[first : first + warps] for first in range(0, len(everyone), warps)]
        self.schedulers = [everyone[first::4] for first in range(4)]
        self.units: list[dict[str, int]] = [{} for _ in self.schedulers]
        self.next_clock, self.shared_free = [0] * 4, 0
        # of each program: warps at the barrier, and when its products are there
        self.arrived, self.products = [0] * resident, [0] * resident

    def choose(self, scheduler: int) -> tuple[int, _Warp] | None:
        """Returns when a scheduler's next instruction goes, and its warp, the most advanced one."""
        able = [w for w in self.schedulers[scheduler] if not (w.waiting or w.ended)]
        if not able:
            return None
        clock, _, number = min(
            (self._earliest(warp, scheduler), -warp.place, number)
            for number, warp in enumerate(able)
        )
        return clock, able[number]

    def _earliest(self, warp: _Warp, scheduler: int) -> int:
        step = self.steps[warp.place]
        clock = max(warp.ready, self.next_clock[scheduler])
        clock = max(clock, self.units[scheduler].get(step.unit, 0))
        if waits := step.code.waits:
            clock = max(clock, *(t for k, t in enumerate(warp.boards) if waits >> k & 1))
        if step.shared:
            clock = max(clock, self.shared_free - _QUEUE)
        if step.kind == "DEPBAR" and len(warp.groups) > step.code.groups:
            clock = max(clock, warp.groups[-1 - step.code.groups])
        if step.kind == "WARPGROUP" and "DEPBAR" in step.code.modifiers:
            clock = max(clock, self.products[warp.program])
        return clock

    def issue(self, scheduler: int, clock: int, warp: _Warp) -> None:
        """Lets a warp's next instruction go."""
        step = self.steps[warp.place]
        units, code = self.units[scheduler], step.code
        units[step.unit], self.next_clock[scheduler] = clock + step.busy, clock + 1
        done = clock + step.latency
        if step.shared:
            done = self._to_memory(step, clock, warp)
        elif step.kind == "LDGDEPBAR":
            warp.groups.append(warp.copied)
        elif step.kind == "IGMMA":
            start = max(clock, units.get("tensor core", 0))
            units["tensor core"] = start + code.products * self.costs.product
            self.products[warp.program] = max(
                self.products[warp.program], units["tensor core"] + 30
            )
        if code.writes < 6:
            warp.boards[code.writes] = max(warp.boards[code.writes], done)
        if code.reads < 6:
            read = max(clock, self.shared_free if step.shared else 0) + 10
            warp.boards[code.reads] = max(warp.boards[code.reads], read)
        warp.ready, warp.place = clock + max(1, code.stall), warp.place + 1
        warp.ended = warp.place == len(self.steps)
        if step.kind == "BAR":
            self._arrive(warp, clock)

    def _to_memory(self, step: Step, clock: int, warp: _Warp) -> int:
        """Returns when a load is there or a store is done with."""
        self.shared_free = max(clock, self.shared_free) + step.shared
        done = self.shared_free + (self.costs.l2 if step.kind == "row" else step.latency)
        if step.kind == "row":
            warp.row = done
        elif step.kind == "same row":
            done = max(done, warp.row)
        elif step.kind == "LDGSTS":
            warp.copied = max(warp.copied, done)
        return done

    def _arrive(self, warp: _Warp, clock: int) -> None:
        warp.waiting = True
        self.arrived[warp.program] += 1
        if self.arrived[warp.program] == self.warps:
            self.arrived[warp.program] = 0
            for one in self.teams[warp.program]:
                one.waiting = False
                one.ready = max(one.ready, clock + self.costs.barrier)

    def restart(self, program: int, clock: int) -> None:
        """Puts another program where one has ended."""
        self.products[program] = 0
        for warp in self.teams[program]:
            warp.restart(clock + self.costs.start)


def simulate(steps: list[Step], warps: int, resident: int, programs: int, costs: Costs) -> int:
    """Returns the clocks that so many programs take, `resident` of `warps` warps at a time."""
    resident, clock = min(resident, programs), 0
    chip, started = _Multiprocessor(steps, warps, resident, costs), resident
    # when each scheduler may have something to do, at the earliest
    times: list[float] = [0.0] * 4
    while min(times) < math.inf:
        scheduler = times.index(min(times))
        found = chip.choose(scheduler)
        if found is None or found[0] > times[scheduler]:
            times[scheduler] = math.inf if found is None else found[0]
            continue
        clock, warp = found
        chip.issue(scheduler, clock, warp)
        ended = warp.ended and all(one.ended for one in chip.teams[warp.program])
        if ended and started < programs:
            started += 1
            chip.restart(warp.program, clock)
        if ended or steps[warp.place - 1].kind == "BAR":
            # warps of other schedulers may go on
            times = [min(time, clock) for time in times]
    return clock
