"""Weights in the order in which the product kernel reads them."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import numpy as np
from lockstep_isa.operations import I8, MAX_K, U8

from lockstep_hls.library import address, library


@dataclass(frozen=True)
class PackedWeights:
    """int8[columns, k] weights in panels of 64 columns; see ``matrix.hpp``."""

    data: U8
    columns: int
    k: int


def pack_weights(w: I8) -> PackedWeights:
    """Prepare w: int8[N, K] for many calls of :func:`lockstep_hls.kernels.linear`."""
    if w.ndim != 2 or w.dtype != np.int8:
        raise ValueError(f"weights must be int8[N, K], not {w.dtype}{list(w.shape)}")
    columns, k = w.shape
    if k > MAX_K:
        raise ValueError(f"K = {k} may overflow the int32 accumulators; split it into parts of {MAX_K}")
    w = np.ascontiguousarray(w)
    data = np.empty(library().lockstep_packed_bytes(columns, k), np.uint8)
    library().lockstep_pack(columns, k, address(w), address(data))
    return PackedWeights(data, columns, k)


#: Packed copies of read-only arrays by identity; each goes when its array does.
_PACKED: dict[int, tuple[weakref.ref[I8], PackedWeights]] = {}


def packed(w: I8) -> PackedWeights:
    """``w`` packed; a read-only array is packed once, and its packed copy lives as long as the array."""
    if w.flags.writeable:
        return pack_weights(w)
    key = id(w)
    if key in _PACKED:
        return _PACKED[key][1]
    result = pack_weights(w)
    _PACKED[key] = weakref.ref(w, lambda _: _PACKED.pop(key, None)), result
    return result
