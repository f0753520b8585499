"""Causal attention over a key-value cache in device memory.

New keys and values are quantised and appended to the cache; queries then meet the cache tile by tile, each tile of
keys rescaling what the ones before have left (section 6 of the contract, after Rabe and Staats, 2021,
https://arxiv.org/abs/2112.05682). Nothing on chip grows with the context.

Heads are worked on together where there is one row tile, as in decode: a pass then goes over heads in the place of
row tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lockstep_isa.instructions import (
    MATRIX,
    STORE,
    Destination,
    FirstAdd,
    FirstMultiply,
    Function,
    Mask,
    Memory,
    SecondAdd,
    SecondMultiply,
    Source,
)

from lockstep.graph import Attention

from .append import CacheAppend
from .append_int4 import Int4Append
from .cached_tiles import CachedTile, CachedTiles
from .context import Context, LayerCache, Section, Window
from .heads import QuantisedQueries, quantised_queries, varying
from .int4_operands import Int4Operands
from .lowering import Lowering
from .onchip import Panels, head_groups
from .passes import RECIPROCAL, SLOTS, Softmax


@dataclass(frozen=True)
class _State:
    """What query heads keep from tile to tile, per head and row tile: peak and sum (PARAMETER words), weighted values
    (VECTOR words). And, in the slots of :meth:`CausalAttentionLowering._slot`, while a tile is met: the peaks before
    it, the factors from those to the peaks behind it, the tile's own sums; with one
    row tile also what it adds to the values (VECTOR words, one set).
    """

    peak: int
    total: int
    out: int
    before: int
    factor: int
    own_total: int
    fresh: int | None

    @property
    def parameters(self) -> tuple[int, ...]:
        """The pieces in PARAMETER."""
        return self.peak, self.total, self.before, self.factor, self.own_total


@dataclass
class _Turn:
    """One query head meets one tile of keys, which the first of a group's heads loads and the last one frees."""

    section: Section
    head: int
    shared: list[CachedTile]
    last: bool

    @property
    def tile(self) -> CachedTile | None:
        """The tile of keys, if it is on chip."""
        return self.shared[0] if self.shared else None


@dataclass(frozen=True)
class _Met:
    """A head whose probabilities for one tile of keys wait for their product with the values."""

    turn: _Turn
    probabilities: int
    scale: int


