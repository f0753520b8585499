"""An on-chip memory: one read and one write port, each shared between the datapath and a transfer unit."""

from __future__ import annotations

from dataclasses import dataclass

from amaranth.hdl import Cat, ClockSignal, Instance, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from lockstep_isa.config import CoreConfig
from lockstep_isa.instructions import Memory

from .interfaces import ADDRESS_BITS, ReadPort, WritePort


def fill_stream(width: int, words: int = 1) -> stream.Signature:
    """What LOAD writes: one word, or two one behind the other, of which ``enable`` tells as in a ``WritePort``."""
    return stream.Signature(data.StructLayout({"address": ADDRESS_BITS, "data": words * width, "enable": words}))


@dataclass(frozen=True)
class PortWords:
    """Words a cycle that each port of a scratchpad takes, 1 or 2; ``drain`` 0 where STORE does not read it."""

    write: int = 1
    fill: int = 1
    read: int = 1
    drain: int = 0


def port_words(config: CoreConfig, memory: Memory) -> PortWords:
    """What the units of a core ask of a memory: VECTOR a word a column, LOAD and STORE what one beat holds."""
    columns, beat = config.columns_per_beat, config.operand_words_per_beat
    return {
        Memory.ACTIVATION: PortWords(write=columns, fill=beat),
        Memory.WEIGHT: PortWords(write=columns, fill=beat),
        Memory.VECTOR: PortWords(write=columns, read=columns, drain=beat),
        Memory.PARAMETER: PortWords(write=columns, read=columns),
    }[memory]


class Scratchpad(wiring.Component):
    """A memory of ``depth`` words of ``width`` bits with two readers and two writers.

    Ports
    -----
    write : In(WritePort), the vector unit; always taken. write_idle : In(1), ``write`` is not enabled, from a
        register of its own: ``write`` steers the whole memory, and what LOAD does next hangs on this.
    fill : In(stream of address, data, enable), LOAD; waits while ``write`` is enabled.
    read : In(ReadPort), the datapath; always served, answer one cycle later.
    drain : In(ReadPort) with ``drain_ready`` Out(1), STORE; served in cycles without ``read``. Not there for 0 words.
    bounds_* : Out(1) each, an access beyond the end in the cycle before, with ``bounds_address`` Out(16).

    Where a port takes two words, even and odd words lie in banks of their own: of two words one behind the other each
    bank has one, wherever they begin. A port that takes one word then uses the bank that has it.

    The data word is shared by both readers: a reader looks at it in the cycle behind its own request.
    Contents are undefined at the start, and so is on silicon a word read in the cycle in which it is written: units
    that share words take turns by tokens.
    """

    def __init__(self, width: int, granules: int, depth: int, words: PortWords | None = None) -> None:
        words = words or PortWords()
        self.width, self.granules, self.depth, self.drains = width, granules, depth, bool(words.drain)
        self.banks = max(words.write, words.fill, words.read, words.drain)
        super().__init__(
            {
                "write": In(WritePort(width, granules, words.write)),
                "write_idle": In(1),
                "fill": In(fill_stream(width, words.fill)),
                "read": In(ReadPort(width, words.read)),
                "bounds_write": Out(1),
                "bounds_fill": Out(1),
                "bounds_read": Out(1),
                "bounds_address": Out(ADDRESS_BITS),
            }
            | (
                {"drain": In(ReadPort(width, words.drain)), "drain_ready": Out(1), "bounds_drain": Out(1)}
                if words.drain
                else {}
            )
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        banks = self.banks
        write_address, write_data = Signal(ADDRESS_BITS), Signal(banks * self.width)
        write_words, mask = Signal(banks), Signal(self.granules)
        read_address, read_words = Signal(ADDRESS_BITS), Signal(banks)

        # Who writes, who reads.
        writes, reads = self.write.enable.any(), self.read.enable.any()
        fill = self.fill.payload
        m.d.comb += [
            self.fill.ready.eq(self.write_idle),
            write_address.eq(fill.address),
            write_data.eq(fill.data),
            write_words.eq(Mux(self.fill.valid, fill.enable, 0)),
            mask.eq(~0),
        ]
        with m.If(writes):
            m.d.comb += [
                write_address.eq(self.write.address),
                write_data.eq(self.write.data),
                write_words.eq(self.write.enable),
                mask.eq(self.write.mask),
            ]
        m.d.comb += [read_address.eq(self.read.address), read_words.eq(self.read.enable)]
        if self.drains:
            m.d.comb += self.drain_ready.eq(~reads)
            with m.If(~reads):
                m.d.comb += [read_address.eq(self.drain.address), read_words.eq(self.drain.enable)]

        # The memory, or its even and odd words. A port's first word is in bank 1 where its address is odd.
        bank_bits = banks - 1
        write_odd, read_odd = ((a[0] & bank_bits)[:1] for a in (write_address, read_address))
        swapped = Cat(write_data[self.width :], write_data[: self.width])
        bank_data = Mux(write_odd, swapped, write_data)
        answers = []
        for bank in range(banks):
            name = f"bank{bank}" if bank_bits else "memory"
            depth = self.depth // banks
            bits = (depth - 1).bit_length()

            def place(address: Value, bank: int = bank, bits: int = bits) -> Value:
                """Where this bank has the word at ``address`` or, where that is the other bank's, the one behind."""
                return (address[bank_bits:] + (address[0] if bank < bank_bits else 0))[:bits]

            answer = Signal(self.width, name=f"{name}_data")
            m.submodules[name] = Instance(
                "lockstep_ram",
                p_WIDTH=self.width,
                p_GRANULES=self.granules,
                p_DEPTH=depth,
                p_ADDRESS_BITS=bits,
                i_clk=ClockSignal(),
                i_write_enable=Mux((write_words >> (write_odd ^ bank))[0], mask, 0),
                i_write_address=place(write_address),
                i_write_data=bank_data[bank * self.width : (bank + 1) * self.width],
                i_read_enable=(read_words >> (read_odd ^ bank))[0],
                i_read_address=place(read_address),
                o_read_data=answer,
            )
            answers.append(answer)
        words = Cat(answers)
        if bank_bits:
            answer_odd = Signal()
            with m.If(read_words.any()):
                m.d.sync += answer_odd.eq(read_odd)
            words = Mux(answer_odd, Cat(reversed(answers)), words)
        m.d.comb += self.read.data.eq(words)
        if self.drains:
            m.d.comb += self.drain.data.eq(words)

        bits = (self.depth - 1).bit_length()
        if bits < ADDRESS_BITS:
            write_beyond, write_at = self._beyond(write_address, write_words)
            read_beyond, read_at = self._beyond(read_address, read_words)
            m.d.sync += [
                self.bounds_write.eq(writes & write_beyond),
                self.bounds_fill.eq(~writes & write_beyond),
                self.bounds_read.eq(reads & read_beyond),
                self.bounds_address.eq(Mux(write_beyond, write_at, read_at)),
            ]
            if self.drains:
                m.d.sync += self.bounds_drain.eq(~reads & read_beyond)
        return m

    def _beyond(self, address: Value, words: Value) -> tuple[Value, Value]:
        """Whether one of the enabled words is behind the end, and the address of the first one that is."""
        bits = (self.depth - 1).bit_length()
        last = address + words[1] if self.banks == 2 else address
        return words.any() & last[bits:].any(), Mux(address[bits:].any(), address, self.depth)
