"""Norms as passes: statistics of the rows first, then one pass that applies them."""

from __future__ import annotations

import numpy as np
from lockstep_isa.instructions import (
    Destination,
    FirstAdd,
    FirstMultiply,
    Function,
    SecondAdd,
    SecondMultiply,
    Source,
)

from .lowering import SLOTS, Lowering, Panels, float_bits, head_groups


def layer_norm(
    low: Lowering,
    x: Panels,
    y: Panels | None,
    into: Panels,
    gamma: str,
    beta: str,
    eps: float,
    absmax: tuple[str | None] | None,
) -> None:
    """into = layer_norm(x + y), or of x alone; ``absmax`` names the pre-scale whose maxima to keep, in a tuple."""
    n, tiles = x.features, x.tiles
    mean, rstd = low.parameters.take(tiles), low.parameters.take(tiles)
    if y is not None:
        low.add(x, y, into, sum=1, sum_to=mean)
        x = into
    else:
        low.emit_pass(source=Source.VECTOR, tiles=tiles, columns=n, x=x.start, x_stride=n, sum=1, sum_to=mean)
    share = np.float32(1 / n)
    low.scalars(mean, mean, tiles, mul1=FirstMultiply.IMMEDIATE0, immediate0=float_bits(-share))
    low.emit_pass(
        source=Source.VECTOR,
        add1=FirstAdd.LANE0,
        lane0=mean,
        mul1=FirstMultiply.SELF,
        tiles=tiles,
        columns=n,
        x=x.start,
        x_stride=n,
        sum=1,
        sum_to=rstd,
    )
    low.scalars(
        rstd,
        rstd,
        tiles,
        mul1=FirstMultiply.IMMEDIATE0,
        immediate0=float_bits(share),
        add2=SecondAdd.IMMEDIATE1,
        immediate1=float_bits(eps),
        function=Function.RSQRT,
        table=SLOTS["rsqrt"],
    )
    fields = {} if absmax is None else low.absmax_fields(into, absmax[0], 0, False)
    low.elementwise(
        x,
        into,
        add1=FirstAdd.LANE0,
        lane0=mean,
        mul1=FirstMultiply.LANE1,
        lane1=rstd,
        mul2=SecondMultiply.COLUMN0,
        column0=low.load_columns(gamma),
        add2=SecondAdd.COLUMN1,
        column1=low.load_columns(beta),
        **fields,
    )
    for words in (mean, rstd):
        low.parameters.give(words)
    for name in (gamma, beta):
        low.drop_columns(name)
    if absmax is not None:
        low.drop_columns(absmax[0])


def rms_norm(
    low: Lowering,
    x: Panels,
    into: Panels,
    gamma: str,
    eps: float,
    groups: int,
    absmax: tuple[str | None] | None,
) -> None:
    """into = rms_norm(x), each of ``groups`` pieces of the features by itself; ``absmax`` as in :func:`layer_norm`."""
    n = x.features // groups
    rstd = low.parameters.take(x.tiles * groups)
    pieces = list(head_groups(x, groups))
    for piece in pieces:
        low.emit_pass(
            source=Source.VECTOR,
            mul1=FirstMultiply.SELF,
            tiles=piece.count,
            columns=n,
            x=piece.start,
            x_stride=piece.stride,
            sum=1,
            sum_to=rstd + piece.first,
        )
    low.scalars(
        rstd,
        rstd,
        x.tiles * groups,
        mul1=FirstMultiply.IMMEDIATE0,
        immediate0=float_bits(np.float32(1 / n)),
        add2=SecondAdd.IMMEDIATE1,
        immediate1=float_bits(eps),
        function=Function.RSQRT,
        table=SLOTS["rsqrt"],
    )
    for piece in pieces:
        # Maxima are those of whole rows: they ride along where a row is one piece.
        fields = {} if absmax is None or groups > 1 else low.absmax_fields(into, absmax[0], 0, False)
        low.emit_pass(
            source=Source.VECTOR,
            destination=Destination.VECTOR,
            mul1=FirstMultiply.LANE1,
            lane1=rstd + piece.first,
            mul2=SecondMultiply.COLUMN0,
            column0=low.load_columns(gamma),
            tiles=piece.count,
            columns=n,
            x=piece.start,
            x_stride=piece.stride,
            to=into.start + piece.start - x.start,
            to_stride=piece.stride,
            **fields,
        )
    low.parameters.give(rstd)
    low.drop_columns(gamma)
    if absmax is not None and groups == 1:
        low.drop_columns(absmax[0])
