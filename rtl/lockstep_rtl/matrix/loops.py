"""The loops of a MATRIX instruction over its tiles."""

from __future__ import annotations

from amaranth.hdl import Module, Signal, Value
from amaranth.lib import data

from ..interfaces import ADDRESS_BITS


class TileLoops:
    """What is left of the inner and the outer loop, and the word addresses of operands that step with them.

    Registers and logic of the module that uses it. ``words`` maps ``a`` or ``w`` to the address of its next word, which
    is the user's to step within a tile. ``last`` : this is the instruction's last tile; known at the start of a cycle,
    as the end of an instruction goes on to the queue and to the tokens of all units.
    """

    def __init__(self, *operands: str) -> None:
        self._inner, self._outer = (Signal(ADDRESS_BITS, name=f"{n}_left") for n in ("inner", "outer"))
        self._last_inner, self._last_outer = (Signal(name=f"last_{n}") for n in ("inner", "outer"))
        # Word addresses: of this k, of this tile's start, of this outer step's start.
        self._addresses = {
            o: tuple(Signal(ADDRESS_BITS, name=f"{o}{n}") for n in ("", "_tile", "_outer")) for o in operands
        }
        self.words = {o: word for o, (word, _, _) in self._addresses.items()}

    @property
    def last(self) -> Value:
        return self._last_inner & self._last_outer

    def begin(self, m: Module, i: data.View) -> None:
        """The statements that load what ``i``, an instruction, says of its first tile."""
        m.d.sync += [self._inner.eq(i.inner), self._outer.eq(i.outer)]
        m.d.sync += [self._last_inner.eq(i.inner == 1), self._last_outer.eq(i.outer == 1)]
        for operand, addresses in self._addresses.items():
            m.d.sync += [address.eq(i[operand]) for address in addresses]

    def advance(self, m: Module, i: data.View) -> None:
        """The statements behind the last word of a tile of ``i``, the instruction that runs."""
        with m.If(self._last_inner):
            m.d.sync += [self._inner.eq(i.inner), self._outer.eq(self._outer - 1)]
            m.d.sync += [self._last_inner.eq(i.inner == 1), self._last_outer.eq(self._outer == 2)]
            for operand, (word, tile, start) in self._addresses.items():
                following = start + i[f"{operand}_outer"]
                m.d.sync += [word.eq(following), tile.eq(following), start.eq(following)]
        with m.Else():
            m.d.sync += [self._inner.eq(self._inner - 1), self._last_inner.eq(self._inner == 2)]
            for operand, (word, tile, _) in self._addresses.items():
                following = tile + i[f"{operand}_inner"]
                m.d.sync += [word.eq(following), tile.eq(following)]
