"""A sketch of keys: the little that a core looks at to find out which of them count.

Keys next to each other are alike more often than not, so one row stands for :data:`POOL` of them: their mean, in int4
with a multiplier for each :data:`GROUP` channels. That is what packed weights are to the array, and a fifteenth of the
bytes of int8 keys and values.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lockstep_isa.numerics import F32, absmax, add, mul, recip, round_to_int, round_to_int8bits
from lockstep_isa.quantisation import I8, U8
from lockstep_isa.weights import check_group, expand

#: Keys that one row of a sketch stands for.
POOL = 4
#: Channels that share a multiplier.
GROUP = 32
#: A multiplier is the integer nearest to ``greatest magnitude * MULTIPLIER_SLOPE + MULTIPLIER_OFFSET``: at least 1, and
#: so much that levels end at 7, and their products inside +-127.
MULTIPLIER_SLOPE, MULTIPLIER_OFFSET = np.float32(0.1334), np.float32(0.515625)


def int4_groups(x: npt.ArrayLike) -> tuple[I8, U8]:
    """Values inside +-127 as multiples of an integer for each group of 32 along a row.

    x : float32[n, K].  Returns levels in -7..7: int8[n, K], and multipliers in 1..17: uint8[n, K / 32]; their product
    is near x. Raises ``GroupError`` where groups do not divide K.
    """
    x = np.asarray(x, np.float32)
    rows, length = x.shape
    check_group(length, GROUP)
    groups = x.reshape(-1, GROUP)
    multipliers = round_to_int(add(mul(absmax(groups), MULTIPLIER_SLOPE), MULTIPLIER_OFFSET))
    levels = round_to_int8bits(mul(groups, recip(multipliers.astype(np.float32))[:, None])).view(np.int8)
    return levels.reshape(rows, length), multipliers.astype(np.uint8).reshape(rows, -1)


def key_sketch(k8: I8, sk: npt.ArrayLike) -> tuple[I8, U8, F32]:
    """The sketch of keys k8: int8[n, d] with scales sk: float32[n], in their order.

    Returns levels: int8[m, d], multipliers: uint8[m, d / 32] and scales: float32[m], for m = ceil(n / 4). A row is the
    mean of four keys' integers with the greatest of their scales, as if scales were equal; missing keys are zeros.
    Raises ``GroupError`` where d is no multiple of 32.
    """
    sk = np.asarray(sk, np.float32)
    missing = -len(k8) % POOL
    wide = np.pad(k8.astype(np.int32), ((0, missing), (0, 0))).reshape(-1, POOL, k8.shape[1])
    mean = mul(wide.sum(axis=1).astype(np.float32), np.float32(1 / POOL))
    return *int4_groups(mean), np.pad(sk, (0, missing)).reshape(-1, POOL).max(axis=1)


def sketch_rows(k8: I8, sk: npt.ArrayLike) -> tuple[I8, F32]:
    """The same with levels and multipliers multiplied: int8[ceil(n / 4), d], and the scales."""
    levels, multipliers, scales = key_sketch(k8, sk)
    return expand(levels, multipliers), scales
