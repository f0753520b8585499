"""Norms as passes: statistics of the rows first, then one pass that applies them."""

from __future__ import annotations

from lockstep_isa.instructions import Destination, FirstAdd, FirstMultiply, SecondAdd, SecondMultiply, Source

from .lowering import Lowering, Step
from .onchip import Panels, head_groups
from .passes import reciprocal_root, scaling


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
    for step in layer_norm_steps(low, x, y, into, gamma, beta, eps, absmax):
        step()
    for name in (gamma, beta, *(absmax or ())):
        low.drop_columns(name)


def layer_norm_steps(
    low: Lowering,
    x: Panels,
    y: Panels | None,
    into: Panels,
    gamma: str,
    beta: str,
    eps: float,
    absmax: tuple[str | None] | None,
) -> list[Step]:
    """The passes of :func:`layer_norm`, one by one; column words stay loaded."""
    n, tiles = x.features, x.tiles
    summed = x if y is None else into
    # PARAMETER words of means and reciprocal deviations.
    words: list[int] = []

    def mean() -> None:
        words.extend((low.parameters.take(tiles), low.parameters.take(tiles)))
        if y is not None:
            low.add(x, y, into, sum=1, sum_to=words[0])
        else:
            low.emit_pass(source=Source.VECTOR, tiles=tiles, columns=n, x=x.start, x_stride=n, sum=1, sum_to=words[0])
        low.scalars(words[0], words[0], tiles, **scaling(-1 / n))

    def deviation() -> None:
        low.emit_pass(
            source=Source.VECTOR,
            add1=FirstAdd.LANE0,
            lane0=words[0],
            mul1=FirstMultiply.SELF,
            tiles=tiles,
            columns=n,
            x=summed.start,
            x_stride=n,
            sum=1,
            sum_to=words[1],
        )
        low.scalars(words[1], words[1], tiles, **reciprocal_root(n, eps))

    def apply() -> None:
        fields = {} if absmax is None else low.absmax_fields(into, absmax[0], 0, False)
        low.elementwise(
            summed,
            into,
            add1=FirstAdd.LANE0,
            lane0=words[0],
            mul1=FirstMultiply.LANE1,
            lane1=words[1],
            mul2=SecondMultiply.COLUMN0,
            column0=low.load_columns(gamma),
            add2=SecondAdd.COLUMN1,
            column1=low.load_columns(beta),
            **fields,
        )
        for word in words:
            low.parameters.give(word)

    return [mean, deviation, apply]


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
    low.scalars(rstd, rstd, x.tiles * groups, **reciprocal_root(n, eps))
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
