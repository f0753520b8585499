"""When things happen in the VECTOR unit: the stages of its pipeline, and the exact cycles of a pass without stalls.

A beat is one column, one group of ``lanes`` rows of it, or two columns side by side. Its words are requested in stage
0, ISSUE cycles behind the decision to issue it, and behind that it never stalls; stages are cycles.
"""

from __future__ import annotations

from lockstep_isa.config import CoreConfig
from lockstep_isa.instructions import (
    Destination,
    FirstAdd,
    FirstMultiply,
    Function,
    Instruction,
    SecondAdd,
    SecondMultiply,
    Source,
    ThirdMultiply,
)

#: From the issue of a beat to its stage 0.
ISSUE = 1
#: First stage of each step; a step ends where the next one begins.
SELECT = 1  #: memory data are there; lanes take their operands
CONVERT = 2
ADD1 = 6
MUL1 = 11
MUL2 = 15
ADD2 = 19
FUNCTION = 24
MUL3 = 53
RESULT = 57
ROUNDED = 59
#: In the cycle DEPTH behind the last beat nothing of it is left in the pipeline.
DEPTH = 60

#: Partial sums of a row.
PARTIALS = 64
#: From the read of a partial sum to the first read that sees it changed.
SUM_TURNAROUND = 8
#: Sums enter the row sum here.
SUM = MUL3

#: Digits of a value, the upper ones first, by which a selection finds the least of the greatest values.
SELECT_DIGITS, SELECT_DIGIT_BITS = 8, 4

#: What a selection takes beyond its passes: the lanes' first register, the way of the last column to the index memory.
SELECTION = 5

#: Rows whose running maximum waits in front of the maxima, in units of their least pitch, bound this.
CONTINUE_PROLOGUE = 4


def sum_levels(columns: int) -> int:
    """Levels of the tree that adds the partial sums that ``columns`` columns touch."""
    return (min(columns, PARTIALS) - 1).bit_length()


