"""Appending keys and values of 4 bits: VECTOR makes levels, the array joins two of them in a byte.

| step | unit | keys | values |
| 1 | VECTOR | scales, multipliers of each 32 features, levels to WEIGHT: a word per feature | scales, levels to WEIGHT,
a word per token |
| 2 | MATRIX | pairs of features, for each key | pairs of tokens, for each feature |
| 3 | VECTOR | pairs as bytes | the same |
| 4 | STORE | lanes of new keys | words of pairs with new tokens |

A first new token in an odd lane shares its byte with the token in front, whose word LOAD brings back.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from functools import partial

from lockstep_isa.instructions import (
    LOAD,
    MATRIX,
    STORE,
    Destination,
    FirstMultiply,
    Maximum,
    Memory,
    SecondAdd,
    SecondMultiply,
    Source,
    Weights,
)
from lockstep_isa.int4_cache import LEVELS
from lockstep_isa.sketch import GROUP, MULTIPLIER_OFFSET, MULTIPLIER_SLOPE

from lockstep.graph import Attention

from .append import CacheAppend
from .cache_form import GROUP_WORDS
from .context import Context, LayerCache, Position
from .heads import head_scales, varying
from .int4_operands import Int4Operands, token_words, word_of
from .lowering import Lowering
from .onchip import HeadGroup, Panels
from .passes import RECIPROCAL, float_bits, rounding, scaling

#: Added to a number below 2^22 and taken off again, rounds it to an integer.
_ROUND = 1.5 * 2**23
#: Share of the ring of weights that levels may take at once.
_SHARE = 4


class Int4Append(CacheAppend):
    """Emits what appends the new tokens of one attention to its cache of 4 bits; parameters as for
    :class:`CacheAppend`, and ``operands``, the constants of the program.
    """

    def __init__(
        self, low: Lowering, context: Context, node: Attention, cache: LayerCache, operands: Int4Operands
    ) -> None:
        super().__init__(low, context, node, cache)
        self.operands = operands

    def keys(self, k: Panels) -> None:
        self.low.joins.begin(self._append_keys(k), not self.context.single)

    def values(self, v: Panels) -> None:
        self.low.joins.begin(self._append_values(v), not self.context.single)

    # --- Keys --------------------------------------------------------------------------------------------------

    def _append_keys(self, k: Panels) -> Iterator[None]:
        low, node, tiles, d = self.low, self.node, self.tiles, self.node.head_dim
        count, groups = node.kv_heads * tiles, d // GROUP
        words = groups * GROUP_WORDS
        scale, inverse = head_scales(low, k, node.kv_heads)
        yield
        values = low.vectors.take(count * words)
        greatest = yield from self._multipliers(k, inverse, values)
        for first, end in self._batches(tiles * d):
            levels = low.scratch_weights((end - first) * tiles * d)
            for heads in _heads(k, node.kv_heads, first, end):
                for group in range(groups):
                    low.emit_pass(
                        source=Source.VECTOR,
                        destination=Destination.WEIGHT,
                        mul1=FirstMultiply.LANE1,
                        lane1=inverse + heads.first,
                        mul2=SecondMultiply.LANE0,
                        lane0=greatest + group * count + heads.first,
                        tiles=heads.count,
                        columns=GROUP,
                        x=heads.start + group * GROUP,
                        x_stride=heads.stride,
                        to=levels + (heads.first - first * tiles) * d + group * GROUP,
                        to_stride=d,
                    )
                    yield
            last = end == node.kv_heads
            join = partial(self._join_keys, levels, (end - first) * tiles, values, first * tiles * words, last)
            low.joins.later(join, levels)
        low.parameters.give(greatest)
        low.parameters.give(inverse)
        self._store_scales(scale, self.cache.key_scales)
        yield

    def _join_keys(self, levels: int, count: int, values: int, first: int, last: bool) -> None:
        """Pairs of features of ``count`` heads and row tiles from WEIGHT words to VECTOR words, from ``values`` +
        ``first`` on, behind multipliers; with the ``last`` heads all of them to the cache.
        """
        rows, d = self.rows, self.node.head_dim
        self.low.builder.emit(
            MATRIX,
            depth=2 * rows,
            inner=count * d // (2 * rows),
            a=self.operands.keys,
            w=levels,
            w_inner=2 * rows,
        )
        self.low.emit_pass(
            source=Source.ACCUMULATOR,
            destination=Destination.BYTES_TRANSPOSED,
            tiles=count * d // GROUP,
            columns=GROUP // 2,
            to=values + first + 1,
            to_stride=GROUP_WORDS,
            to_group=rows,
        )
        if last:
            self._store_keys(values)

    def _store_keys(self, values: int) -> None:
        """VECTOR words of panels to the cache."""
        low, node, rows, tiles = self.low, self.node, self.rows, self.tiles
        words = self.context.form.words(node.head_dim)
        for head in range(node.kv_heads):
            low.later(
                STORE,
                memory=Memory.VECTOR,
                bytes=1,
                rows=tiles,
                words=words,
                stride=words * rows,
                address=self.cache.keys + head * self.context.capacity * words,
                address_operand=self.context.aligned(words),
                local=values + head * tiles * words,
                local_stride=words,
                **self._lanes,
            )
        low.give_later(values)

    def _multipliers(self, k: Panels, inverse: int, values: int) -> Generator[None, None, int]:
        """Multipliers to the words in front of their pairs, which begin at VECTOR word ``values``; returns PARAMETER
        words of their reciprocals, for each group of features one a head and row tile.
        """
        low, heads, groups = self.low, self.node.kv_heads, self.node.head_dim // GROUP
        count = heads * self.tiles
        greatest = low.parameters.take(groups * count)
        for part in _heads(k, heads, 0, heads):
            for group in range(groups):
                low.emit_pass(
                    source=Source.VECTOR,
                    tiles=part.count,
                    columns=GROUP,
                    x=part.start + group * GROUP,
                    x_stride=part.stride,
                    maximum=Maximum.ABSOLUTE,
                    max_to=greatest + group * count + part.first,
                )
                yield
        for group in range(groups):
            own = greatest + group * count
            low.emit_pass(
                source=Source.PARAMETER,
                destination=Destination.PARAMETER,
                mul2=SecondMultiply.LANE0,
                lane0=inverse,
                tiles=count,
                columns=1,
                x=own,
                x_stride=1,
                to=own,
                to_stride=1,
            )
            yield
        line = {**scaling(MULTIPLIER_SLOPE), "add2": SecondAdd.IMMEDIATE1, "immediate1": float_bits(MULTIPLIER_OFFSET)}
        low.scalars(greatest, greatest, groups * count, **line)
        yield
        for group in range(groups):
            low.emit_pass(
                source=Source.PARAMETER,
                destination=Destination.BYTES,
                tiles=count,
                columns=1,
                x=greatest + group * count,
                x_stride=1,
                to=values + group * GROUP_WORDS,
                to_stride=groups * GROUP_WORDS,
            )
            yield
        up, down = ({"add2": SecondAdd.IMMEDIATE1, "immediate1": float_bits(sign * _ROUND)} for sign in (1, -1))
        for fields in (up, {**down, **RECIPROCAL}):
            low.scalars(greatest, greatest, groups * count, **fields)
            yield
        return greatest

    # --- Values ------------------------------------------------------------------------------------------------

    def _append_values(self, v: Panels) -> Iterator[None]:
        low, node, rows, tiles = self.low, self.node, self.rows, self.tiles
        groups, slot = node.head_dim // rows, token_words(rows)
        scale, inverse = head_scales(low, v, node.kv_heads, LEVELS)
        yield
        for first, end in self._batches(tiles * groups * slot):
            own = (end - first) * groups
            levels = low.scratch_weights(tiles * own * slot)
            # It does not wait for VECTOR, so that the weights behind it come in time.
            low.builder.emit(
                LOAD,
                memory=Memory.WEIGHT,
                **varying("rows", 0, self._odd(own)),
                words=1,
                address=self.cache.values + first * groups * self._held,
                address_operand=self._first_pair[0],
                stride=self._held,
                local=levels + word_of(rows),
                local_stride=slot,
            )
            # Multipliers of 1; a reciprocal is always finite.
            low.emit_pass(
                source=Source.PARAMETER,
                destination=Destination.WEIGHT,
                **scaling(0),
                add2=SecondAdd.IMMEDIATE1,
                immediate1=float_bits(1),
                tiles=tiles * own * slot // GROUP_WORDS,
                columns=1,
                x=inverse,
                to=levels,
                to_stride=GROUP_WORDS,
            )
            yield
            for heads in _heads(v, node.kv_heads, first, end):
                low.emit_pass(
                    **rounding(inverse + heads.first, Destination.WEIGHT_TRANSPOSED),
                    tiles=heads.count,
                    columns=node.head_dim,
                    x=heads.start,
                    x_stride=heads.stride,
                    to=levels + (heads.first // tiles - first) * groups * slot + word_of(0),
                    to_stride=(own if tiles > 1 else groups) * slot,
                    to_group=slot,
                )
                yield
            low.joins.later(partial(self._join_values, levels, first * groups, own), levels)
        low.parameters.give(inverse)
        self._store_scales(scale, self.cache.value_scales)
        yield

    def _join_values(self, levels: int, first: int, own: int) -> None:
        """Pairs of tokens from WEIGHT words to the cache, of ``own`` groups of R features from group ``first`` on."""
        low, rows, tiles, slot = self.low, self.rows, self.tiles, token_words(self.rows)
        values = low.vectors.take(tiles * own * rows)
        for left, tile, count in ((self.operands.first_tokens, 0, 1), (self.operands.tokens, 1, tiles - 1)):
            if count:
                low.builder.emit(
                    MATRIX,
                    depth=self.operands.depth,
                    inner=count * own,
                    a=left,
                    w=levels + tile * own * slot,
                    w_inner=slot,
                    weights=Weights.INT4_32,
                )
        low.emit_pass(
            source=Source.ACCUMULATOR,
            destination=Destination.BYTES_TRANSPOSED,
            tiles=tiles * own,
            columns=rows,
            to=values,
            to_stride=rows,
        )
        pair, pair_lane, pair_words = self._first_pair
        for tile in range(tiles):
            offset, operand = (0, pair) if tile == 0 else self._tile_pairs(tile)
            place = {"words": rows // 2, "local": values + tile * own * rows}
            if tile == 0:
                place = {"local": values, "local_operand": pair_lane}
                place |= {"words": 1} if self.context.single else varying("words", 0, pair_words)
            low.later(
                STORE,
                memory=Memory.VECTOR,
                bytes=1,
                rows=own,
                stride=self._held,
                address=self.cache.values + first * self._held + offset,
                address_operand=operand,
                local_stride=rows,
                **place,
            )
        low.give_later(values)

    # --- Where pairs lie ---------------------------------------------------------------------------------------

    @property
    def _held(self) -> int:
        """Bytes from one group of R features of the cache's values to the next."""
        return self.context.form.words(self.context.capacity) * self.rows

    def _pair(self, slot: int) -> int:
        """Bytes from a group of features' values to the word of the pair that holds ``slot``."""
        return (slot // GROUP * GROUP_WORDS + 1 + slot % GROUP // 2) * self.rows

    @property
    def _first_pair(self) -> tuple[int, int, int]:
        """Operands of the first new token's pair: its place in the cache and in its row tile, and the pairs of the row
        tile from it on.
        """
        context, rows = self.context, self.rows
        return (
            context.operand("pair", rows, self._pair(context.capacity - 1), lambda at: self._pair(at.slot)),
            context.operand("pair_lane", 0, rows // 2 - 1, lambda at: at.lane // 2),
            0 if context.single else context.operand("pairs", 1, rows // 2, lambda at: rows // 2 - at.lane // 2),
        )

    def _tile_pairs(self, tile: int) -> tuple[int, int]:
        """Bytes, and an operand, that are added to where the pairs of a row tile behind the first one lie."""
        rows, groups = self.rows, tile * self.rows // GROUP
        # Row tiles as far apart as groups of tokens lie as far apart as those.
        begin = tile * rows % GROUP

        def place(at: Position) -> int:
            return self._pair(at.aligned + begin)

        last = self.context.capacity - self.tiles * rows
        operand = self.context.operand(f"pairs_{begin}", self._pair(begin), self._pair(last + begin), place)
        return groups * GROUP_WORDS * rows, operand

    def _odd(self, count: int) -> int:
        """An operand that is ``count`` where the first new token shares its byte with the one in front, else 0."""
        return self.context.operand(f"odd_{count}", 0, count, lambda at: count * (at.lane % 2))

    def _batches(self, words: int) -> Iterator[tuple[int, int]]:
        """Heads, as first and end, whose levels may take WEIGHT words at once; ``words`` a head."""
        heads = self.node.kv_heads
        most = max(1, self.low.weight_ring.size // _SHARE // words)
        for first in range(0, heads, most):
            yield first, min(heads, first + most)


def _heads(x: Panels, heads: int, first: int, end: int) -> Iterator[HeadGroup]:
    """Passes that cover heads ``first`` to ``end`` of ``x``; see :func:`lockstep.compiler.onchip.head_groups`."""
    d = x.features // heads
    if x.tiles == 1:
        yield HeadGroup(x.start + first * d, end - first, d, first)
        return
    for head in range(first, end):
        yield HeadGroup(x.start + head * d, x.tiles, x.features, head * x.tiles)
