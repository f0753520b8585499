"""The index memory: lists of columns that VECTOR selects, by which LOAD gathers rows."""

from __future__ import annotations

from amaranth.hdl import Module, Shape
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from lockstep_isa.instructions import INDEX_ENTRIES

#: Bits of an entry, the number of a column, and of the number of an entry.
ENTRY_BITS = (INDEX_ENTRIES - 1).bit_length()


class IndexWrite(wiring.Signature):
    """Write side, seen from the writer: ``enable`` Out(1), ``address``, ``data`` Out(10)."""

    def __init__(self) -> None:
        super().__init__({"enable": Out(1), "address": Out(ENTRY_BITS), "data": Out(ENTRY_BITS)})


class IndexRead(wiring.Signature):
    """Read side, seen from the reader: ``enable`` Out(1), ``address`` Out(10); ``data`` In(10) in the next cycle, held
    until the next read."""

    def __init__(self) -> None:
        super().__init__({"enable": Out(1), "address": Out(ENTRY_BITS), "data": In(ENTRY_BITS)})


class IndexMemory(wiring.Component):
    """``INDEX_ENTRIES`` entries with one reader and one writer, which take turns by tokens.

    Ports
    -----
    write : In(IndexWrite). read : In(IndexRead). Contents are undefined at the start.
    """

    def __init__(self) -> None:
        super().__init__({"write": In(IndexWrite()), "read": In(IndexRead())})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.memory = memory = Memory(shape=Shape(ENTRY_BITS), depth=INDEX_ENTRIES, init=[])
        write, read = memory.write_port(), memory.read_port()
        m.d.comb += [
            *(write.en.eq(self.write.enable), write.addr.eq(self.write.address), write.data.eq(self.write.data)),
            *(read.en.eq(self.read.enable), read.addr.eq(self.read.address), self.read.data.eq(read.data)),
        ]
        return m
