"""The run-time operands of a program: a block of words on chip, added to the fields of one instruction at a time."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Shape, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from lockstep_isa.instructions import INSTRUCTION_TYPES, OPERANDS

#: Most fields of one instruction that may have an operand; slot n stands for the n-th of them.
SLOTS = max(len(t.variable) for t in INSTRUCTION_TYPES)
OPERAND_BITS = 32
#: Bytes of a block in device memory.
OPERAND_BYTES = OPERANDS * OPERAND_BITS // 8
#: Bits of every count that may have an operand.
(COUNT_BITS,) = {f.width for t in INSTRUCTION_TYPES for f in t.variable if f.minimum}


class OperandAdder(wiring.Component):
    """Keeps a block of operands and adds them to the fields that select them.

    Ports
    -----
    write_enable : In(1) with ``write_data`` : In(8 * bus_bytes), the next beat of the block, behind its last one the
        first beat of the next block. ``write_last`` : Out(1), the beat that is next is the last one.
    present : In(1), the program has a block; without one every operand is zero.
    begin : In(1), in the first cycle of an instruction. From then on until the next ``begin`` stay
        selectors : In(SLOTS of 6), 0 for none, ``fields`` : In(SLOTS of 32), ``counts`` : In(SLOTS), which are counts.
    settled : Out(1), right from the cycle behind ``begin``: sums and ``skip`` stand; n + 3 cycles behind ``begin``
        where n > 0 slots have selectors, in the next one where none has.
    sums : Out(SLOTS of 32), fields with their operands added; the bits of a field are its low ones.
    skip : Out(1), a count became zero.

    The memory has a beat in each word and one port, so operands are read one a cycle. They are added in the next one,
    and counts of zero are looked for in the one behind.
    """

    def __init__(self, bus_bytes: int) -> None:
        self.bus_bytes = bus_bytes
        super().__init__(
            {
                "write_enable": In(1),
                "write_data": In(8 * bus_bytes),
                "write_last": Out(1),
                "present": In(1),
                "begin": In(1),
                "selectors": In(data.ArrayLayout((OPERANDS - 1).bit_length(), SLOTS)),
                "fields": In(data.ArrayLayout(OPERAND_BITS, SLOTS)),
                "counts": In(SLOTS),
                "settled": Out(1),
                "sums": Out(data.ArrayLayout(OPERAND_BITS, SLOTS)),
                "skip": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.block = block = Memory(
            shape=Shape(8 * self.bus_bytes), depth=OPERAND_BYTES // self.bus_bytes, init=[]
        )
        write, read = block.write_port(), block.read_port()
        beat = Signal.like(write.addr)
        m.d.comb += [
            write.en.eq(self.write_enable),
            write.addr.eq(beat),
            write.data.eq(self.write_data),
            self.write_last.eq(beat.all()),
        ]
        m.d.sync += beat.eq(beat + self.write_enable)

        # One bit a slot: has a selector, is still to be read, is read now, is added now, was added a cycle ago.
        changed, reads, choice, adds, added = (
            Signal(SLOTS, name=n) for n in ("changed", "reads", "choice", "adds", "added")
        )
        selectors, fields = ([array[n] for n in range(SLOTS)] for array in (self.selectors, self.fields))
        words_per_beat = 8 * self.bus_bytes // OPERAND_BITS
        word_bits = (words_per_beat - 1).bit_length()
        # Selectors stand in registers while they are gone through: they are far down an instruction's decoding.
        held = [Signal.like(selector, name=f"selector{n}") for n, selector in enumerate(selectors)]
        chosen, word = Signal(range(OPERANDS)), Signal(range(words_per_beat))
        total = Signal(OPERAND_BITS)
        m.d.comb += [
            choice.eq(reads & (~reads + 1)[:SLOTS]),
            chosen.eq(_select(choice, held)),
            read.en.eq(choice.any()),
            read.addr.eq(chosen[word_bits:]),
            total.eq(_select(adds, fields) + Mux(self.present, read.data.word_select(word, OPERAND_BITS), 0)),
            self.settled.eq(~Cat(reads, adds, added).any()),
        ]
        m.d.sync += [reads.eq(reads & ~choice), adds.eq(choice), added.eq(adds), word.eq(chosen[:word_bits])]
        for n in range(SLOTS):
            result = Signal(OPERAND_BITS, name=f"sum{n}")
            m.d.comb += self.sums[n].eq(Mux(changed[n], result, fields[n]))
            with m.If(adds[n]):
                m.d.sync += result.eq(total)
            with m.If(added[n] & self.counts[n] & (result[:COUNT_BITS] == 0)):
                m.d.sync += self.skip.eq(1)
        with m.If(self.begin):
            found = Cat(s.any() for s in selectors)
            m.d.sync += [changed.eq(found), reads.eq(found), self.skip.eq(0)]
            m.d.sync += [register.eq(selector) for register, selector in zip(held, selectors, strict=True)]
        return m


def _select(choice: Value, values: list[Value]) -> Value:
    """The value whose bit of the one-hot ``choice`` is set; 0 where none is."""
    result: Value = Mux(choice[0], values[0], 0)
    for n, value in enumerate(values[1:], 1):
        result = result | Mux(choice[n], value, 0)
    return result