def level_additions(config: CoreConfig, level: int) -> int:
    """Additions of a lane for each of its rows on the tree level with ``2**level`` additions per row.

    Two lanes that share a row have half of them each; the last one is that of the two lanes' sums.
    """
    return max(1, (1 << level) // config.columns_per_beat)


def level_cycles(config: CoreConfig, level: int) -> int:
    """Cycles from the start of the tree level with ``2**level`` additions per row to the start of the next one.

    The next level's first addition needs the first result of this level and the one in its middle.
    """
    additions = level_additions(config, level)
    return max(additions * config.subwords, additions // 2 * config.subwords + SUM_TURNAROUND)


def tree_cycles(config: CoreConfig, columns: int) -> int:
    """Cycles in which the tree of a row with ``columns`` columns keeps the adder, the final + (+0) included."""
    return sum(level_cycles(config, level) for level in range(sum_levels(columns))) + config.subwords


def row_pause(config: CoreConfig, columns: int) -> int:
    """From the last beat of a row to the earliest beat of the next row's column min(64, columns - 1)."""
    return SUM_TURNAROUND + tree_cycles(config, columns)


def uses_lane0(i: Instruction) -> bool:
    return i.add1 == FirstAdd.LANE0 or i.mul2 == SecondMultiply.LANE0 or i.function == Function.EXP2


def column_words(i: Instruction) -> int:
    """PARAMETER words that one group of ``rows`` columns needs."""
    column0 = i.mul1 == FirstMultiply.COLUMN0 or i.mul2 == SecondMultiply.COLUMN0
    return column0 + (i.add2 == SecondAdd.COLUMN1) + (i.mul3 == ThirdMultiply.COLUMN2)


def uses_y(i: Instruction) -> bool:
    return i.add1 == FirstAdd.Y or i.add2 == SecondAdd.Y or i.mul3 == ThirdMultiply.Y


def transposes(i: Instruction) -> bool:
    return i.destination in (Destination.WEIGHT_TRANSPOSED, Destination.BYTES_TRANSPOSED)


def prologue_cycles(i: Instruction) -> int:
    """Cycles in front of each row tile: one per PARAMETER word, and room for the row's own words to be written."""
    words = uses_lane0(i) + (i.mul1 == FirstMultiply.LANE1) + column_words(i)
    least = 1
    if i.destination == Destination.PARAMETER and (i.sum or i.maximum):
        least = 2
    if i.maximum and i.max_continue:
        words, least = words + 1, CONTINUE_PROLOGUE
    return max(words, least)


def column_cycles(config: CoreConfig, i: Instruction) -> int:
    """Cycles from ``columns_per_beat`` columns to the next: the beats, and one more where y shares x's port."""
    return config.subwords + (uses_y(i) and i.source == Source.VECTOR)


def row_cycles(config: CoreConfig, i: Instruction, first: bool) -> int:
    """Cycles of one row tile, prologue included; ``first`` where no other row precedes it."""
    per_beat, words = column_cycles(config, i), column_words(i)
    transposed = transposes(i)
    paced = i.sum and not first
    pause = row_pause(config, i.columns) - 1
    # Time 0 is the first cycle of the prologue, so the last beat of the row before was at -1.
    now = entered = prologue_cycles(i)
    group_end = -1 if not first else -(10**6)
    for start in range(0, i.columns, config.rows):
        columns = min(config.rows, i.columns - start)
        beats = -(-columns // config.columns_per_beat)
        if start:
            now = now + words if i.source in (Source.PARAMETER, Source.INTEGER) else max(now, entered + words)
            entered = now
        if paced and start == PARTIALS:
            now = max(now, pause)
        last = now + (beats - 1) * per_beat
        if transposed:
            last = max(last, group_end + config.rows // config.columns_per_beat)
        if paced and i.columns <= PARTIALS and start + columns == i.columns:
            last = max(last, pause)
        now = last + per_beat
        group_end = now - 1
    return now


def lane_levels(config: CoreConfig) -> int:
    """Stages in which a selection finds the greatest value of a beat's lanes."""
    return (config.lanes // config.columns_per_beat - 1).bit_length()


def selection_cycles(config: CoreConfig, columns: int) -> int:
    """Cycles from stage RESULT of the last beat of a pass that selects to ``done``.

    The first digit is counted while columns come. Then one pass over all of them, two a cycle, for each further digit,
    with a pause of a cycle behind it, and one, one a cycle, that writes the list.
    """
    searches = (SELECT_DIGITS - 1) * (-(-columns // 2) + 1)
    return lane_levels(config) + searches + columns + SELECTION


def tail_cycles(config: CoreConfig, i: Instruction) -> int:
    """Cycles from the last beat's issue to ``done``: the pipeline, the last row sum, the last transposed group, or the
    selection."""
    tail = DEPTH
    if i.sum:
        # To the tree, through it, through the adder into the assembled word, its write, and one to see that.
        tail = max(tail, SUM + SUM_TURNAROUND + tree_cycles(config, i.columns) + SUM_TURNAROUND + 1)
    if transposes(i):
        tail = max(tail, ROUNDED + config.rows // config.columns_per_beat + 3)
    if i.select:
        tail = max(tail, RESULT + selection_cycles(config, i.columns))
    return ISSUE + tail


def vector_cycles(config: CoreConfig, instruction: Instruction) -> int:
    """Cycles from the acceptance of a VECTOR instruction to ``done``, if its tiles are there when it wants them.

        1 + row_cycles(first) + (tiles - 1) * row_cycles(other) + tail_cycles

    The first cycle starts the pass. A row takes ``prologue + beats * column_cycles`` plus its waits: the fetch of
    column words between groups where x comes from PARAMETER too, the adders (``row_pause``), the transposer.
    """
    first, other = row_cycles(config, instruction, True), row_cycles(config, instruction, False)
    return 1 + first + (instruction.tiles - 1) * other + tail_cycles(config, instruction)
