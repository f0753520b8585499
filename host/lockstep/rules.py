"""One rule for each PyTorch operation that the contract covers: what it reads, and the node it becomes.

To add an operation, write a rule here. A rule returns the ``View`` that the operation's result is (or several, for
one that returns a tuple), or raises ``Unrecognised`` with the reason, which then stands in the model's report.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from lockstep import layout
from lockstep.fragment import View, extent, operation_name, same
from lockstep.graph import Activation, Add, Attention, Dense, Gather, LayerNorm
from lockstep.masks import why_not_trivial
from lockstep.patterns import written_out_gelu
from lockstep.recogniser import RULES, Recogniser, Unrecognised, rule

Arguments = dict[str, Any]

__all__ = ["RULES"]

_FUNCTIONS = {"silu": "silu", "sigmoid": "sigmoid", "tanh": "tanh"}


@rule("linear")
def linear(state: Recogniser, node: fx.Node, given: Arguments) -> View:
    return _product(state, node, given["input"], given["weight"], given["bias"])


@rule("addmm")
def addmm(state: Recogniser, node: fx.Node, given: Arguments) -> View:
    if given["beta"] != 1 or given["alpha"] != 1:
        raise Unrecognised("addmm scales its operands")
    return _product(state, node, given["mat1"], _transposed(state, given["mat2"]), given["self"])


@rule("matmul", "mm", "bmm")
def matmul(state: Recogniser, node: fx.Node, given: Arguments) -> View:
    left, right = given["self"], given["other" if "other" in given else "mat2"]
    if right in state.constants:
        return _product(state, node, left, _transposed(state, right), None)
    return _eager_attention(state, left, right)


def _transposed(state: Recogniser, weight: Any) -> tuple[str, torch.Tensor] | None:
    name = state.name(weight)
    if name is None or state.constants[weight].ndim != 2:
        return None
    turned = state.constants[weight].t()
    if turned.is_contiguous():
        return state.store(f"{name}.t", turned), turned
    key = f"{name}.t"
    return state.store(key, turned.contiguous()) if key not in state.tensors else key, turned


def _product(state: Recogniser, node: fx.Node, x: Any, weight: Any, bias: Any) -> View:
    if isinstance(weight, tuple):
        name, tensor = weight
    else:
        found = state.name(weight)
        if found is None:
            raise Unrecognised(f"{operation_name(node)} multiplies by something that is no parameter")
        name, tensor = found, state.constants[weight]
    bias_name = state.name(bias)
    if bias is not None and (bias_name is None or state.constants[bias].shape != tensor.shape[:1]):
        raise Unrecognised(f"{operation_name(node)} adds something that is no bias")
    value = state.rows(x)
    if value is None:
        raise Unrecognised(f"the input of {operation_name(node)} is no [tokens, features]")
    return state.view(state.emit(Dense, value, name, bias_name, (0, tensor.shape[0])), node)


@rule("layer_norm")
def layer_norm(state: Recogniser, node: fx.Node, given: Arguments) -> View:
    if len(given["normalized_shape"]) != 1:
        raise Unrecognised("layer_norm covers more than the features")
    width = given["normalized_shape"][0]
    value = state.rows(given["input"])
    gamma = state.name(given["weight"]) if given["weight"] is not None else _filled(state, "ones", width)
    beta = state.name(given["bias"]) if given["bias"] is not None else _filled(state, "zeros", width)
    if value is None or gamma is None or beta is None:
        raise Unrecognised("layer_norm has an input that is no [tokens, features], or weights that are no parameters")
    return state.view(state.emit(LayerNorm, value, gamma, beta, float(given["eps"])), node)


def _filled(state: Recogniser, kind: str, width: int) -> str:
    name = f"{kind}[{width}]"
    return name if name in state.tensors else state.store(name, getattr(torch, kind)(width))


@rule("gelu", *_FUNCTIONS)
def activation(state: Recogniser, node: fx.Node, given: Arguments) -> View:
    name = operation_name(node)
    function = _FUNCTIONS.get(name) or {"none": "gelu_erf", "tanh": "gelu_tanh"}[given["approximate"]]
    value = state.rows(given["self"])
    if value is None:
        raise Unrecognised(f"the input of {name} is no [tokens, features]")
    return state.view(state.emit(Activation, value, function), node)


@rule("mul")
def product(state: Recogniser, node: fx.Node, given: Arguments) -> View:
    found = written_out_gelu(node)
    value = None if found is None else state.rows(found[1])
    if found is None or value is None:
        raise Unrecognised("the contract has no operation for mul")
    return state.view(state.emit(Activation, value, found[0]), node)


@rule("add")
def add(state: Recogniser, node: fx.Node, given: Arguments) -> View:
    width = extent(node.meta["val"].shape[-1]) if node.meta["val"].ndim else None
    if given["alpha"] != 1 or not isinstance(width, int):
        raise Unrecognised("add scales an operand or has no features")
    operands = (given["self"], given["other"])
    if not all(isinstance(operand, fx.Node) for operand in operands):
        raise Unrecognised("the contract has no addition of a plain number")
    if any(operand.meta["val"].ndim == 0 or extent(operand.meta["val"].shape[-1]) != width for operand in operands):
        raise Unrecognised("add repeats an operand along the features")
    values = []
    for operand in operands:
        value = state.constant(operand, width) if operand in state.constants else state.rows(operand)
        if value is None:
            raise Unrecognised("an operand of add is no [tokens, features]")
        values.append(value)
    return state.view(state.emit(Add, *values), node)


@rule("embedding")
def embedding(state: Recogniser, node: fx.Node, given: Arguments) -> View:
    table, indices = state.name(given["weight"]), state.indices(given["indices"])
    if table is None or indices is None:
        raise Unrecognised(
            "embedding looks up a table that is no parameter, or with indices that are computed from features"
        )
    return state.view(state.emit(Gather, table, indices), node)


@rule("scaled_dot_product_attention")
def attention(state: Recogniser, node: fx.Node, given: Arguments) -> View:
    if given["is_causal"] or given["dropout_p"] or given.get("enable_gqa"):
        raise Unrecognised("attention is causal, drops out or shares heads")
    views = [state.views.get(given[name]) for name in ("query", "key", "value")]
    return _attention(state, views, given["attn_mask"], given["scale"])


def _eager_attention(state: Recogniser, weights: fx.Node, v: fx.Node) -> View:
    """softmax(q @ k.T * scale + mask) @ v, written out."""
    softmax = _behind(weights)
    if operation_name(softmax) not in ("softmax", "_softmax"):
        raise Unrecognised("the contract has no product of two computed tensors outside attention")
    if softmax.args[1] not in (-1, softmax.meta["val"].ndim - 1):
        raise Unrecognised("softmax is not over keys")
    scores, mask = _behind(softmax.args[0]), None
    if operation_name(scores) == "add":
        scores, mask = _behind(scores.args[0]), scores.args[1]
    scores, scale = _unscaled(scores)
    if operation_name(scores) not in ("matmul", "bmm"):
        raise Unrecognised("softmax is not over a product of queries and keys")
    (q, of_q), (k, of_k) = (_unscaled(_behind(operand)) for operand in scores.args[:2])
    turned = state.views.get(k)
    key = layout.transpose(turned, -1, -2) if isinstance(turned, View) else None
    return _attention(state, [state.views.get(q), key, state.views.get(v)], mask, scale * of_q * of_k)


def _behind(node: Any) -> fx.Node:
    """``node`` without the copies that dropout leaves in evaluation mode."""
    while operation_name(node) in ("clone", "dropout", "contiguous", "alias"):
        node = node.args[0]
    return node


def _unscaled(node: fx.Node) -> tuple[fx.Node, float]:
    """``node`` without a factor that is a plain number, and that factor."""
    name = operation_name(node)
    if name not in ("mul", "div") or not isinstance(node.args[1], int | float):
        return node, 1.0
    factor = float(node.args[1])
    return _behind(node.args[0]), factor if name == "mul" else 1 / factor


def _attention(state: Recogniser, views: Sequence[Any], mask: Any, scale: float | None) -> View:
    if not all(isinstance(view, View) for view in views):
        raise Unrecognised("attention has a query, key or value that is no view of [tokens, features]")
    shapes = {layout.head_shape(view) for view in views}
    tokens = {axis.size for view in views for axis in view.axes if axis.kind == "token"}
    shape = shapes.pop()
    if shapes or shape is None or len(tokens) != 1:
        raise Unrecognised("query, key and value are not [heads, tokens, head_dim] of one size")
    if mask is not None and (reason := why_not_trivial(state, mask)) is not None:
        raise Unrecognised(reason)
    heads, width = shape
    values = [state.features(view.value, view.offset, heads * width) for view in views]
    if None in values:
        raise Unrecognised("query, key or value is a part of something that is no product")
    factor = 1 / math.sqrt(width) if scale is None else float(scale)
    value = state.emit(Attention, *values, heads, width, factor)
    return state.reuse(value, views[0], heads * width)


def _moved(result: View | None, node: fx.Node) -> View:
    if result is None:
        raise Unrecognised(f"{operation_name(node)} mixes tokens with features, or picks tokens")
    return result


def _source(state: Recogniser, item: Any) -> View:
    view = state.views.get(item)
    if not isinstance(view, View):
        raise Unrecognised("")
    return view


@rule("view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "flatten", "unflatten")
def reshape(state: Recogniser, node: fx.Node, given: Arguments) -> View:
    shape = [extent(size) for size in node.meta["val"].shape]
    return _moved(layout.reshape(_source(state, given.get("self", given.get("input"))), shape), node)


@rule("clone", "contiguous", "dropout", "alias", "detach", "_to_copy", "to", "lift_fresh_copy")
def copy(state: Recogniser, node: fx.Node, given: Arguments) -> View:
    item = given.get("self", given.get("input"))
    if node.meta["val"].dtype != torch.float32 or given.get("train"):
        raise Unrecognised(f"{operation_name(node)} changes more than the place of its data")
    return _source(state, item)


@rule("expand")
def expand(state: Recogniser, node: fx.Node, given: Arguments) -> View:
    if not same(node.meta["val"].shape, given["self"].meta["val"].shape):
        raise Unrecognised("expand repeats its data")
    return _source(state, given["self"])


@rule("permute", "transpose", "t", "numpy_T")
def permute(state: Recogniser, node: fx.Node, given: Arguments) -> View:
    view = _source(state, given["self"])
    if "dims" in given:
        return layout.permute(view, given["dims"])
    return layout.transpose(view, given.get("dim0", 0), given.get("dim1", 1))


@rule("select")
def select(state: Recogniser, node: fx.Node, given: Arguments) -> View:
    return _moved(layout.select(_source(state, given["self"]), given["dim"], given["index"]), node)


@rule("slice")
def slice_(state: Recogniser, node: fx.Node, given: Arguments) -> View:
    view = _source(state, given["self"])
    if same(node.meta["val"].shape, given["self"].meta["val"].shape):
        return view
    size, start = extent(node.meta["val"].shape[given["dim"]]), given["start"] or 0
    whole = extent(given["self"].meta["val"].shape[given["dim"]])
    if given["step"] != 1 or not isinstance(size, int) or not isinstance(start, int) or not isinstance(whole, int):
        raise Unrecognised("slice picks tokens, or some features only")
    return _moved(layout.narrow(view, given["dim"], min(start + whole if start < 0 else start, whole), size), node)


@rule("split", "split_with_sizes", "chunk", "unbind")
def split(state: Recogniser, node: fx.Node, given: Arguments) -> tuple[View, ...]:
    view, dimension = _source(state, given["self"]), given["dim"]
    parts: list[View] = []
    start = 0
    for result in node.meta["val"]:
        if operation_name(node) == "unbind":
            parts.append(_moved(layout.select(view, dimension, len(parts)), node))
            continue
        size = extent(result.shape[dimension])
        parts.append(_moved(layout.narrow(view, dimension, start, size), node))
        start += size
    return tuple(parts)


@rule("getitem")
def getitem(state: Recogniser, node: fx.Node, given: Arguments) -> View:
    parts = state.views.get(given["0"])
    if not isinstance(parts, tuple):
        raise Unrecognised("")
    return parts[given["1"]]
