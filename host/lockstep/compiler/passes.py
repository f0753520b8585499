"""Fields of VECTOR passes that several schedules emit: scales, reciprocals, roots, and the passes of a softmax."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from lockstep_isa.instructions import (
    Destination,
    FirstMultiply,
    Function,
    Maximum,
    SecondAdd,
    SecondMultiply,
    Source,
    Tap,
    ThirdMultiply,
)

#: Fields of an instruction by name.
Fields = dict[str, int]
#: Table slots: three functions that every program needs, and one for the activation at hand.
SLOTS = {"exp2": 0, "recip": 1, "rsqrt": 2}
ACTIVATION_SLOT = 3
#: Takes the reciprocal of every value.
RECIPROCAL: Fields = {"function": Function.RECIP, "table": SLOTS["recip"]}


def float_bits(value: float | np.floating[Any]) -> int:
    """The bit pattern of a float32 immediate."""
    return struct.unpack("<I", struct.pack("<f", np.float32(value)))[0]


def scaling(factor: float | np.floating[Any]) -> Fields:
    """Multiplies every value by a constant, rounded to float32."""
    return {"mul1": FirstMultiply.IMMEDIATE0, "immediate0": float_bits(factor)}


def reciprocal_root(count: int, eps: float | np.floating[Any]) -> Fields:
    """Turns sums of ``count`` squares into 1 / sqrt(mean + eps)."""
    return {
        **scaling(1 / count),
        "add2": SecondAdd.IMMEDIATE1,
        "immediate1": float_bits(eps),
        "function": Function.RSQRT,
        "table": SLOTS["rsqrt"],
    }


def rounding(inverse: int, destination: Destination) -> Fields:
    """VECTOR words to 8 bits: row tile t over its scales, whose reciprocals are in PARAMETER word ``inverse`` + t."""
    return {
        "source": Source.VECTOR,
        "destination": destination,
        "mul2": SecondMultiply.LANE0,
        "lane0": inverse,
    }


@dataclass(frozen=True)
class Softmax:
    """The passes that turn scores of row tiles into 8-bit probabilities, by way of VECTOR words.

    Words named below are PARAMETER words: one per row tile, but of ``key_scales`` and ``value_scales`` one per R keys.

    Attributes
    ----------
    at, stride, tiles : VECTOR words ``at + t * stride`` on for row tile t. columns : the field that says how many keys
    there are.
    """

    at: int
    stride: int
    tiles: int
    columns: Fields

    def scores(self, key_scales: int, factors: int, peaks: int) -> Fields:
        """Result tiles as scores; factors: of queries, peaks: takes the greatest exponent of each row."""
        return {
            "source": Source.ACCUMULATOR,
            "destination": Destination.VECTOR,
            "mul1": FirstMultiply.COLUMN0,
            "column0": key_scales,
            "mul2": SecondMultiply.LANE0,
            "lane0": factors,
            "function": Function.SCORE,
            "maximum": Maximum.EXPONENT,
            "max_to": peaks,
            **self._written,
        }

    def exponentials(self, peaks: int, sums: int, value_scales: int, maxima: int) -> Fields:
        """Scores as exponentials times the scales of their values; ``sums`` takes the exponentials' sum of each row,
        ``maxima`` the greatest product.
        """
        return {
            "source": Source.VECTOR,
            "destination": Destination.VECTOR,
            "function": Function.EXP2,
            "table": SLOTS["exp2"],
            "lane0": peaks,
            "sum": 1,
            "sum_to": sums,
            "mul3": ThirdMultiply.COLUMN2,
            "column2": value_scales,
            "tap": Tap.AFTER,
            "maximum": Maximum.ABSOLUTE,
            "max_to": maxima,
            **self._read,
            **self._written,
        }

    def probabilities(self, inverse: int, to: int) -> Fields:
        """The products as uint8 to ACTIVATION words ``to + t * stride`` on; ``inverse``: 255 over their maxima."""
        return rounding(inverse, Destination.ACTIVATION) | self._read | self._written | {"to": to}

    def over(self, inverse: int) -> Fields:
        """The products times a PARAMETER word a row tile, from ``inverse`` on, to VECTOR words that lie as they do."""
        written = self._written
        del written["to"]
        return {
            "source": Source.VECTOR,
            "destination": Destination.VECTOR,
            "mul2": SecondMultiply.LANE0,
            "lane0": inverse,
            **self._read,
            **written,
        }

    @property
    def _read(self) -> Fields:
        return {"x": self.at, "x_stride": self.stride}

    @property
    def _written(self) -> Fields:
        return {"tiles": self.tiles, "to": self.at, "to_stride": self.stride, **self.columns}
