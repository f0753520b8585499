"""The reader of packed weights: ahead of the steps, tile behind tile."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out
from lockstep_isa.config import CoreConfig
from lockstep_isa.instructions import MATRIX, Sparsity, Weights

from ..interfaces import ADDRESS_BITS, instruction_layout
from .loops import TileLoops


def is_packed(i: data.View) -> Value:
    """Whether the weights of a MATRIX instruction are packed: not int8, or not all there."""
    return (i.weights != Weights.INT8) | (i.sparsity != Sparsity.DENSE)


def takes_four(i: data.View) -> Value:
    """Whether a step of a packed instruction takes four k, and not two."""
    sparse = i.sparsity != Sparsity.DENSE
    return (i.sparsity == Sparsity.ONE_OF_FOUR) | (sparse & (i.weights != Weights.INT8))


class WeightReader(wiring.Component):
    """Asks for the words of all tiles of an instruction, two a cycle, and not for one more.

    Ports
    -----
    start : In(1) with ``next`` : In(MATRIX) and ``steps`` : In(16), those of a tile: go on with this instruction; for
        one that is not packed it asks for nothing. What is left of the one before is forgotten.
    room : In(1), of the decoder. ask : Out(2) with ``address`` : Out(16), to the memory and to the decoder.
    ended : Out(1), nothing is left behind what is asked for in this cycle.

    The first words are asked for in the cycle behind ``start``. How many a tile has is known one cycle later only:
    it has at least 5, so the first two are never its last. A tile with an odd number of words ends with one word.
    """

    def __init__(self, config: CoreConfig) -> None:
        layout = instruction_layout(MATRIX, config)
        super().__init__(
            {
                "start": In(1),
                "next": In(layout),
                "steps": In(ADDRESS_BITS),
                "room": In(1),
                "ask": Out(2),
                "address": Out(ADDRESS_BITS),
                "ended": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        i, steps = Signal.like(self.next, name="i"), Signal.like(self.steps, name="steps_of_tile")
        loops = TileLoops("w")
        word = loops.words["w"]

        # Words of a tile: values, and positions for each 4 of them, and multipliers for each group.
        int4, sparse = i.weights != Weights.INT8, i.sparsity != Sparsity.DENSE
        two = i.sparsity == Sparsity.TWO_OF_FOUR
        values = Mux(int4 & (i.sparsity == Sparsity.ONE_OF_FOUR), steps >> 1, steps)
        positions = Mux(sparse, Mux(int4 & two, steps >> 1, steps >> 2), 0)
        # A group has 32 k and more, of which a step takes 2, or 4 with N:M.
        groups = Mux(sparse, steps, steps >> 1) >> (i.weights + 2)
        words = Signal(ADDRESS_BITS)
        m.d.comb += words.eq(values + positions + Mux(int4, groups, 0))
        # Pairs of words: the one that is next, the last one, and whether that has two words.
        pair, last_pair, whole = Signal(ADDRESS_BITS - 1), Signal(ADDRESS_BITS - 1), Signal()
        begins, last = Signal(), Signal()
        m.d.sync += begins.eq(self.start)
        with m.If(begins):
            m.d.sync += [last_pair.eq((words - 1) >> 1), whole.eq(~words[0])]

        reading, asks = Signal(), Signal()
        m.d.comb += [
            asks.eq(reading & self.room),
            last.eq((pair == last_pair) & pair.any()),
            self.ask.eq(Cat(asks, asks & (~last | whole))),
            self.address.eq(word),
            self.ended.eq(~reading | (asks & last & loops.last)),
        ]
        with m.If(asks):
            m.d.sync += [pair.eq(pair + 1), word.eq(word + 2)]
            with m.If(last):
                m.d.sync += [pair.eq(0), reading.eq(~loops.last)]
                loops.advance(m, i)
        with m.If(self.start):
            m.d.sync += [reading.eq(is_packed(self.next)), pair.eq(0), i.eq(self.next), steps.eq(self.steps)]
            loops.begin(m, self.next)
        return m
