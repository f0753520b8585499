"""The STORE unit: the vector scratchpad to device memory."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out
from lockstep_isa.config import CoreConfig
from lockstep_isa.errors import ErrorCode
from lockstep_isa.instructions import STORE

from ..axi import ADDRESS_BITS as BUS_ADDRESS_BITS
from ..axi import WriteMaster
from ..interfaces import ADDRESS_BITS, ReadPort, instruction_stream
from .beats import BeatBuffer, lanes_layout
from .bursts import BurstSplitter, UnitError, Window

#: Bursts announced whose data is not sent, and bursts announced and not answered.
WAITING_BURSTS = 4
OUTSTANDING_BURSTS = 16

#: What is kept of a burst until it is answered: its address, and whether it is the last one of its instruction.
_ANSWER = data.StructLayout({"address": BUS_ADDRESS_BITS, "last": 1})


class StoreUnit(wiring.Component):
    """Executes STORE instructions in order, one bus beat a cycle.

    Ports
    -----
    instruction : In(stream of STORE); one is accepted while the words of the one before are still read, so that its
        bursts are announced when its data comes. done : Out(1), the oldest one's last burst is answered.
    stalled : Out(1), neither sends a beat nor is done: waiting for the scratchpad or the bus.
    read : Out(ReadPort of 32 R) with ``read_ready`` In(1): words of the vector scratchpad, when it has time; as many
        at once as a beat holds words of bytes. read_earlier : Out(1), they are not those of the last accepted
        instruction, but of the one before.
    bus : Out(WriteMaster). window : In(Window). halt : In(1), announce no burst. error : Out(UnitError); the address of
        BUS_WRITE is that of the burst.
    outstanding : Out(1), bursts are under way.

    Words wait for the bus in a :class:`BeatBuffer`. With ``bytes`` a word has a quarter of the beats: its lanes' low
    bytes are packed; where a beat is wider than such a word, it takes two, which count as one word of one beat. Lanes
    that are not to be written have their strobes off, and so has what a row lacks of its last beat; their beats are
    sent all the same.
    """

    def __init__(self, config: CoreConfig) -> None:
        self.config = config
        super().__init__(
            {
                "instruction": In(instruction_stream(STORE, config)),
                "done": Out(1),
                "stalled": Out(1),
                "read": Out(ReadPort(32 * config.rows, config.operand_words_per_beat)),
                "read_ready": In(1),
                "read_earlier": Out(1),
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
        m.submodules.lengths = lengths = SyncFIFO(width=8, depth=WAITING_BURSTS)
        m.submodules.answers = answers = SyncFIFO(width=_ANSWER.size, depth=OUTSTANDING_BURSTS)
        m.submodules.buffer = buffer = BeatBuffer(config)
        wiring.connect(m, wiring.flipped(self.window), splitter.window)
        aw, w, b = self.bus.aw, self.bus.w, self.bus.b

        # An instruction enters both the splitter and the place in front of the reader.
        n = self.instruction.payload
        # Where the words of an instruction are, and which of their bytes are written.
        places = {"local": 16, "local_stride": 16, "words": 16, "rows": 16, "bytes": 1}
        source_layout = data.StructLayout(places | lanes_layout(config))
        next_source, next_valid = Signal(source_layout), Signal()
        accept = Signal()
        m.d.comb += [
            self.instruction.ready.eq(~next_valid & splitter.block.ready & ~self.halt),
            accept.eq(self.instruction.valid & self.instruction.ready),
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

        # Words are requested as long as there is room for them.
        source, reading, first_row = Signal(source_layout), Signal(), Signal()
        local, words, rows = Signal(ADDRESS_BITS), Signal(16), Signal(16)
        pair, row_end, end = Signal(), Signal(), Signal()
        requested = Signal()
        following = Signal()  # the next instruction's words are requested from the next cycle on
        m.d.comb += [
            pair.eq((byte_words == 2) & source.bytes & (words != 1)),
            row_end.eq(words == Mux(pair, 2, 1)),
            end.eq(row_end & (rows == 1)),
            self.read.enable.eq(Mux(reading & buffer.word.ready, Cat(1, pair), 0)),
            self.read.address.eq(local),
            self.read_earlier.eq(next_valid),
            requested.eq(buffer.word.ready & buffer.word.valid),
            buffer.word.valid.eq(reading & self.read_ready),
            *(buffer.word.payload.bytes.eq(source.bytes), buffer.word.payload.pair.eq(pair)),
            buffer.word.payload.first_row.eq(first_row),
            *(buffer.word.payload[name].eq(source[name]) for name in lanes_layout(config)),
            buffer.word.payload.last.eq(end),
            buffer.data.eq(self.read.data),
            following.eq(next_valid & (~reading | (requested & end))),
        ]
        with m.If(requested):
            m.d.sync += [local.eq(local + 1 + pair), words.eq(words - 1 - pair)]
            with m.If(row_end):
                # ``source.local`` is where the row begins.
                m.d.sync += [
                    *(words.eq(source.words), rows.eq(rows - 1), first_row.eq(0)),
                    *(signal.eq(source.local + source.local_stride) for signal in (local, source.local)),
                ]
            with m.If(end):
                m.d.sync += reading.eq(0)
        with m.If(following):
            m.d.sync += [
                *(source.eq(next_source), reading.eq(1), first_row.eq(1), next_valid.eq(0)),
                *(local.eq(next_source.local), words.eq(next_source.words), rows.eq(next_source.rows)),
            ]
        with m.If(accept):
            m.d.sync += [next_valid.eq(1), *(next_source[field].eq(n[field]) for field, _ in source_layout)]

        # Addresses: each burst's length goes to the data side, its end to the answers.
        shown, burst_ok = Signal(), Signal()  # an address once shown stays until taken, halt or not
        announced = Signal()
        m.d.comb += [
            burst_ok.eq(shown | (lengths.w_rdy & answers.w_rdy & ~self.halt)),
            aw.valid.eq(splitter.burst.valid & burst_ok),
            splitter.burst.ready.eq(aw.ready & burst_ok),
            aw.addr.eq(splitter.burst.payload.addr),
            aw.len.eq(splitter.burst.payload.len),
            announced.eq(aw.valid & aw.ready),
            *(lengths.w_en.eq(announced), lengths.w_data.eq(aw.len)),
            *(answers.w_en.eq(announced), answers.w_data.eq(Cat(aw.addr, splitter.burst.payload.last))),
            self.outstanding.eq(answers.r_rdy | aw.valid),
        ]
        m.d.sync += shown.eq(aw.valid & ~aw.ready)

        # Data: a beat needs the length of its burst.
        in_burst, sent = Signal(8), Signal()
        m.d.comb += [
            w.valid.eq(buffer.beat.valid & lengths.r_rdy),
            buffer.beat.ready.eq(w.ready & lengths.r_rdy),
            w.data.eq(buffer.beat.payload.data),
            w.strb.eq(buffer.beat.payload.strb),
            w.last.eq(in_burst == lengths.r_data),
            sent.eq(w.valid & w.ready),
            lengths.r_en.eq(sent & w.last),
            self.stalled.eq((next_valid | reading | self.outstanding) & ~sent & ~self.done),
        ]
        with m.If(sent):
            m.d.sync += in_burst.eq(Mux(w.last, 0, in_burst + 1))

        # Answers come in the order of the bursts, and none without one.
        answer = data.View(_ANSWER, answers.r_data)
        bus_error = b.valid & b.resp.any()
        m.d.comb += [
            b.ready.eq(1),
            answers.r_en.eq(b.valid),
            self.done.eq(b.valid & answer.last),
            self.error.valid.eq(bus_error | splitter.error.valid),
            self.error.code.eq(Mux(bus_error, ErrorCode.BUS_WRITE, splitter.error.code)),
            self.error.address.eq(Mux(bus_error, answer.address, splitter.error.address)),
            # What is refused is cut from the last one that was accepted.
            self.error.oldest.eq(bus_error | ~splitter.error.valid),
        ]
        return m
