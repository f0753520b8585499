"""The LOAD unit: device memory to scratchpads, requests running ahead of the data."""

from __future__ import annotations

from dataclasses import dataclass

from amaranth.hdl import Array, C, Cat, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.lib.wiring import In, Out
from lockstep_isa.config import CoreConfig
from lockstep_isa.errors import ErrorCode
from lockstep_isa.instructions import INDEX_ENTRIES, LOAD, TABLE_ENTRIES, TABLE_ENTRY_BYTES, TABLE_SLOTS, Memory

from ..axi import ReadMaster
from ..index_memory import IndexRead
from ..interfaces import ADDRESS_BITS, instruction_stream
from ..scratchpad import fill_stream
from .bursts import BEAT_BITS, BurstSplitter, UnitError, Window
from .gather import RowStarts

#: Instructions whose data is under way at once, and bursts asked for and not complete.
IN_FLIGHT = 4
OUTSTANDING_BURSTS = 4
#: Bits of one table entry on chip: c0, the high 24 bits of c1, the high 16 bits of c2.
TABLE_WIDTH = 72

_TARGET = data.StructLayout({"memory": 3, "rows": 16, "words": 16, "local": 16, "local_stride": 16})


@dataclass(frozen=True)
class Chunk:
    """What LOAD puts together before it writes: a word of ``beats`` beats, or the ``words`` words of one beat.

    Both are powers of two, and one of them is 1.
    """

    beats: int
    words: int

    def beats_of(self, words: Value) -> Value:
        """Beats of a row of ``words`` words; a row takes whole beats."""
        return (words << (self.beats - 1).bit_length()) + (self.words - 1) >> (self.words - 1).bit_length()


