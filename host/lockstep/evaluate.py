"""Running a graph on the host: the ``cpu`` device, and the float oracle that calibration and tests look at.

``run_reference`` executes the contract stage with a module of contract operations, such as the golden
``lockstep_isa.operations`` or the C++ ``lockstep_hls.kernels``; both give the same bits. ``run_float`` executes the
float stage with PyTorch and serves accuracy, never equality.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional

from lockstep.errors import InputError, SequenceLengthError
from lockstep.experts import route, route_float, run_experts, run_experts_float
from lockstep.graph import (
    Activation,
    Add,
    Attention,
    Constant,
    Dense,
    Experts,
    Fallback,
    Gather,
    Graph,
    Indices,
    Input,
    LayerNorm,
    Linear,
    Multiply,
    Node,
    PositionBias,
    Quantise,
    RMSNorm,
    Rotary,
    Route,
    Value,
)
from lockstep.head_pruning import HeadImportance, KeepHeads, attend_present, multiply_present
from lockstep.pruning import KeepTokens, TokenImportance


class Operations(Protocol):
    """The contract's operations on row-major arrays; see ``lockstep_isa.operations`` for shapes and meaning."""

    def quantise_rows(self, x: Any, prescale: Any = None) -> tuple[Any, Any]: ...
    def linear(self, q: Any, s: Any, w: Any, sw: Any, bias: Any = None) -> Any: ...
    def layer_norm(self, x: Any, gamma: Any, beta: Any, eps: float) -> Any: ...
    def rms_norm(self, x: Any, gamma: Any, eps: float, groups: int = 1) -> Any: ...
    def rotary(self, x: Any, cos: Any, sin: Any, heads: int, interleaved: bool = False) -> Any: ...
    def attention_cached(
        self,
        q: Any,
        positions: Any,
        k8: Any,
        sk: Any,
        v8: Any,
        sv: Any,
        *,
        tile: int,
        scale: Any = None,
        causal: bool = True,
        window: Any = None,
        bias: Any = None,
    ) -> Any: ...
    def multiply(self, x: Any, y: Any, /) -> Any: ...
    def apply_function(self, name: str, x: Any) -> Any: ...
    def add(self, x: Any, y: Any, /) -> Any: ...


Compute = Callable[[Graph, Node, list[Any]], Any]


def run_reference(graph: Graph, inputs: Mapping[str, Any], operations: Operations | Any) -> np.ndarray:
    """The output of a contract-stage graph for one sequence, ``float32[tokens, features]``.

    Parameters
    ----------
    graph : a graph without ``Dense`` nodes.
    inputs : arrays by input name, without the batch, such as ``{"input_ids": [101, 7592, 102]}``.
    operations : a module with the contract's operations.

    Raises
    ------
    InputError, SequenceLengthError
        if the inputs do not fit the graph.
    """

    def compute(graph: Graph, node: Node, given: list[Any]) -> Any:
        return run_node(graph, node, given, operations)

    return _run(graph, inputs, compute)


def run_float(
    graph: Graph, inputs: Mapping[str, Any], observe: Callable[[Node, list[Any]], None] | None = None
) -> np.ndarray:
    """The output of a float-stage graph for one sequence in PyTorch's float32, ``float32[tokens, features]``.

    ``observe`` is called with every node and the arrays that it reads.
    """

    def compute(graph: Graph, node: Node, given: list[Any]) -> Any:
        if observe is not None:
            observe(node, given)
        return run_float_node(graph, node, given)

    return _run(graph, inputs, compute)


