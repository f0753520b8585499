"""The systolic array: output-stationary, skewed, tiles back to back without a bubble."""

from __future__ import annotations

import functools
import operator

from amaranth.hdl import Cat, Module, Mux, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from lockstep_isa.config import CoreConfig

#: Cycles from an operand word at the inputs to the first column of its tile at row 0 of ``result``.
ARRAY_LATENCY = 3


class SystolicArray(wiring.Component):
    """``acc[r, c] = sum_k a[k][r] * w[k][c]``, exact in int32.

    Ports
    -----
    a : In(8 R), one activation byte per row. w : In(8 C), one weight byte per column.
    valid : In(1), the words count; without it zeros enter and nothing is disturbed.
    first, last : In(1), with ``valid``: this is the first, the last k of a tile.
    unsigned : In(1), with ``valid``: activations are uint8.
    result : Out(32 R), row r shows column c of its tile in cycle r + c behind the tile's first.
    strobe : Out(1), row 0 of ``result`` is valid; row r follows r cycles later.

    Cycle by cycle (a word that arrives in cycle 0)::

        cycle 0      words at the inputs; row r and column r wait r cycles in the skew registers
        cycle 1+r+c  element (r, c) multiplies and adds; ``first`` drops the old sum
        cycle 2+r+c  the sum of the last k stands in the element's register ...
        cycle 3+r+c  ... and is at ``result``, selected by the diagonal's ``last``

    One column per row and cycle leaves the array, so tiles may follow each other every max(K, C) cycles if their
    ``last`` words are at least C cycles apart: the skew is paid once per stream. No element has a second accumulator:
    ``result`` takes the sum in the one cycle between its completion and the next tile's first product. Control bits
    depend on r + c only, so there is one chain of R + C - 1 of them for all elements. Elements never stall; missing
    operands are zeros.
    """

    def __init__(self, config: CoreConfig) -> None:
        self.config = config
        super().__init__(
            {
                "a": In(8 * config.rows),
                "w": In(8 * config.columns),
                "valid": In(1),
                "first": In(1),
                "last": In(1),
                "unsigned": In(1),
                "result": Out(32 * config.rows),
                "strobe": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        rows, columns = self.config.rows, self.config.columns

        def chain(name: str, source: object, shape: object, length: int) -> list[Signal]:
            """``length`` registers one behind the other; element d lags ``source`` by d + 1 cycles."""
            registers = [Signal(shape, name=f"{name}_{d}", reset_less=True) for d in range(length)]
            for register, previous in zip(registers, [source, *registers], strict=False):
                m.d.sync += register.eq(previous)
            return registers

        # Control of diagonal d = r + c: aligned with the operands of its elements.
        first = chain("first", self.valid & self.first, 1, rows + columns - 1)
        last = chain("last", self.valid & self.last, 1, rows + columns)

        # Operands: skew first (r registers), then through the elements.
        a: list[list[Signal]] = []
        for r in range(rows):
            byte = self.a.word_select(r, 8)
            extended = Signal(signed(9), name=f"a_in_{r}")
            m.d.comb += extended.eq(Mux(self.valid, Cat(byte, byte[7] & ~self.unsigned), 0).as_signed())
            a.append(chain(f"a_{r}", extended, signed(9), r + columns)[r:])
        w: list[list[Signal]] = []
        for c in range(columns):
            byte = Signal(signed(8), name=f"w_in_{c}")
            m.d.comb += byte.eq(Mux(self.valid, self.w.word_select(c, 8), 0).as_signed())
            w.append(chain(f"w_{c}", byte, signed(8), c + rows)[c:])

        for r in range(rows):
            selected = []
            for c in range(columns):
                acc = Signal(signed(32), name=f"acc_{r}_{c}", reset_less=True)
                m.d.sync += acc.eq(Mux(first[r + c], 0, acc) + a[r][c] * w[c][r])
                selected.append(Mux(last[r + c + 1], acc, 0))
            column = Signal(32, name=f"column_{r}", reset_less=True)
            m.d.sync += column.eq(functools.reduce(operator.or_, selected))
            m.d.comb += self.result.word_select(r, 32).eq(column)
        strobe = Signal(reset_less=True)
        m.d.sync += strobe.eq(Cat(last[1 : columns + 1]).any())
        m.d.comb += self.strobe.eq(strobe)
        return m
