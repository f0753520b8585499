"""The schedule of the feed-forward block.

The left operand of the last layer is quantised in two parts, each in its own scales. The products of the first part run
while VECTOR quantises the second one: the array does not wait. With one part they run over slices of it, behind the
first of which the array waits.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
from lockstep_isa.instructions import FirstAdd, Function

from .builder import BlockBuilder
from .emitter import CHUNK_COLUMNS, Chunk, early_pieces, pack
from .reference import Parameters


class FeedForward(BlockBuilder):
    """x + W_2 relu(W_1 x), normalised and quantised."""

    def emit(self, parameters: Parameters) -> None:
        """The whole program."""
        e, sizes, x = self.e, self.sizes, self.places.x
        (layer,) = parameters.inner
        load = self.constants(0, np.zeros(0, np.float32))
        first = pack(self.config, self.image, layer.weight, layer.scales, layer.bias)
        first[0] = replace(first[0], pieces=early_pieces(self.config, layer.weight[:CHUNK_COLUMNS]))
        e.stream(first)
        first_steps, rest = self.last_steps()
        wide = e.vectors.take(self.tiles * sizes.d_ff)
        parts = [self.quantised_part(features) for features in sizes.parts]
        ends = list(np.cumsum(sizes.parts))

        def drain(number: int, chunk: Chunk, words: int, begun: int | None = None) -> None:
            column = number * CHUNK_COLUMNS
            part = int(np.searchsorted(ends, column, "right"))
            begin = int(ends[part]) - sizes.parts[part]
            fields = {"add1": FirstAdd.Y, "y": begun, "y_stride": chunk.columns} if begun is not None else {}
            e.drain(
                chunk.columns,
                wide + column,
                sizes.d_ff,
                function=Function.RELU,
                **e.scaled(x, chunk, words),
                **e.scale_of(self.share, parts[part].scales, column > begin),
                **fields,
            )
            if number == 0:
                self.add_bias()
            if column + chunk.columns == ends[part]:
                self.quantise(wide + begin, sizes.d_ff, parts[part], self.slices)

        e.first_product(x, load, partial(drain, 0))
        for number in range(1, len(first)):
            e.product(x, partial(drain, number))
        for step in (*first_steps, *rest):
            step()
        e.settle()
        self.finish()
