"""The contract operations on the CPU: the same signatures and bits as ``lockstep_isa.operations``, in compiled C++."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from lockstep_isa.numerics import F32, I32
from lockstep_isa.operations import I8, MAX_K, MAX_TILE
from lockstep_isa.tables import FUNCTIONS, MAX_ENTRIES, TableFunction

from lockstep_hls.toolchain import Progress, compile_shared

KINDS = ("exp2", "recip", "rsqrt", "relu_minus", "odd", "sigmoid")
DEPTH_ALIGNMENT = 64

_SIZE, _FLOAT, _POINTER = ctypes.c_size_t, ctypes.c_float, ctypes.c_void_p
_ARGUMENTS = {
    "lockstep_apply": [_POINTER, _SIZE, _POINTER, _POINTER],
    "lockstep_add": [_SIZE] + 3 * [_POINTER],
    "lockstep_quantise_rows": [_POINTER, _SIZE, _SIZE] + 4 * [_POINTER],
    "lockstep_offsets": [_SIZE, _SIZE] + 2 * [_POINTER],
    "lockstep_linear": 3 * [_SIZE] + 8 * [_POINTER],
    "lockstep_layer_norm": [_POINTER, _SIZE, _SIZE] + 3 * [_POINTER] + [_FLOAT, _FLOAT, _POINTER],
    "lockstep_attention_workspace": 4 * [_SIZE],
    "lockstep_attention": 2 * [_POINTER] + 4 * [_SIZE] + [_FLOAT] + 6 * [_POINTER],
}


def prepare(progress: Progress = None) -> Path:
    """Compile the kernels, if this machine has not done so yet; it takes a few seconds.

    Raises :class:`lockstep_hls.toolchain.ToolchainError` where there is no compiler.
    """
    return compile_shared([Path(__file__).with_name("kernels.cpp")], progress=progress)


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(prepare()))
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = _SIZE if name.endswith("workspace") else None
    return library


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


def _at(array: npt.NDArray | None) -> int | None:
    return None if array is None else array.ctypes.data


def table_bytes(table: TableFunction) -> bytes:
    """The table in the layout of ``struct Table``."""
    header = np.array([KINDS.index(table.kind), table.k, table.base, table.entries], np.int32)
    columns = np.zeros((3, MAX_ENTRIES), np.float32)
    columns[:, : table.entries] = table.c0, table.c1, table.c2
    return header.tobytes() + columns.tobytes()


@cache
def _table(name: str) -> ctypes.Array[ctypes.c_char]:
    data = table_bytes(FUNCTIONS[name])
    return ctypes.create_string_buffer(data, len(data))


def apply_function(name: str, x: npt.ArrayLike) -> F32:
    """The table function called ``name`` on every element of x: float32[...]."""
    if name not in FUNCTIONS:
        raise ValueError(f"unknown function '{name}': there are {', '.join(FUNCTIONS)}")
    x = _floats(x)
    y = np.empty_like(x)
    _library().lockstep_apply(_table(name), x.size, _at(x), _at(y))
    return y


def add(a: npt.ArrayLike, b: npt.ArrayLike) -> F32:
    """a + b, float32[...], with NumPy's broadcasting."""
    left, right = (_floats(x) for x in np.broadcast_arrays(np.asarray(a, np.float32), np.asarray(b, np.float32)))
    y = np.empty_like(left)
    _library().lockstep_add(y.size, _at(left), _at(right), _at(y))
    return y


def quantise_rows(x: npt.ArrayLike, prescale: npt.ArrayLike | None = None) -> tuple[I8, F32]:
    """q : int8[M, K] and s : float32[M] of x * prescale; x : float32[M, K], prescale : float32[K]."""
    x = _matrix(x)
    rows, n = x.shape
    factors = None if prescale is None else _floats(prescale, n)
    q, s = np.empty((rows, n), np.int8), np.empty(rows, np.float32)
    _library().lockstep_quantise_rows(_table("recip"), rows, n, _at(x), _at(factors), _at(q), _at(s))
    return q, s


