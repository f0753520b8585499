"""The operations of the contract, on row-major arrays: what a model is compiled to, whoever executes it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lockstep_isa.attention import MAX_TILE, attention, attention_cached, visible
from lockstep_isa.numerics import F32, add, evaluate, mul, relu, rowsum, rsqrt
from lockstep_isa.quantisation import I8, MAX_K, U8, linear, matmul_int, quantise_rows, requantise
from lockstep_isa.tables import FUNCTIONS

__all__ = [
    "I8",
    "MAX_K",
    "MAX_TILE",
    "U8",
    "add",
    "apply_function",
    "attention",
    "attention_cached",
    "layer_norm",
    "linear",
    "matmul_int",
    "multiply",
    "quantise_rows",
    "requantise",
    "rms_norm",
    "rotary",
    "visible",
]


def layer_norm(x: npt.ArrayLike, gamma: npt.ArrayLike, beta: npt.ArrayLike, eps: float) -> F32:
    """Layer normalisation of x: float32[M, n] in two passes, with gamma, beta: float32[n]."""
    x = np.asarray(x, np.float32)
    share = np.float32(1 / x.shape[1])
    centred = add(x, mul(rowsum(x), -share)[:, None])
    rstd = rsqrt(add(mul(rowsum(mul(centred, centred)), share), np.float32(eps)))
    return add(mul(mul(centred, rstd[:, None]), gamma), beta)


def rms_norm(x: npt.ArrayLike, gamma: npt.ArrayLike, eps: float, groups: int = 1) -> F32:
    """Root-mean-square normalisation of each of ``groups`` equal pieces of every row of x: float32[M, n].

    gamma : float32[n / groups], for every piece. Pieces are heads where queries and keys are normalised.
    """
    x = np.asarray(x, np.float32)
    pieces = x.reshape(len(x) * groups, x.shape[1] // groups)
    share = np.float32(1 / pieces.shape[1])
    r = rsqrt(add(mul(rowsum(mul(pieces, pieces)), share), np.float32(eps)))
    return mul(mul(pieces, r[:, None]), gamma).reshape(x.shape)


def rotary(x: npt.ArrayLike, cos: npt.ArrayLike, sin: npt.ArrayLike, heads: int, interleaved: bool = False) -> F32:
    """Rotary position embedding of x: float32[M, heads * d], as float32[M, heads * d].

    cos, sin : float32[M, pairs], of each row's position; the first 2 * pairs features of every head turn, the others
    pass. Feature i turns with feature i + pairs; with ``interleaved``, feature 2i with 2i + 1.
    """
    x = np.asarray(x, np.float32)
    cos, sin = (np.asarray(table, np.float32)[:, None] for table in (cos, sin))
    pairs = cos.shape[-1]
    y = x.reshape(len(x), heads, -1).copy()
    low, high = (
        (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)) if interleaved else (slice(pairs), slice(pairs, 2 * pairs))
    )
    a, b = y[..., low].copy(), y[..., high].copy()
    y[..., low] = add(mul(a, cos), mul(b, -sin))
    y[..., high] = add(mul(b, cos), mul(a, sin))
    return y.reshape(x.shape)


def multiply(x: npt.ArrayLike, y: npt.ArrayLike) -> F32:
    """x * y, float32[M, n]; an operand with one row is used for every row."""
    return mul(x, y)


def apply_function(name: str, x: npt.ArrayLike) -> F32:
    """The function called ``name``, a table or ``relu``, on every element of x: float32[...]."""
    if name == "relu":
        return relu(x)
    try:
        table = FUNCTIONS[name]
    except KeyError:
        raise ValueError(f"unknown function '{name}': there are {', '.join([*FUNCTIONS, 'relu'])}") from None
    return evaluate(table, x)
