"""Decode attention over keys that the core chooses: what one token costs then falls with the keys that it keeps.

Heads take turns, those that share keys in one turn. A turn scores the sketch of its keys, lists the blocks with the
best rows, gathers those, and attends to them; while its keys come over the bus, other turns are at work:

    LOAD     sketch n + 4, blocks n + 3, sketch n + 5, blocks n + 4, ...
    MATRIX   scores n + 1, sketch n + 3, product n, ...
    VECTOR   softmax n, scores n + 1, selection n + 3, drain n, ...

so that the bus, which is the limit, never waits for a selection.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from lockstep_isa.instructions import (
    INDEX_ENTRIES,
    LOAD,
    MATRIX,
    Destination,
    FirstMultiply,
    Function,
    Mask,
    Maximum,
    Memory,
    SecondAdd,
    SecondMultiply,
    Source,
    Weights,
)
from lockstep_isa.selectors import LIFT, Blocks

from lockstep.graph import Attention

from .allocation import CapacityError
from .append import CacheAppend
from .context import Context, LayerCache, LayerSketch
from .heads import QuantisedQueries, quantised_queries
from .lowering import Lowering
from .onchip import Panels
from .passes import RECIPROCAL, Fields, Softmax, float_bits, scaling
from .sketch import BLOCK, BLOCK_ROWS, panel_words

#: Turns whose blocks have places on chip: one at work, the others on their way. Fewer make LOAD wait for MATRIX.
MOST_TURNS, LEAST_TURNS = 3, 2
#: Sketches on chip: one at work and one on its way.
SKETCHES = 2
#: About so many passes a turn take the LOADs of a turn with them.
_PASSES = 9
#: What LOADs bring: a sketch or blocks, of which turn.
_Wanted = tuple[str, int]


@dataclass(frozen=True)
class _Sketch:
    """Where a sketch lies: WEIGHT words and PARAMETER words of scales."""

    words: int
    scales: int


@dataclass(frozen=True)
class _Kept:
    """Where the blocks of a turn lie: WEIGHT words of keys and values, PARAMETER words of their scales."""

    keys: int
    values: int
    key_scales: int
    value_scales: int


@dataclass(frozen=True)
class _Softened:
    """Where one of two turns has its scores (VECTOR), its probabilities (ACTIVATION), and for each of its heads three
    PARAMETER words: the greatest exponent, the greatest probability; and the scale with the sum beside it, each pair.
    """

    scores: int
    probabilities: int
    peaks: int
    largest: int
    pairs: int
    inverses: int


class SelectedAttentionLowering:
    """Emits one attention of a single new token to the blocks of keys that it chooses.

    Parameters
    ----------
    low : the program. context : its operands. node : heads. cache, sketch : where its keys, values and their sketch
    lie. blocks : how many keys are kept.

    Raises :class:`CapacityError` where the blocks of two turns do not fit the core.
    """

    def __init__(
        self,
        low: Lowering,
        context: Context,
        node: Attention,
        cache: LayerCache,
        sketch: LayerSketch,
        blocks: Blocks,
    ) -> None:
        self.low, self.context, self.node, self.cache, self.sketch, self.blocks = (
            low,
            context,
            node,
            cache,
            sketch,
            blocks,
        )
        self.rows, self.d = low.config.rows, node.head_dim
        self.kept, self.count = blocks.keys, blocks.keys // BLOCK
        self.value_groups = -(-self.d // self.rows)
        self.group = node.heads // node.kv_heads
        self.most_blocks = -(-context.capacity // BLOCK)
        self.append = CacheAppend(low, context, node, cache)
        self.operands = context.chosen(self.count, BLOCK, BLOCK_ROWS)
        self._loads: deque[tuple[_Wanted, Callable[[], object]]] = deque()
        self._sketches: list[_Sketch] = []

    # --- The order of a program --------------------------------------------------------------------------------

    def preload(self) -> None:
        """Load the first sketches, while the queries are still being made ready."""
        if self._sketches:
            return
        low, panels = self.low, self.sketch.panels
        words = panels * panel_words(self.d)
        for _ in range(SKETCHES):
            self._sketches.append(_Sketch(low.weights.take(words), low.parameters.take(panels)))
        for turn in range(min(SKETCHES, self.node.kv_heads)):
            self._load_sketch(turn)
            self._bring(("sketch", turn))

    def attend(self, q: Panels, into: Panels, at_last: Callable[[], None]) -> None:
        """Attend with ``q``, write to ``into``; ``append`` has brought the new keys and values to the cache before.
        ``at_last`` is called when no more keys will be loaded.
        """
        self.preload()
        low, turns = self.low, self.node.kv_heads
        queries = quantised_queries(low, self.node, q)
        kept = self._kept_places()
        deep = len(kept)
        best = low.parameters.take(self.most_blocks)
        softened = [self._softened_place() for _ in range(2)]

        def look(turn: int) -> None:
            if turn < turns:
                self._bring(("sketch", turn))
                self._score_sketch(turn, queries)

        def select(turn: int) -> None:
            if turn < turns:
                self._select(turn, queries, best)
                self._load_sketch(turn + SKETCHES)
                self._gather(turn, kept[turn % deep])

        def begin(turn: int) -> None:
            self._bring(("blocks", turn))
            self._multiply_keys(turn, kept[turn % deep], queries)

        for turn in range(deep):
            look(turn)
            select(turn)
        begin(0)
        self._score(0, kept[0], queries, softened[0])
        for turn in range(turns):
            more, here, place = turn + 1 < turns, kept[turn % deep], softened[turn % 2]
            if more:
                begin(turn + 1)
            self._soften(here, place)
            look(turn + deep)
            self._multiply_values(here, place)
            if more:
                self._score(turn + 1, kept[(turn + 1) % deep], queries, softened[(turn + 1) % 2])
            select(turn + deep)
            if turn == max(0, turns - 1 - deep):
                self._bring(("blocks", turns - 1))
                at_last()
            self._drain(turn, place, into)
        self._free(queries, kept, softened, best)
        at_last()

    def _free(self, queries: QuantisedQueries, kept: list[_Kept], softened: list[_Softened], best: int) -> None:
        low = self.low
        for sketch in self._sketches:
            low.weights.give(sketch.words)
            low.parameters.give(sketch.scales)
        for blocks in kept:
            low.weights.give(blocks.keys)
            low.weights.give(blocks.values)
            low.parameters.give(blocks.key_scales)
            low.parameters.give(blocks.value_scales)
        for place in softened:
            low.vectors.give(place.scores)
            low.activations.give(place.probabilities)
            for words in (place.peaks, place.largest, place.pairs, place.inverses):
                low.parameters.give(words)
        low.parameters.give(best)
        queries.free(low)

    # --- Places ------------------------------------------------------------------------------------------------

    def _kept_places(self) -> list[_Kept]:
        """Places for the blocks of as many turns as fit."""
        low, scales = self.low, self.kept // self.rows
        keys, values = self.kept * self.d // self.rows, self.value_groups * self.kept
        most = min(MOST_TURNS, max(LEAST_TURNS, self.node.kv_heads))
        turns = next((n for n in range(most, 0, -1) if low.weights.fit(*[keys, values] * n)), 0)
        if turns < LEAST_TURNS:
            raise CapacityError(
                f"the {self.kept} keys that a token keeps need {LEAST_TURNS * (keys + values)} words of WEIGHT memory, "
                f"and {low.weights.largest} are free: keep fewer keys, or choose a core with more memory"
            )
        return [
            _Kept(
                low.weights.take(keys),
                low.weights.take(values),
                low.parameters.take(scales),
                low.parameters.take(scales),
            )
            for _ in range(turns)
        ]

    def _softened_place(self) -> _Softened:
        low, words = self.low, self.group * self.kept
        return _Softened(
            low.vectors.take(words),
            low.activations.take(words),
            *(low.parameters.take(n * self.group) for n in (1, 1, 2, 2)),
        )

    # --- Operands from device memory ---------------------------------------------------------------------------

    def _emit_pass(self, **fields: int) -> None:
        """A pass, and a few LOADs that wait: all of them at once would fill their queue and stop the passes behind."""
        self.low.emit_pass(**fields)
        for _ in range(-(-len(self._loads) // _PASSES)):
            self._loads.popleft()[1]()

    def _bring(self, what: _Wanted) -> None:
        """Emit the LOADs that wait, up to those of ``what``."""
        while any(name == what for name, _ in self._loads):
            self._loads.popleft()[1]()

    def _load(self, what: _Wanted, **fields: int) -> None:
        self._loads.append((what, lambda: self.low.builder.emit(LOAD, **fields)))

    def _load_sketch(self, turn: int) -> None:
        if turn >= self.node.kv_heads:
            return
        sketch, place, size = self.sketch, self._sketches[turn % SKETCHES], panel_words(self.d)
        what = "sketch", turn
        self._load(
            what,
            memory=Memory.WEIGHT,
            rows=0,
            rows_operand=self.operands.panels,
            words=size,
            address=sketch.words + turn * sketch.panels * size * self.rows,
            stride=size * self.rows,
            local=place.words,
            local_stride=size,
        )
        word = self.low.config.vector_word_bytes
        self._load(
            what,
            memory=Memory.PARAMETER,
            words=0,
            words_operand=self.operands.panels,
            address=sketch.scales + turn * sketch.panels * word,
            local=place.scales,
        )

    def _entry(self, turn: int) -> int:
        """Where the list of a turn begins in the index memory."""
        return turn % max(1, min(MOST_TURNS + 1, INDEX_ENTRIES // self.count)) * self.count

    def _gather(self, turn: int, place: _Kept) -> None:
        """The blocks on a turn's list: keys, values, and the scales of both."""
        cache, rows, d, capacity = self.cache, self.rows, self.d, self.context.capacity
        listed = {"rows": self.count, "gather": 1, "gather_from": self._entry(turn)}
        words, scales = BLOCK * d // rows, BLOCK // rows

        def load(memory: Memory, base: int, size: int, words: int, local: int) -> None:
            """Blocks of ``words`` words, ``size`` bytes a key."""
            self._load(
                ("blocks", turn),
                memory=memory,
                **listed,
                words=words,
                address=base,
                stride=BLOCK * size,
                local=local,
                local_stride=words,
            )

        load(Memory.WEIGHT, cache.keys + turn * capacity * d, d, words, place.keys)
        load(Memory.PARAMETER, cache.key_scales + turn * capacity * 4, 4, scales, place.key_scales)
        load(Memory.PARAMETER, cache.value_scales + turn * capacity * 4, 4, scales, place.value_scales)
        for group in range(self.value_groups):
            base = cache.values + (turn * self.value_groups + group) * capacity * rows
            load(Memory.WEIGHT, base, rows, BLOCK, place.values + group * self.kept)

    # --- Selection ---------------------------------------------------------------------------------------------

    def _score_sketch(self, turn: int, queries: QuantisedQueries) -> None:
        self.low.builder.emit(
            MATRIX,
            depth=self.d,
            outer=self.group,
            inner=0,
            inner_operand=self.operands.panels,
            a=queries.start + turn * self.group * queries.head_words,
            a_outer=queries.head_words,
            w=self._sketches[turn % SKETCHES].words,
            w_inner=panel_words(self.d),
            weights=Weights.INT4_32,
        )

    def _select(self, turn: int, queries: QuantisedQueries, best: int) -> None:
        """The best blocks of a turn to the index memory."""
        for number in range(self.group):
            self._emit_pass(
                source=Source.ACCUMULATOR,
                mul1=FirstMultiply.COLUMN0,
                column0=self._sketches[turn % SKETCHES].scales,
                mul2=SecondMultiply.LANE0,
                lane0=queries.factors + turn * self.group + number,
                add2=SecondAdd.IMMEDIATE1,
                immediate1=float_bits(LIFT),
                function=Function.RELU,
                columns=0,
                columns_operand=self.operands.rows,
                maximum=Maximum.ABSOLUTE,
                max_columns=BLOCK_ROWS,
                max_to=best,
                max_continue=int(number > 0),
            )
        self._emit_pass(
            source=Source.PARAMETER,
            columns=0,
            columns_operand=self.operands.blocks,
            x=best,
            select=self.count,
            select_to=self._entry(turn),
            select_lane_operand=self.context.lane,
            select_first=self.blocks.first,
            select_last=self.blocks.last,
        )

    # --- Attention to what is kept -----------------------------------------------------------------------------

    def _multiply_keys(self, turn: int, place: _Kept, queries: QuantisedQueries) -> None:
        self.low.builder.emit(
            MATRIX,
            depth=self.d,
            outer=self.group,
            inner=self.kept // self.rows,
            a=queries.start + turn * self.group * queries.head_words,
            a_outer=queries.head_words,
            w=place.keys,
            w_inner=self.d,
        )

    def _softmax(self, place: _Softened) -> Softmax:
        """Passes over all heads of a turn, one row tile each."""
        return Softmax(place.scores, self.kept, self.group, {"columns": self.kept})

    def _score(self, turn: int, kept: _Kept, queries: QuantisedQueries, place: _Softened) -> None:
        """Scores; the keys behind the token in its own block, which is the last one, are hidden."""
        own: Fields = {"first_row": self.kept - BLOCK}
        # Each head is a row tile, and a mask takes row tiles for later tokens: one pass a head.
        for number in range(self.group):
            softmax = Softmax(place.scores + number * self.kept, self.kept, 1, {"columns": self.kept})
            fields = softmax.scores(kept.key_scales, queries.factors + turn * self.group + number, place.peaks + number)
            if self.rows < BLOCK:
                own["first_row_operand"] = self.operands.row
            self._emit_pass(**fields, **own, mask=Mask.CAUSAL)

    def _soften(self, kept: _Kept, place: _Softened) -> None:
        """Scores to 8-bit probabilities, their scales and the reciprocals of their sums."""
        softmax, group = self._softmax(place), self.group
        sums = place.pairs + group
        self._emit_pass(**softmax.exponentials(place.peaks, sums, kept.value_scales, place.largest))
        short = {"source": Source.PARAMETER, "destination": Destination.PARAMETER}
        self._emit_pass(**short, **scaling(1 / 255), columns=group, x=place.largest, to=place.pairs)
        self._emit_pass(**short, **RECIPROCAL, columns=2 * group, x=place.pairs, to=place.inverses)
        self._emit_pass(**softmax.probabilities(place.inverses, place.probabilities))

    def _multiply_values(self, kept: _Kept, place: _Softened) -> None:
        self.low.builder.emit(
            MATRIX,
            depth=self.kept,
            outer=self.group,
            inner=self.value_groups,
            a=place.probabilities,
            a_outer=self.kept,
            w=kept.values,
            w_inner=self.kept,
            unsigned=1,
        )

    def _drain(self, turn: int, place: _Softened, into: Panels) -> None:
        """The weighted values over the sums, into the columns of their heads."""
        self._emit_pass(
            source=Source.ACCUMULATOR,
            destination=Destination.VECTOR,
            mul1=FirstMultiply.LANE1,
            lane1=place.pairs,
            mul2=SecondMultiply.LANE0,
            lane0=place.inverses + self.group,
            tiles=self.group,
            columns=self.d,
            to=into.start + turn * self.group * self.d,
            to_stride=self.d,
        )
