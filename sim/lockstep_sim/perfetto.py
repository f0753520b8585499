"""Timelines as a trace that Perfetto and Chrome's tracing page open: one track per unit, in one JSON file.

One cycle is one microsecond of the trace, so that what the viewer shows as ``1.5 ms`` are 1,500 cycles. The file says
so too. Its format is Chrome's "Trace Event Format", with complete events for instructions and stalls, flow events for
tokens and counter events for the bus and the accumulator queue.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lockstep_isa.instructions import Unit, disassemble

from .timeline import DATA_CAUSES, Slice, Timeline

#: Microseconds of the trace for each cycle.
SCALE = 1
#: Cycles over which bus beats are added up.
WINDOW = 256
_PROCESS = 1
_SECTIONS, _PROGRAMS = 10, 11


def write(path: Path | str, timelines: Sequence[Timeline], device: str, names: Sequence[str] = ()) -> None:
    """Write the timelines of programs that ran one behind the other; ``names`` has a name for each of them."""
    # One event a line: such files are long, and whoever searches them does so by lines.
    metadata = {
        "device": device,
        "core": timelines[0].config.name if timelines else None,
        "cycles": sum(t.cycles for t in timelines),
        "scale": f"1 cycle = {SCALE} us",
    }
    with Path(path).open("w", encoding="utf-8") as file:
        file.write(f'{{"displayTimeUnit":"ms","otherData":{_text(metadata)},"traceEvents":[\n')
        for n, event in enumerate(events(timelines, device, names)):
            file.write(("" if n == 0 else ",\n") + _text(event))
        file.write("\n]}\n")


def events(timelines: Sequence[Timeline], device: str, names: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """The trace events of programs that ran one behind the other."""
    yield {"ph": "M", "name": "process_name", "pid": _PROCESS, "args": {"name": f"core of {device}"}}
    tracks = {_PROGRAMS: "programs", _SECTIONS: "layers"} | {_track(unit): unit.name for unit in Unit}
    for order, (track, name) in enumerate(tracks.items()):
        yield {"ph": "M", "name": "thread_name", "pid": _PROCESS, "tid": track, "args": {"name": name}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": _PROCESS, "tid": track, "args": {"sort_index": order}}
    offset, flow = 0, 0
    for number, run in enumerate(timelines):
        name = names[number] if number < len(names) else f"program {number}"
        yield _complete(_PROGRAMS, name, offset, run.cycles, {"instructions": len(run.slices)})
        yield from _sections(run, offset)
        for each in run.slices:
            yield from _slice(run, each, offset)
        for giver, taker in ((run.slices[g], run.slices[t]) for g, t in run.tokens):
            # Inside the slices, for a flow begins and ends in what encloses it.
            yield _flow("s", flow, giver.unit, offset + giver.end - 0.5)
            yield _flow("f", flow, taker.unit, offset + taker.start + 0.25) | {"bp": "e"}
            flow += 1
        yield from _counters(run, offset)
        offset += run.cycles


def sections(run: Timeline) -> list[tuple[str, int, int]]:
    """Name, first cycle and end of each named part: from the end of the one before it, because units overlap."""
    found, before = [], 0
    bounds = [*(section.first for section in run.sections), len(run.slices)]
    for section, last in zip(run.sections, bounds[1:], strict=True):
        end = max((s.end for s in run.slices[section.first : last]), default=before)
        if end > before:
            found.append((section.name, before, end))
            before = end
    return found


def beats_per_window(run: Timeline, window: int = WINDOW) -> np.ndarray:
    """float64[2, windows]: bus beats read and written in each ``window`` cycles; a burst's are spread evenly."""
    edges = np.arange(0, run.cycles + window, window)
    found = []
    for writes in (False, True):
        chosen = [b for b in run.bursts if (b.source == Unit.STORE) == writes]
        times = np.array([t for b in chosen for t in (b.first, b.end)], np.float64)
        rates = [b.beats / max(1, b.end - b.first) for b in chosen]
        slope = np.array([signed for rate in rates for signed in (rate, -rate)])
        order = np.argsort(times, kind="stable")
        times, level = times[order], np.cumsum(slope[order])
        total = np.concatenate([[0.0], np.cumsum(level[:-1] * np.diff(times))]) if len(times) else np.zeros(0)
        found.append(np.diff(np.interp(edges, times, total)) if len(times) else np.zeros(len(edges) - 1))
    return np.array(found)


