"""Appending new keys and values to the cache in device memory."""

from __future__ import annotations

from lockstep_isa.instructions import STORE, Destination, Memory, Source

from lockstep.graph import Attention

from .context import Context, LayerCache
from .heads import head_scales, round_heads, varying
from .lowering import Lowering
from .onchip import Panels


class CacheAppend:
    """Emits what appends the new tokens of one attention to its cache.

    Parameters
    ----------
    low : the program. context : its operands. node : heads and their features. cache : where keys and values lie.
    """

    def __init__(self, low: Lowering, context: Context, node: Attention, cache: LayerCache) -> None:
        self.low, self.context, self.node, self.cache = low, context, node, cache
        self.rows, self.tiles = low.config.rows, context.tiles

    def keys(self, k: Panels) -> None:
        """Quantise the new keys and store them where they belong in the cache."""
        node, context, rows, tiles = self.node, self.context, self.rows, self.tiles
        d, capacity = node.head_dim, context.capacity
        values, head_words = self._bytes(k, Destination.BYTES, tiles * d, self.cache.key_scales)
        for head in range(node.kv_heads):
            self.low.later(
                STORE,
                memory=Memory.VECTOR,
                bytes=1,
                rows=tiles,
                words=d,
                stride=d * rows,
                address=self.cache.keys + head * capacity * d,
                address_operand=context.aligned(d),
                local=values + head * head_words,
                local_stride=d,
                **self._lanes,
            )
        self.low.give_later(values)

    def values(self, v: Panels) -> None:
        """Quantise the new values and store them where they belong in the cache."""
        node, context, rows, tiles = self.node, self.context, self.rows, self.tiles
        groups, capacity = -(-node.head_dim // rows), context.capacity
        values, _ = self._bytes(v, Destination.BYTES_TRANSPOSED, groups * tiles * rows, self.cache.value_scales)
        # Groups of a head lie one behind the other, and so do heads: on chip and in the cache.
        self.low.later(
            STORE,
            memory=Memory.VECTOR,
            bytes=1,
            rows=node.kv_heads * groups,
            **({"words": 1} if context.single else varying("words", tiles * rows, context.new_words)),
            stride=capacity * rows,
            address=self.cache.values,
            address_operand=context.slot(rows),
            local=values,
            local_operand=context.lane,
            local_stride=tiles * rows,
        )
        self.low.give_later(values)

    @property
    def _lanes(self) -> dict[str, int]:
        """Lanes that are written of the first row tile's words: behind the first new token stands nothing yet, unless
        it takes the place of another one.
        """
        return {"lane_operand": self.context.lane, "lane_only": int(self.context.replaces)}

    def _bytes(self, x: Panels, destination: Destination, head_words: int, scales: int) -> tuple[int, int]:
        """VECTOR words with the 8-bit values of every head, ``head_words`` a head; stores the scales."""
        low, heads = self.low, self.node.kv_heads
        scale, inverse = head_scales(low, x, heads)
        values = low.vectors.take(heads * head_words)
        round_heads(low, x, heads, inverse, destination, values, head_words)
        self._store_scales(scale, scales)
        low.parameters.give(inverse)
        return values, head_words

    def _store_scales(self, scale: int, scales: int) -> None:
        """PARAMETER words of scales to the cache, whose ``scales`` these are; gives the words back."""
        low, heads, rows, tiles = self.low, self.node.kv_heads, self.rows, self.tiles
        words = low.vectors.take(heads * tiles)
        low.emit_pass(
            source=Source.PARAMETER, destination=Destination.VECTOR, tiles=1, columns=heads * tiles, x=scale, to=words
        )
        for head in range(heads):
            low.later(
                STORE,
                memory=Memory.VECTOR,
                rows=tiles,
                words=1,
                stride=4 * rows,
                address=scales + head * self.context.capacity * 4,
                address_operand=self.context.aligned(4),
                local=words + head * tiles,
                local_stride=1,
                **self._lanes,
            )
        low.give_later(words)
        low.parameters.give(scale)
