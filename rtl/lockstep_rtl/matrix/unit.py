"""The MATRIX unit: hardware loops that stream operand words through the array."""

from __future__ import annotations

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from lockstep_isa.config import CoreConfig
from lockstep_isa.instructions import MATRIX

from ..interfaces import ADDRESS_BITS, AccumulatorPort, ReadPort, instruction_stream
from .accumulators import Accumulators
from .array import SystolicArray


class MatrixUnit(wiring.Component):
    """Executes MATRIX instructions: tiles over two loops, K operand words each.

    Ports
    -----
    instruction : In(stream of MATRIX). done : Out(1), the last operand word has been read.
    stalled : Out(1), an instruction is under way but the accumulator queue is full.
    streaming : Out(1), operand words are read in this cycle.
    activation_read, weight_read : Out(ReadPort of 8 R, 8 C).
    accumulator : In(AccumulatorPort), for the vector unit.

    A tile takes max(K, C) cycles, tiles and instructions follow each other without a bubble while the queue has
    room. Where K < C the idle cycles come before the words: last words are then never closer than C cycles, whatever
    K the tile before had, and columns of two tiles never meet in the array's ``result``. Results reach the queue by
    themselves: ``done`` frees the operands, not the results.
    """

    def __init__(self, config: CoreConfig) -> None:
        self.config = config
        super().__init__(
            {
                "instruction": In(instruction_stream(MATRIX)),
                "done": Out(1),
                "stalled": Out(1),
                "streaming": Out(1),
                "activation_read": Out(ReadPort(8 * config.rows)),
                "weight_read": Out(ReadPort(8 * config.columns)),
                "accumulator": In(AccumulatorPort(config)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        columns = self.config.columns
        m.submodules.array = array = SystolicArray(self.config)
        m.submodules.accumulators = accumulators = Accumulators(self.config)
        wiring.connect(m, accumulators.read, wiring.flipped(self.accumulator))

        active, started = Signal(), Signal()
        i = Signal.like(self.instruction.payload)
        # What is left of this tile's words, of the inner and of the outer loop; the last one is a 1, and known as such
        # at the start of its cycle: the end of an instruction goes on to the queue and to the tokens of all units.
        words, inner, outer = (Signal(ADDRESS_BITS, name=f"{n}_left") for n in ("words", "inner", "outer"))
        last_word, last_inner, last_outer = (Signal(name=f"last_{n}") for n in ("word", "inner", "outer"))
        # Idle cycles before the words of each tile, and those that this tile still has to wait.
        padding, idle = Signal(range(columns)), Signal(range(columns))
        padded, idles = Signal(), Signal()  # they are not zero
        # Word addresses: of this k, of this tile's start, of this outer step's start.
        a, a_tile, a_outer = (Signal(ADDRESS_BITS, name=f"a{n}") for n in ("", "_tile", "_outer"))
        w, w_tile, w_outer = (Signal(ADDRESS_BITS, name=f"w{n}") for n in ("", "_tile", "_outer"))

        first = Signal(init=1)
        step, go, tile_end = (Signal(name=n) for n in ("step", "go", "tile_end"))
        m.d.comb += [
            step.eq(active & (started | accumulators.room)),
            go.eq(step & ~idles),
            self.stalled.eq(active & ~started & ~accumulators.room),
            self.streaming.eq(go),
            accumulators.reserve.eq(step & ~started),
            self.activation_read.enable.eq(go),
            self.activation_read.address.eq(a),
            self.weight_read.enable.eq(go),
            self.weight_read.address.eq(w),
            tile_end.eq(go & last_word),
        ]
        with m.If(step):
            m.d.sync += started.eq(1)
        with m.If(idles & step):
            m.d.sync += [idle.eq(idle - 1), idles.eq(idle != 1)]
        with m.If(go):
            m.d.sync += [first.eq(0), words.eq(words - 1), last_word.eq(words == 2), a.eq(a + 1), w.eq(w + 1)]
        with m.If(tile_end):
            m.d.sync += [first.eq(1), words.eq(i.depth), started.eq(0), idle.eq(padding), idles.eq(padded)]
            m.d.sync += last_word.eq(i.depth == 1)

        end = Signal()
        m.d.comb += [
            end.eq(tile_end & last_inner & last_outer),
            self.done.eq(end),
            self.instruction.ready.eq(~active | end),
        ]
        with m.If(tile_end):
            with m.If(last_inner):
                m.d.sync += [inner.eq(i.inner), outer.eq(outer - 1)]
                m.d.sync += [last_inner.eq(i.inner == 1), last_outer.eq(outer == 2)]
                for word, tile, start, step in ((a, a_tile, a_outer, i.a_outer), (w, w_tile, w_outer, i.w_outer)):
                    m.d.sync += [word.eq(start + step), tile.eq(start + step), start.eq(start + step)]
            with m.Else():
                m.d.sync += [inner.eq(inner - 1), last_inner.eq(inner == 2)]
                for word, tile, step in ((a, a_tile, i.a_inner), (w, w_tile, i.w_inner)):
                    m.d.sync += [word.eq(tile + step), tile.eq(tile + step)]
        with m.If(end):
            m.d.sync += active.eq(0)
        with m.If(self.instruction.valid & self.instruction.ready):
            n = self.instruction.payload
            short = Mux(n.depth < columns, columns - n.depth, 0)
            m.d.sync += [i.eq(n), active.eq(1), words.eq(n.depth), inner.eq(n.inner), outer.eq(n.outer)]
            m.d.sync += [last_word.eq(n.depth == 1), last_inner.eq(n.inner == 1), last_outer.eq(n.outer == 1)]
            m.d.sync += [padding.eq(short), padded.eq(n.depth < columns), idle.eq(short), idles.eq(n.depth < columns)]
            m.d.sync += [word.eq(n.a) for word in (a, a_tile, a_outer)]
            m.d.sync += [word.eq(n.w) for word in (w, w_tile, w_outer)]

        # The scratchpads answer one cycle later; control waits with them.
        valid, tile_first, tile_last, unsigned = (
            Signal(name=n) for n in ("valid_1", "first_1", "last_1", "unsigned_1")
        )
        m.d.sync += [valid.eq(go), tile_first.eq(first), tile_last.eq(last_word), unsigned.eq(i.unsigned)]
        m.d.comb += [
            array.a.eq(self.activation_read.data),
            array.w.eq(self.weight_read.data),
            array.valid.eq(valid),
            array.first.eq(tile_first),
            array.last.eq(tile_last),
            array.unsigned.eq(unsigned),
            accumulators.result.eq(array.result),
            accumulators.strobe.eq(array.strobe),
        ]
        return m
