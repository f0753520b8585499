"""The golden primitives against exact rational arithmetic, hand cases and the text of the contract."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lockstep_isa import numerics
from lockstep_isa.numerics import FUNCTIONS, bits, from_bits
from support import DATA, SPECIALS, adversarial_floats, assert_same_bits

F = np.float32


def rounded(x: Fraction, zero_sign: float) -> np.float32:
    """x to 24 bits, to nearest even with unbounded exponents, then flushed: an independent reference."""
    if x == 0:
        return F(math.copysign(0.0, zero_sign))
    magnitude, sign = abs(x), 1 if x > 0 else -1
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if magnitude < Fraction(2) ** exponent:
        exponent -= 1
    step = Fraction(2) ** (exponent - 23)
    value = round(magnitude / step) * step
    if value < Fraction(2) ** -126:
        return F(math.copysign(0.0, sign))
    if value >= Fraction(2) ** 128:
        return F(math.copysign(math.inf, sign))
    return F(sign * float(value))


def finite_floats(count: int, seed: int) -> np.ndarray:
    """float32[count] over the whole range, without subnormals."""
    patterns = np.random.default_rng(seed).integers(0, 2**32, 2 * count, dtype=np.uint32)
    exponents = patterns & 0x7F800000
    return from_bits(patterns[(exponents != 0) & (exponents != 0x7F800000)][:count])


def test_products_detect_tininess_after_rounding() -> None:
    vectors = np.load(DATA / "ftz_corner_vectors.npz")
    product = numerics.mul(vectors["a"], vectors["b"])
    assert_same_bits(product, vectors["expected_after_rounding"], a=vectors["a"], b=vectors["b"])
    assert (bits(product) != bits(vectors["gradual_then_flush"])).any()
    assert (bits(product) != bits(vectors["before_rounding"])).any()


def test_sums_are_the_rounded_exact_sums() -> None:
    a, b = finite_floats(6000, seed=1), finite_floats(6000, seed=2)
    b[::3] = from_bits(bits(a[::3]) ^ np.uint32(0x80000155))  # cancels most bits
    b[1::3] = from_bits(bits(a[1::3]) & 0xFF800000 | bits(b[1::3]) & 0x7FFFFF)  # carries and ties
    sums = np.array([rounded(Fraction(float(x)) + Fraction(float(y)), 1.0) for x, y in zip(a, b, strict=True)])
    assert_same_bits(numerics.add(a, b), sums, a=a, b=b)
    assert_same_bits(numerics.sub(a, -b), sums, a=a, b=b)


def test_products_are_the_rounded_exact_products() -> None:
    a, b = finite_floats(6000, seed=3), finite_floats(6000, seed=4)
    field = (bits(a[::2]) >> 23 & 0xFF) % 126 + 1
    a[::2] = from_bits(bits(a[::2]) & 0x807FFFFF | field << 23)
    b[::2] = from_bits(bits(b[::2]) & 0x807FFFFF | (127 - field) << 23)  # products near 2**-126
    products = np.array(
        [
            rounded(Fraction(float(x)) * Fraction(float(y)), math.copysign(1, x) * math.copysign(1, y))
            for x, y in zip(a, b, strict=True)
        ]
    )
    assert_same_bits(numerics.mul(a, b), products, a=a, b=b)


def test_subnormal_operands_read_as_zeros_of_their_sign() -> None:
    tiny = np.array([1e-45, -1e-45, 1e-38, -1e-38], F)
    assert_same_bits(numerics.flush(tiny), np.array([0.0, -0.0, 0.0, -0.0], F))
    assert_same_bits(numerics.add(tiny, F(-0.0)), np.array([0.0, -0.0, 0.0, -0.0], F))
    assert_same_bits(numerics.mul(tiny, F(1e30)), np.array([0.0, -0.0, 0.0, -0.0], F))
    edge = np.array([0x007FFFFF, 0x807FFFFF, 0x00800000], np.uint32)
    assert bits(numerics.flush(from_bits(edge))).tolist() == [0, 0x80000000, 0x00800000]
    difference = numerics.sub(F(1.25 * 2**-126), F(2**-126))
    assert_same_bits(difference, F(0))


def test_every_nan_is_the_canonical_one() -> None:
    nans = np.array([0x7F800001, 0xFFFFFFFF, 0xFFC00000], np.uint32).view(F)
    for result in (numerics.add(nans, F(1)), numerics.mul(nans, nans), numerics.sub(F(np.inf), F(np.inf)).reshape(1)):
        assert (bits(result) == 0x7FC00000).all()


def test_scale2_moves_the_exponent_and_flushes() -> None:
    m = np.array([1.5, -1.5, 1.5, -1.5, 1.0, 0.0, -0.0, np.inf, np.nan, 1e-40], F)
    n = np.array([3, -127, -128, 128, -(2**20), 9, 9, -500, -500, 100])
    expected = np.array([12, -0.0, 0, -np.inf, 0, 0, -0.0, np.inf, np.nan, 0], F)
    assert_same_bits(numerics.scale2(m, n), expected, m=m, n=n)
    rng = np.random.default_rng(3)
    m, n = numerics.flush(rng.normal(size=10000)), rng.integers(-150, 150, 10000)
    with np.errstate(all="ignore"):
        exact = np.ldexp(m.astype(np.float64), n)
        reference = np.where(np.abs(exact) < 2.0**-126, np.copysign(0.0, exact), exact).astype(F)
    assert_same_bits(numerics.scale2(m, n), reference, m=m, n=n)


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        *((0.5, 0), (1.5, 2), (2.5, 2), (-0.5, 0), (-1.5, 254), (-127.5, 128), (255.4, 255), (256.6, 1)),
        *((4194302.75, 255), (4194303.5, 0), (2**22, 0), (-(2**22), 0), (2**22 + 1, 0), (2**23 + 5, 0)),
        *((math.inf, 0), (-math.inf, 0), (math.nan, 0), (1e-40, 0)),
    ],
)
def test_round_to_int8bits(x: float, expected: int) -> None:
    assert numerics.round_to_int8bits(F(x)) == expected


def test_int_to_float_rounds_to_even() -> None:
    n = np.array([2**24 + 1, 2**24 + 3, -(2**24) - 1, 2**31 - 1, -(2**31), 0], np.int32)
    assert_same_bits(numerics.int_to_float(n), np.array([2**24, 2**24 + 4, -(2**24), 2**31, -(2**31), 0], F))


def test_recip_is_total() -> None:
    x = np.array([0.0, -0.0, 1e-40, -1e-40, np.inf, -np.inf, np.nan, 2**126, 2**127, -(2**127), 2**-126, -2, 4], F)
    expected = np.array([0.0, -0.0, 0.0, -0.0, 0, 0, 0, 2**-126, 0, -0.0, 2**126, -0.5, 0.25], F)
    assert_same_bits(numerics.recip(x), expected, x=x)


def test_rsqrt_is_total() -> None:
    x = np.array([0.0, -0.0, 1e-40, -1, -np.inf, np.inf, np.nan, 4, 0.25, 2**-126, 2**126], F)
    expected = np.array([0, 0, 0, 0, 0, 0, 0, 0.5, 2, 2**63, 2**-63], F)
    assert_same_bits(numerics.rsqrt(x), expected, x=x)


def test_activations_at_special_points() -> None:
    x = np.array([0.0, -0.0, 1e-40, -1e-40, np.inf, -np.inf, np.nan, 100, -100], F)
    for name in ("gelu_erf", "gelu_tanh", "silu"):
        expected = np.array([0, 0, 0, 0, np.inf, 0, np.nan, 100, 0], F)
        assert_same_bits(numerics.evaluate(FUNCTIONS[name], x), expected, x=x)
    tanh = np.array([0.0, -0.0, 0.0, -0.0, 1, -1, np.nan, 1, -1], F)
    assert_same_bits(numerics.evaluate(FUNCTIONS["tanh"], x), tanh, x=x)
    sigmoid = np.array([0.5, 0.5, 0.5, 0.5, 1, 0, np.nan, 1, 0], F)
    assert_same_bits(numerics.evaluate(FUNCTIONS["sigmoid"], x), sigmoid, x=x)
    exp2 = np.array([1, 1, 1, 1, np.inf, 0, np.nan, 2**100, 2**-100], F)
    assert_same_bits(numerics.evaluate(FUNCTIONS["exp2"], x), exp2, x=x)


def test_exp2_parts_of_nan_leaves_the_exponent_alone() -> None:
    m, n = numerics.exp2_parts(numerics.clamp_score(np.array([np.nan, np.inf, -np.inf, 0.99], F)))
    assert np.isnan(m[0])
    assert n.tolist() == [0, 32000, -32000, 1]
    assert (m[1:] > 0.98).all()
    assert (m[1:] < 2).all()


def test_recip_and_rsqrt_hold_their_accuracy_over_all_exponents() -> None:
    x = np.abs(numerics.flush(adversarial_floats(200_000, seed=4)))
    x = x[np.isfinite(x) & (x > 0) & (x < 2.0**126)]
    wide = x.astype(np.float64)
    assert np.abs(numerics.recip(x) * wide - 1).max() < 2**-22.1
    assert np.abs(numerics.rsqrt(x) * np.sqrt(wide) - 1).max() < 2**-21.3


def partial_sums_in_words(row: np.ndarray) -> np.float32:
    """Section 'Reductions' of the contract, literally."""
    acc = [F(0)] * 64
    for i, value in enumerate(row):
        acc[i % 64] = numerics.add(acc[i % 64], value)
    for s in (32, 16, 8, 4, 2, 1):
        for j in range(s):
            acc[j] = numerics.add(acc[j], acc[j + s])
    return numerics.add(acc[0], F(0))


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 127, 128, 200])
def test_rowsum_is_the_written_order(n: int) -> None:
    x = (np.random.default_rng(n).normal(size=(2, n)) * 10.0 ** np.arange(-3, n - 3).clip(max=6)).astype(F)
    assert_same_bits(numerics.rowsum(x), np.array([partial_sums_in_words(row) for row in x]))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(list(SPECIALS[np.isfinite(SPECIALS)])), min_size=1, max_size=70), st.integers(0, 70))
def test_padding_a_sum_with_zeros_changes_nothing(row: list[np.float32], zeros: int) -> None:
    x = np.array([row], F)
    assert_same_bits(numerics.rowsum(np.pad(x, ((0, 0), (0, zeros)))), numerics.rowsum(x))


def test_a_sum_is_never_minus_zero() -> None:
    assert_same_bits(numerics.rowsum(np.array([[-0.0], [-1e-40]], F)), np.zeros(2, F))
    underflowing = np.repeat(np.array([[1.5 * 2**-126, -1.75 * 2**-126]], F), 64, axis=1)
    assert_same_bits(numerics.rowsum(underflowing), np.zeros(1, F))


def test_absmax_orders_nan_above_infinity() -> None:
    x = np.array([[1, -3, 2], [1, -np.inf, 2], [np.inf, np.nan, 0], [1e-40, -1e-39, -0.0]], F)
    assert_same_bits(numerics.absmax(x), np.array([3, np.inf, np.nan, 0], F))
