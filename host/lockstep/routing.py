"""Mixtures of experts (Shazeer et al., 2017, https://arxiv.org/abs/1701.06538), found by how tokens are routed.

What is looked for is the sum over the chosen experts of weighted gated feed-forward layers, with the weights of the
experts in one tensor each from which those of every token's experts are picked. ``lockstep.capture`` asks models of
transformers to be captured in this form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lockstep.fragment import View, extent, operation_name, same
from lockstep.graph import Expert, Experts, Route
from lockstep.patterns import behind, written_out_gelu
from lockstep.recogniser import Recogniser, Unrecognised, rule

_FUNCTIONS = {"silu": "silu", "relu": "relu", "sigmoid": "sigmoid"}
_SHAPING = ("view", "reshape", "_unsafe_view", "unsqueeze", "squeeze")

_NO_MIXTURE = "the contract has no sum outside a mixture of experts"


@dataclass(frozen=True)
class _Chosen:
    """What a router decides: node of the scores, of the ids and of the weights of the experts of a token."""

    logits: fx.Node
    ids: fx.Node
    top_k: int
    normalise: bool


@rule("sum")
def mixture(state: Recogniser, node: fx.Node, given: dict[str, Any]) -> View:
    parts = _plain(given["self"])
    weighted = parts
    if (
        given["dim"] not in ([1], [-2])
        or given.get("keepdim")
        or given["self"].meta["val"].ndim != 3
        or operation_name(weighted) != "mul"
    ):
        raise Unrecognised(_NO_MIXTURE)
    for results, weights in (weighted.args[:2], weighted.args[1::-1]):
        chosen = _chosen(_plain(weights))
        if chosen is not None:
            if not same(given["self"].meta["val"].shape[1:2], [chosen.top_k]):
                raise Unrecognised("the sum over experts is not over those of one token")
            return _experts(state, node, _plain(results), chosen)
    raise Unrecognised(_NO_MIXTURE)


def _plain(node: Any) -> Any:
    """``node`` without copies and changes of shape."""
    while operation_name(behind(node)) in _SHAPING:
        node = behind(node).args[0]
    return behind(node)


def _chosen(weights: fx.Node) -> _Chosen | None:
    """The router that ``weights`` come from: softmax, then the greatest, normalised or not; or the other way round."""
    normalise = False
    if operation_name(weights) == "div" and _is_sum_of(weights.args[1], weights.args[0]):
        weights, normalise = behind(weights.args[0]), True
    elif operation_name(weights) in ("softmax", "_softmax") and weights.args[1] in (-1, 1):
        values = behind(weights.args[0])
        top = _top(values)
        return None if top is None else _Chosen(behind(top.args[0]), top, _count(top), True)
    top = _top(weights)
    if top is None:
        return None
    scores = behind(top.args[0])
    if operation_name(scores) not in ("softmax", "_softmax") or scores.args[1] not in (-1, 1):
        return None
    return _Chosen(behind(scores.args[0]), top, _count(top), normalise)


def _top(values: Any) -> fx.Node | None:
    """The ``topk`` that ``values`` are the values of, if over the last dimension and the greatest."""
    if operation_name(values) != "getitem" or values.args[1] != 0 or operation_name(values.args[0]) != "topk":
        return None
    top: fx.Node = values.args[0]
    ordinary = all(argument in (-1, 1, True) for argument in top.args[2:4])
    return top if ordinary and top.args[0].meta["val"].ndim == 2 else None  # type: ignore[union-attr]


def _count(top: fx.Node) -> int:
    return int(top.args[1])  # type: ignore[arg-type]


def _is_sum_of(total: Any, values: Any) -> bool:
    total = behind(total)
    if operation_name(total) != "sum" or behind(total.args[0]) is not behind(values):
        return False
    return total.args[1] in ([-1], [1]) and len(total.args) > 2 and bool(total.args[2])


def _experts(state: Recogniser, node: fx.Node, results: fx.Node, chosen: _Chosen) -> View:
    hidden, down = _picked(state, results, chosen)
    hidden = _plain(hidden)
    if operation_name(hidden) != "mul":
        raise Unrecognised("the experts have no gate")
    function, gate, up = _gate(hidden)
    (packed, first), (other, second) = _half(gate), _half(up)
    if packed is not other or first is None or second is None or first == second:
        raise Unrecognised("the gates of the experts are not half of a packed product")
    tokens, both = _picked(state, packed, chosen)
    tokens = _plain(tokens)
    if operation_name(tokens) != "repeat_interleave" or list(tokens.args[1:]) != [chosen.top_k, 0]:
        raise Unrecognised("the experts read something that is not the token")
    x, logits = state.rows(tokens.args[0]), state.rows(chosen.logits)
    if x is None or logits is None:
        raise Unrecognised("the experts or their router read something that is no [tokens, features]")
    every, inner = state.constants[down].shape[0], state.constants[down].shape[2]
    experts = tuple(
        Expert(
            _stored(state, both, number, first * inner, inner),
            _stored(state, both, number, second * inner, inner),
            _stored(state, down, number),
        )
        for number in range(every)
    )
    route = state.emit(Route, logits, chosen.top_k, chosen.normalise)
    return state.view(state.emit(Experts, x, route, experts, function), node)


def _picked(state: Recogniser, product: fx.Node, chosen: _Chosen) -> tuple[Any, fx.Node]:
    """x and the weights, ``float32[experts, N, K]``, if ``product`` is that of x with the chosen experts' weights."""
    if operation_name(product) == "bmm":
        weights: Any = product.args[0]
        indices: Any = weights.args[1] if operation_name(weights) == "index" else ()
        picked = _plain(indices[0]) if len(indices) == 1 else None
        if picked is not None and operation_name(picked) == "getitem" and picked.args == (chosen.ids, 1):
            source = weights.args[0]
            if source in state.constants and state.constants[source].ndim == 3:
                return product.args[1], source
    raise Unrecognised("the experts are no products with weights that the router picks")


