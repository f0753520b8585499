"""Encoders whose heads become fewer from layer to layer (cascade head pruning of SpAtten, Wang et al., 2021,
arXiv:2012.09852).

Behind an attention stay the heads that have said most so far, in all layers that follow: a head that left does not come
back. Their queries, keys, values and probabilities are all that is computed; in the place of the others stands +0.
Which heads stay hangs on the sequence, how many does not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lockstep_isa.attention import head_importance
from lockstep_isa.numerics import add
from numpy.typing import NDArray

from lockstep.errors import InputError, ModelError
from lockstep.graph import Attention, Graph, Linear, Node, Value
from lockstep.pruning import TokenImportance

#: What stands behind a layer of attention: its number, counted from 1, and the share of the model's heads that stay.
HeadSchedule = Mapping[int, float]
#: Which heads are there.
Present = NDArray[np.bool_]

_ROLES = ("queries", "keys", "values")


@dataclass(frozen=True)
class HeadImportance(Node):
    """What each head has said: the magnitudes of its part of ``x``, the value of an attention, over all tokens.

    before : the importance of the heads so far; none in the first layer that is counted. The value is
    ``float32[heads]``: that so far, plus :func:`lockstep_isa.attention.head_importance` of x.
    """

    x: Value
    heads: int
    before: Value | None = None

    @property
    def inputs(self) -> tuple[Value, ...]:
        return (self.x,) if self.before is None else (self.x, self.before)

    def run(self, x: np.ndarray, before: np.ndarray | None = None) -> np.ndarray:
        """The value."""
        own = head_importance(x, self.heads)
        return own if before is None else add(before, own)


@dataclass(frozen=True)
class KeepHeads(Node):
    """Which heads stay: ``bool[heads]``, all heads of the ``kept_kv`` keys and values with the greatest importance.

    Heads that share keys and values stay or leave together, and their importance is added in their order; so none of
    it is computed for fewer heads than there might be. Of equal ones the first stay. among : which heads were there
    before, the value of another such node; none if all were.
    """

    importance: Value
    heads: int
    kv_heads: int
    kept_kv: int
    among: Value | None = None

    @property
    def inputs(self) -> tuple[Value, ...]:
        return (self.importance,) if self.among is None else (self.importance, self.among)

    @property
    def group(self) -> int:
        """Heads that share keys and values."""
        return self.heads // self.kv_heads

    @property
    def kept(self) -> int:
        """How many heads stay."""
        return self.kept_kv * self.group

    def run(self, importance: np.ndarray, among: Present | None = None) -> Present:
        """The value."""
        members = importance.reshape(self.kv_heads, self.group)
        total = members[:, 0]
        for member in members.T[1:]:
            total = add(total, member)
        order = np.argsort(-total, kind="stable")
        if among is not None:
            order = order[among[:: self.group][order]]
        stay = np.zeros(self.kv_heads, np.bool_)
        stay[order[: self.kept_kv]] = True
        return np.repeat(stay, self.group)


def attend_present(
    node: Attention, given: Sequence[Any], attend: Callable[[Attention, list[Any]], np.ndarray]
) -> np.ndarray:
    """The value of an attention of which only some heads are there, from what it reads; ``attend`` computes one of
    which all are.
    """
    *arrays, present = given
    kv_present = present[:: node.heads // node.kv_heads]
    part = dataclasses.replace(node, heads=int(present.sum()), kv_heads=int(kv_present.sum()), bias=None, present=None)

    def own(x: np.ndarray, which: Present) -> np.ndarray:
        return np.ascontiguousarray(x.reshape(len(x), -1, node.head_dim)[:, which].reshape(len(x), -1))

    read = [own(x, which) for x, which in zip(arrays[:3], (present, kv_present, kv_present), strict=True)]
    if node.bias is not None:
        part, read = dataclasses.replace(part, bias=node.bias), [*read, arrays[3][present]]
    return spread_heads(attend(part, read), present, node.head_dim)


def multiply_present(
    node: Linear, given: Sequence[Any], tensors: Mapping[str, np.ndarray], linear: Callable[..., np.ndarray]
) -> np.ndarray:
    """The value of a product of which only the columns of some heads are there, from what it reads; ``linear`` is the
    contract's.
    """
    (q, s), present = given
    weight, scales = tensors[node.weight], tensors[node.scales]
    which = present[:: len(present) * node.head_dim // len(weight)]
    own = np.repeat(which, node.head_dim)
    bias = None if node.bias is None else tensors[node.bias][own]
    return spread_heads(linear(q, s, weight[own], scales[own], bias), which, node.head_dim)


def spread_heads(x: np.ndarray, present: Present, head_dim: int) -> np.ndarray:
    """x: float32[tokens, heads that are there * head_dim] with +0 for those that are not."""
    result = np.zeros((len(x), len(present), head_dim), np.float32)
    result[:, present] = x.reshape(len(x), -1, head_dim)
    return result.reshape(len(x), -1)


def prune_heads(graph: Graph, schedule: HeadSchedule) -> Graph:
    """``graph`` with fewer heads behind some of its layers.

    Raises :class:`InputError` for a schedule that makes no sense, :class:`ModelError` for a graph whose heads cannot
    leave: one with a cache, with layers of other heads, or with queries, keys or values that are no plain products.
    """
    layers = graph.of(Attention)
    _check_schedule(schedule, len(layers))
    following = layers[min(schedule) :]
    _check_graph(graph, layers[min(schedule) - 1], following)
    producers = {value: layer for layer in following for value in (layer.q, layer.k, layer.v)}
    fresh = max(node.value for node in graph) + 1
    importance: Value | None = None
    present: Value | None = None
    nodes: list[Node] = []
    layer_number = 0
    for node in graph:
        if isinstance(node, Linear) and node.value in producers:
            layer = producers[node.value]
            if layers.index(layer) != layer_number or present is None:
                raise ModelError(
                    f"{graph.source} computes layer {layers.index(layer) + 1} of attention beside layer "
                    f"{layer_number + 1}, not behind it; its heads cannot leave"
                )
            node = dataclasses.replace(node, present=present, head_dim=layer.head_dim)
        if not isinstance(node, Attention):
            nodes.append(node)
            continue
        layer_number += 1
        nodes.append(dataclasses.replace(node, present=present))
        if layer_number in schedule:
            nodes.append(HeadImportance(fresh, node.value, node.heads, importance))
            kept = kept_heads(node.kv_heads, schedule[layer_number])
            nodes.append(KeepHeads(fresh + 1, fresh, node.heads, node.kv_heads, kept, present))
            importance, present, fresh = fresh, fresh + 1, fresh + 2
    return dataclasses.replace(graph, nodes=tuple(nodes))


def kept_heads(heads: int, share: float) -> int:
    """How many of ``heads`` heads, or of as many keys and values that heads share, stay."""
    return max(1, math.ceil(share * heads))


def _check_schedule(schedule: HeadSchedule, layers: int) -> None:
    if not schedule:
        raise InputError("no layer is named behind which heads leave; give LAYER:SHARE")
    before = 1.0
    for number, share in sorted(schedule.items()):
        if not 1 <= number <= layers:
            raise InputError(f"there is no layer {number}; the model has layers 1 to {layers} of attention")
        if number == layers:
            raise InputError(f"behind layer {number}, the last one, no heads are left to leave; name an earlier one")
        if not 0 < share <= 1:
            raise InputError(f"a share of {share:g} of the heads makes no sense; give one above 0, up to 1")
        if share > before:
            raise InputError(
                f"behind layer {number} {share:g} of all heads would stay, more than the {before:g} before it; a head "
                "that left does not come back, so give shares that do not grow"
            )
        before = share


def _check_graph(graph: Graph, first: Attention, following: list[Attention]) -> None:
    if any(node.causal for node in graph.of(Attention)):
        raise ModelError(f"{graph.source} is causal: heads leave encoders and vision transformers only")
    if any(node.present is not None for node in graph.of(Attention)):
        raise ModelError(f"heads of {graph.source} leave already; name all layers in one schedule")
    made = {node.value: node for node in graph}
    readers: dict[Value, list[Node]] = {}
    for node in graph:
        for value in node.inputs:
            readers.setdefault(value, []).append(node)
    numbers = {node.value: n for n, node in enumerate(graph.of(Attention), 1)}
    for layer in following:
        number = numbers[layer.value]
        if (layer.heads, layer.kv_heads) != (first.heads, first.kv_heads):
            raise ModelError(
                f"layer {number} of {graph.source} has {layer.heads} heads and {layer.kv_heads} keys and values, layer "
                f"{numbers[first.value]} has {first.heads} and {first.kv_heads}; they are not the same heads"
            )
        for role, value in zip(_ROLES, (layer.q, layer.k, layer.v), strict=True):
            product, heads = made[value], layer.heads if role == "queries" else layer.kv_heads
            if not isinstance(product, Linear) or len(graph.tensors[product.weight]) != heads * layer.head_dim:
                raise ModelError(
                    f"the {role} of layer {number} of {graph.source} come from {type(product).__name__}, not from a "
                    "product with a column for each of their features; its heads cannot leave"
                )
            others = [node for node in readers[value] if node is not layer and not isinstance(node, TokenImportance)]
            if others or (layer.q, layer.k, layer.v).count(value) > 1 or value == graph.output:
                raise ModelError(
                    f"the {role} of layer {number} of {graph.source} are read by others too, which must know of all "
                    "heads; its heads cannot leave"
                )
