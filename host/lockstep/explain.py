"""What bounds a model on a core, in sentences, and what would help: counters, and predictions for other cores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from lockstep_driver import Counters, Device, DriverError, parse
from lockstep_hls.toolchain import Progress
from lockstep_isa.config import ConfigurationError, CoreConfig
from lockstep_isa.instructions import Unit
from lockstep_sim.core import MemoryTiming
from lockstep_sim.fast import FastCore
from lockstep_sim.timeline import DATA_CAUSES, Timeline

from lockstep.compiler.allocation import CapacityError
from lockstep.executors import OpenExecutor, executor
from lockstep.profile import Profile, profile

#: What the bus is called beside the units.
BUS = "bus"
#: Share of the cycles below which something is not worth a sentence, and below which a change does not help.
_WORTH = 0.005
#: Runs the same inputs on any executor and gives its results.
Work = Callable[[OpenExecutor], list[np.ndarray]]


@dataclass(frozen=True)
class Cause:
    """Cycles in which a unit had an instruction and did not work on it.

    ``cause`` says for what it waited: another unit, memory, a result tile or room for one.
    """

    unit: str
    cause: str
    cycles: int


@dataclass(frozen=True)
class Change:
    """A core or a memory that differs in one thing, and the cycles that the fast core predicts with it.

    ``cycles`` is none where the model does not run there; ``reason`` says why.
    """

    name: str
    cycles: int | None
    reason: str = ""


@dataclass(frozen=True)
class Explanation:
    """What a run cost and why.

    Attributes
    ----------
    device : URI of the core that ran. programs, counters : of that run.
    busy : cycles in which each unit worked and the bus moved data, by name, the busiest first.
    causes : why units waited, the longest first.
    predicted : cycles of the same run on the fast core, with which the ``changes`` are compared.
    changes : the best one first, those that do not run last.
    """

    device: str
    programs: int
    counters: Counters
    busy: dict[str, int]
    causes: tuple[Cause, ...]
    predicted: int
    changes: tuple[Change, ...]

    @property
    def bound(self) -> str:
        """What is busy longest: a unit, or the bus."""
        return next(iter(self.busy))

    @property
    def sentences(self) -> list[str]:
        """All of it in words."""
        cycles = max(1, self.counters.cycles)
        shares = {("the bus" if name == BUS else name): count / cycles for name, count in self.busy.items()}
        (bound, most), *others = shares.items()
        rest = ", ".join(f"{name} in {share:.1%}" for name, share in others)
        programs = f"{self.programs} program{'' if self.programs == 1 else 's'}"
        idle = max(0, cycles - self.busy[self.bound])
        lines = [
            f"{self.counters.cycles:,} cycles in {programs} on {self.device}; operands enter the array in "
            f"{self.counters.mac_cycles / cycles:.1%} of them.",
            f"{bound[0].upper() + bound[1:]} bounds it: it works in {most:.1%} of the cycles; {rest}.",
            f"The other {idle:,} cycles are what a better order of instructions could save at most; beyond that, "
            f"{bound} itself must become faster, or do less.",
        ]
        for unit in Unit:
            own = [c for c in self.causes if c.unit == unit.name and c.cycles >= _WORTH * cycles]
            if own:
                parts = " and ".join(f"{c.cycles / cycles:.1%} for {c.cause}" for c in own)
                lines.append(f"{unit.name} waits: {parts} (of all cycles).")
        helps = [c for c in self.changes if c.cycles is not None and c.cycles < (1 - _WORTH) * self.predicted]
        if helps:
            best = helps[0]
            lines.append(
                f"What would help most is {best.name}: {_gain(best, self.predicted)}, predicted by the fast core."
            )
            if len(helps) > 1:
                lines.append("Then " + "; ".join(f"{c.name}, {_gain(c, self.predicted)}" for c in helps[1:]) + ".")
        useless = [c.name for c in self.changes if c.cycles is not None and c not in helps]
        if useless:
            lines.append(f"Less than {_WORTH:.1%} would bring: {', '.join(useless)}.")
        lines += [f"Not predicted: {c.name} ({c.reason})." for c in self.changes if c.cycles is None]
        return lines


def explain(uri: str, work: Work, progress: Progress = None) -> Explanation:
    """Run ``work`` on a core and on cores that differ from it in one thing each.

    Parameters
    ----------
    uri : of a device with a core. work : runs the same inputs on any executor. progress : told in one line what runs.

    Raises :class:`lockstep.errors.InputError` for an executor without a core, and what ``work`` raises.
    """
    with executor(uri, progress) as device:
        _say(progress, f"running on {uri}")
        with profile(device, timelines=True) as found:
            work(device)
        assert device.config is not None
        config = device.config
    parsed = parse(uri)
    base = _predict(config, parsed.memory_bytes, parsed.timing, work, progress)
    changes = []
    for name, changed, timing in variations(config, parsed.timing):
        _say(progress, f"predicting {name}")
        try:
            cycles = _predict(changed(), parsed.memory_bytes, timing, work, progress)
            changes.append(Change(name, cycles))
        except (CapacityError, ConfigurationError, DriverError) as error:
            changes.append(Change(name, None, _reason(error)))
    changes.sort(key=lambda change: (change.cycles is None, change.cycles))
    return replace(explanation(uri, found), predicted=base, changes=tuple(changes))


def explanation(uri: str, found: Profile) -> Explanation:
    """What a run says by itself, without predictions; ``found`` has timelines."""
    total = found.total
    return Explanation(uri, len(found.runs), total, busy_cycles(total), tuple(causes(found)), total.cycles, ())


def variations(config: CoreConfig, timing: MemoryTiming) -> list[tuple[str, Callable[[], CoreConfig], MemoryTiming]]:
    """Name, core and memory of everything that is tried. Making a core raises ``ConfigurationError`` where there is
    none like it.
    """

    def core(**fields: int) -> Callable[[], CoreConfig]:
        return lambda: config.replace(name=f"{config.name}+", **fields)

    words = ("activation_words", "weight_words", "vector_words", "parameter_words")
    rows, bus = 2 * config.rows, f"a bus of {16 * config.bus_bytes} bit"
    array = {name: max(16, getattr(config, name) // 2) for name in words} | {"rows": rows, "columns": rows}
    return [
        (bus, core(bus_bytes=2 * config.bus_bytes), timing),
        (f"{2 * config.lanes} vector lanes", core(lanes=2 * config.lanes), timing),
        (f"an array of {rows} x {rows}", core(**array), timing),
        (f"an array of {rows} x {rows} with {bus}", core(bus_bytes=2 * config.bus_bytes, **array), timing),
        (
            f"{2 * config.accumulator_tiles} result tiles",
            core(accumulator_tiles=2 * config.accumulator_tiles),
            timing,
        ),
        ("a memory without latency", core(), replace(timing, latency=0)),
        ("a memory without refresh", core(), replace(timing, refresh_interval=0)),
    ]


def busy_cycles(total: Counters) -> dict[str, int]:
    """Cycles in which each unit worked and the bus moved data, the busiest first.

    LOAD and STORE work for the bus, which carries instructions too, so that it stands in for them.
    """
    found = {unit.name: total.units[unit.name]["busy"] for unit in (Unit.MATRIX, Unit.VECTOR)}
    found[BUS] = total.read_beats + total.write_beats
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def causes(found: Profile) -> list[Cause]:
    """Why units waited, the longest first."""
    counted: dict[tuple[str, str], int] = {}
    for run in found.timelines:
        for unit, cause, cycles in _waits(run):
            counted[unit, cause] = counted.get((unit, cause), 0) + cycles
    return [Cause(*key, cycles) for key, cycles in sorted(counted.items(), key=lambda item: -item[1]) if cycles]


def _waits(run: Timeline) -> Sequence[tuple[str, str, int]]:
    found = []
    for each in run.slices:
        waited = sum(end - start for start, end in each.waits)
        stalled = sum(end - start for start, end in each.stalls)
        if waited:
            source = "a token" if each.waited_for is None else each.waited_for.name
            found.append((each.unit.name, source, waited))
        if stalled:
            found.append((each.unit.name, DATA_CAUSES[each.unit], stalled))
    return found


def _predict(config: CoreConfig, memory: int, timing: MemoryTiming, work: Work, progress: Progress) -> int:
    with OpenExecutor("fast", device=Device(FastCore(config, memory, timing, progress), "fast")) as device:
        work(device)
        return device.totals.cycles


def _gain(change: Change, base: int) -> str:
    assert change.cycles is not None
    return f"{change.cycles:,} cycles ({change.cycles / base - 1:+.1%})"


def _reason(error: Exception) -> str:
    """Why something does not run, without the operands for which it does not."""
    text = str(error)
    return text.partition(": ")[2] if text.startswith("with ") else text


def _say(progress: Progress, line: str) -> None:
    if progress is not None:
        progress(line)
