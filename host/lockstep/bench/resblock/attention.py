"""The schedule of the attention block: some heads at a time, their softmax behind other products.

    scores of these heads | most of the next heads' projections | values of these heads | the rest of the projections

While VECTOR turns scores into probabilities, the array works on the next heads' projections. Behind the last heads'
scores it works on the output projection, over the heads that are complete by then: the attention's result is quantised
in two parts, each in its own scales.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
from lockstep_isa.attention import score_factor
from lockstep_isa.instructions import Destination, FirstAdd, FirstMultiply, SecondMultiply

from lockstep.compiler.layout import panel_count
from lockstep.compiler.passes import RECIPROCAL, Softmax, rounding, scaling

from .builder import UINT8_SHARE, BlockBuilder
from .emitter import Chunk, early_pieces, pack
from .reference import Parameters

Step = Callable[[], None]


class _Words(NamedTuple):
    """PARAMETER words of a group of heads, one per head and row tile each; words named together are neighbours.

    Scales of q and k, then of v; ``c`` of the scores, ``peak`` their greatest exponents; ``most`` the greatest weighted
    exponentials and their sums behind them, ``inverse`` their reciprocals; ``scale`` of the probabilities.
    """

    q: int
    k: int
    v: int
    reciprocal: int
    c: int
    peak: int
    most: int
    inverse: int
    scale: int


class MultiHead(BlockBuilder):
    """x + W_o attention(W_q x, W_k x, W_v x), normalised and quantised."""

    def emit(self, parameters: Parameters) -> None:
        """The whole program."""
        e, sizes, d = self.e, self.sizes, self.sizes.head_dim
        # With one row tile, passes go over two heads in the place of row tiles.
        self.group = 2 if self.tiles == 1 and sizes.heads % 2 == 0 else 1
        self.count = count = self.group * self.tiles
        factors = np.concatenate([np.full(count, UINT8_SHARE), np.ones(count, np.float32)])
        load = self.constants(d, factors)
        chunks = [
            pack(self.config, self.image, layer.weight, layer.scales, layer.bias, d) for layer in parameters.inner
        ]
        first = early_pieces(self.config, parameters.inner[0].weight[:d])
        chunks[0][0] = replace(chunks[0][0], pieces=first)
        self._reserve()
        groups = range(sizes.heads // self.group)
        order = [[(name, group * self.group + h) for name in range(3) for h in range(self.group)] for group in groups]
        for group in groups:
            e.stream(chunks[name][head] for name, head in order[group])
        first_steps, rest = self.last_steps()

        steps = [[self._projection(name, head, load) for name, head in order[group]] for group in groups]
        # Where nothing else is left to do behind the last scores, the last projection of values is.
        late = [] if first_steps else [steps[-1].pop()]
        for step in steps[0]:
            step()
        for group in groups[:-1]:
            self._attend(group, [], steps[group + 1])
        self._attend(groups[-1], late, first_steps)
        for step in rest:
            step()
        e.settle()
        self.finish()

    def _reserve(self) -> None:
        """Memory of one group of heads, used by all groups, and of the attention's result."""
        e, sizes, count = self.e, self.sizes, self.count
        d, rows = sizes.head_dim, self.config.rows
        take = e.parameters.take
        heads = take(3 * count)
        self.words = _Words(
            *(heads, heads + count, heads + 2 * count),
            *(take(3 * count), take(count), take(count), take(2 * count), take(2 * count), take(count)),
        )
        self.values = [e.vectors.take(count * d) for _ in range(3)]
        self.exponentials = e.vectors.take(count * sizes.seq)
        self.mixed = [e.vectors.take(self.tiles * features) for features in sizes.parts]
        self.parts = [self.quantised_part(features) for features in sizes.parts]
        self.q8 = e.activations.take(count * d)
        self.probabilities = e.activations.take(count * sizes.seq)
        self.k8 = e.weights.take(count * d)
        self.v8 = e.weights.take(panel_count(d, rows) * count * rows)

    # --- Projections --------------------------------------------------------------------------------------------

    def _projection(self, name: int, head: int, load: Step) -> Step:
        """q (0), k (1) or v (2) of one head, as a step; behind the last head's k and v their int8 operands."""
        e, d, x = self.e, self.sizes.head_dim, self.places.x
        place = head % self.group

        def drain(chunk: Chunk, words: int, begun: int | None = None) -> None:
            fields = {"add1": FirstAdd.Y, "y": begun, "y_stride": d} if begun is not None else {}
            scales = (self.words.q, self.words.k, self.words.v)[name] + place * self.tiles
            e.drain(
                d,
                self.values[name] + place * self.tiles * d,
                d,
                **e.scaled(x, chunk, words),
                **e.scale_of(self.share, scales, False),
                **fields,
            )
            if place < self.group - 1:
                return
            if name == 1:
                self._queries_and_keys()
                if head == self.group - 1:
                    self.add_bias()

        if name == head == 0:
            return lambda: e.first_product(x, load, drain)
        return lambda: e.product(x, drain)

    def _round(self, name: int, destination: Destination, **fields: int) -> None:
        """q, k or v of all heads of the group as int8."""
        d = self.sizes.head_dim
        self.e.vector(
            **rounding(self.words.reciprocal + name * self.count, destination),
            tiles=self.count,
            columns=d,
            x=self.values[name],
            x_stride=d,
            **fields,
        )

    def _queries_and_keys(self) -> None:
        e, w, d = self.e, self.words, self.sizes.head_dim
        e.scalars(w.q, w.reciprocal, 2 * self.count, **RECIPROCAL)
        self._round(0, Destination.ACTIVATION, to=self.q8, to_stride=d)
        self._round(1, Destination.WEIGHT, to=self.k8, to_stride=d)
        e.scalars(w.q, w.c, self.count, **scaling(score_factor(None, d)))

    def _transpose_values(self) -> None:
        rows = self.config.rows
        e, w = self.e, self.words
        e.scalars(w.v, w.reciprocal + 2 * self.count, self.count, **RECIPROCAL)
        self._round(2, Destination.WEIGHT_TRANSPOSED, to=self.v8, to_stride=rows, to_group=self.count * rows)

    # --- Scores, probabilities, values --------------------------------------------------------------------------

    def _attend(self, group: int, late: list[Step], meanwhile: list[Step]) -> None:
        """The attention of one group of heads.

        late : the projection of the last head's values, if the scores are to come before it. meanwhile : products that
        need nothing of these heads.
        """
        e, last = self.e, self.group - 1
        if late:
            e.settle()
            e.step(self._scores, partial(self._softmax, range(last)))
            late[0]()
            e.settle()
            self._exponentials(last)
            self._probabilities()
        else:
            e.step(self._scores, self._softmax_at_once)
        # VECTOR takes longer from scores to probabilities than from mixed values to what follows.
        before = (2 * len(meanwhile) + 2) // 3
        for step in meanwhile[:before]:
            step()
        e.settle()
        e.step(self._mix, lambda: self._drain_mixed(group))
        for step in meanwhile[before:]:
            step()

    def _scores(self) -> None:
        d, tiles = self.sizes.head_dim, self.tiles
        for h in range(self.group):
            start = h * tiles * d
            self.e.matrix(depth=d, outer=tiles, inner=tiles, a=self.q8 + start, a_outer=d, w=self.k8 + start, w_inner=d)

    def _rows(self, head: int, heads: int = 1) -> Softmax:
        """The passes of some heads of the group."""
        keys = self.sizes.seq
        at = self.exponentials + head * self.tiles * keys
        return Softmax(at, keys, heads * self.tiles, {"columns": keys})

    def _softmax(self, ready: range) -> None:
        """Scores of the group out of the accumulators, and exponentials of the heads whose values are ``ready``."""
        w = self.words
        for h in range(self.group):
            first = h * self.tiles
            self.e.vector(**self._rows(h).scores(w.k + first, w.c + first, w.peak + first))
        for h in ready:
            self._exponentials(h)

    def _softmax_at_once(self) -> None:
        self._softmax(range(self.group))
        self._probabilities()

    def _exponentials(self, head: int) -> None:
        """Scores of one head to exponentials times value scales, with their sums and maxima."""
        w, first = self.words, head * self.tiles
        sums = w.most + self.count + first
        self.e.vector(**self._rows(head).exponentials(w.peak + first, sums, w.v + first, w.most + first))

    def _probabilities(self) -> None:
        """Exponentials of the group to uint8, and values to int8."""
        e, w = self.e, self.words
        # The reciprocals of both: of the maxima times 1 / 255, and of the sums as they are.
        shares = {"mul1": FirstMultiply.COLUMN0, "column0": self.factors}
        e.scalars(w.most, w.inverse, 2 * self.count, **shares, **RECIPROCAL)
        e.vector(**self._rows(0, self.group).probabilities(w.inverse, self.probabilities))
        self._transpose_values()
        e.scalars(w.most, w.scale, self.count, **scaling(UINT8_SHARE))

    def _mix(self) -> None:
        keys, rows, tiles = self.sizes.seq, self.config.rows, self.tiles
        for h in range(self.group):
            self.e.matrix(
                depth=keys,
                outer=tiles,
                inner=panel_count(self.sizes.head_dim, rows),
                a=self.probabilities + h * tiles * keys,
                a_outer=keys,
                w=self.v8 + h * tiles * rows,
                w_inner=self.count * rows,
                unsigned=1,
            )

    def _drain_mixed(self, group: int) -> None:
        """Into the heads' columns of their part; behind a part's last head its int8."""
        e, w, d = self.e, self.words, self.sizes.head_dim
        ends = np.cumsum(self.sizes.parts)
        for h in range(self.group):
            column = (group * self.group + h) * d
            part = int(np.searchsorted(ends, column, "right"))
            features = self.sizes.parts[part]
            offset = column - (int(ends[part]) - features)
            e.drain(
                d,
                self.mixed[part] + offset,
                features,
                mul1=FirstMultiply.LANE1,
                lane1=w.scale + h * self.tiles,
                mul2=SecondMultiply.LANE0,
                lane0=w.inverse + self.count + h * self.tiles,
                **e.scale_of(self.share, self.parts[part].scales, offset > 0),
            )
            if offset + d == features:
                self.quantise(self.mixed[part], features, self.parts[part], self.slices)
