"""The issue stage: takes an instruction, fetches its operands, sends one beat per cycle into the pipeline."""

from amaranth.hdl import Array, Cat, Module, Mux, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from lockstep_isa.instructions import (
    VECTOR,
    Destination,
    FirstAdd,
    FirstMultiply,
    Function,
    Mask,
    Maximum,
    SecondAdd,
    SecondMultiply,
    Source,
    ThirdMultiply,
)

from ..interfaces import ADDRESS_BITS, AccumulatorPort, ReadPort, instruction_layout, instruction_stream
from .column_words import ColumnWords
from .sections import SECTION_BITS
from .timing import CONTINUE_PROLOGUE, PARTIALS, row_pause

#: Bits of the distance from a row's position to a column: of ``first_row``, less up to 65,535 tiles of 64 rows.
DISTANCE_BITS = 24


class Issue(wiring.Component):
    """Row tiles, beats and sub-beats of a pass in order, with the words that they need.

        ACCEPT -> START -> FETCH <-> ISSUE -> DRAIN -> ACCEPT

    FETCH is the prologue of a row tile: one PARAMETER word per cycle (lane words, where the maximum continues, the
    words of the first ``rows`` columns). ISSUE sends beats; the words of the next ``rows`` columns arrive meanwhile,
    but where x comes from PARAMETER too, ISSUE goes back to FETCH for them. Where maxima of sections continue, the word
    of each is fetched in the cycle behind its first beat, in front of all others. Where x and y both come from VECTOR,
    a beat starts with a cycle that reads y. A beat is one column, or two side by side, of which the row's last beat
    may lack the second one. ISSUE waits

    - while the accumulator tile is not complete (``stalled``),
    - with column min(64, columns - 1) until the adders are through with the sums of the row before,
    - with the last column of a transposed group until the group before it is written.

    What is issued in one cycle is requested from the memories in the next one, out of registers.

    Ports
    -----
    instruction : In(stream). ``done`` : Out(1), once ``drained`` In(1) says that everything is written.
    fields : Out(instruction layout), held still from ``begin`` Out(1) to ``done``.
    accumulator, vector_read, parameter_read : Out, see lockstep_rtl.interfaces.
    beat : Out(columns_per_beat), bit c: a beat, its column c is there. ``first``, ``last`` : Out(1), ``sub`` : Out, it
        is the first or last one of a row tile, of which lanes; in the cycle of its requests.
    x, y, lane0, lane1 : Out(32 * lanes), words of the beat before. ``column0`` to ``column2`` :
        Out(32 * columns_per_beat), and ``hidden`` : Out(lanes), which lanes the mask hides, of the beat before that.
    continue_valid : Out(1), ``parameter_read.data`` is the word from which the next row's or section's maximum
        continues.
    """

    def __init__(self, config) -> None:
        self.config = config
        word, side = 32 * config.rows, config.columns_per_beat
        taken = 32 * config.lanes
        super().__init__(
            {
                "instruction": In(instruction_stream(VECTOR, config)),
                "done": Out(1),
                "stalled": Out(1),
                "drained": In(1),
                "fields": Out(instruction_layout(VECTOR, config)),
                "begin": Out(1),
                "accumulator": Out(AccumulatorPort(config)),
                "vector_read": Out(ReadPort(word, side)),
                "parameter_read": Out(ReadPort(word, side)),
                "beat": Out(side),
                "first": Out(1),
                "last": Out(1),
                "sub": Out(range(config.subwords)),
                "x": Out(taken),
                "y": Out(taken),
                "lane0": Out(taken),
                "lane1": Out(taken),
                "column0": Out(32 * side),
                "column1": Out(32 * side),
                "column2": Out(32 * side),
                "hidden": Out(config.lanes),
                "continue_valid": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config, i, n = self.config, self.fields, self.instruction.payload
        rows, subwords, side = config.rows, config.subwords, config.columns_per_beat
        side_bits = side - 1
        # Beats of a group, and of a row before partial sums are added to.
        group, partials = rows // side, PARTIALS // side
        group_bits = (group - 1).bit_length()
        word, taken = 32 * rows, 32 * config.lanes

        # What the instruction uses, worked out when it is taken.
        with_column0 = (n.mul1 == FirstMultiply.COLUMN0) | (n.mul2 == SecondMultiply.COLUMN0)
        with_lane0 = (n.add1 == FirstAdd.LANE0) | (n.mul2 == SecondMultiply.LANE0) | (n.function == Function.EXP2)
        resume = (n.maximum != Maximum.NONE) & n.max_continue
        with_y = (n.add1 == FirstAdd.Y) | (n.add2 == SecondAdd.Y) | (n.mul3 == ThirdMultiply.Y)
        own_words = (n.destination == Destination.PARAMETER) & (n.sum | (n.maximum != Maximum.NONE))
        row_needs, uses_y, shares = Signal(6), Signal(), Signal()
        column_needs = row_needs[:3]
        from_vector, from_parameter, from_accumulator, transposed = Signal(), Signal(), Signal(), Signal()
        least_prologue = Signal(range(CONTINUE_PROLOGUE))  # beyond the first cycle
        # The last beat of a row, and whether it has all its columns.
        final_beat, final_full, final_tile = Signal(16), Signal(), Signal(16)
        beyond_partials = Signal()
        with m.If(self.instruction.valid & self.instruction.ready):
            m.d.sync += [
                i.eq(n),
                row_needs[0].eq(with_column0),
                row_needs[1].eq(n.add2 == SecondAdd.COLUMN1),
                row_needs[2].eq(n.mul3 == ThirdMultiply.COLUMN2),
                row_needs[3].eq(with_lane0),
                row_needs[4].eq(n.mul1 == FirstMultiply.LANE1),
                row_needs[5].eq(resume),
                uses_y.eq(with_y),
                shares.eq(with_y & (n.source == Source.VECTOR)),
                from_vector.eq(n.source == Source.VECTOR),
                from_parameter.eq((n.source == Source.PARAMETER) | (n.source == Source.INTEGER)),
                from_accumulator.eq(n.source == Source.ACCUMULATOR),
                transposed.eq(
                    (n.destination == Destination.WEIGHT_TRANSPOSED) | (n.destination == Destination.BYTES_TRANSPOSED)
                ),
                least_prologue.eq(Mux(resume, CONTINUE_PROLOGUE - 1, own_words)),
                final_beat.eq((n.columns - 1)[side_bits:16]),
                final_full.eq((n.columns - 1)[0] if side_bits else 1),
                final_tile.eq(n.tiles - 1),
                beyond_partials.eq(n.columns > PARTIALS),
            ]
            if config.selection:
                m.d.sync += row_needs[5].eq(resume & ~n.max_columns.any())

        # Where the pass is.
        tile, beat = Signal(16), Signal(16)
        sub = Signal(range(subwords))
        read_y = Signal()  # this cycle reads y for the column
        x_row, x_address = Signal(ADDRESS_BITS), Signal(ADDRESS_BITS)
        y_row, y_address = Signal(ADDRESS_BITS), Signal(ADDRESS_BITS)
        # Of ``beat``, worked out one beat ahead: every decision of a cycle begins with them.
        last_beat, group_ends, pauses_here = Signal(), Signal(), Signal()
        ends = Signal()
        m.d.comb += ends.eq(sub == subwords - 1)

        # The mask: lane r of this beat's first column is hidden where r < ahead, or where r >= ahead + window.
        ahead, row_ahead = Signal(signed(DISTANCE_BITS)), Signal(signed(DISTANCE_BITS))
        masked, windowed = Signal(), Signal()
        m.d.sync += [masked.eq(i.mask == Mask.CAUSAL), windowed.eq(i.window.any())]

        # Fetching PARAMETER words, the lowest needed first.
        needed = Signal(6)
        fetch_group = Signal(ADDRESS_BITS)  # of the columns whose words are fetched
        least = Signal(range(CONTINUE_PROLOGUE))  # further cycles that the prologue must take
        fetching, one_left = Signal(), Signal()
        choice = Signal(6)
        # What the next group of columns needs: nothing behind the row's last group, whose words may end the memory.
        next_needs = Signal(3)
        m.d.comb += next_needs.eq(Mux(fetch_group == final_beat[group_bits:], 0, column_needs))
        bases = (i.column0, i.column1, i.column2, i.lane0, i.lane1, i.max_to)
        fetch_address = Signal(ADDRESS_BITS)
        able = Signal(6)  # needed, and there is room for it
        lowest, fetches, section_wanted = able & (~able + 1)[:6], fetching, Signal()
        if config.selection:
            lowest, fetches = Mux(section_wanted, 1 << 5, lowest), fetching | section_wanted
        m.d.comb += [choice.eq(lowest), one_left.eq((needed & ~choice) == 0)]
        for kind, base in enumerate(bases):
            with m.If(choice[kind]):
                m.d.comb += fetch_address.eq(base + (fetch_group if kind < 3 else tile))
        if config.selection:
            next_maximum = self._next_maximum(m, fetches & choice[5])
            with m.If(choice[5]):
                m.d.comb += fetch_address.eq(next_maximum)
        requested, requested_parity = Signal(6), Signal()
        fetched, fetched_parity = Signal(6), Signal()
        m.d.sync += [
            *(requested.eq(Mux(fetches, choice, 0)), requested_parity.eq(fetch_group[0])),
            *(fetched.eq(requested), fetched_parity.eq(requested_parity)),
        ]
        with m.If(fetching):
            m.d.sync += needed.eq(needed & ~choice)
        lane_words = [Signal(word, name=f"lane{k}_word") for k in range(2)]
        for k in range(2):
            with m.If(fetched[3 + k]):
                m.d.sync += lane_words[k].eq(self.parameter_read.data)
        # Long wires from PARAMETER end at one register for each kind of column word.
        fetched_columns = [ColumnWords(group, 32 * side) for _ in range(3)]
        for kind, columns in enumerate(fetched_columns):
            m.submodules[f"columns{kind}"] = columns
            m.d.comb += [
                columns.requests.eq(fetching & choice[kind]),
                columns.loads.eq(fetched[kind]),
                columns.word.eq(self.parameter_read.data),
                columns.parity.eq(fetched_parity),
            ]
        m.d.comb += self.continue_valid.eq(fetched[5])

        # Pacing: cycles still to wait behind the row before, and behind the transposed group before.
        pauses = Array(row_pause(config, columns) - 1 for columns in (1, 2, 4, 8, 16, 32, 64))
        levels = Signal(range(7))
        for level in range(6):
            with m.If(i.columns > 1 << level):
                m.d.comb += levels.eq(level + 1)
        pause = Signal(range(row_pause(config, PARTIALS)))
        m.d.sync += pause.eq(pauses[levels])
        row_wait, group_wait = Signal.like(pause), Signal(range(max(2, group)))
        row_waits, group_waits = Signal(), Signal()  # the counts are not zero
        with m.If(row_waits):
            m.d.sync += [row_wait.eq(row_wait - 1), row_waits.eq(row_wait != 1)]
        with m.If(group_waits):
            m.d.sync += [group_wait.eq(group_wait - 1), group_waits.eq(group_wait != 1)]
        sum_stops = i.sum & Mux(beyond_partials, pauses_here, last_beat) & row_waits
        group_stops = transposed & (group_ends | last_beat) & group_waits

        late = Signal()  # the words of the group that has begun are still being fetched
        no_tile = from_accumulator & ~self.accumulator.available
        go = Signal()
        issues, y_alone = Signal(), Signal()  # a beat, or a cycle that only reads y
        m.d.comb += go.eq(~no_tile & ~sum_stops & ~group_stops & ~late)

        with m.FSM() as states:
            issuing = states.ongoing("ISSUE")
            with m.State("ACCEPT"):
                m.d.comb += self.instruction.ready.eq(1)
                with m.If(self.instruction.valid):
                    m.next = "START"
            with m.State("START"):
                m.d.comb += self.begin.eq(1)
                m.d.sync += [
                    *(tile.eq(0), beat.eq(0), sub.eq(0), fetch_group.eq(0), late.eq(0), read_y.eq(shares)),
                    *(x_row.eq(i.x), x_address.eq(i.x), y_row.eq(i.y), y_address.eq(i.y)),
                    *(last_beat.eq(final_beat == 0), group_ends.eq(group == 1), pauses_here.eq(0)),
                    *(needed.eq(row_needs), least.eq(least_prologue), row_waits.eq(0), group_waits.eq(0)),
                    *(row_ahead.eq(-i.first_row.as_signed()), ahead.eq(-i.first_row.as_signed())),
                ]
                m.next = "FETCH"
            with m.State("FETCH"):
                m.d.comb += [able.eq(needed), fetching.eq(needed.any())]
                with m.If(least.any()):
                    m.d.sync += least.eq(least - 1)
                with m.If(one_left & (least == 0)):
                    with m.If(~from_parameter):
                        m.d.sync += [needed.eq(next_needs), fetch_group.eq(fetch_group + 1)]
                    m.next = "ISSUE"
            with m.State("ISSUE"):
                m.d.comb += [
                    self.stalled.eq(no_tile),
                    able.eq(needed & ~Cat(columns.fills for columns in fetched_columns)),
                    fetching.eq(able.any()),
                    issues.eq(go & ~read_y),
                    y_alone.eq(go & read_y),
                ]
                with m.If(late & one_left):
                    m.d.sync += [late.eq(0), needed.eq(next_needs), fetch_group.eq(fetch_group + 1)]
                with m.If(y_alone):
                    m.d.sync += [read_y.eq(0), y_address.eq(y_address + side)]
                with m.If(issues):
                    m.d.sync += sub.eq(sub + 1)
                    with m.If(ends):
                        m.d.sync += [
                            *(sub.eq(0), beat.eq(beat + 1), read_y.eq(shares), x_address.eq(x_address + side)),
                            last_beat.eq(beat + 1 == final_beat),
                            group_ends.eq((beat + 1)[:group_bits] == group - 1),
                            pauses_here.eq(beat == partials - 1),
                            ahead.eq(ahead + side),
                        ]
                        with m.If(~shares):
                            m.d.sync += y_address.eq(y_address + side)
                        with m.If(group_ends | last_beat):
                            m.d.sync += [group_wait.eq(group - 1), group_waits.eq(group > 1)]
                        with m.If(last_beat):
                            m.d.sync += [
                                *(row_wait.eq(pause), row_waits.eq(1)),
                                *(tile.eq(tile + 1), beat.eq(0), fetch_group.eq(0), late.eq(0)),
                                *(last_beat.eq(final_beat == 0), group_ends.eq(group == 1), pauses_here.eq(0)),
                                *(x_row.eq(x_row + i.x_stride), x_address.eq(x_row + i.x_stride)),
                                *(y_row.eq(y_row + i.y_stride), y_address.eq(y_row + i.y_stride)),
                                *(needed.eq(row_needs), least.eq(least_prologue)),
                                *(row_ahead.eq(row_ahead - rows), ahead.eq(row_ahead - rows)),
                            ]
                            m.next = "FETCH"
                            with m.If(tile == final_tile):
                                m.next = "DRAIN"
                        with m.Elif(group_ends & column_needs.any()):
                            with m.If(from_parameter):
                                m.d.sync += [needed.eq(next_needs), fetch_group.eq(fetch_group + 1)]
                                m.next = "FETCH"
                            with m.Elif(one_left):
                                m.d.sync += [needed.eq(next_needs), fetch_group.eq(fetch_group + 1)]
                            with m.Else():
                                m.d.sync += late.eq(1)
            with m.State("DRAIN"), m.If(self.drained):
                m.d.comb += self.done.eq(1)
                m.next = "ACCEPT"

        if config.selection:
            m.d.sync += section_wanted.eq(self._section_begins(m, issues & ends, last_beat, beat) & issues & (sub == 0))

        # What is issued now is in stage 0 in the next cycle. The accumulators need no address: they are read now, and
        # a tile that is through is given back at once.
        issued_beat = Signal(group_bits + 1)
        reads_y = Signal()
        there = Cat(1, final_full | ~last_beat)[:side]  # which columns of the beat
        m.d.comb += [
            # Also where the beat has to wait: it reads again, and hundreds of registers do not hang on that.
            self.accumulator.enable.eq(issuing & from_accumulator & self.accumulator.available),
            self.accumulator.column.eq(beat[:group_bits] << side_bits),
            self.accumulator.pop.eq(issues & from_accumulator & ends & (group_ends | last_beat)),
        ]
        m.d.sync += [
            *(self.beat.eq(Mux(issues, there, 0)), self.first.eq(beat == 0), self.last.eq(last_beat), self.sub.eq(sub)),
            *(issued_beat.eq(beat), reads_y.eq(y_alone)),
            self.vector_read.enable.eq(Mux(y_alone | (issues & (from_vector | uses_y)), there, 0)),
            self.vector_read.address.eq(Mux(from_vector & ~read_y, x_address, y_address)),
            self.parameter_read.enable.eq(Mux(fetches, 1, Mux(issues & from_parameter, there, 0))),
            self.parameter_read.address.eq(Mux(fetches, fetch_address, x_address)),
        ]

        # Stages 0 and 1: the mask. The first lane of the beat that is not hidden, and the first one behind it that is.
        issued_ahead = Signal.like(ahead)
        seen = [Signal(range(rows + 1), name=f"seen{c}") for c in range(side)]
        unseen = [Signal(range(rows + 1), name=f"unseen{c}") for c in range(side)]

        def clamped(value):
            return Mux(value < 0, 0, Mux(value > rows, rows, value))

        with m.If(issues & masked):
            m.d.sync += issued_ahead.eq(ahead)
        with m.If(self.beat[0] & masked):
            for c in range(side):
                m.d.sync += [
                    seen[c].eq(clamped(issued_ahead + c)),
                    unseen[c].eq(Mux(windowed, clamped(issued_ahead + i.window + c), rows)),
                ]

        # Stage 0: reads. The lanes' part of the accumulators' answer waits for the others.
        accumulator_read = Signal()
        accumulated = Signal(taken)
        m.d.sync += accumulator_read.eq(self.accumulator.enable)
        with m.If(accumulator_read):
            m.d.sync += accumulated.eq(self.accumulator.data.word_select(self.sub, taken))

        # Stage 1: the answers, and the lanes' part of them.
        sub1 = Signal(range(subwords))
        beat1, reads_y1 = Signal(), Signal()
        in_group1, parity1 = Signal(group_bits), Signal()
        held_y = Signal(word * side)
        m.d.sync += [beat1.eq(self.beat[0]), reads_y1.eq(reads_y)]
        with m.If(self.beat[0]):
            m.d.sync += [sub1.eq(self.sub), in_group1.eq(issued_beat), parity1.eq(issued_beat[group_bits])]
        with m.If(reads_y1):
            m.d.sync += held_y.eq(self.vector_read.data)
        y = Mux(shares, held_y, self.vector_read.data)
        m.d.comb += self.x.eq(self.parameter_read.data.word_select(sub1, taken))
        with m.If(from_accumulator):
            m.d.comb += self.x.eq(accumulated)
        with m.Elif(from_vector):
            m.d.comb += self.x.eq(self.vector_read.data.word_select(sub1, taken))
        m.d.comb += [
            self.y.eq(y.word_select(sub1, taken)),
            self.lane0.eq(lane_words[0].replicate(side).word_select(sub1, taken)),
            self.lane1.eq(lane_words[1].replicate(side).word_select(sub1, taken)),
        ]
        hidden = Signal(rows * side)
        m.d.comb += hidden.eq(Cat((seen[c] > r) | (unseen[c] <= r) for c in range(side) for r in range(rows)))
        with m.If(beat1 & masked):
            m.d.sync += self.hidden.eq(hidden.word_select(sub1, config.lanes))
        for kind, port in enumerate((self.column0, self.column1, self.column2)):
            m.d.comb += fetched_columns[kind].address.eq(Cat(in_group1, parity1))
            with m.If(beat1 & column_needs[kind]):
                m.d.sync += port.eq(fetched_columns[kind].data)
        return m

    def _next_maximum(self, m, fetched):
        """The word from which the next maximum of a pass continues: one after the other is ``fetched``."""
        word = Signal(ADDRESS_BITS, name="next_maximum")
        with m.If(self.begin):
            m.d.sync += word.eq(self.fields.max_to)
        with m.Elif(fetched):
            m.d.sync += word.eq(word + 1)
        return word

    def _section_begins(self, m, passes, last_beat, beat):
        """Whether a section begins with ``beat``, the next one, and its maximum continues; a beat ``passes``."""
        i, side_bits = self.fields, self.config.columns_per_beat - 1
        continues, begins = Signal(name="sections_continue"), Signal(name="section_begins")
        rest = Signal(SECTION_BITS - side_bits, name="section_rest")  # beats of a section behind its first one
        with m.If(self.begin):
            m.d.sync += [
                continues.eq((i.maximum != Maximum.NONE) & i.max_continue & i.max_columns.any()),
                rest.eq((i.max_columns - 1)[side_bits:SECTION_BITS]),
                begins.eq(1),
            ]
        with m.Elif(passes):
            m.d.sync += begins.eq(last_beat | (((beat + 1)[: len(rest)] & rest) == 0))
        return begins & continues
