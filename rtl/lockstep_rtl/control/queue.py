"""The queue in front of a unit: instructions wait here for room and for tokens."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from lockstep_isa.config import CoreConfig
from lockstep_isa.instructions import InstructionType

from ..fifo import HeadFIFO
from ..interfaces import instruction_layout, instruction_stream

#: Bits of an instruction's index in its program.
INDEX_BITS = 24
#: Instructions that a unit may have accepted and not completed (STORE has the most).
IN_FLIGHT = 8

#: What is kept of a running instruction.
_RUNNING = data.StructLayout({"signal": 4, "skip": 1, "index": INDEX_BITS})


def queue_entry(type: InstructionType, config: CoreConfig) -> data.StructLayout:
    """What the dispatcher pushes: an instruction, its index, and whether its unit is to ``skip`` it."""
    return data.StructLayout({"index": INDEX_BITS, "skip": 1, "instruction": instruction_layout(type, config)})


class UnitQueue(wiring.Component):
    """In order: an instruction is offered to its unit once its tokens are there, and gives tokens when it is done.

    One to be skipped takes its tokens like the others and gives its own once all older ones are done; the unit does
    not see it.

    Ports
    -----
    push : In(stream of index, skip, instruction), from the dispatcher.
    instruction : Out(stream of the unit's instruction). done : In(1), the oldest accepted one is complete.
    want : Out(4), granted : In(1), take : Out(1), give : Out(4), to :class:`Tokens`.
    halt : In(1), offer nothing. running : Out(1), taken and not complete. waiting : Out(1), for tokens.
    newest, oldest : Out(24), indices of the last that the unit accepted and of the oldest running instruction.
    earlier : Out(24), index of the one that the unit accepted before ``newest``.
    """

    def __init__(self, config: CoreConfig, type: InstructionType) -> None:
        self.config, self.type = config, type
        self.entry = queue_entry(type, config)
        super().__init__(
            {
                "push": In(stream.Signature(self.entry)),
                "instruction": Out(instruction_stream(type, config)),
                "done": In(1),
                "want": Out(4),
                "granted": In(1),
                "take": Out(1),
                "give": Out(4),
                "halt": In(1),
                "running": Out(1),
                "waiting": Out(1),
                "empty": Out(1),
                "newest": Out(INDEX_BITS),
                "oldest": Out(INDEX_BITS),
                "earlier": Out(INDEX_BITS),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.queue = queue = HeadFIFO(width=self.entry.size, depth=self.config.queue_depth)
        m.submodules.flight = flight = HeadFIFO(width=_RUNNING.size, depth=IN_FLIGHT)
        head = data.View(self.entry, queue.r_data)
        begins, accepted, taken = Signal(), Signal(), Signal()
        # A grant is looked at one cycle later, out of a register. It stays: only this unit takes its tokens.
        granted = Signal()
        m.d.sync += granted.eq(queue.r_rdy & self.granted & ~taken)
        m.d.comb += [
            queue.w_data.eq(self.push.payload),
            queue.w_en.eq(self.push.valid),
            self.push.ready.eq(queue.w_rdy),
            self.want.eq(head.instruction.wait),
            self.instruction.payload.eq(head.instruction),
            begins.eq(granted & flight.w_rdy & ~self.halt),
            self.instruction.valid.eq(begins & ~head.skip),
            accepted.eq(self.instruction.valid & self.instruction.ready),
            taken.eq(accepted | (begins & head.skip)),
            self.take.eq(taken),
            queue.r_en.eq(taken),
            flight.w_en.eq(taken),
            flight.w_data.eq(Cat(head.instruction.signal, head.skip, head.index)),
        ]
        with m.If(accepted):
            m.d.sync += [self.newest.eq(head.index), self.earlier.eq(self.newest)]

        # The unit may be done while a skipped instruction in front of its own is still on the way out.
        oldest = data.View(_RUNNING, flight.r_data)
        owed = Signal(range(IN_FLIGHT + 1))
        completes, retires = Signal(), Signal()
        m.d.comb += [
            completes.eq(flight.r_rdy & ~oldest.skip & (self.done | owed.any())),
            retires.eq(completes | (flight.r_rdy & oldest.skip)),
        ]
        m.d.sync += owed.eq(owed + self.done - completes)

        # ``running`` counts itself: the buffered FIFO shows an entry only some cycles behind its acceptance.
        in_flight = Signal(range(IN_FLIGHT + 2))
        m.d.sync += in_flight.eq(in_flight + taken - retires)
        m.d.comb += [
            self.running.eq(in_flight.any()),
            self.empty.eq(~queue.r_rdy & (queue.level == 0) & ~in_flight.any()),
            self.waiting.eq(queue.r_rdy & ~self.granted),
            self.oldest.eq(oldest.index),
            flight.r_en.eq(retires),
        ]
        with m.If(retires):
            m.d.comb += self.give.eq(oldest.signal)
        return m
