"""The compiled operations against the golden ones, bit for bit."""

from __future__ import annotations

import gc
import os
import weakref
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lockstep_hls import kernels, weights
from lockstep_hls.library import load
from lockstep_hls.library import prepare as compile_kernels
from lockstep_hls.toolchain import FLAGS
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


def test_multiply_has_golden_bits_and_repeats_a_single_row() -> None:
    a = adversarial_floats(COUNT, seed=12).reshape(1000, 1000)
    b = np.random.default_rng(13).permutation(adversarial_floats(COUNT, seed=14)).reshape(1000, 1000)
    assert_same_bits(kernels.multiply(a, b), operations.multiply(a, b), a=a, b=b)
    for x, y in ((a, b[:1]), (a[:1], b), (a[:1], b[:1])):
        assert_same_bits(kernels.multiply(x, y), operations.multiply(x, y))
        assert_same_bits(kernels.add(x, y), operations.add(x, y))


def test_relu_has_golden_bits() -> None:
    x = adversarial_floats(COUNT, seed=15)
    assert_same_bits(kernels.apply_function("relu", x), operations.apply_function("relu", x), x=x)


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


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 100), st.integers(1, 5), seeds)
def test_rms_norm_has_golden_bits(rows: int, n: int, groups: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, gamma = rows_with_trouble(rng, rows, n * groups), rng.normal(size=n).astype(F)
    assert_same_bits(kernels.rms_norm(x, gamma, 1e-6, groups), operations.rms_norm(x, gamma, 1e-6, groups), x=x)


def test_rms_norm_has_golden_bits_on_a_million_values() -> None:
    rng = np.random.default_rng(16)
    x, gamma = rows_with_trouble(rng, 1400, 768), rng.normal(size=768).astype(F)
    assert_same_bits(kernels.rms_norm(x, gamma, 1e-5), operations.rms_norm(x, gamma, 1e-5), x=x)
    x, gamma = x.reshape(-1, 1536), gamma[:96]
    assert_same_bits(kernels.rms_norm(x, gamma, 1e-5, 16), operations.rms_norm(x, gamma, 1e-5, 16), x=x)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 20), st.integers(0, 5), st.booleans(), seeds)
def test_rotary_has_golden_bits(rows: int, heads: int, pairs: int, rest: int, interleaved: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rows_with_trouble(rng, rows, heads * (2 * pairs + rest + 1))
    angles = rng.uniform(-9, 9, (rows, pairs))
    tables = np.cos(angles).astype(F), np.sin(angles).astype(F)
    assert_same_bits(
        kernels.rotary(x, *tables, heads, interleaved), operations.rotary(x, *tables, heads, interleaved), x=x
    )


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_has_golden_bits_on_a_million_values(interleaved: bool) -> None:
    x = adversarial_floats(COUNT + 24_000, seed=17).reshape(2000, 512)
    x = np.random.default_rng(18).permutation(x.ravel()).reshape(x.shape)
    tables = np.random.default_rng(19).permutation(adversarial_floats(2 * 2000 * 32, seed=20)).reshape(2, 2000, 32)
    assert_same_bits(kernels.rotary(x, *tables, 8, interleaved), operations.rotary(x, *tables, 8, interleaved), x=x)


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


@dataclass(frozen=True)
class Cache:
    """Random quantised keys and values of a few heads."""

    k8: np.ndarray
    sk: np.ndarray
    v8: np.ndarray
    sv: np.ndarray

    @classmethod
    def random(cls, rng: np.random.Generator, keys: int, kv_heads: int, d: int, trouble: bool = False) -> Cache:
        def rows() -> list[np.ndarray]:
            x = rows_with_trouble(rng, keys * kv_heads, d) if trouble else rng.normal(size=(keys * kv_heads, d))
            q, s = operations.quantise_rows(x * F(2) if not trouble else x)
            return [q.reshape(keys, kv_heads * d), s.reshape(keys, kv_heads)]

        return cls(*rows(), *rows())

    def first(self, keys: int) -> list[np.ndarray]:
        return [x[:keys] for x in (self.k8, self.sk, self.v8, self.sv)]


shapes = {
    "kv_heads": st.integers(1, 3),
    "group": st.integers(1, 4),
    "d": st.integers(1, 70),
    "tile": st.sampled_from([1, 3, 16, 64, 65, 100, 200, 512]),
    "window": st.sampled_from([None, 1, 5, 20, 64, 90]),
}


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 70), before=st.integers(0, 150), behind=st.integers(0, 30), causal=st.booleans(),
    biased=st.booleans(), trouble=st.booleans(), seed=seeds, **shapes,
)  # fmt: skip
def test_cached_attention_has_golden_bits(
    rows: int, before: int, behind: int, causal: bool, biased: bool, trouble: bool, seed: int,
    kv_heads: int, group: int, d: int, tile: int, window: int | None,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    keys, heads = before + rows + behind, kv_heads * group
    cache = Cache.random(rng, keys, kv_heads, d, trouble)
    q = rows_with_trouble(rng, rows, heads * d)
    bias = rng.normal(size=(heads, rows, keys)).astype(F) * F(4) if biased else None
    if biased and trouble:
        bias[rng.random(bias.shape) < 0.01] = rng.choice(SPECIALS)
    options = {"tile": tile, "scale": 0.3, "causal": causal, "window": window, "bias": bias}
    at = np.arange(before, before + rows)
    assert_same_bits(
        kernels.attention_cached(q, at, *cache.first(keys), **options),
        operations.attention_cached(q, at, *cache.first(keys), **options),
    )


@pytest.mark.parametrize("module", [operations, kernels], ids=["golden", "C++"])
@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 40), cut=st.integers(0, 40), kv_heads=st.integers(1, 2), group=st.integers(1, 2),
    tile=st.sampled_from([5, 16, 64]), window=st.sampled_from([None, 1, 7, 20]), seed=seeds,
)  # fmt: skip
def test_decoding_chunks_and_prefill_give_the_same_bits(
    module: ModuleType, tokens: int, cut: int, kv_heads: int, group: int, tile: int, window: int | None, seed: int
) -> None:
    d = 12
    rng = np.random.default_rng(seed)
    cache = Cache.random(rng, tokens, kv_heads, d)
    q = rng.normal(size=(tokens, kv_heads * group * d)).astype(F) * F(3)

    def run(first: int, last: int, keys: int | None = None) -> np.ndarray:
        at = np.arange(first, last)
        return module.attention_cached(q[first:last], at, *cache.first(keys or last), tile=tile, window=window)

    prefill = run(0, tokens)
    cut = min(cut, tokens)
    chunks = [run(first, last) for first, last in ((0, cut), (cut, tokens)) if first < last]
    assert_same_bits(np.vstack(chunks), prefill)
    assert_same_bits(np.vstack([run(i, i + 1) for i in range(tokens)]), prefill)
    assert_same_bits(np.vstack([run(i, i + 1, tokens) for i in range(tokens)]), prefill)  # with keys of the future


