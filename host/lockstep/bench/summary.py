"""Measurements in words: which of many are shown, and the lines below a table of them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from .case import Case
from .measure import Measurement

#: Of more measurements than this only the worst are shown, and how many of them.
MOST_ROWS, WORST = 12, 8


def shown(measured: Sequence[Measurement]) -> Sequence[Measurement]:
    """All, or of many those that are farthest from their limits."""
    return measured if len(measured) <= MOST_ROWS else sorted(measured, key=lambda m: m.share)[:WORST]


def varying(measured: Sequence[Measurement]) -> list[str]:
    """The parameters that are not the same in all measurements."""
    first = measured[0].parameters
    return [name for name in first if any(m.parameters[name] != first[name] for m in measured)]


def sizes(measurement: Measurement, names: Sequence[str], rest: bool = False) -> str:
    """The parameters called ``names``, or the ``rest`` of them, in words."""
    return " ".join(f"{name}={value}" for name, value in measurement.parameters.items() if (name in names) is not rest)


def figures(measurement: Measurement) -> list[str]:
    """The figures of a case's own in words: a line of numbers, and one for each text."""
    named = [(name.replace("_", " "), value) for name, value in measurement.figures.items()]
    numbers = [
        f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value:,}"
        for name, value in named
        if not isinstance(value, str)
    ]
    return [", ".join(numbers)] * bool(numbers) + [f"{name}: {text}" for name, text in named if isinstance(text, str)]


def summary(case: Case, measured: Sequence[Measurement]) -> list[str]:
    """Lines on bits, speed, the bar, and what others have published."""
    shares = [m.share for m in measured]
    rate = median(m.cycles_per_second for m in measured)
    same = sum(m.identical for m in measured)
    lines = [
        f"{same} of {len(measured)} have the bits of {measured[0].reference}; {rate:,.0f} cycles simulated a second",
    ]
    if len(measured) > 1:
        lines.append(f"median {median(shares):.1%} of the limit, worst {min(shares):.1%}")
    lines += [line for m in measured for line in figures(m)]
    if (met := case.bar.reached(measured)) is not None:
        lines.append(f"{'reached' if met else 'not reached'}: {case.bar.text}")
    return lines + [f"published, not measured here: {p.figure}, {p.source}" for p in case.published]
