"""The waveform around the first wrong value that a core writes, found by running it again beside the fast core."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lockstep_driver import Device, open_device, parse
from lockstep_hls.toolchain import Progress
from lockstep_isa.instructions import STORE
from lockstep_isa.program import transfer_bytes
from lockstep_sim.fast import FastCore
from lockstep_sim.signals import write_view
from lockstep_sim.timeline import Timeline
from lockstep_sim.verilate import SIGNALS, build_core

from lockstep.executors import OpenExecutor

#: Cycles of a waveform, and those of them that lie in front of the wrong value.
WINDOW, BEFORE = 2000, 1500


@dataclass(frozen=True)
class WrongWrite:
    """The first wrong value that a core writes to its memory.

    Attributes
    ----------
    program : how many programs ran before it. instruction : the STORE, by its index. cycle : of that program, in which
    the bus takes the value. since_opening : cycles of all programs until then.
    address : of the first wrong byte. expected, actual : that byte on the fast core and here.
    """

    program: int
    instruction: int
    cycle: int
    since_opening: int
    address: int
    expected: int
    actual: int

    def __str__(self) -> str:
        return (
            f"program {self.program}, cycle {self.cycle:,}: instruction {self.instruction} (STORE) writes "
            f"{self.actual:#04x} to {self.address:#x} where the fast core writes {self.expected:#04x}"
        )


@dataclass(frozen=True)
class Wave:
    """A waveform around a wrong value, and what shows it: a save file of GTKWave, a command file of Surfer."""

    wrong: WrongWrite
    waveform: Path
    gtkwave: Path
    surfer: Path


class _Found(Exception):
    """Ends a run whose first wrong value is known."""

    def __init__(self, wrong: WrongWrite) -> None:
        super().__init__(str(wrong))
        self.wrong = wrong


class _Done(Exception):
    """Ends a run whose waveform is written."""


Work = Callable[[OpenExecutor], Any]


def first_wrong_write(uri: str, work: Work, progress: Progress = None) -> WrongWrite | None:
    """The first value in device memory in which ``uri`` differs from the fast core of its configuration, or none.

    uri : of a device of the scheme ``rtl``. work : runs the same inputs on any executor. Only what programs store is
    compared; what the host wrote is taken as it is.
    """
    parsed = parse(uri)
    expected: list[list[np.ndarray]] = []
    twin = Device(FastCore(parsed.config, parsed.memory_bytes, parsed.timing, progress), "fast")
    twin.on_timeline = lambda run: expected.append([twin.memory_at(*block).copy() for _, block in _stored(run)])
    with OpenExecutor("fast", device=twin) as executor:
        _say(progress, "running on the fast core, to compare what programs store")
        work(executor)

    subject = open_device(uri, progress)
    programs, cycles = 0, 0

    def compare(run: Timeline) -> None:
        nonlocal programs, cycles
        blocks = zip(_stored(run), expected[programs], strict=True)
        wrong = [
            (address + int(at), index, int(wanted[at]), int(found[at]))
            for (index, (address, size)), wanted in blocks
            for found in [subject.memory_at(address, size)]
            for at in np.flatnonzero(found != wanted)[:1]
        ]
        if wrong:
            written = [(_written(run, address), address, *rest) for address, *rest in wrong]
            cycle, address, index, wanted, actual = min(written)
            raise _Found(WrongWrite(programs, index, cycle, cycles + cycle, address, wanted, actual))
        programs, cycles = programs + 1, cycles + run.cycles

    subject.on_timeline = compare
    with OpenExecutor(uri, device=subject) as executor:
        _say(progress, f"running on {uri} again, to find the first wrong value")
        try:
            work(executor)
        except _Found as found:
            return found.wrong
    return None


def write_wave(uri: str, work: Work, wrong: WrongWrite, path: Path, progress: Progress = None) -> Wave:
    """Run ``work`` once more up to a wrong value, and write the waveform around it to ``path``, with files for viewers
    beside it. Raises :class:`lockstep_hls.toolchain.ToolchainError` where what waveforms need is missing.
    """
    first = max(0, wrong.since_opening - BEFORE)
    device = open_device(uri, progress, str(path), (first, WINDOW))
    left = wrong.program + 1

    def count(_: Timeline) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise _Done

    device.on_timeline = count
    with OpenExecutor(uri, device=device) as executor:
        _say(progress, f"running on {uri} again, to write {path}")
        with contextlib.suppress(_Done):
            work(executor)
    signals = build_core(device.config, trace=True).parent / SIGNALS
    return Wave(wrong, path, *write_view(path, signals, 2 * wrong.since_opening))


def _stored(run: Timeline) -> list[tuple[int, tuple[int, int]]]:
    """For each row of each STORE, in order: index of the instruction, and address and size of what it writes."""
    found = []
    for each in run.slices:
        i = run.resolved(each.index)
        if i is not None and i.type is STORE:
            size = i.words * transfer_bytes(run.config, i)
            found += [(each.index, (i.address + row * i.stride, size)) for row in range(i.rows)]
    return found


def _written(run: Timeline, address: int) -> int:
    """The last cycle in which a beat with this byte was written: what it brought is what stands there."""
    beat = address - address % run.config.bus_bytes
    times = run.writes[run.writes[:, 1] == beat][:, 0]
    return int(times[-1]) if len(times) else run.cycles


def _say(progress: Progress, line: str) -> None:
    if progress is not None:
        progress(line)
