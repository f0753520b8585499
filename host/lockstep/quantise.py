"""W8A8: from the float stage of a graph to the contract stage, with an optional pre-scale per input channel.

Weights become int8 with one scale per output channel, activations int8 with one scale per token at run time. A pre-
scale (SmoothQuant: Xiao et al., 2023, https://arxiv.org/abs/2211.10438) multiplies an activation's channels before it
is quantised and divides the weight's columns, which moves outliers to where there is room for them. ``fit_prescales``
finds it off line.

The maintained implementations do not fit: llm-compressor needs an older transformers, neural-compressor's automatic
alpha assumes static activation scales, and torchao smooths modules, not a graph; the search below is what the
contract's own error asks for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lockstep_isa.numerics import flush
from safetensors import SafetensorError
from safetensors.numpy import load_file

from lockstep.errors import PrescaleError
from lockstep.evaluate import run_float
from lockstep.graph import Add, Dense, Expert, Experts, Graph, Linear, Node, Quantise, Value, live, tensor_names
from lockstep.quantisation.formats import Format, QuantisedWeight

#: Migration strengths that ``fit_prescales`` tries at every quantise point, besides no pre-scale at all.
ALPHAS = tuple(step / 10 for step in range(1, 10))
#: Most calibration tokens that are kept for a quantise point.
CALIBRATION_ROWS = 2048

Prescales = Mapping[str, np.ndarray]
#: A weight float32[N, K] as it is after quantisation.
Rounded = Callable[[torch.Tensor], torch.Tensor]


def quantise_points(graph: Graph) -> dict[str, list[list[Dense]]]:
    """The places where activations are quantised, by name: for each, the products that share one ``Quantise``.

    A point is named after the first weight that reads it. A weight that serves in several layers makes one point with
    several groups of products, so that its int8 form stays shared.
    """
    groups: dict[Value, list[Dense]] = {}
    for node in graph.of(Dense):
        groups.setdefault(node.x, []).append(node)
    points: dict[str, list[list[Dense]]] = {}
    for products in groups.values():
        points.setdefault(products[0].weight, []).append(products)
    return points


def quantise_weight(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``int8[N, K]`` and ``float32[N]`` with ``weight ~ int8 * scale[:, None]``, for ``weight: float32[N, K]``.

    The scale is absmax / 127 and rounding is to nearest even; a channel of zeros, or too small to have a normal
    scale, gets scale 0.
    """
    scale = np.abs(weight).max(axis=1).astype(np.float32) / np.float32(127)
    scale = np.where(scale >= np.finfo(np.float32).tiny, scale, np.float32(0))
    divisor = np.where(scale > 0, scale, np.float32(1))[:, None]
    rounded = np.where(scale[:, None] > 0, np.rint(weight / divisor), 0)
    return np.clip(rounded, -127, 127).astype(np.int8), scale


def to_int8_and_back(weight: torch.Tensor) -> torch.Tensor:
    """What int8 makes of weight: float32[N, K]."""
    q, scale = quantise_weight(weight.numpy())
    return torch.from_numpy(q.astype(np.float32)) * torch.from_numpy(scale)[:, None]


def quantise(
    graph: Graph, prescales: Prescales | None = None, weights: Mapping[str, QuantisedWeight] | None = None
) -> Graph:
    """The contract stage of ``graph``: every ``Dense`` becomes a ``Linear`` on a ``Quantise`` that it shares with its
    siblings.

    Parameters
    ----------
    graph : float stage.
    prescales : ``float32[K]`` by name of the quantise point; points without one get none.
    weights : those that are quantised already, divided by the pre-scales, by their names in ``graph``; all others are
        rounded to the nearest int8.

    Raises
    ------
    PrescaleError
        if a pre-scale does not fit the graph.
    """
    chosen = dict(prescales or {})
    points = quantise_points(graph)
    _check(chosen, points, graph)
    tensors = {name: flush(array) if array.dtype == np.float32 else array for name, array in graph.tensors.items()}
    int8 = _Int8Weights(tensors, weights or {})
    point_of = {node.value: name for name, groups in points.items() for group in groups for node in group}
    nodes: list[Node] = []
    quantised: dict[Value, Value] = {}
    fresh = max(node.value for node in graph) + 1
    for node in graph:
        if isinstance(node, Experts):
            node = dataclasses.replace(node, experts=tuple(_expert(expert, int8) for expert in node.experts))
        if not isinstance(node, Dense):
            nodes.append(node)
            continue
        point = point_of[node.value]
        prescale = chosen.get(point)
        if node.x not in quantised:
            name = None if prescale is None else f"{point}.prescale"
            if name is not None:
                tensors[name] = np.asarray(prescale, np.float32)
            quantised[node.x] = fresh
            nodes.append(Quantise(fresh, node.x, name))
            fresh += 1
        nodes.append(_linear(node, quantised[node.x], prescale, point, int8))
    kept = live(nodes, graph.output)
    used = {name for node in kept for name in tensor_names(node)}
    return Graph(
        tuple(kept),
        graph.output,
        {name: tensors[name] for name in tensors if name in used},
        graph.max_tokens,
        graph.min_tokens,
        graph.source,
        {name: weight for name, weight in int8.stored.items() if name in used},
    )


