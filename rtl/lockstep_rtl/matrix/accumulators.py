"""The accumulator queue: result tiles between the array and the vector unit, in order."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Shape, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from lockstep_isa.config import CoreConfig

from ..interfaces import AccumulatorPort


class Accumulators(wiring.Component):
    """A queue of ``accumulator_tiles`` tiles, written one skewed column per cycle, read beat by beat.

    Ports
    -----
    result : In(32 R), strobe : In(1), as the array shows them: row r lags row 0 by r cycles.
    reserve : In(1), a tile is started: its room is taken. ``room`` Out(1): there is room for one more.
    read : In(AccumulatorPort), the oldest tile.

    Each row has a memory of its own, so the skew needs no registers but only a delayed address. Where the reader takes
    two columns a beat, even and odd columns of a row lie in memories of their own. A tile is
    available once the last row's last column is written. Whoever reserves without room loses data: look at ``room``.
    """

    def __init__(self, config: CoreConfig) -> None:
        self.config = config
        super().__init__(
            {
                "result": In(32 * config.rows),
                "strobe": In(1),
                "reserve": In(1),
                "room": Out(1, init=1),
                "read": In(AccumulatorPort(config)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config = self.config
        depth = config.accumulator_tiles * config.columns
        column_bits = (config.columns - 1).bit_length()
        banks = config.columns_per_beat
        bank_bits = banks - 1

        # Write side: one address for row 0, delayed by r for row r.
        address = Signal(range(depth))
        m.d.sync += address.eq(address + self.strobe)
        enable, target = self.strobe, address
        tail = Signal(range(config.accumulator_tiles))
        read_address = Cat(self.read.column, tail)[bank_bits:]
        columns: list[list[Value]] = [[] for _ in range(banks)]
        for r in range(config.rows):
            for bank, column in enumerate(columns):
                name = f"row_{r}_{bank}" if bank_bits else f"row_{r}"
                m.submodules[name] = memory = Memory(shape=Shape(32), depth=depth // banks, init=[])
                write, read = memory.write_port(), memory.read_port()
                m.d.comb += [
                    write.en.eq(enable & (target[:bank_bits] == bank)),
                    write.addr.eq(target[bank_bits:]),
                    write.data.eq(self.result.word_select(r, 32)),
                    read.en.eq(self.read.enable),
                    read.addr.eq(read_address),
                ]
                column.append(read.data)
            if r < config.rows - 1:
                next_enable, next_target = Signal(name=f"enable_{r}"), Signal.like(address, name=f"address_{r}")
                m.d.sync += [next_enable.eq(enable), next_target.eq(target)]
                enable, target = next_enable, next_target
        m.d.comb += self.read.data.eq(Cat(columns))
        written = Signal()
        m.d.comb += written.eq(enable & target[:column_bits].all())

        complete = Signal(range(config.accumulator_tiles + 1))
        reserved = Signal(range(config.accumulator_tiles + 1))
        # Registers of their own: VECTOR and MATRIX decide by them at the start of a cycle.
        with m.If(written != self.read.pop):
            m.d.sync += self.read.available.eq(written | (complete != 1))
        with m.If(self.reserve != self.read.pop):
            m.d.sync += self.room.eq(self.read.pop | (reserved != config.accumulator_tiles - 1))
        m.d.sync += [
            complete.eq(complete + written - self.read.pop),
            reserved.eq(reserved + self.reserve - self.read.pop),
            tail.eq(tail + self.read.pop),
        ]
        return m
