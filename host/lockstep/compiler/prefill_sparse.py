"""The schedule of a prompt's attention to the blocks of keys that the core chooses itself, in one program.

Tiles of queries go through three stages, each a product and what VECTOR makes of it:

    choose    queries times the sketch; best score of each block; the list of the best blocks
    soften    queries times the keys that LOAD has gathered by that list; softmax
    weigh     probabilities times the gathered values

In a round the three are at work on different tiles, so that no unit waits for another one:

    round r    choose r    soften r - 3    weigh r - 4    while LOAD gathers for the next two

The sketch of a head is made while the head before it is attended to, a step between two rounds, and stays on chip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from lockstep_driver.builder import ProgramBuilder
from lockstep_isa.attention import score_factor
from lockstep_isa.config import CoreConfig
from lockstep_isa.instructions import (
    LOAD,
    MATRIX,
    STORE,
    TABLE_ENTRIES,
    VECTOR,
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
from lockstep_isa.program import Program
from lockstep_isa.selectors import LIFT
from lockstep_isa.sketch import POOL

from .allocation import Pieces
from .passes import RECIPROCAL, SLOTS, Softmax, float_bits, scaling
from .prefill_work import Places, PrefillSparse, check_core
from .sketch_prefill import Sketch, SketchMaker
from .steps import Step, emit_steps, nothing

#: Rounds from the choice of a tile to its softmax, and to its product with values: an odd and an even number, so that
#: where short and long tiles take turns, they do so within a round.
SOFTEN_AT, WEIGH_AT = 3, 4
#: Tiles of queries on chip: from the round before the choice to the softmax.
QUERIES = SOFTEN_AT + 2
#: Lists of blocks: those of the tiles that are chosen for while an older one's is read.
LISTS = WEIGH_AT
#: Scales of gathered keys and values: those that softmax reads, and those that are loaded for the next one.
SCALES = 2
#: Results that STORE still reads.
RESULTS = 2


def prefill_sparse_program(config: CoreConfig, work: PrefillSparse, places: Places) -> Program:
    """The program of one attention; raises :class:`~.prefill_work.PrefillError` for what the core cannot do, and
    :class:`CapacityError` where it has too little memory.
    """
    check_core(config, work)
    return PrefillSparseLowering(config, work, places).program()


@dataclass(frozen=True)
class _Tile:
    """Tile ``index`` of a head's queries; ``number`` counts the tiles of all heads in the order of the program.

    seen, kept : blocks of keys.
    runs : (place among the kept blocks, first block, count) where they are known beforehand; none where it chooses.
    """

    number: int
    head: int
    index: int
    seen: int
    kept: int
    runs: tuple[tuple[int, int, int], ...] | None


class PrefillSparseLowering:
    """Emits one attention: ``work`` says which, ``places`` where its operands lie."""

    def __init__(self, config: CoreConfig, work: PrefillSparse, places: Places) -> None:
        self.config, self.work, self.places = config, work, places
        self.builder = ProgramBuilder(config)
        self.rows, self.d, self.block = config.rows, work.head_dim, work.block
        self.row_tiles = work.queries // self.rows
        self.block_panels = self.block // self.rows
        most = max(work.kept(tile) for tile in range(work.tiles))
        self.most_keys = most * self.block
        pieces = {
            memory: Pieces(memory.name, 0, words, unit)
            for memory, words, unit in (
                (Memory.ACTIVATION, config.activation_words, 4),
                (Memory.WEIGHT, config.weight_words, 1),
                (Memory.VECTOR, config.vector_words, 1),
                (Memory.PARAMETER, config.parameter_words, 1),
            )
        }
        take = {memory: pieces[memory].take for memory in pieces}
        self.queries = [take[Memory.ACTIVATION](self.row_tiles * self.d) for _ in range(QUERIES)]
        self.probabilities = [take[Memory.ACTIVATION](self.row_tiles * self.most_keys) for _ in range(2)]
        operands = self.most_keys * self.d // self.rows
        self.scores = take[Memory.VECTOR](self.row_tiles * self.most_keys)
        self.out = [take[Memory.VECTOR](self.row_tiles * self.d) for _ in range(RESULTS)]
        parameter = take[Memory.PARAMETER]
        # Of a head's factors the last ones are read by softmax, rounds after the next head's are there.
        self.factors = [parameter(work.tokens // self.rows) for _ in range(2 + -(-SOFTEN_AT // work.tiles))]
        self.best = parameter(work.tokens // self.block)
        self.key_scales = [parameter(most * self.block_panels) for _ in range(SCALES)]
        self.value_scales = [parameter(most * self.block_panels) for _ in range(SCALES)]
        self.peaks = parameter(self.row_tiles)
        # Scales and sums beside each other, so that one pass takes the reciprocals of both.
        self.pairs, self.inverses = ([parameter(2 * self.row_tiles) for _ in range(2)] for _ in range(2))
        self.maker = SketchMaker(self.builder, config, self.d, work.tokens, pieces, places.constants)
        words = self.maker.panels * self.maker.panel_words
        self.sketches = [Sketch(take[Memory.WEIGHT](words), parameter(self.maker.panels)) for _ in range(2)]
        # With two places each, keys and values come a round ahead. With one, keys come while MATRIX multiplies
        # values, and values while it multiplies keys.
        self.roomy = pieces[Memory.WEIGHT].fit(*[operands] * 4)
        self.keys, self.values = ([take[Memory.WEIGHT](operands) for _ in range(1 + self.roomy)] for _ in range(2))

    def program(self) -> Program:
        """The whole program."""
        for name in ("exp2", "recip"):
            self._load(Memory.TABLE, TABLE_ENTRIES, self.places.tables[name], SLOTS[name] * TABLE_ENTRIES)
        emit_steps(list(self._steps()))
        return self.builder.finish()

    # --- The order of steps ------------------------------------------------------------------------------------

    def _steps(self) -> Iterator[Step]:
        tiles = [tile for head in range(self.work.heads) for tile in self._tiles(head)]
        sketches = [self._sketch_steps(head) for head in range(self.work.heads)]
        made = {head: steps[-1] for head, steps in enumerate(sketches) if steps}
        yield from sketches[0]
        for number in range(len(tiles) + WEIGH_AT):
            yield from self._round(tiles, number, made)
            head, place = divmod(number, self.work.tiles)
            if head + 1 < self.work.heads:
                yield from self._share(sketches[head + 1], place)

    def _share(self, steps: list[Step], place: int) -> list[Step]:
        """Of the steps that make the next head's sketch those that stand behind round ``place`` of this head."""
        # Behind the product with values of a long tile VECTOR has nothing left to do.
        rounds = range(self.work.tiles)[1 if self.work.causal and self.work.tiles > 1 else 0 :: 1 + self.work.causal]
        if place not in rounds:
            return []
        index, count = rounds.index(place), len(rounds)
        return steps[len(steps) * index // count : len(steps) * (index + 1) // count]

    def _tiles(self, head: int) -> list[_Tile]:
        first = head * self.work.tiles
        return [
            _Tile(first + n, head, index, self.work.seen(index), self.work.kept(index), self.work.runs(index))
            for n, index in enumerate(self.work.order)
        ]

    def _sketch_steps(self, head: int) -> list[Step]:
        if all(self.work.runs(tile) for tile in range(self.work.tiles)):
            return []
        tokens = head * self.work.tokens
        return self.maker.steps(
            self.places.k + tokens * self.d, self.places.k_scales + tokens * 4, self.sketches[head % 2]
        )

    def _round(self, tiles: list[_Tile], number: int, made: dict[int, Step]) -> Iterator[Step]:
        def at(index: int) -> _Tile | None:
            return tiles[index] if 0 <= index < len(tiles) else None

        def load() -> None:
            for tile in (at(0), at(1)) if number == 0 else (at(number + 1),):
                if tile is not None:
                    self._load_queries(tile)

        def part(emit: Callable[[_Tile], None], lag: int, wanted: bool = True) -> Callable[[], None]:
            tile = at(number - lag)
            return partial(emit, tile) if wanted and tile is not None else nothing

        chosen, roomy = at(number), self.roomy
        values = part(self._gather_values, WEIGH_AT, not roomy)
        if chosen is None:
            yield Step(load, load_late=values)
        else:
            yield from self._choose(chosen, load, values, (made[chosen.head],) if chosen.head in made else ())
        yield Step(
            part(self._gather_keys, SOFTEN_AT - 1, roomy),
            part(self._multiply_keys, SOFTEN_AT),
            part(self._softmax, SOFTEN_AT),
        )
        yield Step(
            part(self._gather_values, WEIGH_AT - 1, roomy),
            part(self._multiply_values, WEIGH_AT),
            part(self._drain, WEIGH_AT),
            part(self._gather_keys, SOFTEN_AT - 1, not roomy),
        )

    # --- Choosing ------------------------------------------------------------------------------------------------

    def _choose(
        self, tile: _Tile, load: Callable[[], None], late: Callable[[], None], behind: tuple[Step, ...]
    ) -> Iterator[Step]:
        """Scores of as many row tiles at a time as have room for their result tiles in the queue, or of one."""

        def begin() -> None:
            if tile.number % self.work.tiles == 0:
                words = self.factors[tile.head % len(self.factors)]
                self._scalars(words, words, self.work.tokens // self.rows, **scaling(score_factor(None, self.d)))

        if tile.runs is not None:
            yield Step(load, drain=begin, load_late=late)
            return
        count = max(1, min(self.row_tiles, self.config.accumulator_tiles // self._panels(tile)))
        for row in range(0, self.row_tiles, count):

            def look(row: int = row, end: int = min(row + count, self.row_tiles)) -> None:
                if row == 0:
                    begin()
                for each in range(row, end):
                    self._rank(tile, each)
                if end == self.row_tiles:
                    self._select(tile)

            first = (load, late) if row == 0 else (nothing, nothing)
            multiply = partial(self._multiply_sketch, tile, row, min(count, self.row_tiles - row))
            yield Step(first[0], multiply, look, first[1], behind)

    def _looked_at(self, tile: _Tile) -> int:
        """Blocks whose scores count: the last ones are kept whatever they score."""
        return tile.seen - self.work.last

    def _panels(self, tile: _Tile) -> int:
        """Panels of the sketch that a tile looks at."""
        return -(-self._looked_at(tile) * self.block // (POOL * self.rows))

    def _multiply_sketch(self, tile: _Tile, row: int, rows: int) -> None:
        self.builder.emit(
            MATRIX,
            depth=self.d,
            outer=rows,
            inner=self._panels(tile),
            a=self._of(self.queries, tile) + row * self.d,
            a_outer=self.d,
            w=self.sketches[tile.head % 2].words,
            w_inner=self.maker.panel_words,
            weights=Weights.INT4_32,
        )

    def _rank(self, tile: _Tile, row: int) -> None:
        """The best score of each block in a row tile, or in it and those before; lifted, so that none has a sign."""
        columns = self.block // POOL
        self._pass(
            source=Source.ACCUMULATOR,
            mul1=FirstMultiply.COLUMN0,
            column0=self.sketches[tile.head % 2].scales,
            mul2=SecondMultiply.LANE0,
            lane0=self._factors(tile) + row,
            add2=SecondAdd.IMMEDIATE1,
            immediate1=float_bits(LIFT),
            function=Function.RELU,
            columns=self._looked_at(tile) * columns,
            maximum=Maximum.ABSOLUTE,
            max_columns=columns,
            max_to=self.best,
            max_continue=int(row > 0),
        )

    def _select(self, tile: _Tile) -> None:
        self._pass(
            source=Source.PARAMETER,
            columns=tile.seen,
            x=self.best,
            select=tile.kept,
            select_to=self._list(tile),
            select_more_lanes=self.rows - 1,
            select_first=self.work.first,
            select_last=self.work.last,
        )

    def _list(self, tile: _Tile) -> int:
        """Entry of the index memory where the list of a tile begins."""
        return tile.number % LISTS * (self.most_keys // self.block)

    # --- Operands --------------------------------------------------------------------------------------------------

    def _load(self, memory: Memory, words: int, address: int, local: int) -> None:
        self.builder.emit(LOAD, memory=memory, words=words, address=address, local=local)

    def _load_queries(self, tile: _Tile) -> None:
        if tile.number % self.work.tiles == 0:
            self._load_factors(tile.head)
        address = self.places.q + self._tokens(tile) * self.d
        self._load(Memory.ACTIVATION, self.row_tiles * self.d, address, self._of(self.queries, tile))

    def _load_factors(self, head: int) -> None:
        tokens = self.work.tokens
        self._load(
            Memory.PARAMETER,
            tokens // self.rows,
            self.places.q_scales + head * tokens * 4,
            self.factors[head % len(self.factors)],
        )

    def _gather(self, tile: _Tile, memory: Memory, address: int, words: int, local: int) -> None:
        """The kept blocks of an array in which they are ``words`` words each."""
        size = self.rows if memory is Memory.WEIGHT else 4 * self.rows
        for at, first, count in tile.runs or ():
            self._load(memory, count * words, address + first * words * size, local + at * words)
        if tile.runs is None:
            self._gather_chosen(tile, memory, address, words, words * size, local)

    def _gather_chosen(self, tile: _Tile, memory: Memory, address: int, words: int, stride: int, local: int) -> None:
        self.builder.emit(
            LOAD,
            memory=memory,
            rows=tile.kept,
            words=words,
            address=address,
            stride=stride,
            local=local,
            local_stride=words,
            gather=1,
            gather_from=self._list(tile),
        )

    def _gather_keys(self, tile: _Tile) -> None:
        tokens = tile.head * self.work.tokens
        keys, words = self._of(self.keys, tile), self.block_panels
        self._gather(tile, Memory.WEIGHT, self.places.k + tokens * self.d, words * self.d, keys)
        for scales, local in (
            (self.places.k_scales, self.key_scales),
            (self.places.v_scales, self.value_scales),
        ):
            self._gather(tile, Memory.PARAMETER, scales + tokens * 4, words, self._of(local, tile))

    def _gather_values(self, tile: _Tile) -> None:
        """Panel of features by panel of features; of blocks that are known, all panels at once."""
        panels, keys, local = self.d // self.rows, tile.kept * self.block, self._of(self.values, tile)
        stride = self.work.tokens * self.rows
        base, block = self.places.v + tile.head * panels * stride, self.block * self.rows
        for at, first, count in tile.runs or ():
            self.builder.emit(
                LOAD,
                memory=Memory.WEIGHT,
                rows=panels,
                words=count * self.block,
                address=base + first * block,
                stride=stride,
                local=local + at * self.block,
                local_stride=keys,
            )
        if tile.runs is None:
            for panel in range(panels):
                place = base + panel * stride, self.block, block, local + panel * keys
                self._gather_chosen(tile, Memory.WEIGHT, *place)

    # --- Softmax ---------------------------------------------------------------------------------------------------

    def _seen_by_rows(self, tile: _Tile) -> list[tuple[int, int, int]]:
        """(first row tile, count, panels of keys that any of their queries sees).

        In causal attention each row tile sees a panel more than the one before it. Two groups are told apart: one for
        each row tile could fill MATRIX's queue, and the dispatcher would never come to the pass that empties it.
        """
        panels, half = tile.kept * self.block_panels, self.row_tiles // 2
        if not self.work.causal or half == 0:
            return [(0, self.row_tiles, panels)]
        rest = self.row_tiles - half
        return [(0, half, panels - rest), (half, rest, panels)]

    def _multiply_keys(self, tile: _Tile) -> None:
        every = tile.kept * self.block_panels
        for row, count, panels in self._seen_by_rows(tile):
            # Result tiles come row tile by row tile, so a product of several of them has all panels.
            seen = panels if count == 1 else every
            self._multiply_panels(tile, row, count, seen, self.d)
            if seen < every:
                # Scores that the mask hides may be anything.
                self._multiply_panels(tile, row, count, every - seen, 1)

    def _multiply_panels(self, tile: _Tile, row: int, rows: int, panels: int, depth: int) -> None:
        self.builder.emit(
            MATRIX,
            depth=depth,
            outer=rows,
            inner=panels,
            a=self._of(self.queries, tile) + row * self.d,
            a_outer=self.d,
            w=self._of(self.keys, tile),
            w_inner=self.d,
        )

    def _softmax(self, tile: _Tile) -> None:
        keys, rows = tile.kept * self.block, self.row_tiles
        softmax = Softmax(self.scores, keys, rows, {"columns": keys})
        hidden: dict[str, int] = {}
        if self.work.causal:
            # The tile's own blocks are the last ones that it keeps.
            hidden = {"mask": Mask.CAUSAL, "first_row": keys - self.work.queries}
        self._pass(**softmax.scores(self._of(self.key_scales, tile), self._factors(tile), self.peaks), **hidden)
        pairs, inverses = self._of(self.pairs, tile), self._of(self.inverses, tile)
        value_scales = self._of(self.value_scales, tile)
        self._pass(**softmax.exponentials(self.peaks, pairs + rows, value_scales, pairs))
        self._scalars(pairs, pairs, rows, **scaling(1 / 255))
        self._scalars(pairs, inverses, 2 * rows, **RECIPROCAL)
        self._pass(**softmax.probabilities(inverses, self._of(self.probabilities, tile)))

    # --- Weighted values -------------------------------------------------------------------------------------------

    def _multiply_values(self, tile: _Tile) -> None:
        """Keys behind the last one that a row tile sees have no probability, so they are left out."""
        keys = tile.kept * self.block
        for row, count, panels in self._seen_by_rows(tile):
            self.builder.emit(
                MATRIX,
                depth=panels * self.rows,
                outer=count,
                inner=self.d // self.rows,
                a=self._of(self.probabilities, tile) + row * keys,
                a_outer=keys,
                w=self._of(self.values, tile),
                w_inner=keys,
                unsigned=1,
            )

    def _drain(self, tile: _Tile) -> None:
        out = self._of(self.out, tile)
        self._pass(
            source=Source.ACCUMULATOR,
            destination=Destination.VECTOR,
            mul1=FirstMultiply.LANE1,
            lane1=self._of(self.pairs, tile),
            mul2=SecondMultiply.LANE0,
            lane0=self._of(self.inverses, tile) + self.row_tiles,
            tiles=self.row_tiles,
            columns=self.d,
            to=out,
            to_stride=self.d,
        )
        self.builder.emit(
            STORE,
            memory=Memory.VECTOR,
            words=self.row_tiles * self.d,
            address=self.places.out + self._tokens(tile) * self.d * 4,
            local=out,
        )

    # --- Where things lie, and passes ------------------------------------------------------------------------------

    @staticmethod
    def _of(places: list[int], tile: _Tile) -> int:
        return places[tile.number % len(places)]

    def _tokens(self, tile: _Tile) -> int:
        """Tokens of all heads in front of a tile's."""
        return tile.head * self.work.tokens + tile.index * self.work.queries

    def _factors(self, tile: _Tile) -> int:
        return self.factors[tile.head % len(self.factors)] + tile.index * self.row_tiles

    def _pass(self, **fields: int) -> None:
        self.builder.emit(VECTOR, **fields)

    def _scalars(self, x: int, to: int, words: int, **fields: int) -> None:
        """One value per row: PARAMETER words from ``x`` on become those from ``to`` on."""
        self._pass(source=Source.PARAMETER, destination=Destination.PARAMETER, columns=words, x=x, to=to, **fields)
