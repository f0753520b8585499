"""The order in which a matrix product is computed: boxes of panels, and what each needs from memory.

The array eats one word from each side a cycle, and the bus brings one word in all. So a product begins on a small
block of tiles, whose panels come in pieces of depth: high x wide tiles use a word of one side as often as the other
side has panels, and the array starts when the first pieces are there instead of the first panels. From there the block
grows by a panel at a time, on the shorter side, and each new panel meets all of the other side: one word from memory
then feeds many cycles of the array.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lockstep_isa.config import CoreConfig

from lockstep.compiler.packing import Packing

#: Deepest sums that may be cut: partial sums of int8 products up to 2^24 are exact in fp32, and so is their sum.
EXACT_DEPTH = 1024
#: The array's time for the first block over the bus's for its panels; the bus is slower with pieces than with panels.
OPENING = 1.25
#: Most tiles on a side of the first block.
MOST_OPENING = 6
#: Steps in the first piece of the first block, and how much longer each further one is: the vector unit adds pieces of
#: as many steps as a tile has columns no faster than they come, and later ones should let it catch up.
PIECE, LONGER = 16, 1.1
#: Row panels whose last pieces are one box: the vector unit starts once for them, and their results leave soon enough.
LEAVING = 2


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


def boxes(config: CoreConfig, m: int, n: int, k: int, form: Packing | None = None) -> Iterator[Box]:
    """The boxes of a product of ``m`` row panels, ``n`` column panels and depth ``k``, in order.

    Boxes of the same tiles come in the order of their depths, and each tile's boxes cover ``k`` once. ``form`` is that
    of the columns, dense int8 if not said.
    """
    form = form or Packing(k)
    steps = k // form.rate
    stored = config.columns * (config.beats_per_vector_word + 2)
    # Where results leave more slowly than they are made, the first one should come soon.
    high, wide = _first_block(m, n, k, form) if steps > stored else (1, 1)
    yield from _opening(config, high, wide, k, form)
    growth: list[Box] = []
    while high < m or wide < n:
        if wide == n or (high <= wide and high < m):
            growth.append(Box(Span(high, high + 1), Span(0, wide), Span(0, k)))
            high += 1
        else:
            growth.append(Box(Span(0, high), Span(wide, wide + 1), Span(0, k)))
            wide += 1
    yield from growth[:-1]
    if growth:
        starved = m * k + n * form.words > 0.9 * m * n * steps
        yield from _ending(growth[-1], form, starved, fine=steps > stored)


def _first_block(m: int, n: int, k: int, form: Packing) -> tuple[int, int]:
    """Row and column panels of the first block: no more than keep the array longer than the bus, by the side that
    gains more.
    """

    def gain(block: tuple[int, int]) -> float:
        high, wide = block
        return high * wide * (k // form.rate) / (high * k + wide * form.words)

    block = 1, 1
    while gain(block) < OPENING:
        high, wide = block
        larger = [(high + 1, wide)] * (high < min(m, MOST_OPENING)) + [(high, wide + 1)] * (wide < min(n, MOST_OPENING))
        # Behind the last product come its drain and its store, so a part is left that can end in small boxes.
        larger = [block for block in larger if block != (m, n)]
        if not larger:
            break
        block = max(larger, key=lambda block: (gain(block), block))
    return block


def _opening(config: CoreConfig, high: int, wide: int, k: int, form: Packing) -> Iterator[Box]:
    """The first block: piece by piece of its depth, and the last piece a few rows at a time, so that results can
    leave.
    """
    begin = 0
    for end in _pieces(config, wide, k, form) if k <= EXACT_DEPTH else ():
        yield Box(Span(0, high), Span(0, wide), Span(begin, end))
        begin = end
    for row in range(0, high, LEAVING):
        yield Box(Span(row, min(high, row + LEAVING)), Span(0, wide), Span(begin, k))


def _pieces(config: CoreConfig, wide: int, k: int, form: Packing) -> list[int]:
    """The ends of all pieces of the first block's depth but the last one, which is no shorter than those before: STORE
    reads the first results while the vector unit adds the last ones, and should find it idle now and then.
    """
    # A pass of the vector unit has a start that a single tile does not hide.
    least = max(PIECE, config.rows) * form.rate * (2 if wide == 1 else 1)
    ends, size = [0], float(least)
    while (end := ends[-1] + max(1, round(size / form.unit)) * form.unit) <= k - size:
        ends.append(end)
        size *= LONGER
    return ends[1:]


def _cuts(total: int, count: int, unit: int) -> list[int]:
    """The ends of at most ``count`` pieces of about the same size, multiples of ``unit`` all of them."""
    units = total // unit
    count = max(1, min(count, units))
    return [units * (n + 1) // count * unit for n in range(count)]


def _ending(box: Box, form: Packing, starved: bool, fine: bool) -> Iterator[Box]:
    """The last box, in smaller and smaller parts: behind the last product come its drain and its store.

    starved : the bus brings operands more slowly than the array takes them; the last ones are then taken piece by
    piece. fine : a tile takes the array longer than STORE.
    """
    k = box.depth.end
    if starved and k <= EXACT_DEPTH:
        begin = 0
        for end in _cuts(k, min(4, k // (96 * form.rate)), form.unit):
            yield Box(box.rows, box.columns, Span(begin, end))
            begin = end
        return
    if not fine:
        yield box
        return
    down = len(box.rows) > 1
    span = box.rows if down else box.columns
    start = span.start
    while start < span.end:
        part = Span(start, start + max(1, (span.end - start) // 2))
        yield Box(part, box.columns, box.depth) if down else Box(box.rows, part, box.depth)
        start = part.end
