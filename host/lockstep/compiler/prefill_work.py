"""A prompt's attention to blocks of keys that tiles of queries choose, without instructions: sizes, checks, places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from lockstep_isa.attention import MAX_TILE
from lockstep_isa.config import CoreConfig
from lockstep_isa.instructions import INDEX_ENTRIES
from lockstep_isa.prefill_selection import TileBlocks
from lockstep_isa.sketch import GROUP

from lockstep.errors import ModelError

from .sketch_prefill import Constants

#: Keys of a block.
BLOCK = 16


class PrefillError(ModelError):
    """An attention to chosen blocks that there is not, or not on this core; the message says what there is."""


@dataclass(frozen=True)
class PrefillSparse:
    """Self-attention of a prompt, each tile of queries to the blocks of keys that it chooses.

    Attributes
    ----------
    heads, tokens, head_dim : sizes. density : kept blocks over seen ones, above 0 and at most 1. causal : a query sees
    keys up to its own position. queries : that choose together, a multiple of ``block``.

    Raises :class:`PrefillError`.
    """

    heads: int
    tokens: int
    head_dim: int
    density: float
    causal: bool = True
    queries: int = BLOCK

    def __post_init__(self) -> None:
        try:
            self.rule  # noqa: B018
        except ValueError as error:
            raise PrefillError(f"{error}; give others") from None
        if self.heads < 1 or self.tokens < 1:
            raise PrefillError(f"{self.heads} heads of {self.tokens} tokens hold nothing; give at least one of each")
        if self.tokens % self.queries:
            raise PrefillError(
                f"{self.tokens} tokens are no multiple of the {self.queries} queries that choose together"
            )
        if self.head_dim < 1 or self.head_dim % GROUP:
            raise PrefillError(
                f"heads of {self.head_dim} features are no multiple of the {GROUP} that share a multiplier in the "
                "sketch of the keys"
            )
        if self.tokens // BLOCK > INDEX_ENTRIES:
            raise PrefillError(
                f"{self.tokens:,} tokens are more than the {INDEX_ENTRIES} blocks of {BLOCK} that a core chooses from"
            )
        if self.kept(self.tiles - 1) * BLOCK > MAX_TILE:
            raise PrefillError(f"{self.kept(self.tiles - 1) * BLOCK:,} kept keys are more than {MAX_TILE:,}")

    @cached_property
    def rule(self) -> TileBlocks:
        """How a tile chooses."""
        return TileBlocks(self.density, self.queries, BLOCK)

    @property
    def block(self) -> int:
        """Keys of a block."""
        return BLOCK

    @property
    def first(self) -> int:
        """Blocks at the beginning that are always kept."""
        return self.rule.first

    @property
    def last(self) -> int:
        """Blocks at the end that are always kept."""
        return self.rule.last

    @property
    def tiles(self) -> int:
        """Of queries, in a head."""
        return self.tokens // self.queries

    def seen(self, tile: int) -> int:
        """Blocks of keys of which a tile sees any."""
        return (tile + 1) * self.queries // BLOCK if self.causal else self.tokens // BLOCK

    def kept(self, tile: int) -> int:
        """Blocks that a tile keeps."""
        return self.rule.kept(self.seen(tile))

    @property
    def seen_pairs(self) -> int:
        """Blocks of queries and keys of which some element is seen, in all heads."""
        return self._pairs([self.seen(tile) for tile in range(self.tiles)])

    @property
    def kept_pairs(self) -> int:
        """Those of them that are kept."""
        return self._pairs([self.kept(tile) for tile in range(self.tiles)])

    def _pairs(self, blocks: Sequence[int]) -> int:
        each = self.queries // BLOCK
        hidden = each * (each - 1) // 2 if self.causal else 0
        return self.heads * sum(each * count - hidden for count in blocks)

    def runs(self, tile: int) -> tuple[tuple[int, int, int], ...] | None:
        """(place among the kept blocks, first block, count) where there is no choice: where a tile keeps all that it
        sees, or no more than what is always kept. None where there is one.
        """
        seen, kept = self.seen(tile), self.kept(tile)
        if kept == seen:
            return ((0, 0, seen),)
        if kept > self.first + self.last:
            return None
        return (0, 0, self.first), (self.first, seen - self.last, self.last)

    @property
    def order(self) -> Sequence[int]:
        """Tiles of a head in the order of the program: of different lengths, the shorter and the longer half in turn.

        Short ones keep VECTOR busy and long ones MATRIX.
        """
        if not self.causal:
            return range(self.tiles)
        half = -(-self.tiles // 2)
        return [tile // 2 + half * (tile % 2) for tile in range(self.tiles)]


@dataclass(frozen=True)
class Places:
    """Byte addresses in device memory, for ``tokens`` tokens of each head and panels of R tokens or features.

    q : int8[heads, tokens / R, head_dim, R], as are keys ``k``. v : int8[heads, head_dim / R, tokens, R].
    q_scales, k_scales, v_scales : float32[heads, tokens]. out : float32[heads, tokens / R, head_dim, R].
    tables : of each function in :data:`~.passes.SLOTS` that softmax needs. constants : of the maker of sketches.
    """

    q: int
    q_scales: int
    k: int
    k_scales: int
    v: int
    v_scales: int
    out: int
    tables: dict[str, int]
    constants: Constants


def check_core(config: CoreConfig, work: PrefillSparse) -> None:
    """Raise :class:`PrefillError` where the core cannot choose, or has more rows than a block has keys."""
    if not (config.selection and config.packed):
        raise PrefillError(
            f"core '{config.name}' cannot select blocks or take a packed sketch; choose laptop or tiny, or a mask of "
            "blocks instead"
        )
    if BLOCK % config.rows:
        raise PrefillError(
            f"blocks of {BLOCK} keys are no multiple of the {config.rows} rows of core '{config.name}'; choose laptop "
            "or tiny"
        )