def _gate(hidden: fx.Node) -> tuple[str, Any, Any]:
    """The function, its argument and the other factor of a gated product."""
    for active, other in (hidden.args[:2], hidden.args[1::-1]):
        active = behind(active)
        name = operation_name(active)
        if name == "gelu":
            approximate = active.kwargs.get("approximate", "none")
            return {"none": "gelu_erf", "tanh": "gelu_tanh"}[approximate], behind(active.args[0]), behind(other)
        if name in _FUNCTIONS:
            return _FUNCTIONS[name], behind(active.args[0]), behind(other)
        if name == "mul" and (gelu := written_out_gelu(active)) is not None:
            return gelu[0], behind(gelu[1]), behind(other)
    raise Unrecognised("the contract has no such gate for experts")


def _half(part: Any) -> tuple[Any, int | None]:
    """The product that ``part`` is half of the features of, and which half."""
    if operation_name(part) == "getitem" and operation_name(part.args[0]) in ("split", "chunk", "split_with_sizes"):
        packed = part.args[0].args[0]
        if 2 * extent(part.meta["val"].shape[-1]) == extent(packed.meta["val"].shape[-1]):
            return _plain(packed), part.args[1]
    if operation_name(part) == "slice":
        packed = part.args[0]
        width = extent(packed.meta["val"].shape[-1])
        if part.args[1] in (-1, 1) and 2 * extent(part.meta["val"].shape[-1]) == width and len(part.args) < 5:
            return _plain(packed), {0: 0, width // 2: 1}.get(part.args[2] or 0)
    return None, None


def _stored(state: Recogniser, weights: fx.Node, number: int, start: int = 0, size: int | None = None) -> str:
    """The name of rows ``start:start + size`` of one expert's weights, which are a view of those of all."""
    every = state.constants[weights]
    part: torch.Tensor = every[number] if size is None else every[number, start : start + size]
    last = "" if size is None else f"[{start}:{start + size}]"
    return state.store(f"{state.name_of(weights)}[{number}]{last}", part)
