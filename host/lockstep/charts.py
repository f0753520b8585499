"""Drawings of a report, as SVG that stands in a page and takes its colours from there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np
from lockstep_isa.config import CoreConfig
from lockstep_isa.instructions import Unit
from lockstep_sim.perfetto import beats_per_window, sections
from lockstep_sim.timeline import Interval, Timeline

from .layers import Layer

if TYPE_CHECKING:
    from .explore import Outcome

WIDTH, LEFT = 960, 70
#: Columns of a timeline's summary.
BINS = 320
_ROW, _GAP = 38, 12


def timeline_chart(timelines: Sequence[Timeline]) -> str:
    """What each unit and the bus did over time, in shares of a column's cycles."""
    total = sum(run.cycles for run in timelines)
    edges = np.linspace(0, total, BINS + 1)
    rows = []
    for unit in Unit:
        busy, stalled, waited = (np.zeros(BINS) for _ in range(3))
        offset = 0
        for run in timelines:
            own = run.of(unit)
            stalls = [stall for each in own for stall in each.stalls]
            all_of = _covered((Interval(each.start, each.end) for each in own), offset, edges)
            stalled += (still := _covered(stalls, offset, edges))
            busy += all_of - still
            waited += _covered((wait for each in own for wait in each.waits), offset, edges)
            offset += run.cycles
        rows.append((unit.name, [("busy", busy), ("data", stalled), ("token", waited)]))
    rows.append(("bus", [("read", _beats(timelines, 0, edges)), ("written", _beats(timelines, 1, edges))]))
    parts, top = [], 24
    for name, stack in rows:
        parts.append(f'<text x="{LEFT - 8}" y="{top + _ROW / 2 + 4}" text-anchor="end">{name}</text>')
        parts.append(f'<rect class="track" x="{LEFT}" y="{top}" width="{WIDTH - LEFT}" height="{_ROW}"/>')
        base = np.zeros(BINS)
        for kind, share in stack:
            parts.append(f'<path class="{kind}" d="{_area(base, base + share, top)}"/>')
            base = base + share
        top += _ROW + _GAP
    parts += _layer_strip(timelines, total, top)
    parts += _axis(total, top + 34)
    return _svg(top + 56, parts, "What each unit and the bus did over time")


def roofline_chart(config: CoreConfig, found: Sequence[Layer], whole: Layer) -> str:
    """Multiplications a cycle over multiplications a byte, with what array and bus allow."""
    points = [(layer, layer.intensity, layer.macs / layer.cycles) for layer in (*found, whole) if layer.cycles]
    points = [(layer, x, y) for layer, x, y in points if x and y > 0]
    peak, slope = config.macs_per_cycle, config.bus_bytes
    low_x = min([x for _, x, _ in points if x] + [peak / slope / 8]) / 1.5
    high_x = max([x for _, x, _ in points if x] + [4 * peak / slope]) * 1.5
    low_y, high_y = min([y for *_, y in points] + [slope * low_x]) / 1.5, 2 * peak
    height = 340

    def at(x: float, y: float) -> tuple[float, float]:
        along = math.log(x / low_x) / math.log(high_x / low_x)
        up = math.log(y / low_y) / math.log(high_y / low_y)
        return LEFT + along * (WIDTH - LEFT - 20), height - 40 - up * (height - 60)

    corner = peak / slope
    line = [at(max(low_x, low_y / slope), max(low_x * slope, low_y)), at(corner, peak), at(high_x, peak)]
    parts = [f'<polyline class="roof" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in line)}"/>']
    x, y = at(corner, peak)
    parts.append(
        f'<text x="{x + 6:.1f}" y="{y - 8:.1f}">array: {peak:,} a cycle; bus: {slope} bytes a cycle; they meet at '
        f"{corner:g} a byte</text>"
    )
    for layer, intensity, rate in points:
        assert intensity is not None
        x, y = at(intensity, rate)
        kind = "whole" if layer is whole else "point"
        text = f"{layer.name}: {intensity:.1f} a byte, {rate:.1f} a cycle ({rate / min(peak, slope * intensity):.0%})"
        parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{escape(text)}</title></circle>')
    parts.append(f'<text x="{WIDTH - 20}" y="{height - 12}" text-anchor="end">multiplications a byte</text>')
    parts.append(f'<text x="{LEFT}" y="14">multiplications a cycle</text>')
    for value in _powers(low_x, high_x):
        x, _ = at(value, low_y)
        parts.append(f'<text x="{x:.1f}" y="{height - 26}" text-anchor="middle">{value:g}</text>')
    for value in _powers(low_y, high_y):
        _, y = at(low_x, value)
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    return _svg(height, parts, "Roofline")


