"""The contract operations on the CPU: the same signatures and bits as ``lockstep_isa.operations``, in compiled C++.

Large operations use all cores, which changes no bit.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from lockstep_isa.attention import check_tile, check_window, score_factor
from lockstep_isa.numerics import F32
from lockstep_isa.operations import I8
from lockstep_isa.tables import FUNCTIONS

from lockstep_hls.library import address, library, prepare, table
from lockstep_hls.weights import PackedWeights, pack_weights, packed

__all__ = [
    "PackedWeights",
    "add",
    "apply_function",
    "attention",
    "attention_cached",
    "layer_norm",
    "linear",
    "multiply",
    "pack_weights",
    "prepare",
    "quantise_rows",
    "rms_norm",
    "rotary",
    "set_threads",
    "threads",
]


def set_threads(threads: int) -> None:
    """Use so many threads from now on, at least one; all cores unless this is called. Not while operations run."""
    if threads < 1:
        raise ValueError(f"threads = {threads} must be at least 1")
    library().lockstep_set_threads(threads)


def threads() -> int:
    """How many threads there are."""
    return library().lockstep_threads()


def _floats(x: npt.ArrayLike, *shape: int) -> F32:
    """``x`` as a contiguous float32 array; where a shape is given it must be that one."""
    array = np.ascontiguousarray(x, np.float32)
    if shape and array.shape != shape:
        raise ValueError(f"expected float32{list(shape)}, not {list(array.shape)}")
    return array


def _matrix(x: npt.ArrayLike) -> F32:
    array = _floats(x)
    if array.ndim != 2:
        raise ValueError(f"expected a matrix, not {array.ndim} dimensions")
    return array


def apply_function(name: str, x: npt.ArrayLike) -> F32:
    """The function called ``name``, a table or ``relu``, on every element of x: float32[...]."""
    if name not in FUNCTIONS and name != "relu":
        raise ValueError(f"unknown function '{name}': there are {', '.join([*FUNCTIONS, 'relu'])}")
    x = _floats(x)
    y = np.empty_like(x)
    if name == "relu":
        library().lockstep_relu(x.size, address(x), address(y))
    else:
        library().lockstep_apply(table(name), x.size, address(x), address(y))
    return y


def add(a: npt.ArrayLike, b: npt.ArrayLike) -> F32:
    """a + b, float32[...], with NumPy's broadcasting."""
    return _pairs("lockstep_add", a, b)


def multiply(x: npt.ArrayLike, y: npt.ArrayLike) -> F32:
    """x * y, float32[...], with NumPy's broadcasting."""
    return _pairs("lockstep_multiply", x, y)


def _pairs(function: str, a: npt.ArrayLike, b: npt.ArrayLike) -> F32:
    left, right = _floats(a), _floats(b)
    if not (left.ndim == right.ndim == 2 and left.shape[1] == right.shape[1] and 1 in (len(left), len(right))):
        if left.shape != right.shape:
            left, right = (_floats(x) for x in np.broadcast_arrays(left, right))
        shape = left.shape
        left, right = left.reshape(1, -1), right.reshape(1, -1)
    else:
        shape = (max(len(left), len(right)), left.shape[1])
    rows, n = max(len(left), len(right)), left.shape[1]
    y = np.empty(shape, np.float32)
    strides = (n if len(x) > 1 else 0 for x in (left, right))
    getattr(library(), function)(rows, n, address(left), next(strides), address(right), next(strides), address(y))
    return y


def quantise_rows(x: npt.ArrayLike, prescale: npt.ArrayLike | None = None) -> tuple[I8, F32]:
    """q : int8[M, K] and s : float32[M] of x * prescale; x : float32[M, K], prescale : float32[K]."""
    x = _matrix(x)
    rows, n = x.shape
    factors = None if prescale is None else _floats(prescale, n)
    q, s = np.empty((rows, n), np.int8), np.empty(rows, np.float32)
    library().lockstep_quantise_rows(table("recip"), rows, n, *map(address, (x, factors, q, s)))
    return q, s


def linear(q: I8, s: npt.ArrayLike, w: I8 | PackedWeights, sw: npt.ArrayLike, bias: npt.ArrayLike | None = None) -> F32:
    """y = (float(q @ w.T) * s) * sw + bias, as float32[M, N].

    q : int8[M, K].  s : float32[M].  sw, bias : float32[N].
    w : int8[N, K]. An array that is not read-only is packed anew in every call; a read-only one once.
    """
    weights = w if isinstance(w, PackedWeights) else packed(w)
    if q.dtype != np.int8 or q.ndim != 2 or q.shape[1] != weights.k:
        raise ValueError(f"expected int8[M, {weights.k}], not {q.dtype}{list(q.shape)}")
    rows, columns = len(q), weights.columns
    q, scales, channels = np.ascontiguousarray(q), _floats(s, rows), _floats(sw, columns)
    added = None if bias is None else _floats(bias, columns)
    y = np.empty((rows, columns), np.float32)
    library().lockstep_linear(
        rows, columns, weights.k, *map(address, (q, scales, weights.data, channels, added, y))
    )  # fmt: skip
    return y


def layer_norm(x: npt.ArrayLike, gamma: npt.ArrayLike, beta: npt.ArrayLike, eps: float) -> F32:
    """Layer normalisation of x: float32[M, n], with gamma, beta: float32[n]."""
    x = _matrix(x)
    rows, n = x.shape
    gain, shift, y = _floats(gamma, n), _floats(beta, n), np.empty_like(x)
    share = np.float32(1 / n)
    library().lockstep_layer_norm(
        table("rsqrt"), rows, n, address(x), address(gain), address(shift), share, eps, address(y)
    )
    return y


