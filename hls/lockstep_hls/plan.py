"""Plans: the operations of a whole model in one list, which one call runs.

A plan computes what the same calls of :mod:`lockstep_hls.kernels` would, with the same bits. What it spares is the way
through Python between two operations, which takes longer than most operations on a single token.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
from lockstep_isa.attention import check_tile, check_window, score_factor
from lockstep_isa.tables import FUNCTIONS

from lockstep_hls.library import library, table
from lockstep_hls.weights import packed


class Operation(IntEnum):
    """What a step computes; the numbers are those of ``plan.cpp``."""

    GATHER = 0
    ADD = 1
    MULTIPLY = 2
    LAYER_NORM = 3
    RMS_NORM = 4
    ROTARY = 5
    APPLY = 6
    RELU = 7
    QUANTISE = 8
    LINEAR = 9
    KEEP = 10
    ATTENTION = 11


class _Rows(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("bytes", ctypes.c_size_t), ("whole", ctypes.c_int64))


class _Step(ctypes.Structure):
    """``struct Step`` of ``plan.cpp``."""

    _fields_ = (
        ("operation", ctypes.c_int64),
        ("last", ctypes.c_int64),
        ("reads", _Rows * 2),
        ("writes", _Rows * 2),
        ("tensors", ctypes.c_void_p * 6),
        ("sizes", ctypes.c_int64 * 7),
        ("numbers", ctypes.c_double * 2),
    )


@dataclass(frozen=True)
class Rows:
    """A value of a plan: a row for each new token, or one for the last.

    Attributes
    ----------
    memory : the rows, ``[capacity, n]``, or ``[1, n]`` of what stands for every token.
    whole : whether every new token has a row; else there is one, in front.
    """

    memory: npt.NDArray[Any]
    whole: bool

    @property
    def columns(self) -> int:
        return self.memory.shape[1] if self.memory.ndim > 1 else 1


@dataclass(frozen=True)
class Cache:
    """Quantised keys or values by head and position: ``rows``: int8[heads, capacity, d], ``scales``: float32[heads,
    capacity].
    """

    rows: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]

    @classmethod
    def empty(cls, heads: int, capacity: int, d: int) -> Cache:
        return cls(np.zeros((heads, capacity, d), np.int8), np.zeros((heads, capacity), np.float32))

    @property
    def capacity(self) -> int:
        return self.rows.shape[1]


class Plan:
    """A list of steps that grows until it runs. Every method but :meth:`run` appends one.

    Values are :class:`Rows`; the caller gives the memory of results, which may serve again when nothing reads them
    any more, but not in the step that reads. ``last`` computes the row of the last new token alone.
    """

    def __init__(self) -> None:
        self._steps: list[_Step] = []
        self._held: list[Any] = []
        self._array: ctypes.Array[_Step] | None = None

    def run(self, rows: int, first: int = 0) -> None:
        """Run all steps for ``rows`` new tokens, the first of them at position ``first``."""
        if self._array is None:
            self._array = (_Step * len(self._steps))(*self._steps)
        library().lockstep_run(self._array, len(self._array), rows, first)

    def gather(self, entries: npt.NDArray[Any], indices: Rows, y: Rows, *, last: bool) -> None:
        """Rows of ``entries``: float32[m, n], at ``indices``: int64, which the caller has checked."""
        entries = self._floats(entries)
        self._append(Operation.GATHER, last, [indices], [y], [entries], [entries.strides[0]])

    def add(self, a: Rows, b: Rows, y: Rows, *, last: bool) -> None:
        self._append(Operation.ADD, last, [a, b], [y], [], [y.columns])

    def multiply(self, a: Rows, b: Rows, y: Rows, *, last: bool) -> None:
        self._append(Operation.MULTIPLY, last, [a, b], [y], [], [y.columns])

    def layer_norm(self, x: Rows, gamma: Any, beta: Any, eps: float, y: Rows, *, last: bool) -> None:
        n = x.columns
        tensors = [self._floats(gamma, n), self._floats(beta, n), table("rsqrt")]
        self._append(Operation.LAYER_NORM, last, [x], [y], tensors, [n], [np.float32(1 / n), eps])

    def rms_norm(self, x: Rows, gamma: Any, eps: float, groups: int, y: Rows, *, last: bool) -> None:
        n = x.columns // groups
        tensors = [self._floats(gamma, n), None, table("rsqrt")]
        self._append(Operation.RMS_NORM, last, [x], [y], tensors, [n, groups], [np.float32(1 / n), eps])

    def rotary(self, x: Rows, cos: Any, sin: Any, heads: int, interleaved: bool, y: Rows, *, last: bool) -> None:
        """cos, sin : float32[positions, pairs], by absolute position."""
        pairs = cos.shape[1]
        tensors = [self._floats(cos), self._floats(sin, *cos.shape)]
        self._append(Operation.ROTARY, last, [x], [y], tensors, [heads, x.columns // heads, pairs, interleaved])

    def apply_function(self, name: str, x: Rows, y: Rows, *, last: bool) -> None:
        if name == "relu":
            self._append(Operation.RELU, last, [x], [y], [], [x.columns])
        elif name in FUNCTIONS:
            self._append(Operation.APPLY, last, [x], [y], [table(name)], [x.columns])
        else:
            raise ValueError(f"unknown function '{name}': there are {', '.join([*FUNCTIONS, 'relu'])}")

    def quantise_rows(self, x: Rows, prescale: Any, q: Rows, s: Rows, *, last: bool) -> None:
        factors = None if prescale is None else self._floats(prescale, x.columns)
        self._append(Operation.QUANTISE, last, [x], [q, s], [table("recip"), factors], [x.columns])

    def linear(self, q: Rows, s: Rows, w: Any, sw: Any, bias: Any, y: Rows, *, last: bool) -> None:
        """w : int8[N, K], read-only if its packed copy is to be shared."""
        weights = packed(w)
        if q.columns != weights.k:
            raise ValueError(f"expected int8[M, {weights.k}], not {q.memory.dtype}{list(q.memory.shape)}")
        columns = weights.columns
        added = None if bias is None else self._floats(bias, columns)
        tensors = [weights.data, self._floats(sw, columns), added]
        self._append(Operation.LINEAR, last, [q, s], [y], tensors, [columns, weights.k])

    def keep(self, x: Rows, cache: Cache) -> None:
        """Quantise x by token and head, into ``cache`` from the position of the first new token on."""
        tensors = [table("recip"), cache.rows, cache.scales]
        self._append(Operation.KEEP, False, [x], [], tensors, [len(cache.rows), cache.rows.shape[2], cache.capacity])

    def attention(
        self, q: Rows, keys: Cache, values: Cache, y: Rows, *, heads: int, tile: int,
        scale: float | None, causal: bool, window: int | None, last: bool,
    ) -> None:  # fmt: skip
        """Attention to everything in the caches up to the last new token."""
        d = q.columns // heads
        check_tile(tile, keys.capacity)
        check_window(window)
        tensors = [table("exp2"), table("recip"), keys.rows, keys.scales, values.rows, values.scales]
        sizes = [heads, len(keys.rows), d, tile, causal, window or 0, keys.capacity]
        self._append(Operation.ATTENTION, last, [q], [y], tensors, sizes, [score_factor(scale, d)])

    @staticmethod
    def _floats(x: Any, *shape: int) -> npt.NDArray[np.float32]:
        array = np.ascontiguousarray(x, np.float32)
        if shape and array.shape != shape:
            raise ValueError(f"expected float32{list(shape)}, not {list(array.shape)}")
        return array

    def _append(
        self, operation: Operation, last: bool, reads: Sequence[Rows], writes: Sequence[Rows], tensors: Sequence[Any],
        sizes: Sequence[int], numbers: Sequence[Any] = (),
    ) -> None:  # fmt: skip
        step = _Step(operation=operation, last=last)
        for slots, values in ((step.reads, reads), (step.writes, writes)):
            for i, value in enumerate(values):
                one = len(value.memory) == 1 and not value.whole
                slots[i] = _Rows(value.memory.ctypes.data, 0 if one else value.memory.strides[0], value.whole)
        for i, tensor in enumerate(tensors):
            if tensor is not None:
                step.tensors[i] = tensor.ctypes.data if isinstance(tensor, np.ndarray) else ctypes.addressof(tensor)
        step.sizes[: len(sizes)] = [int(size) for size in sizes]
        step.numbers[: len(numbers)] = [float(number) for number in numbers]
        self._steps.append(step)
        self._held += [*(value.memory for value in (*reads, *writes)), *tensors]
        self._array = None
