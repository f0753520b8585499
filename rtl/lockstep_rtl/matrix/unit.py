"""The MATRIX unit: hardware loops that stream operand words through the array."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from lockstep_isa.config import CoreConfig
from lockstep_isa.instructions import MATRIX

from ..interfaces import ADDRESS_BITS, AccumulatorPort, ReadPort, instruction_stream
from ..zero_words import ZeroRead
from .accumulators import Accumulators
from .array import PACKED_LEFT, SystolicArray
from .chunk_finder import ChunkFinder, may_skip
from .loops import TileLoops
from .weight_decoder import PACKED_START, WeightDecoder
from .weight_reader import WeightReader, is_packed, takes_four


class MatrixUnit(wiring.Component):
    """Executes MATRIX instructions: tiles over two loops, in K steps each where weights are not packed.

    Ports
    -----
    instruction : In(stream of MATRIX). done : Out(1), the last operand word has been read.
    stalled : Out(1), an instruction is under way but the accumulator queue is full.
    streaming : Out(1), operand words are read in this cycle.
    activation_read, weight_read : Out(ReadPort of 8 R, 8 C); a packed core reads 4 and 2 words at once.
    accumulator : In(AccumulatorPort), for the vector unit.
    zero_read : Out(ZeroRead), skipped : Out(1), a chunk will be passed over; where the core has ``zero_skipping``.

    A tile of S steps takes max(S, C) cycles, tiles and instructions follow each other without a bubble while the queue
    has room. Where S < C the idle cycles come before the words: last words are then never closer than C cycles,
    whatever S the tile before had, and columns of two tiles never meet in the array's ``result``. Results reach the
    queue by themselves: ``done`` frees the operands, not the results.

    A step of packed weights takes 2 k (int8 with 2:4, int4 without N:M) or 4 k, so S = K / 2 or K / 4. Words of such an
    instruction are asked for as soon as the last one of the instruction before has been, if both have one format; where
    its first words were asked for two cycles before that one ends, it follows without a bubble. Otherwise there are
    ``PACKED_START`` idle cycles more in front of its first tile, in which its first weights come. From then on a step
    has its weights from the decoder in the cycle in which it has its activations from the memory: four of them, which
    begin at a multiple of 4, of which int8 with 2:4 and int4 without N:M look at in two steps.

    An instruction that may skip goes chunk by chunk, and behind the last chunk there are depth mod R steps more. In the
    step before a chunk's last one the finder says where the next one is. If it cannot yet, the last step waits.
    """

    def __init__(self, config: CoreConfig) -> None:
        self.config = config
        left, top = (PACKED_LEFT, 2) if config.packed else (1, 1)
        super().__init__(
            {
                "instruction": In(instruction_stream(MATRIX, config)),
                "done": Out(1),
                "stalled": Out(1),
                "streaming": Out(1),
                "activation_read": Out(ReadPort(8 * config.rows, left)),
                "weight_read": Out(ReadPort(8 * config.columns, top)),
                "accumulator": In(AccumulatorPort(config)),
            }
            | ({"zero_read": Out(ZeroRead(config)), "skipped": Out(1)} if config.zero_skipping else {})
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        columns = self.config.columns
        m.submodules.array = array = SystolicArray(self.config)
        m.submodules.accumulators = accumulators = Accumulators(self.config)
        wiring.connect(m, accumulators.read, wiring.flipped(self.accumulator))

        active, started = Signal(), Signal()
        n = self.instruction.payload
        i = Signal.like(n)
        # What is left of this tile's steps; the last one is a 1, and known as such at the start of its cycle: the end
        # of an instruction goes on to the queue and to the tokens of all units.
        words, last_word = Signal(ADDRESS_BITS, name="words_left"), Signal(name="last_word")
        loops = TileLoops("a", "w")
        a, w = loops.words["a"], loops.words["w"]
        # Idle cycles before the steps of each tile, and those that this tile still has to wait.
        most = columns - 1 + (PACKED_START if self.config.packed else 0)
        padding, idle = Signal(range(columns)), Signal(range(most + 1))
        padded, idles = Signal(), Signal()  # they are not zero

        # Steps of a tile, or those until a chunk's end, and k of a step: of the instruction that runs, and of the next.
        steps, stride, next_steps, late = i.depth, 1, n.depth, 0
        # Whether the first weights of the next instruction are there when this one ends.
        carried = Signal(name="carried") if self.config.packed else 0
        if self.config.packed or self.config.zero_skipping:
            steps = Signal(ADDRESS_BITS, name="steps")
        if self.config.packed:
            stride = Signal(range(PACKED_LEFT + 1), name="stride")
            late, four = is_packed(n), takes_four(n)
            next_steps = Mux(late, Mux(four, n.depth >> 2, n.depth >> 1), n.depth)
        # Words to the next ones of both sides, more where chunks are passed over; steps until the tile, or its first
        # chunk, ends.
        a_step, w_step, waits, first_steps = stride, 1, idles, next_steps
        if self.config.zero_skipping:
            m.submodules.finder = finder = ChunkFinder(self.config)
            found = finder.found
            skips, skipping = may_skip(self.config, n), Signal(name="skipping")
            first_steps = Mux(skips, columns, next_steps)
            # A chunk runs, and what follows it is still to be found; that is not there when its last step is next;
            # this is its last step and not the tile's, and these follow: zero chunks, then another one or the rest.
            inside, blind, turn = (Signal(name=n) for n in ("inside", "blind", "turn"))
            zeros, to_rest = Signal.like(found.payload.zeros, name="zeros"), Signal(name="to_rest")
            bits = (columns - 1).bit_length()
            rest = i.depth[:bits]
            leap = Cat(Const(1, bits), zeros)
            a_step, w_step, waits = Mux(turn, leap, stride), Mux(turn, leap, 1), idles | blind

        first = Signal(init=1)
        step, go, tile_end = (Signal(name=n) for n in ("step", "go", "tile_end"))
        m.d.comb += [
            step.eq(active & (started | accumulators.room)),
            go.eq(step & ~waits),
            self.stalled.eq(active & ~started & ~accumulators.room),
            self.streaming.eq(go),
            accumulators.reserve.eq(step & ~started),
            tile_end.eq(go & last_word),
        ]
        with m.If(step):
            m.d.sync += started.eq(1)
        with m.If(idles & step):
            m.d.sync += [idle.eq(idle - 1), idles.eq(idle != 1)]
        with m.If(go):
            m.d.sync += [first.eq(0), words.eq(words - 1), last_word.eq(words == 2), a.eq(a + a_step), w.eq(w + w_step)]
        with m.If(tile_end):
            m.d.sync += [first.eq(1), words.eq(steps), started.eq(0), idle.eq(padding), idles.eq(padded)]
            m.d.sync += last_word.eq(steps == 1)
            loops.advance(m, i)

        begin, end = Signal(), Signal()
        m.d.comb += [
            end.eq(tile_end & loops.last),
            self.done.eq(end),
            self.instruction.ready.eq(~active | end),
            begin.eq(self.instruction.valid & self.instruction.ready),
        ]
        with m.If(end):
            m.d.sync += active.eq(0)
        with m.If(begin):
            short = next_steps < columns
            idles_first = Mux(short, columns - next_steps, 0)
            m.d.sync += [i.eq(n), active.eq(1), words.eq(first_steps), last_word.eq(next_steps == 1)]
            m.d.sync += [padding.eq(idles_first), padded.eq(short)]
            waits_for_weights = late & ~carried if self.config.packed else late
            m.d.sync += [idle.eq(idles_first + Mux(waits_for_weights, PACKED_START, 0))]
            m.d.sync += idles.eq(short | waits_for_weights)
            loops.begin(m, n)
            if self.config.packed or self.config.zero_skipping:
                m.d.sync += steps.eq(first_steps)
            if self.config.packed:
                m.d.sync += stride.eq(Mux(late, Mux(four, 4, 2), 1))

        if self.config.zero_skipping:
            m.d.comb += [
                *(finder.start.eq(begin), finder.next.eq(n), finder.running.eq(i)),
                found.ready.eq((go & inside & (words == 2)) | blind),
                self.skipped.eq(finder.skipped),
            ]
            wiring.connect(m, finder.read, wiring.flipped(self.zero_read))
            with m.If(found.ready):
                ends = found.payload.end & ~rest.any()
                m.d.sync += [blind.eq(~found.valid), turn.eq(found.valid & ~ends), last_word.eq(found.valid & ends)]
                m.d.sync += [zeros.eq(found.payload.zeros), to_rest.eq(found.payload.end)]
            with m.If(go & turn):
                m.d.sync += [turn.eq(0), words.eq(Mux(to_rest, rest, columns)), inside.eq(~to_rest)]
                m.d.sync += last_word.eq(to_rest & (rest == 1))
            with m.If(tile_end):
                m.d.sync += inside.eq(skipping)
            with m.If(begin):
                m.d.sync += [inside.eq(skips), skipping.eq(skips)]

        # The scratchpads answer one cycle later; control waits with them.
        valid, tile_first, tile_last, unsigned = (
            Signal(name=n) for n in ("valid_1", "first_1", "last_1", "unsigned_1")
        )
        m.d.sync += [valid.eq(go), tile_first.eq(first), tile_last.eq(last_word), unsigned.eq(i.unsigned)]
        m.d.comb += [
            array.a.eq(self.activation_read.data),
            array.valid.eq(valid),
            array.first.eq(tile_first),
            array.last.eq(tile_last),
            array.unsigned.eq(unsigned),
            accumulators.result.eq(array.result),
            accumulators.strobe.eq(array.strobe),
        ]
        if not self.config.packed:
            m.d.comb += [
                self.activation_read.enable.eq(go),
                self.activation_read.address.eq(a),
                self.weight_read.enable.eq(go),
                self.weight_read.address.eq(w),
                array.w.eq(self.weight_read.data),
            ]
            return m

        # Packed weights go ahead of the steps through the decoder, which answers as the scratchpads do.
        m.submodules.reader = reader = WeightReader(self.config)
        m.submodules.decoder = decoder = WeightDecoder(self.config)
        packed, packed_1 = Signal(name="packed"), Signal(name="packed_1")
        # The reader has gone on to the next instruction; its first words are asked for; those are in the ring.
        ahead, asked = Signal(name="ahead"), Signal(name="asked")
        early, one_format = Signal(name="early"), Signal(name="one_format")
        m.d.sync += packed_1.eq(packed)
        m.d.comb += [
            one_format.eq(packed & (n.weights == i.weights) & (n.sparsity == i.sparsity)),
            early.eq(active & self.instruction.valid & one_format & reader.ended & ~ahead),
        ]
        with m.If(early):
            m.d.sync += ahead.eq(1)
        with m.If(ahead):
            m.d.sync += [asked.eq(asked | reader.ask[0]), carried.eq(asked)]
        with m.If(begin):
            m.d.sync += [packed.eq(late), ahead.eq(0), asked.eq(0), carried.eq(0)]
        m.d.comb += [
            reader.start.eq(early | (begin & ~carried)),
            reader.next.eq(n),
            reader.steps.eq(next_steps),
            reader.room.eq(decoder.room),
            decoder.start.eq(begin & ~carried),
            decoder.weights.eq(i.weights),
            decoder.sparsity.eq(i.sparsity),
            decoder.ask.eq(reader.ask),
            decoder.words.eq(self.weight_read.data),
            decoder.step.eq(go & packed),
            decoder.upper.eq(a[1]),
            array.more.eq(packed_1),
            array.picks.eq(decoder.picks),
        ]
        with m.If(packed):
            m.d.comb += [
                self.activation_read.enable.eq(go.replicate(PACKED_LEFT)),
                self.activation_read.address.eq(Cat(Const(0, 2), a[2:])),
                self.weight_read.enable.eq(reader.ask),
                self.weight_read.address.eq(reader.address),
            ]
        with m.Else():
            m.d.comb += [
                self.activation_read.enable.eq(go),
                self.activation_read.address.eq(a),
                self.weight_read.enable.eq(go),
                self.weight_read.address.eq(w),
            ]
        m.d.comb += array.w.eq(Mux(packed_1, decoder.w, self.weight_read.data))
        return m
