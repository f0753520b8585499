"""On-chip memory while a program is built: pieces that live, and rings that are filled again and again."""

from __future__ import annotations

from lockstep.errors import ModelError


class CapacityError(ModelError):
    """A model or a sequence that does not fit the core; the message says what is missing."""


class Pieces:
    """First fit over the words [start, end) of one on-chip memory.

    Words may be given back before the instructions that use them have run: the order of instructions is the meaning
    of a program, and the builder keeps it.

    Parameters
    ----------
    unit : pieces are made of so many words, and begin at multiples of it; it divides ``start`` and ``end``.
    """

    def __init__(self, name: str, start: int, end: int, unit: int = 1) -> None:
        self.name, self.start = name, start
        self._size, self._unit = end - start, unit
        self._free = [(start, end)]
        self._used: dict[int, int] = {}

    @property
    def empty(self) -> bool:
        """Whether no piece is in use."""
        return not self._used

    @property
    def largest(self) -> int:
        """Words of the largest free piece."""
        return max((end - begin for begin, end in self._free), default=0)

    def fit(self, *pieces: int) -> bool:
        """Whether pieces of so many words could be taken one after the other."""
        taken = []
        for words in pieces:
            if self.largest < words:
                break
            taken.append(self.take(words))
        for start in taken:
            self.give(start)
        return len(taken) == len(pieces)

    def take(self, words: int) -> int:
        """The first word of a piece; raises :class:`CapacityError`."""
        words = self._whole(words)
        for n, (begin, end) in enumerate(self._free):
            if end - begin >= words:
                self._free[n] = (begin + words, end)
                self._used[begin] = words
                return begin
        raise self._full(words)

    def take_last(self, words: int) -> int:
        """The same at the other end of the memory, away from pieces that come and go."""
        words = self._whole(words)
        for n, (begin, end) in reversed(list(enumerate(self._free))):
            if end - begin >= words:
                self._free[n] = (begin, end - words)
                self._used[end - words] = words
                return end - words
        raise self._full(words)

    def _whole(self, words: int) -> int:
        return -(-words // self._unit) * self._unit

    def _full(self, words: int) -> CapacityError:
        return CapacityError(
            f"{words} words of {self.name} memory are needed and {self.largest} of {self._size} are free: "
            "the sequence is too long for this core; split it, or choose a core with more memory"
        )

    def give(self, start: int) -> None:
        """Give a piece back."""
        words = self._used.pop(start)
        pieces = sorted([*self._free, (start, start + words)])
        self._free = []
        for begin, end in pieces:
            if begin == end:
                continue
            if self._free and self._free[-1][1] == begin:
                self._free[-1] = (self._free[-1][0], end)
            else:
                self._free.append((begin, end))


class Ring:
    """Pieces handed out one behind the other, around and around: each lives until the ring comes by again.

    For operands that are loaded, used once and forgotten. The larger the ring, the further LOAD runs ahead.
    """

    def __init__(self, name: str, start: int, end: int) -> None:
        self.name, self._start, self._end = name, start, end
        self._next = start

    @property
    def size(self) -> int:
        """Words of the whole ring."""
        return self._end - self._start

    def take(self, words: int) -> int:
        """The first word of a piece; raises :class:`CapacityError` where the ring is smaller than the piece."""
        if words > self.size:
            raise CapacityError(
                f"{words} words of {self.name} memory are needed at once and {self.size} are set aside: "
                "a layer is too wide for this core; choose one with more memory"
            )
        start = self.following(words)
        self._next = start + words
        return start

    def resize(self, end: int) -> None:
        """Give the ring another end; what lies beyond it is up to the caller."""
        self._end = end

    def following(self, words: int) -> int:
        """Where the next piece will begin."""
        return self._start if self._next + words > self._end else self._next
