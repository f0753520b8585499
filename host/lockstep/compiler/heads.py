"""Quantising values head by head, as attention wants them."""

from __future__ import annotations

from dataclasses import dataclass

from lockstep_isa.attention import score_factor
from lockstep_isa.instructions import Destination, Maximum, Source, selector

from lockstep.graph import Attention

from .lowering import Lowering
from .onchip import Panels, head_groups
from .passes import rounding, scaling


def varying(name: str, value: int, operand: int) -> dict[str, int]:
    """A field that is ``value``, or a run-time operand if there is one."""
    return {name: 0, selector(name): operand} if operand else {name: value}


def head_scales(low: Lowering, x: Panels, heads: int, steps: int = 127) -> tuple[int, int]:
    """PARAMETER words of scales, greatest magnitudes over ``steps``, and their inverses; one per head and row tile."""
    count, d = heads * x.tiles, x.features // heads
    scale, inverse = low.parameters.take(count), low.parameters.take(count)
    if x.head_maxima is not None:
        low.scale_and_inverse(x.head_maxima, count, steps, scale, inverse)
        return scale, inverse
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
    low.scale_and_inverse(inverse, count, steps, scale, inverse)
    return scale, inverse


def round_heads(
    low: Lowering, x: Panels, heads: int, inverse: int, destination: Destination, to: int, head_words: int
) -> None:
    """8-bit values of every head to ``to``, ``head_words`` words a head."""
    rows, d = low.config.rows, x.features // heads
    for group in head_groups(x, heads):
        transposed = destination == Destination.BYTES_TRANSPOSED
        words = rows if transposed else d
        fields = {"to_group": x.tiles * rows} if transposed else {}
        low.emit_pass(
            **rounding(inverse + group.first, destination),
            tiles=group.count,
            columns=d,
            x=group.start,
            x_stride=group.stride,
            to=to + group.first // x.tiles * head_words,
            to_stride=head_words if x.tiles == 1 else words,
            **fields,
        )


@dataclass(frozen=True)
class QuantisedQueries:
    """Queries as left operands: ACTIVATION words from ``start``, ``head_words`` a head; one PARAMETER word per head and
    row tile of their scales, and of the factors that turn their scores into exponents of 2.
    """

    start: int
    head_words: int
    scales: int
    factors: int

    def free(self, low: Lowering) -> None:
        """They are not needed any more."""
        low.activations.give(self.start)
        low.parameters.give(self.scales)
        low.parameters.give(self.factors)


def quantised_queries(low: Lowering, node: Attention, q: Panels) -> QuantisedQueries:
    """Queries, quantised head by head."""
    scale, inverse = head_scales(low, q, node.heads)
    words = q.tiles * node.head_dim
    start = low.activations.take(node.heads * words)
    round_heads(low, q, node.heads, inverse, Destination.ACTIVATION, start, words)
    low.parameters.give(inverse)
    count = node.heads * q.tiles
    factors = low.parameters.take(count)
    low.scalars(scale, factors, count, **scaling(score_factor(node.scale, node.head_dim)))
    return QuantisedQueries(start, words, scale, factors)
