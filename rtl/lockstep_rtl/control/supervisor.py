"""The supervisor: the error stop, the watchdog, the soft reset and the performance counters."""

from __future__ import annotations

from collections.abc import Sequence

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from lockstep_isa.errors import CONTROL_UNIT, ErrorCode
from lockstep_isa.instructions import Unit
from lockstep_isa.registers import UNIT_COUNTERS

from .queue import INDEX_BITS

#: Who can report an error: the units, then control.
REPORTERS = (*(u.name.lower() for u in Unit), "control")


class Supervisor(wiring.Component):
    """Latches the first error, counts cycles by cause, and resets the core when the host asks.

    Parameters
    ----------
    of_core : names of the counters of the whole core; CYCLES is the first.

    Ports
    -----
    busy : In(1), a program is under way. progress : In(1), some unit did something in this cycle.
    watchdog : In(32), cycles without progress that are an error, one cycle later; 0 for never.
    error_NAME : In(1) with code_NAME In(4), address_NAME In(32), index_NAME In(24) for each reporter.
    running_U, stalled_U, waiting_U : In(1) per unit, as its queue and the unit itself say.
    reset_request, clear_counters : In(1). bus_quiet : In(1), no burst is under way.
    halt : Out(1), nobody starts anything. soft_reset : Out(1), for one cycle, once the bus is quiet.
    error_code, error_index, error_address, error_unit : Out, of the first error; code 0 is none.
    events : In, one bit per core counter except CYCLES. count_NAME : Out(32), every counter of the register map.
    """

    def __init__(self, of_core: Sequence[str]) -> None:
        self.of_core = of_core
        self.counters = [*of_core] + [f"{u.name}_{n}" for u in Unit for n, _ in UNIT_COUNTERS]
        reports = {}
        for n in REPORTERS:
            reports |= {f"error_{n}": In(1), f"code_{n}": In(4), f"address_{n}": In(32), f"index_{n}": In(INDEX_BITS)}
        states = {f"{s}_{u.name.lower()}": In(1) for u in Unit for s in ("running", "stalled", "waiting")}
        super().__init__(
            {
                "busy": In(1),
                "progress": In(1),
                "watchdog": In(32),
                "reset_request": In(1),
                "clear_counters": In(1),
                "bus_quiet": In(1),
                "halt": Out(1),
                "soft_reset": Out(1),
                "error_code": Out(4),
                "error_index": Out(INDEX_BITS),
                "error_address": Out(32),
                "error_unit": Out(3),
                "events": In(len(of_core) - 1),
            }
            | reports
            | states
            | {f"count_{n}": Out(32) for n in self.counters}
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()

        quiet_cycles, expired = Signal(32), Signal()
        # Known late in a cycle, and not urgent.
        progressed = Signal()
        m.d.sync += progressed.eq(self.progress | ~self.busy)
        with m.If(self.busy & ~progressed & ~self.halt):
            m.d.sync += quiet_cycles.eq(quiet_cycles + 1)
        with m.Else():
            m.d.sync += quiet_cycles.eq(0)
        m.d.comb += expired.eq(self.watchdog.any() & (quiet_cycles >= self.watchdog))

        with m.If(self.error_code == ErrorCode.NONE):
            with m.If(expired):
                m.d.sync += [
                    self.error_code.eq(ErrorCode.WATCHDOG),
                    self.error_unit.eq(CONTROL_UNIT),
                    self.error_index.eq(self.index_control),
                ]
                # Blame the unit whose instruction is stuck, the last one listed if there are several.
                for unit in Unit:
                    name = unit.name.lower()
                    with m.If(getattr(self, f"running_{name}") | getattr(self, f"waiting_{name}")):
                        m.d.sync += [
                            self.error_unit.eq(unit),
                            self.error_index.eq(getattr(self, f"index_{name}")),
                        ]
            for number, name in enumerate(REPORTERS):
                with m.If(getattr(self, f"error_{name}")):
                    m.d.sync += [
                        self.error_code.eq(getattr(self, f"code_{name}")),
                        self.error_address.eq(getattr(self, f"address_{name}")),
                        self.error_index.eq(getattr(self, f"index_{name}")),
                        self.error_unit.eq(number),
                    ]

        resetting = Signal()
        # A register too: it resets every flip-flop of the machine, and the quiet bus is known late in a cycle. Halted
        # units leave the bus quiet for the cycle in between.
        m.d.sync += self.soft_reset.eq(resetting & self.bus_quiet & ~self.soft_reset)
        with m.If(self.reset_request):
            m.d.sync += resetting.eq(1)
        # Halt is a register of its own, for every unit decides by it: it goes with the error, not behind it.
        reported = Cat(getattr(self, f"error_{name}") for name in REPORTERS).any()
        with m.If(expired | reported | self.reset_request):
            m.d.sync += self.halt.eq(1)
        with m.If(self.soft_reset):
            m.d.sync += [resetting.eq(0), self.halt.eq(0), self.error_code.eq(0), self.error_address.eq(0)]

        counts = {n: getattr(self, f"count_{n}") for n in self.counters}
        step = {"CYCLES": self.busy & ~self.halt}
        step |= {n: self.events[k] for k, n in enumerate(self.of_core[1:])}
        for unit in Unit:
            running, stalled, waiting = (
                getattr(self, f"{s}_{unit.name.lower()}") for s in ("running", "stalled", "waiting")
            )
            state = Mux(running, Mux(stalled, 0b0100, 0b0001), Mux(waiting, 0b0010, 0b1000))
            for k, (name, _) in enumerate(UNIT_COUNTERS):
                step[f"{unit.name}_{name}"] = state[k] & step["CYCLES"]
        for name, count in counts.items():
            m.d.sync += count.eq(Mux(self.clear_counters | self.soft_reset, 0, count + step[name]))
        return m
