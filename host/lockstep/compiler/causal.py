"""Causal attention over a key-value cache in device memory.

New keys and values are quantised and appended to the cache; queries then meet the cache tile by tile, each tile of
keys rescaling what the ones before have left (section 6 of the contract, after Rabe and Staats, 2021,
https://arxiv.org/abs/2112.05682). Nothing on chip grows with the context.

Heads are worked on together where there is one row tile, as in decode: a pass then goes over heads in the place of
row tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from lockstep_isa.instructions import (
    LOAD,
    MATRIX,
    STORE,
    Destination,
    FirstAdd,
    FirstMultiply,
    Function,
    Mask,
    Maximum,
    Memory,
    SecondAdd,
    SecondMultiply,
    Source,
    Tap,
    ThirdMultiply,
    selector,
)

from lockstep.graph import Attention

from .context import Context, LayerCache, Section, Window
from .lowering import SLOTS, Lowering, Panels, float_bits, head_groups


def varying(name: str, value: int, operand: int) -> dict[str, int]:
    """A field that is ``value``, or a run-time operand if there is one."""
    return {name: 0, selector(name): operand} if operand else {name: value}


@dataclass(frozen=True)
class _Quantised:
    """Per head and row tile: words of 8-bit values, ``head_words`` a head, and one PARAMETER word of scales each."""

    start: int
    head_words: int
    scales: int


@dataclass(frozen=True)
class _Tile:
    """Keys and values of one head and one tile of keys on chip."""

    keys: int
    values: int
    key_scales: int
    value_scales: int


@dataclass(frozen=True)
class _State:
    """What query heads keep from tile to tile, per head and row tile: peak and sum (PARAMETER words), weighted values
    (VECTOR words).
    """

    peak: int
    total: int
    out: int


@dataclass(frozen=True)
class _Met:
    """A head whose probabilities for one tile of keys wait for their product with the values."""

    section: Section
    tile: _Tile
    head: int
    probabilities: int
    scale: int
    total: int
    before: int


class CausalAttentionLowering:
    """Emits one causal attention.

    Parameters
    ----------
    low : the program. context : its operands. node : heads, window and tile. cache : where its keys and values lie.
    """

    def __init__(self, low: Lowering, context: Context, node: Attention, cache: LayerCache) -> None:
        self.low, self.context, self.node, self.cache = low, context, node, cache
        self.rows = low.config.rows
        self.tiles = context.tiles
        self.group = node.heads // node.kv_heads
        self.value_groups = -(-node.head_dim // self.rows)
        self.window: Window = context.window(node.window, node.tile, node.head_dim)
        self.most_keys = min(node.tile, context.capacity)

    def emit(
        self,
        q: Panels,
        k: Panels,
        v: Panels,
        into: Panels,
        maxima: tuple[int | None, int | None],
        prefetch: Callable[[], None],
    ) -> None:
        """Append ``k`` and ``v``, attend with ``q``, write to ``into``.

        maxima : PARAMETER words with the absolute maxima of each head and row tile of q and k, where known already.
        prefetch : called before the cache is loaded, so that what it loads need not wait for the appended keys.
        """
        low = self.low
        self._append(k, v, maxima[1])
        prefetch()
        queries, factors = self._queries(q, maxima[0])
        state = self._state()
        before: _Met | None = None
        for kv_head in range(self.node.kv_heads):
            for section in self.window.sections:
                if before is not None and not self._room_for_tile():
                    self._mix(before, state)
                    self._forget(before.tile)
                    before = None
                tile = self._load(kv_head, section)
                for head in range(kv_head * self.group, (kv_head + 1) * self.group):
                    # The next scores stand between a softmax and its product, so that neither unit waits.
                    met = self._meet(section, tile, queries, factors, head, state)
                    if before is not None:
                        self._mix(before, state)
                        if before.tile is not tile:
                            self._forget(before.tile)
                    before = met
        assert before is not None
        self._mix(before, state)
        self._forget(before.tile)
        self._finish(state, into)
        low.activations.give(queries.start)
        low.parameters.give(queries.scales)
        low.parameters.give(factors)

    # --- Quantisation and the cache ----------------------------------------------------------------------------

    def _scales(self, x: Panels, heads: int, maxima: int | None = None) -> tuple[int, int]:
        """PARAMETER words of scales and their inverses, one per head and row tile; ``maxima`` if they are known."""
        low = self.low
        count, d = heads * x.tiles, x.features // heads
        scale, inverse = low.parameters.take(count), low.parameters.take(count)
        if maxima is not None:
            low.scale_and_inverse(maxima, count, 127, scale, inverse)
            return scale, inverse
        for group in head_groups(x, heads):
            low.emit_pass(
                source=Source.VECTOR,
                tiles=group.count,
                columns=d,
                x=group.start,
                x_stride=group.stride,
                maximum=Maximum.ABSOLUTE,
                max_to=inverse + group.first,
            )
        low.scale_and_inverse(inverse, count, 127, scale, inverse)
        return scale, inverse

    def _round(self, x: Panels, heads: int, inverse: int, destination: Destination, to: int, head_words: int) -> None:
        """8-bit values of every head to ``to``, ``head_words`` words a head."""
        low = self.low
        d = x.features // heads
        for group in head_groups(x, heads):
            transposed = destination == Destination.BYTES_TRANSPOSED
            words = self.rows if transposed else d
            fields = {"to_group": x.tiles * self.rows} if transposed else {}
            low.emit_pass(
                source=Source.VECTOR,
                destination=destination,
                mul2=SecondMultiply.LANE0,
                lane0=inverse + group.first,
                tiles=group.count,
                columns=d,
                x=group.start,
                x_stride=group.stride,
                to=to + group.first // x.tiles * head_words,
                to_stride=head_words if x.tiles == 1 else words,
                **fields,
            )

    def _queries(self, q: Panels, maxima: int | None) -> tuple[_Quantised, int]:
        """Queries as left operands, and PARAMETER words of the factors that turn scores into exponents of 2."""
        low, node = self.low, self.node
        scale, inverse = self._scales(q, node.heads, maxima)
        words = self.tiles * node.head_dim
        start = low.activations.take(node.heads * words)
        self._round(q, node.heads, inverse, Destination.ACTIVATION, start, words)
        low.parameters.give(inverse)
        count = node.heads * self.tiles
        factors = low.parameters.take(count)
        factor = np.float32(np.log2(np.e) * node.scale)
        low.scalars(scale, factors, count, mul1=FirstMultiply.IMMEDIATE0, immediate0=float_bits(factor))
        return _Quantised(start, words, scale), factors

    def _append(self, k: Panels, v: Panels, maxima: int | None) -> None:
        """Quantise the new keys and values and store them where they belong in the cache."""
        low, node, context, rows = self.low, self.node, self.context, self.rows
        d, tiles, capacity = node.head_dim, self.tiles, context.capacity
        for x, transposed, data, scales in (
            (k, False, self.cache.keys, self.cache.key_scales),
            (v, True, self.cache.values, self.cache.value_scales),
        ):
            scale, inverse = self._scales(x, node.kv_heads, None if transposed else maxima)
            head_words = self.value_groups * tiles * rows if transposed else tiles * d
            destination = Destination.BYTES_TRANSPOSED if transposed else Destination.BYTES
            values = low.vectors.take(node.kv_heads * head_words)
            self._round(x, node.kv_heads, inverse, destination, values, head_words)
            count = node.kv_heads * tiles
            words = low.vectors.take(count)
            low.emit_pass(
                source=Source.PARAMETER,
                destination=Destination.VECTOR,
                tiles=1,
                columns=count,
                x=scale,
                to=words,
            )
            for head in range(node.kv_heads):
                block: dict[str, int]
                if transposed:
                    block = {
                        "rows": self.value_groups,
                        **varying("words", tiles * rows, context.new_words),
                        "stride": capacity * rows,
                        "address": data + head * self.value_groups * capacity * rows,
                        "address_operand": context.first(rows),
                        "local": values + head * head_words,
                        "local_operand": context.lane,
                        "local_stride": tiles * rows,
                    }
                else:
                    block = {
                        "rows": tiles,
                        "words": d,
                        "stride": d * rows,
                        "address": data + head * capacity * d,
                        "address_operand": context.aligned(d),
                        "local": values + head * head_words,
                        "local_stride": d,
                        "lane": 0,
                        "lane_operand": context.lane,
                    }
                low.builder.emit(STORE, memory=Memory.VECTOR, bytes=1, **block)
                low.builder.emit(
                    STORE,
                    memory=Memory.VECTOR,
                    rows=tiles,
                    words=1,
                    stride=4 * rows,
                    address=scales + head * capacity * 4,
                    address_operand=context.aligned(4),
                    local=words + head * tiles,
                    local_stride=1,
                    lane=0,
                    lane_operand=context.lane,
                )
            low.vectors.give(values)
            low.vectors.give(words)
            low.parameters.give(scale)
            low.parameters.give(inverse)

    def _load(self, kv_head: int, section: Section) -> _Tile:
        """One tile of keys and values of a head, with their scales."""
        low, window, rows, capacity = self.low, self.window, self.rows, self.context.capacity
        d, begin, most = self.node.head_dim, section.index * self.node.tile, self.most_keys
        keys, values = low.weights.take(most * d // rows), low.weights.take(self.value_groups * most)
        scales = [low.parameters.take(most // rows) for _ in range(2)]
        low.builder.emit(
            LOAD,
            memory=Memory.WEIGHT,
            **varying("rows", 0, section.panels),
            words=d,
            stride=d * rows,
            address=self.cache.keys + (kv_head * capacity + begin) * d,
            address_operand=window.keys,
            local=keys,
            local_stride=d,
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
        low.builder.emit(
            LOAD,
            memory=Memory.WEIGHT,
            rows=self.value_groups,
            **varying("words", 0, section.keys),
            stride=capacity * rows,
            address=self.cache.values + (kv_head * self.value_groups * capacity + begin) * rows,
            address_operand=window.values,
            local=values,
            local_stride=most,
        )
        return _Tile(keys, values, *scales)

    # --- One query head and one tile of keys -------------------------------------------------------------------

    def _state(self) -> _State:
        low, count = self.low, self.node.heads * self.tiles
        return _State(
            low.parameters.take(count), low.parameters.take(count), low.vectors.take(count * self.node.head_dim)
        )

    def _room_for_tile(self) -> bool:
        """Whether another tile of keys and values fits beside those in use."""
        keys, values = self.most_keys * self.node.head_dim // self.rows, self.value_groups * self.most_keys
        return self.low.weights.largest >= keys + values

    def _forget(self, tile: _Tile) -> None:
        low = self.low
        for words in (tile.keys, tile.values):
            low.weights.give(words)
        for words in (tile.key_scales, tile.value_scales):
            low.parameters.give(words)

    def _meet(self, section: Section, tile: _Tile, queries: _Quantised, factors: int, head: int, state: _State) -> _Met:
        """Scores of one head with one tile of keys, and their softmax as 8-bit probabilities."""
        low, node, tiles, d = self.low, self.node, self.tiles, self.node.head_dim
        first, most = section.index == 0, self.most_keys
        columns = varying("columns", 0, section.keys)
        peak, total = state.peak + head * tiles, state.total + head * tiles
        low.builder.emit(
            MATRIX,
            depth=d,
            outer=tiles,
            **varying("inner", 0, section.panels),
            a=queries.start + head * queries.head_words,
            a_outer=d,
            w=tile.keys,
            w_inner=d,
        )
        before, own_total = low.parameters.take(tiles), low.parameters.take(tiles)
        if not first:
            low.emit_pass(
                source=Source.PARAMETER,
                destination=Destination.PARAMETER,
                tiles=1,
                x=peak,
                to=before,
                **varying("columns", tiles, section.tiles),
            )
        weights, largest = low.vectors.take(tiles * most), low.parameters.take(tiles)
        low.emit_pass(
            source=Source.ACCUMULATOR,
            destination=Destination.VECTOR,
            mul1=FirstMultiply.COLUMN0,
            column0=tile.key_scales,
            mul2=SecondMultiply.LANE0,
            lane0=factors + head * tiles,
            function=Function.SCORE,
            mask=Mask.CAUSAL,
            first_row=-section.index * node.tile % (1 << 20),
            first_row_operand=self.window.row,
            window=node.window or 0,
            maximum=Maximum.EXPONENT,
            max_to=peak,
            max_continue=int(not first),
            tiles=tiles,
            to=weights,
            to_stride=most,
            **columns,
        )
        low.emit_pass(
            source=Source.VECTOR,
            destination=Destination.VECTOR,
            function=Function.EXP2,
            table=SLOTS["exp2"],
            lane0=peak,
            sum=1,
            sum_to=total if first else own_total,
            mul3=ThirdMultiply.COLUMN2,
            column2=tile.value_scales,
            tap=Tap.AFTER,
            maximum=Maximum.ABSOLUTE,
            max_to=largest,
            tiles=tiles,
            x=weights,
            x_stride=most,
            to=weights,
            to_stride=most,
            **columns,
        )
        scale, inverse = low.parameters.take(tiles), low.parameters.take(tiles)
        low.scale_and_inverse(largest, tiles, 255, scale, inverse, section.tiles)
        probabilities = low.activations.take(tiles * most)
        low.emit_pass(
            source=Source.VECTOR,
            destination=Destination.ACTIVATION,
            mul2=SecondMultiply.LANE0,
            lane0=inverse,
            tiles=tiles,
            x=weights,
            x_stride=most,
            to=probabilities,
            to_stride=most,
            **columns,
        )
        low.vectors.give(weights)
        low.parameters.give(largest)
        low.parameters.give(inverse)
        return _Met(section, tile, head, probabilities, scale, own_total, before)

    def _mix(self, met: _Met, state: _State) -> None:
        """Probabilities times values, joined with what the tiles before have left."""
        low, tiles, d, most = self.low, self.tiles, self.node.head_dim, self.most_keys
        out = state.out + met.head * tiles * d
        low.builder.emit(
            MATRIX,
            **varying("depth", 0, met.section.keys),
            outer=tiles,
            inner=self.value_groups,
            a=met.probabilities,
            a_outer=most,
            w=met.tile.values,
            w_inner=most,
            unsigned=1,
        )
        join: dict[str, int] = {}
        if met.section.index:
            self._rescale(met, state)
            join = {"add2": SecondAdd.Y, "y": out, "y_stride": d}
        # There are result tiles only where the tile of keys was not skipped.
        low.emit_pass(
            source=Source.ACCUMULATOR,
            destination=Destination.VECTOR,
            mul1=FirstMultiply.LANE1,
            lane1=met.scale,
            tiles=tiles,
            to=out,
            to_stride=d,
            **varying("columns", d, met.section.columns),
            **join,
        )
        low.activations.give(met.probabilities)
        for words in (met.before, met.total, met.scale):
            low.parameters.give(words)

    def _rescale(self, met: _Met, state: _State) -> None:
        """Bring sum and weighted values to the new peak, and add the tile's sum."""
        low, tiles, d = self.low, self.tiles, self.node.head_dim
        peak, total = state.peak + met.head * tiles, state.total + met.head * tiles
        out = state.out + met.head * tiles * d
        factor = low.parameters.take(tiles)
        one = varying("columns", 1, met.section.present)
        low.emit_pass(
            source=Source.INTEGER,
            destination=Destination.PARAMETER,
            function=Function.EXP2,
            table=SLOTS["exp2"],
            lane0=peak,
            tiles=tiles,
            x=met.before,
            x_stride=1,
            to=factor,
            to_stride=1,
            **one,
        )
        for fields in (
            {"mul1": FirstMultiply.LANE1, "lane1": factor},
            {"add1": FirstAdd.LANE0, "lane0": met.total},
        ):
            low.emit_pass(
                source=Source.PARAMETER,
                destination=Destination.PARAMETER,
                tiles=tiles,
                x=total,
                x_stride=1,
                to=total,
                to_stride=1,
                **one,
                **fields,
            )
        low.emit_pass(
            source=Source.VECTOR,
            destination=Destination.VECTOR,
            mul1=FirstMultiply.LANE1,
            lane1=factor,
            tiles=tiles,
            x=out,
            x_stride=d,
            to=out,
            to_stride=d,
            **varying("columns", d, met.section.columns),
        )
        low.parameters.give(factor)

    def _finish(self, state: _State, into: Panels) -> None:
        """The weighted values over the sums, into the columns of their heads."""
        low, heads, d = self.low, self.node.heads, self.node.head_dim
        low.scalars(state.total, state.total, heads * self.tiles, function=Function.RECIP, table=SLOTS["recip"])
        for group in head_groups(into, heads):
            low.emit_pass(
                source=Source.VECTOR,
                destination=Destination.VECTOR,
                mul2=SecondMultiply.LANE0,
                lane0=state.total + group.first,
                tiles=group.count,
                columns=d,
                x=state.out + group.first * d,
                x_stride=d,
                to=group.start,
                to_stride=group.stride,
            )
        low.parameters.give(state.peak)
        low.parameters.give(state.total)
        low.vectors.give(state.out)
