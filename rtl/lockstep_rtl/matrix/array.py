"""The systolic array: output-stationary, skewed, tiles back to back without a bubble."""

from __future__ import annotations

from amaranth.hdl import Cat, ClockSignal, Instance, Module, Mux, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from lockstep_isa.config import CoreConfig

#: Cycles from an operand word at the inputs to the first column of its tile at row 0 of ``result``.
ARRAY_LATENCY = 3
#: Left operands of a packed step, of which each weight picks one, and weights of one column.
PACKED_LEFT = 4
PACKED_TOP = 2


class SystolicArray(wiring.Component):
    """``acc[r, c] = sum_k a[k][r] * w[k][c]``, exact in int32.

    Ports
    -----
    a : In(8 R), one activation byte per row. w : In(8 C), one weight byte per column.
    valid : In(1), the words count; without it zeros enter and nothing is disturbed.
    first, last : In(1), with ``valid``: this is the first, the last k of a tile.
    unsigned : In(1), with ``valid``: activations are uint8.
    more : In(1), with ``valid``: a packed step, see below; such a core's only, as are ``picks``.
    picks : In(2 of C of 2), which of four activations the first and the second weight of each column multiply.
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

    Where the core takes packed weights, ``a`` has four words (In(4 of 8 R)), ``w`` has two (In(2 of 8 C)), and each
    element two multipliers: a step with ``more`` adds ``sum_n a[picks[n][c]][r] * w[n][c]`` over n < 2. One without
    takes the first words of ``a`` and ``w``, whatever the others hold. Both follow each other in any order.
    """

    def __init__(self, config: CoreConfig) -> None:
        self.config = config
        left, top = (PACKED_LEFT, PACKED_TOP) if config.packed else (1, 1)
        packed = {"more": In(1), "picks": In(2 * PACKED_TOP * config.columns)}
        super().__init__(
            {
                "a": In(8 * config.rows * left),
                "w": In(8 * config.columns * top),
                "valid": In(1),
                "first": In(1),
                "last": In(1),
                "unsigned": In(1),
                "result": Out(32 * config.rows),
                "strobe": Out(1),
            }
            | (packed if config.packed else {})
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        rows, columns = self.config.rows, self.config.columns
        a = [Signal(signed(9), name=f"a_{r}") for r in range(len(self.a) // 8)]
        for r, extended in enumerate(a):
            byte = self.a.word_select(r, 8)
            m.d.comb += extended.eq(Mux(self.valid, Cat(byte, byte[7] & ~self.unsigned), 0).as_signed())
        packed = {}
        if self.config.packed:
            more = self.valid & self.more
            packed = {
                "p_PACKED": 1,
                "i_more": more,
                "i_a_more": Cat(a[rows:]),
                "i_w_more": Mux(more, self.w[8 * columns :], 0),
                "i_picks": Mux(more, self.picks, 0),
            }
        m.submodules.elements = Instance(
            "lockstep_array",
            p_ROWS=rows,
            p_COLUMNS=columns,
            i_clk=ClockSignal(),
            i_a=Cat(a[:rows]),
            i_w=Mux(self.valid, self.w[: 8 * columns], 0),
            i_first=self.valid & self.first,
            i_last=self.valid & self.last,
            o_result=self.result,
            o_strobe=self.strobe,
            **packed,
        )
        return m
