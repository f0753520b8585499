"""Tokens: counting semaphores between every pair of units."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from lockstep_isa.instructions import Unit

#: Bits of each counter; no program of the compiler comes near it, and a full one keeps its value.
COUNTER_BITS = 8


class Tokens(wiring.Component):
    """``count[a][b]``: tokens that unit a has given to unit b and b has not taken.

    Ports, one set per unit u
    -------------------------
    want_u : In(4), the units of which u needs a token each. granted_u : Out(1), all of them are there.
    take_u : In(1), u takes them (only while granted). give_u : In(4), u gives one token to each of these units.

    A token given in one cycle can be taken in the next.
    """

    def __init__(self) -> None:
        members = {}
        for unit in Unit:
            name = unit.name.lower()
            members |= {f"want_{name}": In(4), f"granted_{name}": Out(1), f"take_{name}": In(1), f"give_{name}": In(4)}
        super().__init__(members)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        for b in Unit:
            target = b.name.lower()
            want, take = getattr(self, f"want_{target}"), getattr(self, f"take_{target}")
            missing = []
            for a in Unit:
                give = getattr(self, f"give_{a.name.lower()}")[b]
                count = Signal(COUNTER_BITS, name=f"count_{a.name}_{b.name}")
                # Whether it is not zero, known at the start of a cycle: what a unit begins hangs on it.
                some = Signal(name=f"some_{a.name}_{b.name}")
                taken = take & want[a]
                with m.If(give & ~taken & ~count.all()):
                    m.d.sync += [count.eq(count + 1), some.eq(1)]
                with m.Elif(taken & ~give):
                    m.d.sync += [count.eq(count - 1), some.eq(count != 1)]
                missing.append(want[a] & ~some)
            m.d.comb += getattr(self, f"granted_{target}").eq(~Cat(missing).any())
        return m
