"""One rule for each PyTorch operation that the contract covers: what it reads, and the node it becomes.

To add an operation, write a rule here. A rule returns the ``View`` that the operation's result is (or several, for
one that returns a tuple), or raises ``Unrecognised`` with the reason, which then stands in the model's report.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lockstep import attention, layout, routing
from lockstep.fragment import View, extent, operation_name, same
from lockstep.graph import Activation, Add, Constant, Dense, Gather, LayerNorm, Multiply, RMSNorm, Value
from lockstep.patterns import written_out_gelu, written_out_rms_norm
from lockstep.recogniser import RULES, Recogniser, Unrecognised, is_rows, rule
from lockstep.rotary import resolve

Arguments = dict[str, Any]

#: Rules that stand in files of their own register themselves when these are imported.
__all__ = ["RULES", "attention", "routing"]

_FUNCTIONS = {"silu": "silu", "sigmoid": "sigmoid", "tanh": "tanh", "relu": "relu"}


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
    return attention.written_out(state, left, right)


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


@rule("rms_norm")
def rms_norm(state: Recogniser, node: fx.Node, given: Arguments) -> View:
    if len(given["normalized_shape"]) != 1:
        raise Unrecognised("rms_norm covers more than the features")
    eps = torch.finfo(torch.float32).eps if given["eps"] is None else float(given["eps"])
    gamma = state.name(given["weight"]) if given["weight"] is not None else None
    if given["weight"] is not None and gamma is None:
        raise Unrecognised("rms_norm has weights that are no parameters")
    return _normalised(state, given["input"], gamma, eps)


def _normalised(state: Recogniser, x: fx.Node, gamma: str | None, eps: float) -> View:
    view, value, shape = _features(state, x)
    gamma = _filled(state, "ones", shape.width) if gamma is None else gamma
    return state.reuse(state.emit(RMSNorm, value, gamma, eps, shape.heads), view, shape.heads * shape.width)


def _features(state: Recogniser, item: fx.Node) -> tuple[View, Value, layout.Heads]:
    """``item`` as a view of all features of a value, for operations on every feature or head by itself."""
    view = resolve(state, item)
    if view is None and is_rows(item):
        value = state.rows(item)
        view = None if value is None else state.view(value, item)
    found = None if view is None else state.canonical(view)
    if view is None or found is None:
        raise Unrecognised(f"{operation_name(item)} gives something that is no [tokens, features]")
    return view, *found


@rule("mul", "div")
def product(state: Recogniser, node: fx.Node, given: Arguments) -> View:
    if (gelu := written_out_gelu(node)) is not None and (value := state.rows(gelu[1])) is not None:
        return state.view(state.emit(Activation, value, gelu[0]), node)
    if (norm := written_out_rms_norm(node)) is not None:
        return _normalised(state, norm[0], None, norm[1])
    x, y = given["self"], given["other"]
    if (number := _number(state, y)) is not None:
        return _scaled(state, x, number if operation_name(node) == "mul" else 1 / number)
    if operation_name(node) == "div":
        raise Unrecognised("the contract has no operation for div")
    if (number := _number(state, x)) is not None:
        return _scaled(state, y, number)
    for item, parameter in ((x, y), (y, x)):
        if parameter in state.constants:
            return _times_parameter(state, node, item, parameter)
    return _times(state, node, x, y)


def _number(state: Recogniser, item: Any) -> float | None:
    """A factor that is the same for all features: a plain number, or a parameter with one entry."""
    if isinstance(item, int | float):
        return float(item)
    tensor = state.constants.get(item)
    return float(tensor) if tensor is not None and tensor.numel() == 1 else None


def _scaled(state: Recogniser, item: fx.Node, factor: float) -> View:
    view, value, shape = _features(state, item)
    if factor == 1:
        return view
    width = shape.heads * shape.width
    name = f"{factor!r}[{width}]"
    name = name if name in state.tensors else state.store(name, torch.full((1, width), factor))
    result = state.emit(Multiply, value, state.emit(Constant, name))
    state.memory["scaled", result] = (value, factor)
    return state.reuse(result, view, width)


def _times_parameter(state: Recogniser, node: fx.Node, item: fx.Node, parameter: fx.Node) -> View:
    view, value, shape = _features(state, item)
    tensor = state.constants[parameter]
    norm = state.nodes[value]
    if isinstance(norm, RMSNorm) and norm.gamma == _filled(state, "ones", shape.width) and norm.groups == shape.heads:
        gamma = state.name(parameter)
        if gamma is not None and tensor.numel() == shape.width == tensor.shape[-1]:
            tensor = tensor.reshape(-1)
            gamma = gamma if state.constants[parameter].ndim == 1 else state.store(gamma, tensor)
            weighted = state.emit(RMSNorm, norm.x, gamma, norm.eps, norm.groups)
            return state.reuse(weighted, view, shape.heads * shape.width)
    row = state.constant(parameter, shape.width) if shape.heads == 1 else None
    if row is None:
        raise Unrecognised("mul has a parameter that is no row of features")
    return state.reuse(state.emit(Multiply, value, row), view, shape.width)


def _times(state: Recogniser, node: fx.Node, x: Any, y: Any) -> View:
    if x in state.fixed or y in state.fixed:
        raise Unrecognised("mul has a factor that depends on the position and is no rotary embedding")
    if not same(x.meta["val"].shape, y.meta["val"].shape):
        raise Unrecognised("mul repeats an operand")
    (view, left, shape), (other, right, _) = _features(state, x), _features(state, y)
    if view.axes != other.axes:
        raise Unrecognised("mul has operands with different heads")
    return state.reuse(state.emit(Multiply, left, right), view, shape.heads * shape.width)


@rule("pow", "square")
def square(state: Recogniser, node: fx.Node, given: Arguments) -> View:
    if operation_name(node) == "pow" and given.get("exponent") != 2:
        raise Unrecognised("the contract has no powers but squares")
    view, value, shape = _features(state, given["self"])
    return state.reuse(state.emit(Multiply, value, value), view, shape.heads * shape.width)


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
    if node.meta["val"].ndim > 3 and any(
        operand not in state.constants and resolve(state, operand) is None for operand in operands
    ):
        raise Unrecognised("")  # heads, such as a part of a rotary embedding: whoever reads the whole will tell
    for operand in operands:
        value = state.constant(operand, width) if operand in state.constants else state.rows(operand)
        if value is None:
            raise Unrecognised("an operand of add is no [tokens, features]")
        values.append(value)
    return state.view(state.emit(Add, *values), node)


@rule("embedding")
def embedding(state: Recogniser, node: fx.Node, given: Arguments) -> View:
    if not is_rows(node):
        raise Unrecognised("embedding gives no [tokens, features]")
    table, indices = state.name(given["weight"]), state.indices(given["indices"])
    if table is None or indices is None:
        raise Unrecognised(
            "embedding looks up a table that is no parameter, or with indices that are computed from features"
        )
    return state.view(state.emit(Gather, table, indices), node)


def _moved(result: View | None, node: fx.Node) -> View:
    if result is None:
        raise Unrecognised(f"{operation_name(node)} mixes tokens with features, or picks tokens")
    return result


def _source(state: Recogniser, item: Any) -> View:
    view = resolve(state, item)
    if view is None:
        raise Unrecognised("")
    return view


@rule("view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "flatten", "unflatten")
def reshape(state: Recogniser, node: fx.Node, given: Arguments) -> View:
    shape = [extent(size) for size in node.meta["val"].shape]
    return _moved(layout.reshape(_source(state, given.get("self", given.get("input"))), shape), node)


@rule("clone", "contiguous", "dropout", "alias", "detach", "_to_copy", "to", "lift_fresh_copy", "type_as")
def copy(state: Recogniser, node: fx.Node, given: Arguments) -> View:
    item = given.get("self", given.get("input"))
    if node.meta["val"].dtype != torch.float32 or given.get("train"):
        raise Unrecognised(f"{operation_name(node)} changes more than the place of its data")
    return _source(state, item)


@rule("expand")
def expand(state: Recogniser, node: fx.Node, given: Arguments) -> View:
    view = layout.expand(_source(state, given["self"]), [extent(size) for size in node.meta["val"].shape])
    if view is None:
        raise Unrecognised("expand repeats tokens")
    return view


@rule("repeat_interleave")
def repeat_interleave(state: Recogniser, node: fx.Node, given: Arguments) -> View:
    if not isinstance(given.get("repeats"), int) or given["dim"] is None:
        raise Unrecognised("repeat_interleave does not repeat evenly")
    return _moved(layout.repeat(_source(state, given["self"]), given["dim"], given["repeats"]), node)


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
