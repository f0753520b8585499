"""Two pictures of a run: a roofline, and what each unit did with its cycles. They need matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lockstep_driver import parse
from lockstep_isa.config import CoreConfig

from .measure import BenchError, Measurement
from .summary import shown, sizes, varying

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = ("png", "svg")
#: File name -> what the picture shows.
PICTURES = {
    "roofline": "Multiply-accumulates a cycle over those a byte, below the roof of array and bus",
    "units": "Shares of the cycles of LOAD, MATRIX, VECTOR and STORE: busy, waiting for data or tokens, idle",
}
#: Colours that people with any kind of colour vision tell apart (Okabe and Ito), and what they stand for.
STATES = {"busy": "#009E73", "wait_data": "#E69F00", "wait_token": "#56B4E9", "idle": "#DDDDDD"}
CASES = ("#0072B2", "#D55E00", "#CC79A7", "#009E73", "#E69F00", "#56B4E9", "#F0E442", "#000000")


def check_matplotlib() -> None:
    """Raise :class:`BenchError` naming the extra where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise BenchError("plots need matplotlib: pip install 'lockstep-accel[plot]'") from None


def write_plots(folder: Path, measured: Sequence[Measurement]) -> list[Path]:
    """Write ``roofline``, one for each core, and ``units`` as PNG and SVG into ``folder``, which is made; returns their
    paths.
    """
    check_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    groups = _by_case(measured)
    bars = sum(len(shown(group)) for group in groups.values())
    cores = {one.core: parse(one.device).config for one in measured}
    written = []
    # Text stays text, and the same run gives the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lockstep", "font.size": 9}):
        for name, size, draw in (
            ("roofline", (7.0 * len(cores), 4.5), lambda figure: _rooflines(figure, groups, cores)),
            ("units", (9.0, 1.5 + 0.3 * bars), lambda figure: _units(figure, groups)),
        ):
            figure = Figure(figsize=size, layout="constrained")
            draw(figure)
            for suffix in FORMATS:
                path = folder / f"{name}.{suffix}"
                metadata: dict[str, Any] = {"Date": None} if suffix == "svg" else {"Software": None}
                figure.savefig(path, dpi=150, metadata=metadata)
                written.append(path)
    return written


def _by_case(measured: Sequence[Measurement]) -> dict[str, list[Measurement]]:
    groups: dict[str, list[Measurement]] = {}
    for one in measured:
        groups.setdefault(one.case, []).append(one)
    return groups


def _rooflines(figure: Any, groups: dict[str, list[Measurement]], cores: dict[str, CoreConfig]) -> None:
    for axes, (name, config) in zip(figure.subplots(1, len(cores), squeeze=False)[0], cores.items(), strict=True):
        on_core = {case: [m for m in group if m.core == name] for case, group in groups.items()}
        _roofline(axes, {case: group for case, group in on_core.items() if group}, config)


def _roofline(axes: Axes, groups: dict[str, list[Measurement]], config: CoreConfig) -> None:
    """Multiply-accumulates a cycle over those a byte, below what array and bus allow."""
    from matplotlib.ticker import LogLocator, NullFormatter

    macs, points = config.macs_per_cycle, []
    for (case, group), colour in zip(groups.items(), _cycle(len(groups)), strict=True):
        x = np.array([m.mac_cycles * macs / m.bytes for m in group])
        y = np.array([m.mac_cycles * macs / m.cycles for m in group])
        points.append(x)
        axes.plot(x, y, "o", color=colour, markersize=4, alpha=0.7, markeredgewidth=0, label=case)
    every = np.concatenate(points)
    ridge = macs / config.bus_bytes
    span = np.geomspace(min(every.min(), ridge) / 2, max(every.max(), ridge) * 2, 200)
    axes.plot(span, np.minimum(span * config.bus_bytes, macs), color="black", linewidth=1.2, label="array and bus")
    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("multiply-accumulate slots a byte moved")
    axes.set_ylabel("multiply-accumulate slots a cycle")
    axes.set_title(f"Core {config.name}: {config.rows} x {config.columns} array, {config.bus_bytes} bytes a cycle")
    axes.grid(True, which="major", linewidth=0.4)
    axes.legend(loc="lower right")


def _cycle(count: int) -> list[str]:
    return [CASES[n % len(CASES)] for n in range(count)]


def _units(figure: Any, groups: dict[str, list[Measurement]]) -> None:
    """Shares of the cycles of each unit, one bar a measurement; of many the ones farthest from their limits."""
    labels, chosen = [], []
    for case, group in groups.items():
        names = varying(group)
        for one in shown(group):
            given = sizes(one, names).replace("shape=", "").replace("context=", "behind ")
            labels.append(f"{case} {given}".strip())
            chosen.append(one)
    units = list(chosen[0].units)
    places = np.arange(len(chosen))
    for axes, unit in zip(figure.subplots(1, len(units), sharey=True), units, strict=True):
        left = np.zeros(len(chosen))
        for state, colour in STATES.items():
            share = np.array([m.units[unit][state] / m.cycles for m in chosen])
            axes.barh(places, share, left=left, color=colour, label=state.replace("_", " for "), height=0.8)
            left += share
        axes.set(title=unit, xlim=(0, 1), xticks=[0, 0.5, 1], xticklabels=["0", "50 %", "100 %"])
        axes.set_yticks(places, labels)
        axes.tick_params(axis="y", length=0)
        axes.margins(y=0.01)
    axes.invert_yaxis()
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(STATES))
