"""Where maxima begin and end in a row tile: with the row, or with each section of its columns."""

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from lockstep_isa.instructions import SECTIONS, VECTOR

from ..interfaces import instruction_layout

#: Bits of a column's place in the longest section.
SECTION_BITS = (max(SECTIONS) - 1).bit_length()


class Sections(wiring.Component):
    """Finds the first and the last beat of each maximum, from counters that know them a beat ahead.

    Ports
    -----
    fields : In(instruction layout), held still; ``begin`` : In(1), one cycle before a pass.
    valid : In(columns_per_beat), bit c: column c of a beat is there, ``row_first``, ``row_last`` : In(1), ``sub`` : In,
        the beat is the row's first or last one, of which lanes.
    first : Out(1), in the same cycle: a maximum begins with the beat. ``compared_first`` : Out(1), a cycle later.
    last : Out(1), two cycles later: a maximum ends with it. ``paired`` : Out(1), then: it has a second column.
    """

    def __init__(self, config) -> None:
        self.config = config
        super().__init__(
            {
                "fields": In(instruction_layout(VECTOR, config)),
                "begin": In(1),
                "valid": In(config.columns_per_beat),
                "row_first": In(1),
                "row_last": In(1),
                "sub": In(range(config.subwords)),
                "first": Out(1),
                "compared_first": Out(1),
                "last": Out(1),
                "paired": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        side_bits = self.config.columns_per_beat - 1

        # Cycle 0. Of the beat that comes here next: its place in the row, and what that makes of it.
        here, following = Signal(SECTION_BITS - side_bits), Signal(SECTION_BITS - side_bits)
        there, rest = Signal(), Signal.like(here)  # whether there are sections; beats of one behind its first
        begins, ends = Signal(), Signal()
        m.d.comb += following.eq(Mux(self.row_last, 0, here + 1))
        with m.If(self.begin):
            m.d.sync += [
                there.eq(self.fields.max_columns.any()),
                rest.eq((self.fields.max_columns - 1)[side_bits:SECTION_BITS]),
                *(here.eq(0), begins.eq(0), ends.eq(0)),
            ]
        with m.Elif(self.valid[0] & (self.sub == self.config.subwords - 1)):
            m.d.sync += [
                here.eq(following),
                begins.eq(there & ((following & rest) == 0)),
                ends.eq(there & ((following & rest) == rest)),
            ]
        m.d.comb += self.first.eq(self.row_first | begins)

        # Cycles 1 and 2.
        last, second = Signal(), Signal()
        m.d.sync += [
            self.compared_first.eq(self.valid[0] & self.first),
            *(last.eq(self.row_last | ends), second.eq(self.valid[-1])),
            self.last.eq(last),
        ]
        with m.If(self.compared_first):
            m.d.sync += self.paired.eq(second)
        return m
