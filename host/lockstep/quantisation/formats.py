"""Formats of weights, and weights in them; see ``lockstep_isa.weights`` for what they mean."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from lockstep_isa.weights import GROUPS, PATTERNS, Pattern, check_group, check_pattern, expand

from lockstep.errors import WeightFormatError


@dataclass(frozen=True)
class Format:
    """How the weights of a layer are stored.

    Attributes
    ----------
    bits : 8, or 4 with a multiplier for each ``group`` inputs.
    group : inputs that share a multiplier; none for 8 bits.
    pattern : (N, M) where at most N of M inputs are not zero; none is dense.
    """

    bits: int = 8
    group: int | None = None
    pattern: Pattern | None = None

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or (self.bits == 4) != (self.group is not None):
            raise WeightFormatError(
                f"weights of {self.bits} bits in groups of {self.group}; int4 has groups, int8 none"
            )
        if self.group is not None and self.group not in GROUPS:
            raise WeightFormatError(f"a group of {self.group}; it may be {', '.join(map(str, GROUPS))}")
        if self.pattern is not None and self.pattern not in PATTERNS:
            raise WeightFormatError(f"a sparsity of {self.pattern[0]}:{self.pattern[1]}; it may be 2:4 or 1:4")

    def __str__(self) -> str:
        sparse = "" if self.pattern is None else f" {self.pattern[0]}:{self.pattern[1]}"
        return ("int8" if self.group is None else f"int4 g{self.group}") + sparse

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each weight of the dense matrix, multipliers and positions included, scales not."""
        n, m = self.pattern or (1, 1)
        position = 0 if self.pattern is None else 2
        return n / m * (self.bits + position) + (0 if self.group is None else 8 / self.group)

    def fits(self, inputs: int) -> bool:
        """Whether groups and patterns divide ``inputs``."""
        return inputs % (self.group or 1) == 0 and inputs % (1 if self.pattern is None else self.pattern[1]) == 0


@dataclass(frozen=True, eq=False)
class QuantisedWeight:
    """A weight in its format: ``value = w8 * scale``.

    Attributes
    ----------
    values : int8[N, K]; what is stored, w4 or w8.
    scale : float32[N].
    multipliers : uint8[N, K / G] for int4, else none.
    pattern : what the values keep to, if anything.

    Raises ``lockstep_isa.weights.WeightError`` for values that their format cannot hold.
    """

    values: np.ndarray
    scale: np.ndarray
    multipliers: np.ndarray | None = None
    pattern: Pattern | None = None

    def __post_init__(self) -> None:
        _ = self.w8
        if self.pattern is not None:
            check_pattern(self.values, self.pattern)
        if self.format.group is not None:
            check_group(self.values.shape[1], self.format.group)

    @cached_property
    def w8(self) -> np.ndarray:
        """int8[N, K], what the array of a core multiplies by."""
        return self.values if self.multipliers is None else expand(self.values, self.multipliers)

    @property
    def format(self) -> Format:
        """Bits, group and pattern."""
        if self.multipliers is None:
            return Format(8, None, self.pattern)
        return Format(4, self.values.shape[1] // self.multipliers.shape[1], self.pattern)

    def part(self, start: int, stop: int) -> QuantisedWeight:
        """The output channels ``start`` to ``stop``."""
        if (start, stop) == (0, len(self.values)):
            return self
        channels = slice(start, stop)
        multipliers = None if self.multipliers is None else self.multipliers[channels]
        return QuantisedWeight(self.values[channels], self.scale[channels], multipliers, self.pattern)

    def dequantised(self) -> np.ndarray:
        """float32[N, K]; dividing it by the scale and rounding gives w8 back."""
        return self.w8.astype(np.float32) * self.scale[:, None]
