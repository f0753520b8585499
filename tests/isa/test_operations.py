"""The golden operations against float64, against the contract's formulas, and against bad rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lockstep_isa import numerics, operations
from lockstep_isa.numerics import add, int_to_float, mul, recip, rowsum, scale2
from support import assert_same_bits

F = np.float32


def normal(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(F)


def test_quantise_uses_the_whole_range_and_rounds_to_nearest() -> None:
    x = normal(50, 100, seed=1) * np.exp2(np.arange(-100, 100, 4, dtype=F))[:, None]
    q, s = operations.quantise_rows(x)
    assert (np.abs(q).max(axis=1) == 127).all()
    error = np.abs(q * s[:, None].astype(np.float64) - x)
    assert (error <= 0.50001 * s[:, None]).all()


def test_quantise_applies_the_prescale_first() -> None:
    x, factors = normal(4, 9, seed=2), normal(9, seed=3)
    for actual, expected in zip(
        operations.quantise_rows(x, factors), operations.quantise_rows(mul(x, factors)), strict=True
    ):
        assert_same_bits(actual, expected)


def test_a_bad_or_zero_row_quantises_to_zero_and_keeps_its_scale() -> None:
    x = np.array([[0, -0.0], [1e-40, -1e-41], [np.inf, 1], [1, np.nan], [-np.inf, np.nan], [2**-126, 1e-38]], F)
    q, s = operations.quantise_rows(x)
    assert_same_bits(q, np.zeros((6, 2), np.int8))
    assert_same_bits(s, np.array([0, 0, np.inf, np.nan, np.nan, 0], F))


@pytest.mark.parametrize("magnitude", [2.0**-118, 1e-30, 1.0, 3.4028235e38])
def test_extreme_rows_still_quantise(magnitude: float) -> None:
    q, _ = operations.quantise_rows(np.array([[magnitude, -magnitude, magnitude / 2, 0]], F))
    assert q.tolist() in ([[127, -127, 64, 0]], [[127, -127, 63, 0]])


def test_linear_is_exact_before_it_is_scaled() -> None:
    rng = np.random.default_rng(4)
    q, w = rng.integers(-128, 128, (5, 1000)).astype(np.int8), rng.integers(-128, 128, (7, 1000)).astype(np.int8)
    q[0], w[0] = -128, -128
    s, sw, bias = normal(5, seed=5), normal(7, seed=6), normal(7, seed=7)
    exact = np.array([[sum(int(a) * int(b) for a, b in zip(x, y, strict=True)) for y in w] for x in q])
    assert exact[0, 0] == 128 * 128 * 1000
    product = (exact.astype(F) * s[:, None]) * sw
    assert_same_bits(operations.linear(q, s, w, sw), product)
    assert_same_bits(operations.linear(q, s, w, sw, bias), product + bias)


def test_linear_refuses_sums_that_could_overflow() -> None:
    q = np.zeros((1, operations.MAX_K + 1), np.int8)
    with pytest.raises(ValueError, match="K = 131072 may overflow"):
        operations.linear(q, np.ones(1, F), q, np.ones(1, F))


@pytest.mark.parametrize("n", [1, 7, 384])
def test_layer_norm_is_close_to_float64(n: int) -> None:
    x, gamma, beta = normal(6, n, seed=8) * 3 + 2, normal(n, seed=9), normal(n, seed=10)
    wide = x.astype(np.float64)
    exact = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + 1e-5) * gamma + beta
    np.testing.assert_allclose(operations.layer_norm(x, gamma, beta, 1e-5), exact, atol=5e-6 * np.sqrt(n))


@pytest.mark.parametrize("groups", [1, 3, 48])
def test_rms_norm_is_close_to_float64_in_every_group(groups: int) -> None:
    x, gamma = normal(6, 384, seed=24) * 3 + 1, normal(384 // groups, seed=25)
    wide = x.astype(np.float64).reshape(6, groups, -1)
    exact = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * gamma
    np.testing.assert_allclose(operations.rms_norm(x, gamma, 1e-5, groups), exact.reshape(6, 384), rtol=2e-6)


def test_rms_norm_is_the_formula_of_the_contract() -> None:
    x, gamma = normal(5, 100, seed=26), normal(100, seed=27)
    r = numerics.rsqrt(add(mul(rowsum(mul(x, x)), F(1 / 100)), F(1e-6)))
    assert_same_bits(operations.rms_norm(x, gamma, 1e-6), mul(mul(x, r[:, None]), gamma))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_turns_pairs_of_features_as_complex_numbers(interleaved: bool) -> None:
    x, angles = normal(7, 3 * 20, seed=28), normal(7, 8, seed=29) * 5
    y = operations.rotary(x, np.cos(angles), np.sin(angles), 3, interleaved).reshape(7, 3, 20)
    heads = x.reshape(7, 3, 20)
    low, high = (np.arange(0, 16, 2), np.arange(1, 16, 2)) if interleaved else (np.arange(8), np.arange(8, 16))
    turned = (heads[..., low] + 1j * heads[..., high]) * np.exp(1j * angles.astype(np.float64))[:, None]
    np.testing.assert_allclose(y[..., low], turned.real, atol=1e-6)
    np.testing.assert_allclose(y[..., high], turned.imag, atol=1e-6)
    assert_same_bits(y[..., 16:], heads[..., 16:])


def test_multiply_repeats_a_single_row_and_relu_has_no_minus_zero() -> None:
    x, y = normal(4, 9, seed=30), normal(1, 9, seed=31)
    assert_same_bits(operations.multiply(x, y), x * y)
    assert_same_bits(operations.apply_function("relu", F([-0.0, -3, 2, 1e-40, np.inf])), F([0, 0, 2, 0, np.inf]))


def softmax_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    scores = q.astype(np.float64) @ k.T / math.sqrt(q.shape[1])
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True) @ v


@pytest.mark.parametrize("tile", [1, 16, 50, 77, 1000])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_close_to_softmax(tile: int, masked: bool) -> None:
    q, k, v = normal(20, 64, seed=11), normal(77, 64, seed=12), normal(77, 64, seed=13)
    mask = np.tril(np.ones((20, 77), bool), 30) if masked else None
    error = operations.attention(q, k, v, tile=tile, mask=mask) - softmax_attention(q, k, v, mask)
    assert np.abs(error).max() < 0.03


@pytest.mark.parametrize("window", [None, 1, 30])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_cached_attention_is_close_to_softmax_head_by_head(causal: bool, window: int | None, biased: bool) -> None:
    heads, kv_heads, d, keys, before = 6, 2, 32, 77, 50
    q, k, v = normal(20, heads * d, seed=32), normal(keys, kv_heads * d, seed=33), normal(keys, kv_heads * d, seed=34)
    bias = normal(heads, 20, keys, seed=35) if biased else None
    p, j = np.arange(before, before + 20)[:, None], np.arange(keys)
    mask = (j <= (p if causal else keys)) & (j > p - (window or 1000))
    (k8, sk), (v8, sv) = (operations.quantise_rows(x.reshape(-1, d)) for x in (k, v))
    cache = (k8.reshape(k.shape), sk.reshape(keys, -1), v8.reshape(v.shape), sv.reshape(keys, -1))
    for tile in (16, 100):
        y = operations.attention_cached(q, p[:, 0], *cache, tile=tile, causal=causal, window=window, bias=bias)
        for head in range(heads):
            at, of = slice(head * d, head * d + d), slice(head // 3 * d, head // 3 * d + d)
            scores = q[:, at].astype(np.float64) @ k[:, of].T / math.sqrt(d) + (bias[head] if biased else 0)
            weights = np.exp(np.where(mask, scores, -np.inf))
            exact = weights / weights.sum(axis=1, keepdims=True) @ v[:, of]
            assert np.abs(y[:, at] - exact).max() < 0.05


def test_a_row_that_sees_no_key_gives_zero() -> None:
    q, k, v = normal(2, 8, seed=36), normal(5, 8, seed=37), normal(5, 8, seed=38)
    mask = np.array([[True] * 5, [False] * 5])
    y = operations.attention(q, k, v, tile=2, mask=mask)
    assert_same_bits(y[1], np.zeros(8, F))
    assert_same_bits(y[:1], operations.attention(q[:1], k, v, tile=2))


def test_keys_that_are_not_seen_are_masked_even_where_scores_are_least() -> None:
    """A score of -32000 is that of a key that is seen; one that is not seen gets no weight all the same."""
    q, k, v = F([[1.0]]), F([[-1e9], [1e9], [-1e9]]), F([[1], [2], [4]])
    y = operations.attention(q, k, v, tile=3, scale=1.0, mask=np.array([[True, False, False]]))
    np.testing.assert_allclose(y, [[1.0]], rtol=1e-5)
    assert_same_bits(y, operations.attention(q, k[:1], v[:1], tile=3, scale=1.0))


def test_one_tile_is_the_formula_of_the_contract() -> None:
    q, k, v = normal(9, 32, seed=14) * 4, normal(40, 32, seed=15), normal(40, 32, seed=16)
    (q8, sq), (k8, sk), (v8, sv) = (operations.quantise_rows(x) for x in (q, k, v))
    c = mul(sq, F(math.log2(math.e) / math.sqrt(32)))
    scores = int_to_float(q8.astype(np.int32) @ k8.T.astype(np.int32))
    m, n = numerics.exp2_parts(numerics.clamp_score(mul(mul(scores, sk), c[:, None])))
    e = scale2(m, n - n.max(axis=1)[:, None])
    w = mul(e, sv)
    sp = mul(numerics.absmax(w), F(1 / 255))
    p = numerics.round_to_int8bits(mul(w, recip(sp)[:, None]))
    product = int_to_float(p.astype(np.int32) @ v8.astype(np.int32))
    expected = mul(mul(product, sp[:, None]), recip(rowsum(e))[:, None])
    for tile in (40, 41, 10**6):
        assert_same_bits(operations.attention(q, k, v, tile=tile), expected)


def test_streaming_equals_two_passes_with_the_global_maximum() -> None:
    q, k, v = normal(30, 16, seed=17) * 8, normal(100, 16, seed=18) * 2, normal(100, 16, seed=19)
    (q8, sq), (k8, sk), (v8, sv) = (operations.quantise_rows(x) for x in (q, k, v))
    c = mul(sq, F(math.log2(math.e) / math.sqrt(16)))
    scores = int_to_float(q8.astype(np.int32) @ k8.T.astype(np.int32))
    m, n = numerics.exp2_parts(numerics.clamp_score(mul(mul(scores, sk), c[:, None])))
    e = scale2(m, n - n.max(axis=1)[:, None])
    total, out = np.zeros(30, F), np.zeros((30, 16), F)
    for at in (slice(i, i + 24) for i in range(0, 100, 24)):
        p, sp = operations.requantise(mul(e[:, at], sv[at]), 255)
        total = add(total, rowsum(e[:, at]))
        out = add(out, mul(int_to_float(p.astype(np.int32) @ v8[at].astype(np.int32)), sp[:, None]))
    assert_same_bits(operations.attention(q, k, v, tile=24), mul(out, recip(total)[:, None]))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 40), st.integers(1, 90), st.integers(0, 2**32))
def test_masked_keys_behind_the_last_one_change_nothing(rows: int, keys: int, more: int, tile: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(n, 8)).astype(F) for n in (rows, keys + more, keys + more))
    mask = np.tile(np.arange(keys + more) < keys, (rows, 1))
    assert_same_bits(
        operations.attention(q, k, v, tile=tile, mask=mask), operations.attention(q, k[:keys], v[:keys], tile=tile)
    )


def test_a_bad_query_spoils_its_own_row_only() -> None:
    q, k, v = normal(5, 16, seed=20), normal(30, 16, seed=21), normal(30, 16, seed=22)
    clean = operations.attention(q, k, v, tile=8)
    q[2, 3], q[4, 0] = np.nan, np.inf
    spoilt = operations.attention(q, k, v, tile=8)
    assert_same_bits(spoilt[[0, 1, 3]], clean[[0, 1, 3]])
    assert np.isnan(spoilt[[2, 4]]).all()


def test_unknown_function_names_those_there_are() -> None:
    with pytest.raises(ValueError, match="unknown function 'mish': there are exp2, recip"):
        operations.apply_function("mish", F(1))


def test_a_tile_of_no_keys_is_refused() -> None:
    x = normal(1, 4, seed=23)
    with pytest.raises(ValueError, match="tile = 0 must be from 1"):
        operations.attention(x, x, x, tile=0)
