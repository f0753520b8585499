"""The sketch of a prompt's keys, made on the core: what ``lockstep_isa.sketch`` says, from panels of keys.

A unit is a few panels of the sketch, of R rows and so 4 R keys each. Its three products move and add values,
nothing else, so they are exact:

    keys         panels of keys times the identity, drained transposed: a word for each key, which MATRIX can add up
    sums         a matrix of ones times those words: four keys become one row of the sketch
    bytes        a matrix of 1 and 16 times the levels: two int4 in a byte, drained transposed into packed words

Between them VECTOR makes means, multipliers and levels. Packed words and scales stay on chip.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
from lockstep_driver.builder import ProgramBuilder
from lockstep_isa.config import CoreConfig
from lockstep_isa.instructions import (
    LOAD,
    MATRIX,
    VECTOR,
    Destination,
    FirstAdd,
    FirstMultiply,
    Maximum,
    Memory,
    SecondAdd,
    Source,
)
from lockstep_isa.sketch import GROUP, MULTIPLIER_OFFSET, MULTIPLIER_SLOPE, POOL
from lockstep_isa.weights import words_per_tile
from numpy.typing import NDArray

from .allocation import Pieces
from .passes import RECIPROCAL, float_bits, rounding, scaling
from .steps import Step, nothing

#: Words of means that are made at a time: VECTOR starts once for them, and MATRIX waits while they are drained.
UNIT_WORDS = 256
#: Units whose operands lie on chip at a time: one whose keys are loaded or moved, one whose levels are packed.
PLACES = 2
#: Added to a value inside +-2^22 and taken off again, it leaves the nearest integer.
MAGIC = np.float32(1.5 * 2**23)


def sketch_constants(rows: int) -> dict[str, NDArray[np.generic]]:
    """What a maker's :class:`Constants` point to in device memory, for an array of ``rows``."""
    key, row = np.arange(POOL * rows)[:, None], np.arange(rows)
    pool = key // POOL == row
    pair = np.arange(2 * rows)[:, None]
    return {
        "identity": np.eye(rows, dtype=np.int8),
        "pool": pool.astype(np.int8),
        "pack": ((pair // 2 == row) * np.where(pair % 2, 16, 1)).astype(np.int8),
        "mask": pool.astype(np.float32),
        "magic": np.full((1, rows), MAGIC, np.float32),
    }


@dataclass(frozen=True)
class Constants:
    """Byte addresses of the arrays of :func:`sketch_constants`."""

    identity: int
    pool: int
    pack: int
    mask: int
    magic: int


@dataclass(frozen=True)
class Sketch:
    """Where a head's sketch is: the first WEIGHT word of its packed panels, and the first PARAMETER word of its scales,
    one for each panel.
    """

    words: int
    scales: int


class SketchMaker:
    """Emits the making of sketches.

    Parameters
    ----------
    builder : of the program. head_dim : a multiple of 32. tokens : of a head, a multiple of R.
    pieces : free words of each memory, by its name in :class:`Memory`. constants : where those of the maker lie.
    """

    def __init__(
        self,
        builder: ProgramBuilder,
        config: CoreConfig,
        head_dim: int,
        tokens: int,
        pieces: dict[Memory, Pieces],
        constants: Constants,
    ) -> None:
        self.builder, self.d, self.rows, self.tokens = builder, head_dim, config.rows, tokens
        self.panels = -(-tokens // (POOL * config.rows))
        self.panel_words = words_per_tile(head_dim, GROUP)
        self.unit = min(max(1, UNIT_WORDS // head_dim), self.panels)
        self.groups, self.key_panels = head_dim // GROUP, self.unit * POOL
        # VECTOR meets only means, each unit's behind the other's: drains are in order, so one place is enough.
        take = {memory: pieces[memory].take for memory in pieces}
        rows, words = config.rows, self.unit * head_dim
        self.keys = [take[Memory.ACTIVATION](POOL * words) for _ in range(PLACES)]
        self.moved = [take[Memory.WEIGHT](POOL * words) for _ in range(PLACES)]
        self.levels = [take[Memory.WEIGHT](words) for _ in range(PLACES)]
        self.means = take[Memory.VECTOR](words)
        statistics = self.unit * self.groups
        self.peaks, self.multipliers, self.inverses = (take[Memory.PARAMETER](statistics) for _ in range(3))
        self.key_scales = [take[Memory.PARAMETER](self.key_panels) for _ in range(PLACES + 1)]
        self.identity = take[Memory.WEIGHT](rows)
        self.pool, self.pack = take[Memory.ACTIVATION](POOL * rows), take[Memory.ACTIVATION](2 * rows)
        self.mask, self.magic = take[Memory.VECTOR](self.key_panels * rows), take[Memory.PARAMETER](1)
        self._load(Memory.WEIGHT, rows, constants.identity, self.identity)
        self._load(Memory.ACTIVATION, POOL * rows, constants.pool, self.pool)
        self._load(Memory.ACTIVATION, 2 * rows, constants.pack, self.pack)
        self._load(Memory.VECTOR, POOL * rows, constants.mask, self.mask)
        self._load(Memory.PARAMETER, 1, constants.magic, self.magic)
        self._made = 0
        # VECTOR has time for copies of the mask while the first keys are loaded; the bus has none.
        if self.unit > 1:
            builder.emit(
                VECTOR,
                source=Source.VECTOR,
                destination=Destination.VECTOR,
                tiles=self.unit - 1,
                columns=POOL * rows,
                x=self.mask,
                to=self.mask + POOL * rows,
                to_stride=POOL * rows,
            )

    def steps(self, keys: int, scales: int, into: Sketch) -> list[Step]:
        """The steps that make one head's sketch, in an order in which none waits for the one before it.

        keys : byte address of int8[tokens / R, head_dim, R]. scales : of float32[tokens].
        """
        units = [
            _Unit(self, keys, scales, into, first, min(self.unit, self.panels - first), self._number())
            for first in range(0, self.panels, self.unit)
        ]
        chains = [unit.steps(then) for unit, then in zip_longest(units, units[1:])]
        # move 0, move 1, sum 0, move 2, sum 1, pack 0, ...
        return [
            chains[turn - stage][stage]
            for turn in range(len(units) + 2)
            for stage in range(3)
            if 0 <= turn - stage < len(units)
        ]

    def _number(self) -> int:
        self._made += 1
        return self._made - 1

    def _load(self, memory: Memory, words: int, address: int, local: int) -> None:
        self.builder.emit(LOAD, memory=memory, words=words, address=address, local=local)


@dataclass(frozen=True)
class _Unit:
    """``panels`` panels of a head's sketch from ``first`` on; ``number`` counts the units of a maker."""

    maker: SketchMaker
    keys: int
    scales: int
    into: Sketch
    first: int
    panels: int
    number: int

    def steps(self, then: _Unit | None) -> tuple[Step, Step, Step]:
        """Its products; the keys of unit ``then``, the next one of the head, are loaded behind the first."""
        first = self._load_keys if self.first == 0 else nothing
        move = Step(first, self._multiply_keys, self._drain_keys, then._load_keys if then else nothing)
        add = Step(multiply=self._multiply_sums, drain=self._drain_sums, behind=(move,))
        pack = Step(multiply=self._multiply_bytes, drain=self._drain_bytes, behind=(add,))
        return move, add, pack

    @property
    def _key_panels(self) -> int:
        """Panels of keys: the last unit may have less than four for each of its own."""
        maker = self.maker
        return min(self.panels * POOL, maker.tokens // maker.rows - self.first * POOL)

    @property
    def _statistics(self) -> int:
        return self.panels * self.maker.groups

    def _of(self, places: list[int]) -> int:
        return places[self.number % len(places)]

    def _load_keys(self) -> None:
        m, token = self.maker, self.first * POOL * self.maker.rows
        m._load(Memory.ACTIVATION, self._key_panels * m.d, self.keys + token * m.d, self._of(m.keys))
        m._load(Memory.PARAMETER, self._key_panels, self.scales + token * 4, self._of(m.key_scales))

    def _multiply_keys(self) -> None:
        m = self.maker
        m.builder.emit(
            MATRIX,
            depth=m.rows,
            outer=self._key_panels,
            inner=m.d // m.rows,
            a=self._of(m.keys),
            a_outer=m.d,
            a_inner=m.rows,
            w=m.identity,
        )

    def _drain_keys(self) -> None:
        m = self.maker
        m.builder.emit(
            VECTOR,
            source=Source.ACCUMULATOR,
            destination=Destination.WEIGHT_TRANSPOSED,
            tiles=self._key_panels,
            columns=m.d,
            to=self._of(m.moved),
            to_stride=m.rows,
            to_group=m.key_panels * m.rows,
        )

    def _multiply_sums(self) -> None:
        m = self.maker
        most = POOL * m.rows
        # The last panel may have fewer keys: what else it holds counts as zeros, so it is not multiplied.
        whole, rest = divmod(self._key_panels, POOL)
        for panel, outer, depth in ((0, whole, most), (whole, int(rest > 0), rest * m.rows)):
            if outer:
                m.builder.emit(
                    MATRIX,
                    depth=depth,
                    outer=outer,
                    inner=m.d // m.rows,
                    a=m.pool,
                    w=self._of(m.moved) + panel * most,
                    w_outer=most,
                    w_inner=m.key_panels * m.rows,
                )

    def _drain_sums(self) -> None:
        m, count = self.maker, self._statistics
        rows = {"tiles": count, "columns": GROUP}
        m.builder.emit(
            VECTOR,
            source=Source.ACCUMULATOR,
            destination=Destination.VECTOR,
            **scaling(1 / POOL),
            maximum=Maximum.ABSOLUTE,
            max_to=m.peaks,
            **rows,
            to=m.means,
            to_stride=GROUP,
        )
        scalars = {"source": Source.PARAMETER, "columns": count}
        slope = scaling(MULTIPLIER_SLOPE) | {"add2": SecondAdd.IMMEDIATE1, "immediate1": float_bits(MULTIPLIER_OFFSET)}
        m.builder.emit(VECTOR, destination=Destination.PARAMETER, **scalars, x=m.peaks, to=m.multipliers, **slope)
        whole = {"add1": FirstAdd.LANE0, "lane0": m.magic}
        whole |= {"add2": SecondAdd.IMMEDIATE1, "immediate1": float_bits(-MAGIC)}
        reciprocal = scalars | whole | RECIPROCAL
        m.builder.emit(VECTOR, destination=Destination.PARAMETER, **reciprocal, x=m.multipliers, to=m.inverses)
        m.builder.emit(
            VECTOR,
            **rounding(m.inverses, Destination.WEIGHT),
            **rows,
            x=m.means,
            x_stride=GROUP,
            to=self._of(m.levels),
            to_stride=GROUP,
        )
        # Rounded to 8 bits, a multiplier is the word in front of its values.
        m.builder.emit(
            VECTOR,
            source=Source.PARAMETER,
            destination=Destination.WEIGHT,
            tiles=count,
            columns=1,
            x=m.multipliers,
            x_stride=1,
            to=self._words,
            to_stride=m.panel_words // m.groups,
        )
        self._greatest_scales()

    @property
    def _words(self) -> int:
        return self.into.words + self.first * self.maker.panel_words

    def _multiply_bytes(self) -> None:
        m = self.maker
        m.builder.emit(
            MATRIX,
            depth=2 * m.rows,
            outer=self.panels * m.d // (2 * m.rows),
            a=m.pack,
            w=self._of(m.levels),
            w_outer=2 * m.rows,
        )

    def _drain_bytes(self) -> None:
        m = self.maker
        m.builder.emit(
            VECTOR,
            source=Source.ACCUMULATOR,
            destination=Destination.WEIGHT_TRANSPOSED,
            tiles=self._statistics,
            columns=GROUP // 2,
            to=self._words + 1,
            to_stride=m.panel_words // m.groups,
            to_group=m.rows,
        )

    def _greatest_scales(self) -> None:
        """A word of the mask is 1 in the lane of the row to which its key belongs, and takes the key's scale there."""
        m = self.maker
        m.builder.emit(
            VECTOR,
            source=Source.VECTOR,
            destination=Destination.NONE,
            mul1=FirstMultiply.COLUMN0,
            column0=self._of(m.key_scales),
            columns=self._key_panels * m.rows,
            x=m.mask,
            maximum=Maximum.ABSOLUTE,
            max_columns=POOL * m.rows,
            max_to=self.into.scales + self.first,
        )