def test_a_token_does_not_feel_what_stands_behind_its_tile() -> None:
    rng = np.random.default_rng(21)
    cache, q = Cache.random(rng, 40, 1, 8), rng.normal(size=(16, 8)).astype(F)
    clean = kernels.attention_cached(q, np.arange(16), *cache.first(40), tile=16)
    cache.sv[16:], cache.sk[16:] = np.nan, np.inf
    for module in (kernels, operations):
        assert_same_bits(module.attention_cached(q, np.arange(16), *cache.first(40), tile=16), clean)


def test_the_number_of_threads_changes_no_bit() -> None:
    rng = np.random.default_rng(22)
    q, w = rng.integers(-128, 128, (50, 300)).astype(np.int8), rng.integers(-128, 128, (700, 300)).astype(np.int8)
    s, sw = rng.normal(size=50).astype(F), rng.normal(size=700).astype(F)
    cache, x = Cache.random(rng, 200, 4, 64), rng.normal(size=(100, 512)).astype(F)

    def run() -> list[np.ndarray]:
        return [
            kernels.linear(q, s, w, sw),
            kernels.attention_cached(x, np.arange(100, 200), *cache.first(200), tile=64),
            kernels.rms_norm(x, x[0], 1e-5),
            kernels.apply_function("silu", x),
            *kernels.quantise_rows(x),
        ]

    results = []
    try:
        for threads in (1, 2, 5):
            kernels.set_threads(threads)
            results += [run() for _ in range(20)]
    finally:
        kernels.set_threads(os.cpu_count() or 1)
    for result in results[1:]:
        for actual, expected in zip(result, results[0], strict=True):
            assert_same_bits(actual, expected)


NARROWER = {
    "AVX-512 without dot products": ["-mno-avx512vnni"],
    "AVX2": ["-mno-avx512f"],
    "SSE2": ["-mno-avx512f", "-mno-avx2"],
}


@pytest.mark.parametrize("flags", NARROWER.values(), ids=NARROWER)
def test_narrower_instructions_give_the_same_bits(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(23)
    q, w = rng.integers(-128, 128, (13, 333)).astype(np.int8), rng.integers(-128, 128, (150, 333)).astype(np.int8)
    s, sw = rng.normal(size=13).astype(F), rng.normal(size=150).astype(F)
    cache, x = Cache.random(rng, 90, 2, 40), rng.normal(size=(9, 160)).astype(F)
    trouble = adversarial_floats(10_001, seed=24)

    def run() -> list[np.ndarray]:
        attended = kernels.attention_cached(x, np.arange(81, 90), *cache.first(90), tile=32)
        functions = [kernels.apply_function(name, trouble) for name in FUNCTIONS]
        return [kernels.linear(q, s, w, sw), attended, *functions]

    expected = run()
    narrow = load(compile_kernels(flags=[*FLAGS, *flags]))
    for module in (kernels, weights):
        monkeypatch.setattr(module, "library", lambda: narrow)
    for actual, wide in zip(run(), expected, strict=True):
        assert_same_bits(actual, wide)


def test_read_only_weights_are_packed_once_and_freed_with_the_array() -> None:
    w = np.ones((5, 8), np.int8)
    assert weights.packed(w) is not weights.packed(w)
    w.flags.writeable = False
    first = weakref.ref(weights.packed(w))
    assert weights.packed(w) is first()
    gc.collect()  # what other tests left
    before = len(weights._PACKED)
    del w
    gc.collect()
    assert first() is None
    assert len(weights._PACKED) == before - 1


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
    with pytest.raises(ValueError, match="4 features do not make 3 equal groups"):
        kernels.rms_norm(x, x[0], 1e-5, groups=3)
    with pytest.raises(ValueError, match="4 features are no 2 heads with 2 pairs each"):
        kernels.rotary(x, x[:, :2], x[:, :2], 2)
    for module in (kernels, operations):
        with pytest.raises(ValueError, match="window = 0 must be at least 1"):
            module.attention_cached(x, np.arange(2), q, x[:, 0], q, x[:, 0], tile=4, window=0)
    with pytest.raises(ValueError, match=r"expected int\[2\] as positions, not \[3\]"):
        kernels.attention_cached(x, np.arange(3), q, x[:, 0], q, x[:, 0], tile=4)
    with pytest.raises(ValueError, match=r"6 features of queries are no multiple of 1 heads of 4"):
        kernels.attention_cached(np.ones((2, 6), F), np.arange(2), q, x[:, 0], q, x[:, 0], tile=4)
