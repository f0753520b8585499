"""What a benchmark is: a case with a name, sizes, a bar, and what others have published. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .measure import Bench, Measurement


@dataclass(frozen=True)
class Published:
    """A figure that somebody else has published; nothing here measures it."""

    figure: str
    source: str


@dataclass(frozen=True)
class Bar:
    """What a case should reach.

    Attributes
    ----------
    text : in words. share : least share of the limit, of each measurement or, with ``worst``, of their median.
    worst : least share of the worst one. sample : fewer measurements than this say nothing about the bar. core : the
    only preset that the bar is for, if there is one. figure : which of a measurement's own figures stands in the place
    of the share of the limit, if one does.
    """

    text: str
    share: float
    worst: float | None = None
    sample: int = 1
    core: str | None = None
    figure: str | None = None

    def reached(self, measured: Sequence[Measurement]) -> bool | None:
        """Whether measurements of one core reach the bar; none where they are too few to say, or lack its figure."""
        if self.figure is not None and any(self.figure not in one.figures for one in measured):
            return None
        values = [one.share if self.figure is None else one.figures[self.figure] for one in measured]
        return self.met(values, measured[0].core)

    def met(self, shares: Sequence[float], core: str) -> bool | None:
        """Whether these shares of the limit on a core reach the bar; none where they are too few to say."""
        if len(shares) < self.sample or self.core not in (None, core):
            return None
        if self.worst is None:
            return min(shares) >= self.share
        return median(shares) >= self.share and min(shares) >= self.worst


@dataclass(frozen=True)
class Case:
    """An entry of the registry: ``lockstep bench NAME``.

    Attributes
    ----------
    help : one line. sizes : a frozen dataclass of :mod:`.sizes`; its fields are the options of the command.
    module : of this package; its ``run(sizes, bench)`` gives the measurements one by one. core : where it runs unasked.
    """

    name: str
    help: str
    sizes: type
    module: str
    bar: Bar
    published: tuple[Published, ...] = ()
    core: str = "laptop"

    @property
    def run(self) -> Callable[[Any, Bench], Iterator[Measurement]]:
        """The measurements for sizes; the module is imported now."""
        return import_module(f"{__package__}.{self.module}").run
