"""From a loaded model and calibration text to quantised weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lockstep.calibrate import sentences
from lockstep.errors import WeightFormatError
from lockstep.graph import Graph
from lockstep.model import Model
from lockstep.quantisation.budget import Point, Sensitivity, average_bits, check_budget, choose_formats
from lockstep.quantisation.formats import Format, QuantisedWeight
from lockstep.quantisation.methods import METHODS, Method, nearest
from lockstep.quantisation.walk import Layer, layer_names, quantise_layers
from lockstep.quantise import Prescales, fit_prescales

#: Most tokens of a piece of calibration text for a language model.
WINDOW = 512

#: Hears the name of each layer when it is begun.
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """What to make of a model.

    Attributes
    ----------
    format : of the layers; with a budget, of those that are narrow.
    method : a name in ``METHODS``.
    bits : most bits a weight on average, where layers that int4 hurts most stay int8; none is ``format`` everywhere.
    """

    format: Format
    method: str
    bits: float | None = None

    def __post_init__(self) -> None:
        method = METHODS.get(self.method)
        if method is None:
            raise WeightFormatError(f"there is no method {self.method!r}; there are {', '.join(METHODS)}")
        if not (method.sparse if self.format.pattern else method.dense):
            fitting = [name for name, each in METHODS.items() if (each.sparse if self.format.pattern else each.dense)]
            kind = "with" if self.format.pattern else "without"
            raise WeightFormatError(
                f"the method {self.method} is not for weights {kind} sparsity; these are: {', '.join(fitting)}"
            )
        if self.bits is not None and self.format.bits != 4:
            raise WeightFormatError("a budget of bits chooses between int4 and int8; ask for int4 weights with it")
        if self.bits is not None:
            check_budget(self.bits, self.format)


@dataclass(frozen=True, eq=False)
class Quantised:
    """What came of a recipe.

    Attributes
    ----------
    weights : by the name of the weight in the float graph.
    prescales : float32[K] by quantise point; the weights are divided by them.
    losses : squared error of each layer's products on the calibration text, relative to the products.
    curve : with a budget, loss against size.
    """

    weights: dict[str, QuantisedWeight]
    prescales: Prescales
    losses: dict[str, float]
    curve: tuple[Point, ...] = ()

    @property
    def bits(self) -> float:
        """Stored bits a weight, on average over the layers."""
        sizes = {name: weight.values.size for name, weight in self.weights.items()}
        return average_bits({name: weight.format for name, weight in self.weights.items()}, sizes)


def calibration_inputs(model: Model, path: Path | None) -> list[dict[str, np.ndarray]]:
    """Inputs from the texts in ``path``, or those that come with the package.

    A language model reads the file as one text, in pieces of ``WINDOW`` tokens; any other model reads a text a line.
    Raises as :func:`lockstep.calibrate.sentences` does.
    """
    lines = sentences(path)
    text = "\n".join(lines) if path is None else path.read_text(encoding="utf-8")
    if not model.graph.causal:
        return [{model.input_name: ids} for ids in model.tokenize(lines)]
    ids = np.asarray(model.tokenizer(text, verbose=False)["input_ids"], np.int64)
    window = min(WINDOW, model.graph.max_tokens)
    pieces = [ids[start : start + window] for start in range(0, len(ids), window)]
    return [{model.input_name: piece} for piece in pieces if len(piece) >= model.graph.min_tokens]


def check_layers(graph: Graph, format: Format, names: Collection[str]) -> None:
    """Raise ``WeightFormatError`` unless each of the layers ``names`` can have ``format``."""
    for name in names:
        inputs = graph.tensors[name].shape[1]
        if not format.fits(inputs):
            parts = [str(format.group)] if format.group and inputs % format.group else []
            parts += [str(format.pattern[1])] if format.pattern and inputs % format.pattern[1] else []
            raise WeightFormatError(
                f"groups of {' and '.join(parts)} do not divide the {inputs} inputs of {name!r}; choose smaller groups "
                "or no sparsity"
            )


def quantise_model(
    model: Model,
    recipe: Recipe,
    inputs: Sequence[Mapping[str, Any]],
    prescales: Prescales,
    progress: Progress = lambda name: None,
    names: Collection[str] | None = None,
) -> Quantised:
    """``recipe`` applied to ``model`` (its float graph), with ``inputs`` of :func:`calibration_inputs`.

    ``prescales`` are those that the model comes with; a method that fits its own replaces them. ``names`` are the
    weights to quantise, all that can be if not given. Raises ``WeightFormatError`` if one does not fit the format.
    """
    graph, method = model.float_graph, METHODS[recipe.method]
    names = layer_names(graph) if names is None else names
    check_layers(graph, recipe.format, names)
    if method.prescale is not None:
        progress("pre-scales")
        prescales = _fitted(graph, inputs, recipe.format, method)
    formats = dict.fromkeys(names, recipe.format)
    curve: list[Point] = []
    if recipe.bits is not None:
        wide = Format(8, None, recipe.format.pattern)
        measured = sensitivities(graph, inputs, prescales, method, wide, recipe.format, names, progress)
        formats, curve = choose_formats(measured, wide, recipe.format, recipe.bits)
    losses: dict[str, float] = {}

    def choose(layer: Layer) -> QuantisedWeight:
        progress(layer.name)
        chosen = method.choose(layer, formats[layer.name])
        losses[layer.name] = layer.loss(chosen)
        return chosen

    weights = quantise_layers(graph, inputs, prescales, choose, names)
    return Quantised(weights, prescales, losses, tuple(curve))


def sensitivities(
    graph: Graph,
    inputs: Sequence[Mapping[str, Any]],
    prescales: Prescales,
    method: Method,
    wide: Format,
    narrow: Format,
    names: Collection[str],
    progress: Progress = lambda name: None,
) -> list[Sensitivity]:
    """What every layer loses in two formats, with the layers before it in the wide one."""
    found: list[Sensitivity] = []

    def choose(layer: Layer) -> QuantisedWeight:
        progress(layer.name)
        kept, tried = method.choose(layer, wide), method.choose(layer, narrow)
        found.append(Sensitivity(layer.name, layer.weight.numel(), layer.loss(kept), layer.loss(tried)))
        return kept

    quantise_layers(graph, inputs, prescales, choose, names)
    return found


def _fitted(graph: Graph, inputs: Sequence[Mapping[str, Any]], format: Format, method: Method) -> Prescales:
    def rounded(weight: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(nearest(weight, format).dequantised())

    return fit_prescales(graph, inputs, rounded, by_mean=method.prescale == "mean")[0]


def steps_of(recipe: Recipe, layers: int) -> int:
    """How often ``progress`` is called by :func:`quantise_model` for so many layers."""
    return layers * (1 if recipe.bits is None else 2) + (METHODS[recipe.method].prescale is not None)
