"""Blocks of keys that the queries of a prompt choose together, tile of queries by tile of queries.

In a prompt neighbouring queries share what is read for them, so they share a choice: a block counts with the best score
that any query of the tile gives any of its rows of the sketch. How many blocks a tile keeps hangs on its place alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from lockstep_isa.attention import Visible
from lockstep_isa.numerics import F32
from lockstep_isa.selectors import ForEachHead, Looked, block_scores, greatest
from lockstep_isa.sketch import POOL


@dataclass(frozen=True)
class TileBlocks(ForEachHead):
    """A share of the blocks of keys that a tile of queries sees, by the best score of any of its queries.

    The first block and the last ones, as many as a tile of queries has tokens for, are always kept: the sink and, in
    causal attention, the tile's own.

    Attributes
    ----------
    density : kept blocks over seen ones, above 0 and at most 1; as if written in decimal. queries : of a tile, a
    multiple of ``block``. block : keys of a block, a multiple of 4.

    Raises ValueError for others.
    """

    density: float
    queries: int = 16
    block: int = 16

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"a density of {self.density} is not above 0 and at most 1")
        if self.block < 1 or self.block % POOL:
            raise ValueError(
                f"a block of {self.block} keys is no multiple of the {POOL} that share a row of the sketch"
            )
        if self.queries < 1 or self.queries % self.block:
            raise ValueError(f"a tile of {self.queries} queries is no multiple of the {self.block} keys of a block")

    @property
    def first(self) -> int:
        """Blocks at the beginning that are kept whatever they score."""
        return 1

    @property
    def last(self) -> int:
        """Blocks at the end that are kept whatever they score."""
        return self.queries // self.block

    def kept(self, blocks: int) -> int:
        """How many of the ``blocks`` that a tile sees it keeps."""
        # 0.1 of 30 blocks are 3, whatever the binary fraction next to 0.1 is.
        asked = math.ceil(Fraction(str(float(self.density))) * blocks)
        return min(blocks, max(asked, self.first + self.last))

    def blocks(self, best: F32) -> npt.NDArray[np.intp]:
        """Which blocks a tile keeps, ascending, by best: float32[queries, blocks that it sees]."""
        ranked = best.max(axis=0)
        ranked[: self.first] = ranked[max(0, len(ranked) - self.last) :] = np.inf
        return np.flatnonzero(greatest(ranked[None], self.kept(len(ranked)))[0])

    def tiles(self, looked: Looked) -> list[npt.NDArray[np.intp]]:
        """The blocks that each tile of queries of a head keeps; a tile sees all up to the last block of which one of
        its queries sees a key.
        """
        best, found = block_scores(looked, self.block), []
        for first in range(0, len(best), self.queries):
            rows = slice(first, first + self.queries)
            keys = np.flatnonzero(looked.seen[rows].any(axis=0))
            count = keys[-1] // self.block + 1 if len(keys) else 0
            found.append(self.blocks(best[rows, :count]))
        return found

    def choose(self, looked: Looked) -> Visible:
        kept = np.zeros(looked.seen.shape, np.bool_)
        for tile, blocks in enumerate(self.tiles(looked)):
            own = kept[tile * self.queries : (tile + 1) * self.queries]
            for block in blocks:
                own[:, block * self.block : (block + 1) * self.block] = True
        return kept & looked.seen
