"""Attention over quantised keys and values, streaming over tiles of keys.

Tiles begin at absolute multiples of their size, and a row passes over a tile in which it sees no key. So what a token
computes depends on nothing behind it: decoding token by token, a text in chunks and the whole text at once give the
same bits.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from lockstep_isa.numerics import (
    F32,
    MASKED_EXPONENT,
    add,
    clamp_score,
    exp2_parts,
    int_to_float,
    mul,
    recip,
    rowsum,
    scale2,
)
from lockstep_isa.quantisation import I8, matmul_int, quantise_rows, requantise

Visible = npt.NDArray[np.bool_]

#: Most keys in a tile: a sum of that many uint8 x int8 products cannot leave int32.
MAX_TILE = 65_793
#: Scores become powers of two.
LOG2_E = np.float32(math.log2(math.e))


def visible(positions: npt.ArrayLike, keys: int, causal: bool, window: int | None = None) -> Visible:
    """Which of ``keys`` keys the queries at the absolute ``positions``: int[M] see, as bool[M, keys].

    causal : only keys up to the query's position.  window : of those, only the last ``window``.
    """
    check_window(window)
    p, j = np.asarray(positions)[:, None], np.arange(keys)
    seen = np.ones((len(p), keys), np.bool_)
    if causal:
        seen &= j <= p
    if window is not None:
        seen &= j > p - window
    return seen


def attention_cached(
    q: npt.ArrayLike,
    positions: npt.ArrayLike,
    k8: I8,
    sk: npt.ArrayLike,
    v8: I8,
    sv: npt.ArrayLike,
    *,
    tile: int,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    bias: npt.ArrayLike | None = None,
) -> F32:
    """softmax(q @ k.T * scale + bias) @ v over a cache of quantised keys and values, head by head.

    Parameters
    ----------
    q : float32[M, heads * d].
    positions : int[M], the absolute position of each query.
    k8, v8 : int8[n, kv_heads * d], quantised per token and head; row j stands at position j. Head h of the queries
        uses head h // (heads / kv_heads).
    sk, sv : float32[n, kv_heads], their scales; float32[n] for one head.
    tile : keys per tile, 1 to :data:`MAX_TILE`; part of the result.
    scale : 1 / sqrt(d) unless given.
    causal, window : see :func:`visible`.
    bias : float32[heads, M, n], added to the scaled scores; float32[M, n] for one head.

    Returns float32[M, heads * d]. A row that sees no key gives +0.
    """
    q = np.asarray(q, np.float32)
    keys, rows = len(k8), len(q)
    sk, sv = (np.asarray(s, np.float32).reshape(keys, -1) for s in (sk, sv))
    kv_heads = sk.shape[1]
    d = k8.shape[1] // kv_heads
    heads = q.shape[1] // d
    check_tile(tile, keys)
    seen = visible(positions, keys, causal, window)
    added = None if bias is None else mul(np.asarray(bias).reshape(heads, rows, keys), LOG2_E)
    out = np.empty((rows, heads, d), np.float32)
    for head in range(heads):
        of = head // (heads // kv_heads)
        at = slice(of * d, (of + 1) * d)
        part = q[:, head * d : (head + 1) * d]
        bias2 = None if added is None else added[head]
        factor = score_factor(scale, d)
        out[:, head] = _stream(part, k8[:, at], sk[:, of], v8[:, at], sv[:, of], seen, bias2, factor, tile)
    return out.reshape(rows, heads * d)


def key_importance(
    q: npt.ArrayLike,
    seen: Visible,
    k8: I8,
    sk: npt.ArrayLike,
    sv: npt.ArrayLike,
    *,
    scale: float | None = None,
) -> F32:
    """How much attention each key gets from each query: probabilities times the scales of values, over all heads.

    Parameters
    ----------
    q : float32[M, heads * d].  seen : bool[M, n], which keys each query sees.
    k8, sk, sv : as for :func:`attention_cached`; all keys are in one tile.
    scale : 1 / sqrt(d) unless given.

    Returns float32[M, n]; heads are added in their order, and a key that is not seen gets +0. A value's scale is its
    greatest magnitude over 127, so a key counts by what it can change (Guo et al., 2024, arXiv:2406.12335).
    """
    q, (sk, sv) = np.asarray(q, np.float32), (np.asarray(s, np.float32).reshape(len(k8), -1) for s in (sk, sv))
    kv_heads = sk.shape[1]
    d = k8.shape[1] // kv_heads
    heads = q.shape[1] // d
    result = np.zeros(seen.shape, np.float32)
    for head in range(heads):
        of = head // (heads // kv_heads)
        q8, sq = quantise_rows(q[:, head * d : (head + 1) * d])
        c = mul(sq, score_factor(scale, d))
        z = scores(q8, c, k8[:, of * d : (of + 1) * d], sk[:, of])
        m, n = exp2_parts(clamp_score(z))
        peak = np.where(seen, n, np.int32(MASKED_EXPONENT)).max(axis=1, initial=MASKED_EXPONENT)
        e = np.where(seen, scale2(m, n - peak[:, None]), np.float32(0))
        result = add(result, mul(mul(e, sv[:, of]), recip(rowsum(e))[:, None]))
    return result


def head_importance(x: npt.ArrayLike, heads: int) -> F32:
    """How much each head says: the magnitudes of what it gives, x: float32[M, heads * d], as float32[heads].

    The d features of a token are added by :func:`lockstep_isa.numerics.rowsum`, then tokens in their order.
    """
    x = np.asarray(x, np.float32)
    total = np.zeros(heads, np.float32)
    for token in rowsum(np.abs(x).reshape(len(x) * heads, -1)).reshape(-1, heads):
        total = add(total, token)
    return total


def attention(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    *,
    tile: int,
    scale: float | None = None,
    mask: Visible | None = None,
) -> F32:
    """softmax(q @ k.T * scale) @ v for one head, as float32[M, d].

    q : float32[M, d].  k, v : float32[n, d].  mask : bool[M, n], True where a key may be seen.
    scale : 1 / sqrt(d) unless given.  tile : keys per tile, part of the result; from n upwards there is one tile,
    for which the recurrence gives the bits of ``(float(O) * sP) * recip(L)``: it only adds to +0 and scales by 1.
    """
    q, (k8, sk), (v8, sv) = np.asarray(q, np.float32), quantise_rows(k), quantise_rows(v)
    check_tile(tile, len(k8))
    seen = np.ones((len(q), len(k8)), np.bool_) if mask is None else mask
    return _stream(q, k8, sk, v8, sv, seen, None, score_factor(scale, q.shape[1]), tile)


def scores(q8: I8, c: F32, k8: I8, sk: F32) -> F32:
    """Scores as exponents of two, float32[M, n], of q8: int8[M, d] and k8: int8[n, d] with scales sk: float32[n].

    c : float32[M], the scales of the queries times :func:`score_factor`.
    """
    return mul(mul(int_to_float(matmul_int(q8, k8.T)), sk), c[:, None])


def score_factor(scale: float | None, d: int) -> np.float32:
    """What a query's scale is multiplied by, so that its scores are exponents of two."""
    return np.float32(math.log2(math.e) * (1 / math.sqrt(d) if scale is None else scale))


