"""What appends to a cache beside the products of the next layer: passes of VECTOR, then a product of what they made.

At once, MATRIX would wait until VECTOR is done with them, and LOAD too: the dispatcher goes in order, and stops where
the queue of a unit is full.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice

#: Passes that a chunk of a product takes along: at least so many, and so many that half of a product is enough for the
#: twenty or so of an append.
_FEWEST, _TWICE_ALL = 4, 40


class Joins:
    """Passes that wait for chunks of products, and products that wait for passes.

    Passes are iterators whose items are emitted by asking for them; what multiplies the WEIGHT words that they fill
    is a step of its own. Those words are held until then.
    """

    def __init__(self) -> None:
        self._passes: deque[Iterator[object]] = deque()
        self._products: deque[tuple[Callable[[], object], int]] = deque()
        self._held: dict[int, int] = {}

    def begin(self, passes: Iterator[object], at_once: bool) -> None:
        """Emit passes now, or a few beside each chunk of the products to come."""
        self._passes.append(passes)
        if at_once:
            self._advance(None)

    def hold(self, start: int, words: int) -> None:
        """WEIGHT words that nothing may take before the product that reads them is emitted."""
        self._held[start] = start + words

    def later(self, step: Callable[[], object], start: int) -> None:
        """A product of the words held at ``start``, all of which are filled."""
        self._products.append((step, start))

    def touch(self, start: int, words: int) -> bool:
        """Whether a piece of WEIGHT has words in it that are held."""
        return any(start < end and first < start + words for first, end in self._held.items())

    def beside(self, chunks: int) -> None:
        """Emit passes beside a chunk behind which ``chunks`` - 1 are still to come."""
        self._advance(max(_FEWEST, _TWICE_ALL // chunks))

    def behind(self, chunks: int) -> None:
        """Emit products behind a chunk, if all passes are; behind the last one all that waits."""
        if chunks == 1:
            self.emit()
        elif not self._passes:
            self.emit_ready()

    def emit_ready(self) -> None:
        """Emit the products whose passes are emitted."""
        while self._products:
            step, start = self._products.popleft()
            step()
            self._held.pop(start, None)

    def emit(self) -> None:
        """Emit all that waits."""
        self._advance(None)
        self.emit_ready()

    def _advance(self, count: int | None) -> None:
        while self._passes and count != 0:
            emitted = sum(1 for _ in islice(self._passes[0], count))
            if count is None or emitted < count:
                self._passes.popleft()
            count = None if count is None else count - emitted
