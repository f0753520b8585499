"""From what a checkpoint stores, integers with a step per group, to the forms of the contract.

An int4 checkpoint whose steps are whole multiples of one scale per channel, as this project writes them, means the
same here to the bit. Steps that are not get the nearest scale and multipliers, and values that int4 cannot hold (zero
points, groups that are not contiguous or of an odd size) become int8; the error is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from lockstep_isa.weights import GROUPS, MAX_MULTIPLIER, PATTERNS, Pattern, PatternError, WeightError, check_pattern

from lockstep.errors import QuantisedCheckpointError
from lockstep.quantisation.formats import Format, QuantisedWeight
from lockstep.quantisation.rounding import fit_scale, normal, rounded


@dataclass(frozen=True, eq=False)
class Stored:
    """A matrix as a checkpoint holds it: ``value = integers * step``.

    Attributes
    ----------
    integers : int16[N, K], zero points taken off.
    steps : float32[N, groups].
    bits : that each integer takes.
    group_of : int64[K], the group of each input where groups are not neighbours.
    sparse : whether the checkpoint says that the matrix is sparse, 2:4 or more.
    """

    integers: np.ndarray
    steps: np.ndarray
    bits: int
    group_of: np.ndarray | None = None
    sparse: bool = False

    def values(self) -> np.ndarray:
        """float32[N, K]."""
        if self.group_of is not None:
            return self.integers.astype(np.float32) * self.steps[:, self.group_of]
        return self.integers.astype(np.float32) * np.repeat(
            self.steps, self.integers.shape[1] // self.steps.shape[1], axis=1
        )


@dataclass(eq=False)
class StoredWeights:
    """The quantised matrices of a checkpoint, by the name of the weight.

    Attributes
    ----------
    weights : in the forms of the contract.
    errors : of those that had to be rounded again: the largest difference relative to the largest value of its channel.
    """

    weights: dict[str, QuantisedWeight] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, stored: Stored) -> None:
        """Take one in; raises ``QuantisedCheckpointError`` if it is not as sparse as the checkpoint says."""
        try:
            pattern = _pattern(stored.integers) if stored.sparse else None
            weight, exact = _in_contract(stored, pattern)
        except WeightError as error:
            raise QuantisedCheckpointError(f"the weight {name!r} cannot be used: {error}") from None
        self.weights[name] = weight
        if not exact:
            self.errors[name] = _largest_error(weight, stored.values())

    def add_values(self, name: str, values: np.ndarray, format: Format) -> None:
        """Take in a matrix float32[N, K] that another tool had quantised, rounded to ``format``."""
        self.weights[name] = _rounded(values, format)
        self.errors[name] = _largest_error(self.weights[name], values)


def _pattern(integers: np.ndarray) -> Pattern:
    tightest = PATTERNS[0]
    check_pattern(integers, tightest)
    for pattern in PATTERNS[1:]:
        try:
            check_pattern(integers, pattern)
            tightest = pattern
        except PatternError:
            continue
    return tightest


def _in_contract(stored: Stored, pattern: Pattern | None) -> tuple[QuantisedWeight, bool]:
    """The weight, and whether it is what was stored."""
    integers, steps = stored.integers, stored.steps
    length = integers.shape[1] // steps.shape[1]
    group = max((size for size in GROUPS if length % size == 0), default=0)
    neighbours = stored.group_of is None
    least, most = integers.min(initial=0), integers.max(initial=0)
    if not (stored.bits == 4 and group and neighbours and least >= -8 and most <= 7 and (steps >= 0).all()):
        if neighbours and steps.shape[1] == 1 and least >= -128 and most <= 127:
            return QuantisedWeight(integers.astype(np.int8), steps[:, 0], None, pattern), True
        return _rounded(stored.values(), Format(8, None, pattern)), False
    steps = np.repeat(steps, length // group, axis=1)
    scale, k = _whole_multiples(steps)
    low = (integers.reshape(len(k), -1, group) == -8).any(axis=2)
    exact = (k > 0).all(axis=1) & ~(low & (k > 15)).any(axis=1)
    if exact.all():
        return QuantisedWeight(integers.astype(np.int8), scale, k.astype(np.uint8), pattern), True
    again = _rounded(stored.values(), Format(4, group, pattern), steps)
    assert again.multipliers is not None
    return (
        QuantisedWeight(
            np.where(exact[:, None], integers, again.values).astype(np.int8),
            np.where(exact, scale, again.scale),
            np.where(exact[:, None], k, again.multipliers).astype(np.uint8),
            pattern,
        ),
        False,
    )


def _whole_multiples(steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(scale: float32[N], k: int64[N, groups]) with ``k * scale == steps`` to the bit; k is 0 where there is none.

    The largest such scale is taken. A step of 0 has k = 1: its values are zeros, whatever the scale.
    """
    positive = np.where(steps > 0, steps, np.inf)
    least = np.where(np.isfinite(positive.min(axis=1)), positive.min(axis=1), 0).astype(np.float32)
    scale, chosen = least.copy(), np.zeros(steps.shape, np.int64)
    for divisor in range(1, MAX_MULTIPLIER + 1):
        candidate = least / np.float32(divisor)
        k = np.rint(steps / np.where(candidate > 0, candidate, 1)[:, None])
        same = (k.astype(np.float32) * candidate[:, None] == steps).all(axis=1) & (k <= MAX_MULTIPLIER).all(axis=1)
        new = same & (chosen == 0).all(axis=1)
        scale[new], chosen[new] = candidate[new], np.maximum(k[new], 1)
    return scale, chosen


def _rounded(values: np.ndarray, format: Format, steps: np.ndarray | None = None) -> QuantisedWeight:
    weight, importance = torch.from_numpy(values), torch.ones(values.shape[1])
    candidates = None
    if steps is not None:
        largest = torch.from_numpy(np.abs(steps).max(axis=1))
        candidates = [normal(largest / k) for k in range(8, MAX_MULTIPLIER + 1)]
    return rounded(weight, format, fit_scale(weight, format, importance, candidates), importance)


def _largest_error(weight: QuantisedWeight, values: np.ndarray) -> float:
    largest = np.maximum(np.abs(values).max(axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return float((np.abs(weight.dequantised() - values) / largest).max(initial=0))
