"""What the schedules of both blocks have in common: constants, the last layer, residual, layer norm and quantisation.

Behind the last product nothing can overlap. What is left there is as little as the contract allows: the strided partial
sums of all columns but the last 64 are there already, and every scale comes with the maximum that it is made of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from lockstep_isa.config import CoreConfig
from lockstep_isa.instructions import (
    TABLE_ENTRIES,
    Destination,
    FirstAdd,
    FirstMultiply,
    Memory,
    SecondAdd,
    SecondMultiply,
    Source,
)
from lockstep_isa.numerics import F32, PARTIAL_SUMS
from lockstep_isa.program import Program

from lockstep.compiler.layout import column_words, panel_count, table_words
from lockstep.compiler.passes import RECIPROCAL, SLOTS, reciprocal_root, rounding, scaling

from .emitter import CHUNK_COLUMNS, Chunk, Emitter, Image, Operand, adds_exactly, pack
from .reference import EPSILON, Parameters, Sizes

#: A left operand that is one part is quantised in slices: columns of the first one, and of each over the one before.
SLICE_COLUMNS, SLICE_GROWTH = CHUNK_COLUMNS, 7
#: First column and columns of each slice.
Slices = tuple[tuple[int, int], ...]
#: Chunks of the last layer of which no product is formed before its left operand is complete.
KEPT_CHUNKS = 2
INT8_SHARE, UINT8_SHARE = np.float32(1 / 127), np.float32(1 / 255)
assert CHUNK_COLUMNS == PARTIAL_SUMS


@dataclass(frozen=True)
class Places:
    """Where a block's operands and results lie on chip.

    x : its int8 input. residual : VECTOR words of the same in float32; in the end they hold the result. result,
    result_scales : ACTIVATION and PARAMETER words of the int8 result and its scales. Row tiles have ``d_model`` words.
    """

    x: Operand
    residual: int
    result: int
    result_scales: int


class BlockBuilder:
    """What both blocks have in common: constants, the last layer, residual, layer norm and quantisation."""

    def __init__(self, config: CoreConfig, sizes: Sizes, parameters: Parameters, image: Image) -> None:
        self.config, self.sizes, self.image = config, sizes, image
        self.tiles = panel_count(sizes.seq, config.rows)
        self.e = e = Emitter(config, self.tiles)
        n, tiles = sizes.d_model, self.tiles
        self.places = Places(
            Operand(e.activations.take(tiles * n), n, e.parameters.take(tiles)),
            e.vectors.take(tiles * n),
            e.activations.take(tiles * n),
            e.parameters.take(tiles),
        )
        self._gamma, self._beta = parameters.gamma, parameters.beta
        self._last = parameters.last
        self._sums = e.parameters.take(tiles * PARTIAL_SUMS)
        self._parts: list[Operand] = []
        self.slices = self._early_slices()
        self._quantised: set[int] = set()  # first ACTIVATION words of what is quantised by now
        self.share = self.factors = 0

    @property
    def program(self) -> Program:
        """Everything emitted so far, as a program."""
        return self.e.builder.finish()

    # --- Constants ----------------------------------------------------------------------------------------------

    def constants(self, widest: int, factors: F32) -> Callable[[], None]:
        """Reserves words for constants; returns what loads them, with the function tables.

        widest : most columns of a pass that leaves scales. factors : one value per column, for :attr:`factors`.
        """
        e, rows = self.e, self.config.rows
        share = np.full((panel_count(max(widest, self.sizes.d_model), rows), rows), INT8_SHARE)
        blocks = [share, column_words(factors, rows)]
        blocks += [column_words(values, rows) for values in (self._last.bias, self._gamma, self._beta)]
        words = np.concatenate(blocks)
        local = e.parameters.take(len(words))
        ends = local + np.cumsum([len(block) for block in blocks])
        self.share, self.factors, self.bias, self.gamma, self.beta = (local, *map(int, ends[:-1]))
        constants = self.image.place(words)
        tables = {slot: self.image.place(table_words(name)) for name, slot in SLOTS.items()}

        def load() -> None:
            e.load(Memory.PARAMETER, len(words), constants, local)
            for slot, address in tables.items():
                e.load(Memory.TABLE, TABLE_ENTRIES, address, slot * TABLE_ENTRIES)

        return load

    def _early_slices(self) -> Slices:
        """Where the last layer's left operand is one part, the slices in which it is quantised.

        Products over a slice run while VECTOR quantises the next one, which may be longer. Empty where there are
        several parts, or where products over slices do not add up exactly.
        """
        if len(self.sizes.parts) > 1 or not adds_exactly(self._last.weight):
            return ()
        slices, first, size = [], 0, SLICE_COLUMNS
        while first < self.sizes.parts[0]:
            size = min(size, self.sizes.parts[0] - first)
            slices.append((first, size))
            first, size = first + size, size * SLICE_GROWTH
        return tuple(slices)

    # --- The last layer's left operand --------------------------------------------------------------------------

    def quantised_part(self, features: int) -> Operand:
        """Room for the next part of the last product's left operand; its scales are made by whoever fills it."""
        e = self.e
        part = Operand(e.activations.take(self.tiles * features), features, e.parameters.take(self.tiles))
        self._parts.append(part)
        return part

    def quantise(self, x: int, x_stride: int, into: Operand, slices: Slices = ()) -> None:
        """VECTOR words as int8, with the scales that are there; one pass for each of ``slices``, if there are any."""
        e = self.e
        inverse = e.parameters.take(self.tiles)
        e.scalars(into.scales, inverse, self.tiles, **RECIPROCAL)
        for first, features in slices or [(0, into.features)]:
            e.vector(
                **rounding(inverse, Destination.ACTIVATION),
                tiles=self.tiles,
                columns=features,
                x=x + first,
                x_stride=x_stride,
                to=into.start + first,
                to_stride=into.features,
            )
        e.parameters.give(inverse)
        self._quantised.add(into.start)

    # --- Residual, last product, layer norm ---------------------------------------------------------------------

    def add_bias(self) -> None:
        """residual += bias of the last layer, before there is a product to add."""
        n = self.sizes.d_model
        self.e.vector(
            source=Source.VECTOR,
            destination=Destination.VECTOR,
            add2=SecondAdd.COLUMN1,
            column1=self.bias,
            tiles=self.tiles,
            columns=n,
            x=self.places.residual,
            x_stride=n,
            to=self.places.residual,
            to_stride=n,
        )

    def last_steps(self) -> tuple[list[Callable[[], None]], list[Callable[[], None]]]:
        """Announces the last layer's chunks. Its products as steps: those to run while the last part of the left
        operand is made, and the others.

        With a short last part its products would follow each other faster than VECTOR drains them; so those of the
        last chunks are kept for the end, where they alternate.
        """
        parts, count = range(len(self.sizes.parts)), self._blocks
        if len(self.slices) > 1 and count > 1:
            return [], self._sliced_steps()
        early = max(count - KEPT_CHUNKS, (count + 1) // 2)
        first = [(part, number) for part in parts[:-1] for number in range(early)]
        rest = [(parts[-1], number) for number in range(early)]
        rest += [(part, number) for number in range(early, count) for part in parts]
        ends = np.cumsum(self.sizes.parts)
        chunks = [
            pack(self.config, self.image, self._last.weight[:, end - k : end], self._last.scales, None)
            for k, end in zip(self.sizes.parts, ends, strict=True)
        ]
        self.e.stream(chunks[part][number] for part, number in (*first, *rest))
        return [partial(self._last_product, *at) for at in first], [partial(self._last_product, *at) for at in rest]

    def _sliced_steps(self) -> list[Callable[[], None]]:
        """The last layer's products: over one slice after the other, but the last chunk's over all, for the end."""
        early, last = (self._blocks - 1) * CHUNK_COLUMNS, self._last
        begun = self.e.vectors.take(self.tiles * early)
        steps: list[Callable[[], None]] = []
        for n, (first, features) in enumerate(self.slices):
            weight = last.weight[:early, first : first + features]
            self.e.stream(pack(self.config, self.image, weight, last.scales[:early], None))
            steps += [partial(self._sliced_product, n, number, begun) for number in range(self._blocks - 1)]
        self.e.stream(pack(self.config, self.image, last.weight[early:], last.scales[early:], None))
        return [*steps, partial(self._last_product, 0, self._blocks - 1)]

    def _sliced_product(self, index: int, number: int, begun: int) -> None:
        """Chunk ``number`` over one slice, added to the products over the slices before, from ``begun`` on."""
        e, n = self.e, self.sizes.d_model
        self._await(0)
        first, _ = self.slices[index]
        x = replace(self._parts[0], start=self._parts[0].start + first)
        width = (self._blocks - 1) * CHUNK_COLUMNS
        at, column = begun + number * CHUNK_COLUMNS, number * CHUNK_COLUMNS

        def drain(chunk: Chunk, parameters: int) -> None:
            fields = {"add1": FirstAdd.Y, "y": at, "y_stride": width} if index else {}
            if index < len(self.slices) - 1:
                e.drain(chunk.columns, at, width, **fields)
                return
            e.drain(chunk.columns, at, width, **e.scaled(x, chunk, parameters), **fields)
            to = self.places.residual + column
            e.vector(
                source=Source.VECTOR,
                destination=Destination.VECTOR,
                add1=FirstAdd.Y,
                tiles=self.tiles,
                columns=chunk.columns,
                x=at,
                x_stride=width,
                y=to,
                y_stride=n,
                to=to,
                to_stride=n,
            )
            self._add_partials(number, to, chunk.columns)

        e.product(x, drain)

    def _await(self, part: int) -> None:
        """Emit what quantises a part, if that is still to come."""
        if self._parts[part].start not in self._quantised:
            self.e.settle()

    def _last_product(self, part: int, number: int) -> None:
        """Chunk ``number`` of the last layer over one part of its left operand, added to the residual."""
        e, n = self.e, self.sizes.d_model
        self._await(part)
        x = self._parts[part]
        at = self.places.residual + number * CHUNK_COLUMNS

        def drain(chunk: Chunk, parameters: int) -> None:
            fields = {"add2": SecondAdd.Y, "y": at, "y_stride": n}
            e.drain(chunk.columns, at, n, **e.scaled(x, chunk, parameters), **fields)
            if part == len(self.sizes.parts) - 1:
                self._add_partials(number, at, chunk.columns)

        e.product(x, drain)

    @property
    def _blocks(self) -> int:
        return panel_count(self.sizes.d_model, PARTIAL_SUMS)

    def _add_partials(self, block: int, x: int, columns: int) -> None:
        """The 64 partial sums of each row, over the blocks of 64 columns before the last one."""
        if block == self._blocks - 1:
            return
        to = {"destination": Destination.PARAMETER, "to": self._sums, "to_stride": PARTIAL_SUMS}
        where = {"tiles": self.tiles, "columns": columns}
        n = self.sizes.d_model
        if block == 0:
            self.e.vector(source=Source.VECTOR, x=x, x_stride=n, **where, **to)
            return
        sums = {"source": Source.PARAMETER, "x": self._sums, "x_stride": PARTIAL_SUMS}
        self.e.vector(**sums, add1=FirstAdd.Y, y=x, y_stride=n, **where, **to)

    def _mean(self, to: int) -> None:
        """PARAMETER words of minus the mean of each row."""
        e, n, last = self.e, self.sizes.d_model, self._blocks - 1
        columns = n - last * PARTIAL_SUMS
        x = self.places.residual + last * PARTIAL_SUMS
        share = scaling(-1 / n)
        # A power of two is exact wherever it is multiplied in, values near the least float32 excepted.
        early = n & (n - 1) == 0
        summed = {"sum": 1, "sum_to": to, "tiles": self.tiles, **(share if early else {})}
        sums = {"source": Source.PARAMETER, "x": self._sums, "x_stride": PARTIAL_SUMS}
        y = {"add1": FirstAdd.Y, "y": x, "y_stride": n}
        if not last:
            e.vector(source=Source.VECTOR, x=x, x_stride=n, columns=columns, **summed)
        elif columns == PARTIAL_SUMS:
            e.vector(**sums, **y, columns=columns, **summed)
        else:
            added = {"destination": Destination.PARAMETER, "to": self._sums, "to_stride": PARTIAL_SUMS}
            e.vector(**sums, **y, **added, columns=columns, tiles=self.tiles)
            e.vector(**sums, columns=PARTIAL_SUMS, **summed)
        if not early:
            e.scalars(to, to, self.tiles, **share)

    def finish(self) -> None:
        """Layer norm of what the last product left, in place, and its int8."""
        e, n, places = self.e, self.sizes.d_model, self.places
        mean, rstd = e.parameters.take(self.tiles), e.parameters.take(self.tiles)
        x = {"source": Source.VECTOR, "x": places.residual, "x_stride": n, "tiles": self.tiles, "columns": n}
        centred = {"add1": FirstAdd.LANE0, "lane0": mean}
        self._mean(mean)
        e.vector(**x, **centred, mul1=FirstMultiply.SELF, sum=1, sum_to=rstd)
        e.scalars(rstd, rstd, self.tiles, **reciprocal_root(n, EPSILON))
        e.vector(
            **x,
            **centred,
            mul1=FirstMultiply.LANE1,
            lane1=rstd,
            mul2=SecondMultiply.COLUMN0,
            column0=self.gamma,
            add2=SecondAdd.COLUMN1,
            column1=self.beta,
            destination=Destination.VECTOR,
            to=places.residual,
            to_stride=n,
            **e.scale_of(self.share, places.result_scales, False),
        )
        self.quantise(places.residual, n, Operand(places.result, n, places.result_scales))