def prescales_of(graph: Graph) -> dict[str, np.ndarray]:
    """The pre-scales of a graph of the contract stage, by quantise point."""
    names = {node.prescale for node in graph.of(Quantise) if node.prescale is not None}
    return {name.removesuffix(".prescale"): graph.tensors[name] for name in sorted(names)}


def without_prescales(graph: Graph, prescales: Prescales, weights: Mapping[str, QuantisedWeight]) -> Graph:
    """``graph`` (float stage), whose ``weights`` are as stored, with the pre-scales multiplied back into them."""
    tensors = dict(graph.tensors)
    for point, groups in quantise_points(graph).items():
        for name in {node.weight for group in groups for node in group} & weights.keys():
            if point in prescales:
                tensors[name] = graph.tensors[name] * prescales[point]
    return dataclasses.replace(graph, tensors=tensors)


@dataclasses.dataclass
class _Int8Weights:
    """The int8 forms of weights, made as they are asked for.

    Attributes
    ----------
    tensors : of the graph; int8 forms and their scales come in.
    given : weights that are quantised already, by their names in the float graph.
    stored : those of the int8 forms that came in fewer bits.
    """

    tensors: dict[str, np.ndarray]
    given: Mapping[str, QuantisedWeight]
    stored: dict[str, QuantisedWeight] = dataclasses.field(default_factory=dict)

    def add(self, name: str, weight: str, rows: tuple[int, int], prescale: np.ndarray | None = None) -> None:
        """Make the int8 form ``name``, and its scales ``name.scales``, of some rows of a weight, unless it is there."""
        if name in self.tensors:
            return
        if weight in self.given:
            part = self.given[weight].part(*rows)
            pair = part.w8, part.scale
            if part.format != Format():
                self.stored[name] = part
        else:
            values = self.tensors[weight][slice(*rows)]
            pair = quantise_weight(values if prescale is None else values / np.asarray(prescale, np.float32))
        self.tensors[name], self.tensors[f"{name}.scales"] = pair


def _linear(node: Dense, source: Value, prescale: Any, point: str, int8: _Int8Weights) -> Linear:
    tensors = int8.tensors
    start, stop = node.rows
    part = "" if (start, stop) == (0, len(tensors[node.weight])) else f"[{start}:{stop}]"
    name = f"{node.weight}{part}.int8" + ("" if prescale is None or point == node.weight else f" at {point}")
    int8.add(name, node.weight, (start, stop), prescale)
    bias = node.bias
    if bias is not None and part:
        bias = f"{node.bias}{part}"
        tensors[bias] = tensors[node.bias or ""][start:stop]
    return Linear(node.value, source, name, f"{name}.scales", bias)


def _expert(expert: Expert, int8: _Int8Weights) -> Expert:
    names = []
    for weight in (expert.gate, expert.up, expert.down):
        names.append(f"{weight}.int8")
        int8.add(names[-1], weight, (0, len(int8.tensors[weight])))
    gate, up, down = names
    return Expert(gate, up, down, tuple(f"{name}.scales" for name in names))


def _check(prescales: Mapping[str, np.ndarray], points: Mapping[str, Any], graph: Graph) -> None:
    for name, prescale in prescales.items():
        if name not in points:
            raise PrescaleError(
                f"the pre-scale {name!r} belongs to no product of this model; was it fitted for another model?"
            )
        width = graph.tensors[name].shape[1]
        if prescale.shape != (width,) or prescale.dtype != np.float32:
            raise PrescaleError(
                f"the pre-scale {name!r} is {prescale.dtype}{list(prescale.shape)}, not float32[{width}]"
            )
        if not (np.isfinite(prescale) & (prescale > 0)).all():
            raise PrescaleError(f"the pre-scale {name!r} has an entry that is not a positive number")


def load_prescales(path: Path) -> dict[str, np.ndarray]:
    """Pre-scales from a safetensors file; raises ``PrescaleError`` if there is none or it cannot be read."""
    if not path.is_file():
        raise PrescaleError(f"there is no pre-scale file {path}; fit one with: python -m lockstep.calibrate")
    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise PrescaleError(f"{path} is not a readable safetensors file ({error})") from None


