"""What quantised weights mean, and how they are packed for a core that streams them.

Whatever its format, a weight means ``int8[N, K]`` with one fp32 scale per output channel, ``value = w8 * scale``:

* int8: w8 is stored.
* int4: w4 in -8..7 is stored, with an integer multiplier k in 1..18 for each channel and each group of G along K;
  ``w8 = w4 * k``, which must stay in -127..127. So -8 goes with k up to 15, and the symmetric -7..7 with every k.
* N:M sparsity: of each M consecutive values along K, counted from 0, at most N are not zero. It goes with either.

Packed, the channels stand in tiles of C, and a tile is a row of words of C bytes, byte c for channel c. Side words
stand in front of what they describe:

    for each group of G along K (int4):    a word of multipliers
        for each 4 kept values (N:M):      a word of 2-bit positions in their groups of M, the first in the low bits
            the values                     int8: one in a word; int4: two, as first + 16 * second modulo 256

Without N:M all values of a group stand together; without int4 there is one group, the whole of K. A byte of two int4 is
their sum, so that a core makes it by arithmetic: the first value is the low nibble's, the second what is left.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lockstep_isa.quantisation import I8, U8

#: What a group of int4 weights may measure along K.
GROUPS = (32, 64, 128)
#: The greatest multiplier of a group; the least is 1.
MAX_MULTIPLIER = 18
#: Patterns of sparsity: (N, M), at most N of M consecutive values are not zero.
PATTERNS = ((2, 4), (1, 4))
#: Positions in one index word, for each channel.
PER_INDEX_WORD = 4

Pattern = tuple[int, int]


class WeightError(ValueError):
    """Weights that a format cannot hold; the message says which and where."""


class GroupError(WeightError):
    """A group size that is none, or that does not divide K."""


class RangeError(WeightError):
    """A value, a multiplier or their product that leaves its range."""


class PatternError(WeightError):
    """Values that are not as sparse as their pattern says, or a pattern that is none."""


def check_group(length: int, group: int) -> None:
    """Raise ``GroupError`` unless groups of ``group`` divide K = ``length``."""
    if group not in GROUPS:
        raise GroupError(f"a group of {group} is none of {', '.join(map(str, GROUPS))}")
    if length % group:
        raise GroupError(f"groups of {group} do not divide the {length} inputs of this weight")


def expand(w4: npt.NDArray[np.integer], k: npt.NDArray[np.integer]) -> I8:
    """w8 = w4 * k as int8[N, K], for w4: integers[N, K] in -8..7 and k: integers[N, K / G] in 1..18.

    Raises ``GroupError`` or ``RangeError``.
    """
    length, groups = w4.shape[1], k.shape[1]
    if not groups or length % groups:
        raise GroupError(f"{groups} multipliers do not divide the {length} inputs of this weight")
    check_group(length, length // groups)
    _in_range("int4 value", w4, -8, 7)
    _in_range("multiplier", k, 1, MAX_MULTIPLIER)
    w8 = w4.astype(np.int16) * np.repeat(k.astype(np.int16), length // groups, axis=1)
    _in_range("product of int4 value and multiplier", w8, -127, 127)
    return w8.astype(np.int8)


def check_pattern(w: npt.NDArray[np.integer], pattern: Pattern) -> None:
    """Raise ``PatternError`` unless w: integers[N, K] is as sparse as ``pattern``."""
    n, m = pattern
    if pattern not in PATTERNS:
        raise PatternError(f"{n}:{m} is none of the patterns {', '.join(f'{n}:{m}' for n, m in PATTERNS)}")
    if w.shape[1] % m:
        raise PatternError(f"groups of {m} do not divide the {w.shape[1]} inputs of this weight")
    kept = (w.reshape(len(w), -1, m) != 0).sum(axis=2)
    if (kept > n).any():
        channel, at = np.argwhere(kept > n)[0]
        raise PatternError(
            f"{kept[channel, at]} of the {m} values [{channel}, {at * m}:{at * m + m}] are not zero, where {n}:{m} "
            f"allows {n}"
        )


def compress(w: I8, pattern: Pattern) -> tuple[I8, U8]:
    """The N kept values of each M, and their positions in it: int8 and uint8[N, K * n / m].

    Positions rise within an M. Where fewer than N are not zero, the lowest zeros are kept too. Raises ``PatternError``.
    """
    check_pattern(w, pattern)
    n, m = pattern
    groups = w.reshape(len(w), -1, m)
    at = np.sort(np.argsort(groups == 0, axis=2, kind="stable")[..., :n], axis=2)
    return np.take_along_axis(groups, at, axis=2).reshape(len(w), -1), at.reshape(len(w), -1).astype(np.uint8)


def decompress(values: I8, positions: U8, pattern: Pattern) -> I8:
    """int8[N, K] from what :func:`compress` gives. Raises ``PatternError`` where positions do not rise within an M."""
    n, m = pattern
    at = positions.reshape(len(positions), -1, n)
    if (np.diff(at.astype(int), axis=2) <= 0).any() or (at >= m).any():
        raise PatternError(f"positions that do not rise from 0 to at most {m - 1} within a group of {m}")
    w = np.zeros((len(values), at.shape[1], m), np.int8)
    np.put_along_axis(w, at, values.reshape(at.shape), axis=2)
    return w.reshape(len(w), -1)


def _in_range(what: str, array: npt.NDArray[np.integer], least: int, most: int) -> None:
    wrong = (array < least) | (array > most)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise RangeError(f"the {what} is {array[row, column]} at [{row}, {column}]; it may be {least} to {most}")


def words_per_tile(length: int, group: int | None = None, pattern: Pattern | None = None) -> int:
    """Words of a tile whose channels have K = ``length``; int8 where ``group`` is none. Raises ``WeightError``."""
    if group is not None:
        check_group(length, group)
    n, m = (1, 1) if pattern is None else pattern
    if pattern is not None and (pattern not in PATTERNS or length % (m // n * PER_INDEX_WORD)):
        raise PatternError(f"index words of {n}:{m} hold 4 values, which do not come out even over {length} inputs")
    values = length * n // m
    side = 0 if pattern is None else values // PER_INDEX_WORD
    return values + side if group is None else values // 2 + side + length // group


def inputs_per_step(group: int | None = None, pattern: Pattern | None = None) -> int:
    """Inputs of a channel that an array takes in one step: two values at most, of four inputs at most."""
    n, m = (1, 1) if pattern is None else pattern
    return min(4, m // n * (1 if group is None else 2))


def pack(w: I8, columns: int, k: U8 | None = None, pattern: Pattern | None = None) -> U8:
    """Words uint8[tiles, words, C] of w: int8[N, K], which is w4 where there are multipliers k: uint8[N, K / G].

    ``columns`` is C. Channels that fill up the last tile hold zeros, with multipliers of 1. Raises ``WeightError``.
    """
    words = words_per_tile(w.shape[1], None if k is None else w.shape[1] // k.shape[1], pattern)
    fill = ((0, -len(w) % columns), (0, 0))
    w = np.pad(w, fill)
    groups = 1 if k is None else k.shape[1]
    values, positions = (w, None) if pattern is None else compress(w, pattern)
    body: U8 = values.view(np.uint8).reshape(len(w), groups, -1, values.shape[1] // groups if pattern is None else 4)
    if k is not None:
        k = np.pad(k, fill, constant_values=1)
        expand(w, k)
        body = body[..., 0::2] + (body[..., 1::2] << np.uint8(4))
    if positions is not None:
        fours = positions.reshape(*body.shape[:3], PER_INDEX_WORD) << np.arange(0, 8, 2, dtype=np.uint8)
        body = np.concatenate([np.bitwise_or.reduce(fours, axis=3, keepdims=True), body], axis=3)
    body = body.reshape(len(w), groups, -1)
    if k is not None:
        body = np.concatenate([k[..., None], body], axis=2)
    return np.ascontiguousarray(body.reshape(-1, columns, words).swapaxes(1, 2))


def _two_int4(byte: U8) -> tuple[I8, I8]:
    """Both values of bytes ``first + 16 * second``."""
    first = (byte << np.uint8(4)).view(np.int8) >> np.int8(4)
    return first, (byte - first.view(np.uint8)).view(np.int8) >> np.int8(4)


def stream(words: U8, length: int, group: int | None = None, pattern: Pattern | None = None) -> npt.NDArray[np.int16]:
    """What an array makes of the packed words uint8[words, C] of a tile, whatever their bits: int16[K, C].

    Of a multiplier the low 5 bits count, and of its product with an int4 value the low 8. Values with one position are
    added up. Words that :func:`pack` made give ``w8.T``. Raises ``WeightError`` for a length that the format has not.
    """
    count = words_per_tile(length, group, pattern)
    n, m = (1, 1) if pattern is None else pattern
    groups = 1 if group is None else length // group
    body = words[:count].reshape(groups, count // groups, -1)
    k = None
    if group is not None:
        k, body = body[:, :1].astype(np.int16) & 31, body[:, 1:]
    positions = np.zeros((1, 1), np.intp)
    if pattern is not None:
        fours = body.reshape(groups, -1, 5 if group is None else 3, words.shape[1])
        shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
        positions = (fours[:, :, :1] >> shifts & np.uint8(3)).reshape(-1, words.shape[1]).astype(np.intp)
        body = fours[:, :, 1:].reshape(groups, -1, words.shape[1])
    values: npt.NDArray[np.int16] = body.view(np.int8).astype(np.int16)
    if k is not None:
        values = np.stack(_two_int4(body), axis=2).astype(np.int16)
        values = (values.reshape(groups, -1, words.shape[1]) * k).astype(np.int8).astype(np.int16)
    values = values.reshape(-1, words.shape[1])
    if pattern is None:
        return values
    top = np.zeros((length, words.shape[1]), np.int16)
    rows = np.arange(len(values))[:, None] // n * m + positions
    np.add.at(top, (rows, np.arange(words.shape[1])[None]), values)
    return top


def unpack(
    words: U8, shape: tuple[int, int], group: int | None = None, pattern: Pattern | None = None
) -> tuple[I8, U8 | None]:
    """What :func:`pack` was given, w: int8[N, K] of ``shape`` and k, or none for int8. Raises ``WeightError``."""
    channels, length = shape
    wanted = words_per_tile(length, group, pattern)
    if words.shape[1] != wanted or len(words) * words.shape[2] < channels:
        raise WeightError(f"{list(words.shape)} words do not hold {channels} channels of {wanted} words each")
    groups = 1 if group is None else length // group
    body: U8 = words.swapaxes(1, 2).reshape(-1, groups, wanted // groups)[:channels]
    k = None
    if group is not None:
        k, body = body[..., 0], body[..., 1:]
    positions = None
    if pattern is not None:
        body = body.reshape(channels, groups, -1, 5 if group is None else 3)
        positions = body[..., :1] >> np.arange(0, 8, 2, dtype=np.uint8) & np.uint8(3)
        body = body[..., 1:]
    if group is not None:
        body = np.stack(_two_int4(body), axis=-1).view(np.uint8)
    values = body.reshape(channels, -1).view(np.int8)
    if pattern is None or positions is None:
        return values, k
    return decompress(values, positions.reshape(channels, -1), pattern), k
