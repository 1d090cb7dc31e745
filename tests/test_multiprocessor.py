"""A multiprocessor with instructions of known costs, clock by clock by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

cards = pytest.importorskip("cards")
multiprocessor = pytest.importorskip("multiprocessor")
warp_way = pytest.importorskip("warp_way")
simulate = pytest.importorskip("simulate")

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
COSTS = warp_way.Costs(l1=30, l2=300, product=4, barrier=20, start=200)
NONE = 7


def listing(*lines) -> str:
    """A disassembly of (instruction, stall, scoreboard written, scoreboards waited for, and the one
    set when operands are read)."""
    text = []
    for place, (line, stall, writes, waits, *reads) in enumerate(lines):
        upper = (stall | (reads or [NONE])[0] << 8 | writes << 5 | waits << 11) << 41
        text.append(f"        /*{16 * place:04x}*/                   {line} ;   "
                    f"/* 0x0000000000007b1d */\n{' ' * 100}/* 0x{upper:016x} */")
    return "\n".join(text)


def clocks(*lines, warps=4, resident=1, programs=1, products=0) -> int:
    """When the last instruction is issued."""
    way = warp_way.shortest_way(warp_way.disassembled(listing(*lines)), products)
    steps = warp_way.steps_of(way, COSTS)
    return multiprocessor.simulate(steps, warps, resident, programs, COSTS)


EXIT = ("EXIT", 5, NONE, 0)


def plain(line: str, stall: int = 1):
    return line, stall, NONE, 0


def test_a_scheduler_issues_one_instruction_a_clock() -> None:
    ten = [plain("MOV R1, R2")] * 10
    # four warps, each on a scheduler of its own
    assert clocks(*ten, EXIT) == 10
    # eight: two on each, one of which fills what the other leaves
    assert clocks(*ten, EXIT, warps=8) == 21
    assert clocks(*[plain("MOV R1, R2", stall=2)] * 10, EXIT) == 20
    assert clocks(*[plain("MOV R1, R2", stall=2)] * 10, EXIT, warps=8) == 21


def test_integers_take_their_unit_for_two_clocks() -> None:
    assert clocks(*[plain("LOP3.LUT R1, R2")] * 10, EXIT) == 19
    # what takes another unit goes between
    both = [plain("LOP3.LUT R1, R2"), plain("FADD R3, R4")] * 10
    assert clocks(*both, EXIT) == 20


def test_a_load_is_waited_for_where_it_is_used() -> None:
    load, use = ("LDG.E R1, [R2]", 1, 0, 0), ("FADD R3, R1", 1, NONE, 1)
    far = [plain("MOV R5, R6")] * 40
    # a clock to be sent, thirty to be there
    assert clocks(*far, load, use, EXIT, warps=1) == 40 + 1 + 30 + 1
    # what does not use it goes on
    assert clocks(*far, load, *[plain("MOV R5, R6")] * 20, use, EXIT, warps=1) == 40 + 1 + 30 + 1
    other = ("FADD R3, R1", 1, NONE, 2)
    assert clocks(*far, load, other, EXIT, warps=1) == 40 + 2


def test_memory_is_one_way_for_all_warps() -> None:
    loads = [("LDG.E.128 R1, [R2]", 1, 0, 0)] * 40
    use = ("FADD R3, R1", 1, NONE, 1)
    # 512 bytes each, 128 per clock; those at the start are taken to be constants, 60 clocks away
    last = 4 * 4 * 40
    assert last <= clocks(*loads, use, EXIT) <= last + 70


def test_a_barrier_waits_for_the_last_warp() -> None:
    """The warp that has to share its scheduler is late."""
    ten = [plain("MOV R1, R2")] * 10
    assert clocks(*ten, plain("BAR.SYNC 0x0"), EXIT) == 10 + 20
    # it arrives at clock 21, and leaves a clock after the other one
    assert clocks(*ten, plain("BAR.SYNC 0x0"), EXIT, warps=5) == 21 + 20 + 1


def test_programs_follow_each_other() -> None:
    ten = [plain("MOV R1, R2")] * 10
    one = clocks(*ten, EXIT)
    assert clocks(*ten, EXIT, programs=3) == 3 * one + 2 * 200
    # two at a time share the schedulers
    assert clocks(*ten, EXIT, programs=2, resident=2) == 2 * one + 1


def test_products_take_the_tensor_core() -> None:
    product = "IMMA.16832.S8.S8 R8, R4, R6, R8"
    assert clocks(*[plain(product)] * 10, EXIT, products=10) == 9 * 4 + 1
    # four warps' together, and a wait for them: 64 x 64 x 32 are eight of the smaller ones a warp
    wide = plain("IGMMA.64x64x32.S8.S8 R8, gdesc[UR4], R8")
    wait = plain("WARPGROUP.DEPBAR.LE gsb0, 0x0")
    assert clocks(wide, wide, wait, EXIT, products=16) == 2 * 8 * 4 + 30 + 1


def test_the_way_goes_round_a_loop_until_all_is_added_up() -> None:
    code = listing(
        plain("MOV R1, R2"), plain("IMMA.16832.S8.S8 R8, R4, R6, R8"), plain("@!P0 BRA 0x10"),
        plain("STG.E [R2], R8"), EXIT,
    )
    listed = warp_way.disassembled(code)
    names = [one.name for one in warp_way.shortest_way(listed, 3)]
    assert names == ["MOV", *["IMMA", "BRA"] * 3, "STG", "EXIT"]
    with pytest.raises(ValueError, match="adds up 0 products"):
        warp_way.shortest_way(listed, 0)


def test_copies_ahead_are_waited_for_group_by_group() -> None:
    copy, group = plain("LDGSTS.E.128 [R1], [R2]"), plain("LDGDEPBAR")
    code = [copy, group, copy, group]
    # all but one group, or all of them; a copy takes four clocks of the way, then 60
    one = clocks(*code, plain("DEPBAR.LE SB0, 0x1"), EXIT, warps=1)
    both = clocks(*code, plain("DEPBAR.LE SB0, 0x0"), EXIT, warps=1)
    assert (one, both) == (4 + 60 + 1, 8 + 60 + 1)


@pytest.mark.parametrize("name", cards.CARDS)
def test_tensor_cores_keep_the_published_pace(name) -> None:
    card = cards.CARDS[name]
    clocks = simulate.costs_of(card).product
    products = 4 * card.multiprocessors * card.gigahertz * 1e9 / clocks
    assert 2 * warp_way.PRODUCT * products == pytest.approx(card.tera_ops * 1e12, rel=0.02)


def test_operands_may_be_overwritten_once_they_are_read() -> None:
    """A store reads what it stores ten clocks after its turn on the way to memory."""
    far = [plain("MOV R5, R6")] * 40
    store, use = ("STS.128 [R2], R4", 1, NONE, 0, 2), ("MOV R4, R1", 1, NONE, 1 << 2)
    assert clocks(*far, store, use, EXIT, warps=1) == 40 + 4 + 10 + 1


def test_codes_of_a_new_row_come_from_l2() -> None:
    """Nine taps: each row's first one misses L1, and the next two wait for no less than it."""
    loads = [(f"@P0 LDG.E.128 R{r}, [R2]", 1, 0, 0) for r in range(9)]
    use = ("IMMA.16832.S8.S8 R8, R4, R6, R8", 1, NONE, 1)
    # the last row's first one is sent after six others, of four clocks each
    assert clocks(*loads, use, EXIT, warps=1, products=1) == 7 * 4 + 300 + 1
    # without a condition they are weights, from L1: the last of nine is sent after 32 clocks
    far = [plain("MOV R5, R6")] * 40
    weights = [(f"LDG.E.128 R{r}, [R2]", 1, 0, 0) for r in range(9)]
    assert clocks(*far, *weights, use, EXIT, warps=1, products=1) == 40 + 9 * 4 + 30 + 1


