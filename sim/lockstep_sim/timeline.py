"""The timeline of one program: when each instruction ran, what it waited for, and what the bus did meanwhile.

It is made of the events of any simulated core, so that the RTL and the fast core give the same thing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from lockstep_isa.config import CoreConfig
from lockstep_isa.instructions import (
    LOAD,
    MATRIX,
    STORE,
    Destination,
    Function,
    Instruction,
    Memory,
    Source,
    Sparsity,
    Unit,
    Weights,
    resolve,
)
from lockstep_isa.packed import is_packed
from lockstep_isa.program import Program, transfer_bytes
from numpy.typing import NDArray

from .recording import FETCH, Kind, State

#: What a unit waits for while it counts ``wait_data``.
DATA_CAUSES = {
    Unit.LOAD: "device memory",
    Unit.MATRIX: "room for a result tile",
    Unit.VECTOR: "a result tile",
    Unit.STORE: "device memory",
}


class Section(NamedTuple):
    """A part of a program with a name, from instruction ``first`` to the next section."""

    first: int
    name: str


class Interval(NamedTuple):
    """Cycles ``start`` to ``end``, the latter excluded."""

    start: int
    end: int


@dataclass(frozen=True)
class Slice:
    """One instruction on its unit. Slices of a unit do not overlap: one begins where the one before it ends at the
    earliest, even if the unit accepted it before.

    Attributes
    ----------
    unit : where it ran. index : in the program. name : what it does, in a few words.
    accepted : cycle in which the unit took it. start, end : from when on it was the oldest one, and until when.
    stalls : cycles in which it waited for data.
    waits : cycles before it in which the unit waited for its tokens. waited_for : who gave the last one of them.
    """

    unit: Unit
    index: int
    name: str
    accepted: int
    start: int
    end: int
    stalls: tuple[Interval, ...] = ()
    waits: tuple[Interval, ...] = ()
    waited_for: Unit | None = None


class Token(NamedTuple):
    """A token: the instruction that gave it, and the one that took it."""

    giver: int
    taker: int


class Burst(NamedTuple):
    """A burst on the bus: who asked for it (:data:`lockstep_sim.recording.FETCH` or a unit), when, and its beats."""

    source: int
    asked: int
    first: int
    end: int
    beats: int


@dataclass(frozen=True)
class Timeline:
    """What one run of a program did.

    Attributes
    ----------
    config : the core. program : with its tokens. operands : values that the run had.
    cycles : of the run, as its counter says.
    slices : of all instructions, in the order of the program. tokens, bursts : in the order of time.
    tiles : int64[n, 2], cycle and number of complete tiles in the accumulator queue from then on.
    writes : int64[n, 2], cycle and byte address of each beat that was written; of the RTL alone.
    sections : named parts of the program.
    """

    config: CoreConfig
    program: Program
    operands: tuple[int, ...]
    cycles: int
    slices: tuple[Slice, ...]
    tokens: tuple[Token, ...]
    bursts: tuple[Burst, ...]
    tiles: NDArray[np.int64]
    writes: NDArray[np.int64]
    sections: tuple[Section, ...] = ()

    def resolved(self, index: int) -> Instruction | None:
        """An instruction with the operands of this run; none where it had nothing to do."""
        return resolve(self.program.instructions[index], self.operands)

    def of(self, unit: Unit) -> list[Slice]:
        """The slices of one unit, in order."""
        return [s for s in self.slices if s.unit == unit]


def timeline(
    config: CoreConfig,
    program: Program,
    operands: Sequence[int],
    events: NDArray[Any],
    cycles: int,
    sections: Sequence[Section] = (),
) -> Timeline:
    """The timeline of a program from what was recorded of it.

    operands : values of the program's operands. events : ``EVENT[n]`` of this run alone. cycles : its counter.
    Raises ``ValueError`` where the events are not those of a complete run of ``program``.
    """
    tokens = match_tokens(program)
    ends: dict[int, int] = {}
    order = {unit: [n for n, i in enumerate(program.instructions) if i.type.unit == unit] for unit in Unit}
    accepts: dict[int, int] = {}
    for unit in Unit:
        own = events[events["unit"] == unit]
        for kind, into in ((Kind.ACCEPT, accepts), (Kind.END, ends)):
            times = own["time"][own["kind"] == kind].tolist()
            if len(times) != len(order[unit]):
                raise ValueError(f"{len(times)} {kind.name} events of {unit.name}, {len(order[unit])} instructions")
            into.update(zip(order[unit], times, strict=True))
    givers: dict[int, list[int]] = {}
    for giver, taker in tokens:
        givers.setdefault(taker, []).append(giver)

    slices: dict[int, Slice] = {}
    for unit in Unit:
        stalls, waits = (_spans(events, unit, state) for state in (State.WAIT_DATA, State.WAIT_TOKEN))
        stall, wait, before = 0, 0, 0
        for index in order[unit]:
            start, end = max(accepts[index], before), ends[index]
            mine: list[Interval] = []
            while stall < len(stalls) and stalls[stall].start < end:
                s = stalls[stall]
                if s.end > start:
                    mine.append(Interval(max(s.start, start), min(s.end, end)))
                if s.end > end:
                    break
                stall += 1
            waited: list[Interval] = []
            while wait < len(waits) and waits[wait].end <= accepts[index]:
                waited.append(waits[wait])
                wait += 1
            last = max(givers.get(index, ()), key=lambda giver: ends[giver], default=None)
            cause = program.instructions[last].type.unit if waited and last is not None else None
            instruction = resolve(program.instructions[index], operands)
            name = f"{unit.name} (nothing to do)" if instruction is None else title(config, instruction)
            slices[index] = Slice(unit, index, name, accepts[index], start, end, tuple(mine), tuple(waited), cause)
            before = end
    return Timeline(
        config,
        program,
        tuple(operands),
        cycles,
        tuple(slices[n] for n in range(len(program.instructions))),
        tuple(sorted(tokens, key=lambda t: ends[t.giver])),
        _bursts(events),
        _values(events, Kind.TILES),
        _values(events, Kind.WRITE),
        tuple(sections),
    )


def title(config: CoreConfig, i: Instruction) -> str:
    """What a resolved instruction does, in a few words."""
    if i.type is MATRIX:
        form = f" {Weights(i.weights).name} {Sparsity(i.sparsity).name}" if is_packed(i) else ""
        return f"MATRIX depth={i.depth}{form} {_count(i.outer * i.inner, 'tile')}"
    if i.type in (LOAD, STORE):
        words = i.rows * i.words
        kind = " as bytes" if i.type is STORE and i.bytes else ""
        return f"{i.type.name} {Memory(i.memory).name} {_count(words * transfer_bytes(config, i), 'byte')}{kind}"
    steps = [Function(i.function).name] if i.function else []
    steps += ["sum"] if i.sum else []
    steps += ["maximum"] if i.maximum else []
    steps += [f"to {Destination(i.destination).name}"] if i.destination else []
    shape = f"{_count(i.columns, 'column')}" + (f" x {i.tiles}" if i.tiles > 1 else "")
    return " ".join(["VECTOR", f"{Source(i.source).name}", shape, *steps])


def match_tokens(program: Program) -> list[Token]:
    """Who takes whose token: between two units the nth token that is taken is the nth one given."""
    given: dict[tuple[Unit, Unit], list[int]] = {(a, b): [] for a in Unit for b in Unit}
    taken: dict[tuple[Unit, Unit], list[int]] = {(a, b): [] for a in Unit for b in Unit}
    for n, i in enumerate(program.instructions):
        for other in Unit:
            if i.signal >> other & 1:
                given[i.type.unit, other].append(n)
            if i.wait >> other & 1:
                taken[other, i.type.unit].append(n)
    return [Token(*ends) for pair in given for ends in zip(given[pair], taken[pair], strict=False)]


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def _spans(events: NDArray[Any], unit: Unit, state: State) -> list[Interval]:
    """Where a unit was in a state; neighbours are one."""
    chosen = events[(events["kind"] == Kind.SPAN) & (events["unit"] == unit) & (events["state"] == state)]
    return [Interval(t, t + n) for t, n in zip(chosen["time"].tolist(), chosen["value"].tolist(), strict=True)]


def _bursts(events: NDArray[Any]) -> tuple[Burst, ...]:
    found = []
    for source in (*Unit, FETCH):
        own = events[events["unit"] == source]
        asked, first, last = (own[own["kind"] == kind] for kind in (Kind.ASK, Kind.FIRST, Kind.LAST))
        rows = zip(asked["time"], first["time"], last["time"], asked["value"], strict=False)
        found += [Burst(int(source), *map(int, row)) for row in rows]
    return tuple(sorted(found, key=lambda burst: burst.asked))


def _values(events: NDArray[Any], kind: Kind) -> NDArray[np.int64]:
    """int64[n, 2]: times and values of the events of a kind."""
    chosen = events[events["kind"] == kind]
    return np.stack([chosen["time"].astype(np.int64), chosen["value"].astype(np.int64)], axis=1)
