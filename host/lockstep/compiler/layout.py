"""How arrays lie in device memory and on chip.

A *panel* is what a core keeps of up to ``rows`` tokens (or output channels): one word per feature, one lane per
token. A matrix of more tokens is several panels, one behind the other. Weights of a product are panels too, with
output channels in the place of tokens, so activations can stand on either side of the array.
"""

from __future__ import annotations

import numpy as np
from lockstep_isa.instructions import TABLE_ENTRIES
from lockstep_isa.tables import FUNCTIONS
from numpy.typing import NDArray


def panel_count(tokens: int, rows: int) -> int:
    """Panels that hold ``tokens`` tokens."""
    return -(-tokens // rows)


def to_panels(x: NDArray[np.generic], rows: int) -> NDArray[np.generic]:
    """x[tokens, features] as [panels, features, rows]; missing tokens are zeros."""
    tokens, features = x.shape
    panels = panel_count(tokens, rows)
    padded = np.zeros((panels * rows, features), x.dtype)
    padded[:tokens] = x
    return np.ascontiguousarray(padded.reshape(panels, rows, features).transpose(0, 2, 1))


def from_panels(panels: NDArray[np.generic], tokens: int) -> NDArray[np.generic]:
    """The inverse of :func:`to_panels`: [panels, features, rows] as [tokens, features]."""
    count, features, rows = panels.shape
    return np.ascontiguousarray(panels.transpose(0, 2, 1).reshape(count * rows, features)[:tokens])


def column_words(values: NDArray[np.float32], rows: int) -> NDArray[np.float32]:
    """A vector with one value per column as PARAMETER words, float32[words, rows]; the rest is zero."""
    words = np.zeros(-(-len(values) // rows) * rows, np.float32)
    words[: len(values)] = values
    return words.reshape(-1, rows)


def table_words(name: str) -> NDArray[np.float32]:
    """A function table as LOAD brings it to the TABLE memory, float32[entries, 4]."""
    function = FUNCTIONS[name]
    entries = np.zeros((TABLE_ENTRIES, 4), np.float32)
    for column, values in enumerate((function.c0, function.c1, function.c2)):
        entries[: function.entries, column] = values
    return entries
