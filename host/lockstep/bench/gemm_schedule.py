"""The order in which a matrix product is computed: boxes of panels, and what each needs from memory.

The array eats one word from each side a cycle, and the bus brings one word in all. So a product begins on a small
block of tiles, whose panels come in pieces of depth: n x n tiles use each word n times, and the array starts when the
first pieces are there instead of the first panels. From there the block grows by a panel at a time, on the shorter
side, and each new panel meets all of the other side: one word from memory then feeds many cycles of the array.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lockstep_isa.config import CoreConfig

#: Deepest sums that may be cut: partial sums of int8 products up to 2^24 are exact in fp32, and so is their sum.
EXACT_DEPTH = 1024
#: Tiles on a side of the first block, where the product has as many.
OPENING = 3
#: Words of depth in the pieces of the first block: less, and the vector unit adds pieces slower than they come.
PIECE = 32
#: Cycles that STORE needs for an instruction beside its words: it waits for the answer to its last burst.
STORE_TURN = 44


@dataclass(frozen=True)
class Span:
    """Panels, or words of depth: ``start`` up to ``end``."""

    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Box:
    """The part of a product that one MATRIX and one VECTOR instruction compute: row panels, column panels, depth."""

    rows: Span
    columns: Span
    depth: Span

    @property
    def tiles(self) -> int:
        return len(self.rows) * len(self.columns)


def boxes(config: CoreConfig, m: int, n: int, k: int) -> Iterator[Box]:
    """The boxes of a product of ``m`` row panels, ``n`` column panels and depth ``k``, in order.

    Boxes of the same tiles follow each other in depth, and each tile's boxes cover ``k`` once.
    """
    high, wide = min(OPENING, m), min(OPENING, n)
    yield from _deep(Box(Span(0, high), Span(0, wide), Span(0, k)), _opening_pieces(config, k))
    least = _least_tiles(config, k)
    steps: list[Box] = []
    while high < m or wide < n:
        if wide == n or (high < m and high <= wide):
            group = min(m - high, max(1, least // wide))
            steps.append(Box(Span(high, high + group), Span(0, wide), Span(0, k)))
            high += group
        else:
            group = min(n - wide, max(1, least // high))
            steps.append(Box(Span(0, high), Span(wide, wide + group), Span(0, k)))
            wide += group
    if not steps:
        return
    yield from steps[:-1]
    yield from _ending(config, steps[-1], starved=(m + n) * k > 0.9 * m * n * max(k, config.rows))


def _least_tiles(config: CoreConfig, k: int) -> int:
    """Fewest tiles in a box such that STORE does not lose more than a few per cent to its turns."""
    per_tile = config.columns * (config.beats_per_vector_word + 2)
    room = max(k, config.rows) - per_tile
    if room >= STORE_TURN:
        return 1
    return 8 if room <= 0 else -(-STORE_TURN // room)


def _opening_pieces(config: CoreConfig, k: int) -> list[int]:
    least = max(PIECE, config.rows)
    if k > EXACT_DEPTH or k < 2 * least:
        return [k]
    count = k // least
    return _even(k, count)


def _even(total: int, count: int) -> list[int]:
    return [total * (n + 1) // count - total * n // count for n in range(count)]


def _deep(box: Box, pieces: list[int]) -> Iterator[Box]:
    first = box.depth.start
    for piece in pieces:
        yield Box(box.rows, box.columns, Span(first, first + piece))
        first += piece


def _ending(config: CoreConfig, box: Box, starved: bool) -> Iterator[Box]:
    """The last box, smaller and smaller: what comes behind the last product is the drain and the store of one part."""
    k = len(box.depth)
    if starved and box.tiles <= 4:
        pieces = max(1, min(4, k // 96)) if k <= EXACT_DEPTH else 1
        yield from _deep(box, _even(k, pieces))
        return
    if max(k, config.rows) < config.columns * (config.beats_per_vector_word + 2):
        yield box
        return
    along_rows = len(box.rows) > len(box.columns)
    span = box.rows if along_rows else box.columns
    start = span.start
    while start < span.end:
        part = Span(start, start + max(1, (span.end - start) // 2))
        yield Box(part, box.columns, box.depth) if along_rows else Box(box.rows, part, box.depth)
        start = part.end
