"""The interfaces between the units of the core: memory ports, the accumulator queue, and what every unit shows.

On-chip memories answer one cycle after the request: ``data`` is valid in the cycle behind the one with ``enable``.
Addresses are 16 bits wide whatever the depth; the memory reports one beyond its end.
"""

from __future__ import annotations

from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from lockstep_isa.config import CoreConfig
from lockstep_isa.instructions import HEADER, InstructionType

#: Bits of an on-chip word address.
ADDRESS_BITS = 16


def instruction_layout(type: InstructionType) -> data.StructLayout:
    """The bits of one instruction with its operands added: header and fields, in the order of the instruction table."""
    return data.StructLayout({field.name: field.width for field in (*HEADER, *type.fields)})


def instruction_stream(type: InstructionType) -> stream.Signature:
    """Instructions whose tokens have been taken; the unit accepts one when it can start it."""
    return stream.Signature(instruction_layout(type))


class ReadPort(wiring.Signature):
    """Read side of an on-chip memory, seen from the reader.

    ``enable`` Out(1), ``address`` Out(16); ``data`` In(width), valid one cycle later and held until the next read.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        super().__init__({"enable": Out(1), "address": Out(ADDRESS_BITS), "data": In(width)})


class WritePort(wiring.Signature):
    """Write side of an on-chip memory, seen from the writer; the write lands at the end of the cycle.

    ``enable`` Out(1), ``address`` Out(16), ``data`` Out(width), ``mask`` Out(granules): which equal parts of the
    word are written, lowest first.
    """

    def __init__(self, width: int, granules: int) -> None:
        self.width = width
        self.granules = granules
        super().__init__({"enable": Out(1), "address": Out(ADDRESS_BITS), "data": Out(width), "mask": Out(granules)})


class AccumulatorPort(wiring.Signature):
    """The oldest result tile, seen from the vector unit.

    ``available`` In(1): the oldest tile is complete. ``enable`` Out(1) with ``column`` Out(log2 columns) reads one
    column of it: ``data`` In(32 * rows), one int32 per row, one cycle later. ``pop`` Out(1) discards the tile.
    """

    def __init__(self, config: CoreConfig) -> None:
        self.config = config
        super().__init__(
            {
                "available": In(1),
                "enable": Out(1),
                "column": Out((config.columns - 1).bit_length()),
                "data": In(32 * config.rows),
                "pop": Out(1),
            }
        )
