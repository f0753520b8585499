"""The programmable function tables: what they approximate, how they are fitted, and the committed entries.

A table holds quadratic segments of uniform width ``2**-k``. With ``I = RNE(u * 2**k)`` and ``d = u - I * 2**-k``,

    y = c0[I - base] + d * (c1[I - base] + d * c2[I - base])

``c0`` is fp32, ``c1`` has a 16-bit significand and ``c2`` is bf16: 72 bits an entry, at most 128 entries.
``python -m lockstep_isa.tables`` fits every table again and writes ``data/tables.json``; it computes in decimal
arithmetic of 50 digits, so that every machine writes the same file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from pathlib import Path

import numpy as np
import numpy.typing as npt

DATA = Path(__file__).parent / "data" / "tables.json"
MAX_ENTRIES = 128
DIGITS = 50


@dataclass(frozen=True)
class TableFunction:
    """One nonlinear function as the hardware holds it.

    Attributes
    ----------
    name : key in :data:`FUNCTIONS`.
    kind : how the table becomes the function: ``exp2``, ``recip``, ``rsqrt`` (an exponent is split off and put back),
        ``relu_minus`` (``relu(x) - g(|x|)``), ``odd`` (``sign(x) * g(|x|)``), ``sigmoid`` (``g(x)``, or ``1 - g(-x)``).
    k : segments are ``2**-k`` wide.
    base : the value of ``I`` that addresses entry 0.
    c0, c1, c2 : float32[entries], the coefficients.
    limit : the argument is held at ``(base + entries - 1) / 2**k``, where ``d = 0`` and the last ``c0`` is the result.
    """

    name: str
    kind: str
    k: int
    base: int
    c0: npt.NDArray[np.float32]
    c1: npt.NDArray[np.float32]
    c2: npt.NDArray[np.float32]

    @property
    def entries(self) -> int:
        return len(self.c0)

    @property
    def limit(self) -> np.float32:
        return np.float32((self.base + self.entries - 1) / 2**self.k)


def load_tables() -> dict[str, TableFunction]:
    """The committed tables, by name."""
    tables = {}
    for name, table in json.loads(DATA.read_text()).items():
        bits = np.array([[int(c, 16) for c in entry.split()] for entry in table["entries"]], np.uint32)
        c0, c1, c2 = np.ascontiguousarray(bits.T).view(np.float32)
        tables[name] = TableFunction(name, table["kind"], table["k"], table["base"], c0, c1, c2)
    return tables


# --- What the tables approximate ---------------------------------------------------------------------------------


def _erfc(x: Decimal) -> Decimal:
    """1 - erf(x) for 0 <= x < 6, by erf(x) = 2/sqrt(pi) * exp(-x^2) * sum of 2^n x^(2n+1) / (2n+1)!!."""
    term = total = x
    n = 0
    while term > Decimal(10) ** -DIGITS * total:
        n += 1
        term = term * 2 * x * x / (2 * n + 1)
        total += term
    return 1 - 2 * (-x * x).exp() * total / PI.sqrt()


PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494")
LN2 = Decimal("0.693147180559945309417232121458176568075500134360255254120680")


def _gelu_erf_complement(t: Decimal) -> Decimal:
    return t * _erfc(t / Decimal(2).sqrt()) / 2


def _gelu_tanh_complement(t: Decimal) -> Decimal:
    return t / (1 + (2 * (2 / PI).sqrt() * (t + Decimal("0.044715") * t**3)).exp())


@dataclass(frozen=True)
class TableSpec:
    """What to fit. ``saturation`` is what the function gives exactly at its limit, ``None`` for periodic addressing."""

    name: str
    kind: str
    k: int
    base: int
    entries: int
    function: Callable[[Decimal], Decimal]
    saturation: float | None


#: A new function is one line here and a run of this file.
SPECS = (
    TableSpec("exp2", "exp2", 5, 0, 32, lambda u: (u * LN2).exp(), None),
    TableSpec("recip", "recip", 6, 64, 65, lambda u: 1 / u, 0.5),
    TableSpec("rsqrt", "rsqrt", 5, 32, 97, lambda u: 1 / u.sqrt(), 0.5),
    TableSpec("gelu_erf", "relu_minus", 4, 0, 128, _gelu_erf_complement, 0.0),
    TableSpec("gelu_tanh", "relu_minus", 4, 0, 128, _gelu_tanh_complement, 0.0),
    TableSpec("silu", "relu_minus", 3, 0, 128, lambda t: t / (1 + t.exp()), 0.0),
    TableSpec("sigmoid", "sigmoid", 3, 0, 128, lambda t: 1 / (1 + (-t).exp()), 1.0),
    TableSpec("tanh", "odd", 4, 0, 128, lambda t: 1 - 2 / (1 + (2 * t).exp()), 1.0),
)


# --- The fit -----------------------------------------------------------------------------------------------------


def _round_bits(x: Decimal, bits: int) -> Decimal:
    """``x`` rounded to a significand of ``bits`` bits."""
    fraction, exponent = math.frexp(float(x))
    return Decimal(math.ldexp(round(math.ldexp(fraction, bits)), exponent - bits))


def _neighbours(x: Decimal, bits: int, reach: int) -> list[Decimal]:
    """The values with ``bits`` significant bits nearest to ``x``, up to ``reach`` steps away."""
    step = Decimal(math.ldexp(1.0, math.frexp(float(x))[1] - bits))
    return [_round_bits(_round_bits(x, bits) + i * step, bits) for i in range(-reach, reach + 1)]


def _fit_segment(
    f: Callable[[Decimal], Decimal], c0: Decimal, low: Decimal, high: Decimal, pinned: bool
) -> tuple[Decimal, Decimal, Decimal]:
    """(c0, c1, c2) of the segment ``f(d) ~ c0 + d * (c1 + d * c2)``, d in [low, high], either of which may be 0.

    ``c0`` is given as the function at the segment's centre, where a cubic's best quadratic meets it; interpolation at
    the other zeros of the Chebyshev polynomial of degree 3 gives real c1 and c2. Of the representable pairs around
    them the one with the least error is taken, after ``c0`` has moved to the middle of it, unless it is pinned.
    """
    r = Decimal(3).sqrt() / 2
    if low == 0:
        x1, x2 = high * r / (1 + r), high * 2 * r / (1 + r)
    elif high == 0:
        x1, x2 = low * r / (1 + r), low * 2 * r / (1 + r)
    else:
        x1, x2 = low * r, high * r
    slope1, slope2 = (f(x1) - c0) / x1, (f(x2) - c0) / x2
    samples = [(d, f(d) - c0) for d in (low + (high - low) * i / 16 for i in range(17))]
    candidates = []
    for c2 in _neighbours((slope2 - slope1) / (x2 - x1), 8, 1):
        for c1 in _neighbours((slope1 + slope2 - c2 * (x1 + x2)) / 2, 16, 1):
            errors = [y - d * (c1 + d * c2) for d, y in samples]
            move = Decimal(0) if pinned else (max(errors) + min(errors)) / 2
            candidates.append((max(abs(e - move) for e in errors), _round_bits(c0 + move, 24), c1, c2))
    return min(candidates)[1:]


def fit(spec: TableSpec) -> list[tuple[Decimal, Decimal, Decimal]]:
    """The coefficients of every entry, each exactly representable in its format.

    The first ``c0`` is the function itself, so that powers of two, and zero, have exact results; the last one is the
    saturation value.
    """
    half = Decimal(1) / 2 ** (spec.k + 1)
    table = []
    for index in range(spec.entries):
        centre = Decimal(spec.base + index) / 2**spec.k
        c0, low, high = spec.function(centre), -half, half
        first, last = index == 0, index == spec.entries - 1
        if spec.saturation is not None:
            low = Decimal(0) if first else low
            high = Decimal(0) if last else high
            c0 = Decimal(spec.saturation) if last else c0
        pinned = first or (last and spec.saturation is not None)
        table.append(_fit_segment(lambda d, at=centre: spec.function(at + d), c0, low, high, pinned))  # type: ignore[misc]
    return table


def generate() -> str:
    """The text of ``data/tables.json``."""
    with localcontext(Context(prec=DIGITS)):
        document = {
            spec.name: {
                "kind": spec.kind,
                "k": spec.k,
                "base": spec.base,
                "entries": [
                    " ".join(f"{int(np.float32(float(c)).view(np.uint32)):08x}" for c in entry) for entry in fit(spec)
                ],
            }
            for spec in SPECS
        }
    return json.dumps(document, indent=1) + "\n"


if __name__ == "__main__":
    DATA.write_text(generate())

#: Every function that the vector unit can be programmed with.
FUNCTIONS = load_tables()
