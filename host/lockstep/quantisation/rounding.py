"""Rounding to the grid of a format: which scale, which multipliers, which integers.

The grid of int4 is ``w4 * k * scale`` with one scale per channel and a k in 1..18 per group. Scale and multipliers are
those with the least weighted squared error among a handful of scales and all multipliers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from lockstep_isa.weights import MAX_MULTIPLIER

from lockstep.quantisation.formats import Format, QuantisedWeight

#: Candidates for the scale of a channel, relative to the one with which its largest weight is not clipped.
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
#: Multipliers above this one have no room for -8.
_LAST_WITH_MINUS_8 = 15


def normal(scale: torch.Tensor) -> torch.Tensor:
    """``scale`` with 0 for what is too small to be a normal number."""
    return torch.where(scale >= torch.finfo(torch.float32).tiny, scale, torch.zeros_like(scale))


def short(scale: torch.Tensor) -> torch.Tensor:
    """``scale`` with 16 significant bits, so that its product with a multiplier is exact in fp32."""
    mantissa, exponent = torch.frexp(scale.float())
    return normal(torch.ldexp((mantissa * 2**16).round(), exponent - 16))


def to_int4(weight: torch.Tensor, step: torch.Tensor, multiplier: torch.Tensor) -> torch.Tensor:
    """The nearest legal w4 for weights, given ``step = multiplier * scale``; all broadcast."""
    lowest = torch.where(multiplier > _LAST_WITH_MINUS_8, -7.0, -8.0)
    return torch.minimum(torch.maximum((weight / step).round(), lowest), torch.tensor(7.0))


def best_multipliers(
    weight: torch.Tensor, scale: torch.Tensor, importance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(k, error) of each group: float32[...] both, for weight: float32[..., G], scale: float32[...].

    importance: float32[..., G] weighs the squared errors.
    """
    least = torch.full(weight.shape[:-1], torch.inf)
    chosen = torch.ones(weight.shape[:-1])
    for k in range(1, MAX_MULTIPLIER + 1):
        step = (scale * k).clamp(min=1e-38)[..., None]
        error = ((to_int4(weight, step, torch.tensor(float(k))) * step - weight) ** 2 * importance).sum(dim=-1)
        better = error < least
        least, chosen = torch.where(better, error, least), torch.where(better, float(k), chosen)
    return chosen, least


def fit_scale(
    weight: torch.Tensor, format: Format, importance: torch.Tensor, candidates: Sequence[torch.Tensor] | None = None
) -> torch.Tensor:
    """The scale of each channel, float32[N], for weight: float32[N, K]; importance: float32[K].

    For int4 it is the one of ``candidates``, float32[N] each, with the least error; ``SHRINKS`` gives them if not said.
    """
    largest = weight.abs().amax(dim=1)
    if format.group is None:
        return normal(largest / 127)
    if candidates is None:
        candidates = [short(largest * shrink / (7 * MAX_MULTIPLIER)) for shrink in SHRINKS]
    groups = weight.reshape(len(weight), -1, format.group)
    weighing = importance.reshape(1, -1, format.group)
    best, least = torch.zeros(len(weight)), torch.full((len(weight),), torch.inf)
    for scale in candidates:
        _, errors = best_multipliers(groups, scale[:, None].expand(groups.shape[:2]), weighing)
        error = errors.sum(dim=1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def rounded(weight: torch.Tensor, format: Format, scale: torch.Tensor, importance: torch.Tensor) -> QuantisedWeight:
    """weight: float32[N, K] on the grid of ``scale``: float32[N], with the best multipliers for int4.

    Zeros stay zeros; a channel whose scale is 0 becomes zeros.
    """
    alive = (scale > 0)[:, None]
    divisor = torch.where(alive, scale[:, None], 1.0)
    if format.group is None:
        values = torch.where(alive, (weight / divisor).round().clamp(-127, 127), 0.0)
        return QuantisedWeight(values.numpy().astype(np.int8), scale.numpy(), None, format.pattern)
    groups = weight.reshape(len(weight), -1, format.group)
    k, _ = best_multipliers(groups, divisor.expand(groups.shape[:2]), importance.reshape(1, -1, format.group))
    k = torch.where(alive, k, 1.0)
    values = torch.where(alive, to_int4(groups, (divisor * k)[..., None], k[..., None]).reshape(weight.shape), 0.0)
    return in_lowest_terms(values.numpy(), scale.numpy(), k.numpy(), format)


def in_lowest_terms(values: np.ndarray, scale: np.ndarray, k: np.ndarray, format: Format) -> QuantisedWeight:
    """An int4 weight whose multipliers have no common factor in any channel: then ``k * scale`` alone gives both back.

    values: float32[N, K], scale: float32[N], k: float32[N, K / G], all of them whole but the scale.
    """
    k = k.astype(np.int64)
    factor = np.gcd.reduce(k, axis=1)
    return QuantisedWeight(
        values.astype(np.int8),
        scale * factor.astype(np.float32),
        (k // factor[:, None]).astype(np.uint8),
        format.pattern,
    )
