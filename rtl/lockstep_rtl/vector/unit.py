"""The VECTOR unit: issue stage, lanes, row reductions, writes."""

from amaranth.hdl import Cat, Module, Mux, Shape, Signal
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from lockstep_isa.instructions import VECTOR, Destination, Function, Mask, SecondAdd

from ..generate import instantiate, lane_module
from ..index_memory import IndexWrite
from ..interfaces import AccumulatorPort, ReadPort, WritePort, instruction_stream
from .delay import delayed
from .function_table import ENTRY_BITS
from .issue import Issue
from .lane import lane_mode, lane_signature
from .reduce import SumControl
from .result import ResultWriter
from .sections import Sections
from .selection import Selection
from .timing import CONVERT, DEPTH, FUNCTION, RESULT, ROUNDED, SUM

#: Maxima that continue and are in the pipeline at once: DEPTH over their least pitch, that of sections of 4 columns.
CONTINUED = 16
#: Memories that a pass may write.
WRITES = ("activation", "weight", "vector", "parameter")


class VectorUnit(wiring.Component):
    """Fused passes over tiles x columns elements of ``rows`` lanes each.

        instruction -> issue --+--> lane 0 .. L-1 ---------------------------+--> VECTOR, PARAMETER
                         |     |     stage 1 .. 52    53 .. 56   57, 58      +--> ACTIVATION, WEIGHT
        accumulators ----+     |     x1 .. x5         x6         8 bits      |
        VECTOR, PARAMETER      +--> valid, first, last, sub: one bit a stage,
                                    once for all lanes; row sums, maxima ----+--> PARAMETER
                                                                  selection -+--> index memory

    With at most as many lanes as rows a beat is ``lanes`` rows of one column. With twice as many it is two columns
    side by side: lane n has row n mod rows of column n div rows. The two lanes of a row share its sum and its maximum.

    Ports
    -----
    instruction : In(stream of VECTOR), taken when the one before has written everything.
    done : Out(1), a pulse when it has. ``stalled`` : Out(1), under way but waiting for an accumulator tile.
    accumulator : Out(AccumulatorPort). ``vector_read``, ``parameter_read`` : Out(ReadPort(32 R)).
    vector_write, parameter_write : Out(WritePort(32 R, R)); ``activation_write``, ``weight_write`` :
        Out(WritePort(8 R, R)). Writes are always taken. A granule is one lane. Ports take a word for each column of a
        beat. vector_write_idle etc. : Out(1), the port is not enabled, from a register of its own.
    table_write : In: ``enable``, ``address`` In(9) = 128 * slot + entry, ``data`` In(72).
    flags : Out(2), pulses: bit 0 RECIP met a zero, bit 1 RECIP met an infinity or NaN.
    index_write : Out(IndexWrite), ``select_beyond`` : Out(1), see Selection; on cores with selection.

    One beat of ``lanes`` values per cycle. The pipeline behind the issue stage never stalls and is DEPTH cycles deep;
    ``vector_cycles`` in timing.py gives the cycles of a pass. A row tile must not read what the same pass writes for
    another row tile. Tables may not be written while a pass reads them.
    """

    def __init__(self, config) -> None:
        self.config = config
        rows, side = config.rows, config.columns_per_beat
        super().__init__(
            {
                "instruction": In(instruction_stream(VECTOR, config)),
                "done": Out(1),
                "stalled": Out(1),
                "accumulator": Out(AccumulatorPort(config)),
                "vector_read": Out(ReadPort(32 * rows, side)),
                "parameter_read": Out(ReadPort(32 * rows, side)),
                "vector_write": Out(WritePort(32 * rows, rows, side)),
                "parameter_write": Out(WritePort(32 * rows, rows, side)),
                "activation_write": Out(WritePort(8 * rows, rows, side)),
                "weight_write": Out(WritePort(8 * rows, rows, side)),
                **{f"{memory}_write_idle": Out(1, init=1) for memory in WRITES},
                "table_write": In(wiring.Signature({"enable": Out(1), "address": Out(9), "data": Out(ENTRY_BITS)})),
                "flags": Out(2),
            }
            | ({"index_write": Out(IndexWrite()), "select_beyond": Out(1)} if config.selection else {})
        )

    def elaborate(self, platform):
        m = Module()
        config = self.config
        lanes, subwords, side = config.lanes, config.subwords, config.columns_per_beat
        lanes_per_column = lanes // side

        m.submodules.issue = issue = Issue(config)
        wiring.connect(m, wiring.flipped(self.instruction), issue.instruction)
        wiring.connect(m, issue.accumulator, wiring.flipped(self.accumulator))
        wiring.connect(m, issue.vector_read, wiring.flipped(self.vector_read))
        wiring.connect(m, issue.parameter_read, wiring.flipped(self.parameter_read))
        m.d.comb += [self.done.eq(issue.done), self.stalled.eq(issue.stalled)]
        fields = issue.fields

        # Tags: bit i of each belongs to the beat in stage i. Each column of a beat has its own valid bits.
        sub_bits = (subwords - 1).bit_length()
        first, last = Signal(DEPTH), Signal(DEPTH)
        passed_first, passed_last = Signal(DEPTH - 1), Signal(DEPTH - 1)
        time = Signal(6)
        valids = []
        for c in range(side):
            bits, passed = Signal(DEPTH, name=f"valid{c}"), Signal(DEPTH - 1, name=f"passed{c}")
            m.d.comb += bits.eq(Cat(issue.beat[c], passed))
            m.d.sync += passed.eq(bits)
            valids.append(bits)
        valid = valids[0]
        m.d.comb += [
            first.eq(Cat(issue.first, passed_first)),
            last.eq(Cat(issue.last, passed_last)),
        ]
        moving = Signal()
        busy = issue.beat[0] | moving
        m.d.sync += moving.eq(valid[: DEPTH - 1].any())
        with m.If(busy):
            m.d.sync += [passed_first.eq(first), passed_last.eq(last), time.eq(time + 1)]
        subs = [Signal(DEPTH, name=f"sub{b}") for b in range(sub_bits)]
        for b, bits in enumerate(subs):
            passed_sub = Signal(DEPTH - 1, name=f"passed_sub{b}")
            m.d.comb += bits.eq(Cat(issue.sub[b], passed_sub))
            with m.If(busy):
                m.d.sync += passed_sub.eq(bits)

        def sub_at(stage):
            return Cat(bits[stage] for bits in subs)

        def valid_at(stage):
            return Cat(bits[stage] for bits in valids)

        # What holds still during a pass.
        rounded = fields.destination >= Destination.ACTIVATION
        mode = lane_mode(m, fields, rounded)
        column1 = Mux(fields.add2 == SecondAdd.IMMEDIATE1, fields.immediate1.replicate(side), issue.column1)
        masks = (fields.function == Function.SCORE) & (fields.mask != Mask.NONE)
        hidden = delayed(m, "delay_hidden", issue.hidden, CONVERT, FUNCTION, valid, time, masks)

        # Row sums.
        m.submodules.sum_control = sum_control = SumControl(config)
        m.d.comb += [
            sum_control.valid.eq(Mux(fields.sum, valid_at(SUM), 0)),
            sum_control.last.eq(last[SUM]),
            sum_control.sub.eq(sub_at(SUM)),
            sum_control.columns.eq(fields.columns),
        ]

        # Words from which maxima continue wait until the first beat of their row or section has passed RESULT.
        depth = CONTINUED * side if config.selection else CONTINUED
        pointer_bits = (depth - 1).bit_length()
        m.submodules.continued = continued = Memory(shape=Shape(32 * config.rows), depth=depth, init=[])
        write, read = continued.write_port(), continued.read_port()
        pushed, popped = Signal(pointer_bits), Signal(pointer_bits)
        maximum_first, compared_first, paired = first[RESULT], first[RESULT + 1], fields.columns != 1
        if config.selection:
            m.submodules.sections = sections = Sections(config)
            m.d.comb += [
                sections.fields.eq(fields),
                sections.begin.eq(issue.begin),
                sections.valid.eq(valid_at(RESULT)),
                sections.row_first.eq(first[RESULT]),
                sections.row_last.eq(last[RESULT]),
                sections.sub.eq(sub_at(RESULT)),
            ]
            maximum_first, compared_first, paired = sections.first, sections.compared_first, sections.paired
        at_start = valid[RESULT] & maximum_first & (sub_at(RESULT) == 0)
        pop = at_start & fields.max_continue & fields.maximum.any()
        m.d.comb += [
            write.en.eq(issue.continue_valid),
            write.addr.eq(pushed),
            write.data.eq(issue.parameter_read.data[: 32 * config.rows]),
            read.en.eq(pop),
            read.addr.eq(popped),
        ]
        m.d.sync += [pushed.eq(pushed + issue.continue_valid), popped.eq(popped + pop)]

        # Lanes.
        start = read.data.word_select(sub_at(RESULT + 1), 32 * lanes_per_column)
        members = []
        for n in range(lanes):
            column, row = divmod(n, lanes_per_column)
            lane = instantiate(m, f"lane{n}", lane_signature(subwords), lane_module(subwords))
            wiring.connect(m, getattr(sum_control, f"controls_{column}"), lane.sums)
            m.d.comb += [
                lane.mode.eq(mode),
                lane.valid.eq(valids[column]),
                lane.time.eq(time),
                lane.x.eq(issue.x.word_select(n, 32)),
                lane.y.eq(issue.y.word_select(n, 32)),
                lane.lane0.eq(issue.lane0.word_select(n, 32)),
                lane.lane1.eq(issue.lane1.word_select(n, 32)),
                lane.column0.eq(issue.column0.word_select(column, 32)),
                lane.column1.eq(column1.word_select(column, 32)),
                lane.column2.eq(issue.column2.word_select(column, 32)),
                lane.hidden.eq(hidden[n] & masks),
                lane.maximum_first.eq(compared_first),
                lane.maximum_start.eq(start.word_select(row, 32)),
                lane.write_enable.eq(self.table_write.enable),
                lane.write_address.eq(self.table_write.address),
                lane.write_data.eq(self.table_write.data),
            ]
            members.append(lane)
        # The lane of a row's even columns ends its sum and its maximum with those of the odd ones.
        own, others = members[:lanes_per_column], members[lanes_per_column:]
        maxima = [lane.maximum for lane in own]
        for row, other in enumerate(others):
            m.d.comb += own[row].other.eq(other.partial)
            more = paired & (other.maximum.as_signed() > own[row].maximum.as_signed())
            maxima[row] = Mux(more, other.maximum, own[row].maximum)
        zeros, nonfinites = (Cat(getattr(lane, name) for lane in members) for name in ("zero", "nonfinite"))
        m.d.sync += self.flags.eq(Cat(zeros.any(), nonfinites.any()))

        # Writes.
        m.submodules.writer = writer = ResultWriter(config)
        for name in (f"{memory}_write" for memory in WRITES):
            # Registers, so that who else wants the port learns of it at the start of a cycle. A write is one cycle
            # later than the pipeline's last stage, and still before any unit that got a token for it can read.
            inner, port = getattr(writer, name), getattr(self, name)
            idle = getattr(self, f"{name}_idle")
            m.d.sync += [port.enable.eq(inner.enable), idle.eq(~inner.enable.any())]
            with m.If(inner.enable.any()):
                m.d.sync += [port.address.eq(inner.address), port.data.eq(inner.data), port.mask.eq(inner.mask)]
        m.d.comb += [
            writer.fields.eq(fields),
            writer.begin.eq(issue.begin),
            writer.result_valid.eq(valid_at(RESULT)),
            writer.result_last.eq(last[RESULT]),
            writer.result_sub.eq(sub_at(RESULT)),
            writer.result.eq(Cat(lane.result for lane in members)),
            writer.rounded_valid.eq(valid_at(ROUNDED)),
            writer.rounded_last.eq(last[ROUNDED]),
            writer.rounded_sub.eq(sub_at(ROUNDED)),
            writer.rounded.eq(Cat(lane.rounded for lane in members)),
            writer.maximum.eq(Cat(maximum.word_select(s, 32) for s in range(subwords) for maximum in maxima)),
            *([writer.maximum_last.eq(sections.last)] if config.selection else []),
            writer.sum_done.eq(sum_control.done),
            writer.sum_sub.eq(sum_control.done_sub),
            writer.sum.eq(Cat(lane.sum for lane in own)),
        ]

        if config.selection:
            m.submodules.selection = selection = Selection(config)
            wiring.connect(m, selection.index, wiring.flipped(self.index_write))
            m.d.comb += [
                selection.fields.eq(fields),
                selection.begin.eq(issue.begin),
                selection.valid.eq(valid_at(RESULT)),
                selection.last.eq(last[RESULT]),
                selection.sub.eq(sub_at(RESULT)),
                selection.result.eq(Cat(lane.result for lane in members)),
                self.select_beyond.eq(selection.beyond),
            ]

        # Out of a register, for the end of a pass goes on to the queue and to the tokens of all units. The last stage
        # is not looked at: what is there now is gone when the register is read, but for a group to be transposed.
        transposes = fields.destination.matches(Destination.WEIGHT_TRANSPOSED, Destination.BYTES_TRANSPOSED)
        settled = Signal()
        quiet = ~valid[: DEPTH - 1].any() & ~(valid[DEPTH - 1] & transposes) & sum_control.idle & writer.idle
        m.d.sync += settled.eq(quiet & selection.idle if config.selection else quiet)
        m.d.comb += issue.drained.eq(settled & ~issue.beat[0])
        return m
