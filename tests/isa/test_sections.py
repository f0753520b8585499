"""Maxima of sections of a row's columns: their meaning, written out element by element, and their static checks."""

from __future__ import annotations

import numpy as np
import pytest
from lockstep_driver.builder import ProgramBuilder
from lockstep_isa.config import preset
from lockstep_isa.executor import GoldenCore
from lockstep_isa.instructions import (
    LOAD,
    SECTIONS,
    VECTOR,
    Destination,
    FirstMultiply,
    Function,
    Instruction,
    Maximum,
    Memory,
    SecondAdd,
    SecondMultiply,
    Source,
    ThirdMultiply,
    Unit,
    decode,
    disassemble,
    encode,
)
from lockstep_isa.program import Program, ProgramError, Region, reads, validate, writes

from tests.support import assert_same_bits

CONFIG = preset("tiny")
ROWS = CONFIG.rows


def sections(**fields: int) -> Instruction:
    defaults = {"source": Source.VECTOR, "columns": 20, "maximum": Maximum.ABSOLUTE, "max_columns": 4}
    return Instruction(VECTOR, **(defaults | fields))


@pytest.mark.parametrize("size", SECTIONS)
@pytest.mark.parametrize("resume", [0, 1])
def test_each_section_has_the_greatest_magnitude_of_its_columns(size: int, resume: int) -> None:
    rng = np.random.default_rng(size)
    for columns in (1, size - 1, size, size + 1, 3 * size - 2, 150):
        core = GoldenCore(CONFIG, np.zeros(16, np.uint8))
        tiles, words = int(rng.integers(1, 4)), -(-columns // size)
        x = rng.normal(size=(tiles, columns, ROWS)).astype(np.float32)
        core.vector[: tiles * columns] = x.reshape(-1, ROWS)
        before = np.abs(rng.normal(size=(300, ROWS))).astype(np.float32)
        core.parameter[:300] = before
        fields = {"tiles": tiles, "x_stride": columns, "max_to": 7, "max_continue": resume}
        core.execute(sections(columns=columns, max_columns=size, **fields))
        expected = before.copy()
        for tile in range(tiles):
            for section in range(words):
                word = 7 + tile * words + section
                for lane in range(ROWS):
                    values = [abs(x[tile, j, lane]) for j in range(columns) if j // size == section]
                    expected[word, lane] = max([*values, before[word, lane]] if resume else values)
        assert_same_bits(core.parameter[:300], expected)


def test_exponents_have_sections_too() -> None:
    core = GoldenCore(CONFIG, np.zeros(16, np.uint8))
    core.vector[:8] = np.array([1, 5, -3, 2, -7, -9, -8, -20], np.float32)[:, None]
    core.execute(sections(columns=8, maximum=Maximum.EXPONENT, function=Function.SCORE))
    assert core.parameter[:2].view(np.int32).tolist() == [[5] * ROWS, [-7] * ROWS]


def test_sections_survive_encoding_and_are_shown() -> None:
    i = sections(max_columns=64, select=3, select_lane_operand=5)
    assert decode(encode(i)) == i
    assert "max_columns=64" in disassemble(i)


def test_words_are_those_of_all_sections() -> None:
    i = sections(tiles=3, columns=21, max_to=9, max_continue=1, x_stride=21)
    words = Region(Memory.PARAMETER, 9, 18)
    assert words in writes(CONFIG, i)
    assert words in reads(CONFIG, i)


def test_what_takes_the_maxima_waits_for_the_last_of_them() -> None:
    def waits(word: int) -> bool:
        builder = ProgramBuilder(CONFIG)
        builder.emit(LOAD, memory=Memory.VECTOR, words=20, address=0)
        builder.emit(VECTOR, **{k: v for k, v in sections(max_to=9).values.items() if k != "opcode"})
        builder.emit(LOAD, memory=Memory.PARAMETER, address=0, local=word)
        return bool(builder.finish().instructions[2].wait >> Unit.VECTOR & 1)

    assert [waits(word) for word in (8, 9, 13, 14)] == [False, True, True, False]


RESUMES = {"max_continue": 1}


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        (sections(max_columns=6), "max_columns is 6; legal are 0, 4, 8, 16, 32, 64"),
        (sections(max_columns=2), "max_columns is 2; legal are"),
        (sections(maximum=Maximum.NONE), "max_columns has no meaning without a maximum"),
        (sections(destination=Destination.PARAMETER), "cannot both go to PARAMETER"),
        (sections(source=Source.PARAMETER, **RESUMES), "do not continue where x comes from PARAMETER"),
        (sections(source=Source.INTEGER, **RESUMES), "do not continue where x comes from PARAMETER"),
        (
            sections(mul2=SecondMultiply.COLUMN0, mul3=ThirdMultiply.COLUMN2, **RESUMES),
            "it has 2 kinds of column words; where maxima of sections continue, PARAMETER has time for one",
        ),
        (sections(max_to=CONFIG.parameter_words - 4), f"reaches word {CONFIG.parameter_words} of the PARAMETER memory"),
    ],
)
def test_validation_names_sections_that_cannot_be(instruction: Instruction, message: str) -> None:
    with pytest.raises(ProgramError, match=rf"instruction 0 \(VECTOR\):? .*{message}"):
        validate(CONFIG, Program(CONFIG.crc, (instruction,)))


def test_validation_takes_what_is_next_to_that() -> None:
    good = [
        sections(source=Source.PARAMETER),
        sections(mul1=FirstMultiply.COLUMN0, mul2=SecondMultiply.COLUMN0, **RESUMES),
        sections(mul1=FirstMultiply.COLUMN0, add2=SecondAdd.COLUMN1),
        sections(max_to=CONFIG.parameter_words - 5, destination=Destination.VECTOR, to=100),
        *(sections(max_columns=size) for size in SECTIONS),
    ]
    validate(CONFIG, Program(CONFIG.crc, tuple(good)))


def test_cores_that_have_no_sections_refuse_them() -> None:
    for core, fields, message in (
        (preset("ulx3s"), {}, "it takes a maximum of each 4 columns; core 'ulx3s' takes that of a row only"),
        (CONFIG.replace(rows=2, columns=2, lanes=2, zero_skipping=False), RESUMES, "continue on cores of at least 4"),
    ):
        with pytest.raises(ProgramError, match=message):
            validate(core, Program(core.crc, (sections(**fields),)))
