"""Quantising values head by head, as attention wants them."""

from __future__ import annotations

from lockstep_isa.instructions import Destination, Maximum, Source, selector

from .lowering import Lowering
from .onchip import Panels, head_groups
from .passes import rounding


def varying(name: str, value: int, operand: int) -> dict[str, int]:
    """A field that is ``value``, or a run-time operand if there is one."""
    return {name: 0, selector(name): operand} if operand else {name: value}


def head_scales(low: Lowering, x: Panels, heads: int) -> tuple[int, int]:
    """PARAMETER words of scales and their inverses, one per head and row tile."""
    count, d = heads * x.tiles, x.features // heads
    scale, inverse = low.parameters.take(count), low.parameters.take(count)
    if x.head_maxima is not None:
        low.scale_and_inverse(x.head_maxima, count, 127, scale, inverse)
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
    low.scale_and_inverse(inverse, count, 127, scale, inverse)
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