def check_tile(tile: int, keys: int) -> None:
    """Raise ValueError for a tile of no keys, or one whose sums could leave int32."""
    if tile < 1 or min(tile, keys) > MAX_TILE:
        raise ValueError(f"tile = {tile} must be from 1 to {MAX_TILE}")


def check_window(window: int | None) -> None:
    """Raise ValueError for a window of no keys."""
    if window is not None and window < 1:
        raise ValueError(f"window = {window} must be at least 1")


def _stream(
    q: F32, k8: I8, sk: F32, v8: I8, sv: F32, seen: Visible, bias: F32 | None, factor: np.float32, tile: int
) -> F32:
    """The recurrence of one head. bias: float32[M, n], a power of two."""
    q8, sq = quantise_rows(q)
    c = mul(sq, factor)
    rows, d = q8.shape
    peak = np.full(rows, MASKED_EXPONENT, np.int32)  # M: the greatest exponent so far
    total = np.zeros(rows, np.float32)  # L: the sum of exponentials, relative to 2**M
    out = np.zeros((rows, d), np.float32)  # O: the weighted values, relative to 2**M
    for start in range(0, len(k8), tile):
        at = slice(start, start + tile)
        r = np.flatnonzero(seen[:, at].any(axis=1))
        shown = seen[r, at]
        z = scores(q8[r], c[r], k8[at], sk[at])
        m, n = exp2_parts(clamp_score(z if bias is None else add(z, bias[r, at])))
        n = np.where(shown, n, np.int32(MASKED_EXPONENT))

        new_peak = np.maximum(peak[r], n.max(axis=1, initial=MASKED_EXPONENT))
        e = np.where(shown, scale2(m, n - new_peak[:, None]), np.float32(0))
        keep = scale2(np.float32(1), peak[r] - new_peak)
        p, sp = requantise(mul(e, sv[at]), 255)
        product = mul(int_to_float(matmul_int(p, v8[at])), sp[:, None])

        total[r] = add(mul(total[r], keep), rowsum(e))
        out[r] = add(mul(out[r], keep[:, None]), product)
        peak[r] = new_peak
    return mul(out, recip(total)[:, None])