def rms_norm(x: npt.ArrayLike, gamma: npt.ArrayLike, eps: float, groups: int = 1) -> F32:
    """Root-mean-square normalisation of each of ``groups`` equal pieces of every row of x: float32[M, n].

    gamma : float32[n / groups], for every piece.
    """
    x = _matrix(x)
    rows, n = x.shape
    if groups < 1 or n % groups:
        raise ValueError(f"{n} features do not make {groups} equal groups")
    n //= groups
    gain, y = _floats(gamma, n), np.empty_like(x)
    share = np.float32(1 / n)
    library().lockstep_rms_norm(table("rsqrt"), rows * groups, n, address(x), address(gain), share, eps, address(y))
    return y


def rotary(x: npt.ArrayLike, cos: npt.ArrayLike, sin: npt.ArrayLike, heads: int, interleaved: bool = False) -> F32:
    """Rotary position embedding of x: float32[M, heads * d].

    cos, sin : float32[M, pairs], of each row's position; the first 2 * pairs features of every head turn.
    """
    x, cos = _matrix(x), _matrix(cos)
    (rows, features), pairs = x.shape, cos.shape[1]
    cos, sin = _floats(cos, rows, pairs), _floats(sin, rows, pairs)
    if heads < 1 or features % heads or 2 * pairs > features // heads:
        raise ValueError(f"{features} features are no {heads} heads with {pairs} pairs each")
    y = np.empty_like(x)
    library().lockstep_rotary(
        rows, heads, features // heads, pairs, interleaved, address(x), address(cos), address(sin), address(y)
    )
    return y


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
    """softmax(q @ k.T * scale + bias) @ v over a cache, as float32[M, heads * d]; all heads in one call.

    q : float32[M, heads * d].  positions : int[M].  k8, v8 : int8[n, kv_heads * d].  sk, sv : float32[n, kv_heads], or
    float32[n] for one head.  bias : float32[heads, M, n], or float32[M, n] for one head.  The rest is as in
    :func:`lockstep_isa.attention.attention_cached`.
    """
    return _attend(q, positions, k8, sk, v8, sv, tile, scale, causal, window, bias, None)


def attention(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    *,
    tile: int,
    scale: float | None = None,
    mask: npt.NDArray[np.bool_] | None = None,
) -> F32:
    """softmax(q @ k.T * scale) @ v for one head, as float32[M, d], in tiles of ``tile`` keys.

    q : float32[M, d].  k, v : float32[n, d].  mask : bool[M, n], True where a key may be seen.
    """
    q, k = _matrix(q), _matrix(k)
    (rows, d), keys = q.shape, len(k)
    if mask is not None and mask.shape != (rows, keys):
        raise ValueError(f"expected bool{[rows, keys]} as mask, not {list(mask.shape)}")
    (k8, sk), (v8, sv) = quantise_rows(_floats(k, keys, d)), quantise_rows(_floats(v, keys, d))
    return _attend(q, np.zeros(rows, np.int64), k8, sk, v8, sv, tile, scale, False, None, None, mask)


def _attend(
    q: npt.ArrayLike,
    positions: npt.ArrayLike,
    k8: I8,
    sk: npt.ArrayLike,
    v8: I8,
    sv: npt.ArrayLike,
    tile: int,
    scale: float | None,
    causal: bool,
    window: int | None,
    bias: npt.ArrayLike | None,
    mask: npt.NDArray[np.bool_] | None,
) -> F32:
    q, key_scales = _matrix(q), _floats(sk)
    (rows, features), (keys, kv_features) = q.shape, k8.shape
    kv_heads = key_scales.size // keys if keys else 1
    if kv_heads < 1 or key_scales.size != keys * kv_heads or kv_features % kv_heads:
        raise ValueError(f"scales {list(key_scales.shape)} do not fit keys {list(k8.shape)}")
    d = kv_features // kv_heads
    heads = features // d
    if features % d or heads % kv_heads:
        raise ValueError(f"{features} features of queries are no multiple of {kv_heads} heads of {d}")
    for cache in (k8, v8):
        if cache.dtype != np.int8 or cache.shape != (keys, kv_features):
            raise ValueError(f"expected int8{[keys, kv_features]}, not {cache.dtype}{list(cache.shape)}")
    check_tile(tile, keys)
    check_window(window)
    at = np.ascontiguousarray(positions, np.int64)
    if at.shape != (rows,):
        raise ValueError(f"expected int[{rows}] as positions, not {list(at.shape)}")
    added = None if bias is None else _floats(np.reshape(bias, (heads, rows, keys)))
    seen = None if mask is None else np.ascontiguousarray(mask, np.bool_)
    arrays = (at, q, np.ascontiguousarray(k8), key_scales, np.ascontiguousarray(v8), _floats(sv, *key_scales.shape))
    out = np.empty((rows, features), np.float32)
    layout = np.array([kv_features, d, kv_heads, 1], np.uintp)  # struct CacheLayout
    library().lockstep_attention(
        *(table("exp2"), table("recip"), rows, keys, heads, kv_heads, d, max(1, min(tile, keys))),
        *(score_factor(scale, d), causal, window or 0, *map(address, (*arrays, layout, added, seen, out))),
    )
    return out