def pareto_chart(found: Sequence[Outcome], best: Sequence[Outcome]) -> str:
    """Cycles over logic of many cores, those of the Pareto front joined: an SVG file of its own."""
    ran = [(o, o.cycles) for o in found if o.cycles is not None]
    height = 420
    low_x, high_x = (f(o.logic for o, _ in ran) for f in (min, max)) if ran else (1, 2)
    low_y, high_y = (f(cycles for _, cycles in ran) for f in (min, max)) if ran else (1, 2)

    def at(logic: float, cycles: float) -> tuple[float, float]:
        along = math.log(logic / low_x * 1.2) / math.log(high_x / low_x * 1.44)
        up = math.log(cycles / low_y * 1.2) / math.log(high_y / low_y * 1.44)
        return LEFT + along * (WIDTH - LEFT - 20), height - 40 - up * (height - 70)

    front = " ".join("{:.1f},{:.1f}".format(*at(o.logic, o.cycles or 1)) for o in best)
    parts = [
        "<style>text { font: 11px sans-serif; fill: #59636e } circle { fill: #0969da; fill-opacity: 0.35 } "
        ".best { fill: #cf222e; fill-opacity: 1 } polyline { fill: none; stroke: #cf222e } "
        "@media (prefers-color-scheme: dark) { text { fill: #9198a1 } }</style>",
        f'<polyline points="{front}"/>',
    ]
    named: list[tuple[float, float]] = []
    for outcome, cycles in ran:
        x, y = at(outcome.logic, cycles)
        text = f"{outcome.point}: {cycles:,} cycles, {outcome.logic:,} sites of logic"
        kind = ' class="best"' if outcome in best else ""
        parts.append(f'<circle{kind} cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{escape(text)}</title></circle>')
        # A name that would lie on another one is left to the pointer.
        if outcome in best and all(abs(y - other) > 12 or abs(x - along) > 160 for along, other in named):
            named.append((x, y))
            place = f'x="{x - 8:.1f}" text-anchor="end"' if x > WIDTH - 180 else f'x="{x + 8:.1f}"'
            parts.append(f'<text {place} y="{y - 6:.1f}">{escape(str(outcome.point))}</text>')
    for value in _powers(low_x / 1.2, high_x * 1.2, 2):
        parts.append(f'<text x="{at(value, low_y)[0]:.1f}" y="{height - 24}" text-anchor="middle">{value:,.0f}</text>')
    for value in _powers(low_y / 1.2, high_y * 1.2, 2):
        parts.append(f'<text x="{LEFT - 6}" y="{at(low_x, value)[1] + 4:.1f}" text-anchor="end">{value:,.0f}</text>')
    parts.append(f'<text x="{WIDTH - 20}" y="{height - 8}" text-anchor="end">sites of logic, estimated</text>')
    parts.append(f'<text x="{LEFT}" y="14">cycles, predicted</text>')
    return _svg(height, parts, "Cycles over logic").replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)


def _powers(low: float, high: float, base: int = 4) -> list[float]:
    return [float(base) ** n for n in range(math.ceil(math.log(low, base)), math.floor(math.log(high, base)) + 1)]


def _covered(intervals: Iterable[Interval], offset: int, edges: np.ndarray) -> np.ndarray:
    """float64[bins]: which share of each bin intervals cover that stand in order and do not overlap."""
    spans = np.array([(start, end) for start, end in intervals if end > start], np.float64).reshape(-1, 2) + offset
    if not len(spans):
        return np.zeros(len(edges) - 1)
    lengths = spans[:, 1] - spans[:, 0]
    before = np.concatenate([[0.0], np.cumsum(lengths)])
    levels = np.stack([before[:-1], before[1:]], axis=1)
    return np.diff(np.interp(edges, spans.ravel(), levels.ravel())) / np.diff(edges)


def _beats(timelines: Sequence[Timeline], row: int, edges: np.ndarray) -> np.ndarray:
    """float64[bins]: the share of each bin in which beats are read (row 0) or written (1)."""
    times, sums, offset, total = [0.0], [0.0], 0, 0.0
    for run in timelines:
        window = max(1, run.cycles // BINS)
        for n, beats in enumerate(beats_per_window(run, window)[row]):
            total += beats
            times.append(offset + min(run.cycles, (n + 1) * window))
            sums.append(total)
        offset += run.cycles
    return np.minimum(1, np.diff(np.interp(edges, times, sums)) / np.diff(edges))


def _area(low: np.ndarray, high: np.ndarray, top: float) -> str:
    """The steps between two levels in 0 to 1, as a path."""
    step = (WIDTH - LEFT) / BINS

    def steps(levels: np.ndarray, order: Iterable[int], forward: bool) -> list[str]:
        found = []
        for n in order:
            y = f"{top + _ROW * (1 - min(1.0, float(levels[n]))):.1f}"
            left, right = f"{LEFT + n * step:.1f}", f"{LEFT + (n + 1) * step:.1f}"
            found += [f"{left},{y}", f"{right},{y}"] if forward else [f"{right},{y}", f"{left},{y}"]
        return found

    there = steps(high, range(BINS), True)
    back = steps(low, reversed(range(BINS)), False)
    return "M" + " L".join(there + back) + " Z"


def _layer_strip(timelines: Sequence[Timeline], total: int, top: float) -> list[str]:
    parts, offset, number = [], 0, 0
    scale = (WIDTH - LEFT) / max(1, total)
    parts.append(f'<text x="{LEFT - 8}" y="{top + 13}" text-anchor="end">layers</text>')
    for run in timelines:
        for name, start, end in sections(run):
            x, width = LEFT + (offset + start) * scale, (end - start) * scale
            title = f"<title>{escape(name)}: {end - start:,} cycles</title>"
            place = f'x="{x:.1f}" y="{top}" width="{max(0.3, width):.1f}" height="18"'
            parts.append(f'<rect class="layer{number % 2}" {place}>{title}</rect>')
            number += 1
        offset += run.cycles
    return parts


def _axis(total: int, y: float) -> list[str]:
    step = 10 ** math.floor(math.log10(max(1, total)))
    step = next(s for s in (step, step // 2, step // 5, 1) if s and (total // s >= 4 or s == 1))
    parts = []
    for value in range(0, total + 1, max(1, step)):
        x = LEFT + value / max(1, total) * (WIDTH - LEFT)
        anchor = "end" if x > WIDTH - 40 else "middle"
        parts.append(f'<text class="tick" x="{x:.1f}" y="{y}" text-anchor="{anchor}">{value:,}</text>')
    return parts


def _svg(height: float, parts: list[str], name: str) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(name)}">'
    return head + "".join(parts) + "</svg>"
