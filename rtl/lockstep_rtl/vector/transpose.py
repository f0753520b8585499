"""Turning columns into words of one row each, for operands of the other side of the array."""

from amaranth.hdl import Cat, Module, Mux, Shape, Signal
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..interfaces import ADDRESS_BITS, WritePort


def lanes_mask(config, sub):
    """Which rows of a word the beat with this ``sub`` holds, one bit each."""
    return Cat((sub == s).replicate(config.lanes) for s in range(config.subwords))


class Transposer(wiring.Component):
    """Groups of ``columns`` columns become ``rows`` words: byte c of word r is lane r of the group's column c.

    Ports
    -----
    begin : In(1), before a pass: ``to``, ``to_stride``, ``to_group`` : In(16), words from the pass's start to its
        first group, from row tile to row tile, from group to group.
    valid, last : In(1), ``sub`` : In, a beat, of the row's last column, of which lanes; ``bytes`` : In(8 * lanes).
    write : Out(WritePort). ``idle`` : Out(1), nothing is left to write.

    A group that ends in cycle 0 is written in cycles 2 to rows + 1; the issue stage keeps ends of groups at least
    ``rows`` cycles apart. Columns beyond the row's last one read as 0.

    Byte (row r, column c) lies in bank (r + c) mod rows at address c, so a column and a row both touch every bank
    once: no registers but a barrel rotator on either side. Two halves, one being filled, one being emptied.
    """

    def __init__(self, config) -> None:
        self.config = config
        super().__init__(
            {
                "begin": In(1),
                "to": In(ADDRESS_BITS),
                "to_stride": In(ADDRESS_BITS),
                "to_group": In(ADDRESS_BITS),
                "valid": In(1),
                "last": In(1),
                "sub": In(range(config.subwords)),
                "bytes": In(8 * config.lanes),
                "write": Out(WritePort(8 * config.rows, config.rows)),
                "idle": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        rows, subwords = self.config.rows, self.config.subwords
        bits = (rows - 1).bit_length()

        # Fill: rotate the column by its number, so that row r meets bank r + c.
        column = Signal(bits)
        half = Signal()
        word = Signal(8 * rows)
        mask = Signal(rows)
        rotated, rotated_mask = Signal(8 * rows), Signal(rows)
        ends = self.valid & (self.sub == subwords - 1)
        group_ends = ends & (self.last | column.all())
        turn = Signal(bits + 1)
        m.d.comb += [
            turn.eq(rows - column),
            word.eq(self.bytes.replicate(subwords)),
            mask.eq(lanes_mask(self.config, self.sub)),
            rotated.eq(Cat(word, word) >> (turn << 3)),
            rotated_mask.eq(Cat(mask, mask) >> turn),
        ]
        with m.If(ends):
            m.d.sync += column.eq(column + 1)
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

        # Empty: in cycle 1 + r read row r, in cycle 2 + r rotate it back and write it.
        row = Signal(bits)
        emptying, emptied_half = Signal(), Signal()
        full_columns, columns = Signal(rows), Signal(rows)
        address = Signal(ADDRESS_BITS)
        with m.If(emptying):
            m.d.sync += [row.eq(row + 1), address.eq(address + 1), emptying.eq(~row.all())]
        with m.If(group_ends):
            m.d.sync += [
                emptying.eq(1),
                row.eq(0),
                emptied_half.eq(half),
                address.eq(group_base),
                full_columns.eq((2 << column) - 1),
            ]
        writing = Signal()
        row_read = Signal(bits)
        m.d.sync += writing.eq(emptying)
        with m.If(emptying):
            m.d.sync += [row_read.eq(row), columns.eq(full_columns), self.write.address.eq(address)]

        found = []
        for bank in range(rows):
            m.submodules[f"bank{bank}"] = memory = Memory(shape=Shape(8), depth=2 * rows, init=[])
            write, read = memory.write_port(), memory.read_port()
            m.d.comb += [
                write.en.eq(self.valid & rotated_mask[bank]),
                write.addr.eq(Cat(column, half)),
                write.data.eq(rotated.word_select(bank, 8)),
                read.en.eq(emptying),
                read.addr.eq(Cat((bank - row)[:bits], emptied_half)),
            ]
            found.append(read.data)
        banks = Signal(8 * rows)
        straight = Signal(8 * rows)
        m.d.comb += [
            banks.eq(Cat(found)),
            straight.eq(Cat(banks, banks) >> (row_read << 3)),
            self.write.enable.eq(writing),
            self.write.mask.eq(~0),
            self.write.data.eq(Cat(Mux(columns[c], straight.word_select(c, 8), 0) for c in range(rows))),
            self.idle.eq(~emptying & ~writing & ~self.valid),
        ]
        return m
