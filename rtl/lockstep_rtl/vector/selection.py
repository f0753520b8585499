"""Which columns of a pass have the greatest values: their list, in ascending order."""

from amaranth.hdl import Cat, Module, Mux, Shape, Signal
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from lockstep_isa.instructions import INDEX_ENTRIES, VECTOR

from ..index_memory import IndexWrite
from ..interfaces import instruction_layout
from .timing import SELECT_DIGIT_BITS, SELECT_DIGITS, lane_levels

#: Bits of a count of columns.
COUNT_BITS = INDEX_ENTRIES.bit_length()
#: A column that is selected whatever it holds has this value, which no number has.
FORCED = (1 << 32) - 1


def order(bits):
    """The number of a fp32 value in the order of all values: NaN is 0, and -0 less than +0."""
    nan = bits[23:31].all() & bits[:23].any()
    return Mux(nan, 0, Mux(bits[31], ~bits, Cat(bits[:31], 1)))


def greatest(values):
    """Pairs of ``values`` become the greater one of each."""
    return [Mux(a > b, a, b) for a, b in zip(values[::2], values[1::2], strict=True)]


class Selection(wiring.Component):
    """Keeps one value for each column, finds the least of the ``select`` greatest ones, and lists the columns above it.

        COLLECT -> (SEARCH -> TURN) x 7 -> EMIT -> COLLECT

    A column's value is the greatest of the lanes that count. While columns come, their values go to a memory, and the
    first of 8 digits of 4 bits is counted: fifteen counters say for each digit whether ``needed`` values have at least
    that one. Each SEARCH reads all values, two a cycle, and counts the next digit of those whose digits before are the
    threshold's; what is then still needed are values that equal the threshold. EMIT reads the values one a cycle: those
    above the threshold are listed, and of equal ones the first.

    Ports
    -----
    fields : In(instruction layout), held still; ``begin`` : In(1), one cycle before a pass.
    valid : In(columns_per_beat), bit c: column c of a beat is there, ``last`` : In(1), ``sub`` : In, it is the row's
        last one, of which lanes, with ``result`` : In(32 * lanes).
    index : Out(IndexWrite), the list, one entry a cycle at most.
    beyond : Out(1), a pulse: there are more columns than INDEX_ENTRIES, or the list ends behind the index memory.
    idle : Out(1), no list is being made. ``selection_cycles`` in timing.py tells how long it takes.

    A pass without selection moves nothing here.
    """

    def __init__(self, config) -> None:
        self.config = config
        super().__init__(
            {
                "fields": In(instruction_layout(VECTOR, config)),
                "begin": In(1),
                "valid": In(config.columns_per_beat),
                "last": In(1),
                "sub": In(range(config.subwords)),
                "result": In(32 * config.lanes),
                "index": Out(IndexWrite()),
                "beyond": Out(1),
                "idle": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        i, side = self.fields, self.config.columns_per_beat
        columns = i.columns[:COUNT_BITS]
        selecting, busy, finished = Signal(), Signal(), Signal()
        m.d.comb += self.idle.eq(~busy)
        with m.If(self.begin):
            too_many = (i.columns > INDEX_ENTRIES) | (i.select_to + i.select > INDEX_ENTRIES)
            m.d.sync += [
                *(selecting.eq(i.select.any()), busy.eq(i.select.any())),
                self.beyond.eq(i.select.any() & too_many),
            ]
        with m.Elif(finished):
            m.d.sync += [selecting.eq(0), busy.eq(0)]
        with m.If(self.beyond):
            m.d.sync += self.beyond.eq(0)

        arrived, arrived_last, values = self._values(m, selecting)

        # Values go to their memory: two banks, of even and of odd columns.
        column = Signal(COUNT_BITS)
        collected = Signal(side)  # which of ``marked`` are there
        marked = []
        for c, value in enumerate(values):
            number = column + c
            forced = (number < i.select_first) | (number + i.select_last >= i.columns)
            marked.append(Mux(forced, FORCED, value))
        m.d.comb += collected.eq(arrived)
        with m.If(self.begin):
            m.d.sync += column.eq(0)
        with m.Elif(arrived[0]):
            m.d.sync += column.eq(column + side)
        banks = []
        for bank in range(2):
            m.submodules[f"bank{bank}"] = memory = Memory(shape=Shape(32), depth=INDEX_ENTRIES // 2, init=[])
            write, read = memory.write_port(), memory.read_port()
            here = arrived[bank] if side == 2 else arrived[0] & (column[0] == bank)
            m.d.comb += [
                write.en.eq(here),
                write.addr.eq(column[1:]),
                write.data.eq(marked[bank % side]),
            ]
            banks.append(read)

        # Cycle 0 of a pass over them: two, or one at a time, are asked for.
        position, searched = Signal(COUNT_BITS), Signal(range(SELECT_DIGITS))
        searching, emitting, final = Signal(), Signal(), Signal()
        following = Signal(COUNT_BITS + 1)
        m.d.comb += [following.eq(position + Mux(emitting, 1, 2)), final.eq(following >= columns)]
        with m.FSM():
            with m.State("COLLECT"), m.If(arrived[0] & arrived_last):
                m.d.sync += [position.eq(0), searched.eq(0)]
                m.next = "SEARCH"
            with m.State("SEARCH"):
                m.d.comb += searching.eq(1)
                m.d.sync += position.eq(following)
                with m.If(final):
                    m.next = "TURN"
            with m.State("TURN"):
                m.d.sync += [position.eq(0), searched.eq(searched + 1)]
                m.next = "SEARCH"
                with m.If(searched == SELECT_DIGITS - 2):
                    m.next = "EMIT"
            with m.State("EMIT"):
                m.d.comb += emitting.eq(1)
                m.d.sync += position.eq(following)
                with m.If(final):
                    m.next = "COLLECT"
        for read in banks:
            m.d.comb += [read.en.eq(searching | emitting), read.addr.eq(position[1:])]
        answers = Signal(2)  # which of the banks' answers are to be counted
        tested, tested_last, number = Signal(), Signal(), Signal(COUNT_BITS)
        ends = Signal()
        m.d.sync += [
            answers.eq(Mux(searching, Cat(1, position + 1 < columns), 0)),
            *(ends.eq(searching & final), tested.eq(emitting), tested_last.eq(emitting & final)),
        ]
        with m.If(emitting):
            m.d.sync += number.eq(position)

        # Cycle 1: they stand in registers, and so do columns that come.
        held = [Signal(32, name=f"held{n}") for n in range(2)]
        counted, count_ends = Signal(2), Signal()
        m.d.sync += [
            counted.eq(Mux(collected[0], collected, answers)),
            count_ends.eq(ends | (collected[0] & arrived_last)),
        ]
        with m.If(collected[0] | answers[0] | tested):
            for n, value in enumerate(held):
                m.d.sync += value.eq(Mux(collected[0], marked[n % side], banks[n].data))

        threshold, needed = self._threshold(m, held, counted, count_ends)

        # Cycle 2: columns are listed.
        emits, emits_last, emitted = Signal(), Signal(), Signal(COUNT_BITS)
        m.d.sync += [emits.eq(tested), emits_last.eq(tested_last)]
        with m.If(tested):
            m.d.sync += emitted.eq(number)
        value, takes, equal = Signal(32), Signal(), Signal()
        following_entry = Signal.like(self.index.address)
        m.d.comb += [
            value.eq(Mux(emitted[0], held[1], held[0])),
            equal.eq(value == threshold),
            takes.eq(emits & ((value > threshold) | (equal & needed.any()))),
            finished.eq(emits_last),
        ]
        m.d.sync += self.index.enable.eq(takes)
        with m.If(takes):
            m.d.sync += [
                *(self.index.data.eq(emitted), self.index.address.eq(following_entry)),
                following_entry.eq(following_entry + 1),
            ]
            with m.If(equal):
                m.d.sync += needed.eq(needed - 1)
        with m.If(self.begin):
            m.d.sync += following_entry.eq(i.select_to)
        return m

    def _values(self, m, selecting):
        """The values of a beat's columns when all their lanes are there: (which are there, of the last beat, values).

        They are there ``1 + lane_levels`` cycles behind the beat.
        """
        i, config = self.fields, self.config
        side, rows, subwords = config.columns_per_beat, config.rows, config.subwords
        lanes = config.lanes // side
        counts = Signal(rows)  # which lanes of a word do
        with m.If(self.begin):
            last_lane = i.select_lane + i.select_more_lanes
            m.d.sync += counts.eq(Cat((i.select_lane <= r) & (r <= last_lane) for r in range(rows)))

        # One register for each level of pairs of lanes, and what is known of the beat beside it.
        valid, last, sub = Mux(selecting, self.valid, 0), self.last, self.sub
        here = counts.word_select(self.sub, lanes)
        level = [
            [Mux(here[n], order(self.result.word_select(c * lanes + n, 32)), 0) for n in range(lanes)]
            for c in range(side)
        ]
        for stage in range(lane_levels(config) + 1):
            registers = [
                [Signal(32, name=f"level{stage}_{c}_{n}") for n in range(len(values))] for c, values in enumerate(level)
            ]
            tags = Signal(side, name=f"valid{stage}"), Signal(name=f"last{stage}"), Signal.like(sub, name=f"sub{stage}")
            m.d.sync += tags[0].eq(valid)
            with m.If(valid[0]):
                m.d.sync += [tags[1].eq(last), tags[2].eq(sub)]
                m.d.sync += [
                    r.eq(v) for rs, vs in zip(registers, level, strict=True) for r, v in zip(rs, vs, strict=True)
                ]
            valid, last, sub = tags
            level = registers if stage == lane_levels(config) else [greatest(values) for values in registers]
        values = [value for (value,) in level]
        if subwords > 1:
            # A column's lanes come beat by beat.
            (value,) = values
            best, most = Signal(32), Signal(32)
            m.d.comb += most.eq(Mux((sub == 0) | (value > best), value, best))
            with m.If(valid[0]):
                m.d.sync += best.eq(most)
            valid, values = Mux(sub == subwords - 1, valid, 0), [most]
        arrived = Signal(side)
        m.d.comb += arrived.eq(valid)
        return arrived, last, values

    def _threshold(self, m, held, counted, ends):
        """The least selected value, digit by digit: (threshold, how many columns that equal it are selected).

        A digit stands in the second cycle behind ``ends``, which comes with the last values that are counted for it.
        """
        i, bits = self.fields, SELECT_DIGIT_BITS
        threshold, needed = Signal(32), Signal(COUNT_BITS)
        settled, place = Signal(SELECT_DIGITS), Signal(range(SELECT_DIGITS))  # digits from the upper one on
        digits = [threshold.word_select(SELECT_DIGITS - 1 - n, bits) for n in range(SELECT_DIGITS)]
        matches, looked_at = [], []
        for n, value in enumerate(held):
            parts = [value.word_select(SELECT_DIGITS - 1 - g, bits) for g in range(SELECT_DIGITS)]
            differs = Cat(part != digit for part, digit in zip(parts, digits, strict=True)) & settled
            matches.append(counted[n] & ~differs.any())
            digit = Signal(bits, name=f"digit{n}")
            with m.Switch(place):
                for g, part in enumerate(parts):
                    with m.Case(g):
                        m.d.comb += digit.eq(part)
            looked_at.append(digit)

        # Counters go down from what is needed: one that has come to its end is enough for its digit.
        enough, digit, left = Signal((1 << bits) - 1), Signal(bits), Signal(COUNT_BITS)
        m.d.comb += left.eq(needed)
        more = [Signal(COUNT_BITS, name=f"more{d}") for d in range(1, 1 << bits)]
        for d in range((1 << bits) - 1, 0, -1):
            found = [match & (at >= d) for match, at in zip(matches, looked_at, strict=True)]
            remaining = more[d - 1]
            with m.If(counted[0]):
                m.d.sync += remaining.eq(remaining - (found[0] + found[1]))
                reached = ((remaining == 1) & (found[0] | found[1])) | ((remaining == 2) & found[0] & found[1])
                m.d.sync += enough[d - 1].eq(enough[d - 1] | reached)
        with m.If(~enough[0]):
            m.d.comb += left.eq(more[0])
        for d in range(1, 1 << bits):
            with m.If(enough[d - 1]):
                m.d.comb += digit.eq(d)
                if d < len(more):
                    m.d.comb += left.eq(more[d])
                else:
                    m.d.comb += left.eq(needed)
        evaluates = Signal()
        m.d.sync += evaluates.eq(ends)
        with m.If(self.begin):
            m.d.sync += [*(threshold.eq(0), needed.eq(i.select), settled.eq(0), place.eq(0), enough.eq(0))]
            m.d.sync += [remaining.eq(i.select) for remaining in more]
        with m.Elif(evaluates):
            with m.Switch(place):
                for g, part in enumerate(digits):
                    with m.Case(g):
                        m.d.sync += [part.eq(digit), settled[g].eq(1)]
            m.d.sync += [place.eq(place + 1), needed.eq(left), enough.eq(0)]
            m.d.sync += [remaining.eq(left) for remaining in more]
        return threshold, needed
