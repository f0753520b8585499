"""The compiled operations against the golden ones, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lockstep_hls import kernels
from lockstep_isa import operations
from lockstep_isa.tables import FUNCTIONS
from support import DATA, SPECIALS, adversarial_floats, assert_same_bits

F = np.float32
COUNT = 1_000_000
seeds = st.integers(0, 2**32)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_have_golden_bits(name: str) -> None:
    corners = np.load(DATA / "ftz_corner_vectors.npz")
    table = FUNCTIONS[name]
    borders = (np.arange(-260, 260) / F(2 ** (table.k + 1))).astype(F)
    x = np.concatenate([adversarial_floats(COUNT, seed=1), borders, np.nextafter(borders, F(9)), corners["a"]])
    assert_same_bits(kernels.apply_function(name, x), operations.apply_function(name, x), x=x)


def test_add_has_golden_bits_and_broadcasts() -> None:
    a = adversarial_floats(COUNT, seed=2).reshape(1000, 1000)
    b = np.random.default_rng(3).permutation(adversarial_floats(COUNT, seed=4)).reshape(1000, 1000)
    assert_same_bits(kernels.add(a, b), operations.add(a, b), a=a, b=b)
    assert_same_bits(kernels.add(a, b[0]), operations.add(a, b[0]), a=a)


def rows_with_trouble(rng: np.random.Generator, rows: int, n: int) -> np.ndarray:
    """float32[rows, n] of several magnitudes; some rows hold special values, some are all special."""
    x = (rng.normal(size=(rows, n)) * 10.0 ** rng.integers(-4, 4, (rows, 1))).astype(F)
    kind = rng.random(rows)
    x[kind < 0.1] *= F(1e-36)
    x[(kind > 0.1) & (kind < 0.2)] *= F(1e33)
    trouble = np.nonzero(kind > 0.8)[0]
    x[trouble, rng.integers(0, n, len(trouble))] = rng.choice(SPECIALS, len(trouble))
    x[kind > 0.97] = rng.choice(SPECIALS, ((kind > 0.97).sum(), n))
    return x


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 300), st.booleans(), seeds)
def test_quantise_rows_has_golden_bits(rows: int, n: int, prescaled: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rows_with_trouble(rng, rows, n)
    factors = rng.choice([F(1e-30), F(0.3), F(1), F(7)], n) if prescaled else None
    actual, expected = kernels.quantise_rows(x, factors), operations.quantise_rows(x, factors)
    assert_same_bits(actual[0], expected[0], x=x)
    assert_same_bits(actual[1], expected[1])


def test_quantise_rows_has_golden_bits_on_a_million_values() -> None:
    x = rows_with_trouble(np.random.default_rng(5), 2700, 384)
    for actual, expected in zip(kernels.quantise_rows(x), operations.quantise_rows(x), strict=True):
        assert_same_bits(actual, expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 21), st.integers(1, 140), st.integers(1, 200), st.booleans(), st.booleans(), seeds)
def test_linear_has_golden_bits(rows: int, columns: int, k: int, biased: bool, packed: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    q, w = rng.integers(-128, 128, (rows, k)).astype(np.int8), rng.integers(-128, 128, (columns, k)).astype(np.int8)
    s, sw = rows_with_trouble(rng, rows, 1)[:, 0], rows_with_trouble(rng, columns, 1)[:, 0]
    bias = rows_with_trouble(rng, columns, 1)[:, 0] if biased else None
    weights = kernels.pack_weights(w) if packed else w
    assert_same_bits(kernels.linear(q, s, weights, sw, bias), operations.linear(q, s, w, sw, bias))


@pytest.mark.parametrize("sign", [127, -128])
def test_linear_is_exact_at_the_longest_sum(sign: int) -> None:
    q = np.full((2, operations.MAX_K), -128, np.int8)
    w = np.full((3, operations.MAX_K), sign, np.int8)
    one = np.ones(3, F)
    assert_same_bits(kernels.linear(q, one[:2], w, one), operations.linear(q, one[:2], w, one))
    assert kernels.linear(q, one[:2], w, one)[0, 0] == F(-128 * sign * operations.MAX_K)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 500), seeds)
def test_layer_norm_has_golden_bits(rows: int, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, (gamma, beta) = rows_with_trouble(rng, rows, n), rng.normal(size=(2, n)).astype(F)
    assert_same_bits(
        kernels.layer_norm(x, gamma, beta, 1e-12), operations.layer_norm(x, gamma, beta, 1e-12), x=x
    )  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 40), st.integers(1, 90), st.integers(1, 100), st.integers(1, 120), st.booleans(), seeds)
def test_attention_has_golden_bits(rows: int, keys: int, d: int, tile: int, masked: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    q, k, v = (rows_with_trouble(rng, n, d) for n in (rows, keys, keys))
    if rng.random() < 0.7:
        k, v = (np.where(np.abs(x) < 1e4, x, F(1)) for x in (k, v))
    mask = rng.random((rows, keys)) < rng.random() if masked else None
    assert_same_bits(
        kernels.attention(q, k, v, tile=tile, mask=mask), operations.attention(q, k, v, tile=tile, mask=mask)
    )


@pytest.mark.parametrize("tile", [64, 512])
def test_attention_has_golden_bits_on_a_long_context(tile: int) -> None:
    rng = np.random.default_rng(6)
    q, k, v = (rng.normal(size=(n, 64)).astype(F) for n in (300, 512, 512))
    scale = 1.5
    assert_same_bits(
        kernels.attention(q, k, v, tile=tile, scale=scale), operations.attention(q, k, v, tile=tile, scale=scale)
    )


def test_the_callers_floating_point_mode_survives() -> None:
    kernels.add(np.ones(4, F), np.ones(4, F))
    assert F(1e-39) * F(0.5) != 0


def test_wrong_shapes_are_refused_by_name() -> None:
    x, q = np.ones((2, 4), F), np.ones((2, 4), np.int8)
    with pytest.raises(ValueError, match=r"expected float32\[4\], not \[3\]"):
        kernels.quantise_rows(x, np.ones(3, F))
    with pytest.raises(ValueError, match=r"expected int8\[M, 4\], not int8\[2, 3\]"):
        kernels.linear(q[:, :3], np.ones(2, F), q, np.ones(2, F))
    with pytest.raises(ValueError, match="mask"):
        kernels.attention(x, x, x, tile=4, mask=np.ones((1, 2), bool))
    with pytest.raises(ValueError, match="unknown function 'mish'"):
        kernels.apply_function("mish", x)
