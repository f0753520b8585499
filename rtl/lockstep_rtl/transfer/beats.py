"""Words of the vector scratchpad on their way to the bus, as beats with their strobes."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from lockstep_isa.config import CoreConfig
from lockstep_isa.instructions import STORE

#: Bits of a lane's number, as a STORE has it.
LANE_BITS = next(field.width for field in STORE.fields if field.name == "lane")


def lanes_layout(config: CoreConfig) -> dict[str, int]:
    """Fields of a STORE that say which lanes of the words of its first row are written."""
    return {"lane": LANE_BITS, **({"lane_only": 1} if config.selection else {})}


def word_layout(config: CoreConfig) -> data.StructLayout:
    """What is known of a word when it is requested.

    ``bytes``: it is packed. ``pair``: it is two words of bytes, which share a beat. ``first_row``: lanes below ``lane``
    are not written and, with ``lane_only``, none above it. ``last``: of its STORE.
    """
    return data.StructLayout({"bytes": 1, "pair": 1, "first_row": 1, **lanes_layout(config), "last": 1})


def beat_layout(config: CoreConfig) -> data.StructLayout:
    """One beat of write data and a strobe for each of its bytes."""
    return data.StructLayout({"data": 8 * config.bus_bytes, "strb": config.bus_bytes})


class BeatBuffer(wiring.Component):
    """A ring of two words; words of bytes lie in it several to a word.

    Ports
    -----
    word : In(stream of :func:`word_layout`). A word that is taken has its place, and ``data`` In(32 R words of a beat)
        is what the scratchpad answers in the cycle behind.
    beat : Out(stream of :func:`beat_layout`), from the cycle behind that answer on.

    Places are looked at out of registers, so nothing in front of ``word`` depends on ``beat.ready``. A place that is
    free in one cycle has its next beat three cycles later at the earliest: with two words of at least two beats, or at
    least four words of bytes, the beats still follow each other without a gap.
    """

    def __init__(self, config: CoreConfig) -> None:
        self.config = config
        super().__init__(
            {
                "word": In(stream.Signature(word_layout(config))),
                "data": In(32 * config.rows * config.operand_words_per_beat),
                "beat": Out(stream.Signature(beat_layout(config))),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config = self.config
        rows, bus_bytes = config.rows, config.bus_bytes
        beats, byte_beats = config.beats_per_vector_word, max(1, rows // bus_bytes)
        groups = beats // byte_beats  # words of bytes in the place of a word
        slots = [Signal(beat_layout(config), name=f"slot{n}") for n in range(2 * beats)]
        full = [Signal(beats, name=f"full{half}") for half in range(2)]
        # Behind this beat the half has none that belongs to the words before.
        leaves = [Signal(beats, name=f"leaves{half}") for half in range(2)]

        # A word takes a place: half of the ring or, packed, a group of beats of the half.
        half, group = Signal(), Signal(range(groups))
        taken = Signal()
        free = [
            Mux(
                self.word.payload.bytes,
                ~Cat(full[h][g * byte_beats : (g + 1) * byte_beats].any() for g in range(groups)),
                ~full[h].any().replicate(groups),
            )
            for h in range(2)
        ]
        half_ends = Signal()
        m.d.comb += [
            self.word.ready.eq((Mux(half, free[1], free[0]) >> group)[0]),
            taken.eq(self.word.valid & self.word.ready),
            # The next STORE may be one of whole words: it begins with a half.
            half_ends.eq(~self.word.payload.bytes | self.word.payload.last | (group == groups - 1)),
        ]
        answered, word = Signal(), Signal(word_layout(config))
        to_half, to_group, to_ends = Signal(), Signal(range(groups)), Signal()
        m.d.sync += answered.eq(taken)
        with m.If(taken):
            m.d.sync += [
                group.eq(Mux(half_ends, 0, group + 1)),
                half.eq(half ^ half_ends),
                *(word.eq(self.word.payload), to_half.eq(half), to_group.eq(group), to_ends.eq(half_ends)),
            ]

        # The answer is cut into beats.
        written = [word.lane <= lane for lane in range(rows)]
        if config.selection:
            written = [Mux(word.lane_only, word.lane == lane, above) for lane, above in enumerate(written)]
        lanes = Cat(~word.first_row | lane for lane in written)
        packed = Cat(self.data[32 * r : 32 * r + 8] for r in range(rows * config.operand_words_per_beat))
        packed_lanes = Cat(lanes, lanes & word.pair.replicate(rows))
        for n in range(beats):
            at = n % byte_beats
            beat = Signal(beat_layout(config), name=f"beat{n}")
            whole = self.data.word_select(n, 8 * bus_bytes)
            whole_lanes = Cat(lanes[(n * bus_bytes + b) // 4] for b in range(bus_bytes))
            m.d.comb += [
                beat.data.eq(Mux(word.bytes, packed.word_select(at, 8 * bus_bytes), whole)),
                beat.strb.eq(Mux(word.bytes, packed_lanes.word_select(at, bus_bytes), whole_lanes)),
            ]
            for h in range(2):
                with m.If(answered & (to_half == h) & (~word.bytes | (to_group == n // byte_beats))):
                    last = to_ends if at == byte_beats - 1 else 0
                    m.d.sync += [
                        slots[h * beats + n].eq(beat),
                        full[h][n].eq(1),
                        leaves[h][n].eq(Mux(word.bytes, last, n == beats - 1)),
                    ]

        # Beats leave in the order in which they came.
        out_half, out_beat = Signal(), Signal(range(beats))
        sent = Signal()
        m.d.comb += sent.eq(self.beat.valid & self.beat.ready)
        for h in range(2):
            with m.If(out_half == h), m.Switch(out_beat):
                for n in range(beats):
                    with m.Case(n):
                        m.d.comb += [self.beat.valid.eq(full[h][n]), self.beat.payload.eq(slots[h * beats + n])]
                        with m.If(sent):
                            m.d.sync += full[h][n].eq(0)
                            m.d.sync += [
                                out_beat.eq(Mux(leaves[h][n], 0, n + 1)),
                                out_half.eq(out_half ^ leaves[h][n]),
                            ]
        return m
