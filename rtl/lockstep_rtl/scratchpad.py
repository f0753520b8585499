"""An on-chip memory: one read and one write port, each shared between the datapath and a transfer unit."""

from __future__ import annotations

from amaranth.hdl import Cat, ClockSignal, Instance, Module, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from .interfaces import ADDRESS_BITS, ReadPort, WritePort


def fill_stream(width: int) -> stream.Signature:
    """Whole words that LOAD writes: address and data."""
    return stream.Signature(data.StructLayout({"address": ADDRESS_BITS, "data": width}))


class Scratchpad(wiring.Component):
    """A memory of ``depth`` words of ``width`` bits with two readers and two writers.

    Ports
    -----
    write : In(WritePort), the vector unit; always taken.
    fill : In(stream of address, data), LOAD; waits while ``write`` is enabled.
    read : In(ReadPort), the datapath; always served, answer one cycle later.
    drain : In(ReadPort) with ``drain_ready`` Out(1), STORE; served in cycles without ``read``.
    bounds_* : Out(1) each, an access beyond the end in this cycle, with ``bounds_address`` Out(16).

    The data word is shared by both readers: a reader looks at it in the cycle behind its own request.
    Contents are undefined at the start, and so is on silicon a word read in the cycle in which it is written: units
    that share words take turns by tokens.
    """

    def __init__(self, width: int, granules: int, depth: int) -> None:
        self.width, self.granules, self.depth = width, granules, depth
        super().__init__(
            {
                "write": In(WritePort(width, granules)),
                "fill": In(fill_stream(width)),
                "read": In(ReadPort(width)),
                "drain": In(ReadPort(width)),
                "drain_ready": Out(1),
                "bounds_write": Out(1),
                "bounds_fill": Out(1),
                "bounds_read": Out(1),
                "bounds_drain": Out(1),
                "bounds_address": Out(ADDRESS_BITS),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        bits = (self.depth - 1).bit_length()
        address, write_data, write_enable = Signal(ADDRESS_BITS), Signal(self.width), Signal(self.granules)
        read_address, read_data = Signal(ADDRESS_BITS), Signal(self.width)
        m.submodules.memory = Instance(
            "lockstep_ram",
            p_WIDTH=self.width,
            p_GRANULES=self.granules,
            p_DEPTH=self.depth,
            p_ADDRESS_BITS=bits,
            i_clk=ClockSignal(),
            i_write_enable=write_enable,
            i_write_address=address[:bits],
            i_write_data=write_data,
            i_read_enable=self.read.enable | self.drain.enable,
            i_read_address=read_address[:bits],
            o_read_data=read_data,
        )

        m.d.comb += [
            self.fill.ready.eq(~self.write.enable),
            address.eq(self.fill.payload.address),
            write_data.eq(self.fill.payload.data),
            write_enable.eq(self.fill.valid.replicate(self.granules)),
        ]
        with m.If(self.write.enable):
            m.d.comb += [
                address.eq(self.write.address),
                write_data.eq(self.write.data),
                write_enable.eq(self.write.mask),
            ]

        m.d.comb += [
            self.drain_ready.eq(~self.read.enable),
            read_address.eq(self.drain.address),
            self.read.data.eq(read_data),
            self.drain.data.eq(read_data),
        ]
        with m.If(self.read.enable):
            m.d.comb += read_address.eq(self.read.address)

        if bits < ADDRESS_BITS:
            write_beyond = address[bits:].any()
            read_beyond = read_address[bits:].any()
            m.d.comb += [
                self.bounds_write.eq(self.write.enable & write_beyond),
                self.bounds_fill.eq(~self.write.enable & self.fill.valid & write_beyond),
                self.bounds_read.eq(self.read.enable & read_beyond),
                self.bounds_drain.eq(~self.read.enable & self.drain.enable & read_beyond),
                self.bounds_address.eq(read_address),
            ]
            with m.If(Cat(self.bounds_write, self.bounds_fill).any()):
                m.d.comb += self.bounds_address.eq(address)
        return m
