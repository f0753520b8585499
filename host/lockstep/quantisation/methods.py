"""The ways to choose quantised weights; the registry ``METHODS`` is the only place that lists them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from lockstep_isa.weights import Pattern

from lockstep.quantisation.formats import Format, QuantisedWeight
from lockstep.quantisation.rounding import fit_scale, rounded
from lockstep.quantisation.sweep import sweep
from lockstep.quantisation.walk import Layer

Choose = Callable[[Layer, Format], QuantisedWeight]


@dataclass(frozen=True)
class Method:
    """A way to choose weights.

    Attributes
    ----------
    choose : the weights of one layer.
    summary : what it does, for help and docs.
    dense, sparse : whether it serves formats without and with a pattern.
    prescale : how it fits a pre-scale of its own: "max" (SmoothQuant), "mean" (AWQ), or not at all.
    """

    choose: Choose
    summary: str
    dense: bool = True
    sparse: bool = False
    prescale: str | None = None


def nearest(
    weight: torch.Tensor, format: Format, importance: torch.Tensor | None = None, worth: torch.Tensor | None = None
) -> QuantisedWeight:
    """weight: float32[N, K] rounded to the nearest value of ``format``.

    Parameters
    ----------
    importance : float32[K] by which squared errors are weighed where a grid is fitted; all the same if not given.
    worth : float32[N, K]; a pattern keeps what is worth most. The magnitude if not given.
    """
    if format.pattern is not None:
        weight = weight * keep(weight.abs() if worth is None else worth, format.pattern)
    importance = torch.ones(weight.shape[1]) if importance is None else importance
    return rounded(weight, format, fit_scale(weight, format, importance), importance)


def keep(worth: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """float32[N, K] of ones and zeros: one for the n of each m that are worth most."""
    n, m = pattern
    groups = worth.reshape(len(worth), -1, m)
    kept = torch.zeros_like(groups)
    return kept.scatter_(2, groups.argsort(dim=2, descending=True, stable=True)[..., :n], 1.0).reshape(worth.shape)


def _rtn(layer: Layer, format: Format) -> QuantisedWeight:
    return nearest(layer.weight, format)


def _awq(layer: Layer, format: Format) -> QuantisedWeight:
    return nearest(layer.weight, format, _energy(layer))


def _wanda(layer: Layer, format: Format) -> QuantisedWeight:
    energy = _energy(layer)
    return nearest(layer.weight, format, energy, layer.weight.abs() * energy.sqrt())


def _sweep(layer: Layer, format: Format) -> QuantisedWeight:
    return sweep(layer.weight, layer.hessian, format)


def _energy(layer: Layer) -> torch.Tensor:
    """Mean square of each input, up to a factor: float32[K], never 0."""
    diagonal = layer.hessian.diagonal()
    return (diagonal / diagonal.mean().clamp(min=1e-300)).clamp(min=1e-6).float()


METHODS: dict[str, Method] = {
    "rtn": Method(_rtn, "round to nearest; zeros where weights are smallest", sparse=True),
    "smoothquant": Method(_rtn, "fit a pre-scale for the activations, then round to nearest", prescale="max"),
    # Lin et al., 2023, https://arxiv.org/abs/2306.00978
    "awq": Method(_awq, "fit a pre-scale that spares the weights of large activations, then round", prescale="mean"),
    "gptq": Method(_sweep, "column by column, later columns make errors good"),
    # Sun et al., 2023, https://arxiv.org/abs/2306.11695
    "wanda": Method(_wanda, "zeros where weight times activation is smallest", dense=False, sparse=True),
    "sparsegpt": Method(_sweep, "column by column, later columns make zeros and errors good", dense=False, sparse=True),
}
