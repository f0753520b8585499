"""The STORE unit: the vector scratchpad to device memory."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.lib.wiring import In, Out
from lockstep_isa.config import CoreConfig
from lockstep_isa.errors import ErrorCode
from lockstep_isa.instructions import STORE

from ..axi import WriteMaster
from ..interfaces import ADDRESS_BITS, ReadPort, instruction_stream
from .bursts import BurstSplitter, UnitError, Window

#: Bursts announced and not answered at once.
OUTSTANDING_BURSTS = 4


class StoreUnit(wiring.Component):
    """Executes STORE instructions one at a time.

    Ports
    -----
    instruction : In(stream of STORE). done : Out(1), the memory has acknowledged the last burst.
    stalled : Out(1), waiting for the scratchpad or the bus.
    read : Out(ReadPort of 32 R) with ``read_ready`` In(1): words of the vector scratchpad, when it has time; as many
        at once as a beat holds words of bytes.
    bus : Out(WriteMaster). window : In(Window). halt : In(1), announce no burst. error : Out(UnitError).
    outstanding : Out(1), bursts are under way.

    A word of N beats takes N + 2 cycles: request, answer, N beats. Results are a small part of a model's traffic,
    so the two cycles are not hidden. With ``bytes`` a word has a quarter of the beats: its lanes' low bytes are packed
    when it is taken; where a beat is wider than such a word, it takes two, which count as one word of one beat. Lanes
    that are not to be written have their strobes off, and so has what a row lacks of its last beat; their beats are
    sent all the same.
    """

    def __init__(self, config: CoreConfig) -> None:
        self.config = config
        super().__init__(
            {
                "instruction": In(instruction_stream(STORE)),
                "done": Out(1),
                "stalled": Out(1),
                "read": Out(ReadPort(32 * config.rows, config.operand_words_per_beat)),
                "read_ready": In(1),
                "bus": Out(WriteMaster(config.bus_bytes)),
                "window": In(Window()),
                "halt": In(1),
                "error": Out(UnitError()),
                "outstanding": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config = self.config
        beats, byte_beats = config.beats_per_vector_word, max(1, config.rows // config.bus_bytes)
        byte_words = config.operand_words_per_beat
        m.submodules.splitter = splitter = BurstSplitter(config)
        m.submodules.lengths = lengths = SyncFIFOBuffered(width=8, depth=OUTSTANDING_BURSTS)
        wiring.connect(m, wiring.flipped(self.window), splitter.window)
        aw, w, b = self.bus.aw, self.bus.w, self.bus.b

        active = Signal()
        i = Signal.like(self.instruction.payload)
        m.d.comb += self.instruction.ready.eq(~active & splitter.block.ready & ~self.halt)
        accept = self.instruction.valid & self.instruction.ready
        n = self.instruction.payload
        m.d.comb += [
            splitter.block.valid.eq(accept),
            splitter.block.payload.address.eq(n.address),
            splitter.block.payload.stride.eq(n.stride),
            splitter.block.payload.rows.eq(n.rows),
            splitter.block.payload.beats.eq(
                Mux(
                    n.bytes,
                    (n.words << (byte_beats - 1).bit_length()) + (byte_words - 1) >> (byte_words - 1).bit_length(),
                    n.words << (beats - 1).bit_length(),
                )
            ),
        ]

        # Addresses: each burst's length goes to the data side.
        bursts = Signal(range(2 * OUTSTANDING_BURSTS + 1))
        shown, burst_ok = Signal(), Signal()
        m.d.comb += [
            burst_ok.eq(shown | (lengths.w_rdy & (bursts != 2 * OUTSTANDING_BURSTS) & ~self.halt)),
            aw.valid.eq(splitter.burst.valid & burst_ok),
            splitter.burst.ready.eq(aw.ready & burst_ok),
            aw.addr.eq(splitter.burst.payload.addr),
            aw.len.eq(splitter.burst.payload.len),
            lengths.w_en.eq(aw.valid & aw.ready),
            lengths.w_data.eq(aw.len),
            b.ready.eq(1),
            self.outstanding.eq(bursts.any() | aw.valid),
        ]
        m.d.sync += [
            shown.eq(aw.valid & ~aw.ready),
            bursts.eq(bursts + (aw.valid & aw.ready) - (b.valid & b.ready)),
        ]

        # Data: request a word, take it, send its beats.
        word = Signal(32 * config.rows)
        local, row_local = Signal(ADDRESS_BITS), Signal(ADDRESS_BITS)
        words, rows = Signal(16), Signal(16)
        beat = Signal(range(max(2, beats)))
        in_burst = Signal(8)
        sent = Signal()
        # One strobe for each lane of ``word``, of both words where there are two; ``first_row`` as long as words of the
        # first row are requested.
        written, first_row = Signal(config.rows * byte_words), Signal()
        packed = Cat(self.read.data[32 * r : 32 * r + 8] for r in range(config.rows * byte_words))
        lanes = Cat(~first_row | (i.lane <= lane) for lane in range(config.rows))
        pair = Signal()  # this request is for two words
        m.d.comb += pair.eq((byte_words == 2) & i.bytes & (words != 1))
        wide = Cat(written[b // 4] for b in range(config.bus_bytes))
        m.d.comb += [
            self.read.address.eq(local),
            w.data.eq(word[: 8 * config.bus_bytes]),
            w.strb.eq(Mux(i.bytes, written[: config.bus_bytes], wide)),
            w.last.eq(in_burst == lengths.r_data),
            sent.eq(w.valid & w.ready),
            lengths.r_en.eq(sent & w.last),
        ]
        with m.If(sent):
            m.d.sync += [word.eq(word >> (8 * config.bus_bytes)), beat.eq(beat + 1)]
            m.d.sync += written.eq(Mux(i.bytes, written >> config.bus_bytes, written >> (config.bus_bytes // 4)))
            m.d.sync += in_burst.eq(Mux(w.last, 0, in_burst + 1))
        with m.FSM():
            with m.State("ACCEPT"), m.If(accept):
                m.d.sync += [i.eq(n), local.eq(n.local), row_local.eq(n.local), words.eq(n.words), rows.eq(n.rows)]
                m.d.sync += [active.eq(1), first_row.eq(1)]
                m.next = "REQUEST"
            with m.State("REQUEST"):
                m.d.comb += [self.read.enable.eq(Cat(1, pair)), self.stalled.eq(~self.read_ready)]
                with m.If(self.read_ready):
                    m.next = "TAKE"
            with m.State("TAKE"):
                m.d.sync += [beat.eq(0), local.eq(local + 1 + pair), words.eq(words - 1 - pair)]
                m.d.sync += [
                    word.eq(Mux(i.bytes, packed, self.read.data)),
                    written.eq(Cat(lanes, Mux(pair, lanes, 0))),
                ]
                m.next = "SEND"
            with m.State("SEND"):
                m.d.comb += [w.valid.eq(lengths.r_rdy), self.stalled.eq(~sent)]
                with m.If(sent & (beat == Mux(i.bytes, byte_beats - 1, beats - 1))):
                    m.next = "REQUEST"
                    with m.If(words == 0):
                        m.d.sync += [
                            words.eq(i.words),
                            rows.eq(rows - 1),
                            first_row.eq(0),
                            local.eq(row_local + i.local_stride),
                            row_local.eq(row_local + i.local_stride),
                        ]
                        with m.If(rows == 1):
                            m.next = "ACKNOWLEDGE"
            with m.State("ACKNOWLEDGE"):
                m.d.comb += self.stalled.eq(bursts.any())
                with m.If(~bursts.any()):
                    m.d.comb += self.done.eq(1)
                    m.d.sync += active.eq(0)
                    m.next = "ACCEPT"

        bus_error = b.valid & b.resp.any()
        m.d.comb += [
            self.error.valid.eq(bus_error | splitter.error.valid),
            self.error.code.eq(Mux(bus_error, ErrorCode.BUS_WRITE, splitter.error.code)),
            self.error.address.eq(Mux(bus_error, local, splitter.error.address)),
            self.error.oldest.eq(1),
        ]
        return m
