"""Packed weights between the memory and the array: words of a tile in, the operands of one step after the other out."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from lockstep_isa.config import CoreConfig
from lockstep_isa.instructions import Sparsity, Weights

from .array import PACKED_TOP

#: Words that wait for their steps or are on the way from the memory.
RING_WORDS = 8
#: Cycles from the one in which the first words of an instruction are asked for to its first step.
PACKED_START = 3
_MULTIPLIER_BITS = 5
_POSITION_BITS = 2


class WeightDecoder(wiring.Component):
    """What ``lockstep_isa.weights.stream`` says of packed words, step by step.

    Ports
    -----
    start : In(1), an instruction begins; what is left of the one before is forgotten. One of the same format needs none
        where its first words were asked for two cycles before the last step of the one before: its tiles are further
        ones then.
    weights : In(Weights), sparsity : In(Sparsity), the format, from the cycle behind ``start`` on.
    ask : In(2), words that the memory is asked for, of which bit 1 is only set together with bit 0.
    words : In(2 of 8 C), its answer, in the cycle behind. room : Out(1), two words may be asked for.
    step : In(1), the next step is taken. upper : In(1), with it: int4 without N:M takes activations 2 and 3 of four.
    w : Out(2 of 8 C), picks : Out(2 of C of 2), in the cycle behind: a step's operands as the array takes them. A
        second weight that is none is 0.

    Cycle by cycle, if words are asked for whenever there is room, tile behind tile::

        cycle 0   ``start``
        cycle 1   the first words are asked for
        cycle 2   ... they are there and go into the ring
        cycle 3   int4: the first word leaves the ring, multipliers
        cycle 4   from now on steps may be taken, all in a row or not; one takes its value word, and with it
                  - if its value is the first of four kept ones: their positions, which stand in front of it
                  - if its value is the last of a group: the multipliers of the next one, which stand behind it
        cycle 5   the first step's operands are in ``w`` and ``picks``

    Never both, so the ring has two banks, for even and odd words, and shows one value word and one side word at a time.
    A value word of int4 with 1:4 is looked at in two steps. No step takes more than two words, and it takes less
    than two on average: the ring never runs empty. Behind the last step in front of a ``start`` a word that is not
    there may be taken for multipliers; nothing comes of it.
    """

    def __init__(self, config: CoreConfig) -> None:
        self.config = config
        super().__init__(
            {
                "start": In(1),
                "weights": In(Weights),
                "sparsity": In(Sparsity),
                "ask": In(2),
                "words": In(2 * 8 * config.columns),
                "room": Out(1),
                "step": In(1),
                "upper": In(1),
                "w": Out(PACKED_TOP * 8 * config.columns),
                "picks": Out(PACKED_TOP * _POSITION_BITS * config.columns),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        columns = self.config.columns
        width = 8 * columns

        # The format.
        int4, two_of_four, one_of_four, sparse = (
            Signal(name=n) for n in ("int4", "two_of_four", "one_of_four", "sparse")
        )
        m.d.comb += [
            int4.eq(self.weights != Weights.INT8),
            two_of_four.eq(self.sparsity == Sparsity.TWO_OF_FOUR),
            one_of_four.eq(self.sparsity == Sparsity.ONE_OF_FOUR),
            sparse.eq(two_of_four | one_of_four),
        ]
        # Where in its group the next step is: steps are 2 k of int4 without N:M, 4 k with it. A group has 8 to 64.
        place = Signal(6)
        longer = Signal(3)  # whether it has more than 8, 16, 32
        m.d.comb += [
            longer[0].eq(~sparse | (self.weights != Weights.INT4_32)),
            longer[1].eq(Mux(sparse, self.weights == Weights.INT4_128, self.weights != Weights.INT4_32)),
            longer[2].eq(~sparse & (self.weights == Weights.INT4_128)),
        ]
        # What it takes.
        positions_due, group_ends, value_ends = (Signal(name=n) for n in ("positions_due", "group_ends", "value_ends"))
        m.d.comb += [
            positions_due.eq(sparse & ~place[0] & (~place[1] | (int4 & two_of_four))),
            group_ends.eq(int4 & (place | Cat(0, 0, 0, ~longer)).all()),
            value_ends.eq(~(int4 & one_of_four) | place[0]),
        ]
        # The first multipliers are taken without a step, in the first cycle in which the ring has a word.
        answered, begun, primed, priming = (Signal(name=n) for n in ("answered", "begun", "primed", "priming"))
        m.d.comb += priming.eq(begun & ~primed)
        take_side, take_value = Signal(), Signal()
        m.d.comb += [
            take_side.eq(Mux(self.step, positions_due | group_ends, priming & int4)),
            take_value.eq(self.step & value_ends),
        ]
        with m.If(self.step):
            m.d.sync += place.eq(place + 1)

        # The ring. Word n of an answer goes to the bank of the first free place, or to the other one.
        arrives = Signal(2)
        m.d.sync += [arrives.eq(self.ask), begun.eq(begun | answered), primed.eq(begun)]
        m.d.comb += answered.eq(arrives[0])
        fill_odd, head_odd = Signal(), Signal()  # bank of the first free place, and of the oldest word
        both = take_side & take_value
        front_side = Signal()  # the side word is in front of the value word
        value_odd = Signal()
        m.d.comb += [
            front_side.eq(positions_due | ~primed),
            value_odd.eq(head_odd ^ front_side),
        ]
        banks = []
        for odd in range(2):
            m.submodules[f"bank{odd}"] = memory = Memory(shape=width, depth=RING_WORDS // 2, init=[])
            write, read = memory.write_port(), memory.read_port(domain="comb")
            free, head = (
                Signal(range(RING_WORDS // 2), name=f"free{odd}"),
                Signal(range(RING_WORDS // 2), name=f"head{odd}"),
            )
            second = fill_odd ^ odd  # this bank takes the second word
            m.d.comb += [
                write.en.eq(Mux(second, arrives[1], arrives[0])),
                write.addr.eq(free),
                write.data.eq(Mux(second, self.words[width:], self.words[:width])),
                read.addr.eq(head),
            ]
            m.d.sync += [
                free.eq(free + write.en),
                head.eq(head + (both | ((take_side | take_value) & (head_odd == odd)))),
            ]
            with m.If(self.start):
                m.d.sync += [free.eq(0), head.eq(0)]
            banks.append(read.data)
        value, side = Signal(width), Signal(width)
        m.d.comb += [
            value.eq(Mux(value_odd, banks[1], banks[0])),
            side.eq(Mux(value_odd, banks[0], banks[1])),
        ]
        level = Signal(range(RING_WORDS + 1))  # what is asked for counts
        m.d.sync += [
            fill_odd.eq(fill_odd ^ arrives[0] ^ arrives[1]),
            head_odd.eq(head_odd ^ take_side ^ take_value),
            level.eq(level + self.ask[0] + self.ask[1] - take_side - take_value),
        ]
        m.d.comb += self.room.eq(level <= RING_WORDS - 2)
        with m.If(self.start):
            m.d.sync += [register.eq(0) for register in (place, arrives, begun, primed, fill_odd, head_odd, level)]

        # Bytes, the same for each channel.
        for c in range(columns):
            byte, beside = value.word_select(c, 8), side.word_select(c, 8)
            multiplier = Signal(_MULTIPLIER_BITS, name=f"multiplier{c}")
            with m.If(priming | (self.step & group_ends)):
                m.d.sync += multiplier.eq(beside)
            # Positions that are still to come; the next one, or the next two, in the low bits.
            waiting = Signal(3 * _POSITION_BITS, name=f"positions{c}")
            positions = Signal(4 * _POSITION_BITS, name=f"next_positions{c}")
            m.d.comb += positions.eq(Mux(positions_due, beside, waiting))

            # The byte is lower + 16 * upper: a lower one below 0 has borrowed.
            lower, upper = byte[:4], (byte[4:] + byte[3])[:4]
            first = Mux(one_of_four & place[0], upper, lower)
            products = [(n.as_signed() * multiplier)[:8] for n in (first, upper)]
            picks = [self.picks.word_select(n * columns + c, _POSITION_BITS) for n in range(PACKED_TOP)]
            with m.If(self.step):
                m.d.sync += [
                    waiting.eq(Mux(int4 & two_of_four, positions[4:], positions[2:])),
                    self.w.word_select(c, 8).eq(Mux(int4, products[0], byte)),
                    self.w.word_select(columns + c, 8).eq(Mux(int4 & ~one_of_four, products[1], 0)),
                    picks[0].eq(Mux(sparse, positions[:2], Cat(0, self.upper))),
                    picks[1].eq(Mux(sparse, positions[2:4], Cat(1, self.upper))),
                ]
        return m
