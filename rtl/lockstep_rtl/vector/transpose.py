"""Turning columns into words of one row each, for operands of the other side of the array."""

from amaranth.hdl import Cat, Module, Mux, Shape, Signal
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..interfaces import ADDRESS_BITS, WritePort


def lanes_mask(config, sub):
    """Which rows of a word the beat with this ``sub`` holds, one bit each."""
    return Cat((sub == s).replicate(min(config.lanes, config.rows)) for s in range(config.subwords))


class Transposer(wiring.Component):
    """Groups of ``columns`` columns become ``rows`` words: byte c of word r is lane r of the group's column c.

    Ports
    -----
    begin : In(1), before a pass: ``to``, ``to_stride``, ``to_group`` : In(16), words from the pass's start to its
        first group, from row tile to row tile, from group to group.
    valid : In(columns_per_beat), bit c: a beat, its column c is there. ``last`` : In(1), ``sub`` : In, it is the row's
        last one, of which lanes; ``bytes`` : In(8 * lanes).
    write : Out(WritePort). ``idle`` : Out(1), nothing is left to write.

    A group that ends in cycle 0 is written in cycles 2 to rows / columns_per_beat + 1, as many words a cycle as a beat
    has columns; the issue stage keeps ends of groups at least that far apart. Columns beyond the row's last one read
    as 0.

    Byte (row r, column c) lies in bank (r + c) mod rows at address c, so a column and a row both touch every bank
    once: no registers but a barrel rotator on either side. Two halves, one being filled, one being emptied. Where
    columns come in pairs, each bank has a memory for even and one for odd columns: of column 2 j and column 2 j + 1
    each has a byte, and so has each of row 2 i and row 2 i + 1.
    """

    def __init__(self, config) -> None:
        self.config = config
        super().__init__(
            {
                "begin": In(1),
                "to": In(ADDRESS_BITS),
                "to_stride": In(ADDRESS_BITS),
                "to_group": In(ADDRESS_BITS),
                "valid": In(config.columns_per_beat),
                "last": In(1),
                "sub": In(range(config.subwords)),
                "bytes": In(8 * config.lanes),
                "write": Out(WritePort(8 * config.rows, config.rows, config.columns_per_beat)),
                "idle": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        rows, subwords, side = self.config.rows, self.config.subwords, self.config.columns_per_beat
        side_bits = side - 1
        bits = (rows - 1).bit_length()

        # Fill: rotate each column by its number, so that row r meets bank r + c.
        column = Signal(bits)  # the first one of the beat
        half = Signal()
        mask = Signal(rows)
        ends = self.valid[0] & (self.sub == subwords - 1)
        group_ends = ends & (self.last | (column == rows - side))
        m.d.comb += mask.eq(lanes_mask(self.config, self.sub))
        rotated = [Signal(8 * rows, name=f"rotated{c}") for c in range(side)]
        rotated_mask = [Signal(rows, name=f"rotated_mask{c}") for c in range(side)]
        for c in range(side):
            word = self.bytes.replicate(subwords).word_select(c, 8 * rows)
            turn = Signal(bits + 1, name=f"turn{c}")
            m.d.comb += [
                turn.eq(rows - column - c),
                rotated[c].eq(Cat(word, word) >> (turn << 3)),
                rotated_mask[c].eq(Cat(mask, mask) >> turn),
            ]
        with m.If(ends):
            m.d.sync += column.eq(column + side)
        with m.If(group_ends):
            m.d.sync += [column.eq(0), half.eq(~half)]

        # Addresses of the group that ends.
        row_base, group_base = Signal(ADDRESS_BITS), Signal(ADDRESS_BITS)
        next_row = Signal(ADDRESS_BITS)
        m.d.comb += next_row.eq(row_base + self.to_stride)
        with m.If(self.begin):
            m.d.sync += [row_base.eq(self.to), group_base.eq(self.to)]
        with m.Elif(group_ends & self.last):
            m.d.sync += [row_base.eq(next_row), group_base.eq(next_row)]
        with m.Elif(group_ends):
            m.d.sync += group_base.eq(group_base + self.to_group)

        # Empty: in cycle 1 + n read row n (or rows 2 n and 2 n + 1), in cycle 2 + n rotate it back and write it.
        row = Signal(bits)
        emptying, emptied_half = Signal(), Signal()
        full_columns, columns = Signal(rows), Signal(rows)
        address = Signal(ADDRESS_BITS)
        with m.If(emptying):
            m.d.sync += [row.eq(row + side), address.eq(address + side), emptying.eq(row != rows - side)]
        with m.If(group_ends):
            m.d.sync += [
                emptying.eq(1),
                row.eq(0),
                emptied_half.eq(half),
                address.eq(group_base),
                full_columns.eq((2 << (column + self.valid[-1] if side_bits else column)) - 1),
            ]
        writing = Signal()
        row_read = Signal(bits)
        m.d.sync += writing.eq(emptying)
        with m.If(emptying):
            m.d.sync += [row_read.eq(row), columns.eq(full_columns), self.write.address.eq(address)]

        found = [[None] * rows for _ in range(side)]  # bytes of the row, or of both rows, by bank
        for bank in range(rows):
            for c in range(side):
                name = f"bank{bank}_{c}" if side_bits else f"bank{bank}"
                m.submodules[name] = memory = Memory(shape=Shape(8), depth=2 * rows // side, init=[])
                write, read = memory.write_port(), memory.read_port()
                behind = (bank ^ c) & side_bits  # which of the rows meets columns of this memory here
                m.d.comb += [
                    write.en.eq(self.valid[c] & rotated_mask[c][bank]),
                    write.addr.eq(Cat(column[side_bits:], half)),
                    write.data.eq(rotated[c].word_select(bank, 8)),
                    read.en.eq(emptying),
                    read.addr.eq(Cat((bank - behind - row)[side_bits:bits], emptied_half)),
                ]
                found[behind][bank] = read.data
        words = []
        for n in range(side):
            banks, straight = Signal(8 * rows, name=f"banks{n}"), Signal(8 * rows, name=f"straight{n}")
            m.d.comb += [banks.eq(Cat(found[n])), straight.eq(Cat(banks, banks) >> ((row_read + n) << 3))]
            words += [Mux(columns[c], straight.word_select(c, 8), 0) for c in range(rows)]
        m.d.comb += [
            self.write.enable.eq(writing.replicate(side)),
            self.write.mask.eq(~0),
            self.write.data.eq(Cat(words)),
            self.idle.eq(~emptying & ~writing & ~self.valid[0]),
        ]
        return m
