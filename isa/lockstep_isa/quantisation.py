"""Rows of 8-bit integers with a scale each, and their exact products."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lockstep_isa.numerics import F32, I32, absmax, add, int_to_float, mul, recip, round_to_int8bits

I8 = npt.NDArray[np.int8]
U8 = npt.NDArray[np.uint8]

#: Longest sum of int8 products that cannot leave int32, even with -128 on both sides.
MAX_K = 131_071


def matmul_int(a: npt.NDArray[np.integer], b: npt.NDArray[np.integer]) -> I32:
    """The exact product a[M, K] @ b[K, N] of 8-bit integers (float64 holds every partial sum)."""
    return (a.astype(np.float64) @ b.astype(np.float64)).astype(np.int32)


def requantise(x: F32, steps: int) -> tuple[U8, F32]:
    """(low 8 bits of RNE(x / s), s) with s = absmax(row) / steps, for x: float32[rows, n].

    A zero or non-finite row gives 0 everywhere and keeps its s.
    """
    s = mul(absmax(x), np.float32(1 / steps))
    return round_to_int8bits(mul(x, recip(s)[:, None])), s


def quantise_rows(x: npt.ArrayLike, prescale: npt.ArrayLike | None = None) -> tuple[I8, F32]:
    """Symmetric int8 with one scale per row.

    x : float32[M, K].  prescale : float32[K], multiplied into the columns first.
    Returns q : int8[M, K] and s : float32[M] with x * prescale ~ q * s.
    """
    x = np.asarray(x, np.float32)
    q, s = requantise(x if prescale is None else mul(x, prescale), 127)
    return q.view(np.int8), s


def linear(q: I8, s: npt.ArrayLike, w: I8, sw: npt.ArrayLike, bias: npt.ArrayLike | None = None) -> F32:
    """y = (float(q @ w.T) * s) * sw + bias, as float32[M, N].

    q : int8[M, K].  s : float32[M].  w : int8[N, K].  sw : float32[N].  bias : float32[N], or None for no addition.
    Raises ValueError where K exceeds :data:`MAX_K`.
    """
    if q.shape[1] > MAX_K:
        raise ValueError(f"K = {q.shape[1]} may overflow the int32 accumulators; split it into parts of {MAX_K}")
    y = mul(mul(int_to_float(matmul_int(q, w.T)), np.asarray(s, np.float32)[:, None]), sw)
    return y if bias is None else add(y, bias)
