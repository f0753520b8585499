"""Keys and values of 4 bits, as an array takes them from packed words.

Packed weights have an integer multiplier for each 32 inputs of a channel. Where keys are the channels, inputs are
features, so a key has a multiplier for each 32 of its features. Of values, inputs are tokens: what makes one token
greater than another is its scale alone, which probabilities carry anyway, and multipliers are 1.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lockstep_isa.numerics import F32, absmax, mul, recip
from lockstep_isa.quantisation import I8, U8, requantise
from lockstep_isa.sketch import GROUP, int4_groups
from lockstep_isa.weights import expand

#: Levels of a value end at +-LEVELS.
LEVELS = 7


class LevelError(ValueError):
    """Integers that are no products of levels and multipliers; the message says which."""


def quantise_keys(k: npt.ArrayLike) -> tuple[I8, F32]:
    """Keys as multiples of an integer for each 32 features.

    k : float32[M, d], one row for each token and head; d is a multiple of 32.
    Returns q : int8[M, d], products of a level in -7..7 and a multiplier in 1..17, and s : float32[M] with k ~ q * s.
    A zero or non-finite row gives 0 everywhere and keeps its s, as with int8. Raises ``GroupError``.
    """
    k = np.asarray(k, np.float32)
    s = mul(absmax(k), np.float32(1 / 127))
    levels, multipliers = int4_groups(mul(k, recip(s)[:, None]))
    return expand(levels, np.maximum(multipliers, 1)), s


def quantise_values(v: npt.ArrayLike) -> tuple[I8, F32]:
    """Values in -7..7 with one scale per row.

    v : float32[M, d].  Returns q : int8[M, d] and s : float32[M] with v ~ q * s.
    """
    q, s = requantise(np.asarray(v, np.float32), LEVELS)
    return q.view(np.int8), s


def key_levels(q: I8) -> tuple[I8, U8]:
    """Levels: int8[M, d] and multipliers: uint8[M, d / 32] whose products are the keys q: int8[M, d].

    Raises :class:`LevelError` where there are none.
    """
    groups = q.reshape(-1, GROUP).astype(np.int16)
    multipliers = np.zeros(len(groups), np.int16)
    for candidate in range(17, 0, -1):
        fits = (groups % candidate == 0).all(axis=1) & (np.abs(groups) <= LEVELS * candidate).all(axis=1)
        multipliers[fits] = candidate
    if not multipliers.all():
        row = int(np.flatnonzero(multipliers == 0)[0])
        raise LevelError(f"the integers {groups[row].tolist()} are no multiples of one integer by -7 to 7")
    levels = (groups // multipliers[:, None]).astype(np.int8)
    return levels.reshape(q.shape), multipliers.astype(np.uint8).reshape(len(q), -1)


def value_levels(q: I8) -> I8:
    """The values q: int8[M, d], which are levels themselves; raises :class:`LevelError` where they are not."""
    if (np.abs(q.astype(np.int16)) > LEVELS).any():
        raise LevelError(f"a value of {int(np.abs(q.astype(np.int16)).max())} is no level of 4 bits, which end at 7")
    return q
