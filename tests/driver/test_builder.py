"""The builder places the tokens that a program needs, and no others."""

from __future__ import annotations

import pytest
from lockstep_driver.builder import ProgramBuilder
from lockstep_isa.config import preset
from lockstep_isa.instructions import LOAD, MATRIX, STORE, VECTOR, Destination, Memory, Source, Unit
from lockstep_isa.program import Program, ProgramError, validate

TINY = preset("tiny")


def masks(program: Program, field: str) -> list[set[str]]:
    return [{u.name for u in Unit if i.values[field] >> u & 1} for i in program.instructions]


def test_a_reader_waits_for_the_writer_of_its_words() -> None:
    builder = ProgramBuilder(TINY)
    builder.emit(LOAD, memory=Memory.ACTIVATION, words=8, address=0)
    builder.emit(LOAD, memory=Memory.WEIGHT, words=8, address=256)
    builder.emit(MATRIX, depth=8)
    program = builder.finish()
    assert masks(program, "signal") == [set(), {"MATRIX"}, set()]
    assert masks(program, "wait") == [set(), set(), {"LOAD"}]


def test_a_writer_waits_for_earlier_readers() -> None:
    builder = ProgramBuilder(TINY)
    builder.emit(MATRIX, depth=8)
    builder.emit(LOAD, memory=Memory.WEIGHT, words=4, address=0, local=4)
    assert masks(builder.finish(), "wait") == [set(), {"MATRIX"}]


def test_disjoint_words_need_no_token() -> None:
    builder = ProgramBuilder(TINY)
    builder.emit(MATRIX, depth=8)
    builder.emit(LOAD, memory=Memory.WEIGHT, words=4, address=0, local=8)
    assert masks(builder.finish(), "wait") == [set(), set()]


def test_one_wait_covers_everything_before_it() -> None:
    builder = ProgramBuilder(TINY)
    builder.emit(LOAD, memory=Memory.VECTOR, words=4, address=0)
    builder.emit(LOAD, memory=Memory.VECTOR, words=4, address=256, local=4)
    builder.emit(VECTOR, source=Source.VECTOR, columns=4, x=4)
    builder.emit(VECTOR, source=Source.VECTOR, columns=4, x=0)
    assert masks(builder.finish(), "wait") == [set(), set(), {"LOAD"}, set()]


def test_what_a_program_stores_is_loaded_behind_it() -> None:
    builder = ProgramBuilder(TINY)
    builder.emit(STORE, memory=Memory.VECTOR, words=4, address=4096)
    builder.emit(LOAD, memory=Memory.WEIGHT, words=4, address=4096 + 32)
    builder.emit(LOAD, memory=Memory.WEIGHT, words=4, address=0, local=4)
    assert masks(builder.finish(), "wait") == [set(), {"STORE"}, set()]


def test_words_that_an_operand_may_reach_are_waited_for() -> None:
    builder = ProgramBuilder(TINY)
    words = builder.operand("words", 0, 8)
    builder.emit(LOAD, memory=Memory.VECTOR, words=0, words_operand=words, address=0)
    builder.emit(VECTOR, source=Source.VECTOR, x=8)
    builder.emit(VECTOR, source=Source.VECTOR, x=7)
    assert masks(builder.finish(), "wait") == [set(), set(), {"LOAD"}]


def test_a_block_that_an_operand_moves_touches_everything_on_its_way() -> None:
    builder = ProgramBuilder(TINY)
    place = builder.operand("place", 0, 100)
    builder.emit(LOAD, memory=Memory.VECTOR, words=2, address=0, local=10, local_operand=place)
    builder.emit(VECTOR, source=Source.VECTOR, x=112)
    builder.emit(VECTOR, source=Source.VECTOR, x=60)
    assert masks(builder.finish(), "wait") == [set(), set(), {"LOAD"}]


def test_a_block_is_taken_at_its_greatest_size_wherever_it_lies() -> None:
    builder = ProgramBuilder(TINY)
    words, place = builder.operand("words", 0, 4), builder.operand("place", 0, 100)
    variable = {"words_operand": words, "local_operand": place}
    builder.emit(LOAD, memory=Memory.VECTOR, words=0, address=0, local=10, **variable)
    builder.emit(VECTOR, source=Source.VECTOR, x=9)
    builder.emit(VECTOR, source=Source.VECTOR, x=114)
    builder.emit(VECTOR, source=Source.VECTOR, x=10)
    assert masks(builder.finish(), "wait") == [set(), set(), set(), {"LOAD"}]


def test_device_memory_is_ordered_from_the_least_address_to_the_greatest_end() -> None:
    builder = ProgramBuilder(TINY)
    offset = builder.operand("offset", 0, 1024)
    builder.emit(STORE, memory=Memory.VECTOR, words=4, address=4096, address_operand=offset, bytes=1)
    builder.emit(LOAD, memory=Memory.WEIGHT, words=4, address=4096 + 1024 + 4 * TINY.rows)
    builder.emit(LOAD, memory=Memory.WEIGHT, words=4, address=4096 + 1024 + 3 * TINY.rows)
    assert masks(builder.finish(), "wait") == [set(), set(), {"STORE"}]


def test_an_operand_must_be_declared_before_it_is_used() -> None:
    builder = ProgramBuilder(TINY)
    builder.operand("words", 0, 8)
    with pytest.raises(ProgramError, match=r"instruction 0 \(LOAD\) selects operand 2, 1 are declared"):
        builder.emit(LOAD, memory=Memory.VECTOR, words=1, words_operand=2, address=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"memory": Memory.VECTOR, "words": 8, "local": 65535}, "reaches word"),
        ({"memory": Memory.VECTOR, "words": 8, "address": 2}, "not a multiple of the bus width"),
    ],
)
def test_validation_names_the_instruction(fields: dict[str, int], message: str) -> None:
    builder = ProgramBuilder(TINY)
    builder.emit(LOAD, memory=Memory.PARAMETER, words=1, address=0)
    try:
        builder.emit(LOAD, **fields)
    except IndexError:
        pytest.fail("the builder must leave bounds to validation")
    with pytest.raises(ProgramError, match=f"instruction 1 .*{message}"):
        validate(TINY, builder.finish())


def test_validation_refuses_programs_that_wait_for_themselves() -> None:
    builder = ProgramBuilder(TINY)
    builder.emit(VECTOR, source=Source.ACCUMULATOR, destination=Destination.VECTOR, columns=4)
    builder.emit(MATRIX, depth=8)
    builder.emit(MATRIX, depth=8)
    with pytest.raises(ProgramError, match="result tiles"):
        validate(TINY, builder.finish())
    starved = ProgramBuilder(TINY)
    starved.emit(VECTOR, source=Source.ACCUMULATOR, destination=Destination.VECTOR, columns=4)
    with pytest.raises(ProgramError, match="waits for itself"):
        validate(TINY, starved.finish())


def test_validation_refuses_another_configuration() -> None:
    program = ProgramBuilder(preset("laptop")).finish()
    with pytest.raises(ProgramError, match="compile it for this core"):
        validate(TINY, program)
