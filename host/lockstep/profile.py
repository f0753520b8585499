"""What a run on a device costs: the counters of its programs and, where they are wanted, their timelines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from lockstep_driver import Counters
from lockstep_sim.timeline import Timeline

from lockstep.errors import InputError
from lockstep.executors import OpenExecutor


@dataclass
class Profile:
    """Programs in the order in which they ran.

    Attributes
    ----------
    runs : the counters of each program. timelines : one for each, where they are recorded.
    """

    runs: list[Counters] = field(default_factory=list)
    timelines: list[Timeline] = field(default_factory=list)

    @property
    def total(self) -> Counters:
        """The counters of all programs, added up."""
        return total(self.runs)


def total(runs: list[Counters]) -> Counters:
    """Counters added up; all zero where nothing ran."""
    names = ("cycles", "instructions", "read_beats", "write_beats", "mac_cycles", "skipped_chunks")
    units: dict[str, dict[str, int]] = {}
    for run in runs:
        for unit, counts in run.units.items():
            into = units.setdefault(unit, dict.fromkeys(counts, 0))
            for name, count in counts.items():
                into[name] += count
    return Counters(**{name: sum(getattr(run, name) for run in runs) for name in names}, units=units)


@contextmanager
def profile(device: OpenExecutor, timelines: bool = False) -> Iterator[Profile]:
    """Collect what ``device`` runs inside a ``with`` block.

    timelines : record those too; a simulation of the RTL takes somewhat longer. Raises :class:`InputError` for an
    executor that has no core.
    """
    if device.config is None:
        raise InputError(
            f"'{device.uri}' runs without programs, so there is nothing to count; give a device with a core, such as "
            "fast:laptop"
        )
    found = Profile()
    device.observe(found.runs.append, found.timelines.append if timelines else None)
    try:
        yield found
    finally:
        device.observe(None, None)
