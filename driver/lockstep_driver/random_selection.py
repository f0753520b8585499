"""Random selections of columns and gathered blocks, for cores that have an index memory."""

from __future__ import annotations

import numpy as np
from lockstep_isa.config import CoreConfig
from lockstep_isa.instructions import LOAD, STORE, VECTOR, Instruction, Memory, Source

from .builder import ProgramBuilder

#: Entries of the index memory that a random program uses, and columns from which it selects at most.
INDEX_USED, MOST_COLUMNS = 64, 100
#: Greatest distance of two rows that are gathered, in bus beats: they overlap, and cross borders of bursts anywhere.
_BEATS = 5


def random_selection(rng: np.random.Generator, config: CoreConfig, i: Instruction) -> Instruction:
    """The pass ``i``, which often selects some of its columns if it may."""
    if not config.selection or i.tiles != 1 or i.columns > MOST_COLUMNS or not rng.integers(3):
        return i
    most = min(i.columns, INDEX_USED)
    select = (1, most, int(rng.integers(1, most + 1)))[rng.integers(3)]
    first, lane = int(rng.integers(0, select + 1)) // 2, int(rng.integers(0, config.rows))
    return i.replace(
        select=select,
        select_to=int(rng.integers(0, INDEX_USED - select + 1)),
        select_lane=lane,
        select_more_lanes=int(rng.integers(0, config.rows - lane)),
        select_first=first,
        select_last=int(rng.integers(0, select - first + 1)) // 2,
    )


def random_gather(
    rng: np.random.Generator, config: CoreConfig, rows: int, row_bytes: int
) -> tuple[dict[str, int], int]:
    """Fields of a LOAD of ``rows`` rows of at most ``row_bytes`` bytes by which it gathers them, often none; and the
    bytes in which all rows are that it may read."""
    if not config.selection or rng.integers(2):
        return {}, rows * row_bytes
    stride = int(rng.integers(0, _BEATS + 1)) * config.bus_bytes
    fields = {"gather": 1, "gather_from": int(rng.integers(0, INDEX_USED - rows + 1)), "stride": stride}
    return fields, (MOST_COLUMNS - 1) * stride + row_bytes


def fill_index(builder: ProgramBuilder) -> None:
    """Every used entry of the index memory, once."""
    builder.emit(VECTOR, source=Source.VECTOR, columns=INDEX_USED, select=INDEX_USED)


def store_index(builder: ProgramBuilder, numbers: int, result: int) -> None:
    """The used entries as VECTOR words to ``result``; at address ``numbers`` are the words of 0, 1, 2 and so on."""
    word = builder.config.vector_word_bytes
    builder.emit(LOAD, memory=Memory.VECTOR, rows=INDEX_USED, address=numbers, stride=word, local_stride=1, gather=1)
    builder.emit(STORE, memory=Memory.VECTOR, words=INDEX_USED, address=result)
