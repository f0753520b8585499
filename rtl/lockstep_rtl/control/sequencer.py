"""The sequencer: descriptors from the command ring, instructions from memory, one after the other to the units."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out
from lockstep_isa.config import CoreConfig
from lockstep_isa.errors import ErrorCode
from lockstep_isa.instructions import (
    BY_OPCODE,
    HEADER,
    INSTRUCTION_BYTES,
    INSTRUCTION_TYPES,
    STORE,
    VECTOR,
    InstructionType,
    Memory,
    selector,
)
from lockstep_isa.registers import DESCRIPTOR_BYTES, DESCRIPTOR_FIELDS

from ..axi import ADDRESS_BITS, ReadMaster
from ..fifo import HeadFIFO
from ..transfer.bursts import UnitError, Window
from .operands import OPERAND_BYTES, OperandAdder
from .queue import INDEX_BITS, queue_entry

#: Fetched instructions that wait for dispatch; as many are asked for ahead.
FETCH_AHEAD = 8


class Sequencer(wiring.Component):
    """Executes the command ring.

    Ports
    -----
    ring_base, ring_size, ring_tail : In(32). ring_head, fence : Out(32).
    bus : Out(ReadMaster), instruction fetch. window : In(Window). halt : In(1), ask for nothing more.
    push_NAME : Out(stream of index, skip, instruction), one per instruction type.
    units_idle : In(1), no unit has work. busy : Out(1), a descriptor is under way.
    dispatched : Out(1), an instruction leaves. outstanding : Out(1), fetches are under way.
    error : Out(UnitError), index : Out(24) of the instruction at the head.

    A program whose descriptor names another configuration, an unknown opcode, a count of zero, a value that its
    enumeration does not have, a STORE of another memory than VECTOR, a selection in several row tiles, fields of a
    feature that the core lacks and stray bits are refused here, before any unit sees them. A descriptor is complete
    when all its instructions are. Fetches never ask for more than the buffer holds, so that data for LOAD is never
    stuck behind them on the shared bus.

    An instruction leaves two cycles behind its arrival at the head, one with n operands n + 2 cycles later. A program
    that has operands begins with the fetch of all of them, 256 bytes, that of its instructions right behind. Where a
    bus beat holds two instructions, a fetch brings both, and programs and operands begin with a beat.
    """

    def __init__(self, config: CoreConfig) -> None:
        self.config = config
        members = {f"push_{t.name.lower()}": Out(stream.Signature(queue_entry(t, config))) for t in INSTRUCTION_TYPES}
        super().__init__(
            members
            | {
                "ring_base": In(32),
                "ring_size": In(32),
                "ring_tail": In(32),
                "ring_head": Out(32),
                "fence": Out(32),
                "bus": Out(ReadMaster(config.bus_bytes)),
                "window": In(Window()),
                "halt": In(1),
                "units_idle": In(1),
                "busy": Out(1),
                "dispatched": Out(1),
                "outstanding": Out(1),
                "error": Out(UnitError()),
                "index": Out(INDEX_BITS),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        bus_bytes = self.config.bus_bytes
        fetch_bytes, beats = max(INSTRUCTION_BYTES, bus_bytes), max(1, INSTRUCTION_BYTES // bus_bytes)
        pairs = fetch_bytes // INSTRUCTION_BYTES - 1  # 1 where one fetch brings two instructions
        ahead = FETCH_AHEAD >> pairs
        word_bits = 8 * fetch_bytes
        m.submodules.buffer = buffer = HeadFIFO(width=word_bits, depth=ahead)

        # Fetch: bursts of one instruction, or beats of two; ``credit`` of them are asked for or waiting.
        address, remaining = Signal(ADDRESS_BITS), Signal(32)
        credit, flying = Signal(range(ahead + 1)), Signal(range(ahead + 1))
        aligned, inside, want = Signal(), Signal(), Signal()
        ar, r = self.bus.ar, self.bus.r
        beyond = Signal(ADDRESS_BITS + 1)
        m.d.comb += [
            beyond.eq(address + fetch_bytes),
            aligned.eq(address[: (fetch_bytes - 1).bit_length()] == 0),
            inside.eq((address >= self.window.base) & (beyond <= self.window.limit) & aligned),
            want.eq(~ar.valid & remaining.any() & (credit != ahead) & ~self.halt),
            ar.addr.eq(address),
            ar.len.eq(beats - 1),
            r.ready.eq(1),
            self.outstanding.eq(flying.any() | ar.valid),
        ]
        asked, arrived, used, stored = Signal(), Signal(), Signal(), Signal()
        m.d.comb += [asked.eq(ar.valid & ar.ready), arrived.eq(r.valid & r.last)]
        # Checked in one cycle, shown from the next one until it is taken.
        with m.If(~ar.valid | ar.ready):
            m.d.sync += ar.valid.eq(want & inside)
        m.d.sync += [
            credit.eq(credit + asked - used - stored),
            flying.eq(flying + asked - arrived),
        ]
        with m.If(asked):
            m.d.sync += [address.eq(address + fetch_bytes), remaining.eq(remaining - 1)]

        word, complete = Signal(word_bits), Signal()
        with m.If(r.valid):
            m.d.sync += word.eq(Cat(word, r.data)[8 * bus_bytes :])
        m.d.sync += complete.eq(arrived & ~stored)
        m.d.comb += [buffer.w_en.eq(complete), buffer.w_data.eq(word), used.eq(buffer.r_en & buffer.r_rdy)]

        # Operands go past the buffer.
        m.submodules.operands = operands = OperandAdder(bus_bytes)
        loading = Signal()
        m.d.comb += [
            operands.write_enable.eq(loading & r.valid),
            operands.write_data.eq(r.data),
            stored.eq(loading & arrived),
        ]
        with m.If(operands.write_enable & operands.write_last):
            m.d.sync += loading.eq(0)

        # Dispatch: the head of the buffer goes to its unit's queue. Of two instructions in a beat the first one goes
        # first: ``second`` tells that it is gone.
        second, next_head = Signal(), Signal()
        head = buffer.r_data.word_select(second, 8 * INSTRUCTION_BYTES)
        index, left = self.index, Signal(32)
        dispatching = Signal()
        known, malformed, dispatch, pushed = (Signal(name=n) for n in ("known", "malformed", "dispatch", "pushed"))
        # The verdict on the head is one cycle old: it is looked at in one cycle and dispatched from the next one on.
        vetted, is_known, is_malformed = Signal(), Signal(), Signal()
        kinds = Signal(len(INSTRUCTION_TYPES))
        m.d.comb += operands.begin.eq(buffer.r_rdy & dispatching & ~vetted)
        m.d.sync += [
            vetted.eq(buffer.r_rdy & ~next_head & dispatching),
            is_known.eq(known),
            is_malformed.eq(malformed),
        ]

        def bits(t: InstructionType, name: str) -> Value:
            offset, field = t.layout[name]
            return head[offset : offset + field.width]

        for kind, t in enumerate(INSTRUCTION_TYPES):
            push = getattr(self, f"push_{t.name.lower()}")
            there = t.of(self.config)
            resolved = {f.name: operands.sums[n][: f.width] for n, f in enumerate(there.variable)}
            m.d.comb += [push.payload.index.eq(index), push.payload.skip.eq(operands.skip)]
            known_bits = sum((1 << f.width) - 1 << t.layout[f.name][0] for f in there.encoded)
            for f in (*HEADER, *there.fields):
                m.d.comb += getattr(push.payload.instruction, f.name).eq(resolved.get(f.name, bits(t, f.name)))
            wrong = [
                (bits(t, f.name) == 0) & (bits(t, selector(f.name)) == 0 if f.operand else 1)
                for f in there.fields
                if f.minimum
            ]
            wrong += [
                ~bits(t, f.name).matches(*map(int, f.choices))
                for f in there.fields
                if f.choices is not None and len(f.choices) < 1 << f.width
            ]
            if t is STORE:
                wrong.append(bits(t, "memory") != Memory.VECTOR)
            if t is VECTOR and self.config.selection:
                wrong.append(bits(t, "select").any() & (bits(t, "tiles") != 1))
            m.d.sync += kinds[kind].eq(head[:4] == t.opcode)
            m.d.comb += push.valid.eq(dispatch & kinds[kind] & ~is_malformed)
            with m.If(kinds[kind] & push.ready):
                m.d.comb += pushed.eq(push.valid)
            with m.If(head[:4] == t.opcode):
                m.d.comb += [
                    known.eq(1),
                    malformed.eq(Cat((head & ~known_bits).any(), *wrong).any()),
                    operands.counts.eq(Cat(f.minimum for f in there.variable)),
                ]
                for n, f in enumerate(there.variable):
                    m.d.comb += [
                        operands.fields[n].eq(bits(t, f.name)),
                        operands.selectors[n].eq(bits(t, selector(f.name))),
                    ]
        assert len(BY_OPCODE) == len(INSTRUCTION_TYPES)

        fields = {
            name: head[32 * n : 32 * n + 32] for n, (name, _) in enumerate(DESCRIPTOR_FIELDS)
        }  # the head, read as a descriptor
        fence = Signal(32)
        fail, code = Signal(), Signal(4)
        begin = Signal()  # the descriptor at the head is done with, its program comes
        with m.If(begin):
            m.d.comb += buffer.r_en.eq(1)
            m.d.sync += [
                address.eq(fields["program"]),
                remaining.eq((fields["count"] + pairs) >> pairs),
                second.eq(0),
                left.eq(fields["count"]),
                fence.eq(fields["fence"]),
                operands.present.eq(fields["operands"].any()),
            ]
        m.d.comb += self.busy.eq(1)
        with m.FSM():
            with m.State("WAIT"):
                m.d.comb += self.busy.eq(self.ring_tail != self.ring_head)
                with m.If((self.ring_tail != self.ring_head) & ~self.halt):
                    slot = self.ring_head & (self.ring_size - 1)
                    place = self.ring_base + (slot << (DESCRIPTOR_BYTES - 1).bit_length())
                    if pairs:
                        m.d.sync += second.eq(place[6])
                        place = place & ~INSTRUCTION_BYTES
                    m.d.sync += [
                        address.eq(place),
                        remaining.eq(1),
                        index.eq(0),
                    ]
                    m.next = "READ"
            with m.State("READ"), m.If(buffer.r_rdy):
                with m.If(fields["config_crc"] != self.config.crc):
                    m.d.comb += [fail.eq(1), code.eq(ErrorCode.WRONG_CONFIGURATION)]
                    m.next = "STOP"
                with m.Elif(fields["operands"].any()):
                    m.d.sync += [
                        address.eq(fields["operands"]),
                        remaining.eq(OPERAND_BYTES // fetch_bytes),
                        loading.eq(1),
                    ]
                    m.next = "OPERANDS"
                with m.Else():
                    m.d.comb += begin.eq(1)
                    m.next = "DISPATCH"
            with m.State("OPERANDS"), m.If(remaining == 0):
                m.d.comb += begin.eq(1)
                m.next = "DISPATCH"
            with m.State("DISPATCH"):
                m.d.comb += [dispatching.eq(1), dispatch.eq(vetted & operands.settled & ~self.halt)]
                with m.If(dispatch & ~(is_known & ~is_malformed)):
                    m.d.comb += [fail.eq(1), code.eq(Mux(is_known, ErrorCode.BAD_FIELD, ErrorCode.BAD_OPCODE))]
                    m.next = "STOP"
                with m.If(pushed):
                    m.d.comb += [
                        next_head.eq(1),
                        buffer.r_en.eq(second | (left == 1) if pairs else 1),
                        self.dispatched.eq(1),
                    ]
                    m.d.sync += [index.eq(index + 1), left.eq(left - 1), second.eq(~second if pairs else 0)]
                with m.If(left == 0):
                    m.next = "SETTLE"
            with m.State("SETTLE"), m.If(self.units_idle):
                m.d.sync += [self.fence.eq(fence), self.ring_head.eq(self.ring_head + 1)]
                m.next = "WAIT"
            with m.State("STOP"):
                pass

        leaves, bus_error = want & ~inside, r.valid & r.resp.any()
        m.d.comb += [
            self.error.valid.eq(fail | bus_error | leaves),
            self.error.code.eq(Mux(aligned, ErrorCode.OUT_OF_WINDOW, ErrorCode.MISALIGNED)),
            self.error.address.eq(address),
        ]
        with m.If(bus_error):
            m.d.comb += self.error.code.eq(ErrorCode.BUS_READ)
        with m.Elif(fail):
            m.d.comb += self.error.code.eq(code)
        return m
