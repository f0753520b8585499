"""The VECTOR unit: issue stage, lanes, row reductions, writes."""

from amaranth.hdl import Cat, Module, Mux, Shape, Signal
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from lockstep_isa.config import ConfigurationError
from lockstep_isa.instructions import VECTOR, Destination, Function, Mask, SecondAdd

from ..generate import instantiate, lane_module
from ..interfaces import AccumulatorPort, ReadPort, WritePort, instruction_stream
from .delay import delayed
from .function_table import ENTRY_BITS
from .issue import Issue
from .lane import lane_mode, lane_signature
from .reduce import SumControl
from .result import ResultWriter
from .timing import CONVERT, DEPTH, FUNCTION, RESULT, ROUNDED, SUM

#: Rows whose maximum continues and that are in the pipeline at once: DEPTH over the least pitch of such rows.
CONTINUED_ROWS = 16


class VectorUnit(wiring.Component):
    """Fused passes over tiles x columns elements of ``rows`` lanes each.

        instruction -> issue --+--> lane 0 .. L-1 ---------------------------+--> VECTOR, PARAMETER
                         |     |     stage 1 .. 52    53 .. 56   57, 58      +--> ACTIVATION, WEIGHT
        accumulators ----+     |     x1 .. x5         x6         8 bits      |
        VECTOR, PARAMETER      +--> valid, first, last, sub: one bit a stage,
                                    once for all lanes; row sums, maxima ----+--> PARAMETER

    Ports
    -----
    instruction : In(stream of VECTOR), taken when the one before has written everything.
    done : Out(1), a pulse when it has. ``stalled`` : Out(1), under way but waiting for an accumulator tile.
    accumulator : Out(AccumulatorPort). ``vector_read``, ``parameter_read`` : Out(ReadPort(32 R)).
    vector_write, parameter_write : Out(WritePort(32 R, R)); ``activation_write``, ``weight_write`` :
        Out(WritePort(8 R, R)). Writes are always taken. A granule is one lane.
    table_write : In: ``enable``, ``address`` In(9) = 128 * slot + entry, ``data`` In(72).
    flags : Out(2), pulses: bit 0 RECIP met a zero, bit 1 RECIP met an infinity or NaN.

    One beat of ``lanes`` values per cycle. The pipeline behind the issue stage never stalls and is DEPTH cycles deep;
    ``vector_cycles`` in timing.py gives the cycles of a pass. A row tile must not read what the same pass writes for
    another row tile. Tables may not be written while a pass reads them. More lanes than rows are not built.
    """

    def __init__(self, config) -> None:
        if config.lanes > config.rows:
            raise ConfigurationError(
                f"lanes ({config.lanes}) above rows ({config.rows}) are not built yet by this RTL: use at most one "
                "lane per row"
            )
        self.config = config
        rows = config.rows
        super().__init__(
            {
                "instruction": In(instruction_stream(VECTOR)),
                "done": Out(1),
                "stalled": Out(1),
                "accumulator": Out(AccumulatorPort(config)),
                "vector_read": Out(ReadPort(32 * rows)),
                "parameter_read": Out(ReadPort(32 * rows)),
                "vector_write": Out(WritePort(32 * rows, rows)),
                "parameter_write": Out(WritePort(32 * rows, rows)),
                "activation_write": Out(WritePort(8 * rows, rows)),
                "weight_write": Out(WritePort(8 * rows, rows)),
                "table_write": In(wiring.Signature({"enable": Out(1), "address": Out(9), "data": Out(ENTRY_BITS)})),
                "flags": Out(2),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self.config
        lanes, subwords = config.lanes, config.subwords

        m.submodules.issue = issue = Issue(config)
        wiring.connect(m, wiring.flipped(self.instruction), issue.instruction)
        wiring.connect(m, issue.accumulator, wiring.flipped(self.accumulator))
        wiring.connect(m, issue.vector_read, wiring.flipped(self.vector_read))
        wiring.connect(m, issue.parameter_read, wiring.flipped(self.parameter_read))
        m.d.comb += [self.done.eq(issue.done), self.stalled.eq(issue.stalled)]
        fields = issue.fields

        # Tags: bit i of each belongs to the beat in stage i.
        sub_bits = (subwords - 1).bit_length()
        valid, first, last = Signal(DEPTH), Signal(DEPTH), Signal(DEPTH)
        passed, passed_first, passed_last = Signal(DEPTH - 1), Signal(DEPTH - 1), Signal(DEPTH - 1)
        time = Signal(6)
        m.d.comb += [
            valid.eq(Cat(issue.beat, passed)),
            first.eq(Cat(issue.first, passed_first)),
            last.eq(Cat(issue.last, passed_last)),
        ]
        moving = Signal()
        busy = issue.beat | moving
        m.d.sync += [passed.eq(valid), moving.eq(valid[: DEPTH - 1].any())]
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

        # What holds still during a pass.
        rounded = fields.destination >= Destination.ACTIVATION
        mode = lane_mode(m, fields, rounded)
        column1 = Mux(fields.add2 == SecondAdd.IMMEDIATE1, fields.immediate1, issue.column1)
        masks = (fields.function == Function.SCORE) & (fields.mask != Mask.NONE)
        hidden = delayed(m, "delay_hidden", issue.hidden, CONVERT, FUNCTION, valid, time, masks)

        # Row sums.
        m.submodules.sum_control = sum_control = SumControl(subwords)
        m.d.comb += [
            sum_control.valid.eq(valid[SUM] & fields.sum),
            sum_control.last.eq(last[SUM]),
            sum_control.sub.eq(sub_at(SUM)),
            sum_control.columns.eq(fields.columns),
        ]

        # Words from which maxima continue wait until their row's first beat has passed RESULT.
        pointer_bits = (CONTINUED_ROWS - 1).bit_length()
        m.submodules.continued = continued = Memory(shape=Shape(32 * config.rows), depth=CONTINUED_ROWS, init=[])
        write, read = continued.write_port(), continued.read_port()
        pushed, popped = Signal(pointer_bits), Signal(pointer_bits)
        at_start = valid[RESULT] & first[RESULT] & (sub_at(RESULT) == 0)
        pop = at_start & fields.max_continue & fields.maximum.any()
        m.d.comb += [
            write.en.eq(issue.continue_valid),
            write.addr.eq(pushed),
            write.data.eq(issue.parameter_read.data),
            read.en.eq(pop),
            read.addr.eq(popped),
        ]
        m.d.sync += [pushed.eq(pushed + issue.continue_valid), popped.eq(popped + pop)]

        # Lanes.
        zeros, nonfinites, results, bytes_, sums, maxima = [], [], [], [], [], []
        for n in range(lanes):
            lane = instantiate(m, f"lane{n}", lane_signature(subwords), lane_module(subwords))
            wiring.connect(m, sum_control.controls, lane.sums)
            start = read.data.word_select(sub_at(RESULT + 1), 32 * lanes)
            m.d.comb += [
                lane.mode.eq(mode),
                lane.valid.eq(valid),
                lane.time.eq(time),
                lane.x.eq(issue.x.word_select(n, 32)),
                lane.y.eq(issue.y.word_select(n, 32)),
                lane.lane0.eq(issue.lane0.word_select(n, 32)),
                lane.lane1.eq(issue.lane1.word_select(n, 32)),
                lane.column0.eq(issue.column0),
                lane.column1.eq(column1),
                lane.column2.eq(issue.column2),
                lane.hidden.eq(hidden[n] & masks),
                lane.maximum_first.eq(first[RESULT + 1]),
                lane.maximum_sub.eq(sub_at(RESULT + 1)),
                lane.maximum_start.eq(start.word_select(n, 32)),
                lane.write_enable.eq(self.table_write.enable),
                lane.write_address.eq(self.table_write.address),
                lane.write_data.eq(self.table_write.data),
            ]
            zeros.append(lane.zero)
            nonfinites.append(lane.nonfinite)
            results.append(lane.result)
            bytes_.append(lane.rounded)
            sums.append(lane.sum)
            maxima.append(lane.maximum)
        m.d.sync += self.flags.eq(Cat(Cat(zeros).any(), Cat(nonfinites).any()))

        # Writes.
        m.submodules.writer = writer = ResultWriter(config)
        for name in ("vector_write", "parameter_write", "activation_write", "weight_write"):
            # Registers, so that who else wants the port learns of it at the start of a cycle. A write is one cycle
            # later than the pipeline's last stage, and still before any unit that got a token for it can read.
            inner, port = getattr(writer, name), getattr(self, name)
            m.d.sync += port.enable.eq(inner.enable)
            with m.If(inner.enable):
                m.d.sync += [port.address.eq(inner.address), port.data.eq(inner.data), port.mask.eq(inner.mask)]
        m.d.comb += [
            writer.fields.eq(fields),
            writer.begin.eq(issue.begin),
            writer.result_valid.eq(valid[RESULT]),
            writer.result_last.eq(last[RESULT]),
            writer.result_sub.eq(sub_at(RESULT)),
            writer.result.eq(Cat(results)),
            writer.rounded_valid.eq(valid[ROUNDED]),
            writer.rounded_last.eq(last[ROUNDED]),
            writer.rounded_sub.eq(sub_at(ROUNDED)),
            writer.rounded.eq(Cat(bytes_)),
            writer.maximum.eq(Cat(maxima[n].word_select(s, 32) for s in range(subwords) for n in range(lanes))),
            writer.sum_done.eq(sum_control.done),
            writer.sum_sub.eq(sum_control.done_sub),
            writer.sum.eq(Cat(sums)),
        ]

        # Out of a register, for the end of a pass goes on to the queue and to the tokens of all units. The last stage
        # is not looked at: what is there now is gone when the register is read, but for a group to be transposed.
        transposes = fields.destination.matches(Destination.WEIGHT_TRANSPOSED, Destination.BYTES_TRANSPOSED)
        settled = Signal()
        m.d.sync += settled.eq(
            ~valid[: DEPTH - 1].any() & ~(valid[DEPTH - 1] & transposes) & sum_control.idle & writer.idle
        )
        m.d.comb += issue.drained.eq(settled & ~issue.beat)
        return m
