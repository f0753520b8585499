"""The meaning of quantised weights: expansion, patterns, and packed words read by a decoder of their own."""

from __future__ import annotations

import numpy as np
import pytest
from lockstep_isa.weights import (
    GROUPS,
    PATTERNS,
    GroupError,
    Pattern,
    PatternError,
    RangeError,
    WeightError,
    check_pattern,
    compress,
    decompress,
    expand,
    pack,
    stream,
    unpack,
    words_per_tile,
)

FORMATS = [(group, pattern) for group in (None, *GROUPS) for pattern in (None, *PATTERNS)]


def sparse(rng: np.random.Generator, w: np.ndarray, pattern: Pattern | None) -> np.ndarray:
    """``w`` with zeros so that at most N of M are left, some groups with fewer."""
    if pattern is None:
        return w
    n, m = pattern
    rank = rng.random((len(w), w.shape[1] // m, m)).argsort(axis=2).argsort(axis=2)
    return np.where(rank.reshape(w.shape) < n, w, 0).astype(np.int8)


def example(
    seed: int, shape: tuple[int, int], group: int | None, pattern: Pattern | None
) -> tuple[np.ndarray, np.ndarray | None]:
    rng = np.random.default_rng(seed)
    if group is None:
        return sparse(rng, rng.integers(-128, 128, shape).astype(np.int8), pattern), None
    k = rng.integers(1, 19, (shape[0], shape[1] // group)).astype(np.uint8)
    lowest = np.where(np.repeat(k, group, axis=1) > 15, -7, -8)
    w4 = np.maximum(rng.integers(-8, 8, shape), lowest).astype(np.int8)
    return sparse(rng, w4, pattern), k


def decode(words: np.ndarray, channel: int, length: int, group: int | None, pattern: Pattern | None) -> list[int]:
    """w8 of one channel, word by word as a core would take them."""
    tile, lane = divmod(channel, words.shape[2])
    stream = iter(int(byte) for byte in words[tile, :, lane])
    n, m = pattern or (1, 1)
    result = [0] * length
    for start in range(0, length, group or length):
        factor = 1 if group is None else next(stream)
        kept = (group or length) * n // m
        for first in range(0, kept, 4):
            index = 0 if pattern is None else next(stream)
            held = 0
            for i in range(4):
                if group is None:
                    value = next(stream)
                    value -= 256 * (value > 127)
                else:
                    if i % 2 == 0:
                        held = next(stream)
                    value = (held & 15) - 16 * (held & 15 > 7)
                    held = (held - value) // 16 % 16
                at = start + (first + i) // n * m + (index >> 2 * i & 3)
                if value:
                    result[at] = value * factor
    assert next(stream, None) is None
    return result


@pytest.mark.parametrize(("group", "pattern"), FORMATS)
@pytest.mark.parametrize("columns", [4, 16])
def test_packed_words_read_in_order_give_the_weights(group: int | None, pattern: Pattern | None, columns: int) -> None:
    shape = 19, 2 * (group or 40)
    shape = (shape[0], 48) if group is None and pattern == (1, 4) else shape
    w, k = example(7, shape, group, pattern)
    words = pack(w, columns, k, pattern)
    assert words.shape == (-(-19 // columns), words_per_tile(shape[1], group, pattern), columns)
    w8 = w if k is None else expand(w, k)
    for channel in range(len(w)):
        assert decode(words, channel, shape[1], group, pattern) == w8[channel].tolist(), f"channel {channel}"
    back, multipliers = unpack(words, shape, group, pattern)
    assert back.dtype == np.int8
    assert np.array_equal(back, w)
    assert (multipliers is None) == (k is None)
    assert k is None or np.array_equal(multipliers, k)


@pytest.mark.parametrize(
    ("group", "pattern", "words"),
    [
        (None, None, 128),
        (32, None, 4 * 17),
        (128, None, 65),
        (None, (2, 4), 80),
        (None, (1, 4), 40),
        (32, (2, 4), 4 * 13),
        (32, (1, 4), 4 * 7),
    ],
)
def test_words_of_128_inputs(group: int | None, pattern: Pattern | None, words: int) -> None:
    assert words_per_tile(128, group, pattern) == words


def test_two_values_are_a_sum_and_the_first_position_is_in_the_low_bits() -> None:
    w = np.zeros((1, 32), np.int8)
    w[0, [1, 3, 4, 6]] = 5, -8, 7, -1
    words = pack(w, 1, np.array([[3]], np.uint8), (2, 4))
    assert words[0, :4, 0].tolist() == [3, 0b10_00_11_01, 5 - 8 * 16 + 256, 7 - 16 + 256]
    w[0, [1, 3, 4, 6]] = -5, 3, -8, -8
    assert pack(w, 1, np.array([[3]], np.uint8), (2, 4))[0, [2, 3], 0].tolist() == [-5 + 3 * 16, 256 - 8 * 17 % 256]


def test_int4_times_multiplier() -> None:
    w4 = np.tile(np.array([[-8, 7, 0, -1]], np.int8), (1, 16))
    assert expand(w4, np.array([[15, 2]], np.uint8))[0, [0, 1, 2, 3, 32, 33]].tolist() == [-120, 105, 0, -15, -16, 14]


@pytest.mark.parametrize(
    ("value", "k", "named"),
    [(-8, 16, "product .* -128 at"), (7, 19, "multiplier is 19"), (7, 0, "multiplier is 0"), (8, 1, "int4 value is 8")],
)
def test_values_out_of_range_are_named_with_their_place(value: int, k: int, named: str) -> None:
    w4 = np.zeros((3, 64), np.int8)
    w4[2, 40] = value
    multipliers = np.full((3, 2), 1, np.uint8)
    multipliers[2, 1] = k
    with pytest.raises(RangeError, match=named) as caught:
        expand(w4, multipliers)
    assert "[2, 40]" in str(caught.value) or "[2, 1]" in str(caught.value)


def test_groups_must_be_known_and_divide_the_inputs() -> None:
    with pytest.raises(GroupError, match="none of 32, 64, 128"):
        words_per_tile(64, 16)
    with pytest.raises(GroupError, match="groups of 64 do not divide the 96 inputs"):
        words_per_tile(96, 64)
    with pytest.raises(GroupError):
        expand(np.zeros((1, 48), np.int8), np.ones((1, 1), np.uint8))
    with pytest.raises(GroupError):
        expand(np.zeros((1, 65), np.int8), np.ones((1, 2), np.uint8))


def test_a_broken_pattern_is_named_with_its_place() -> None:
    w = np.zeros((4, 16), np.int8)
    w[3, 8:11] = 1
    with pytest.raises(PatternError, match=r"3 of the 4 values \[3, 8:12\] are not zero, where 2:4 allows 2"):
        check_pattern(w, (2, 4))
    with pytest.raises(PatternError, match="3:4 is none"):
        check_pattern(w, (3, 4))
    with pytest.raises(PatternError, match="groups of 4 do not divide the 6"):
        check_pattern(w[:, :6], (2, 4))
    check_pattern(np.tile(np.array([[0, 1, 0, 1]], np.int8), (2, 3)), (2, 4))


def test_positions_rise_and_keep_the_lowest_zeros() -> None:
    values, positions = compress(np.array([[0, 0, 0, 9, 0, 0, 0, 0, 0, 3, 2, 0]], np.int8), (2, 4))
    assert values.tolist() == [[0, 9, 0, 0, 3, 2]]
    assert positions.tolist() == [[0, 3, 0, 1, 1, 2]]
    with pytest.raises(PatternError, match="do not rise"):
        decompress(values, positions[:, ::-1], (2, 4))


def test_words_of_another_shape_are_refused() -> None:
    with pytest.raises(WeightError, match="do not hold"):
        unpack(np.zeros((1, 16, 4), np.uint8), (4, 32), 32)
    with pytest.raises(PatternError, match="do not come out even over 36"):
        words_per_tile(36, None, (2, 4))


@pytest.mark.parametrize("pattern", [None, (2, 4), (1, 4)])
@pytest.mark.parametrize("group", [None, 32, 128])
def test_an_array_makes_of_packed_words_what_they_mean(pattern, group) -> None:
    random = np.random.default_rng(4)
    channels, length = 8, 256
    w = random.integers(-8 if group else -127, 8 if group else 128, (channels, length)).astype(np.int8)
    if pattern is not None:
        n, m = pattern
        kept = np.argsort(random.random((channels, length // m, m)), axis=2) < n
        w = (w.reshape(kept.shape) * kept).reshape(w.shape).astype(np.int8)
    k = None if group is None else random.integers(1, 16, (channels, length // group)).astype(np.uint8)
    (words,) = pack(w, channels, k, pattern)
    meant = w if k is None else expand(w, k)
    assert (stream(words, length, group, pattern) == meant.T).all()


def test_values_with_one_position_are_added_up() -> None:
    words = np.array([[0], [3], [5], [0], [0]], np.uint8)  # both of the first two stand for k = 0
    top = stream(words, 8, pattern=(2, 4))
    assert top[:, 0].tolist() == [8, 0, 0, 0, 0, 0, 0, 0]


def test_of_products_that_leave_int8_the_low_bits_count() -> None:
    words = np.zeros((17, 1), np.uint8)
    words[0], words[1] = 255, 0x87  # a multiplier of 31; the values 7 and -8
    assert stream(words, 32, group=32)[:2, 0].tolist() == [217 - 256, -248 + 256]
