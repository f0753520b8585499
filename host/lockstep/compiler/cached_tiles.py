"""Tiles of keys and values on their way from the cache in device memory to the array."""

from __future__ import annotations

from dataclasses import dataclass

from lockstep_isa.instructions import LOAD, Memory

from lockstep.graph import Attention

from .context import Context, LayerCache, Section, Window
from .heads import varying
from .lowering import Lowering


@dataclass(frozen=True)
class CachedTile:
    """Keys and values of one head and one tile of keys on chip: WEIGHT words, and PARAMETER words of their scales."""

    keys: int
    values: int
    key_scales: int
    value_scales: int


class CachedTiles:
    """Loads tiles of the keys and values of one attention.

    Parameters
    ----------
    low : the program. context : its operands. node : heads and tile. cache : where keys and values lie. window : which
    of them are met.

    Attributes
    ----------
    most : keys of a tile. groups : of R features of a value. key_words, value_words : WEIGHT words of a panel of keys,
    and of a group of features of a whole tile's values.
    """

    def __init__(self, low: Lowering, context: Context, node: Attention, cache: LayerCache, window: Window) -> None:
        self.low, self.context, self.node, self.cache, self.window = low, context, node, cache, window
        self.form, self.rows = context.form, low.config.rows
        self.most = min(node.tile, context.capacity)
        self.groups = -(-node.head_dim // self.rows)
        self.key_words, self.value_words = self.form.words(node.head_dim), self.form.words(self.most)

    @property
    def room(self) -> bool:
        """Whether another tile fits beside those in use."""
        words = self.most * self.key_words // self.rows + self.groups * self.value_words
        return self.low.weights.largest >= words

    def load(self, kv_head: int, section: Section) -> CachedTile:
        """One tile of keys and values of a head, with their scales."""
        low, window, rows, capacity = self.low, self.window, self.rows, self.context.capacity
        begin, most, panel = section.index * self.node.tile, self.most, self.key_words
        keys, values = low.weights.take(most * panel // rows), low.weights.take(self.groups * self.value_words)
        scales = [low.parameters.take(most // rows) for _ in range(2)]
        low.builder.emit(
            LOAD,
            memory=Memory.WEIGHT,
            **varying("rows", 0, section.panels),
            words=panel,
            stride=panel * rows,
            address=self.cache.keys + (kv_head * capacity + begin) * panel,
            address_operand=window.keys,
            local=keys,
            local_stride=panel,
        )
        for base, local in zip((self.cache.key_scales, self.cache.value_scales), scales, strict=True):
            low.builder.emit(
                LOAD,
                memory=Memory.PARAMETER,
                **varying("words", 0, section.panels),
                address=base + (kv_head * capacity + begin) * 4,
                address_operand=window.scales,
                local=local,
            )
        held = self.form.words(capacity)
        low.builder.emit(
            LOAD,
            memory=Memory.WEIGHT,
            rows=self.groups,
            **varying("words", 0, section.value_words),
            stride=held * rows,
            address=self.cache.values + (kv_head * self.groups * held + self.form.words(begin)) * rows,
            address_operand=window.values,
            local=values,
            local_stride=self.value_words,
        )
        return CachedTile(keys, values, *scales)

    def give(self, tile: CachedTile) -> None:
        """The tile is not needed any more."""
        for words in (tile.keys, tile.values):
            self.low.weights.give(words)
        for words in (tile.key_scales, tile.value_scales):
            self.low.parameters.give(words)
