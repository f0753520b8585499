"""Encoders whose tokens become fewer from layer to layer (cascade token pruning of SpAtten, Wang et al., 2021,
arXiv:2012.09852; of vision transformers, HeatViT, Dong et al., 2022, arXiv:2211.08110).

Behind an attention stay the tokens that have got most attention so far, and the first one, which stands for the text
or the image in models that have such a token. All that follows computes with those alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from lockstep_isa.attention import key_importance
from lockstep_isa.numerics import add
from lockstep_isa.quantisation import quantise_rows

from lockstep.errors import InputError, ModelError
from lockstep.graph import Attention, Constant, Fallback, Graph, Node, PositionBias, Rotary, Value

#: What stands behind a layer of attention: its number, counted from 1, and the share of its tokens that stay.
Schedule = Mapping[int, float]


@dataclass(frozen=True)
class TokenImportance(Node):
    """The attention that each token has got: from all queries of a layer, and in the layers before.

    q, k, v : of an attention. before : the importance of its tokens so far; none in the first layer that is counted.
    The value is ``float32[tokens, 1]``; heads, queries and layers are added in their order.
    """

    q: Value
    k: Value
    v: Value
    heads: int
    head_dim: int
    kv_heads: int
    scale: float
    before: Value | None = None

    @property
    def inputs(self) -> tuple[Value, ...]:
        return (self.q, self.k, self.v) if self.before is None else (self.q, self.k, self.v, self.before)

    def run(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, before: np.ndarray | None = None) -> np.ndarray:
        """The value."""
        (k8, sk), (_, sv) = (self._quantised(x) for x in (k, v))
        seen = np.ones((len(q), len(k)), np.bool_)
        total = np.zeros(len(k), np.float32) if before is None else before[:, 0]
        for row in key_importance(q, seen, k8, sk, sv, scale=self.scale):
            total = add(total, row)
        return total[:, None]

    def _quantised(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows, scales = quantise_rows(np.ascontiguousarray(x).reshape(-1, self.head_dim))
        return rows.reshape(x.shape), scales.reshape(len(x), self.kv_heads)


@dataclass(frozen=True)
class KeepTokens(Node):
    """The rows of ``x`` of the first token and of those of greatest importance, ``share`` of all, in their order. Of
    equal ones the first stay. Pure data movement.
    """

    x: Value
    importance: Value
    share: float

    @property
    def inputs(self) -> tuple[Value, ...]:
        return (self.x, self.importance)

    def run(self, x: np.ndarray, importance: np.ndarray) -> np.ndarray:
        """The value."""
        count = kept(len(x), self.share)
        order = np.argsort(-importance[1:, 0], kind="stable")[: count - 1] + 1
        return np.ascontiguousarray(x[np.sort(np.concatenate([[0], order]))])


def kept(tokens: int, share: float) -> int:
    """How many of ``tokens`` tokens stay."""
    return max(1, math.ceil(share * tokens))


def prune_tokens(graph: Graph, schedule: Schedule) -> Graph:
    """``graph`` with fewer tokens behind some of its layers.

    Raises :class:`InputError` for a schedule that makes no sense, :class:`ModelError` for a graph whose tokens cannot
    leave: one with a cache, with positions that later layers look at, or with values that go past a layer.
    """
    layers = graph.of(Attention)
    _check_schedule(schedule, len(layers))
    _check_graph(graph)
    nodes, fresh = list(graph.nodes), max(node.value for node in graph) + 1
    before: Value | None = None
    for number, share in sorted(schedule.items()):
        layer = layers[number - 1]
        at = _boundary(graph, nodes, layer, number)
        if fallback := next((node for node in nodes[at:] if isinstance(node, Fallback)), None):
            raise ModelError(
                f"{graph.source} runs {fallback.name} in PyTorch behind layer {number}, which must know of all tokens; "
                "its tokens cannot leave"
            )
        value, whole, importance, left = nodes[at].value, fresh, fresh + 1, fresh + 2
        fresh += 3
        own = TokenImportance(
            *(importance, layer.q, layer.k, layer.v),
            heads=layer.heads,
            head_dim=layer.head_dim,
            kv_heads=layer.kv_heads,
            scale=layer.scale,
            before=before,
        )
        nodes[at : at + 1] = [
            dataclasses.replace(nodes[at], value=whole),
            own,
            KeepTokens(value, whole, importance, share),
            KeepTokens(left, importance, importance, share),
        ]
        before = left
    # Nobody asks how important the last ones are.
    nodes = [node for node in nodes if not (isinstance(node, KeepTokens) and node.value == before)]
    return dataclasses.replace(graph, nodes=tuple(nodes))


def _boundary(graph: Graph, nodes: list[Node], layer: Attention, number: int) -> int:
    """Where tokens leave: the first node behind an attention whose value alone is read by all that follows. That is
    the sum with the residual, or the norm of that, so that the feed-forward layer has fewer tokens already.
    """
    start = next(n for n, node in enumerate(nodes) if node.value == layer.value)
    rows = {node.value for node in nodes if not _is_row(graph, node)}
    for at in range(start + 1, len(nodes)):
        made = {node.value for node in nodes[: at + 1]} & rows
        read = {value for node in nodes[at + 1 :] for value in node.inputs} | {graph.output}
        if made & read == {nodes[at].value} and nodes[at].value != graph.output:
            return at
    raise ModelError(
        f"{graph.source} has values that go past layer {number} of attention, so its tokens cannot leave there"
    )


def _is_row(graph: Graph, node: Node) -> bool:
    """Whether a node gives one row for all tokens."""
    return isinstance(node, Constant) and len(graph.tensors[node.tensor]) == 1


def _check_schedule(schedule: Schedule, layers: int) -> None:
    if not schedule:
        raise InputError("no layer is named behind which tokens leave; give LAYER:SHARE")
    for number, share in schedule.items():
        if not 1 <= number <= layers:
            raise InputError(f"there is no layer {number}; the model has layers 1 to {layers} of attention")
        if not 0 < share <= 1:
            raise InputError(f"a share of {share:g} of the tokens makes no sense; give one above 0, up to 1")


def _check_graph(graph: Graph) -> None:
    if any(node.causal for node in graph.of(Attention)):
        raise ModelError(f"{graph.source} is causal: its tokens leave the cache by an eviction policy, not by layers")
    if any(node.present is not None for node in graph.of(Attention)):
        raise ModelError(f"heads of {graph.source} leave already; let tokens leave first, or both at once")
    kinds: tuple[tuple[type[Node], str], ...] = (
        (PositionBias, "adds a bias on positions to its scores"),
        (Rotary, "rotates queries and keys by their positions"),
    )
    for kind, why in kinds:
        if graph.of(kind):
            raise ModelError(f"{graph.source} {why}, which must know of all tokens; its tokens cannot leave")


def schedule_of(entries: list[str]) -> dict[int, float]:
    """A schedule from ``LAYER:SHARE`` each; raises :class:`InputError`."""
    found: dict[int, float] = {}
    for entry in entries:
        text, _, share = entry.partition(":")
        try:
            layer, kept = int(text), float(share)
        except ValueError:
            raise InputError(f"'{entry}' is no LAYER:SHARE, such as 3:0.7") from None
        if layer in found:
            raise InputError(
                f"layer {layer} is given twice, with {found[layer]:g} and {kept:g}; give one share a layer"
            )
        found[layer] = kept
    return found
