"""What a selection of columns and a gather by it may ask for."""

from __future__ import annotations

from .config import CoreConfig
from .instructions import INDEX_ENTRIES, LOAD, VECTOR, Instruction

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