def fit_prescales(
    graph: Graph, sequences: Iterable[Mapping[str, Any]], rounded: Rounded = to_int8_and_back, by_mean: bool = False
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Pre-scales for ``graph`` (float stage) from sample inputs, and the migration strength chosen at each point.

    At every quantise point each strength alpha in ``ALPHAS`` proposes pc = max|W|^(1 - alpha) / max|x|^alpha per
    input channel, or 1 / mean|x|^alpha where ``by_mean``; the one whose products, with weights ``rounded`` to their
    format, come closest to the float ones on the samples wins. No pre-scale is one of the candidates. The error of a
    token counts relative to the length of what it ends up in: the product itself, or the sum with a residual.
    """
    points = quantise_points(graph)
    names = {node.value: name for name, groups in points.items() for group in groups for node in group}
    sums = {value: node.value for node in graph.of(Add) for value in node.inputs if value in names}
    first = {group[0].value: names[group[0].value] for groups in points.values() for group in groups}
    samples: dict[str, list[np.ndarray]] = {name: [] for name in points}
    lengths: dict[str, list[np.ndarray]] = {name: [] for name in points}
    of_sum = {total: names[value] for value, total in sums.items()}

    def observe(node: Node, given: list[Any]) -> None:
        if node.value in first:
            samples[first[node.value]].append(given[0])
        if node.value in of_sum:
            lengths[of_sum[node.value]].append(((given[0] + given[1]) ** 2).sum(axis=1))

    for inputs in sequences:
        run_float(graph, inputs, observe)
    prescales: dict[str, np.ndarray] = {}
    chosen: dict[str, float] = {}
    for name, groups in points.items():
        weights = [torch.from_numpy(graph.tensors[node.weight][slice(*node.rows)]) for node in groups[0]]
        x, length = _thinned(samples[name], lengths[name])
        alpha, prescale = _fit(x, weights, length, rounded, by_mean)
        if prescale is not None and alpha is not None:
            prescales[name], chosen[name] = prescale, alpha
    return prescales, chosen


def _thinned(samples: list[np.ndarray], lengths: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """At most about ``CALIBRATION_ROWS`` of the sampled rows, and the squared lengths that belong to them if all are
    known.
    """
    rows = np.concatenate(samples)
    step = max(1, len(rows) // CALIBRATION_ROWS)
    length = np.concatenate(lengths) if lengths else np.empty(0, np.float32)
    thinned = torch.from_numpy(np.ascontiguousarray(rows[::step]))
    return thinned, torch.from_numpy(np.ascontiguousarray(length[::step])) if len(length) == len(rows) else None


def _fit(
    x: torch.Tensor, weights: list[torch.Tensor], length: torch.Tensor | None, rounded: Rounded, by_mean: bool
) -> tuple[float | None, np.ndarray | None]:
    size_x = (x.abs().mean(dim=0) if by_mean else x.abs().amax(dim=0)).clamp(min=1e-5)
    largest_w = torch.ones(()) if by_mean else torch.cat(weights).abs().amax(dim=0).clamp(min=1e-5)
    exact = [x @ weight.T for weight in weights]
    best: tuple[float | None, np.ndarray | None] = (None, None)
    least = _error(x, weights, exact, length, None, rounded)
    for alpha in ALPHAS:
        prescale = _shortened(largest_w ** (1 - alpha) / size_x**alpha)
        error = _error(x, weights, exact, length, prescale, rounded)
        if error < least:
            least, best = error, (alpha, prescale.numpy())
    return best


def _shortened(prescale: torch.Tensor) -> torch.Tensor:
    """A pre-scale around one, with eight significant bits: more would only make the file depend on the machine it was
    fitted on.
    """
    return (prescale / prescale.log().mean().exp()).to(torch.bfloat16).to(torch.float32)


def _error(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    exact: list[torch.Tensor],
    length: torch.Tensor | None,
    prescale: torch.Tensor | None,
    rounded: Rounded,
) -> float:
    """Squared error of the quantised products relative to ``length``, or to the exact products: mean over tokens, sum
    over weights.
    """
    scaled = x if prescale is None else x * prescale
    steps = scaled.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 127
    quantised = torch.round(scaled / steps) * steps
    total = 0.0
    for weight, wanted in zip(weights, exact, strict=True):
        got = quantised @ rounded(weight if prescale is None else weight / prescale).T
        size = (wanted**2).sum(dim=1) if length is None else length
        total += float((((got - wanted) ** 2).sum(dim=1) / size.clamp(min=1e-30)).mean())
    return total
