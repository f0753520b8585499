"""What lies on chip while a program runs: values as panels, and chunks of weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass
class Panels:
    """A value on chip: float32[tiles * rows, features] in VECTOR words from ``start``, ``features`` words a tile.

    ``absmax`` maps the name of a pre-scale (or none) to the PARAMETER words with the absolute maxima of its rows.
    ``head_maxima`` are PARAMETER words with those of each head and row tile, if some pass has left them.
    """

    start: int
    features: int
    tiles: int
    absmax: dict[str | None, int] = field(default_factory=dict)
    head_maxima: int | None = None


@dataclass(frozen=True)
class QuantisedPanels:
    """int8[tiles * rows, features] in ACTIVATION words from ``start``; PARAMETER word ``scales`` + t scales tile t."""

    start: int
    features: int
    tiles: int
    scales: int


@dataclass(frozen=True)
class HeadGroup:
    """Some heads of a value in one pass: ``count`` tiles, each ``stride`` words from the one before.

    ``first`` is the first tile in an array that has one entry per head and row tile.
    """

    start: int
    count: int
    stride: int
    first: int


def head_groups(x: Panels, heads: int) -> Iterator[HeadGroup]:
    """Passes that cover every head of ``x``: all heads at once with one row tile, else head by head."""
    d = x.features // heads
    if x.tiles == 1:
        yield HeadGroup(x.start, heads, d, 0)
        return
    for head in range(heads):
        yield HeadGroup(x.start + head * d, x.tiles, x.features, head * x.tiles)


def rows_of(q: QuantisedPanels, first: int, tiles: int) -> QuantisedPanels:
    """Row tiles ``first`` .. ``first + tiles`` of a quantised value."""
    return QuantisedPanels(q.start + first * q.features, q.features, tiles, q.scales + first)


def panel_rows(x: Panels, first: int, tiles: int) -> Panels:
    """Row tiles ``first`` .. ``first + tiles`` of a value; their words stay those of ``x``, which is what is freed."""
    absmax = {prescale: words + first for prescale, words in x.absmax.items()}
    return Panels(x.start + first * x.features, x.features, tiles, absmax)


class Fetched(NamedTuple):
    """A chunk on chip: its first WEIGHT word, and the PARAMETER words of its scales with the biases behind them."""

    weights: int
    scales: int


@dataclass(frozen=True)
class Ahead:
    """A chunk on chip whose products are not emitted yet, with its sizes."""

    weights: int
    scales: int
    words: int
    parameters: int

    def touches(self, weights: int, words: int, scales: int, parameters: int) -> bool:
        """Whether another chunk would lie where this one does."""
        return (weights < self.weights + self.words and self.weights < weights + words) or (
            scales < self.scales + self.parameters and self.scales < scales + parameters
        )
