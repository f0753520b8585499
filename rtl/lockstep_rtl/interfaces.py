"""The interfaces between the units of the core: memory ports, the accumulator queue, and what every unit shows.

A port takes one word a cycle or two words one behind the other, wherever they begin; a read port of four takes one or
four, from a multiple of 4 on. ``enable`` has a bit for each: bit n stands for word ``address + n``. Bit 1 is only set
together with bit 0, and bits of four all together.

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


def instruction_layout(type: InstructionType, config: CoreConfig) -> data.StructLayout:
    """The bits of one instruction with its operands added: header and fields that the core has, in the order of the
    instruction table."""
    return data.StructLayout({field.name: field.width for field in (*HEADER, *type.of(config).fields)})


def instruction_stream(type: InstructionType, config: CoreConfig) -> stream.Signature:
    """Instructions whose tokens have been taken; the unit accepts one when it can start it."""
    return stream.Signature(instruction_layout(type, config))


class ReadPort(wiring.Signature):
    """Read side of an on-chip memory, seen from the reader.

    ``enable`` Out(words), ``address`` Out(16); ``data`` In(words * width), valid one cycle later and held until the
    next read; undefined for words that were not enabled.
    """

    def __init__(self, width: int, words: int = 1) -> None:
        self.width, self.words = width, words
        super().__init__({"enable": Out(words), "address": Out(ADDRESS_BITS), "data": In(words * width)})


class WritePort(wiring.Signature):
    """Write side of an on-chip memory, seen from the writer; the write lands at the end of the cycle.

    ``enable`` Out(words), ``address`` Out(16), ``data`` Out(words * width), ``mask`` Out(granules): which equal parts
    of each word are written, lowest first.
    """

    def __init__(self, width: int, granules: int, words: int = 1) -> None:
        self.width, self.granules, self.words = width, granules, words
        super().__init__(
            {
                "enable": Out(words),
                "address": Out(ADDRESS_BITS),
                "data": Out(words * width),
                "mask": Out(granules),
            }
        )


class AccumulatorPort(wiring.Signature):
    """The oldest result tile, seen from the vector unit.

    ``available`` In(1): the oldest tile is complete. ``enable`` Out(1) with ``column`` Out(log2 columns) reads the
    columns of one beat, of which ``column`` is the first: ``data`` In(32 * rows * columns_per_beat), one int32 per
    row, one cycle later. ``pop`` Out(1) discards the tile.
    """

    def __init__(self, config: CoreConfig) -> None:
        self.config = config
        super().__init__(
            {
                "available": In(1),
                "enable": Out(1),
                "column": Out((config.columns - 1).bit_length()),
                "data": In(32 * config.rows * config.columns_per_beat),
                "pop": Out(1),
            }
        )
