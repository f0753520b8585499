"""Selection of columns and gathered rows: their meaning, written out element by element, and their static checks."""

from __future__ import annotations

import math

import numpy as np
import pytest
from lockstep_driver.builder import ProgramBuilder
from lockstep_isa.choices import Internal
from lockstep_isa.config import preset
from lockstep_isa.executor import GoldenCore
from lockstep_isa.instructions import (
    INDEX_ENTRIES,
    LOAD,
    STORE,
    VECTOR,
    Destination,
    Instruction,
    Memory,
    Source,
    Tap,
    ThirdMultiply,
    Unit,
    decode,
    encode,
)
from lockstep_isa.program import Program, ProgramError, Region, reads, validate, writes

from tests.support import assert_same_bits

CONFIG = preset("tiny")
ROWS = CONFIG.rows


def selection(**fields: int) -> Instruction:
    return Instruction(VECTOR, **{"source": Source.VECTOR, "columns": 20, "select": 5, **fields})


def rank(value: float) -> tuple[int, float, int]:
    """What numbers are sorted by: NaN, then values, and of zeros the negative one first."""
    return (0, 0.0, 0) if math.isnan(value) else (1, value, int(math.copysign(1, value)))


def greatest(x: np.ndarray, i: Instruction) -> list[int]:
    """The selected columns of ``x[columns, rows]``, one after the other."""
    columns = range(len(x))
    forced = [j for j in columns if j < i.select_first or j >= len(x) - i.select_last]
    lanes = range(i.select_lane, i.select_lane + i.select_more_lanes + 1)
    values = {j: max(rank(float(x[j, lane])) for lane in lanes) for j in columns}
    chosen = list(forced)
    while len(chosen) < i.select:
        rest = [j for j in columns if j not in chosen]
        best = max(values[j] for j in rest)
        chosen.append(next(j for j in rest if values[j] == best))
    return sorted(chosen)


