"""A FIFO for wide entries whose reader decides late."""

from __future__ import annotations

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out


class HeadFIFO(wiring.Component):
    """As Amaranth's SyncFIFOBuffered, cycle by cycle, but ``r_en`` enables no register of an entry's width.

    The head and the entry behind it are in two registers that take turns. The one that is not the head is filled
    ahead, so reading only turns: where the reader is far away on the chip, a few flip-flops wait for its answer
    and not hundreds.

    Ports
    -----
    w_data : In(width), w_en : In(1), w_rdy : Out(1). r_data : Out(width), r_rdy : Out(1), r_en : In(1).
    level : Out, entries in it. An entry can be read two cycles behind its write, at the earliest.
    """

    def __init__(self, *, width: int, depth: int) -> None:
        if depth < 2:
            raise ValueError(f"a FIFO of {depth} entries has no room for a head and one behind it")
        self.width, self.depth = width, depth
        super().__init__(
            {
                "w_data": In(width),
                "w_en": In(1),
                "w_rdy": Out(1),
                "r_data": Out(width),
                "r_rdy": Out(1),
                "r_en": In(1),
                "level": Out(range(depth + 1)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        behind_depth = self.depth - 1
        m.submodules.storage = storage = Memory(shape=self.width, depth=behind_depth, init=[])
        write, read = storage.write_port(), storage.read_port(domain="comb")
        behind = Signal(range(behind_depth + 1))  # entries behind the head
        turn, ahead = Signal(), Signal()  # which register is the head; whether the other one has the next entry
        slots = [Signal(self.width, name=f"slot{n}") for n in range(2)]
        produce, fetch = Signal(range(behind_depth)), Signal(range(behind_depth))
        writes, fills, advances = Signal(), Signal(), Signal()

        def following(pointer: Signal) -> Mux:
            return Mux(pointer == behind_depth - 1, 0, pointer + 1)

        m.d.comb += [
            self.w_rdy.eq(behind != behind_depth),
            self.level.eq(behind + self.r_rdy),
            writes.eq(self.w_rdy & self.w_en),
            fills.eq(~ahead & behind.any()),
            advances.eq(behind.any() & (~self.r_rdy | self.r_en)),
            *(write.addr.eq(produce), write.data.eq(self.w_data), write.en.eq(writes)),
            read.addr.eq(fetch),
            self.r_data.eq(Mux(turn, slots[1], slots[0])),
        ]
        m.d.sync += [
            behind.eq(behind + writes - advances),
            turn.eq(turn ^ advances),
            ahead.eq((ahead | fills) & ~advances),
        ]
        with m.If(writes):
            m.d.sync += produce.eq(following(produce))
        with m.If(fills):
            m.d.sync += fetch.eq(following(fetch))
        for n, slot in enumerate(slots):
            with m.If(fills & (turn != n)):
                m.d.sync += slot.eq(read.data)
        with m.If(advances):
            m.d.sync += self.r_rdy.eq(1)
        with m.Elif(self.r_en):
            m.d.sync += self.r_rdy.eq(0)
        return m
