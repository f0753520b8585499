"""Rotary position embeddings as passes: rows of a table meet heads as they stand in their panels."""

from __future__ import annotations

from dataclasses import dataclass

from lockstep_isa.instructions import Destination, FirstAdd, FirstMultiply, Source, Tap, ThirdMultiply

from .lowering import Lowering, Panels, float_bits, head_groups


@dataclass(frozen=True)
class Angles:
    """Cosines and sines on chip: per row tile ``pairs`` VECTOR words of either, the sines behind the cosines."""

    start: int
    pairs: int


def rotary(low: Lowering, x: Panels, angles: Angles, heads: int) -> None:
    """Rotate the first ``2 * pairs`` features of every head of ``x`` where they stand.

    Feature i becomes ``x[i] cos + (-x[i + pairs]) sin``, feature i + pairs ``x[i + pairs] cos + x[i] sin``.
    """
    pairs = angles.pairs
    turned = low.vectors.take(2 * pairs * max(x.tiles, heads if x.tiles == 1 else 1))
    for group in head_groups(x, heads):
        cosines = {"y": angles.start, "y_stride": 0 if x.tiles == 1 else 2 * pairs}
        sines = cosines | {"y": angles.start + pairs}

        def times(source: int, to: int, to_stride: int, columns: int, group=group, **fields: int) -> None:
            low.emit_pass(
                source=Source.VECTOR,
                destination=Destination.VECTOR,
                mul3=ThirdMultiply.Y,
                tap=Tap.AFTER,
                tiles=group.count,
                columns=columns,
                x=source,
                x_stride=group.stride,
                to=to,
                to_stride=to_stride,
                **fields,
            )

        low_half, high_half = group.start, group.start + pairs
        minus = {"mul1": FirstMultiply.IMMEDIATE0, "immediate0": float_bits(-1.0)}
        times(high_half, turned, 2 * pairs, pairs, **sines, **minus)
        times(low_half, turned + pairs, 2 * pairs, pairs, **sines)
        times(low_half, low_half, group.stride, pairs, **cosines)
        times(high_half, high_half, group.stride, pairs, **cosines)
        low.emit_pass(
            source=Source.VECTOR,
            destination=Destination.VECTOR,
            add1=FirstAdd.Y,
            y=turned,
            y_stride=2 * pairs,
            tiles=group.count,
            columns=2 * pairs,
            x=group.start,
            x_stride=group.stride,
            to=group.start,
            to_stride=group.stride,
        )
    low.vectors.give(turned)
