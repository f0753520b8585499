"""GPTQ and SparseGPT: rounding column by column, with what is lost made good by the columns that follow.

For activations X and H = X^T X, the error of a rounded column changes the later columns so that X W^T changes least:
GPTQ (Frantar et al., 2022, https://arxiv.org/abs/2210.17323). Zeros of a pattern are errors like those of rounding:
SparseGPT (Frantar and Alistarh, 2023, https://arxiv.org/abs/2301.00774). Here the grid is the contract's: a
multiplier is chosen when the sweep comes to its group, for the columns as they are by then.
"""

from __future__ import annotations

import numpy as np
import torch

from lockstep.quantisation.formats import Format, QuantisedWeight
from lockstep.quantisation.rounding import best_multipliers, fit_scale, in_lowest_terms, to_int4

#: Added to the diagonal of H, relative to its mean.
DAMPING = 0.01


def sweep(weight: torch.Tensor, hessian: torch.Tensor, format: Format) -> QuantisedWeight:
    """weight: float32[N, K] in ``format``, for hessian: float64[K, K] of the activations that it multiplies."""
    channels, inputs = weight.shape
    inverse = _inverse_root(hessian)
    spread = inverse.diagonal()
    left = weight.clone()
    scale = fit_scale(weight, format, 1 / spread**2)
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
    values = torch.zeros_like(weight)
    multiplier = torch.ones(channels)
    multipliers: list[torch.Tensor] = []
    kept = torch.ones_like(weight, dtype=torch.bool)
    block = format.group or 32
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        here, local = left[:, start:stop], inverse[start:stop, start:stop]
        errors = torch.zeros_like(here)
        if format.group is not None:
            multiplier, _ = best_multipliers(here, scale, 1 / spread[start:stop] ** 2)
            multipliers.append(multiplier)
        for j in range(stop - start):
            if format.pattern is not None and (start + j) % format.pattern[1] == 0:
                n, m = format.pattern
                worth = here[:, j : j + m] ** 2 / spread[start + j : start + j + m] ** 2
                kept[:, start + j : start + j + m].scatter_(1, worth.argsort(dim=1)[:, : m - n], False)
            column = here[:, j]
            step = divisor * multiplier
            wide = format.group is None
            q = (column / step).round().clamp(-127, 127) if wide else to_int4(column, step, multiplier)
            q = torch.where(kept[:, start + j] & (scale > 0), q, 0.0)
            values[:, start + j] = q
            errors[:, j] = (column - q * step) / local[j, j]
            here[:, j:] -= errors[:, j : j + 1] * local[j, j:]
        left[:, stop:] -= errors @ inverse[start:stop, stop:]
    if multipliers:
        return in_lowest_terms(values.numpy(), scale.numpy(), torch.stack(multipliers, dim=1).numpy(), format)
    return QuantisedWeight(values.numpy().astype(np.int8), scale.numpy(), None, format.pattern)


def _inverse_root(hessian: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of the damped Hessian, float32[K, K]."""
    damped = hessian.clone()
    damped.diagonal().add_(DAMPING * hessian.diagonal().mean().clamp(min=1e-12))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()
