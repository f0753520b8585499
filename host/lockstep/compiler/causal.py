"""Causal attention over a key-value cache in device memory.

New keys and values are quantised and appended to the cache; queries then meet the cache tile by tile, each tile of
keys rescaling what the ones before have left (section 6 of the contract, after Rabe and Staats, 2021,
https://arxiv.org/abs/2112.05682). Nothing on chip grows with the context.

Heads are worked on together where there is one row tile, as in decode: a pass then goes over heads in the place of
row tiles.
"""

from __future__ import annotations

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
    """What a query head keeps from tile to tile: peak and sum (PARAMETER), weighted values (VECTOR)."""

    peak: int
    total: int
    out: int


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

    def emit(self, q: Panels, k: Panels, v: Panels, into: Panels, absmax: tuple[str | None] | None) -> None:
        """Append ``k`` and ``v``, attend with ``q``, write to ``into``; ``absmax`` as in :meth:`Lowering.linear`."""
        low, node = self.low, self.node
        self._append(k, v)
        queries, factors = self._queries(q)
        aligned = absmax is not None and (absmax[0] is None or node.head_dim % self.rows == 0)
        for kv_head in range(node.kv_heads):
            heads = range(kv_head * self.group, (kv_head + 1) * self.group)
            states = {head: self._state() for head in heads}
            for section in self.window.sections:
                tile = self._load(kv_head, section)
                for head in heads:
                    self._meet(section, tile, queries, factors, head, states[head])
                low.weights.give(tile.keys)
                low.weights.give(tile.values)
                low.parameters.give(tile.key_scales)
                low.parameters.give(tile.value_scales)
            for head in heads:
                self._finish(states[head], head, into, absmax if aligned else None)
        if absmax is not None and aligned:
            low.drop_columns(absmax[0])
        low.activations.give(queries.start)
        low.parameters.give(queries.scales)
        low.parameters.give(factors)

    # --- Quantisation and the cache ----------------------------------------------------------------------------

    def _scales(self, x: Panels, heads: int) -> tuple[int, int]:
        """PARAMETER words of scales and their inverses, one per head and row tile."""
        low = self.low
        count, d = heads * x.tiles, x.features // heads
        scale, inverse = low.parameters.take(count), low.parameters.take(count)
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

    def _queries(self, q: Panels) -> tuple[_Quantised, int]:
        """Queries as left operands, and PARAMETER words of the factors that turn scores into exponents of 2."""
        low, node = self.low, self.node
        scale, inverse = self._scales(q, node.heads)
        words = self.tiles * node.head_dim
        start = low.activations.take(node.heads * words)
        self._round(q, node.heads, inverse, Destination.ACTIVATION, start, words)
        low.parameters.give(inverse)
        count = node.heads * self.tiles
        factors = low.parameters.take(count)
        factor = np.float32(np.log2(np.e) * node.scale)
        low.scalars(scale, factors, count, mul1=FirstMultiply.IMMEDIATE0, immediate0=float_bits(factor))
        return _Quantised(start, words, scale), factors

    def _append(self, k: Panels, v: Panels) -> None:
        """Quantise the new keys and values and store them where they belong in the cache."""
        low, node, context, rows = self.low, self.node, self.context, self.rows
        d, tiles, capacity = node.head_dim, self.tiles, context.capacity
        for x, transposed, data, scales in (
            (k, False, self.cache.keys, self.cache.key_scales),
            (v, True, self.cache.values, self.cache.value_scales),
        ):
            scale, inverse = self._scales(x, node.kv_heads)
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
                        "address_operand": context.first,
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
        low = self.low
        return _State(
            low.parameters.take(self.tiles),
            low.parameters.take(self.tiles),
            low.vectors.take(self.tiles * self.node.head_dim),
        )

    def _meet(self, section: Section, tile: _Tile, queries: _Quantised, factors: int, head: int, state: _State) -> None:
        """Scores, softmax and weighted values of one head with one tile of keys, joined with the tiles before."""
        low, node, tiles, d = self.low, self.node, self.tiles, self.node.head_dim
        first, most = section.index == 0, self.most_keys
        columns = varying("columns", 0, section.keys)
        row_count = varying("columns", tiles, section.tiles)
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
        before = low.parameters.take(tiles)
        if not first:
            low.emit_pass(
                source=Source.PARAMETER,
                destination=Destination.PARAMETER,
                tiles=1,
                x=state.peak,
                to=before,
                **row_count,
            )
        weights = low.vectors.take(tiles * most)
        total, largest = low.parameters.take(tiles), low.parameters.take(tiles)
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
            max_to=state.peak,
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
            lane0=state.peak,
            sum=1,
            sum_to=state.total if first else total,
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
        low.builder.emit(
            MATRIX,
            **varying("depth", 0, section.keys),
            outer=tiles,
            inner=self.value_groups,
            a=probabilities,
            a_outer=most,
            w=tile.values,
            w_inner=most,
            unsigned=1,
        )
        join: dict[str, int] = {}
        if not first:
            self._rescale(section, before, total, state)
            join = {"add2": SecondAdd.Y, "y": state.out, "y_stride": d}
        # The product's tiles exist only where the tile of keys does.
        low.emit_pass(
            source=Source.ACCUMULATOR,
            destination=Destination.VECTOR,
            mul1=FirstMultiply.LANE1,
            lane1=scale,
            tiles=tiles,
            to=state.out,
            to_stride=d,
            **varying("columns", d, section.columns),
            **join,
        )
        low.vectors.give(weights)
        low.activations.give(probabilities)
        for words in (before, total, largest, scale, inverse):
            low.parameters.give(words)

    def _rescale(self, section: Section, before: int, total: int, state: _State) -> None:
        """Bring sum and weighted values to the new peak, and add the tile's sum."""
        low, tiles, d = self.low, self.tiles, self.node.head_dim
        factor = low.parameters.take(tiles)
        one = varying("columns", 1, section.present)
        low.emit_pass(
            source=Source.INTEGER,
            destination=Destination.PARAMETER,
            function=Function.EXP2,
            table=SLOTS["exp2"],
            lane0=state.peak,
            tiles=tiles,
            x=before,
            x_stride=1,
            to=factor,
            to_stride=1,
            **one,
        )
        for fields in (
            {"mul1": FirstMultiply.LANE1, "lane1": factor},
            {"add1": FirstAdd.LANE0, "lane0": total},
        ):
            low.emit_pass(
                source=Source.PARAMETER,
                destination=Destination.PARAMETER,
                tiles=tiles,
                x=state.total,
                x_stride=1,
                to=state.total,
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
            x=state.out,
            x_stride=d,
            to=state.out,
            to_stride=d,
            **varying("columns", d, section.columns),
        )
        low.parameters.give(factor)

    def _finish(self, state: _State, head: int, into: Panels, absmax: tuple[str | None] | None) -> None:
        """The weighted values over the sum, into the head's columns of the result."""
        low, tiles, d = self.low, self.tiles, self.node.head_dim
        low.scalars(state.total, state.total, tiles, function=Function.RECIP, table=SLOTS["recip"])
        fields = {} if absmax is None else low.absmax_fields(into, absmax[0], head * d, head > 0)
        low.emit_pass(
            source=Source.VECTOR,
            destination=Destination.VECTOR,
            mul2=SecondMultiply.LANE0,
            lane0=state.total,
            tiles=tiles,
            columns=d,
            x=state.out,
            x_stride=d,
            to=into.start + head * d,
            to_stride=into.features,
            **fields,
        )
        low.parameters.give(state.peak)
        low.parameters.give(state.total)
        low.vectors.give(state.out)