def _sections(run: Timeline, offset: int) -> Iterator[dict[str, Any]]:
    for name, start, end in sections(run):
        yield _complete(_SECTIONS, name, offset + start, end - start, {})


def _slice(run: Timeline, each: Slice, offset: int) -> Iterator[dict[str, Any]]:
    track = _track(each.unit)
    names = [operand.name for operand in run.program.operands]
    details = {
        "index": each.index,
        "accepted": offset + each.accepted,
        "stalled cycles": sum(end - start for start, end in each.stalls),
        "waited cycles": sum(end - start for start, end in each.waits),
        "instruction": disassemble(run.program.instructions[each.index], names),
    }
    for start, end in each.waits:
        source = "a token" if each.waited_for is None else each.waited_for.name
        yield _complete(track, f"waits for {source}", offset + start, end - start, {"for": each.index}, "token")
    yield _complete(track, each.name, offset + each.start, each.end - each.start, details)
    for start, end in each.stalls:
        yield _complete(track, f"stall: {DATA_CAUSES[each.unit]}", offset + start, end - start, {}, "stall")


def _counters(run: Timeline, offset: int) -> Iterator[dict[str, Any]]:
    size = run.config.bus_bytes
    changes = sorted((t, d * b.beats * size) for b in run.bursts for t, d in ((b.asked, 1), (b.end, -1)))
    flying, last = 0, None
    for time, change in changes:
        flying += change
        if last is not None and last[0] != time:
            yield _counter("bytes in flight", offset + last[0], {"bytes": last[1]})
        last = (time, flying)
    if last is not None:
        yield _counter("bytes in flight", offset + last[0], {"bytes": last[1]})
    read, written = beats_per_window(run)
    for n in range(len(read)):
        values = {"read": round(read[n] * size, 1), "written": round(written[n] * size, 1)}
        yield _counter(f"bytes on the bus in {WINDOW} cycles", offset + n * WINDOW, values)
    for time, tiles in run.tiles.tolist():
        yield _counter("result tiles in the accumulator queue", offset + time, {"tiles": tiles})


def _track(unit: Unit) -> int:
    return int(unit) + 1


def _complete(
    track: int, name: str, start: float, length: float, args: dict[str, Any], category: str = "instruction"
) -> dict[str, Any]:
    times = {"ts": start * SCALE, "dur": length * SCALE}
    return {"ph": "X", "name": name, "cat": category, "pid": _PROCESS, "tid": track, **times, "args": args}


def _flow(phase: str, number: int, unit: Unit, time: float) -> dict[str, Any]:
    times = {"ts": time * SCALE, "pid": _PROCESS, "tid": _track(unit)}
    return {"ph": phase, "id": number, "name": "token", "cat": "token", **times}


def _counter(name: str, time: float, values: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "C", "name": name, "pid": _PROCESS, "ts": time * SCALE, "args": values}


def _text(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def slices_overlap(found: Iterable[dict[str, Any]]) -> bool:
    """Whether complete events of one track overlap without one being inside the other, which viewers do not draw."""
    tracks: dict[int, list[tuple[float, float]]] = {}
    for event in found:
        if event["ph"] == "X":
            tracks.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    for spans in tracks.values():
        open_ends: list[float] = []
        for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
            while open_ends and open_ends[-1] <= start:
                open_ends.pop()
            if open_ends and end > open_ends[-1]:
                return True
            open_ends.append(end)
    return False
