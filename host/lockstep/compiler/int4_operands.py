"""What the array multiplies levels with to join two of them in a byte: constants, and where they lie on chip.

Two int4 are a byte ``first + 16 * second``, so a product with a left operand of ones and sixteens joins them. Row r of
its result is pair r.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from lockstep_isa.instructions import LOAD, Memory
from lockstep_isa.quantisation import I8
from lockstep_isa.sketch import GROUP

from .cache_form import GROUP_WORDS
from .context import Context, Position
from .lowering import Lowering


def key_pairs(rows: int) -> I8:
    """int8[2 R, R]: rows of features 2 r and 2 r + 1 make pair r."""
    left = np.zeros((2 * rows, rows), np.int8)
    pair = np.arange(rows)
    left[2 * pair, pair], left[2 * pair + 1, pair] = 1, 16
    return left


def token_words(rows: int) -> int:
    """Packed words of a row tile's tokens, one a word, and of the token in front of them: whole groups."""
    return -(-(rows + 1) // (GROUP // 2)) * GROUP_WORDS


def word_of(token: int) -> int:
    """Where the word of a token stands among them: behind the multipliers of its group."""
    return token // (GROUP // 2) * GROUP_WORDS + 1 + token % (GROUP // 2)


def token_pairs(rows: int) -> I8:
    """int8[1 + R, depth, R]: tokens 2 r and 2 r + 1 of a row tile make pair r.

    Words hold one token each, but are read as if packed: a token is the first value of its word, and what stands in the
    place of the second one does not count. The first matrix takes all tokens; matrix 1 + n those from lane n on, and
    where n is odd the one in front of them out of word R.
    """
    depth = token_words(rows) // GROUP_WORDS * GROUP
    left = np.zeros((1 + rows, depth, rows), np.int8)
    for number in range(1 + rows):
        first = max(0, number - 1)
        for token in range(first, rows):
            left[number, 2 * token, token // 2] = 16 if token % 2 else 1
        if first % 2:
            left[number, 2 * rows, first // 2] = 1
    return left


@dataclass(frozen=True)
class Int4Operands:
    """The constants of one program.

    Attributes
    ----------
    keys, tokens, first_tokens : ACTIVATION words of :func:`key_pairs`, and of :func:`token_pairs` for all tokens and
    for those of the first row tile. depth : of the latter.
    """

    keys: int
    tokens: int
    first_tokens: int
    depth: int


def load_operands(low: Lowering, context: Context) -> Int4Operands:
    """Load the constants; they stay until the program's end."""
    rows, take = low.config.rows, low.activations.take
    pairs = token_pairs(rows)
    depth = pairs.shape[1]
    size = depth * rows
    keys = low.image.constant(("int4 keys", rows), key_pairs(rows))
    tokens = low.image.constant(("int4 tokens", rows), pairs)
    found = Int4Operands(take(2 * rows), take(depth), take(depth), depth)

    def of_lane(at: Position) -> int:
        return at.lane * size

    lane = context.operand("first_tokens", 0, (rows - 1) * size, of_lane)
    for address, local, words, fields in (
        (keys, found.keys, 2 * rows, {}),
        (tokens, found.tokens, depth, {}),
        (tokens + size, found.first_tokens, depth, {"address_operand": lane}),
    ):
        low.builder.emit(LOAD, memory=Memory.ACTIVATION, words=words, address=address, local=local, **fields)
    return found
