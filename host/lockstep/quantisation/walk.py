"""Layer after layer through a model with calibration text: each weight is chosen for the activations that it will see.

The graph is walked once, all sequences together. What a layer reads was computed by the layers before it in their
quantised form, and is quantised per token as on a device, so that errors before it can be made good.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lockstep_hls import kernels

from lockstep.evaluate import check_inputs, run_float_node
from lockstep.graph import Dense, Graph, Input, Route, Value, tensor_names
from lockstep.quantisation.formats import QuantisedWeight
from lockstep.quantise import Prescales, quantise_points

#: Rows that are multiplied at a time; float32 sums of more lose digits of the Hessian.
_ROWS = 4096


@dataclass(frozen=True, eq=False)
class Layer:
    """A weight that is to be quantised, and what it multiplies.

    Attributes
    ----------
    name : of the weight in the graph.
    weight : float32[N, K], divided by the pre-scale if there is one.
    hessian : float64[K, K], sum of x^T x over the tokens of the calibration text.
    """

    name: str
    weight: torch.Tensor
    hessian: torch.Tensor

    def loss(self, chosen: QuantisedWeight) -> float:
        """Squared error of the products with ``chosen``, relative to the products."""
        difference = self.weight.double() - torch.from_numpy(chosen.dequantised()).double()
        return self._energy(difference) / max(self._energy(self.weight.double()), 1e-300)

    def _energy(self, weight: torch.Tensor) -> float:
        return float(((weight @ self.hessian) * weight).sum())


def layer_names(graph: Graph) -> list[str]:
    """The weights that can be quantised, in the order of their use: matrices that serve in products alone, at one
    point. Those that choose experts are left out.
    """
    routing = {node.logits for node in graph.of(Route)}
    elsewhere = {name for node in graph if not isinstance(node, Dense) for name in tensor_names(node)}
    points: dict[str, set[str]] = {}
    for point, groups in quantise_points(graph).items():
        for node in (node for group in groups for node in group):
            points.setdefault(node.weight, set()).add(point)
            if node.value in routing:
                elsewhere.add(node.weight)
    return [name for name, at in points.items() if name not in elsewhere and len(at) == 1]


def quantise_layers(
    graph: Graph,
    sequences: Sequence[Mapping[str, Any]],
    prescales: Prescales,
    choose: Callable[[Layer], QuantisedWeight],
    names: Collection[str] | None = None,
) -> dict[str, QuantisedWeight]:
    """What ``choose`` makes of every layer, by the name of its weight.

    Parameters
    ----------
    graph : float stage.
    sequences : calibration inputs, arrays by input name.
    prescales : float32[K] by name of the quantise point.
    names : the weights to quantise; all of :func:`layer_names` if not given. Others stay float.

    A weight that serves in several layers is chosen for the first.
    """
    wanted = set(layer_names(graph) if names is None else names)
    point_of = {node.value: p for p, groups in quantise_points(graph).items() for group in groups for node in group}
    last_use = {value: position for position, node in enumerate(graph) for value in node.inputs}
    runs = [check_inputs(graph, inputs) for inputs in sequences]
    values: list[dict[Value, Any]] = [{} for _ in runs]
    chosen: dict[str, QuantisedWeight] = {}
    floats: dict[str, np.ndarray] = {}
    source: Value = -1
    read: list[np.ndarray] = []
    hessian: torch.Tensor | None = None
    for position, node in enumerate(graph):
        if isinstance(node, Dense) and node.weight in wanted:
            prescale = prescales.get(point_of[node.value])
            if source != node.x:
                source, read, hessian = node.x, [_as_on_device(run[node.x], prescale) for run in values], None
            if node.weight not in chosen:
                if hessian is None:
                    hessian = _hessian(read)
                weight = graph.tensors[node.weight]
                scaled = weight if prescale is None else weight / prescale
                chosen[node.weight] = choose(Layer(node.weight, torch.from_numpy(scaled), hessian))
                floats[node.weight] = chosen[node.weight].dequantised()
            rows = slice(*node.rows)
            bias = 0 if node.bias is None else graph.tensors[node.bias][rows]
            for run, x in zip(values, read, strict=True):
                run[node.value] = x @ floats[node.weight][rows].T + bias
        else:
            for run, arrays in zip(values, runs, strict=True):
                if isinstance(node, Input):
                    run[node.value] = arrays[node.name]
                else:
                    run[node.value] = run_float_node(graph, node, [run[value] for value in node.inputs])
        for value in node.inputs:
            if last_use[value] == position and value != graph.output:
                for run in values:
                    run.pop(value, None)
    return chosen


def _as_on_device(x: np.ndarray, prescale: np.ndarray | None) -> np.ndarray:
    """x * prescale as the device quantises it per token: float32[tokens, K]."""
    q, scale = kernels.quantise_rows(x, prescale)
    return q * scale[:, None]


def _hessian(activations: Sequence[np.ndarray]) -> torch.Tensor:
    x = torch.from_numpy(np.concatenate(activations))
    return torch.stack([(part.T @ part).double() for part in x.split(_ROWS)]).sum(dim=0)
