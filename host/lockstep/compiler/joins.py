"""Products of what VECTOR has just made: they wait, so that MATRIX need not."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable


class Joins:
    """Steps that multiply what lies in scratch words of WEIGHT, emitted behind the next chunks of a product: at once,
    MATRIX would wait until VECTOR has written those words.
    """

    def __init__(self) -> None:
        self._steps: deque[Callable[[], object]] = deque()
        self._scratch: list[tuple[int, int]] = []

    def hold(self, start: int, words: int) -> None:
        """Scratch words that nothing may take before the steps are emitted."""
        self._scratch.append((start, start + words))

    def later(self, step: Callable[[], object]) -> None:
        """A step that waits."""
        self._steps.append(step)

    def touch(self, start: int, words: int) -> bool:
        """Whether a piece of WEIGHT has scratch words in it."""
        return any(start < end and first < start + words for first, end in self._scratch)

    def emit(self) -> None:
        """Emit all steps; scratch words are free then."""
        while self._steps:
            self._steps.popleft()()
        self._scratch.clear()