def test_what_is_added_to_a_sum_comes_from_l2() -> None:
    product = plain("IMMA.16832.S8.S8 R8, R4, R6, R8")
    load, use = ("@P0 LDG.E.64 R1, [R2]", 1, 1, 0), ("FADD R3, R1", 1, NONE, 2)
    # two clocks of the way for 256 bytes
    assert clocks(product, load, use, EXIT, warps=1, products=1) == 1 + 2 + 300 + 1


def test_slow_units() -> None:
    for line, busy in (("MUFU.RCP R1, R2", 8), ("IMAD R1, R2, R3, R4", 2), ("I2F R1, R2", 2)):
        assert clocks(*[plain(line)] * 5, EXIT) == 4 * busy + 1, line
    # what a reciprocal gives is there twenty clocks later
    use = ("FADD R3, R1", 1, NONE, 1)
    assert clocks(("MUFU.RCP R1, R2", 1, 0, 0), use, EXIT) == 20 + 1


@pytest.mark.parametrize(("arch", "registers", "shared", "warps", "expected"), [
    # registers: 65536 / (128 * 96); shared memory; warps; programs
    ("sm_90", 96, 0, 4, 5), ("sm_89", 96, 24 * 1024, 4, 4), ("sm_89", 32, 0, 8, 6),
    ("sm_86", 16, 0, 1, 16), ("sm_90", 72, 0, 4, 7), ("sm_80", 73, 40 * 1024, 4, 4),
])
def test_how_many_programs_fit(arch, registers, shared, warps, expected) -> None:
    row = {"arch": arch, "registers": registers, "shared_bytes": shared, "num_warps": warps}
    assert simulate.resident(row) == expected


# shares of the measured time: kernels of bc3feab wait for what the simulation does not know of
@pytest.mark.parametrize(
    ("suffix", "least", "median"), [("_at_6eb4a23", 0.65, 0.8), ("", 0.5, 0.65)]
)
def test_what_was_simulated_is_near_what_an_h200_measured(suffix, least, median) -> None:
    """All 21 kinds of convolutions of the plan that it ran, none left out, as it measured them."""
    found = json.loads((RESULTS / f"simulation_check_h200{suffix}.json").read_text())
    measured = json.loads((RESULTS / f"gpu_launches_h200_00000{suffix}.json").read_text())
    assert found["commit"] == measured["environment"]["commit"]
    times: dict[str, list[float]] = {}
    for launch, time in measured["launches_us"]:
        times.setdefault(launch.removeprefix("crop-96: "), []).append(time)
    rows = {row["kernel"]: row for row in found["kernels"]}
    assert len(rows) == 21
    for one in simulate.convolutions():
        own = [times[simulate._launch(one)].pop(0) for _ in range(one.times)]
        assert rows[one.label]["measured_us"] == pytest.approx(sum(own) / len(own), abs=0.01)
    known = "begin", "down 2", "stage 3 block, second", "decoder, first"
    assert not any(times[name] for name in known)
    assert least < found["least"] and median < found["median"] <= found["most"] < 1.1
