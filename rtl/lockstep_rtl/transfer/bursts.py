"""From a two-dimensional block of device memory to AXI bursts, inside the window and nowhere else."""

from __future__ import annotations

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from lockstep_isa.config import CoreConfig
from lockstep_isa.errors import ErrorCode

from ..axi import ADDRESS_BITS, BURST_BEATS

#: Bits of a count of beats in one row: 16-bit words of up to 32 beats.
BEAT_BITS = 21

#: A block: ``rows`` rows of ``beats`` bus words from ``address``, ``stride`` bytes apart.
BLOCK = data.StructLayout({"address": ADDRESS_BITS, "stride": ADDRESS_BITS, "rows": 16, "beats": BEAT_BITS})
#: A burst: byte address, beats minus one, and whether it is the ``last`` of its block.
BURST = data.StructLayout({"addr": ADDRESS_BITS, "len": 8, "last": 1})


class Window(wiring.Signature):
    """The device memory that may be touched: first byte and first byte behind, set by the driver."""

    def __init__(self) -> None:
        super().__init__({"base": Out(ADDRESS_BITS), "limit": Out(ADDRESS_BITS)})


class UnitError(wiring.Signature):
    """An error in this cycle: ``code``, ``address``; ``oldest``: of the oldest instruction, else of the newest."""

    def __init__(self) -> None:
        super().__init__({"valid": Out(1), "code": Out(4), "address": Out(ADDRESS_BITS), "oldest": Out(1)})


class BurstSplitter(wiring.Component):
    """Cuts blocks into bursts that cross no border of ``BURST_BEATS`` beats, and checks each against the window.

    Ports
    -----
    block : In(stream of BLOCK), the next one is accepted once the one before is cut up.
    burst : Out(stream of BURST), two cycles behind the cut; one a cycle within a block, one idle cycle between blocks.
    window : In(Window). error : Out(UnitError), OUT_OF_WINDOW or MISALIGNED; the burst is then never shown.
    gather : In(1), beside ``block``: each row begins where ``start`` : In(stream of byte addresses) says. It may be
        late, and is taken in the cycle behind the row before. Only with ``gathers``.
    """

    def __init__(self, config: CoreConfig, gathers: bool = False) -> None:
        self.config, self.gathers = config, gathers
        super().__init__(
            {
                "block": In(stream.Signature(BLOCK)),
                "burst": Out(stream.Signature(BURST)),
                "window": In(Window()),
                "error": Out(UnitError()),
            }
            | ({"gather": In(1), "start": In(stream.Signature(ADDRESS_BITS))} if gathers else {})
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        beat_bits = (self.config.bus_bytes - 1).bit_length()
        active = Signal()
        row_start, address, stride = (Signal(ADDRESS_BITS, name=n) for n in ("row_start", "address", "stride"))
        rows = Signal(16)
        beats, remaining = Signal(BEAT_BITS), Signal(BEAT_BITS)

        # Cycle 0: the next burst is cut off.
        in_block = Signal(range(BURST_BEATS))
        to_border, length = Signal(range(BURST_BEATS + 1)), Signal(range(BURST_BEATS + 1))
        cut = Signal(data.StructLayout({"addr": ADDRESS_BITS, "length": length.shape(), "aligned": 1, "last": 1}))
        cut_valid, advance, passes = Signal(), Signal(), Signal()
        m.d.comb += [
            in_block.eq(address >> beat_bits),
            to_border.eq(BURST_BEATS - in_block),
            length.eq(Mux(remaining < to_border, remaining, to_border)),
            advance.eq(active & (~cut_valid | passes)),
            self.block.ready.eq(~active),
        ]
        with m.If(advance):
            m.d.sync += [
                cut.addr.eq(address),
                cut.length.eq(length),
                cut.aligned.eq((address[:beat_bits] | stride[:beat_bits]) == 0),
                cut.last.eq((remaining == length) & (rows == 1)),
                address.eq(address + (length << beat_bits)),
                remaining.eq(remaining - length),
            ]
            with m.If(remaining == length):
                m.d.sync += [
                    rows.eq(rows - 1),
                    remaining.eq(beats),
                    row_start.eq(row_start + stride),
                    address.eq(row_start + stride),
                    active.eq(rows != 1),
                ]

        if self.gathers:
            # Behind what a stride gives: a row waits for its address, or takes it as the row before ends.
            gathered, waits = Signal(), Signal()
            row_ends = advance & (remaining == length) & (rows != 1) & gathered
            with m.If(waits):
                m.d.comb += advance.eq(0)
            m.d.comb += self.start.ready.eq(waits | row_ends)
            with m.If(self.start.ready):
                m.d.sync += [address.eq(self.start.payload), waits.eq(~self.start.valid)]
            with m.If(self.block.valid & self.block.ready):
                m.d.sync += [gathered.eq(self.gather), waits.eq(self.gather)]

        # Cycle 1: it is compared with the window.
        end, inside = Signal(ADDRESS_BITS + 1), Signal()
        m.d.comb += [
            end.eq(cut.addr + (cut.length << beat_bits)),
            inside.eq((cut.addr >= self.window.base) & (end <= self.window.limit)),
            passes.eq(cut_valid & inside & cut.aligned & (~self.burst.valid | self.burst.ready)),
            self.error.valid.eq(cut_valid & ~(inside & cut.aligned)),
            self.error.code.eq(Mux(cut.aligned, ErrorCode.OUT_OF_WINDOW, ErrorCode.MISALIGNED)),
            self.error.address.eq(cut.addr),
        ]
        with m.If(advance | passes):
            m.d.sync += cut_valid.eq(advance)

        # Cycle 2: it is shown.
        with m.If(self.burst.ready):
            m.d.sync += self.burst.valid.eq(0)
        with m.If(passes):
            m.d.sync += [
                self.burst.valid.eq(1),
                self.burst.payload.addr.eq(cut.addr),
                self.burst.payload.len.eq(cut.length - 1),
                self.burst.payload.last.eq(cut.last),
            ]

        with m.If(self.block.valid & self.block.ready):
            block = self.block.payload
            m.d.sync += [
                active.eq(1),
                row_start.eq(block.address),
                address.eq(block.address),
                stride.eq(block.stride),
                rows.eq(block.rows),
                beats.eq(block.beats),
                remaining.eq(block.beats),
            ]
        return m