def chunk(config: CoreConfig, memory: Memory) -> Chunk:
    """The :class:`Chunk` of an on-chip memory (of TABLE: in entries)."""
    word = {Memory.TABLE: TABLE_ENTRY_BYTES, Memory.VECTOR: 4 * config.rows, Memory.PARAMETER: 4 * config.rows}
    word_bytes = word.get(memory, config.rows)
    return Chunk(max(1, word_bytes // config.bus_bytes), max(1, config.bus_bytes // word_bytes))


class LoadUnit(wiring.Component):
    """Executes LOAD instructions in order, one bus beat a cycle; of TABLE at most one entry a cycle.

    Ports
    -----
    instruction : In(stream of LOAD); up to ``IN_FLIGHT`` are accepted before the first is done, so that the bus
        never waits for the memory's latency between two of them.
    done : Out(1), the oldest instruction's last word is in its memory. stalled : Out(1), waiting for data.
    fill_* : Out(stream of address, data, enable), to the four scratchpads, all words of a beat at once; subnormals
        of VECTOR and PARAMETER words are flushed to zeros of their sign on the way.
    table_* : Out, ``enable``, ``address`` (9), ``data`` (72): always taken.
    bus : Out(ReadMaster). window : In(Window). halt : In(1), start no burst. error : Out(UnitError).
    outstanding : Out(1), bursts are under way.
    index : Out(IndexRead), the list of the rows of a block that is gathered; on cores with selection. The first burst
        of such a block is asked for four cycles later than of another.

    A row of words begins with a beat. Where a beat holds several words, its last one may hold words that are not the
    row's: they are not written.
    """

    def __init__(self, config: CoreConfig) -> None:
        self.config = config
        self.chunks = {memory: chunk(config, memory) for memory in Memory}
        operand, vector = 8 * config.rows, 32 * config.rows
        super().__init__(
            {
                "instruction": In(instruction_stream(LOAD, config)),
                "done": Out(1),
                "stalled": Out(1),
                "fill_activation": Out(fill_stream(operand, config.operand_words_per_beat)),
                "fill_weight": Out(fill_stream(operand, config.operand_words_per_beat)),
                "fill_vector": Out(fill_stream(vector)),
                "fill_parameter": Out(fill_stream(vector)),
                "table_enable": Out(1),
                "table_address": Out(9),
                "table_data": Out(TABLE_WIDTH),
                "bus": Out(ReadMaster(config.bus_bytes)),
                "window": In(Window()),
                "halt": In(1),
                "error": Out(UnitError()),
                "outstanding": Out(1),
            }
            | ({"index": Out(IndexRead())} if config.selection else {})
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.splitter = splitter = BurstSplitter(self.config, gathers=self.config.selection)
        m.submodules.targets = targets = SyncFIFOBuffered(width=_TARGET.size, depth=IN_FLIGHT)
        wiring.connect(m, wiring.flipped(self.window), splitter.window)

        # Requests: one instruction enters both the splitter and the queue of targets.
        i = self.instruction.payload
        row_beats = Signal(BEAT_BITS)
        with m.Switch(i.memory):
            for memory, pieces in self.chunks.items():
                with m.Case(memory):
                    m.d.comb += row_beats.eq(pieces.beats_of(i.words))
        accept = Signal()
        m.d.comb += [
            accept.eq(self.instruction.valid & splitter.block.ready & targets.w_rdy & ~self.halt),
            self.instruction.ready.eq(splitter.block.ready & targets.w_rdy & ~self.halt),
            splitter.block.valid.eq(accept),
            splitter.block.payload.address.eq(i.address),
            splitter.block.payload.stride.eq(i.stride),
            splitter.block.payload.rows.eq(i.rows),
            splitter.block.payload.beats.eq(row_beats),
            targets.w_en.eq(accept),
            targets.w_data.eq(Cat(i.memory, i.rows, i.words, i.local, i.local_stride)),
        ]
        if self.config.selection:
            m.submodules.row_starts = row_starts = RowStarts()
            wiring.connect(m, row_starts.index, wiring.flipped(self.index))
            wiring.connect(m, row_starts.start, splitter.start)
            m.d.comb += [
                splitter.gather.eq(i.gather),
                row_starts.begin.eq(accept & i.gather),
                row_starts.address.eq(i.address),
                row_starts.stride.eq(i.stride),
                row_starts.first.eq(i.gather_from),
                row_starts.rows.eq(i.rows),
            ]
        bursts = Signal(range(OUTSTANDING_BURSTS + 1))
        shown = Signal()  # an address once shown stays until taken, halt or not
        burst_ok = Signal()
        r = self.bus.r
        burst_done = r.valid & r.ready & r.last
        m.d.comb += [
            burst_ok.eq(shown | ((bursts != OUTSTANDING_BURSTS) & ~self.halt)),
            self.bus.ar.valid.eq(splitter.burst.valid & burst_ok),
            splitter.burst.ready.eq(self.bus.ar.ready & burst_ok),
            self.bus.ar.addr.eq(splitter.burst.payload.addr),
            self.bus.ar.len.eq(splitter.burst.payload.len),
            self.outstanding.eq(bursts.any() | self.bus.ar.valid),
        ]
        m.d.sync += [
            shown.eq(self.bus.ar.valid & ~self.bus.ar.ready),
            bursts.eq(bursts + (self.bus.ar.valid & self.bus.ar.ready) - burst_done),
        ]

        # Data: beats gather in the upper end of ``word``; a full word, or a beat of words, waits in ``pending`` to be
        # written. Each beat goes to its place, where shifting would hang all of ``word`` on one gate.
        target = Signal(_TARGET)
        receiving, pending, last_pending = Signal(), Signal(), Signal()
        most_beats = max(c.beats for c in self.chunks.values())
        beat, first_beat = Signal(range(most_beats)), Signal(range(most_beats))  # places in ``word``
        words, rows = Signal(16), Signal(16)
        most_words = max(c.words for c in self.chunks.values())
        step, pending_words = Signal(range(most_words + 1)), Signal(range(most_words + 1))
        local, row_local, pending_address = (Signal(ADDRESS_BITS, name=n) for n in ("local", "row_local", "to"))
        is_float = Signal()
        bus_bits = 8 * self.config.bus_bytes
        beat_data, word = Signal(bus_bits), Signal(max(32 * self.config.rows, 8 * TABLE_ENTRY_BYTES))
        m.d.comb += is_float.eq((target.memory == Memory.VECTOR) | (target.memory == Memory.PARAMETER))
        for lane in range(bus_bits // 32):
            value = r.data.word_select(lane, 32)
            subnormal = is_float & ~value[23:31].any()
            m.d.comb += beat_data.word_select(lane, 32).eq(Mux(subnormal, Cat(C(0, 31), value[31]), value))

        fills = {
            Memory.ACTIVATION: self.fill_activation,
            Memory.WEIGHT: self.fill_weight,
            Memory.VECTOR: self.fill_vector,
            Memory.PARAMETER: self.fill_parameter,
        }
        waits = {memory: Signal(name=f"waits_{memory.name.lower()}") for memory in Memory}  # pending, for one of them
        written = Signal()
        for memory, fill in fills.items():
            m.d.comb += [
                fill.valid.eq(waits[memory]),
                fill.payload.address.eq(pending_address),
                fill.payload.data.eq(word[-len(fill.payload.data) :]),
                fill.payload.enable.eq(Cat(1, pending_words != 1)),
            ]
        # Entries of one beat go to the table one by one.
        entries = word[-8 * TABLE_ENTRY_BYTES * self.chunks[Memory.TABLE].words :]
        number, entry, last_entry = Signal(range(self.chunks[Memory.TABLE].words)), Signal(128), Signal()
        m.d.comb += [
            entry.eq(entries.word_select(number, 8 * TABLE_ENTRY_BYTES)),
            last_entry.eq(number + 1 == pending_words),
            self.table_enable.eq(waits[Memory.TABLE]),
            self.table_address.eq(pending_address),
            self.table_data.eq(Cat(entry[0:32], entry[40:64], entry[80:96])),
            written.eq(
                Cat(self.table_enable & last_entry, *(fill.valid & fill.ready for fill in fills.values())).any()
            ),
        ]
        with m.If(self.table_enable):
            m.d.sync += [number.eq(Mux(last_entry, 0, number + 1)), pending_address.eq(pending_address + 1)]

        # What comes to an end with this word is known when the word before it ends.
        one_word, one_row = Signal(), Signal()  # the rest of the row is one word, or less than another beat of words
        chunks = [self.chunks.get(n, Chunk(1, 1)) for n in range(8)]  # type: ignore[call-overload]
        firsts = Array(C(most_beats - c.beats, len(beat)) for c in chunks)
        steps = Array(C(c.words, len(step)) for c in chunks)
        room, take, word_end, row_end, instruction_end = (
            Signal(name=n) for n in ("room", "take", "word_end", "row_end", "instruction_end")
        )
        m.d.comb += [
            # A halted unit lets the bus run dry: what has no room is dropped.
            room.eq(receiving & (~pending | written)),
            r.ready.eq(room | self.halt),
            take.eq(r.valid & room),
            word_end.eq(take & (beat == most_beats - 1)),
            row_end.eq(word_end & one_word),
            instruction_end.eq(word_end & one_word & one_row),
            self.done.eq(written & last_pending),
            self.stalled.eq(receiving & ~take),
        ]
        with m.If(written):
            m.d.sync += [pending.eq(0), *(wait.eq(0) for wait in waits.values())]
        with m.If(take):
            m.d.sync += [word.word_select(beat, bus_bits).eq(beat_data), beat.eq(beat + 1)]
        with m.If(word_end):
            m.d.sync += [
                beat.eq(first_beat),
                pending.eq(1),
                last_pending.eq(instruction_end),
                pending_address.eq(local),
                pending_words.eq(Mux(words < step, words, step)),
                *(waits[memory].eq(target.memory == memory) for memory in Memory),
                local.eq(local + step),
                *(words.eq(words - step), one_word.eq(words <= step << 1)),
            ]
        with m.If(row_end):
            m.d.sync += [
                *(words.eq(target.words), one_word.eq(target.words <= step)),
                *(rows.eq(rows - 1), one_row.eq(rows == 2)),
                local.eq(row_local + target.local_stride),
                row_local.eq(row_local + target.local_stride),
            ]
        with m.If(instruction_end):
            m.d.sync += receiving.eq(0)
        with m.If(targets.r_rdy & (~receiving | instruction_end)):
            following = data.View(_TARGET, targets.r_data)
            m.d.comb += targets.r_en.eq(1)
            m.d.sync += [
                receiving.eq(1),
                target.eq(following),
                *(signal.eq(firsts[following.memory]) for signal in (beat, first_beat)),
                step.eq(steps[following.memory]),
                *(words.eq(following.words), one_word.eq(following.words <= steps[following.memory])),
                *(rows.eq(following.rows), one_row.eq(following.rows == 1)),
                local.eq(following.local),
                row_local.eq(following.local),
            ]

        # The scratchpads look after their own ends; that of the function tables is known here.
        # An error of the bus is told a cycle later, when the word that it came with is the oldest there is.
        bus_error, error_address = Signal(), Signal(ADDRESS_BITS)
        m.d.sync += [bus_error.eq(take & r.resp.any()), error_address.eq(local)]
        beyond = self.table_enable & (pending_address >= TABLE_SLOTS * TABLE_ENTRIES)
        m.d.comb += [
            self.error.valid.eq(bus_error | beyond | splitter.error.valid),
            self.error.code.eq(splitter.error.code),
            self.error.address.eq(splitter.error.address),
            self.error.oldest.eq(bus_error | beyond),
        ]
        if self.config.selection:
            # The newest instruction's, as what the splitter refuses.
            with m.If(row_starts.beyond):
                m.d.comb += [
                    *(self.error.valid.eq(1), self.error.code.eq(ErrorCode.LOCAL_BOUNDS)),
                    self.error.address.eq(INDEX_ENTRIES),
                ]
        with m.If(beyond):
            m.d.comb += [self.error.code.eq(ErrorCode.LOCAL_BOUNDS), self.error.address.eq(pending_address)]
        with m.Elif(bus_error):
            m.d.comb += [self.error.code.eq(ErrorCode.BUS_READ), self.error.address.eq(error_address)]
        return m
