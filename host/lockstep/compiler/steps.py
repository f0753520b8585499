"""Steps of a schedule: a product each, what brings its operands, and what VECTOR makes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


def nothing() -> None:
    """For a step that lacks one of its three parts."""


@dataclass(frozen=True, eq=False)
class Step:
    """``load`` asks for operands, ``multiply`` starts a product, ``drain`` takes its result tiles.

    load_late : asks for operands of later steps in the place of those of the step before. It is emitted behind that
    one's drain: a LOAD that waits for a product's end must not stand in front of the pass that lets it end.
    behind : steps that must be drained before this one's parts are emitted, because it reads what they write.
    """

    load: Callable[[], None] = nothing
    multiply: Callable[[], None] = nothing
    drain: Callable[[], None] = nothing
    load_late: Callable[[], None] = nothing
    behind: tuple[Step, ...] = ()


def emit_steps(steps: Sequence[Step]) -> None:
    """Emit steps so that MATRIX has the product of the next one in its queue while VECTOR drains one."""
    place = {id(step): n for n, step in enumerate(steps)}
    drained = 0

    def drain(end: int) -> None:
        nonlocal drained
        for step in steps[drained:end]:
            step.drain()
        drained = max(drained, end)

    for n, step in enumerate(steps):
        drain(max((place[id(other)] + 1 for other in step.behind), default=0))
        step.load()
        step.multiply()
        drain(n)
        step.load_late()
    drain(len(steps))
