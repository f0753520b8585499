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
    """Most words a cycle that each port of a scratchpad takes, 1 or 2.

    ``read`` may be 4, it then takes 1 or 4; ``drain`` is 0 where STORE does not read.
    """

    write: int = 1
    fill: int = 1
    read: int = 1
    drain: int = 0


def port_words(config: CoreConfig, memory: Memory) -> PortWords:
    """What the units of a core ask of a memory: VECTOR a word a column, LOAD and STORE what one beat holds, MATRIX the
    words of one step."""
    columns, beat = config.columns_per_beat, config.operand_words_per_beat
    # Packed weights come two words a cycle, and meet four activations.
    left, top = (4, 2) if config.packed else (1, 1)
    return {
        Memory.ACTIVATION: PortWords(write=columns, fill=beat, read=left),
        Memory.WEIGHT: PortWords(write=columns, fill=beat, read=top),
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
    written : Out(WritePort), what is written in this cycle, by either writer. There if ``watched``.
    bounds_* : Out(1) each, an access beyond the end in the cycle before, with ``bounds_address`` Out(16).

    There are as many banks as the widest port takes words, and words one behind the other lie in different banks,
    wherever they begin: a port uses the banks that have its words. Four words are read from a multiple of 4 on.

    The data word is shared by both readers: a reader looks at it in the cycle behind its own request.
    Contents are undefined at the start, and so is on silicon a word read in the cycle in which it is written: units
    that share words take turns by tokens.
    """

    def __init__(
        self, width: int, granules: int, depth: int, words: PortWords | None = None, watched: bool = False
    ) -> None:
        words = words or PortWords()
        self.width, self.granules, self.depth, self.drains = width, granules, depth, bool(words.drain)
        self.watched = watched
        self.banks = max(words.write, words.fill, words.read, words.drain)
        # Most words of a write, and of a read that begins anywhere.
        self.written_words = max(words.write, words.fill)
        self.anywhere = max(1 if words.read == 4 else words.read, words.drain)
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
            | ({"written": Out(WritePort(width, granules, self.written_words))} if watched else {})
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        banks = self.banks
        write_address, write_data = Signal(ADDRESS_BITS), Signal(self.written_words * self.width)
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
        if self.watched:
            m.d.comb += [
                self.written.enable.eq(write_words),
                self.written.address.eq(write_address),
                self.written.data.eq(write_data),
                self.written.mask.eq(mask),
            ]
        m.d.comb += [read_address.eq(self.read.address), read_words.eq(self.read.enable)]
        if self.drains:
            m.d.comb += self.drain_ready.eq(~reads)
            with m.If(~reads):
                m.d.comb += [read_address.eq(self.drain.address), read_words.eq(self.drain.enable)]

        # The memory, or its banks: word n of a port is in bank (address + n) mod banks.
        bank_bits = (banks - 1).bit_length()
        bits = (self.depth // banks - 1).bit_length()
        written = [write_data.word_select(n, self.width) for n in range(self.written_words)]
        answers = []
        for bank in range(banks):
            name = f"bank{bank}" if bank_bits else "memory"

            def number(address: Value, bank: int = bank) -> Value:
                """Which word of a port that begins at ``address`` is this bank's."""
                return (bank - address[:bank_bits])[:bank_bits]

            def place(address: Value, bank: int = bank) -> Value:
                """Where this bank has that word: one further on if the port begins in a bank behind this one."""
                further = address[:bank_bits] > bank if bank < banks - 1 else 0
                return (address[bank_bits:] + further)[:bits]

            answer = Signal(self.width, name=f"{name}_data")
            m.submodules[name] = Instance(
                "lockstep_ram",
                p_WIDTH=self.width,
                p_GRANULES=self.granules,
                p_DEPTH=self.depth // banks,
                p_ADDRESS_BITS=bits,
                i_clk=ClockSignal(),
                i_write_enable=Mux((write_words >> number(write_address))[0], mask, 0),
                i_write_address=place(write_address),
                i_write_data=_select(number(write_address)[: self.written_words - 1], written),
                i_read_enable=(read_words >> number(read_address))[0],
                i_read_address=place(read_address),
                o_read_data=answer,
            )
            answers.append(answer)
        words = Cat(answers)
        if bank_bits:
            first = Signal(bank_bits)
            with m.If(read_words.any()):
                m.d.sync += first.eq(read_address[:bank_bits])
            # Other words than these are only read together with all, in the order of the banks.
            turned = [_select(first, answers[n:] + answers[:n]) for n in range(self.anywhere)]
            words = Cat(turned, answers[self.anywhere :])
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
        """Whether one of the enabled words is behind the end, and the address of the first one that is.

        Four words end where two do: none of their addresses is a multiple of 4 but the first.
        """
        bits = (self.depth - 1).bit_length()
        last = address + words[1] if self.banks > 1 else address
        return words.any() & last[bits:].any(), Mux(address[bits:].any(), address, self.depth)


def _select(number: Value, values: list[Value]) -> Value:
    """The one of 1, 2 or 4 values that has this number."""
    for bit in number:
        values = [Mux(bit, odd, even) for even, odd in zip(values[::2], values[1::2], strict=True)]
    return values[0]
