"""An n-gram model of bytes, the baseline: interpolated modified Kneser-Ney (Chen and Goodman, 1999)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

#: Bytes and one symbol before the beginning of a text. An n-gram is the number with its symbols as digits.
SYMBOLS = 257
_BEGIN = 256


@dataclass(frozen=True)
class _Order:
    """Counts of one order: k-grams, and the contexts they begin with, as sorted codes and what belongs to each."""

    grams: np.ndarray  # int64[grams]
    counts: np.ndarray  # float64[grams], after discounting
    contexts: np.ndarray  # int64[contexts]
    totals: np.ndarray  # float64[contexts], before discounting
    held_back: np.ndarray  # float64[contexts]: what discounting took away


class ByteNgram:
    """Probabilities of a byte after at most ``order - 1`` bytes of the same text.

    The longest n-grams are counted by occurrences, shorter ones by the number of symbols seen before them. Of each
    count a discount is taken that depends on whether it is 1, 2 or more, and goes to the next shorter order; below the
    last one is the uniform distribution over 256 bytes.
    """

    def __init__(self, texts: Iterable[bytes], order: int = 5) -> None:
        """Count ``texts``. Raises ``ValueError`` if there is no byte in them, or for an order outside 1..7."""
        if not 1 <= order <= 7:
            raise ValueError(f"orders are 1 to 7 (7 symbols fit in 64 bits), not {order}")
        self.order = order
        codes = [self._codes(text, order) for text in texts]
        if not sum(map(len, codes)):
            raise ValueError("there is no byte to count in the texts")
        grams, counts = np.unique(np.concatenate(codes), return_counts=True)
        self._orders: list[_Order] = []
        for k in range(order, 0, -1):
            self._orders.insert(0, _discounted(grams, counts))
            # What the next shorter order counts: the distinct k-grams that end in each of its own.
            grams, counts = np.unique(grams % SYMBOLS ** (k - 1), return_counts=True)

    @staticmethod
    def _codes(text: bytes, length: int) -> np.ndarray:
        """int64[len(text)]: the n-gram of ``length`` symbols that ends in each byte."""
        padded = np.concatenate([np.full(length - 1, _BEGIN), np.frombuffer(text, dtype=np.uint8)]).astype(np.int64)
        codes = np.zeros(len(text), dtype=np.int64)
        for offset in range(length):
            codes = codes * SYMBOLS + padded[offset : offset + len(text)]
        return codes

    def probabilities(self, text: bytes) -> np.ndarray:
        """float64[len(text)]: of each byte after those before it."""
        codes = self._codes(text, self.order)
        result = np.full(len(text), 1.0 / 256.0)
        for k, order in enumerate(self._orders, start=1):
            grams = codes % SYMBOLS**k
            context, known = _find(order.contexts, grams // SYMBOLS)
            gram, seen = _find(order.grams, grams)
            count = np.where(seen, order.counts[gram], 0.0)
            mixed = (count + order.held_back[context] * result) / order.totals[context]
            result = np.where(known, mixed, result)
        return result

    def bits(self, text: bytes) -> float:
        """-log2 of the probability of ``text``."""
        return float(-np.log2(self.probabilities(text)).sum())


def _find(table: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each code stands in the sorted ``table`` (anywhere if it does not), and whether it does."""
    index = np.minimum(np.searchsorted(table, codes), len(table) - 1)
    return index, table[index] == codes


def discounts(counts: np.ndarray) -> np.ndarray:
    """float64[4]: what is taken of a count of 0, 1, 2, and 3 or more.

    Chen and Goodman's estimates from the numbers of n-grams with counts 1 to 4. Where one of these is zero, as for
    single bytes, they do not exist, and half a count is taken.
    """
    n1, n2, n3, n4 = (int((counts == count).sum()) for count in (1, 2, 3, 4))
    if not n1 * n2 * n3 * n4:
        return np.array([0.0, 0.5, 0.5, 0.5])
    share = n1 / (n1 + 2 * n2)
    taken = np.array([0.0, 1 - 2 * share * n2 / n1, 2 - 3 * share * n3 / n2, 3 - 4 * share * n4 / n3])
    return np.clip(taken, [0.0, 0.05, 0.05, 0.05], [0.0, 0.95, 1.95, 2.95])


def _discounted(grams: np.ndarray, counts: np.ndarray) -> _Order:
    taken = discounts(counts)[np.minimum(counts, 3)]
    contexts, first = np.unique(grams // SYMBOLS, return_index=True)
    return _Order(
        grams=grams,
        counts=counts - taken,
        contexts=contexts,
        totals=np.add.reduceat(counts, first).astype(np.float64),
        held_back=np.add.reduceat(taken, first),
    )
