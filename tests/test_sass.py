"""Instructions of hand-written disassemblies, counted by hand."""

import pytest
from sass import issued


def listing(*lines: str) -> str:
    """Puts instructions at addresses 0x0010 apart, as cuobjdump prints them."""
    return "\n".join(
        f"        /*{16 * place:04x}*/                   {line} ;      /* 0x000fe40000000f00 */"
        for place, line in enumerate(lines)
    )


def test_straight_on() -> None:
    assert issued(listing("MOV R1, c[0x0][0x28]", "@P0 EXIT", "FADD R2, R2, R3", "EXIT")) == 4
    # what follows the exit is padding
    assert issued(listing("MOV R1, R2", "EXIT", "BRA 0x20", "NOP", "NOP")) == 2


def test_the_slow_path_of_a_division_is_passed_by() -> None:
    code = listing(
        "MUFU.RCP R0, R1", "@!P0 BRA 0x40", "MOV R2, 0x30", "CALL.REL.NOINC 0x60",
        "FADD R0, R0, R1", "EXIT", "FMUL R0, R0, R0", "RET.REL.NODEC R2 0x0",
    )
    assert issued(code) == 4


def test_a_loop_with_products_runs_as_often_as_is_said() -> None:
    code = listing(
        "MOV R1, R2", "@P1 BRA 0x50", "LDSM.16.M88.4 R4, [R3]", "IMMA.16832.S8.S8 R8, R4, R6, R8",
        "@!P0 BRA 0x20", "STG.E [R2], R8", "EXIT",
    )
    # the guard of a loop that never runs is no way: it multiplies nothing
    assert issued(code, steps=1) == 7
    assert issued(code, steps=9) == 4 + 9 * 3


def test_a_loop_may_hold_the_exit() -> None:
    code = listing(
        "@P0 EXIT", "MOV R1, R2", "@P1 BRA 0x40", "FADD R0, R0, R0", "STG.E [R2], R0", "@P2 EXIT",
        "MOV R1, R2", "BRA 0x20",
    )
    # not the first one, which is for programs without work
    assert issued(code) == 5


def test_a_slow_path_that_lies_behind_is_no_loop() -> None:
    code = listing(
        "@P0 BRA 0x50", "MOV R1, R2", "IMMA R8, R4, R6, R8", "STG.E [R2], R8", "EXIT",
        "CALL.REL.NOINC 0x70", "BRA 0x10", "RET.REL.NODEC R2 0x0",
    )
    assert issued(code, steps=1) == issued(code, steps=18) == 5


def test_the_shorter_of_two_ways_with_products() -> None:
    code = listing(
        "@P0 BRA 0x40", "IMMA R8, R4, R6, R8", "@!P1 BRA 0x10", "BRA 0x70",
        "IMMA R8, R4, R6, R8", "IMMA R8, R4, R6, R8", "NOP", "EXIT",
    )
    assert issued(code, steps=1) == 5
    assert issued(code, steps=2) == 5
    assert issued(code, steps=3) == 5
    assert issued(code.replace("NOP", "FADD R0, R0, R0"), steps=9) == 5


def test_far_and_doubly_conditional_branches() -> None:
    tail = "BRA 0x0", "EXIT"
    assert issued(listing("FADD R0, R0, R1", "@!P5 CALL.REL.NOINC 0x30", *tail)) == 3
    assert issued(listing("FADD R0, R0, R1", "@!P1 BRA !P4, 0x30", *tail)) == 3
    # as other versions print it
    assert issued(listing("FADD R0, R0, R1", "BRA.U !UP0, 0x30   &req={1} ?trans1", *tail)) == 3


def test_the_way_that_multiplies_as_much_as_is_said() -> None:
    """A loop over parts of a tile, and the whole of it: 2 products of 16 x 8 x 32."""
    code = listing(
        "@P0 BRA 0x50", "IMMA.16832.S8.S8 R8, R4, R6, R8", "STG.E [R2], R8", "@P1 EXIT",
        "BRA 0x10", "IMMA.16832.S8.S8 R8, R4, R6, R8", "IMMA.16832.S8.S8 R8, R4, R6, R8",
        "STG.E [R2], R8", "EXIT",
    )
    assert issued(code) == 4
    assert issued(code, products=2 * 16 * 8 * 32) == 5
    # 64 pixels, 16 channels and 32 of K by four warps together
    together = code.replace("IMMA.16832.S8.S8", "IGMMA.64x16x32.S8.S8")
    assert issued(together, products=2 * 16 * 16 * 32) == 5
    with pytest.raises(ValueError, match="no such way to an exit"):
        issued(code, products=3 * 16 * 8 * 32)


def test_no_exit() -> None:
    with pytest.raises(ValueError, match="no such way to an exit"):
        issued(listing("FADD R0, R0, R1", "BRA 0x0"))
