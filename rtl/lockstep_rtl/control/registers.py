"""The register file behind AXI4-Lite."""

from __future__ import annotations

from amaranth.hdl import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from lockstep_isa.config import ABI_VERSION, ISA_VERSION, CoreConfig
from lockstep_isa.registers import ADDRESS_BITS, BY_NAME, MAGIC, registers_of

from ..axi import Lite

_CONSTANTS = {"MAGIC": MAGIC, "ABI_VERSION": ABI_VERSION, "ISA_VERSION": ISA_VERSION}


class RegisterFile(wiring.Component):
    """Every register of the map, one access at a time.

    Ports
    -----
    bus : In(Lite). An address beyond the map answers DECERR (3).
    value_NAME : In(32) for registers that the core drives. NAME : Out(32) for those that the host writes.
    written_NAME : Out(1), the host writes NAME in this cycle; ``write_data`` Out(32) is what it writes.
    """

    def __init__(self, config: CoreConfig) -> None:
        self.constants = _CONSTANTS | {"CONFIG_CRC": config.crc}
        self.registers = registers_of(config)
        self.driven = [r.name for r in self.registers if r.access == "r" and r.name not in self.constants]
        self.driven.append("FLAGS")
        self.stored = [r.name for r in self.registers if r.access == "rw" and r.name != "FLAGS"]
        self.strobed = ["CONTROL", "FLAGS"]
        super().__init__(
            {"bus": In(Lite(ADDRESS_BITS)), "write_data": Out(32)}
            | {f"value_{n}": In(32) for n in self.driven}
            | {n: Out(32) for n in self.stored}
            | {f"written_{n}": Out(1) for n in self.strobed}
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        bus = self.bus
        beyond = 4 * len(self.registers)

        write = Signal()
        m.d.comb += [
            write.eq(bus.aw.valid & bus.w.valid & ~bus.b.valid),
            bus.aw.ready.eq(write),
            bus.w.ready.eq(write),
            self.write_data.eq(bus.w.data),
        ]
        with m.If(bus.b.ready):
            m.d.sync += bus.b.valid.eq(0)
        with m.If(write):
            m.d.sync += [bus.b.valid.eq(1), bus.b.resp.eq((bus.aw.addr >= beyond).replicate(2))]
            for name in self.stored:
                with m.If(bus.aw.addr == BY_NAME[name].address):
                    m.d.sync += getattr(self, name).eq(bus.w.data)
            for name in self.strobed:
                m.d.comb += getattr(self, f"written_{name}").eq(bus.aw.addr == BY_NAME[name].address)

        read = Signal()
        m.d.comb += [read.eq(bus.ar.valid & ~bus.r.valid), bus.ar.ready.eq(read)]
        with m.If(bus.r.ready):
            m.d.sync += bus.r.valid.eq(0)
        with m.If(read):
            m.d.sync += [bus.r.valid.eq(1), bus.r.resp.eq((bus.ar.addr >= beyond).replicate(2)), bus.r.data.eq(0)]
            with m.Switch(bus.ar.addr):
                for register in self.registers:
                    name = register.name
                    with m.Case(register.address):
                        if name in self.constants:
                            m.d.sync += bus.r.data.eq(self.constants[name])
                        elif name in self.stored:
                            m.d.sync += bus.r.data.eq(getattr(self, name))
                        elif name in self.driven:
                            m.d.sync += bus.r.data.eq(getattr(self, f"value_{name}"))
        return m
