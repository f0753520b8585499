"""The schedule of block-sparse attention: strips of queries meet the keys that they keep, the longest strips first.

MATRIX and VECTOR work on two strips at a time: scores of the next one stand between a softmax and its product.

    MATRIX   scores 0, scores 1, product 0, scores 2, product 1, ...
    VECTOR   softmax 0, softmax 1, drain 0, softmax 2, drain 1, ...

Every piece of that is a step: operands that LOAD brings, a product, and what VECTOR makes of it. Keys stream through
quarters of the WEIGHT memory a few blocks at a time, values a few panels of features at a time, so that nothing on chip
but one strip's scores and probabilities grows with the keys.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

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
    FirstAdd,
    FirstMultiply,
    Function,
    Mask,
    Memory,
    SecondAdd,
    SecondMultiply,
    Source,
)
from lockstep_isa.program import Program

from .allocation import Pieces
from .block_mask import AHEAD, PARTS, QUARTERS, BlockSparse, Strip, room, runs, strips
from .empty_blocks import EmptyBlocks
from .passes import RECIPROCAL, SLOTS, Softmax, scaling

#: Strips whose scales of queries are made ready by one short pass.
BATCH = 8


@dataclass(frozen=True)
class Places:
    """Byte addresses in device memory, for ``tokens`` tokens of each head and panels of R tokens or features.

    q : int8[heads, tokens / R, head_dim, R], as are keys ``k``. v : int8[heads, ceil(head_dim / R), tokens, R].
    q_scales, k_scales, v_scales : float32[heads, tokens]. out : float32[heads, tokens / R, head_dim, R].
    tables : of each function in :data:`~.passes.SLOTS` that softmax needs.
    """

    q: int
    q_scales: int
    k: int
    k_scales: int
    v: int
    v_scales: int
    out: int
    tables: dict[str, int]


def block_sparse_program(config: CoreConfig, work: BlockSparse, places: Places) -> Program:
    """The program of one attention; raises as :func:`strips` does."""
    return BlockSparseLowering(config, work, places).program()


@dataclass(frozen=True)
class _Turn:
    """A strip meets the keys that it keeps in one tile of the stream; ``number``, ``index`` count turns and strips."""

    number: int
    index: int
    strip: Strip
    section: int

    @property
    def blocks(self) -> tuple[int, ...]:
        return self.strip.sections[self.section]

    @property
    def first(self) -> bool:
        return self.section == 0

    @property
    def last(self) -> bool:
        return self.section == len(self.strip.sections) - 1


@dataclass(frozen=True)
class _Step:
    """One product: ``load`` asks for its operands, ``multiply`` starts it, ``drain`` takes its result tiles.

    behind : of the steps from the first on, how many must be drained before this one's product is emitted.
    """

    load: Callable[[], None]
    multiply: Callable[[], None]
    drain: Callable[[], None]
    behind: int = 0


class BlockSparseLowering:
    """Emits one block-sparse attention: ``work`` says which, ``places`` where its operands lie."""

    def __init__(self, config: CoreConfig, work: BlockSparse, places: Places) -> None:
        self.config, self.work, self.places = config, work, places
        self.builder = ProgramBuilder(config)
        self.strips, self.space = strips(config, work), room(config, work)
        self.rows, self.d = config.rows, work.head_dim
        self.groups, self.row_tiles = -(-self.d // self.rows), work.block // self.rows
        self.steps = 0
        zeros = self.space.scores + PARTS * self.space.out
        self.empty = EmptyBlocks(self.builder, work, self.row_tiles, zeros, places.out)
        # Blocks of strips that are done, times their row tiles.
        self.worked = 0
        most = max((len(section) for strip in self.strips for section in strip.sections), default=1)
        self.most_blocks = max(1, min(most, self.space.operands // (self.row_tiles * self.d)))
        words = Pieces("PARAMETER", 0, config.parameter_words)
        self.key_scales = words.take(QUARTERS * self.most_blocks * self.row_tiles)
        self.value_words = most * self.row_tiles
        self.value_scales = words.take(PARTS * self.value_words)
        self.factors = words.take(2 * BATCH * self.row_tiles)
        # Per turn: scales and sums beside each other, so that one pass takes the reciprocals of both.
        self.scales, self.inverses = (words.take(PARTS * 2 * self.row_tiles) for _ in range(2))
        # Per turn, where a strip meets several tiles: peaks before this one, factors from those to the peaks behind.
        self.before, self.rescale = (words.take(PARTS * self.row_tiles) for _ in range(2))
        self.peaks, self.totals = (words.take(PARTS * self.row_tiles) for _ in range(2))

    def program(self) -> Program:
        """The whole program."""
        for name in ("exp2", "recip"):
            self.builder.emit(
                LOAD,
                memory=Memory.TABLE,
                words=TABLE_ENTRIES,
                address=self.places.tables[name],
                local=SLOTS[name] * TABLE_ENTRIES,
            )
        self.empty.begin()
        steps = list(self._steps())
        for step in steps[:AHEAD]:
            step.load()
        drained = 0
        for n, step in enumerate(steps):
            if n + AHEAD < len(steps):
                steps[n + AHEAD].load()
            for before in steps[drained : step.behind]:
                before.drain()
            drained = max(drained, step.behind)
            step.multiply()
            # One behind: MATRIX has its next product in its queue while VECTOR's fills up.
            for before in steps[drained:n]:
                before.drain()
            drained = max(drained, n)
        for step in steps[-1:]:
            step.drain()
        self.empty.store(1, 1)
        return self.builder.finish()

    # --- The order of steps ------------------------------------------------------------------------------------

    def _steps(self) -> Iterator[_Step]:
        before: tuple[_Turn, int] | None = None
        for turn in self._turns():
            softened = yield from self._score_steps(turn)
            if before is not None:
                yield from self._value_steps(*before)
            before = turn, softened
        if before is not None:
            yield from self._value_steps(*before)

    def _turns(self) -> Iterator[_Turn]:
        number = 0
        for index, strip in enumerate(self.strips):
            for section in range(len(strip.sections)):
                yield _Turn(number, index, strip, section)
                number += 1

    def _quarter(self) -> int:
        """Which quarter of the WEIGHT memory the operands of the next step take."""
        self.steps += 1
        return (self.steps - 1) % QUARTERS

    def _score_steps(self, turn: _Turn) -> Generator[_Step, None, int]:
        """Queries times keys, some blocks of keys at a time; returns how many steps there are up to their last."""
        for first in range(0, len(turn.blocks), self.most_blocks):
            blocks, quarter = turn.blocks[first : first + self.most_blocks], self._quarter()

            def load(first: int = first, blocks: Sequence[int] = blocks, quarter: int = quarter) -> None:
                if first == 0:
                    self._load_turn(turn)
                self._load_keys(turn, blocks, quarter)

            def multiply(blocks: Sequence[int] = blocks, quarter: int = quarter) -> None:
                self._multiply_keys(turn, blocks, quarter)

            def drain(first: int = first, blocks: Sequence[int] = blocks, quarter: int = quarter) -> None:
                if first == 0:
                    self._begin_turn(turn)
                self._score(turn, first, blocks, quarter)
                if first + len(blocks) == len(turn.blocks):
                    self._soften(turn)

            yield _Step(load, multiply, drain)
        return self.steps

    def _value_steps(self, turn: _Turn, softened: int) -> Iterator[_Step]:
        """Probabilities times values, some panels of features at a time."""
        most = max(1, self.space.operands // self._keys(turn))
        for first in range(0, self.groups, most):
            count, quarter = min(most, self.groups - first), self._quarter()

            def load(first: int = first, count: int = count, quarter: int = quarter) -> None:
                self._load_values(turn, first, count, quarter)

            def multiply(count: int = count, quarter: int = quarter) -> None:
                self._multiply_values(turn, count, quarter)

            def drain(first: int = first, count: int = count) -> None:
                if first == 0 and not turn.first:
                    self._rescale_values(turn)
                self._drain(turn, first, count)
                if first + count == self.groups and turn.last:
                    self._finish(turn)

            yield _Step(load, multiply, drain, softened)

    # --- Where things lie ----------------------------------------------------------------------------------------

    def _keys(self, turn: _Turn) -> int:
        return len(turn.blocks) * self.work.block

    def _queries(self, turn: _Turn) -> int:
        return turn.index % PARTS * self.space.queries

    def _probabilities(self, turn: _Turn) -> int:
        return PARTS * self.space.queries + turn.number % 2 * self.space.probabilities

    def _out(self, turn: _Turn) -> int:
        return self.space.scores + turn.index % PARTS * self.space.out

    def _of_strip(self, words: int, turn: _Turn) -> int:
        return words + turn.index % PARTS * self.row_tiles

    def _of_turn(self, words: int, turn: _Turn) -> int:
        return words + turn.number % PARTS * self.row_tiles

    def _pair(self, words: int, turn: _Turn) -> int:
        """Of two values per row tile, those of the scales come first and those of the sums behind."""
        return words + turn.number % PARTS * 2 * self.row_tiles

    def _factors(self, turn: _Turn) -> int:
        return self.factors + turn.index % (2 * BATCH) * self.row_tiles

    def _value_scales(self, turn: _Turn) -> int:
        return self.value_scales + turn.number % PARTS * self.value_words

    def _tokens(self, strip: Strip) -> int:
        """Tokens of all heads in front of a strip's."""
        return strip.head * self.work.tokens + strip.block * self.work.block + strip.first * self.rows

    # --- Operands from device memory ---------------------------------------------------------------------------

    def _load_turn(self, turn: _Turn) -> None:
        """Queries and their scales, where the strip begins, and scales of values."""
        strip, d = turn.strip, self.d
        if turn.first:
            if turn.index % BATCH == 0:
                for index, other in enumerate(self.strips[turn.index : turn.index + BATCH], turn.index):
                    self._load_words(
                        self.places.q_scales + self._tokens(other) * 4,
                        self.factors + index % (2 * BATCH) * self.row_tiles,
                        other.tiles,
                    )
            self.builder.emit(
                LOAD,
                memory=Memory.ACTIVATION,
                words=strip.tiles * d,
                address=self.places.q + self._tokens(strip) * d,
                local=self._queries(turn),
            )
        self._load_scales(turn, turn.blocks, self.places.v_scales, self._value_scales(turn))

    def _load_words(self, address: int, local: int, words: int) -> None:
        self.builder.emit(LOAD, memory=Memory.PARAMETER, words=words, address=address, local=local)

    def _load_scales(self, turn: _Turn, blocks: Sequence[int], base: int, local: int) -> None:
        """The scales of some blocks of keys or values beside each other."""
        for at, first, count in runs(blocks):
            tokens = turn.strip.head * self.work.tokens + first * self.work.block
            self._load_words(base + tokens * 4, local + at * self.row_tiles, count * self.row_tiles)

    def _load_keys(self, turn: _Turn, blocks: Sequence[int], quarter: int) -> None:
        words = self.row_tiles * self.d
        for at, first, count in runs(blocks):
            tokens = turn.strip.head * self.work.tokens + first * self.work.block
            self.builder.emit(
                LOAD,
                memory=Memory.WEIGHT,
                words=count * words,
                address=self.places.k + tokens * self.d,
                local=quarter * self.space.operands + at * words,
            )
        self._load_scales(turn, blocks, self.places.k_scales, self._key_scales(quarter))

    def _key_scales(self, quarter: int) -> int:
        return self.key_scales + quarter * self.most_blocks * self.row_tiles

    def _load_values(self, turn: _Turn, group: int, count: int, quarter: int) -> None:
        work, rows, keys = self.work, self.rows, self._keys(turn)
        for at, first, blocks in runs(turn.blocks):
            tokens = (turn.strip.head * self.groups + group) * work.tokens + first * work.block
            self.builder.emit(
                LOAD,
                memory=Memory.WEIGHT,
                rows=count,
                words=blocks * work.block,
                stride=work.tokens * rows,
                address=self.places.v + tokens * rows,
                local=quarter * self.space.operands + at * work.block,
                local_stride=keys,
            )

    # --- Products ------------------------------------------------------------------------------------------------

    def _multiply_keys(self, turn: _Turn, blocks: Sequence[int], quarter: int) -> None:
        self.builder.emit(
            MATRIX,
            depth=self.d,
            outer=turn.strip.tiles,
            inner=len(blocks) * self.row_tiles,
            a=self._queries(turn),
            a_outer=self.d,
            w=quarter * self.space.operands,
            w_inner=self.d,
        )

    def _multiply_values(self, turn: _Turn, count: int, quarter: int) -> None:
        keys = self._keys(turn)
        self.builder.emit(
            MATRIX,
            depth=keys,
            outer=turn.strip.tiles,
            inner=count,
            a=self._probabilities(turn),
            a_outer=keys,
            w=quarter * self.space.operands,
            w_inner=keys,
            unsigned=1,
        )

    # --- Softmax ---------------------------------------------------------------------------------------------------

    def _softmax(self, turn: _Turn, first: int, blocks: int) -> Softmax:
        """Passes over ``blocks`` of the kept blocks, from number ``first`` on."""
        block = self.work.block
        return Softmax(first * block, self._keys(turn), turn.strip.tiles, {"columns": blocks * block})

    def _begin_turn(self, turn: _Turn) -> None:
        """Factors that turn scores of a batch of strips into exponents of 2; and the peaks that a tile will raise."""
        if turn.first and turn.index % BATCH == 0:
            words = self._factors(turn)
            self._scalars(words, words, BATCH * self.row_tiles, **scaling(score_factor(None, self.d)))
        if not turn.first:
            self._scalars(self._of_strip(self.peaks, turn), self._of_turn(self.before, turn), turn.strip.tiles)

    def _score(self, turn: _Turn, first: int, blocks: Sequence[int], quarter: int) -> None:
        """Result tiles as exponents of 2, and the greatest of each row."""
        strip, fields = turn.strip, {}
        if self.work.causal and strip.block in blocks:
            # The block on the diagonal is the last one: rows see all of those in front of it.
            row = blocks.index(strip.block) * self.work.block + strip.first * self.rows
            fields = {"mask": Mask.CAUSAL, "first_row": row}
        self._pass(
            **self._softmax(turn, first, len(blocks)).scores(
                self._key_scales(quarter), self._factors(turn), self._of_strip(self.peaks, turn)
            ),
            max_continue=int(first > 0 or not turn.first),
            **fields,
        )

    def _soften(self, turn: _Turn) -> None:
        """Scores to 8-bit probabilities, with the reciprocal of the sums where no other tile follows or precedes."""
        tiles, alone = turn.strip.tiles, turn.first and turn.last
        scales, inverses = self._pair(self.scales, turn), self._pair(self.inverses, turn)
        sums = scales + tiles if alone or not turn.first else self._of_strip(self.totals, turn)
        softmax = self._softmax(turn, 0, len(turn.blocks))
        peaks = self._of_strip(self.peaks, turn)
        self._pass(**softmax.exponentials(peaks, sums, self._value_scales(turn), scales))
        self._scalars(scales, scales, tiles, **scaling(1 / 255))
        self._scalars(scales, inverses, tiles * (1 + alone), **RECIPROCAL)
        self._pass(**softmax.probabilities(inverses, self._probabilities(turn)))
        if not turn.first:
            self._join_sums(turn, sums)

    def _join_sums(self, turn: _Turn, own: int) -> None:
        """What brings values to the new peaks; bring sums there, and add those of the tile."""
        factor, total = self._of_turn(self.rescale, turn), self._of_strip(self.totals, turn)
        words: dict[str, int] = {"destination": Destination.PARAMETER, "tiles": turn.strip.tiles, "columns": 1}
        words |= {"x_stride": 1, "to_stride": 1}
        self._pass(
            source=Source.INTEGER,
            function=Function.EXP2,
            table=SLOTS["exp2"],
            lane0=self._of_strip(self.peaks, turn),
            x=self._of_turn(self.before, turn),
            to=factor,
            **words,
        )
        for fields in (
            {"mul1": FirstMultiply.LANE1, "lane1": factor},
            {"add1": FirstAdd.LANE0, "lane0": own},
        ):
            self._pass(source=Source.PARAMETER, x=total, to=total, **words, **fields)

    # --- Weighted values -------------------------------------------------------------------------------------------

    def _rescale_values(self, turn: _Turn) -> None:
        """Bring the weighted values of the tiles before to the new peaks."""
        out = {"x": self._out(turn), "x_stride": self.d, "to": self._out(turn), "to_stride": self.d}
        self._pass(
            source=Source.VECTOR,
            destination=Destination.VECTOR,
            mul1=FirstMultiply.LANE1,
            lane1=self._of_turn(self.rescale, turn),
            tiles=turn.strip.tiles,
            columns=self.d,
            **out,
        )

    def _drain(self, turn: _Turn, group: int, count: int) -> None:
        """Some panels of weighted values, over their sums or joined with those of the tiles before."""
        first = group * self.rows
        to, fields = self._out(turn) + first, {}
        if turn.first and turn.last:
            fields = {"mul2": SecondMultiply.LANE0, "lane0": self._pair(self.inverses, turn) + turn.strip.tiles}
        elif not turn.first:
            fields = {"add2": SecondAdd.Y, "y": to, "y_stride": self.d}
        self._pass(
            source=Source.ACCUMULATOR,
            destination=Destination.VECTOR,
            mul1=FirstMultiply.LANE1,
            lane1=self._pair(self.scales, turn),
            tiles=turn.strip.tiles,
            columns=min(count * self.rows, self.d - first),
            to=to,
            to_stride=self.d,
            **fields,
        )

    def _finish(self, turn: _Turn) -> None:
        """The results of a strip to device memory."""
        tiles, out = turn.strip.tiles, self._out(turn)
        if not turn.first:
            total = self._of_strip(self.totals, turn)
            self._scalars(total, total, tiles, **RECIPROCAL)
            self._pass(
                source=Source.VECTOR,
                destination=Destination.VECTOR,
                mul2=SecondMultiply.LANE0,
                lane0=total,
                tiles=tiles,
                columns=self.d,
                x=out,
                x_stride=self.d,
                to=out,
                to_stride=self.d,
            )
        self.builder.emit(
            STORE,
            memory=Memory.VECTOR,
            words=tiles * self.d,
            address=self.places.out + self._tokens(turn.strip) * self.d * 4,
            local=out,
        )
        self.worked += turn.strip.kept * tiles
        self.empty.store(self.worked, self.work.kept * self.row_tiles)

    # --- Passes ------------------------------------------------------------------------------------------------------

    def _pass(self, **fields: int) -> None:
        self.builder.emit(VECTOR, **fields)

    def _scalars(self, x: int, to: int, words: int, **fields: int) -> None:
        """One value per row: PARAMETER words from ``x`` on become those from ``to`` on."""
        self._pass(
            source=Source.PARAMETER, destination=Destination.PARAMETER, tiles=1, columns=words, x=x, to=to, **fields
        )
