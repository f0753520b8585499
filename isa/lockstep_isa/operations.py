"""The operations of the contract, on row-major arrays: what a model is compiled to, whoever executes it."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from lockstep_isa.numerics import (
    F32,
    I32,
    MASKED_EXPONENT,
    absmax,
    add,
    clamp_score,
    evaluate,
    exp2_parts,
    int_to_float,
    mul,
    recip,
    round_to_int8bits,
    rowsum,
    rsqrt,
    scale2,
)
from lockstep_isa.tables import FUNCTIONS

I8 = npt.NDArray[np.int8]
U8 = npt.NDArray[np.uint8]

#: Longest sum of int8 products that cannot leave int32, even with -128 on both sides.
MAX_K = 131_071
#: Most keys in a tile: a sum of that many uint8 x int8 products cannot leave int32.
MAX_TILE = 65_793

__all__ = ["add", "apply_function", "attention", "layer_norm", "linear", "matmul_int", "quantise_rows"]


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


def layer_norm(x: npt.ArrayLike, gamma: npt.ArrayLike, beta: npt.ArrayLike, eps: float) -> F32:
    """Layer normalisation of x: float32[M, n] in two passes, with gamma, beta: float32[n]."""
    x = np.asarray(x, np.float32)
    share = np.float32(1 / x.shape[1])
    centred = add(x, mul(rowsum(x), -share)[:, None])
    rstd = rsqrt(add(mul(rowsum(mul(centred, centred)), share), np.float32(eps)))
    return add(mul(mul(centred, rstd[:, None]), gamma), beta)


def attention(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    *,
    tile: int,
    scale: float | None = None,
    mask: npt.NDArray[np.bool_] | None = None,
) -> F32:
    """softmax(q @ k.T * scale) @ v for one head, as float32[M, d], streaming over tiles of keys.

    q : float32[M, d].  k, v : float32[n, d].  mask : bool[M, n], True where a key may be seen.
    scale : 1 / sqrt(d) unless given.  tile : keys per tile, part of the result; from n upwards there is one tile,
    for which the recurrence below gives the bits of ``(float(O) * sP) * recip(l)``: it only adds to +0 and scales by 1.
    """
    q8, sq = quantise_rows(q)
    k8, sk = quantise_rows(k)
    v8, sv = quantise_rows(v)
    rows, d = q8.shape
    keys = len(k8)
    if tile < 1 or min(tile, keys) > MAX_TILE:
        raise ValueError(f"tile = {tile} must be from 1 to {MAX_TILE}")
    c = mul(sq, np.float32(math.log2(math.e) * (1 / math.sqrt(d) if scale is None else scale)))

    peak = np.full(rows, MASKED_EXPONENT, np.int32)  # M: the greatest exponent so far
    total = np.zeros(rows, np.float32)  # L: the sum of exponentials, relative to 2**M
    out = np.zeros((rows, d), np.float32)  # O: the weighted values, relative to 2**M
    for start in range(0, keys, tile):
        at = slice(start, start + tile)
        scores = int_to_float(matmul_int(q8, k8[at].T))
        m, n = exp2_parts(clamp_score(mul(mul(scores, sk[at]), c[:, None])))
        if mask is not None:
            n = np.where(mask[:, at], n, np.int32(MASKED_EXPONENT))
        tile_peak = n.max(axis=1)
        e = scale2(m, n - tile_peak[:, None])
        p, sp = requantise(mul(e, sv[at]), 255)
        product = int_to_float(matmul_int(p, v8[at]))

        new_peak = np.maximum(peak, tile_peak)
        keep, join = peak - new_peak, tile_peak - new_peak
        total = add(scale2(total, keep), scale2(rowsum(e), join))
        out = add(scale2(out, keep[:, None]), mul(product, scale2(sp, join)[:, None]))
        peak = new_peak
    return mul(out, recip(total)[:, None])


def apply_function(name: str, x: npt.ArrayLike) -> F32:
    """The table function called ``name`` on every element of x: float32[...]."""
    try:
        table = FUNCTIONS[name]
    except KeyError:
        raise ValueError(f"unknown function '{name}': there are {', '.join(FUNCTIONS)}") from None
    return evaluate(table, x)
