"""What a selection of columns, the maxima that it chooses by, and a gather by it may ask for."""

from __future__ import annotations

from .config import CoreConfig
from .instructions import (
    INDEX_ENTRIES,
    LOAD,
    SECTIONS,
    VECTOR,
    Destination,
    FirstMultiply,
    Instruction,
    SecondAdd,
    SecondMultiply,
    Source,
    ThirdMultiply,
)

#: Fields of VECTOR that mean nothing where it selects none.
_SELECT_FIELDS = ("select_to", "select_lane", "select_more_lanes", "select_first", "select_last")


def selection_fault(config: CoreConfig, i: Instruction) -> str | None:
    """What is wrong with the selection or the gather of a resolved instruction; None where nothing is.

    That lists lie inside the index memory is not looked at here: they are words that it reads and writes.
    """
    if i.type is LOAD:
        if not i.gather:
            return "gather_from has no meaning without gather" if i.gather_from else None
        return None if config.selection else f"it gathers rows; core '{config.name}' has no index memory"
    if i.type is not VECTOR:
        return None
    if not i.select:
        named = next((name for name in _SELECT_FIELDS if i.values[name]), None)
        return f"{named} has no meaning where select is 0" if named else None
    if not config.selection:
        return f"it selects columns; core '{config.name}' has no index memory"
    if i.tiles != 1:
        return f"it selects columns of {i.tiles} row tiles; a selection is of one"
    if not i.select <= i.columns <= INDEX_ENTRIES:
        return f"it selects {i.select} of {i.columns} columns; legal are select <= columns <= {INDEX_ENTRIES}"
    if i.select_first + i.select_last > i.select:
        return f"select_first + select_last = {i.select_first + i.select_last} is more than select = {i.select}"
    if i.select_lane + i.select_more_lanes >= config.rows:
        return (
            f"lanes {i.select_lane} to {i.select_lane + i.select_more_lanes} do not all exist, a word has {config.rows}"
        )
    return None


def section_fault(config: CoreConfig, i: Instruction) -> str | None:
    """What is wrong with the sections of a resolved instruction's maxima; None where nothing is.

    A pass whose maxima continue reads a PARAMETER word for each section while columns come, without a pause. So it
    leaves that port to them: no x from there, and no more than one kind of column word.
    """
    if i.type is not VECTOR or not i.max_columns:
        return None
    if not config.selection:
        return f"it takes a maximum of each {i.max_columns} columns; core '{config.name}' takes that of a row only"
    if i.max_columns not in SECTIONS:
        return f"max_columns is {i.max_columns}; legal are 0, {', '.join(map(str, SECTIONS))}"
    if not i.maximum:
        return "max_columns has no meaning without a maximum"
    if i.destination == Destination.PARAMETER:
        return "results and maxima of sections cannot both go to PARAMETER, which takes one word a cycle"
    if not i.max_continue:
        return None
    if config.rows < min(SECTIONS):
        return (
            f"maxima of sections continue on cores of at least {min(SECTIONS)} rows; core '{config.name}' has "
            f"{config.rows}, and needs its words of columns too often"
        )
    if i.source in (Source.PARAMETER, Source.INTEGER):
        return "maxima of sections do not continue where x comes from PARAMETER, which gives one word a cycle"
    column0 = i.mul1 == FirstMultiply.COLUMN0 or i.mul2 == SecondMultiply.COLUMN0
    kinds = column0 + (i.add2 == SecondAdd.COLUMN1) + (i.mul3 == ThirdMultiply.COLUMN2)
    if kinds > 1:
        return f"it has {kinds} kinds of column words; where maxima of sections continue, PARAMETER has time for one"
    return None
