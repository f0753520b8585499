"""The finder of chunks that are not zero: ahead of the steps, tile behind tile."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out
from lockstep_isa.config import CoreConfig
from lockstep_isa.instructions import MATRIX
from lockstep_isa.zero_skipping import CHUNKS_AHEAD

from ..interfaces import instruction_layout
from ..zero_words import ZeroRead, chunk_bits
from .loops import TileLoops
from .weight_reader import is_packed


def may_skip(config: CoreConfig, i: data.View) -> Value:
    """Whether a MATRIX instruction looks for chunks that are zero, as ``lockstep_isa.zero_skipping`` says."""
    bits = (config.rows - 1).bit_length()
    aligned = ~(i.a | i.a_outer | i.a_inner)[:bits].any()
    return aligned & i.depth[bits + 1 :].any() & ~(is_packed(i) if config.packed else 0)


class ChunkFinder(wiring.Component):
    """Says of each chunk that is multiplied what follows it in its tile.

    Ports
    -----
    start : In(1) with ``next`` : In(MATRIX), an instruction begins; one that may not skip asks for nothing.
    running : In(MATRIX), the same, from the cycle behind on.
    read : Out(ZeroRead). skipped : Out(1), a chunk that was looked at is zero.
    found : Out(stream of ``zeros``, chunks that are passed over, and ``end``: behind them the tile has no other).

    It looks at a chunk a cycle, but at none that begins a tile, and takes one more cycle for a tile's end. What it
    finds in a chunk of which it asks in cycle 0 is at ``found`` in cycle 2. It is up to ``CHUNKS_AHEAD`` chunks ahead,
    and stops while only one place is left.
    """

    def __init__(self, config: CoreConfig) -> None:
        self.config = config
        layout = instruction_layout(MATRIX, config)
        self.item = data.StructLayout({"zeros": chunk_bits(config), "end": 1})
        super().__init__(
            {
                "start": In(1),
                "next": In(layout),
                "running": In(layout),
                "read": Out(ZeroRead(config)),
                "skipped": Out(1),
                "found": Out(stream.Signature(self.item)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        rows = self.config.rows
        bits = (rows - 1).bit_length()
        m.submodules.queue = queue = SyncFIFO(width=self.item.size, depth=CHUNKS_AHEAD)
        loops = TileLoops("a")
        a = loops.words["a"]  # of the chunk in front of the one that is looked at
        left = Signal(chunk_bits(self.config))  # chunks of the tile that are still to be looked at

        # Cycle 0: ask.
        seeking, asks, ends = Signal(), Signal(), Signal()
        m.d.comb += [
            asks.eq(seeking & (queue.level <= CHUNKS_AHEAD - 2)),
            ends.eq(~left.any()),
            self.read.enable.eq(asks),
            self.read.chunk.eq(a[bits:] + 1),
        ]
        with m.If(asks):
            m.d.sync += [left.eq(left - 1), a.eq(a + rows)]
        with m.If(asks & ends):
            m.d.sync += [left.eq((self.running.depth >> bits) - 1), seeking.eq(~loops.last)]
            loops.advance(m, self.running)
        with m.If(self.start):
            m.d.sync += [left.eq((self.next.depth >> bits) - 1), seeking.eq(may_skip(self.config, self.next))]
            loops.begin(m, self.next)

        # Cycle 1: the answer.
        looked, end = Signal(), Signal()
        zeros = Signal(chunk_bits(self.config))
        m.d.sync += looked.eq(asks)
        with m.If(asks):
            m.d.sync += end.eq(ends)
        m.d.comb += [
            self.skipped.eq(looked & ~end & self.read.zero),
            queue.w_en.eq(looked & ~self.skipped),
            queue.w_data.eq(Cat(zeros, end)),
        ]
        with m.If(looked):
            m.d.sync += zeros.eq(Mux(self.skipped, zeros + 1, 0))

        # Cycle 2: it can be taken.
        m.d.comb += [
            self.found.valid.eq(queue.r_rdy),
            self.found.payload.eq(queue.r_data),
            queue.r_en.eq(self.found.ready),
        ]
        return m