@dataclass(frozen=True)
class PackedWeights:
    """int8[N, K] weights as :func:`linear` reads them: rows padded with zeros, and 128 times the sum of each."""

    padded: I8
    offsets: I32
    k: int


def pack_weights(w: I8) -> PackedWeights:
    """Prepare w: int8[N, K] once for many calls of :func:`linear`."""
    rows, k = w.shape
    if k > MAX_K:
        raise ValueError(f"K = {k} may overflow the int32 accumulators; split it into parts of {MAX_K}")
    if w.dtype != np.int8:
        raise ValueError(f"weights must be int8, not {w.dtype}")
    padded = np.zeros((rows, -(-k // DEPTH_ALIGNMENT) * DEPTH_ALIGNMENT), np.int8)
    padded[:, :k] = w
    offsets = np.empty(rows, np.int32)
    _library().lockstep_offsets(rows, padded.shape[1], _at(padded), _at(offsets))
    return PackedWeights(padded, offsets, k)


def linear(q: I8, s: npt.ArrayLike, w: I8 | PackedWeights, sw: npt.ArrayLike, bias: npt.ArrayLike | None = None) -> F32:
    """y = (float(q @ w.T) * s) * sw + bias, as float32[M, N].

    q : int8[M, K].  s : float32[M].  w : int8[N, K], better packed.  sw, bias : float32[N].
    """
    weights = w if isinstance(w, PackedWeights) else pack_weights(w)
    columns, depth = weights.padded.shape
    if q.dtype != np.int8 or q.ndim != 2 or q.shape[1] != weights.k:
        raise ValueError(f"expected int8[M, {weights.k}], not {q.dtype}{list(q.shape)}")
    rows = len(q)
    q = np.ascontiguousarray(q)
    scales, channels = _floats(s, rows), _floats(sw, columns)
    added = None if bias is None else _floats(bias, columns)
    shifted, y = np.empty((rows, depth), np.uint8), np.empty((rows, columns), np.float32)
    _library().lockstep_linear(
        *(rows, columns, weights.k, _at(q), _at(scales), _at(weights.padded), _at(weights.offsets)),
        *(_at(channels), _at(added), _at(shifted), _at(y)),
    )
    return y


def layer_norm(x: npt.ArrayLike, gamma: npt.ArrayLike, beta: npt.ArrayLike, eps: float) -> F32:
    """Layer normalisation of x: float32[M, n], with gamma, beta: float32[n]."""
    x = _matrix(x)
    rows, n = x.shape
    gain, shift, y = _floats(gamma, n), _floats(beta, n), np.empty_like(x)
    _library().lockstep_layer_norm(
        *(_table("rsqrt"), rows, n, _at(x), _at(gain), _at(shift), np.float32(1 / n), eps, _at(y))
    )
    return y


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
    k, v = _floats(k, keys, d), _floats(v, keys, d)
    if tile < 1 or min(tile, keys) > MAX_TILE:
        raise ValueError(f"tile = {tile} must be from 1 to {MAX_TILE}")
    if mask is not None and mask.shape != (rows, keys):
        raise ValueError(f"expected bool{[rows, keys]} as mask, not {list(mask.shape)}")
    tile = max(1, min(tile, keys))
    seen = None if mask is None else np.ascontiguousarray(mask, np.bool_)
    factor = np.float32(math.log2(math.e) * (1 / math.sqrt(d) if scale is None else scale))
    library = _library()
    workspace = np.zeros(library.lockstep_attention_workspace(rows, keys, d, tile), np.uint8)
    out = np.zeros((rows, d), np.float32)
    library.lockstep_attention(
        *(_table("exp2"), _table("recip"), rows, keys, d, tile, factor),
        *(_at(q), _at(k), _at(v), _at(seen), _at(workspace), _at(out)),
    )
    return out
