"""The rows of a gathered block: where each begins, by a list in the index memory."""

from __future__ import annotations

from amaranth.hdl import Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out
from lockstep_isa.instructions import INDEX_ENTRIES

from ..axi import ADDRESS_BITS
from ..index_memory import IndexRead

#: Bits of an entry's number as an instruction has it: more than the memory has.
FROM_BITS = 16


class RowStarts(wiring.Component):
    """Row r of a block begins at ``address + index[first + r] * stride``, one row a cycle.

    Ports
    -----
    begin : In(1), a block begins: ``address``, ``stride`` In(32), ``first``, ``rows`` In(16). Only where all rows of
        the block before are taken.
    start : Out(stream of byte addresses), from the fourth cycle behind ``begin`` on.
    index : Out(IndexRead). beyond : Out(1), the next entry does not exist; no further row is shown.
    """

    def __init__(self) -> None:
        super().__init__(
            {
                "begin": In(1),
                "address": In(ADDRESS_BITS),
                "stride": In(ADDRESS_BITS),
                "first": In(FROM_BITS),
                "rows": In(16),
                "start": Out(stream.Signature(ADDRESS_BITS)),
                "index": Out(IndexRead()),
                "beyond": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        address, stride = Signal(ADDRESS_BITS), Signal(ADDRESS_BITS)
        # A bit more: behind the last number there is no 0 again.
        entry, left = Signal(FROM_BITS + 1), Signal(16)
        moves = Signal()
        m.d.comb += moves.eq(~self.start.valid | self.start.ready)

        # Cycle 1: an entry is asked for.
        inside = Signal()
        m.d.comb += [
            inside.eq(entry < INDEX_ENTRIES),
            self.beyond.eq(left.any() & ~inside),
            self.index.enable.eq(left.any() & inside & moves),
            self.index.address.eq(entry),
        ]
        with m.If(self.index.enable):
            m.d.sync += [entry.eq(entry + 1), left.eq(left - 1)]

        # Cycle 2: it is multiplied. Cycle 3: it is added.
        read, multiplied = Signal(), Signal()
        product = Signal(ADDRESS_BITS)
        with m.If(moves):
            m.d.sync += [
                *(read.eq(self.index.enable), multiplied.eq(read), self.start.valid.eq(multiplied)),
            ]
            with m.If(read):
                m.d.sync += product.eq(self.index.data * stride)
            with m.If(multiplied):
                m.d.sync += self.start.payload.eq(address + product)

        with m.If(self.begin):
            m.d.sync += [
                *(address.eq(self.address), stride.eq(self.stride)),
                *(entry.eq(self.first), left.eq(self.rows)),
            ]
        return m
