"""Attention as instructions: one head of one sequence at a time, its softmax behind the next head's projections.

Per head the vector unit takes about as long as the array takes for both products of that head. So the next head's
Q, K and V projections, which need nothing of this softmax, are put between its two products: the array works on them
while the vector unit turns scores into probabilities, and neither waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lockstep_isa.attention import score_factor
from lockstep_isa.instructions import (
    LOAD,
    MATRIX,
    Destination,
    FirstMultiply,
    Maximum,
    Memory,
    SecondAdd,
    SecondMultiply,
    Source,
)

from .image import Chunk, LinearImage
from .lowering import Lowering
from .onchip import Panels, QuantisedPanels, rows_of
from .passes import RECIPROCAL, Softmax, rounding, scaling


@dataclass(frozen=True)
class Sequence:
    """One sequence of a batch: its row tiles ``first`` .. ``first + tiles`` and its tokens."""

    first: int
    tiles: int
    tokens: int


@dataclass(frozen=True)
class Projection:
    """Where q, k or v comes from: a linear layer with one chunk per head, or a value that is there already."""

    quantised: QuantisedPanels | None
    linear: LinearImage | None
    value: Panels | None


@dataclass
class Part:
    """One head's q, k or v on its way: quantised rows, its chunks, and from the first drain on where values (VECTOR)
    and maxima (PARAMETER) are.
    """

    name: str
    rows: QuantisedPanels
    linear: LinearImage
    chunks: tuple[Chunk, ...]
    value: int = -1
    maxima: int = -1


@dataclass
class Head:
    """What one head of one sequence has on chip between its steps."""

    sequence: Sequence
    head: int
    q: QuantisedPanels | None = None
    c: int = 0
    k: int = 0
    sk: int = 0
    v: int = 0
    sv: int = 0


class AttentionLowering:
    """Emits the attention of a batch.

    Parameters
    ----------
    lowering : the program. q, k, v : projections. heads, head_dim, scale : as in the graph.
    into : float32[tiles * rows, heads * head_dim]; ``absmax`` as in :meth:`Lowering.linear`. kv_heads : heads of k and
    v. bias : byte address and features of panels [tokens, heads * keys] that are added to the exponents, or none; then
    there is one sequence.
    """

    def __init__(
        self,
        lowering: Lowering,
        q: Projection,
        k: Projection,
        v: Projection,
        heads: int,
        head_dim: int,
        scale: float,
        into: Panels,
        absmax: tuple[str | None] | None,
        kv_heads: int,
        bias: tuple[int, int] | None,
    ) -> None:
        self.low = lowering
        self.projections = (q, k, v)
        self.heads, self.head_dim, self.scale = heads, head_dim, scale
        self.kv_heads, self.bias = kv_heads, bias
        self.into = into
        # A pre-scale is read in words of `rows` columns, so heads must begin on them.
        aligned = absmax is not None and (absmax[0] is None or head_dim % lowering.config.rows == 0)
        self.absmax = absmax if aligned else None

    def emit(self, sequences: list[Sequence], ready: int) -> None:
        """All heads of all sequences; what makes row tiles from ``ready`` on is emitted here, beside products of those
        before.
        """
        heads = [Head(s, h) for s in sequences for h in range(self.heads)]
        self._begin(heads[0], ready)
        for n, head in enumerate(heads):
            blocks = self._query_blocks(head.sequence)
            for b, (first, tiles) in enumerate(blocks):
                self._scores(head, first, tiles)
                following = b == 0 and n + 1 < len(heads)
                drains = list(self._project(heads[n + 1])) if following else []
                mixture = self._softmax(head, first, tiles)
                for drain in drains:
                    drain()
                self._mix(head, first, tiles, *mixture)
            self._forget(head)
        if self.absmax is not None:
            self.low.drop_columns(self.absmax[0])

    def _kv(self, head: Head) -> tuple[int, int]:
        """The key head that a query head attends to, and how many there are."""
        return head.head // (self.heads // self.kv_heads), self.kv_heads

    def _query_blocks(self, s: Sequence) -> list[tuple[int, int]]:
        """Row tiles of queries whose scores fit the VECTOR memory together, beside the next head's projections."""
        room = self.low.vectors.largest - s.tiles * self.head_dim
        tiles = max(1, min(s.tiles, room // (s.tokens if self.bias is None else 2 * s.tokens)))
        return [(first, min(tiles, s.tiles - first)) for first in range(0, s.tiles, tiles)]

    # --- Projections -------------------------------------------------------------------------------------------

    def _begin(self, head: Head, ready: int) -> None:
        """The projections of the first head, those of the row tiles that are ready first."""
        low, tiles = self.low, head.sequence.tiles
        linear = all(projection.linear is not None for projection in self.projections)
        if not linear or not 0 < ready < tiles:
            low.catch_up()
            for step in self._project(head):
                step()
            return
        parts = [self._part(head, name) for name in "qkv"]
        for first, count in ((0, ready), (ready, tiles - ready)):
            words = [self._multiply(part, first, count) for part in parts]
            for n, part in enumerate(parts):
                low.catch_up(len(parts) - n)
                self._collect(part, words[n], first, count)
                if first:
                    self._convert(head, part)

    def _project(self, head: Head) -> Iterator:
        """Start the three products of a head now; yields what makes an operand of each, to be called in order."""
        low, s = self.low, head.sequence
        for name, projection in zip("qkv", self.projections, strict=True):
            if projection.linear is None:
                value = projection.value
                assert value is not None
                number = head.head if name == "q" else self._kv(head)[0]
                start = value.start + s.first * value.features + number * self.head_dim

                def convert(name: str = name, start: int = start, stride: int = value.features) -> None:
                    maxima = low.parameters.take(s.tiles)
                    low.emit_pass(
                        source=Source.VECTOR,
                        tiles=s.tiles,
                        columns=self.head_dim,
                        x=start,
                        x_stride=stride,
                        maximum=Maximum.ABSOLUTE,
                        max_to=maxima,
                    )
                    self._operand(head, name, start, stride, maxima)
                    low.parameters.give(maxima)

                yield convert
                continue
            part = self._part(head, name)
            words = self._multiply(part, 0, s.tiles)

            def drain(part: Part = part, words: list[tuple[int, int]] = words) -> None:
                self._collect(part, words, 0, s.tiles)
                self._convert(head, part)

            yield drain

    def _part(self, head: Head, name: str) -> Part:
        """A head's part of the projection to q, k or v."""
        projection, s = self.projections["qkv".index(name)], head.sequence
        quantised, linear = projection.quantised, projection.linear
        assert quantised is not None
        assert linear is not None
        number, count = (head.head, self.heads) if name == "q" else self._kv(head)
        per_head = len(linear.chunks) // count
        chunks = linear.chunks[number * per_head : (number + 1) * per_head]
        return Part(name, rows_of(quantised, s.first, s.tiles), linear, chunks)

    def _multiply(self, part: Part, first: int, tiles: int) -> list[tuple[int, int]]:
        """Start the products of some row tiles."""
        rows = rows_of(part.rows, first, tiles)
        return [self.low.product(rows, part.linear, chunk) for chunk in part.chunks]

    def _collect(self, part: Part, words: list[tuple[int, int]], first: int, tiles: int) -> None:
        """Drain the products of some row tiles."""
        low, d = self.low, self.head_dim
        if part.value < 0:
            part.value, part.maxima = low.vectors.take(part.rows.tiles * d), low.parameters.take(part.rows.tiles)
        for n, (chunk, where) in enumerate(zip(part.chunks, words, strict=True)):
            low.drain(
                rows_of(part.rows, first, tiles),
                part.linear,
                chunk,
                where,
                part.value + first * d + chunk.first - part.chunks[0].first,
                d,
                maximum=Maximum.ABSOLUTE,
                max_to=part.maxima + first,
                max_continue=int(n > 0),
            )

    def _convert(self, head: Head, part: Part) -> None:
        """Make an operand of the drained values."""
        self._operand(head, part.name, part.value, self.head_dim, part.maxima)
        self.low.parameters.give(part.maxima)
        self.low.vectors.give(part.value)

    def _operand(self, head: Head, name: str, start: int, stride: int, maxima: int) -> None:
        """Quantise one of q, k, v per row, into the memory and the layout in which the array wants it."""
        low, s, d = self.low, head.sequence, self.head_dim
        rows = low.config.rows
        scale, inverse = low.parameters.take(s.tiles), low.parameters.take(s.tiles)
        low.scale_and_inverse(maxima, s.tiles, 127, scale, inverse)
        fields: dict[str, int]
        if name == "q":
            head.q = QuantisedPanels(low.activations.take(s.tiles * d), d, s.tiles, scale)
            head.c = low.parameters.take(s.tiles)
            low.scalars(scale, head.c, s.tiles, **scaling(score_factor(self.scale, d)))
            destination = Destination.ACTIVATION
            fields = {"to": head.q.start, "to_stride": d}
        elif name == "k":
            head.k, head.sk = low.weights.take(s.tiles * d), scale
            destination = Destination.WEIGHT
            fields = {"to": head.k, "to_stride": d}
        else:
            groups = -(-d // rows)
            head.v, head.sv = low.weights.take(groups * s.tiles * rows), scale
            destination = Destination.WEIGHT_TRANSPOSED
            fields = {"to": head.v, "to_stride": rows, "to_group": s.tiles * rows}
        low.emit_pass(
            **rounding(inverse, destination),
            tiles=s.tiles,
            columns=d,
            x=start,
            x_stride=stride,
            **fields,
        )
        low.parameters.give(inverse)

    # --- Products and softmax ----------------------------------------------------------------------------------

    def _scores(self, head: Head, first: int, tiles: int) -> None:
        """Queries of some row tiles times all keys."""
        assert head.q is not None
        q = rows_of(head.q, first, tiles)
        self.low.builder.emit(
            MATRIX,
            depth=self.head_dim,
            outer=tiles,
            inner=head.sequence.tiles,
            a=q.start,
            a_outer=q.features,
            w=head.k,
            w_inner=q.features,
        )

    def _softmax(self, head: Head, first: int, tiles: int) -> tuple[int, int, int]:
        """Scores to uint8 probabilities: ACTIVATION words, and PARAMETER words of their scales and reciprocal sums."""
        low, keys = self.low, head.sequence.tokens
        weights = low.vectors.take(tiles * keys)
        softmax = Softmax(weights, keys, tiles, {"columns": keys})
        peak, total, most = (low.parameters.take(tiles) for _ in range(3))
        added: dict[str, int] = {}
        if self.bias is not None:
            address, features = self.bias
            word, start = low.config.vector_word_bytes, low.vectors.take(tiles * keys)
            low.builder.emit(
                LOAD,
                memory=Memory.VECTOR,
                rows=tiles,
                words=keys,
                **self._bias_of(head, address + first * features * word, keys * word),
                stride=features * word,
                local=start,
                local_stride=keys,
            )
            added = {"add2": SecondAdd.Y, "y": start, "y_stride": keys}
        low.emit_pass(**softmax.scores(head.sk, head.c + first, peak), **added)
        if added:
            low.vectors.give(added["y"])
        low.emit_pass(**softmax.exponentials(peak, total, head.sv, most))
        scale, inverse = low.parameters.take(tiles), low.parameters.take(tiles)
        low.scale_and_inverse(most, tiles, 255, scale, inverse)
        low.scalars(total, total, tiles, **RECIPROCAL)
        probabilities = low.activations.take(tiles * keys)
        low.emit_pass(**softmax.probabilities(inverse, probabilities))
        low.vectors.give(weights)
        for words in (peak, most, inverse):
            low.parameters.give(words)
        return probabilities, scale, total

    def _bias_of(self, head: Head, address: int, size: int) -> dict[str, int]:
        """Where the biases of a head begin, which take ``size`` bytes a row."""
        return {"address": address + head.head * size}

    def _forget(self, head: Head) -> None:
        """The head's operands are not needed any more."""
        low = self.low
        assert head.q is not None
        low.activations.give(head.q.start)
        for words in (head.k, head.v):
            low.weights.give(words)
        for words in (head.q.scales, head.c, head.sk, head.sv):
            low.parameters.give(words)

    def _mix(self, head: Head, first: int, tiles: int, probabilities: int, scale: int, total: int) -> None:
        """Probabilities times values, into the head's columns of the result."""
        low, s, d = self.low, head.sequence, self.head_dim
        rows = low.config.rows
        low.builder.emit(
            MATRIX,
            depth=s.tokens,
            outer=tiles,
            inner=-(-d // rows),
            a=probabilities,
            a_outer=s.tokens,
            w=head.v,
            w_inner=s.tiles * rows,
            unsigned=1,
        )
        fields = {} if self.absmax is None else self._maxima(head, self.absmax[0])
        if fields:
            fields["max_to"] += s.first + first
        low.emit_pass(
            source=Source.ACCUMULATOR,
            destination=Destination.VECTOR,
            mul1=FirstMultiply.LANE1,
            lane1=scale,
            mul2=SecondMultiply.LANE0,
            lane0=total,
            tiles=tiles,
            columns=d,
            **self._place(head, first),
            **fields,
        )
        low.activations.give(probabilities)
        low.parameters.give(scale)
        low.parameters.give(total)

    def _maxima(self, head: Head, prescale: str | None) -> dict[str, int]:
        """Fields that keep the maxima of a head's results, for row tile 0."""
        return self.low.absmax_fields(self.into, prescale, head.head * self.head_dim, head.head > 0)

    def _place(self, head: Head, first: int) -> dict[str, int]:
        """Fields that say where a head's results go, from row tile ``first`` of its sequence on."""
        row, features = head.sequence.first + first, self.into.features
        return {"to": self.into.start + row * features + head.head * self.head_dim, "to_stride": features}
