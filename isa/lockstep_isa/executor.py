"""The golden executor: what a program means, one instruction after the other, in NumPy.

Slow and obvious on purpose. It ignores tokens, queues and time; every other executor must leave the same bits in
device memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from . import numerics
from .config import CoreConfig
from .instructions import (
    INDEX_ENTRIES,
    LOAD,
    MATRIX,
    OPERANDS,
    PATTERNS,
    STORE,
    TABLE_ENTRIES,
    TABLE_ENTRY_BYTES,
    TABLE_SLOTS,
    WEIGHT_GROUPS,
    Destination,
    FirstAdd,
    FirstMultiply,
    Function,
    Instruction,
    Mask,
    Maximum,
    Memory,
    SecondAdd,
    SecondMultiply,
    Source,
    Sparsity,
    Tap,
    ThirdMultiply,
    Weights,
    resolve,
)
from .packed import weight_words
from .program import Program, table_shift, transposes, uses_y
from .tables import TableFunction
from .weights import stream
from .zero_skipping import skipped_chunks

F32 = NDArray[np.float32]

#: Function -> kind, first index and entries of its table.
_TABLE_KINDS = {
    Function.EXP2: ("exp2", 0, 32),
    Function.RECIP: ("recip", 64, 65),
    Function.RSQRT: ("rsqrt", 32, 97),
    Function.RELU_MINUS: ("relu_minus", 0, TABLE_ENTRIES),
    Function.ODD: ("odd", 0, TABLE_ENTRIES),
    Function.SIGMOID: ("sigmoid", 0, TABLE_ENTRIES),
}


class GoldenCore:
    """A core's memories and the meaning of each instruction.

    Parameters
    ----------
    config : the configuration; only sizes matter here.
    memory : uint8[bytes], device memory, read and written in place.

    Attributes
    ----------
    zero : bool[words], which words of ACTIVATION were written as zeros. skipped_chunks : what MATRIX leaves out by that
        so far; no bit of a result hangs on it.
    """

    def __init__(self, config: CoreConfig, memory: NDArray[np.uint8]) -> None:
        self.config = config
        self.memory = memory
        rows = config.rows
        self.activation = np.zeros((config.activation_words, rows), np.int8)
        self.weight = np.zeros((config.weight_words, rows), np.int8)
        self.vector = np.zeros((config.vector_words, rows), np.float32)
        self.parameter = np.zeros((config.parameter_words, rows), np.float32)
        self.table = np.zeros((TABLE_SLOTS * TABLE_ENTRIES, 3), np.float32)
        self.index = np.zeros(INDEX_ENTRIES, np.uint16)
        self.accumulators: deque[NDArray[np.int32]] = deque()
        self.zero = np.zeros(config.activation_words, np.bool_)
        self.skipped_chunks = 0

    def run(self, program: Program, operands: Sequence[int] = ()) -> None:
        """Execute every instruction in list order.

        operands : value of operand 1, 2, ...; those not given are zero.
        """
        values = [*operands, *[0] * (OPERANDS - 1 - len(operands))]
        for instruction in program.instructions:
            resolved = resolve(instruction, values)
            if resolved is not None:
                self.execute(resolved)

    def execute(self, i: Instruction) -> None:
        """Execute one resolved instruction."""
        if i.type is LOAD:
            self._load(i)
        elif i.type is STORE:
            self._store(i)
        elif i.type is MATRIX:
            self._matrix(i)
        else:
            self._vector(i)

    def _load(self, i: Instruction) -> None:
        rows = self.config.rows
        for row in range(i.rows):
            start = i.address + (int(self.index[i.gather_from + row]) if i.gather else row) * i.stride
            local = slice(i.local + row * i.local_stride, i.local + row * i.local_stride + i.words)
            if i.memory == Memory.TABLE:
                raw = self.memory[start : start + i.words * TABLE_ENTRY_BYTES].view(np.float32)
                self.table[local] = raw.reshape(i.words, 4)[:, :3]
            elif i.memory in (Memory.VECTOR, Memory.PARAMETER):
                target = self.vector if i.memory == Memory.VECTOR else self.parameter
                raw = self.memory[start : start + i.words * 4 * rows].view(np.float32)
                target[local] = numerics.flush(raw.reshape(i.words, rows))
            else:
                words = self.memory[start : start + i.words * rows].reshape(i.words, rows)
                if i.memory == Memory.ACTIVATION:
                    self._write_activation(local, words)
                else:
                    self.weight[local] = words.view(np.int8)

    def _store(self, i: Instruction) -> None:
        rows, lane_bytes = self.config.rows, 1 if i.bytes else 4
        for row in range(i.rows):
            start = i.address + row * i.stride
            local = i.local + row * i.local_stride
            raw = self.vector[local : local + i.words].view(np.uint8).reshape(i.words, rows, 4)[:, :, :lane_bytes]
            target = self.memory[start : start + raw.size].reshape(raw.shape)
            first = i.lane if row == 0 else 0
            end = first + 1 if row == 0 and i.lane_only else rows
            target[:, first:end] = raw[:, first:end]

    def _matrix(self, i: Instruction) -> None:
        activation = self.activation.view(np.uint8) if i.unsigned else self.activation
        group, pattern = WEIGHT_GROUPS[Weights(i.weights)], PATTERNS[Sparsity(i.sparsity)]
        self.skipped_chunks += int(skipped_chunks(self.config, i, self.zero).sum())
        for outer in range(i.outer):
            for inner in range(i.inner):
                a = i.a + outer * i.a_outer + inner * i.a_inner
                w = i.w + outer * i.w_outer + inner * i.w_inner
                left = activation[a : a + i.depth].astype(np.int64)
                words = self.weight[w : w + weight_words(i)].view(np.uint8)
                top = stream(words, i.depth, group, pattern).astype(np.int64)
                self.accumulators.append((left.T @ top).astype(np.int32))

    def _vector(self, i: Instruction) -> None:
        for tile in range(i.tiles):
            self._pass(i, tile)

    def _table(self, i: Instruction) -> TableFunction:
        """The function table in the slot that the instruction names."""
        kind, base, entries = _TABLE_KINDS[Function(i.function)]
        first = i.table * TABLE_ENTRIES
        c0, c1, c2 = self.table[first : first + entries].T.copy()
        return TableFunction("slot", kind, table_shift(i), base, c0, c1, c2)

    def _columns(self, base: int, columns: int) -> F32:
        """Column operand: f32[columns, 1], one PARAMETER scalar per column."""
        words = -(-columns // self.config.rows)
        return self.parameter[base : base + words].reshape(-1)[:columns, None]

    def _pass(self, i: Instruction, tile: int) -> None:
        """One row tile; arrays are f32[columns, rows]."""
        n = i.columns
        x = self._source(i, tile)
        y = self.vector[i.y + tile * i.y_stride :][:n] if uses_y(i) else x
        lane0 = self.parameter[(i.lane0 + tile) % len(self.parameter)]
        lane1 = self.parameter[(i.lane1 + tile) % len(self.parameter)]

        if i.add1 == FirstAdd.LANE0:
            x = numerics.add(x, lane0[None])
        elif i.add1 == FirstAdd.Y:
            x = numerics.add(x, y)

        if i.mul1 == FirstMultiply.LANE1:
            x = numerics.mul(x, lane1[None])
        elif i.mul1 == FirstMultiply.COLUMN0:
            x = numerics.mul(x, self._columns(i.column0, n))
        elif i.mul1 == FirstMultiply.SELF:
            x = numerics.mul(x, x)
        elif i.mul1 == FirstMultiply.IMMEDIATE0:
            x = numerics.mul(x, _immediate(i.immediate0))

        if i.mul2 == SecondMultiply.LANE0:
            x = numerics.mul(x, lane0[None])
        elif i.mul2 == SecondMultiply.COLUMN0:
            x = numerics.mul(x, self._columns(i.column0, n))

        if i.add2 == SecondAdd.COLUMN1:
            x = numerics.add(x, self._columns(i.column1, n))
        elif i.add2 == SecondAdd.IMMEDIATE1:
            x = numerics.add(x, _immediate(i.immediate1))
        elif i.add2 == SecondAdd.Y:
            x = numerics.add(x, y)

        exponent = np.zeros(x.shape, np.int32)
        if i.function == Function.SCORE:
            hidden = self._hidden(i, tile)
            # The lower limit has the exponent that hidden scores count with.
            x = np.where(hidden, -numerics.SCORE_LIMIT, numerics.clamp_score(x))
            exponent = numerics.exp2_parts(x)[1]
            x = np.where(hidden, np.float32(-np.inf), x)
        elif i.function == Function.EXP2:
            m, power = numerics.exp2_parts(numerics.clamp_score(x), self._table(i))
            scaled = numerics.scale2(m, power.astype(np.int64) - lane0.view(np.int32)[None])
            x = np.where(np.isneginf(x), np.float32(0), scaled)
        elif i.function == Function.RELU:
            x = numerics.relu(x)
        elif i.function != Function.NONE:
            x = numerics.evaluate(self._table(i), x)

        before = x
        if i.mul3 == ThirdMultiply.COLUMN2:
            x = numerics.mul(x, self._columns(i.column2, n))
        elif i.mul3 == ThirdMultiply.Y:
            x = numerics.mul(x, y)

        if i.maximum:
            maxima = self._maxima(i, x, exponent)
            first = i.max_to + tile * len(maxima)
            stands = self.parameter[first : first + len(maxima)].view(np.int32)
            if i.max_continue:
                maxima = np.maximum(maxima, stands)

        result = x if i.tap == Tap.AFTER else before
        self._write(i, tile, result)
        if i.select:
            self._select(i, result)
        if i.sum:
            self.parameter[i.sum_to + tile] = numerics.rowsum(before.T)
        if i.maximum:
            stands[:] = maxima

    @staticmethod
    def _maxima(i: Instruction, x: F32, exponent: NDArray[np.int32]) -> NDArray[np.int32]:
        """int32[sections, rows]; the whole row is one section where ``max_columns`` is 0."""
        size = i.max_columns or i.columns
        sections = [slice(first, first + size) for first in range(0, i.columns, size)]
        if i.maximum == Maximum.ABSOLUTE:
            return np.stack([numerics.absmax(x[s].T) for s in sections]).view(np.int32)
        return np.stack([exponent[s].max(axis=0) for s in sections])

    def _hidden(self, i: Instruction, tile: int) -> NDArray[np.bool_]:
        """Which scores of a row tile the mask hides: bool[columns, rows]."""
        if i.mask == Mask.NONE:
            return np.zeros((i.columns, self.config.rows), np.bool_)
        first_row = (i.first_row ^ 1 << 19) - (1 << 19)  # two's complement of 20 bits
        position = first_row + tile * self.config.rows + np.arange(self.config.rows)
        column = np.arange(i.columns)[:, None]
        visible = column <= position
        if i.window:
            visible &= column > position - i.window
        return ~visible

    def _select(self, i: Instruction, x: F32) -> None:
        """The greatest of the columns of x: f32[columns, rows]; of equal ones the first."""
        lanes = slice(i.select_lane, i.select_lane + 1 + i.select_more_lanes)
        values = numerics.order(x[:, lanes]).max(axis=1, initial=0).astype(np.int64)
        column = np.arange(i.columns)
        values[(column < i.select_first) | (column >= i.columns - i.select_last)] = 1 << 32
        chosen = np.sort(np.argsort(-values, kind="stable")[: i.select])
        self.index[i.select_to : i.select_to + len(chosen)] = chosen

    def _source(self, i: Instruction, tile: int) -> F32:
        if i.source == Source.ACCUMULATOR:
            tiles = [self.accumulators.popleft() for _ in range(-(-i.columns // self.config.columns))]
            return numerics.int_to_float(np.concatenate(tiles, axis=1).T[: i.columns])
        memory = self.vector if i.source == Source.VECTOR else self.parameter
        x = memory[i.x + tile * i.x_stride :][: i.columns]
        return numerics.int_to_float(x.view(np.int32)) if i.source == Source.INTEGER else x

    def _write(self, i: Instruction, tile: int, x: F32) -> None:
        start = i.to + tile * i.to_stride
        if i.destination == Destination.VECTOR:
            self.vector[start : start + i.columns] = x
        elif i.destination == Destination.PARAMETER:
            self.parameter[start : start + i.columns] = x
        elif i.destination != Destination.NONE:
            self._write_bytes(i, start, numerics.round_to_int8bits(x))

    def _write_bytes(self, i: Instruction, start: int, x: NDArray[np.uint8]) -> None:
        """The rounded result of one row tile, uint8[columns, rows], to its words from ``start`` on."""
        columns, rows = self.config.columns, self.config.rows
        if not transposes(i):
            return self._write_words(i, start, x)
        groups = -(-i.columns // columns)
        padded = np.zeros((groups * columns, rows), np.uint8)
        padded[: i.columns] = x
        for group in range(groups):
            self._write_words(i, start + group * i.to_group, padded[group * columns : (group + 1) * columns].T)

    def _write_words(self, i: Instruction, start: int, words: NDArray[np.uint8]) -> None:
        place = slice(start, start + len(words))
        if i.destination == Destination.ACTIVATION:
            self._write_activation(place, words)
        elif i.destination in (Destination.WEIGHT, Destination.WEIGHT_TRANSPOSED):
            self.weight[place] = words.view(np.int8)
        else:
            self.vector[place] = words.astype(np.uint32).view(np.float32)

    def _write_activation(self, place: slice, words: NDArray[np.uint8]) -> None:
        self.activation[place] = words.view(np.int8)
        self.zero[place] = ~words.any(axis=1)


def _immediate(bits: int) -> F32:
    return np.array([[bits]], np.uint32).view(np.float32)
