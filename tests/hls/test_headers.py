"""Every primitive of the C++ headers against the golden one, on a million values and more."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
from lockstep_hls.library import table_bytes
from lockstep_hls.toolchain import compile_shared
from lockstep_isa import numerics
from support import DATA, SPECIALS, adversarial_floats, assert_same_bits

COUNT = 1_000_000
F = np.float32


@pytest.fixture(scope="module")
def probe() -> ctypes.CDLL:
    return ctypes.CDLL(str(compile_shared([Path(__file__).with_name("primitives_probe.cpp")])))


def call(function: ctypes._CFuncPtr, *arguments: int | bytes | np.ndarray) -> None:
    """Call with sizes as size_t and arrays by address."""
    function.restype = None
    function(
        *(ctypes.c_size_t(a) if isinstance(a, int) else a if isinstance(a, bytes) else ctypes.c_void_p(a.ctypes.data)
          for a in arguments)
    )  # fmt: skip


def operand_pairs() -> tuple[np.ndarray, np.ndarray]:
    """Pairs of adversarial values, every pair of specials, and the flush-to-zero corners."""
    corners = np.load(DATA / "ftz_corner_vectors.npz")
    grid = np.array(np.meshgrid(SPECIALS, SPECIALS)).reshape(2, -1)
    shuffled = np.random.default_rng(1).permutation(adversarial_floats(COUNT, seed=2))
    a = np.concatenate([adversarial_floats(COUNT, seed=3), grid[0], corners["a"]])
    return a, np.concatenate([shuffled, grid[1], corners["b"]])


@pytest.mark.parametrize("name", ["mul", "sub"])
def test_arithmetic_has_golden_bits(probe: ctypes.CDLL, name: str) -> None:
    a, b = operand_pairs()
    y = np.empty_like(a)
    call(getattr(probe, f"probe_{name}"), a.size, a, b, y)
    assert_same_bits(y, getattr(numerics, name)(a, b), a=a, b=b)


def test_products_match_the_corner_vectors(probe: ctypes.CDLL) -> None:
    corners = np.load(DATA / "ftz_corner_vectors.npz")
    y = np.empty_like(corners["a"])
    call(probe.probe_mul, y.size, corners["a"], corners["b"], y)
    assert_same_bits(y, corners["expected_after_rounding"], a=corners["a"], b=corners["b"])


def test_scale2_has_golden_bits(probe: ctypes.CDLL) -> None:
    m = adversarial_floats(COUNT, seed=4)
    by = np.random.default_rng(5).integers(-300, 300, COUNT).astype(np.int32)
    by[::7] = np.random.default_rng(6).integers(-(2**31), 2**31, len(by[::7]))
    y = np.empty_like(m)
    call(probe.probe_scale2, COUNT, m, by, y)
    assert_same_bits(y, numerics.scale2(m, by), m=m, by=by)


def test_scaling_down_has_the_bits_of_scaling(probe: ctypes.CDLL) -> None:
    rng = np.random.default_rng(16)
    m = rng.uniform(0.5, 2, COUNT).astype(F)
    m[:3] = 0.5, np.nextafter(F(2), F(0)), np.nan
    m[3::1000] = np.nan
    by = -rng.integers(0, 300, COUNT).astype(np.int32)
    by[::7] = -rng.integers(0, 70_000, len(by[::7]))
    y = np.empty_like(m)
    call(probe.probe_scale_down, COUNT, m, by, y)
    assert_same_bits(y, numerics.scale2(m, by), m=m, by=by)


def test_rounding_has_golden_bits(probe: ctypes.CDLL) -> None:
    halves = (np.arange(-400_000, 400_000) / 4).astype(F)
    x = np.concatenate([adversarial_floats(COUNT, seed=7), halves])
    y = np.empty(x.size, np.uint8)
    call(probe.probe_round, x.size, x, y)
    assert_same_bits(y, numerics.round_to_int8bits(x), x=x)


def test_int_to_float_has_golden_bits(probe: ctypes.CDLL) -> None:
    x = np.random.default_rng(8).integers(-(2**31), 2**31, COUNT).astype(np.int32)
    y = np.empty(COUNT, F)
    call(probe.probe_int_to_float, COUNT, x, y)
    assert_same_bits(y, numerics.int_to_float(x), x=x)


def test_relu_has_golden_bits(probe: ctypes.CDLL) -> None:
    x = adversarial_floats(COUNT, seed=9)
    y = np.empty(COUNT, F)
    call(probe.probe_relu, COUNT, x, y)
    assert_same_bits(y, numerics.relu(x), x=x)


def test_exp2_parts_have_golden_bits(probe: ctypes.CDLL) -> None:
    z = adversarial_floats(COUNT, seed=10)
    z[::2] = np.random.default_rng(11).uniform(-33000, 33000, len(z[::2]))
    m, n = np.empty(COUNT, F), np.empty(COUNT, np.int32)
    call(probe.probe_exp2_parts, COUNT, table_bytes(numerics.FUNCTIONS["exp2"]), z, m, n)
    golden_m, golden_n = numerics.exp2_parts(numerics.clamp_score(z))
    assert_same_bits(m, golden_m, z=z)
    assert_same_bits(n, golden_n, z=z)


def test_a_sum_is_never_minus_zero(probe: ctypes.CDLL) -> None:
    x = np.full((2, 128), -0.0, F)
    x[0] = np.repeat(np.array([1.5 * 2**-126, -1.75 * 2**-126], F), 64)  # every partial sum underflows to -0
    y = np.ones(2, F)
    call(probe.probe_rowsum, 2, 128, x, y)
    assert_same_bits(y, np.zeros(2, F))


@pytest.mark.parametrize("n", [1, 2, 5, 31, 63, 64, 65, 100, 128, 384, 1000, 4096])
@pytest.mark.parametrize("name", ["rowsum", "absmax"])
def test_reductions_have_golden_bits(probe: ctypes.CDLL, name: str, n: int) -> None:
    rows = max(1, 100_000 // n)
    x = np.random.default_rng(n).permutation(adversarial_floats(rows * n, seed=12)).reshape(rows, n)
    finite = np.random.default_rng(13).random(rows) < 0.8
    x[finite] = np.where(np.abs(x[finite]) < 1e3, x[finite], F(0.1))
    y = np.empty(rows, F)
    call(getattr(probe, f"probe_{name}"), rows, n, x, y)
    assert_same_bits(y, getattr(numerics, name)(x))
