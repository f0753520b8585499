"""Weights in every format without a search for the best ones: for measurements, and for tests."""

from __future__ import annotations

import numpy as np
from lockstep_isa.weights import MAX_MULTIPLIER, PER_INDEX_WORD, Pattern

from lockstep.quantisation.formats import Format, QuantisedWeight
from lockstep.quantise import quantise_weight

from .measure import BenchError

#: Dense int8, the format of products unless another one is asked for.
INT8 = Format()
#: What ``--weights`` and ``--sparsity`` may be, and what they mean.
WEIGHTS: dict[str, tuple[int, int | None]] = {
    "int8": (8, None),
    "int4": (4, 32),
    "int4-g64": (4, 64),
    "int4-g128": (4, 128),
}
SPARSITY: dict[str, Pattern | None] = {"none": None, "2:4": (2, 4), "1:4": (1, 4)}


def format_of(weights: str, sparsity: str) -> Format:
    """The format that ``--weights`` and ``--sparsity`` ask for; raises :class:`BenchError` for what is none."""
    if weights not in WEIGHTS:
        raise BenchError(f"weights '{weights}' are none of {', '.join(WEIGHTS)}")
    if sparsity not in SPARSITY:
        raise BenchError(f"a sparsity '{sparsity}' is none of {', '.join(SPARSITY)}")
    return Format(*WEIGHTS[weights], SPARSITY[sparsity])


def depth_unit(format: Format) -> int:
    """What K must be a multiple of for whole groups and index words of ``format``."""
    if format.group is not None or format.pattern is None:
        return format.group or 1
    return format.pattern[1] * PER_INDEX_WORD // format.pattern[0]


def names_of(format: Format) -> dict[str, str]:
    """What a measurement says of a format, as the options have it; nothing of dense int8."""
    if format == INT8:
        return {}
    weights = next(name for name, meaning in WEIGHTS.items() if meaning == (format.bits, format.group))
    return {"weights": weights, "sparsity": next(name for name, found in SPARSITY.items() if found == format.pattern)}


def in_format(weight: np.ndarray, format: Format) -> QuantisedWeight:
    """weight: float32[N, K] to the nearest of ``format``, the smallest of each four taken away where it is sparse.

    Raises ``lockstep_isa.weights.WeightError`` where groups do not divide K.
    """
    if format.pattern is not None:
        weight = _sparse(weight, format.pattern)
    if format.group is None:
        return QuantisedWeight(*quantise_weight(weight), None, format.pattern)
    groups = weight.reshape(len(weight), -1, format.group)
    largest = np.abs(groups).max(axis=2)
    scale = (largest.max(axis=1) / np.float32(7 * MAX_MULTIPLIER)).astype(np.float32)
    step = np.maximum(scale, np.finfo(np.float32).tiny)[:, None]
    k = np.clip(np.ceil(largest / (7 * step)), 1, MAX_MULTIPLIER)
    values = np.clip(np.rint(groups / (step * k)[:, :, None]), -7, 7)
    return QuantisedWeight(values.reshape(weight.shape).astype(np.int8), scale, k.astype(np.uint8), format.pattern)


def random_integers(n: int, k: int, format: Format, rng: np.random.Generator) -> QuantisedWeight:
    """int8[N, K] of all values that ``format`` has, at scales about 1 / 1000."""
    scale = rng.uniform(0.5e-3, 2e-3, n).astype(np.float32)
    multipliers = None
    if format.group is None:
        values = rng.integers(-128, 128, (n, k), np.int8)
    else:
        multipliers = rng.integers(1, MAX_MULTIPLIER + 1, (n, k // format.group), np.uint8)
        values = rng.integers(-8, 8, (n, k), np.int8)
        values = np.maximum(values, np.where(np.repeat(multipliers, format.group, axis=1) > 15, -7, -8)).astype(np.int8)
    if format.pattern is not None:
        values = np.where(_sparse(rng.random((n, k), np.float32), format.pattern) != 0, values, 0).astype(np.int8)
    return QuantisedWeight(values, scale, multipliers, format.pattern)


def _sparse(weight: np.ndarray, pattern: Pattern) -> np.ndarray:
    """The ``n`` largest of each ``m`` inputs, the rest zeros."""
    n, m = pattern
    fours = weight.reshape(len(weight), -1, m)
    order = np.argsort(np.abs(fours), axis=2)
    kept = fours.copy()
    np.put_along_axis(kept, order[..., : m - n], 0, axis=2)
    return kept.reshape(weight.shape)
