"""The systolic array: output-stationary, skewed, tiles back to back without a bubble."""

from __future__ import annotations

from amaranth.hdl import Cat, ClockSignal, Instance, Module, Mux, Signal, signed
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
    depend on r + c only, so there is one chain of them for all elements. Elements never stall; missing operands are
    zeros. The elements are the library module ``lockstep_array``, in Verilog.
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
        a = [Signal(signed(9), name=f"a_{r}") for r in range(rows)]
        for r, extended in enumerate(a):
            byte = self.a.word_select(r, 8)
            m.d.comb += extended.eq(Mux(self.valid, Cat(byte, byte[7] & ~self.unsigned), 0).as_signed())
        m.submodules.elements = Instance(
            "lockstep_array",
            p_ROWS=rows,
            p_COLUMNS=columns,
            i_clk=ClockSignal(),
            i_a=Cat(a),
            i_w=Mux(self.valid, self.w, 0),
            i_first=self.valid & self.first,
            i_last=self.valid & self.last,
            o_result=self.result,
            o_strobe=self.strobe,
        )
        return m
