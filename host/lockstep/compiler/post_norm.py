"""Norms behind products, some row tiles after the others.

A layer norm needs whole rows, so behind a product of all row tiles MATRIX would wait for all of it: residual addition,
statistics, norm, requantisation. Here the product is made in two blocks of row tiles. VECTOR makes the first block
ready beside the products of the second one, and the second one beside the next layer's products of the first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lockstep.graph import Add, LayerNorm, Node, Quantise

from .lowering import Lowering, Step
from .norms import layer_norm_steps
from .onchip import Panels, QuantisedPanels, panel_rows, rows_of

#: Fewest row tiles in a block: weights are streamed once per block.
LEAST_BLOCK = 3


def row_blocks(tiles: int) -> list[tuple[int, int]]:
    """First row tile and row tiles of two blocks, or of one where two would be small."""
    first = -(-tiles // 2) if tiles >= 2 * LEAST_BLOCK else tiles
    return [(0, first)] + ([(first, tiles - first)] if first < tiles else [])


@dataclass(frozen=True)
class PostNorm:
    """A sum that only ``norm`` reads, and what quantises the norm, or none."""

    add: Add
    norm: LayerNorm
    quantise: Quantise | None

    @property
    def prescale(self) -> tuple[str | None] | None:
        """The pre-scale of the quantisation, in a tuple, if there is one."""
        return None if self.quantise is None else (self.quantise.prescale,)


@dataclass(frozen=True)
class PostNormLowering:
    """Emits a norm block by block.

    Attributes
    ----------
    low : the program. nodes : what is computed. x, y : operands of the sum. into : the norm; it may be ``x``.
    quantised : its quantised rows, if there are any. name : gives a step the name of the node that it computes.
    """

    low: Lowering
    nodes: PostNorm
    x: Panels
    y: Panels
    into: Panels
    quantised: QuantisedPanels | None
    name: Callable[[Node, Step], Step]

    def postpone(self, first: int, tiles: int, then: list[Step]) -> None:
        """Leave row tiles ``first`` .. ``first + tiles`` to be emitted beside the next products, and ``then`` behind
        them. Column words stay loaded until :meth:`drop_columns`.
        """
        low, norm, quantise = self.low, self.nodes.norm, self.nodes.quantise
        for name in self._columns():
            low.load_columns(name)
        x, y, into = (panel_rows(panels, first, tiles) for panels in (self.x, self.y, self.into))
        steps = layer_norm_steps(low, x, y, into, norm.gamma, norm.beta, norm.eps, self.nodes.prescale)
        low.steps_later([self.name(norm, step) for step in steps])
        if quantise is not None:
            assert self.quantised is not None
            steps = low.quantise_steps(into, quantise.prescale, rows_of(self.quantised, first, tiles))
            low.steps_later([self.name(quantise, step) for step in steps])
        low.steps_later(then)

    def drop_columns(self) -> None:
        """The column words are not needed any more."""
        for name in self._columns():
            self.low.drop_columns(name)

    def _columns(self) -> list[str]:
        names = (self.nodes.norm.gamma, self.nodes.norm.beta, *(self.nodes.prescale or ()))
        return [name for name in names if name is not None]
