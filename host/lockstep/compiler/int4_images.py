"""Keys and values of 4 bits as they lie in device memory: the words of :mod:`lockstep_isa.weights`.

keys    uint8[kv_heads][capacity / R][head_dim / 32][17][R]     multipliers, then two features a word
values  uint8[kv_heads][head_dim / R][capacity / 32][17][R]     multipliers, which are 1, then two tokens a word
"""

from __future__ import annotations

import numpy as np
from lockstep_isa.int4_cache import key_levels, value_levels
from lockstep_isa.quantisation import I8, U8
from lockstep_isa.sketch import GROUP
from lockstep_isa.weights import pack

from .cache_form import GROUP_WORDS


def begin(values: U8, rows: int) -> None:
    """Make an empty cache of values: all zeros, with their multipliers."""
    values.view(np.uint8).reshape(-1, GROUP_WORDS, rows)[:, 0] = 1


def write_keys(image: U8, keys: I8, heads: int, rows: int) -> None:
    """Put the keys int8[tokens, heads * d] of the first tokens into the cache; raises ``LevelError``."""
    d = keys.shape[1] // heads
    panels = image.view(np.uint8).reshape(heads, -1, d // GROUP * GROUP_WORDS, rows)
    for head in range(heads):
        levels, multipliers = key_levels(np.ascontiguousarray(keys[:, head * d : (head + 1) * d]))
        found = pack(levels, rows, multipliers)
        panels[head, : len(found)] = found


def write_values(image: U8, values: I8, heads: int, rows: int) -> None:
    """Put the values int8[tokens, heads * d] of the first tokens into the cache; raises ``LevelError``."""
    tokens, d = len(values), values.shape[1] // heads
    levels = np.pad(value_levels(values), ((0, -tokens % GROUP), (0, 0)))
    ones = np.ones((heads * d, len(levels) // GROUP), np.uint8)
    found = pack(np.ascontiguousarray(levels.T), rows, ones)
    image.view(np.uint8).reshape(len(found), -1, rows)[:, : found.shape[1]] = found