class CausalAttentionLowering:
    """Emits one causal attention.

    Parameters
    ----------
    low : the program. context : its operands. node : heads, window and tile. cache : where its keys and values lie.
    importance : where the attention that keys get is left in device memory; none if nobody asks. Only with one tile of
    keys: with several, a key's share is not known before the last one. int4 : what a cache of 4 bits is appended with.
    """

    def __init__(
        self,
        low: Lowering,
        context: Context,
        node: Attention,
        cache: LayerCache,
        importance: int | None = None,
        int4: Int4Operands | None = None,
    ) -> None:
        self.low, self.context, self.node, self.cache = low, context, node, cache
        self.rows = low.config.rows
        self.tiles = context.tiles
        self.group = node.heads // node.kv_heads
        self.window: Window = context.window(node.window, node.tile, node.head_dim)
        self.cached = CachedTiles(low, context, node, cache, self.window)
        self.most_keys = self.cached.most
        self.append = CacheAppend(low, context, node, cache)
        if int4 is not None:
            self.append = Int4Append(low, context, node, cache, int4)
        self._preloaded: list[CachedTile] = []
        self.importance = importance
        # VECTOR words of what keys have got so far, ``most_keys`` a row tile.
        self._credit: int | None = None

    def preload(self) -> None:
        """Load the first tile of keys of as many heads as fit, while the queries are still being made ready."""
        for head in range(self.node.kv_heads):
            if not self.cached.room:
                break
            self._preloaded.append(self.cached.load(head, self.window.sections[0]))

    def attend(self, q: Panels, into: Panels, at_last: Callable[[], None]) -> None:
        """Attend with ``q``, write to ``into``; ``append`` has brought the new keys and values to the cache before.
        ``at_last`` is called when no more keys will be loaded.

        The scores of the next head stand between a softmax and its product with the values, so that neither unit
        waits for the other:

            MATRIX   scores 0, scores 1, product 0, scores 2, product 1, ...
            VECTOR   softmax 0, softmax 1, drain 0, softmax 2, drain 1, ...
        """
        low = self.low
        queries = quantised_queries(low, self.node, q)
        state = self._state()
        turns = self._turns()
        scored = None if (turn := next(turns, None)) is None else self._score(turn, queries)
        before: _Met | None = None
        while scored is not None:
            following = next(turns, None)
            if before is not None:
                self._weigh(before)
            # Where tiles of keys do not fit beside each other, the next one waits until this one is done with; so does
            # the next one of the same head, whose peak this one still needs.
            ready = (
                following is not None
                and following.head != scored.head
                and (following.tile is not None or self.cached.room)
            )
            next_scored = self._score(following, queries) if following is not None and ready else None
            met = self._soften(scored, queries.factors, state)
            if before is not None:
                self._drain(before, state)
            before = met
            if following is not None and not ready:
                self._weigh(before)
                self._drain(before, state)
                before = None
                next_scored = self._score(following, queries)
            scored = next_scored
        assert before is not None
        self._weigh(before)
        at_last()
        self._drain(before, state)
        self._finish(state, into)
        self._store_credit()
        queries.free(low)

    # --- Operands ----------------------------------------------------------------------------------------------

    # --- One query head and one tile of keys -------------------------------------------------------------------

    def _state(self) -> _State:
        low, count = self.low, self.node.heads * self.tiles
        take = low.parameters.take
        words = count * self.node.head_dim
        out, fresh = low.vectors.take(words), low.vectors.take(words) if self.tiles == 1 else None
        # Two turns are under way at a time.
        slots = 2 * (count if self.tiles == 1 else self.tiles)
        return _State(take(count), take(count), out, take(slots), take(slots), take(slots), fresh)

    def _slot(self, turn: _Turn) -> int:
        """Where a turn keeps what lasts until its end: with one row tile all heads of a tile of keys have places beside
        each other, so that one pass serves them all.
        """
        heads = self.node.heads
        if self.tiles == 1:
            return turn.section.index % 2 * heads + turn.head
        return (turn.section.index * heads + turn.head) % 2 * self.tiles

    def _slots(self, turn: _Turn) -> int:
        """The first slot of the entries of :meth:`_together`."""
        return self._slot(turn) - (turn.head if self.tiles == 1 else 0)

    def _together(self, turn: _Turn) -> tuple[int, int]:
        """The first entry and the entries, per head and row tile, that one short pass serves."""
        if self.tiles == 1:
            return 0, self.node.heads
        return turn.head * self.tiles, self.tiles

    def _turns(self) -> Iterator[_Turn]:
        """Tile by tile, head by head: with several heads, consecutive turns are those of different ones."""
        for section in self.window.sections:
            for kv_head in range(self.node.kv_heads):
                shared = self._preloaded[:1]
                del self._preloaded[:1]
                for number in range(self.group):
                    yield _Turn(section, kv_head * self.group + number, shared, number == self.group - 1)

    def _score(self, turn: _Turn, queries: QuantisedQueries) -> _Turn:
        """Queries times keys."""
        d = self.node.head_dim
        if turn.tile is None:
            turn.shared.append(self.cached.load(turn.head // self.group, turn.section))
        self.low.builder.emit(
            MATRIX,
            depth=d,
            outer=self.tiles,
            **varying("inner", 0, turn.section.panels),
            a=queries.start + turn.head * queries.head_words,
            a_outer=d,
            w=turn.shared[0].keys,
            w_inner=self.cached.key_words,
            **self.context.form.fields,
        )
        return turn

    def _soften(self, turn: _Turn, factors: int, state: _State) -> _Met:
        """Scores to 8-bit probabilities."""
        low, node, tiles = self.low, self.node, self.tiles
        section, tile = turn.section, turn.shared[0]
        first, most = section.index == 0, self.most_keys
        peak = state.peak + turn.head * tiles
        total = state.total + turn.head * tiles if first else state.own_total + self._slot(turn)
        if not first and (tiles > 1 or turn.head == 0):
            self._keep_peaks(turn, state)
        weights, largest = low.vectors.take(tiles * most), low.parameters.take(tiles)
        softmax = Softmax(weights, most, tiles, varying("columns", 0, section.keys))
        low.emit_pass(
            **softmax.scores(tile.key_scales, factors + turn.head * tiles, peak),
            mask=Mask.CAUSAL,
            first_row=-section.index * node.tile % (1 << 20),
            first_row_operand=self.window.row,
            window=node.window or 0,
            max_continue=int(not first),
        )
        low.emit_pass(**softmax.exponentials(peak, total, tile.value_scales, largest))
        scale, inverse = low.parameters.take(tiles), low.parameters.take(tiles)
        low.scale_and_inverse(largest, tiles, 255, scale, inverse, section.tiles)
        probabilities = low.activations.take(tiles * most)
        low.emit_pass(**softmax.probabilities(inverse, probabilities))
        if self.importance is not None:
            self._credit_keys(softmax, total)
        low.vectors.give(weights)
        low.parameters.give(largest)
        low.parameters.give(inverse)
        if not first and self._closes(turn):
            self._close(turn, state)
        return _Met(turn, probabilities, scale)

    def _credit_keys(self, softmax: Softmax, total: int) -> None:
        """Add one head's probabilities, times the scales of values, to what its keys have got from the heads before."""
        low = self.low
        inverse = low.parameters.take(self.tiles)
        low.scalars(total, inverse, self.tiles, **RECIPROCAL)
        join: dict[str, int] = {}
        if self._credit is None:
            self._credit = low.vectors.take(self.tiles * self.most_keys)
        else:
            join = {"add2": SecondAdd.Y, "y": self._credit, "y_stride": self.most_keys}
        low.emit_pass(**softmax.over(inverse), to=self._credit, **join)
        low.parameters.give(inverse)

    def _store_credit(self) -> None:
        """What keys have got, to device memory."""
        if self.importance is None or self._credit is None:
            return
        low, most, word = self.low, self.most_keys, self.low.config.vector_word_bytes
        low.later(
            STORE,
            memory=Memory.VECTOR,
            rows=self.tiles,
            **varying("words", 0, self.window.sections[0].keys),
            stride=most * word,
            address=self.importance,
            local=self._credit,
            local_stride=most,
        )
        low.give_later(self._credit)
        self._credit = None

    def _keep_peaks(self, turn: _Turn, state: _State) -> None:
        """Copy the peaks that a tile of keys will raise."""
        first, count = self._together(turn)
        self.low.emit_pass(
            source=Source.PARAMETER,
            destination=Destination.PARAMETER,
            tiles=count,
            x=state.peak + first,
            x_stride=1,
            to=state.before + self._slots(turn),
            to_stride=1,
            **varying("columns", 1, turn.section.present),
        )

    def _weigh(self, met: _Met) -> None:
        """Probabilities times values."""
        most, tile = self.most_keys, met.turn.shared[0]
        self.low.builder.emit(
            MATRIX,
            **varying("depth", 0, met.turn.section.keys),
            outer=self.tiles,
            inner=self.cached.groups,
            a=met.probabilities,
            a_outer=most,
            w=tile.values,
            w_inner=self.cached.value_words,
            unsigned=1,
            **self.context.form.fields,
        )
        if met.turn.last:
            self.cached.give(tile)

    def _drain(self, met: _Met, state: _State) -> None:
        """The weighted values, joined with what the tiles before have left: at once, or for all heads together."""
        low, tiles, d, section = self.low, self.tiles, self.node.head_dim, met.turn.section
        offset = met.turn.head * tiles * d
        out, join = state.out + offset, {}
        if section.index and state.fresh is not None:
            out = state.fresh + offset
        elif section.index:
            self._rescale(met.turn, state, {})
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
            **varying("columns", d, section.columns),
            **join,
        )
        low.activations.give(met.probabilities)
        low.parameters.give(met.scale)
        if section.index and state.fresh is not None and self._closes(met.turn):
            self._rescale(met.turn, state, {"add2": SecondAdd.Y, "y": state.fresh, "y_stride": d})

    def _closes(self, turn: _Turn) -> bool:
        """Whether a turn is the last one of those that share short passes."""
        return self.tiles > 1 or turn.head == self.node.heads - 1

    def _rescale(self, turn: _Turn, state: _State, join: dict[str, int]) -> None:
        """Bring weighted values to the new peaks."""
        (first, count), slot, d = self._together(turn), self._slots(turn), self.node.head_dim
        self.low.emit_pass(
            source=Source.VECTOR,
            destination=Destination.VECTOR,
            mul1=FirstMultiply.LANE1,
            lane1=state.factor + slot,
            tiles=count,
            x=state.out + first * d,
            x_stride=d,
            to=state.out + first * d,
            to_stride=d,
            **varying("columns", d, turn.section.columns),
            **join,
        )

    def _close(self, turn: _Turn, state: _State) -> None:
        """What brings values to the new peaks; bring sums there, and add those of the tile."""
        (first, count), slot = self._together(turn), self._slots(turn)
        shape = {"tiles": count, "x_stride": 1, "to_stride": 1, **varying("columns", 1, turn.section.present)}
        self.low.emit_pass(
            source=Source.INTEGER,
            destination=Destination.PARAMETER,
            function=Function.EXP2,
            table=SLOTS["exp2"],
            lane0=state.peak + first,
            x=state.before + slot,
            to=state.factor + slot,
            **shape,
        )
        for fields in (
            {"mul1": FirstMultiply.LANE1, "lane1": state.factor + slot},
            {"add1": FirstAdd.LANE0, "lane0": state.own_total + slot},
        ):
            self.low.emit_pass(
                source=Source.PARAMETER,
                destination=Destination.PARAMETER,
                x=state.total + first,
                to=state.total + first,
                **shape,
                **fields,
            )

    def _finish(self, state: _State, into: Panels) -> None:
        """The weighted values over the sums, into the columns of their heads."""
        low, heads, d = self.low, self.node.heads, self.node.head_dim
        low.scalars(state.total, state.total, heads * self.tiles, **RECIPROCAL)
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
        for words in state.parameters:
            low.parameters.give(words)
        low.vectors.give(state.out)
        if state.fresh is not None:
            low.vectors.give(state.fresh)
