"""AXI4 (memory) and AXI4-Lite (registers) as Amaranth signatures, and the arbiter of the read channels.

Only what the core uses: INCR bursts of whole bus words, one write in order, reads told apart by one ID bit.
Source: AMBA AXI and ACE Protocol Specification (ARM IHI 0022).
"""

from __future__ import annotations

from amaranth.hdl import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from lockstep_isa.config import CoreConfig

#: Beats of the longest burst; a block of that many beats never crosses a 4 KiB border.
BURST_BEATS = 32
ADDRESS_BITS = 32


class ReadAddress(wiring.Signature):
    """AR: ``addr`` in bytes, ``len`` beats minus one, ``id`` of the master."""

    def __init__(self, id_bits: int = 0) -> None:
        members = {"valid": Out(1), "ready": In(1), "addr": Out(ADDRESS_BITS), "len": Out(8)}
        super().__init__(members | ({"id": Out(id_bits)} if id_bits else {}))


class ReadData(wiring.Signature):
    """R, seen from the master: ``data``, ``resp`` (0 is OKAY), ``last``."""

    def __init__(self, bus_bytes: int, id_bits: int = 0) -> None:
        members = {"valid": In(1), "ready": Out(1), "data": In(8 * bus_bytes), "resp": In(2), "last": In(1)}
        super().__init__(members | ({"id": In(id_bits)} if id_bits else {}))


class ReadMaster(wiring.Signature):
    """AR and R of one master."""

    def __init__(self, bus_bytes: int, id_bits: int = 0) -> None:
        super().__init__({"ar": Out(ReadAddress(id_bits)), "r": Out(ReadData(bus_bytes, id_bits))})


class WriteMaster(wiring.Signature):
    """AW, W and B of one master."""

    def __init__(self, bus_bytes: int) -> None:
        super().__init__(
            {
                "aw": Out(ReadAddress()),
                "w": Out(
                    wiring.Signature(
                        {
                            "valid": Out(1),
                            "ready": In(1),
                            "data": Out(8 * bus_bytes),
                            "strb": Out(bus_bytes),
                            "last": Out(1),
                        }
                    )
                ),
                "b": Out(wiring.Signature({"valid": In(1), "ready": Out(1), "resp": In(2)})),
            }
        )


class Lite(wiring.Signature):
    """AXI4-Lite, 32-bit data, seen from the master; byte strobes and protection bits are not used."""

    def __init__(self, address_bits: int) -> None:
        address = {"valid": Out(1), "ready": In(1), "addr": Out(address_bits)}
        super().__init__(
            {
                "aw": Out(wiring.Signature(address)),
                "w": Out(wiring.Signature({"valid": Out(1), "ready": In(1), "data": Out(32)})),
                "b": Out(wiring.Signature({"valid": In(1), "ready": Out(1), "resp": In(2)})),
                "ar": Out(wiring.Signature(address)),
                "r": Out(wiring.Signature({"valid": In(1), "ready": Out(1), "data": In(32), "resp": In(2)})),
            }
        )


class ReadArbiter(wiring.Component):
    """Two read masters share one bus: ``fetch`` (ID 1) goes before ``load`` (ID 0).

    Instructions are few and short, so fixed priority starves nobody. An address once shown stays until it is
    taken, as AXI demands. Answers are routed by ID and may come interleaved.
    """

    def __init__(self, config: CoreConfig) -> None:
        super().__init__(
            {
                "load": In(ReadMaster(config.bus_bytes)),
                "fetch": In(ReadMaster(config.bus_bytes)),
                "bus": Out(ReadMaster(config.bus_bytes, id_bits=1)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        chosen, locked, fetch = Signal(), Signal(), Signal()
        m.d.comb += chosen.eq((locked & fetch) | (~locked & self.fetch.ar.valid))
        m.d.sync += [locked.eq(self.bus.ar.valid & ~self.bus.ar.ready), fetch.eq(chosen)]
        m.d.comb += [self.bus.ar.id.eq(chosen)]
        for master, number in ((self.load, 0), (self.fetch, 1)):
            with m.If(chosen == number):
                m.d.comb += [
                    self.bus.ar.valid.eq(master.ar.valid),
                    self.bus.ar.addr.eq(master.ar.addr),
                    self.bus.ar.len.eq(master.ar.len),
                    master.ar.ready.eq(self.bus.ar.ready),
                ]
            m.d.comb += [
                master.r.valid.eq(self.bus.r.valid & (self.bus.r.id == number)),
                master.r.data.eq(self.bus.r.data),
                master.r.resp.eq(self.bus.r.resp),
                master.r.last.eq(self.bus.r.last),
            ]
            with m.If(self.bus.r.id == number):
                m.d.comb += self.bus.r.ready.eq(master.r.ready)
        return m
