"""Which words of ACTIVATION are zero: a bit for each, beside the scratchpad."""

from __future__ import annotations

from amaranth.hdl import Cat, ClockSignal, Instance, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from lockstep_isa.config import CoreConfig

from .interfaces import ADDRESS_BITS, WritePort


def chunk_bits(config: CoreConfig) -> int:
    """Bits of the number of a chunk: R words of ACTIVATION, from a multiple of R on."""
    return ADDRESS_BITS - (config.rows - 1).bit_length()


class ZeroRead(wiring.Signature):
    """Whether a chunk is zero, seen from who asks: ``enable`` Out(1), ``chunk`` Out, its number; ``zero`` In(1) in the
    next cycle."""

    def __init__(self, config: CoreConfig) -> None:
        super().__init__({"enable": Out(1), "chunk": Out(chunk_bits(config)), "zero": In(1)})


class ZeroWords(wiring.Component):
    """A bit for each word of ACTIVATION: it was written as zeros. A chunk is zero if all its bits are set.

    Ports
    -----
    write : In(WritePort of 8 R), what is written into the scratchpad. read : In(ZeroRead).

    A write of cycle 0 is seen by a read of cycle 2, one cycle later than in the scratchpad itself: a unit that waited
    for the writer's token reads in cycle 3 at the earliest. A word that is written in parts, from its first lanes to
    its last ones, is zero once all parts are there and were. Beyond the end of the memory no chunk is zero. Bits of
    words that nobody wrote are as undefined as the words. A reset clears nothing and loses no write: bits and words
    stay as they are, together.
    """

    def __init__(self, config: CoreConfig, words: int) -> None:
        self.config, self.words = config, words
        super().__init__({"write": In(WritePort(8 * config.rows, config.rows, words)), "read": In(ZeroRead(config))})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        rows, depth, banks = self.config.rows, self.config.activation_words, self.words
        row_bits, bank_bits = (rows - 1).bit_length(), (banks - 1).bit_length()
        bits = (depth // rows - 1).bit_length()

        # Cycle 0: which bytes of a word are not zero.
        enable, address = Signal(banks, reset_less=True), Signal(ADDRESS_BITS, reset_less=True)
        begins, ends = Signal(reset_less=True), Signal(reset_less=True)  # of a word: these are its first, last lanes
        busy = [Signal(rows, name=f"busy{n}", reset_less=True) for n in range(banks)]
        mask = self.write.mask
        m.d.sync += enable.eq(self.write.enable)
        with m.If(self.write.enable.any()):
            m.d.sync += [address.eq(self.write.address), begins.eq(mask[0]), ends.eq(mask[-1])]
            for n, lanes in enumerate(busy):
                word = self.write.data.word_select(n, 8 * rows)
                m.d.sync += lanes.eq(Cat(word.word_select(r, 8).any() & mask[r] for r in range(rows)))

        # Cycle 1: the bits. Only VECTOR writes in parts, so LOAD may come between two of them.
        so_far = Signal(reset_less=True)
        zero = [~lanes.any() for lanes in busy]
        if self.config.subwords > 1:
            whole = zero[0] & (begins | so_far)
            with m.If(enable[0] & ~(begins & ends)):
                m.d.sync += so_far.eq(whole)
            zero[0] = whole & ends

        # Word n of a write is bit (address + n) mod R of its chunk, bank by bank in turn.
        found = []
        for bank in range(banks):
            second = (address[0] != bank) if bank_bits else 0  # this bank's is the second word
            at = Signal(ADDRESS_BITS, name=f"at{bank}")
            m.d.comb += at.eq(address + second)
            written = Mux(second, enable[-1], enable[0])
            answer = Signal(rows // banks, name=f"bank{bank}_data")
            m.submodules[f"bank{bank}"] = Instance(
                "lockstep_ram",
                p_WIDTH=rows // banks,
                p_GRANULES=rows // banks,
                p_DEPTH=depth // rows,
                p_ADDRESS_BITS=bits,
                i_clk=ClockSignal(),
                i_write_enable=Mux(written, 1 << at[bank_bits:row_bits], 0)[: rows // banks],
                i_write_address=at[row_bits:][:bits],
                i_write_data=Mux(second, zero[-1], zero[0]).replicate(rows // banks),
                i_read_enable=self.read.enable,
                i_read_address=self.read.chunk[:bits],
                o_read_data=answer,
            )
            found.append(answer)
        inside = Signal()
        with m.If(self.read.enable):
            m.d.sync += inside.eq(~self.read.chunk[bits:].any())
        m.d.comb += self.read.zero.eq(Cat(found).all() & inside)
        return m
