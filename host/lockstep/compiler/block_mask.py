"""Block-sparse attention without instructions: which blocks meet, and in which pieces a core takes them.

A mask keeps or skips blocks of ``block`` queries x ``block`` keys. The keys of a query block that are kept stand beside
each other on chip, so a softmax goes over them as over any row. Its bits are those of the contract with the keys that
are skipped not seen: such a key adds +0 to its partial sum and has a probability of 0. Partial sums go by the index of
a key within its tile, modulo 64, so blocks may close ranks where they are multiples of 64 keys; smaller ones are each
a tile of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from lockstep_isa.attention import MAX_TILE
from lockstep_isa.config import CoreConfig
from lockstep_isa.numerics import PARTIAL_SUMS
from numpy.typing import NDArray

from lockstep.errors import ModelError

from .allocation import CapacityError

#: Most keys in a tile, unless another one is asked for.
LONGEST_TILE = 2048
#: Tiles of a program at work: the one being multiplied, the one being softened, the one being loaded.
PARTS = 3
#: Steps of a program whose operands are asked for before a step's product is.
AHEAD = 2
#: Pieces of WEIGHT memory: of the step before, whose product may not be done, of this step and of those ahead.
QUARTERS = AHEAD + 2


class BlockMaskError(ModelError):
    """A mask, a block or a tile that attention cannot take; the message says which one and what may be."""


@dataclass(frozen=True)
class BlockSparse:
    """One block-sparse self-attention.

    Attributes
    ----------
    mask : bool[heads, query blocks, key blocks], as many of the one as of the other; True is kept. Blocks above the
    diagonal of causal attention hold no key that is seen, so they are left out. Where a query block keeps no block, its
    results are +0.
    block : tokens of a block. head_dim : features of a head. tile : keys per tile of the stream, counted from the first
    key whether kept or not; part of the result. causal : a query sees keys up to its own position.

    Raises :class:`BlockMaskError`.
    """

    mask: NDArray[np.bool_]
    block: int
    head_dim: int
    tile: int
    causal: bool = True

    def __post_init__(self) -> None:
        check_mask(self.mask)
        object.__setattr__(self, "mask", self.mask & dense_mask(len(self.mask), self.mask.shape[1], self.causal))
        if self.block < 1 or self.head_dim < 1:
            raise BlockMaskError(f"blocks of {self.block} tokens and heads of {self.head_dim} features hold nothing")
        if self.tile < 1 or self.tile % self.block or self.tile > MAX_TILE:
            raise BlockMaskError(
                f"a tile of {self.tile} keys is no whole number of blocks of {self.block}, up to {MAX_TILE:,} keys"
            )
        if self.tile != self.block and self.block % PARTIAL_SUMS:
            raise BlockMaskError(
                f"tiles hold several blocks only where a block is a multiple of {PARTIAL_SUMS} keys; with blocks of "
                f"{self.block} a tile is one block, so give a tile of {self.block}"
            )

    @property
    def heads(self) -> int:
        return len(self.mask)

    @property
    def tokens(self) -> int:
        return self.mask.shape[1] * self.block

    @property
    def kept(self) -> int:
        """Blocks that are computed."""
        return int(self.mask.sum())

    @property
    def dense(self) -> BlockSparse:
        """The same attention with nothing skipped but what lies above the diagonal of a causal one."""
        return replace(self, mask=dense_mask(self.heads, self.mask.shape[1], self.causal))

    @property
    def density(self) -> float:
        """Kept blocks over those of dense attention."""
        return self.kept / self.dense.kept

    @property
    def empty(self) -> list[tuple[int, int]]:
        """(head, query block) of those that keep nothing."""
        return [(int(head), int(block)) for head, block in np.argwhere(~self.mask.any(axis=2))]

    def seen(self, head: int) -> NDArray[np.bool_]:
        """Which keys each query of a head sees: bool[tokens, tokens]."""
        ones = np.ones((self.block, self.block), np.bool_)
        seen = np.kron(self.mask[head], ones)
        return np.tril(seen) if self.causal else seen


def dense_mask(heads: int, blocks: int, causal: bool) -> NDArray[np.bool_]:
    """Every block, or all up to the diagonal: bool[heads, blocks, blocks]."""
    one = np.ones((blocks, blocks), np.bool_)
    return np.repeat((np.tril(one) if causal else one)[None], heads, axis=0)


def default_tile(block: int, tokens: int) -> int:
    """The longest tile that blocks allow: up to :data:`LONGEST_TILE` keys, and not beyond the tokens."""
    if block < 1 or block % PARTIAL_SUMS:
        return block
    return max(1, min(tokens, LONGEST_TILE) // block) * block


def check_mask(mask: NDArray[np.generic]) -> None:
    """Raise :class:`BlockMaskError` for what is no mask."""
    if mask.dtype != np.bool_:
        raise BlockMaskError(f"a mask is bool[heads, query blocks, key blocks], this one is of {mask.dtype}")
    if mask.ndim != 3 or 0 in mask.shape or mask.shape[1] != mask.shape[2]:
        raise BlockMaskError(
            f"a mask is bool[heads, query blocks, key blocks] with as many query as key blocks, not {list(mask.shape)}"
        )


@dataclass(frozen=True)
class Strip:
    """Rows of one query block that are worked on at once: row tiles ``first`` up to ``first + tiles`` of it.

    sections : the key blocks that it keeps, tile of keys by tile of keys; tiles without one are left out.
    """

    head: int
    block: int
    first: int
    tiles: int
    sections: tuple[tuple[int, ...], ...]

    @property
    def kept(self) -> int:
        """Key blocks."""
        return sum(len(section) for section in self.sections)


@dataclass(frozen=True)
class Room:
    """Words on chip that a program for one attention lays out, each piece as large as the largest strip wants it.

    Attributes
    ----------
    queries : ACTIVATION words of the queries of a block. probabilities : ACTIVATION words. scores : VECTOR words.
    out : VECTOR words of the results of a block, of which there are ``PARTS``, and one more of zeros for query blocks
    that keep nothing, if there are any. operands : WEIGHT words of keys or values that one product takes.
    """

    queries: int
    probabilities: int
    scores: int
    out: int
    operands: int


def room(config: CoreConfig, work: BlockSparse) -> Room:
    """How the memories of a core are divided; raises :class:`BlockMaskError` for blocks that are no row tiles and
    panels that are no whole beats, and :class:`CapacityError` where a block of keys does not fit.
    """
    if work.block % config.rows:
        raise BlockMaskError(
            f"blocks of {work.block} tokens are no multiple of the {config.rows} rows of core '{config.name}'"
        )
    if work.head_dim * config.rows % config.bus_bytes:
        raise BlockMaskError(
            f"heads of {work.head_dim} features take {work.head_dim * config.rows} bytes a panel, no multiple of the "
            f"{config.bus_bytes} bytes of the bus of core '{config.name}'; give an even number of features"
        )
    own, operands = work.block // config.rows * work.head_dim, config.weight_words // QUARTERS
    if own > operands:
        raise CapacityError(
            f"{work.block} keys of {work.head_dim} features take {own:,} words of WEIGHT memory, and core "
            f"'{config.name}' has {operands:,} for one block; give smaller blocks, or a core with more memory"
        )
    return Room(
        own,
        (config.activation_words - PARTS * own) // 2,
        config.vector_words - (PARTS + bool(work.empty)) * own,
        own,
        operands,
    )


def strips(config: CoreConfig, work: BlockSparse) -> list[Strip]:
    """All rows of all heads that see a key, those with the most keys first.

    A softmax stands beside the products of the strip before it: where both have about as many keys, neither unit waits
    for the other, however uneven the heads are. And behind the last strip, the shortest, there is little left to do.

    Raises as :func:`room` does, and :class:`CapacityError` where one row tile or one panel of values does not fit.
    """
    space, row_tiles, found = room(config, work), work.block // config.rows, []
    for head, rows in enumerate(work.mask):
        for query, kept in enumerate(rows):
            if not kept.any():
                continue
            sections = _sections(np.flatnonzero(kept).tolist(), work.tile // work.block)
            keys = max(len(section) for section in sections) * work.block
            tiles = min(row_tiles, space.probabilities // keys, space.scores // keys)
            if tiles < 1 or keys > space.operands:
                most = min(space.probabilities, space.scores, space.operands)
                raise CapacityError(
                    f"head {head}, query block {query} keeps {keys:,} keys in one tile, and core '{config.name}' has "
                    f"room for {max(0, most):,}; give a shorter tile, or a core with more memory"
                )
            # Strips of one height: one of a single row tile would read keys for a quarter of the array's work.
            tiles = -(-row_tiles // -(-row_tiles // tiles))
            found += [
                Strip(head, query, first, min(tiles, row_tiles - first), sections)
                for first in range(0, row_tiles, tiles)
            ]
    return sorted(found, key=lambda strip: -strip.kept * strip.tiles)


def _sections(kept: Sequence[int], blocks: int) -> tuple[tuple[int, ...], ...]:
    """Key blocks by the tile of ``blocks`` blocks in which they lie."""
    found: dict[int, list[int]] = {}
    for block in kept:
        found.setdefault(block // blocks, []).append(block)
    return tuple(tuple(section) for section in found.values())


def runs(blocks: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(position in ``blocks``, first block, count) of the blocks that lie one behind the other in memory."""
    start = 0
    for n in range(1, len(blocks) + 1):
        if n == len(blocks) or blocks[n] != blocks[n - 1] + 1:
            yield start, blocks[start], n - start
            start = n
