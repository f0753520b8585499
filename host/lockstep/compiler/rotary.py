"""Rotary position embeddings as passes, where heads stand in their panels.

Feature i of a head becomes ``x[i] cos + (-x[i + pairs]) sin``, feature i + pairs ``x[i + pairs] cos + x[i] sin``. Row
tiles meet a table in panels, an angle per token. A single token's angles are columns: they need no second VECTOR
operand, and half the cycles.
"""

from __future__ import annotations

from dataclasses import dataclass

from lockstep_isa.instructions import (
    Destination,
    FirstAdd,
    FirstMultiply,
    Maximum,
    SecondAdd,
    Source,
    Tap,
    ThirdMultiply,
)

from .lowering import Lowering
from .onchip import HeadGroup, Panels, head_groups
from .passes import scaling


@dataclass(frozen=True)
class PanelAngles:
    """Angles of row tiles: per tile ``pairs`` VECTOR words of cosines, then of sines."""

    start: int
    pairs: int


@dataclass(frozen=True)
class ColumnAngles:
    """Angles of one token as PARAMETER columns: cosines for both halves, sines, minus sines."""

    cosines: int
    sines: int
    minus_sines: int
    pairs: int


def rotary(low: Lowering, x: Panels, angles: PanelAngles | ColumnAngles, heads: int) -> None:
    """Rotate the first ``2 * pairs`` features of every head of ``x``; leaves the heads' maxima where it sees them."""
    pairs = angles.pairs
    turned = low.vectors.take(2 * pairs * (heads if x.tiles == 1 else x.tiles))
    whole = 2 * pairs * heads == x.features
    if whole:
        x.head_maxima = low.parameters.take(heads * x.tiles)
    for group in head_groups(x, heads):
        fields = {}
        if x.head_maxima is not None:
            fields = {"maximum": Maximum.ABSOLUTE, "max_to": x.head_maxima + group.first}
        if isinstance(angles, ColumnAngles):
            _by_columns(low, group, angles, turned, fields)
        else:
            _by_panels(low, group, angles, turned, x.tiles == 1, fields)
    low.vectors.give(turned)


def _pass(low: Lowering, group: HeadGroup, offset: int, to: int, to_stride: int, columns: int, **fields: int) -> None:
    low.emit_pass(
        source=Source.VECTOR,
        destination=Destination.VECTOR,
        tiles=group.count,
        columns=columns,
        x=group.start + offset,
        x_stride=group.stride,
        to=to,
        to_stride=to_stride,
        **fields,
    )


def _by_columns(low: Lowering, group: HeadGroup, angles: ColumnAngles, turned: int, fields: dict[str, int]) -> None:
    pairs, stride = angles.pairs, 2 * angles.pairs
    times = {"mul1": FirstMultiply.COLUMN0}
    _pass(low, group, pairs, turned, stride, pairs, column0=angles.minus_sines, **times)
    _pass(low, group, 0, turned + pairs, stride, pairs, column0=angles.sines, **times)
    joined = {"add2": SecondAdd.Y, "y": turned, "y_stride": stride}
    _pass(low, group, 0, group.start, group.stride, stride, column0=angles.cosines, **times, **joined, **fields)


def _by_panels(
    low: Lowering, group: HeadGroup, angles: PanelAngles, turned: int, one_tile: bool, fields: dict[str, int]
) -> None:
    pairs, stride = angles.pairs, 2 * angles.pairs
    times = {"mul3": ThirdMultiply.Y, "tap": Tap.AFTER, "y_stride": 0 if one_tile else stride}
    cosines, sines = times | {"y": angles.start}, times | {"y": angles.start + pairs}
    minus = scaling(-1.0)
    _pass(low, group, pairs, turned, stride, pairs, **sines, **minus)
    _pass(low, group, 0, turned + pairs, stride, pairs, **sines)
    _pass(low, group, 0, group.start, group.stride, pairs, **cosines)
    _pass(low, group, pairs, group.start + pairs, group.stride, pairs, **cosines)
    joined = {"add1": FirstAdd.Y, "y": turned, "y_stride": stride}
    _pass(low, group, 0, group.start, group.stride, stride, **joined, **fields)
