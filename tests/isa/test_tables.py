"""The function tables: reproducible, in their formats, and as accurate as the contract says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from lockstep_isa import numerics, tables
from lockstep_isa.tables import FUNCTIONS


def test_the_script_writes_the_committed_file_bit_for_bit() -> None:
    generated, committed = tables.generate().splitlines(), tables.DATA.read_text().splitlines()
    different = [(i, a, b) for i, (a, b) in enumerate(zip(generated, committed, strict=True), 1) if a != b]
    assert not different, f"{len(different)} lines differ, first (line, generated, committed): {different[0]}"


@pytest.mark.parametrize("table", FUNCTIONS.values(), ids=list(FUNCTIONS))
def test_entries_fit_72_bits(table: tables.TableFunction) -> None:
    assert table.entries <= tables.MAX_ENTRIES
    assert not (numerics.bits(table.c1) & 0xFF).any(), "c1 has a significand of 16 bits"
    assert not (numerics.bits(table.c2) & 0xFFFF).any(), "c2 is bf16"
    for column in (table.c0, table.c1, table.c2):
        np.testing.assert_array_equal(column, numerics.flush(column))


def _erfc(x: np.ndarray) -> np.ndarray:
    return np.array([math.erfc(v) for v in x])


REFERENCES = {
    "exp2": np.exp2,
    "recip": lambda x: 1 / x,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "gelu_erf": lambda x: x * _erfc(-x / math.sqrt(2)) / 2,
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
}


@pytest.mark.parametrize(
    ("name", "low", "high", "relative", "bound"),
    [
        ("exp2", 0, 1, True, -21.9),
        ("recip", 1, 2, True, -22.1),
        ("rsqrt", 1, 4, True, -21.3),
        ("gelu_erf", -20, 20, False, -19.7),
        ("gelu_tanh", -20, 20, False, -19.6),
        ("silu", -30, 30, False, -18.0),
        ("sigmoid", -30, 30, False, -19.5),
        ("tanh", -20, 20, False, -18.5),
    ],
)
def test_functions_reach_their_accuracy(name: str, low: float, high: float, relative: bool, bound: float) -> None:
    """``bound`` is the base-2 logarithm of the greatest error; half the points lie where the functions bend."""
    even = np.linspace(low, high, 100_000)
    bend = np.linspace(max(low, -2), min(high, 2), 100_000) if not relative else even[:0]
    x = np.concatenate([even, bend]).astype(np.float32)
    exact = REFERENCES[name](x.astype(np.float64))
    error = np.abs(numerics.evaluate(FUNCTIONS[name], x).astype(np.float64) - exact)
    error = error / np.abs(exact) if relative else error
    worst = int(error.argmax())
    assert error[worst] < 2**bound, f"{name}({x[worst]}) is off by 2^{math.log2(error[worst]):.2f}"


def test_powers_of_two_are_exact() -> None:
    n = np.arange(-120, 121).astype(np.float32)
    power = np.exp2(n)
    np.testing.assert_array_equal(numerics.evaluate(FUNCTIONS["exp2"], n), power)
    np.testing.assert_array_equal(numerics.recip(power), 1 / power)
    np.testing.assert_array_equal(numerics.rsqrt(power[::2]), np.exp2(-n[::2] / 2))
