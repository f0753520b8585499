"""The issue stage: takes an instruction, fetches its operands, sends one beat per cycle into the pipeline."""

from amaranth.hdl import Array, Cat, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from lockstep_isa.instructions import (
    VECTOR,
    Destination,
    FirstAdd,
    FirstMultiply,
    Function,
    Maximum,
    SecondAdd,
    SecondMultiply,
    Source,
    ThirdMultiply,
)

from ..interfaces import ADDRESS_BITS, AccumulatorPort, ReadPort, instruction_layout, instruction_stream
from .timing import CONTINUE_PROLOGUE, PARTIALS, row_pause


class Issue(wiring.Component):
    """Row tiles, columns and sub-beats of a pass in order, with the words that they need.

        ACCEPT -> START -> FETCH <-> ISSUE -> DRAIN -> ACCEPT

    FETCH is the prologue of a row tile: one PARAMETER word per cycle (lane words, where the maximum continues, the
    words of the first ``rows`` columns). ISSUE sends beats; the words of the next ``rows`` columns arrive meanwhile,
    but where x comes from PARAMETER too, ISSUE goes back to FETCH for them. Where x and y both come from VECTOR, a
    column starts with a cycle that reads y. ISSUE waits

    - while the accumulator tile is not complete (``stalled``),
    - with column min(64, columns - 1) until the adders are through with the sums of the row before,
    - with the last column of a transposed group until the group before it is written.

    Ports
    -----
    instruction : In(stream). ``done`` : Out(1), once ``drained`` In(1) says that everything is written.
    fields : Out(instruction layout), held still from ``begin`` Out(1) to ``done``.
    accumulator, vector_read, parameter_read : Out, see lockstep_rtl.interfaces.
    beat, first, last : Out(1), ``sub`` : Out, a beat, of the first or last column of a row tile, of which lanes.
    x, y, lane0, lane1 : Out(32 * lanes), words of the beat before. ``column0`` to ``column2`` : Out(32), of the beat
    before that.
    continue_valid : Out(1), ``parameter_read.data`` is the word from which the next row's maximum continues.
    """

    def __init__(self, config) -> None:
        self.config = config
        word = 32 * config.rows
        taken = 32 * config.lanes
        super().__init__(
            {
                "instruction": In(instruction_stream(VECTOR)),
                "done": Out(1),
                "stalled": Out(1),
                "drained": In(1),
                "fields": Out(instruction_layout(VECTOR)),
                "begin": Out(1),
                "accumulator": Out(AccumulatorPort(config)),
                "vector_read": Out(ReadPort(word)),
                "parameter_read": Out(ReadPort(word)),
                "beat": Out(1),
                "first": Out(1),
                "last": Out(1),
                "sub": Out(range(config.subwords)),
                "x": Out(taken),
                "y": Out(taken),
                "lane0": Out(taken),
                "lane1": Out(taken),
                "column0": Out(32),
                "column1": Out(32),
                "column2": Out(32),
                "continue_valid": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config, i = self.config, self.fields
        rows, subwords = config.rows, config.subwords
        group_bits = (rows - 1).bit_length()
        word = 32 * rows

        # What the instruction uses.
        column0 = (i.mul1 == FirstMultiply.COLUMN0) | (i.mul2 == SecondMultiply.COLUMN0)
        column_needs = Cat(column0, i.add2 == SecondAdd.COLUMN1, i.mul3 == ThirdMultiply.COLUMN2)
        lane0 = (i.add1 == FirstAdd.LANE0) | (i.mul2 == SecondMultiply.LANE0) | (i.function == Function.EXP2)
        resume = (i.maximum != Maximum.NONE) & i.max_continue
        row_needs = Cat(column_needs, lane0, i.mul1 == FirstMultiply.LANE1, resume)
        uses_y = (i.add1 == FirstAdd.Y) | (i.mul3 == ThirdMultiply.Y)
        from_vector = i.source == Source.VECTOR
        from_parameter = i.source == Source.PARAMETER
        from_accumulator = i.source == Source.ACCUMULATOR
        shares = uses_y & from_vector
        transposed = i.destination == Destination.WEIGHT_TRANSPOSED
        own_words = (i.destination == Destination.PARAMETER) & (i.sum | (i.maximum != Maximum.NONE))
        least_prologue = Mux(resume, CONTINUE_PROLOGUE, Mux(own_words, 2, 1))

        # Where the pass is.
        tile, column = Signal(16), Signal(16)
        sub = Signal(range(subwords))
        read_y = Signal()  # this cycle reads y for the column
        x_row, x_address = Signal(ADDRESS_BITS), Signal(ADDRESS_BITS)
        y_row, y_address = Signal(ADDRESS_BITS), Signal(ADDRESS_BITS)
        last_column, group_ends, ends = Signal(), Signal(), Signal()
        m.d.comb += [
            last_column.eq(column == (i.columns - 1)[:16]),
            group_ends.eq(column[:group_bits].all()),
            ends.eq(sub == subwords - 1),
        ]

        # Fetching PARAMETER words, the lowest needed first.
        needed = Signal(6)
        group = Signal(ADDRESS_BITS)  # of the columns whose words are fetched
        least = Signal(range(CONTINUE_PROLOGUE))  # further cycles that the prologue must take
        fetching, one_left = Signal(), Signal()
        choice = Signal(6)
        bases = (i.column0, i.column1, i.column2, i.lane0, i.lane1, i.max_to)
        fetch_address = Signal(ADDRESS_BITS)
        m.d.comb += [choice.eq(needed & (~needed + 1)[:6]), one_left.eq((needed & ~choice) == 0)]
        for kind, base in enumerate(bases):
            with m.If(choice[kind]):
                m.d.comb += fetch_address.eq(base + (group if kind < 3 else tile))
        fetched, fetched_parity = Signal(6), Signal()
        m.d.sync += fetched.eq(Mux(fetching, choice, 0))
        with m.If(fetching):
            m.d.sync += [needed.eq(needed & ~choice), fetched_parity.eq(group[0])]
        lane_words = [Signal(word, name=f"lane{k}_word") for k in range(2)]
        column_words = [[Signal(word, name=f"column{k}_word{p}") for p in range(2)] for k in range(3)]
        for kind in range(3):
            for parity in range(2):
                with m.If(fetched[kind] & (fetched_parity == parity)):
                    m.d.sync += column_words[kind][parity].eq(self.parameter_read.data)
        for k in range(2):
            with m.If(fetched[3 + k]):
                m.d.sync += lane_words[k].eq(self.parameter_read.data)
        m.d.comb += self.continue_valid.eq(fetched[5])

        # Pacing: cycles since the last beat of the row before, and of the transposed group before.
        pauses = Array(row_pause(n, subwords) for n in (1, 2, 4, 8, 16, 32, 64))
        levels = Signal(range(7))
        for level in range(6):
            with m.If(i.columns > 1 << level):
                m.d.comb += levels.eq(level + 1)
        since_row = Signal(range(row_pause(PARTIALS, subwords) + 1))
        since_group = Signal(range(rows + 1))
        paced_column = Mux(i.columns > PARTIALS, column == PARTIALS, last_column)
        sum_waits = i.sum & tile.any() & paced_column & (since_row < pauses[levels])
        group_waits = transposed & (group_ends | last_column) & (since_group < rows)
        with m.If(since_row != row_pause(PARTIALS, subwords)):
            m.d.sync += since_row.eq(since_row + 1)
        with m.If(since_group != rows):
            m.d.sync += since_group.eq(since_group + 1)

        late = Signal()  # the words of the group that has begun are still being fetched
        no_tile = from_accumulator & ~self.accumulator.available
        go, y_alone = Signal(), Signal()  # y_alone: a cycle of the issue that only reads y
        m.d.comb += go.eq(~no_tile & ~sum_waits & ~group_waits & ~late)

        with m.FSM():
            with m.State("ACCEPT"):
                m.d.comb += self.instruction.ready.eq(1)
                with m.If(self.instruction.valid):
                    m.d.sync += i.eq(self.instruction.payload)
                    m.next = "START"
            with m.State("START"):
                m.d.comb += self.begin.eq(1)
                m.d.sync += [
                    *(tile.eq(0), column.eq(0), sub.eq(0), group.eq(0), late.eq(0), read_y.eq(shares)),
                    *(x_row.eq(i.x), x_address.eq(i.x), y_row.eq(i.y), y_address.eq(i.y)),
                    *(needed.eq(row_needs), least.eq(least_prologue - 1)),
                ]
                m.next = "FETCH"
            with m.State("FETCH"):
                m.d.comb += fetching.eq(needed.any())
                with m.If(least.any()):
                    m.d.sync += least.eq(least - 1)
                with m.If(one_left & (least == 0)):
                    with m.If(~from_parameter):
                        m.d.sync += [needed.eq(column_needs), group.eq(group + 1)]
                    m.next = "ISSUE"
            with m.State("ISSUE"):
                m.d.comb += [
                    self.stalled.eq(no_tile),
                    fetching.eq(needed.any()),
                    self.beat.eq(go & ~read_y),
                    y_alone.eq(go & read_y),
                ]
                with m.If(late & one_left):
                    m.d.sync += [late.eq(0), needed.eq(column_needs), group.eq(group + 1)]
                with m.If(y_alone):
                    m.d.sync += [read_y.eq(0), y_address.eq(y_address + 1)]
                with m.If(self.beat):
                    m.d.sync += sub.eq(sub + 1)
                    with m.If(ends):
                        m.d.sync += [
                            *(sub.eq(0), column.eq(column + 1), read_y.eq(shares), x_address.eq(x_address + 1)),
                        ]
                        with m.If(~shares):
                            m.d.sync += y_address.eq(y_address + 1)
                        with m.If(group_ends | last_column):
                            m.d.sync += since_group.eq(1)
                        with m.If(last_column):
                            m.d.sync += since_row.eq(1)
                            m.d.sync += [
                                *(tile.eq(tile + 1), column.eq(0), group.eq(0), late.eq(0)),
                                *(x_row.eq(x_row + i.x_stride), x_address.eq(x_row + i.x_stride)),
                                *(y_row.eq(y_row + i.y_stride), y_address.eq(y_row + i.y_stride)),
                                *(needed.eq(row_needs), least.eq(least_prologue - 1)),
                            ]
                            m.next = "FETCH"
                            with m.If(tile == (i.tiles - 1)[:16]):
                                m.next = "DRAIN"
                        with m.Elif(group_ends & column_needs.any()):
                            with m.If(from_parameter):
                                m.d.sync += [needed.eq(column_needs), group.eq(group + 1)]
                                m.next = "FETCH"
                            with m.Elif(one_left):
                                m.d.sync += [needed.eq(column_needs), group.eq(group + 1)]
                            with m.Else():
                                m.d.sync += late.eq(1)
            with m.State("DRAIN"), m.If(self.drained):
                m.d.comb += self.done.eq(1)
                m.next = "ACCEPT"

        # Stage 0: reads.
        m.d.comb += [
            self.first.eq(column == 0),
            self.last.eq(last_column),
            self.sub.eq(sub),
            self.accumulator.enable.eq(self.beat & from_accumulator),
            self.accumulator.column.eq(column[:group_bits]),
            self.accumulator.pop.eq(self.beat & from_accumulator & ends & (group_ends | last_column)),
            self.vector_read.enable.eq((self.beat & from_vector) | y_alone | (self.beat & uses_y & ~shares)),
            self.vector_read.address.eq(Mux(from_vector & ~(shares & read_y), x_address, y_address)),
            self.parameter_read.enable.eq(fetching | (self.beat & from_parameter)),
            self.parameter_read.address.eq(Mux(fetching, fetch_address, x_address)),
        ]

        # Stage 1: the answers, and the lanes' part of them.
        sub1 = Signal(range(subwords))
        beat1, read_y1 = Signal(), Signal()
        column1, parity1 = Signal(group_bits), Signal()
        held_y = Signal(word)
        m.d.sync += [beat1.eq(self.beat), read_y1.eq(shares & self.vector_read.enable & read_y)]
        with m.If(self.beat):
            m.d.sync += [sub1.eq(sub), column1.eq(column), parity1.eq(column[group_bits])]
        with m.If(read_y1):
            m.d.sync += held_y.eq(self.vector_read.data)
        x = Signal(word)
        with m.Switch(i.source):
            with m.Case(Source.ACCUMULATOR):
                m.d.comb += x.eq(self.accumulator.data)
            with m.Case(Source.VECTOR):
                m.d.comb += x.eq(self.vector_read.data)
            with m.Default():
                m.d.comb += x.eq(self.parameter_read.data)
        y = Mux(shares, held_y, self.vector_read.data)
        taken = 32 * config.lanes
        m.d.comb += [
            self.x.eq(x.word_select(sub1, taken)),
            self.y.eq(y.word_select(sub1, taken)),
            self.lane0.eq(lane_words[0].word_select(sub1, taken)),
            self.lane1.eq(lane_words[1].word_select(sub1, taken)),
        ]
        for kind, port in enumerate((self.column0, self.column1, self.column2)):
            chosen = Mux(parity1, column_words[kind][1], column_words[kind][0])
            with m.If(beat1 & column_needs[kind]):
                m.d.sync += port.eq(chosen.word_select(column1, 32))
        return m
