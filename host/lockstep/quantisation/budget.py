"""Which layers stay int8 under a budget of bits: the loss of int4 by layer, and a greedy choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lockstep.errors import WeightFormatError
from lockstep.quantisation.formats import Format


@dataclass(frozen=True)
class Sensitivity:
    """What one layer loses: relative squared errors of its products in the two formats, and its weights."""

    name: str
    weights: int
    wide_loss: float
    narrow_loss: float


@dataclass(frozen=True)
class Point:
    """A choice on the way from all wide to all narrow: bits a weight, and the sum of the layers' losses.

    ``layer`` is the one that became narrow last; none at the beginning.
    """

    bits: float
    loss: float
    layer: str | None


def check_budget(bits: float, narrow: Format) -> None:
    """Raise ``WeightFormatError`` if ``narrow`` alone takes more than ``bits``."""
    if bits < narrow.bits_per_weight:
        raise WeightFormatError(f"a budget of {bits:g} bits a weight; {narrow} alone takes {narrow.bits_per_weight:g}")


def choose_formats(
    layers: Sequence[Sensitivity], wide: Format, narrow: Format, bits: float
) -> tuple[dict[str, Format], list[Point]]:
    """Formats by layer with at most ``bits`` a weight on average, and loss against size for every step to all narrow.

    Layers become narrow in the order of the loss that a saved byte costs. Raises ``WeightFormatError`` if even all
    narrow is more.
    """
    check_budget(bits, narrow)
    total = sum(layer.weights for layer in layers)
    stored = total * wide.bits_per_weight
    loss = sum(layer.wide_loss for layer in layers)
    formats = {layer.name: wide for layer in layers}
    points = [Point(stored / total, loss, None)]
    for layer in sorted(layers, key=lambda layer: (layer.narrow_loss - layer.wide_loss) / layer.weights):
        if points[-1].bits > bits:
            formats[layer.name] = narrow
        stored -= layer.weights * (wide.bits_per_weight - narrow.bits_per_weight)
        loss += layer.narrow_loss - layer.wide_loss
        points.append(Point(stored / total, loss, layer.name))
    return formats, points


def average_bits(formats: Mapping[str, Format], sizes: Mapping[str, int]) -> float:
    """Bits a weight over layers of ``sizes`` weights."""
    return sum(formats[name].bits_per_weight * sizes[name] for name in formats) / max(1, sum(sizes[n] for n in formats))