def check_inputs(graph: Graph, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """``inputs`` as arrays of the right type and shape; raises ``InputError`` or ``SequenceLengthError`` where they
    do not fit.
    """
    expected = graph.inputs
    unknown = [name for name in inputs if name not in expected]
    if unknown:
        raise InputError(f"the model has no input {unknown[0]!r}; it has {', '.join(map(repr, expected))}")
    arrays: dict[str, np.ndarray] = {}
    lengths: set[int] = set()
    for name, node in expected.items():
        if name not in inputs:
            raise InputError(f"the input {name!r} is missing")
        array = np.asarray(inputs[name])
        if node.dtype.startswith("int") and array.size and not np.issubdtype(array.dtype, np.integer):
            raise InputError(f"the input {name!r} holds {array.dtype} where integers are needed")
        fits = array.ndim == len(node.shape) and all(
            wanted in (None, size) for wanted, size in zip(node.shape, array.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("tokens" if size is None else str(size) for size in node.shape)
            raise InputError(f"the input {name!r} has shape {list(array.shape)}, not [{wanted}]")
        lengths.update(size for size, wanted in zip(array.shape, node.shape, strict=True) if wanted is None)
        arrays[name] = np.ascontiguousarray(array.astype(node.dtype))
    if len(lengths) > 1:
        raise InputError(f"the inputs have different numbers of tokens: {sorted(lengths)}")
    for tokens in lengths:
        if tokens == 0:
            raise SequenceLengthError("the sequence is empty; give at least one token")
        if tokens < graph.min_tokens:
            raise SequenceLengthError(
                f"the sequence has {tokens} tokens, but the model can only be captured for {graph.min_tokens} or more;"
                " give a longer one, or run it in PyTorch"
            )
        if tokens > graph.max_tokens:
            raise SequenceLengthError(
                f"the sequence has {tokens} tokens, but the model has positions for {graph.max_tokens}; shorten or "
                "split it"
            )
    return arrays


def _run(graph: Graph, inputs: Mapping[str, Any], compute: Compute) -> np.ndarray:
    arrays = check_inputs(graph, inputs)
    last_use: dict[Value, int] = {}
    for position, node in enumerate(graph):
        last_use.update(dict.fromkeys(node.inputs, position))
    values: dict[Value, Any] = {}
    for position, node in enumerate(graph):
        if isinstance(node, Input):
            values[node.value] = arrays[node.name]
            continue
        values[node.value] = compute(graph, node, [values[value] for value in node.inputs])
        for value in node.inputs:
            if last_use[value] == position and value != graph.output:
                values.pop(value, None)
    return values[graph.output]


def host_node(graph: Graph, node: Node, given: list[Any]) -> Any:
    """Nodes that the host runs for every device: data movement, routing, and what PyTorch runs."""
    match node:
        case Constant():
            return graph.tensors[node.tensor]
        case Indices() | PositionBias() | Fallback():
            return node.function(*given)
        case Gather():
            table = graph.tensors[node.table]
            outside = given[0][(given[0] < 0) | (given[0] >= len(table))]
            if outside.size:
                raise InputError(
                    f"index {outside[0]} is not in the table {node.table!r}, which has {len(table)} entries"
                )
            return table[given[0]]
        case Route():
            return route(node, given[0])
        case TokenImportance() | KeepTokens() | HeadImportance() | KeepHeads():
            return node.run(*given)
    raise ValueError(f"{type(node).__name__} {node.value} does not belong to this stage of the graph")


def run_node(graph: Graph, node: Node, given: list[Any], operations: Operations | Any, first: int = 0) -> Any:
    """The value of one contract-stage node from those that it reads; their first row is the token at position
    ``first``.
    """

    def tensor(name: str | None) -> Any:
        return None if name is None else graph.tensors[name]

    match node:
        case Add():
            return operations.add(*given)
        case Multiply():
            return operations.multiply(*given)
        case LayerNorm():
            return operations.layer_norm(given[0], tensor(node.gamma), tensor(node.beta), node.eps)
        case RMSNorm():
            return operations.rms_norm(given[0], tensor(node.gamma), node.eps, node.groups)
        case Rotary():
            at = slice(first, first + len(given[0]))
            cos, sin = tensor(node.cos)[at], tensor(node.sin)[at]
            return operations.rotary(given[0], cos, sin, node.heads, node.interleaved)
        case Activation():
            return operations.apply_function(node.function, given[0])
        case Quantise():
            return operations.quantise_rows(given[0], tensor(node.prescale))
        case Linear() if node.present is not None:
            return multiply_present(node, given, graph.tensors, operations.linear)
        case Linear():
            (q, s), weight = given[0], tensor(node.weight)
            weight.flags.writeable = False  # so that the kernels may keep a packed copy
            return operations.linear(q, s, weight, tensor(node.scales), tensor(node.bias))
        case Attention() if node.present is not None:
            return attend_present(node, given, lambda part, own: run_node(graph, part, own, operations, first))
        case Attention():
            k, v = (quantise_heads(x, node, operations.quantise_rows) for x in given[1:3])
            bias = given[3] if len(given) > 3 else None
            return attend(node, given[0], np.arange(first, first + len(given[0])), k, v, bias, operations)
        case Experts():
            return run_experts(node, given[0], given[1], graph.tensors, operations)
    return host_node(graph, node, given)


def quantise_heads(x: Any, node: Attention, quantise: Callable[[Any], tuple[Any, Any]]) -> tuple[Any, Any]:
    """Keys or values ``float32[tokens, kv_heads * head_dim]``, each token and head by ``quantise``: ``int8`` of that
    shape, and ``float32[tokens, kv_heads]``.
    """
    q, s = quantise(x.reshape(-1, node.head_dim))
    return q.reshape(x.shape), s.reshape(len(x), node.kv_heads)


def attend(
    node: Attention, q: Any, positions: Any, keys: Any, values: Any, bias: Any, operations: Operations | Any
) -> Any:
    """Attention of q: ``float32[tokens, heads * head_dim]`` to the quantised keys and values from position 0 on."""
    return operations.attention_cached(
        *(q, positions, *keys, *values),
        tile=node.tile,
        scale=node.scale,
        causal=node.causal,
        window=node.window,
        bias=bias,
    )


def run_float_node(graph: Graph, node: Node, given: list[Any]) -> Any:
    def tensor(name: str | None) -> Any:
        return None if name is None else torch.from_numpy(graph.tensors[name])

    if isinstance(node, Constant | Gather | Indices | PositionBias | Fallback):
        return host_node(graph, node, given)
    if isinstance(node, Route):
        return route_float(node, given[0])
    if isinstance(node, Experts):
        return run_experts_float(node, given[0], given[1], graph.tensors, _ACTIVATIONS[node.function])
    with torch.no_grad():
        x = [torch.from_numpy(np.ascontiguousarray(item)) for item in given]
        match node:
            case Add():
                return (x[0] + x[1]).numpy()
            case Multiply():
                return (x[0] * x[1]).numpy()
            case RMSNorm():
                pieces = x[0].reshape(len(x[0]) * node.groups, -1)
                normalised = functional.rms_norm(pieces, pieces.shape[1:], tensor(node.gamma), node.eps)
                return normalised.reshape(x[0].shape).numpy()
            case Rotary():
                return _rotated(node, x[0], tensor(node.cos), tensor(node.sin)).numpy()
            case LayerNorm():
                weight = tensor(node.gamma)
                return functional.layer_norm(x[0], weight.shape, weight, tensor(node.beta), node.eps).numpy()
            case Activation():
                return _ACTIVATIONS[node.function](x[0]).numpy()
            case Dense():
                rows = slice(*node.rows)
                bias = None if node.bias is None else tensor(node.bias)[rows]
                return functional.linear(x[0], tensor(node.weight)[rows], bias).numpy()
            case Attention():
                return _attended(node, *x).numpy()
    return host_node(graph, node, given)


def _rotated(node: Rotary, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    pairs = cos.shape[1]
    cos, sin = cos[: len(x), None], sin[: len(x), None]
    y = x.reshape(len(x), node.heads, node.head_dim).clone()
    step = 2 if node.interleaved else 1
    first = slice(0, pairs * step, step)
    second = slice(1, 2 * pairs, 2) if node.interleaved else slice(pairs, 2 * pairs)
    low, high = y[..., first].clone(), y[..., second].clone()
    y[..., first], y[..., second] = low * cos - high * sin, high * cos + low * sin
    return y.reshape(x.shape)


def _attended(
    node: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    tokens = len(q)
    q, k, v = (item.reshape(tokens, -1, node.head_dim).transpose(0, 1) for item in (q, k, v))
    shared = node.heads // node.kv_heads
    k, v = k.repeat_interleave(shared, 0), v.repeat_interleave(shared, 0)
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    hidden = torch.zeros(tokens, tokens, dtype=torch.bool)
    if node.causal:
        hidden |= key > query
    if node.window is not None:
        hidden |= key <= query - node.window
    mask = torch.zeros(tokens, tokens).masked_fill(hidden, -torch.inf)
    mixed = functional.scaled_dot_product_attention(q, k, v, mask if bias is None else mask + bias, scale=node.scale)
    return mixed.transpose(0, 1).reshape(tokens, -1).contiguous()


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu_erf": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
}
