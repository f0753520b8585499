"""The n-gram baseline against a direct reading of the formula, on texts small enough for dictionaries."""

from __future__ import annotations

import random
from collections import defaultdict

import numpy as np
import pytest
from bytelm.ngram import ByteNgram, discounts

BEGIN = 256


def brute_force(texts: list[bytes], order: int, history: list[int], symbol: int) -> float:
    """The probability of ``symbol`` after ``history`` (``order - 1`` symbols), with one dictionary per order."""
    padded = [[BEGIN] * (order - 1) + list(text) for text in texts]
    counts: dict[tuple[int, ...], int] = defaultdict(int)
    for text in padded:
        for end in range(order, len(text) + 1):
            counts[tuple(text[end - order : end])] += 1
    tables = {order: counts}
    for k in range(order - 1, 0, -1):
        tables[k] = defaultdict(int)
        for gram in tables[k + 1]:
            tables[k][gram[1:]] += 1

    def probability(k: int, context: tuple[int, ...]) -> float:
        if k == 0:
            return 1 / 256
        shorter = probability(k - 1, context[1:])
        after = {gram: count for gram, count in tables[k].items() if gram[:-1] == context}
        if not after:
            return shorter
        taken = discounts(np.array(list(tables[k].values())))
        mine = after.get((*context, symbol), 0)
        spread = sum(float(taken[min(count, 3)]) for count in after.values())
        return (mine - float(taken[min(mine, 3)]) + spread * shorter) / sum(after.values())

    return probability(order, tuple(history))


def texts(seed: int) -> list[bytes]:
    """Random texts in which every count of counts is present at the longer orders."""
    rng = random.Random(seed)
    words = [b"def ", b"for ", b"form", b"\xff\x00", b"de", b"  ", b"fed\n"]
    return [b"".join(rng.choices(words, k=40)) for _ in range(4)] + [b"", b"x"]


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_are_those_of_the_formula(order: int) -> None:
    training, (probe, *_) = texts(1), texts(2)
    probe += b"\x80unseen\x80"
    found = ByteNgram(training, order).probabilities(probe)
    padded = [BEGIN] * (order - 1) + list(probe)
    for index, byte in enumerate(probe):
        expected = brute_force(training, order, padded[index : index + order - 1], byte)
        assert found[index] == pytest.approx(expected, rel=1e-12), f"byte {index} ({byte}) of {probe!r}"


@pytest.mark.parametrize("order", [1, 5, 7])
def test_probabilities_of_all_bytes_add_up_to_one(order: int) -> None:
    ngram = ByteNgram(texts(3), order)
    for history in (b"", b"d", b"def for ", b"unseen\x80", b"form\xff\x00de"):
        total = sum(ngram.probabilities(history + bytes([byte]))[-1] for byte in range(256))
        assert total == pytest.approx(1.0, abs=1e-12), f"after {history!r}"


def test_discounts_follow_from_counts_of_counts() -> None:
    # 8 ones, 4 twos, 2 threes, 1 four: the share is 8 / 16.
    counts = np.repeat([1, 2, 3, 4, 9], [8, 4, 2, 1, 1])
    np.testing.assert_allclose(discounts(counts), [0.0, 1 - 2 * 0.5 * 4 / 8, 2 - 3 * 0.5 * 2 / 4, 3 - 4 * 0.5 * 1 / 2])


def test_discounts_where_a_count_never_occurs() -> None:
    np.testing.assert_array_equal(discounts(np.array([7, 100])), [0.0, 0.5, 0.5, 0.5])


@pytest.mark.parametrize("order", [0, 8])
def test_orders_that_do_not_fit_are_refused(order: int) -> None:
    with pytest.raises(ValueError, match="orders are 1 to 7"):
        ByteNgram([b"text"], order)


def test_empty_texts_are_refused() -> None:
    with pytest.raises(ValueError, match="no byte to count"):
        ByteNgram([b"", b""])