def nasty(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Values with many ties, zeros of both signs, infinities and NaNs of both signs."""
    some = [0.0, -0.0, 1.0, -1.0, 1.5, -2.5, np.inf, -np.inf, np.nan, 3e38, -3e38, 2.0**-126]
    x = rng.choice(np.array(some, np.float32), shape)
    return np.where(rng.random(shape) < 0.1, -x, x).astype(np.float32)


@pytest.mark.parametrize("seed", range(8))
def test_the_greatest_columns_are_listed_in_ascending_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(20):
        core = GoldenCore(CONFIG, np.zeros(16, np.uint8))
        columns = int(rng.integers(1, 40))
        select = int(rng.integers(1, columns + 1))
        first = int(rng.integers(0, min(select, 3) + 1))
        lane = int(rng.integers(0, ROWS))
        core.vector[:columns] = x = nasty(rng, (columns, ROWS))
        core.index[:] = 7777
        i = selection(
            columns=columns,
            select=select,
            select_to=int(rng.integers(0, 100)),
            select_lane=lane,
            select_more_lanes=int(rng.integers(0, ROWS - lane)),
            select_first=first,
            select_last=int(rng.integers(0, select - first + 1)),
        )
        core.execute(i)
        expected = np.full(INDEX_ENTRIES, 7777)
        expected[i.select_to : i.select_to + select] = greatest(x, i)
        assert (core.index == expected).all(), f"{i!r}: {core.index[i.select_to :][:select]}"


@pytest.mark.parametrize("tap", Tap)
def test_values_are_those_that_a_pass_writes(tap: Tap) -> None:
    core = GoldenCore(CONFIG, np.zeros(16, np.uint8))
    core.parameter[:6] = np.arange(6)[:, None]
    core.vector[:6] = -1
    core.execute(
        Instruction(
            VECTOR,
            source=Source.PARAMETER,
            destination=Destination.VECTOR,
            columns=6,
            mul3=ThirdMultiply.Y,
            tap=tap,
            to=100,
            select=2,
        )
    )
    assert core.index[:2].tolist() == ([4, 5] if tap == Tap.BEFORE else [0, 1])
    assert_same_bits(core.vector[105], np.full(ROWS, 5 if tap == Tap.BEFORE else -5, np.float32))


def test_a_gather_takes_the_listed_rows() -> None:
    memory = np.arange(4096, dtype=np.uint32) % 251
    core = GoldenCore(CONFIG, memory.astype(np.uint8))
    core.index[3:6] = [0, 5, 9]
    fields = {"rows": 3, "words": 2, "address": 64, "stride": 100, "local": 10, "local_stride": 3}
    core.execute(Instruction(LOAD, memory=Memory.WEIGHT, gather=1, gather_from=3, **fields))
    for row, number in enumerate((0, 5, 9)):
        start = 64 + 100 * number
        expected = memory[start : start + 2 * ROWS].astype(np.uint8).view(np.int8).reshape(2, ROWS)
        assert_same_bits(core.weight[10 + 3 * row : 12 + 3 * row], expected)


def test_instructions_with_selection_survive_encoding() -> None:
    i = selection(
        select_to=9, select_lane=1, select_more_lanes=2, select_first=1, select_last=255, select_lane_operand=3
    )
    assert decode(encode(i)) == i
    gather = Instruction(LOAD, gather=1, gather_from=1000)
    assert decode(encode(gather)) == gather


def test_lists_are_words_that_are_written_and_read() -> None:
    assert Region(Internal.INDEX, 8, 5) in writes(CONFIG, selection(select_to=8))
    assert reads(CONFIG, Instruction(LOAD, gather=1, gather_from=8, rows=5)) == [Region(Internal.INDEX, 8, 5)]
    assert not set(Internal) & {int(m) for m in Memory}


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        (selection(tiles=2), "it selects columns of 2 row tiles; a selection is of one"),
        (selection(select=21), "it selects 21 of 20 columns; legal are select <= columns <= 1024"),
        (selection(columns=1025), "it selects 5 of 1025 columns"),
        (selection(select_first=3, select_last=3), "select_first [+] select_last = 6 is more than select = 5"),
        (selection(select_lane=2, select_more_lanes=2), "lanes 2 to 4 do not all exist, a word has 4"),
        (selection(select_to=1020), "reaches word 1024 of the INDEX memory, which has 1024"),
        (selection(select=0, select_to=1), "select_to has no meaning where select is 0"),
        (Instruction(LOAD, gather=1, gather_from=1023, rows=2), "reaches word 1024 of the INDEX memory"),
        (Instruction(LOAD, gather_from=1), "gather_from has no meaning without gather"),
    ],
)
def test_validation_refuses_selections_that_have_no_meaning(instruction: Instruction, message: str) -> None:
    validate(CONFIG, Program(CONFIG.crc, (selection(), Instruction(LOAD, gather=1, gather_from=1022, rows=2))))
    with pytest.raises(ProgramError, match=rf"instruction 0 \({instruction.type.name}\):? .*{message}"):
        validate(CONFIG, Program(CONFIG.crc, (instruction,)))


@pytest.mark.parametrize("instruction", [selection(), Instruction(LOAD, gather=1)])
def test_a_core_without_an_index_memory_refuses_them(instruction: Instruction) -> None:
    core = preset("ulx3s")
    with pytest.raises(ProgramError, match="core 'ulx3s' has no index memory"):
        validate(core, Program(core.crc, (instruction,)))


def test_a_selection_may_never_have_too_few_columns() -> None:
    def program(least: int) -> Program:
        builder = ProgramBuilder(CONFIG)
        columns = builder.operand("columns", least, 64)
        builder.emit(VECTOR, source=Source.VECTOR, columns=0, columns_operand=columns, select=5)
        return builder.finish()

    validate(CONFIG, program(5))
    with pytest.raises(ProgramError, match=r"\(VECTOR\): it selects 5 columns, but may have only 0"):
        validate(CONFIG, program(0))


def waits(builder: ProgramBuilder) -> list[set[str]]:
    return [{u.name for u in Unit if i.wait >> u & 1} for i in builder.finish().instructions]


def test_a_gather_waits_for_its_list_and_the_next_list_for_the_gather() -> None:
    builder = ProgramBuilder(CONFIG)
    passed = {"source": Source.VECTOR, "columns": 20, "select": 5}
    builder.emit(VECTOR, **passed)
    builder.emit(LOAD, memory=Memory.WEIGHT, gather=1, gather_from=5, rows=5, address=0)
    builder.emit(LOAD, memory=Memory.WEIGHT, gather=1, gather_from=4, rows=5, address=0)
    builder.emit(VECTOR, **passed, select_to=10)
    builder.emit(VECTOR, **passed, select_to=8)
    assert waits(builder) == [set(), set(), {"VECTOR"}, set(), {"LOAD"}]


def test_a_gather_reads_what_its_list_may_name_and_no_more() -> None:
    def loads(columns: int, **fields: int) -> set[str]:
        builder = ProgramBuilder(CONFIG)
        builder.emit(STORE, memory=Memory.VECTOR, address=4096 + 64 * 20)
        builder.emit(VECTOR, source=Source.VECTOR, columns=columns, select=5)
        builder.emit(LOAD, memory=Memory.WEIGHT, gather=1, rows=5, address=4096, stride=64, **fields)
        return waits(builder)[2]

    assert loads(20) == {"VECTOR"}
    assert loads(21) == {"VECTOR", "STORE"}
    # Nobody knows what stands in an entry that the program does not write.
    assert loads(20, gather_from=1) == {"VECTOR", "STORE"}
