"""Plans against the golden operations, step by step and as a whole."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lockstep_hls import kernels
from lockstep_hls.plan import Cache, Plan, Rows
from lockstep_isa import operations
from support import SPECIALS, assert_same_bits

F = np.float32
seeds = st.integers(0, 2**32)


def rows(memory: np.ndarray) -> Rows:
    return Rows(memory, True)


def empty(count: int, columns: int, dtype: type = F) -> Rows:
    return Rows(np.full((count, columns), 77, dtype), True)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 15), st.integers(1, 200), st.integers(1, 150), st.booleans(), seeds)
def test_a_product_of_a_plan_has_golden_bits(count: int, k: int, columns: int, biased: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, k)).astype(F)
    x[rng.random(x.shape) < 0.01] = rng.choice(SPECIALS)
    w = rng.choice(np.array([-128, 127, 0, 5], np.int8), (columns, k))
    sw, bias = rng.normal(size=(2, columns)).astype(F)
    factors = rng.choice([F(0.3), F(1), F(7)], k)
    plan, q, s, y = Plan(), empty(count, k, np.int8), empty(count, 1), empty(count, columns)
    plan.quantise_rows(rows(x), factors, q, s, last=False)
    plan.linear(q, s, w, sw, bias if biased else None, y, last=False)
    plan.run(count)
    expected = operations.quantise_rows(x, factors)
    assert_same_bits(q.memory, expected[0])
    assert_same_bits(s.memory[:, 0], expected[1])
    assert_same_bits(y.memory, operations.linear(*expected, w, sw, bias if biased else None))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 15), st.integers(1, 3), st.integers(1, 9), st.integers(0, 20), st.booleans(), seeds)
def test_operations_on_rows_have_golden_bits(
    count: int, heads: int, pairs: int, first: int, interleaved: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    n = heads * (2 * pairs + 1)
    x, table, constant = (rng.normal(size=(size, n)).astype(F) for size in (count, 30, 1))
    gamma, beta = rng.normal(size=(2, n)).astype(F)
    cos, sin = rng.normal(size=(2, first + count, pairs)).astype(F)
    ids = rng.integers(0, 30, (count, 1))
    plan, results = Plan(), [empty(count, n) for _ in range(9)]
    given, one = rows(x), Rows(constant, False)
    plan.gather(table, rows(ids), results[0], last=False)
    plan.add(given, results[0], results[1], last=False)
    plan.multiply(given, one, results[2], last=False)
    plan.layer_norm(given, gamma, beta, 1e-5, results[3], last=False)
    plan.rms_norm(given, gamma, 1e-5, 1, results[4], last=False)
    plan.rms_norm(given, gamma[: n // heads], 1e-6, heads, results[5], last=False)
    plan.rotary(given, cos, sin, heads, interleaved, results[6], last=False)
    plan.apply_function("gelu_erf", given, results[7], last=False)
    plan.apply_function("relu", given, results[8], last=False)
    plan.run(count, first)
    turned = operations.rotary(x, cos[first:], sin[first:], heads, interleaved)
    expected = [
        *(table[ids[:, 0]], operations.add(x, table[ids[:, 0]]), operations.multiply(x, constant)),
        *(operations.layer_norm(x, gamma, beta, 1e-5), operations.rms_norm(x, gamma, 1e-5)),
        *(operations.rms_norm(x, gamma[: n // heads], 1e-6, heads), turned),
        *(operations.apply_function("gelu_erf", x), operations.apply_function("relu", x)),
    ]
    for result, wanted in zip(results, expected, strict=True):
        assert_same_bits(result.memory, wanted)


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 40), min_size=1, max_size=4), kv_heads=st.integers(1, 3), group=st.integers(1, 3),
    d=st.integers(1, 70), tile=st.sampled_from([3, 16, 64, 512]), window=st.sampled_from([None, 1, 20]), seed=seeds,
)  # fmt: skip
def test_attention_reads_what_was_kept_in_pieces(
    cuts: list[int], kv_heads: int, group: int, d: int, tile: int, window: int | None, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    total, heads = sum(cuts), kv_heads * group
    q = rng.normal(size=(total, heads * d)).astype(F) * F(3)
    k, v = rng.normal(size=(2, total, kv_heads * d)).astype(F)
    caches = [Cache.empty(kv_heads, total + 3, d) for _ in range(2)]
    first, found = 0, []
    for count in cuts:
        plan, y, at = Plan(), empty(count, heads * d), slice(first, first + count)
        for x, cache in zip((k, v), caches, strict=True):
            plan.keep(rows(x[at].copy()), cache)
        plan.attention(
            rows(q[at].copy()), *caches, y, heads=heads, tile=tile, scale=0.3, causal=True, window=window, last=False
        )
        plan.run(count, first)
        found.append(y.memory)
        first += count
    k8, sk, v8, sv = (
        part.reshape(total, -1) for x in (k, v) for part in operations.quantise_rows(x.reshape(-1, d))
    )  # fmt: skip
    expected = operations.attention_cached(
        q, np.arange(total), k8, sk, v8, sv, tile=tile, scale=0.3, causal=True, window=window
    )
    assert_same_bits(np.vstack(found), expected)


def test_the_last_row_alone_is_computed_from_whole_values_and_from_single_rows() -> None:
    x = np.random.default_rng(1).normal(size=(6, 10)).astype(F)
    plan, single, y = Plan(), Rows(np.zeros((1, 10), F), False), Rows(np.zeros((1, 10), F), False)
    plan.apply_function("silu", rows(x), single, last=True)
    plan.add(single, rows(x), y, last=True)
    plan.run(6)
    assert_same_bits(y.memory[0], operations.add(operations.apply_function("silu", x[5]), x[5]))
    plan.run(4)  # fewer than there is room for
    assert_same_bits(y.memory[0], operations.add(operations.apply_function("silu", x[3]), x[3]))


def test_the_number_of_threads_changes_no_bit_of_a_plan() -> None:
    rng = np.random.default_rng(2)
    x, w = rng.normal(size=(70, 300)).astype(F), rng.integers(-128, 128, (700, 300)).astype(np.int8)
    sw = rng.normal(size=700).astype(F)
    plan, q, s, y, z = Plan(), empty(70, 300, np.int8), empty(70, 1), empty(70, 700), empty(70, 700)
    plan.quantise_rows(rows(x), None, q, s, last=False)
    plan.linear(q, s, w, sw, None, y, last=False)
    plan.apply_function("gelu_tanh", y, z, last=False)
    expected = operations.apply_function("gelu_tanh", operations.linear(*operations.quantise_rows(x), w, sw))
    before = kernels.threads()
    try:
        for threads in (1, 2, 5):
            kernels.set_threads(threads)
            for _ in range(10):
                z.memory[:] = 0
                plan.run(70)
                assert_same_bits(z.memory, expected)
    finally:
        kernels.set_threads(before)


def test_wrong_shapes_and_names_are_refused() -> None:
    plan, x, y = Plan(), rows(np.ones((2, 4), F)), empty(2, 4)
    with pytest.raises(ValueError, match=r"expected float32\[4\], not \[3\]"):
        plan.layer_norm(x, np.ones(3, F), np.ones(4, F), 1e-5, y, last=False)
    with pytest.raises(ValueError, match=r"expected int8\[M, 5\], not int8\[2, 4\]"):
        plan.linear(empty(2, 4, np.int8), empty(2, 1), np.ones((3, 5), np.int8), np.ones(3), None, y, last=False)
    with pytest.raises(ValueError, match="unknown function 'mish'"):
        plan.apply_function("mish", x, y, last=False)
