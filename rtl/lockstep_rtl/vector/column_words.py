"""Where the issue stage keeps the PARAMETER words of columns."""

from amaranth.hdl import C, Cat, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out


class ColumnWords(wiring.Component):
    """The words of two groups of columns, one PARAMETER word each, written a beat's columns a cycle.

    Beats of a group are a power of two.

    The first columns of a word are there in the cycle behind ``loads``, the next ones a cycle later, and so on:
    beats, one a cycle at most, find theirs.

    Ports
    -----
    requests : In(1), a word is asked for in this cycle; ``fills`` : Out(1), asking now would be too early.
    loads : In(1), ``word`` In(beats * width) is there, of a group of that ``parity`` In(1).
    address : In, beat of the group and, above it, parity; ``data`` : Out(width), its columns, in the same cycle.
    """

    def __init__(self, beats: int, width: int) -> None:
        self.beats, self.width = beats, width
        super().__init__(
            {
                "requests": In(1),
                "fills": Out(1),
                "loads": In(1),
                "word": In(beats * width),
                "parity": In(1),
                "address": In(range(2 * beats)),
                "data": Out(width),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.storage = storage = Memory(shape=self.width, depth=2 * self.beats, init=[])
        write, read = storage.write_port(), storage.read_port(domain="comb")
        # The columns that are written next, 0 behind the last: those of beat 0 come with the word itself.
        wait, place, parity = Signal(range(self.beats)), Signal(range(self.beats)), Signal()
        rest = Signal((self.beats - 1) * self.width)
        m.d.comb += [
            self.fills.eq(wait.any()),
            write.en.eq(self.loads | place.any()),
            write.data.eq(Mux(self.loads, self.word[: self.width], rest[: self.width])),
            write.addr.eq(Mux(self.loads, Cat(C(0, len(place)), self.parity), Cat(place, parity))),
            *(read.addr.eq(self.address), self.data.eq(read.data)),
        ]
        with m.If(self.requests):
            m.d.sync += wait.eq(self.beats - 1)
        with m.Elif(self.fills):
            m.d.sync += wait.eq(wait - 1)
        with m.If(self.loads):
            m.d.sync += [rest.eq(self.word[self.width :]), parity.eq(self.parity), place.eq(1)]
        with m.Elif(place.any()):
            m.d.sync += [rest.eq(rest[self.width :]), place.eq(place + 1)]
        return m
