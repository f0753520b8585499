"""The rules for attention: one fused operation of PyTorch, or matmul, scale, mask, softmax and matmul written out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import fx

from lockstep import layout
from lockstep.fragment import View, operation_name
from lockstep.graph import ATTENTION_TILE, Attention, Value
from lockstep.masks import Mask, read_mask
from lockstep.patterns import behind
from lockstep.recogniser import Recogniser, Unrecognised, rule
from lockstep.rotary import resolve


@rule("scaled_dot_product_attention")
def attention(state: Recogniser, node: fx.Node, given: dict[str, Any]) -> View:
    if given["dropout_p"]:
        raise Unrecognised("attention drops out")
    views = [resolve(state, given[name]) for name in ("query", "key", "value")]
    return emit_attention(state, views, given["attn_mask"], given["scale"], given["is_causal"])


def written_out(state: Recogniser, weights: fx.Node, v: fx.Node) -> View:
    """softmax(q @ k.T * scale + mask) @ v, given the softmax and v."""
    softmax = behind(weights)
    if operation_name(softmax) not in ("softmax", "_softmax"):
        raise Unrecognised("the contract has no product of two computed tensors outside attention")
    if softmax.args[1] not in (-1, softmax.meta["val"].ndim - 1):
        raise Unrecognised("softmax is not over keys")
    scores, mask = behind(softmax.args[0]), None
    if operation_name(scores) == "add":
        scores, mask = behind(scores.args[0]), scores.args[1]
    scores, scale = _unscaled(scores)
    if operation_name(scores) not in ("matmul", "bmm"):
        raise Unrecognised("softmax is not over a product of queries and keys")
    (q, of_q), (k, of_k) = (_unscaled(behind(operand)) for operand in scores.args[:2])
    turned = resolve(state, k)
    key = None if turned is None else layout.transpose(turned, -1, -2)
    return emit_attention(state, [resolve(state, q), key, resolve(state, v)], mask, scale * of_q * of_k, False)


def _unscaled(node: fx.Node) -> tuple[fx.Node, float]:
    """``node`` without a factor that is a plain number, and that factor."""
    name = operation_name(node)
    if name not in ("mul", "div") or not isinstance(node.args[1], int | float):
        return node, 1.0
    factor = float(node.args[1])
    return behind(node.args[0]), factor if name == "mul" else 1 / factor


def emit_attention(
    state: Recogniser, views: Sequence[View | None], mask: Any, scale: float | None, causal: bool
) -> View:
    """The result of attention of a query to a key and a value, given as views of ``[heads, tokens, head_dim]``."""
    found = [view for view in views if view is not None]
    if len(found) != 3:
        raise Unrecognised("attention has a query, key or value that is no view of [tokens, features]")
    tokens = {axis.size for view in found for axis in view.axes if axis.kind == "token"}
    query, key, content = (layout.head_shape(view) for view in found)
    if query is None or key is None or content is None or len(tokens) != 1:
        raise Unrecognised("query, key or value is not [heads, tokens, head_dim]")
    if query.repeat != 1 or key != content or key.width != query.width or query.heads % key.heads:
        raise Unrecognised("query, key and value have heads that do not go together")
    if key.heads * key.repeat not in (query.heads, key.heads):
        raise Unrecognised("heads of keys are not shared evenly")
    meaning = Mask(causal=causal) if mask is None else read_mask(state, mask, query.heads)
    values = [
        state.features(view.value, view.offset, shape.heads * shape.width)
        for view, shape in zip(found, (query, key, key), strict=True)
    ]
    factor = 1 / math.sqrt(query.width) if scale is None else float(scale)
    for index in (0, 1):
        values[index], times = _unscaled_value(state, values[index])
        factor *= times
    if None in values:
        raise Unrecognised("query, key or value is a part of something that is no product")
    shape = (query.heads, query.width, factor, ATTENTION_TILE, key.heads)
    value = state.emit(Attention, *values, *shape, meaning.causal, meaning.window, meaning.bias)
    return state.reuse(value, found[0], query.heads * query.width)


def _unscaled_value(state: Recogniser, value: Value | None) -> tuple[Value | None, float]:
    return state.memory.get(("scaled", value), (value, 1.0))
