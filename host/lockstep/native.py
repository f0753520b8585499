"""The ``cpu`` device: a graph becomes a plan of compiled operations, which one call runs.

A graph with a node that no plan has (a part in PyTorch, experts, biases by position) runs node by node; see
``lockstep.evaluate`` and ``lockstep.session``. The bits are the same.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from lockstep_hls import kernels
from lockstep_hls.plan import Cache, Plan, Rows

from lockstep.errors import InputError
from lockstep.evaluate import check_inputs, run_reference
from lockstep.graph import (
    Activation,
    Add,
    Attention,
    Constant,
    Gather,
    Graph,
    Indices,
    Input,
    LayerNorm,
    Linear,
    Multiply,
    Node,
    Quantise,
    RMSNorm,
    Rotary,
    Value,
)
from lockstep.session import CacheRows, HostSession, Logits, Session, Step, check_graph, checked_ids, plan

_PLANNED = (
    *(Input, Constant, Indices, Gather, Add, Multiply, LayerNorm, RMSNorm, Rotary),
    *(Activation, Quantise, Linear, Attention),
)
#: Plans are made for so many new tokens or a power of two times that.
_FEWEST = 16


def planned(graph: Graph) -> bool:
    """Whether a plan can run ``graph``: it knows every node, and every index is one of a table."""
    if not all(isinstance(node, _PLANNED) for node in graph):
        return False
    integers = {node.value for node in graph if isinstance(node, Indices) or _is_integer(node)}
    readers = [node for node in graph if integers.intersection(node.inputs)]
    return graph.output not in integers and all(isinstance(node, Gather | Indices) for node in readers)


def _is_integer(node: Node) -> bool:
    return isinstance(node, Input) and node.shape == (None,) and node.dtype.startswith("int")


def rounded_capacity(rows: int, most: int) -> int:
    """Rows to make a plan for, so that few plans serve many lengths."""
    capacity = _FEWEST
    while capacity < rows:
        capacity *= 2
    return max(rows, min(capacity, most))


class GraphPlan:
    """A graph as a plan, with the memory of its values.

    Parameters
    ----------
    capacity : most new tokens of a run.
    logits : as for :meth:`lockstep.session.Session.extend`.
    caches : keys and values by the value of their attention node; none for sequences that run whole.
    """

    def __init__(
        self, graph: Graph, capacity: int, logits: Logits = "all", caches: Mapping[Value, tuple[Cache, Cache]] | None = None
    ) -> None:
        self.capacity = capacity
        self._graph = graph
        self._plan = Plan()
        self._arena = _Arena()
        self._values: dict[Value, tuple[Rows, ...]] = {}
        self._caches = caches
        steps = plan(graph, logits)
        for step in steps:
            self._build(step)
            for value in step.drop:
                self._arena.release(self._values[value])
        (self._output,) = self._values[graph.output]

    def run(self, given: Mapping[Value, np.ndarray], rows: int, first: int = 0) -> np.ndarray:
        """The output for ``rows`` new tokens from position ``first`` on.

        given : the arrays of inputs and indices, with a row for each of them.
        """
        for value, array in given.items():
            (held,) = self._values[value]
            held.memory[: len(array)] = array
        self._plan.run(rows, first)
        return self._output.memory[: rows if self._output.whole else 1].copy()

    def _tensor(self, name: str | None) -> Any:
        return None if name is None else self._graph.tensors[name]

    def _new(self, step: Step, columns: int, dtype: type = np.float32) -> Rows:
        return Rows(self._arena.take(1 if step.last else self.capacity, columns, dtype), not step.last)

    def _build(self, step: Step) -> None:
        node, tensor, add = step.node, self._tensor, self._plan
        read = [self._values[value] for value in node.inputs]
        x = read[0][0] if read else None
        result: tuple[Rows, ...]
        match node:
            case Input() | Indices():
                integer = isinstance(node, Indices) or _is_integer(node)
                width = (1,) if integer else tuple(size for size in node.shape if size is not None)  # type: ignore[union-attr]
                memory = np.zeros((self.capacity, *width), np.int64 if integer else np.float32)
                self._values[node.value] = (Rows(memory, True),)
                return
            case Constant():
                rows = np.ascontiguousarray(tensor(node.tensor), np.float32)
                self._values[node.value] = (Rows(rows, len(rows) > 1),)
                return
            case Quantise():
                result = (self._new(step, x.columns, np.int8), self._new(step, 1))
                add.quantise_rows(x, tensor(node.prescale), *result, last=step.last)
            case Linear():
                weight = tensor(node.weight)
                weight.flags.writeable = False  # so that all plans share a packed copy
                result = (self._new(step, len(weight)),)
                add.linear(*read[0], weight, tensor(node.scales), tensor(node.bias), *result, last=step.last)
            case Attention():
                keys, values = self._kept(node)
                add.keep(read[1][0], node.kv_heads, keys)
                add.keep(read[2][0], node.kv_heads, values)
                result = (self._new(step, x.columns),)
                add.attention(
                    x, keys, values, *result, heads=node.heads, kv_heads=node.kv_heads, tile=node.tile,
                    scale=node.scale, causal=node.causal, window=node.window, last=step.last,
                )  # fmt: skip
            case Gather():
                result = (self._new(step, tensor(node.table).shape[1]),)
                add.gather(tensor(node.table), x, *result, last=step.last)
            case Add() | Multiply():
                result = (self._new(step, x.columns),)
                (add.add if isinstance(node, Add) else add.multiply)(x, read[1][0], *result, last=step.last)
            case LayerNorm():
                result = (self._new(step, x.columns),)
                add.layer_norm(x, tensor(node.gamma), tensor(node.beta), node.eps, *result, last=step.last)
            case RMSNorm():
                result = (self._new(step, x.columns),)
                add.rms_norm(x, tensor(node.gamma), node.eps, node.groups, *result, last=step.last)
            case Rotary():
                result = (self._new(step, x.columns),)
                cos, sin = tensor(node.cos), tensor(node.sin)
                add.rotary(x, cos, sin, node.heads, node.interleaved, *result, last=step.last)
            case Activation():
                result = (self._new(step, x.columns),)
                add.apply_function(node.function, x, *result, last=step.last)
        self._values[node.value] = result

    def _kept(self, node: Attention) -> tuple[Cache, Cache]:
        if self._caches is not None:
            return self._caches[node.value]
        rows, scales = (self.capacity, node.kv_heads * node.head_dim), (self.capacity, node.kv_heads)
        keys, values = (Cache(np.zeros(rows, np.int8), np.zeros(scales, np.float32)) for _ in range(2))
        return keys, values


class _Arena:
    """Memory of values, used again once they are released."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        self._taken: dict[int, np.ndarray] = {}

    def take(self, rows: int, columns: int, dtype: type) -> np.ndarray:
        size = rows * columns * np.dtype(dtype).itemsize
        fitting = [block for block in self._free if block.nbytes >= size]
        if fitting:
            block = min(fitting, key=lambda block: block.nbytes)
            self._free = [other for other in self._free if other is not block]
        else:
            block = np.zeros(size, np.uint8)
        memory = block[:size].view(dtype).reshape(rows, columns)
        self._taken[memory.ctypes.data] = block
        return memory

    def release(self, values: tuple[Rows, ...]) -> None:
        for value in values:
            block = self._taken.pop(value.memory.ctypes.data, None)  # inputs and parameters are not taken here
            if block is not None:
                self._free.append(block)


def indices(graph: Graph, integers: Mapping[Value, np.ndarray], rows: int) -> dict[Value, np.ndarray] | None:
    """The indices of the last ``rows`` tokens, ``int64[rows, 1]`` by value, from the integers of the whole sequence;
    none if some do not have one for each token.

    Raises ``InputError`` for one that is not in its table.
    """
    known = dict(integers)
    for node in graph:
        if isinstance(node, Indices):
            known[node.value] = node.function(*(known[value] for value in node.inputs))
        elif isinstance(node, Gather):
            entries, wanted = len(graph.tensors[node.table]), known[node.indices][-rows:]
            outside = wanted[(wanted < 0) | (wanted >= entries)]
            if outside.size:
                raise InputError(f"index {outside[0]} is not in the table {node.table!r}, which has {entries} entries")
    if any(len(array) < rows for array in known.values()):
        return None
    return {value: array[-rows:, None] for value, array in known.items()}


#: The plan of each graph for whole sequences, and the lock of its memory.
_PLANS: weakref.WeakKeyDictionary[Graph, GraphPlan] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


@dataclass(frozen=True)
class NativeExecutor:
    """The ``cpu`` device; see :class:`lockstep.model.GeneratingExecutor`."""

    def run(self, graph: Graph, sequences: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
        return [self._run(graph, inputs) for inputs in sequences]

    def open_session(self, graph: Graph, capacity: int) -> Session:
        check_graph(graph, capacity)
        return NativeSession(graph, capacity) if planned(graph) else HostSession(graph, capacity, kernels)

    def _run(self, graph: Graph, inputs: Mapping[str, Any]) -> np.ndarray:
        arrays = check_inputs(graph, inputs)
        rows = max((len(array) for array in arrays.values()), default=0)
        constants = {len(graph.tensors[node.tensor]) for node in graph.of(Constant)}
        if planned(graph) and constants <= {1, rows} and all(None in node.shape for node in graph.of(Input)):
            by_value = {node.value: arrays[node.name] for node in graph.of(Input)}
            integers = {node.value: by_value[node.value] for node in graph.of(Input) if _is_integer(node)}
            found = indices(graph, integers, rows)
            if found is not None:
                with _LOCK:
                    held = _PLANS.get(graph)
                    if held is None or held.capacity < rows:
                        held = _PLANS[graph] = GraphPlan(graph, rounded_capacity(rows, graph.max_tokens))
                    return held.run(by_value | found, rows)
        return run_reference(graph, inputs, kernels)


class NativeSession:
    """A session that runs as a plan; see :class:`lockstep.session.Session`.

    The graph is one that ``check_graph`` lets pass and that can be :func:`planned`.
    """

    def __init__(self, graph: Graph, capacity: int) -> None:
        self.length = 0
        self.capacity = capacity
        self._graph = graph
        (self._input,) = graph.of(Input)
        self._ids = np.zeros(capacity, np.int64)
        self._plans: dict[tuple[Logits, bool], GraphPlan] = {}
        self._caches: dict[Value, tuple[Cache, Cache]] = {}
        for node in graph.of(Attention):
            rows, scales = (capacity, node.kv_heads * node.head_dim), (capacity, node.kv_heads)
            keys, values = (Cache(np.zeros(rows, np.int8), np.zeros(scales, np.float32)) for _ in range(2))
            self._caches[node.value] = keys, values

    def extend(self, token_ids: np.ndarray, logits: Logits = "last") -> np.ndarray:
        ids = checked_ids(self, self._graph, token_ids)
        rows, total = len(ids), self.length + len(ids)
        self._ids[self.length : total] = ids  # nothing behind self.length counts, so a failure leaves no trace
        given = indices(self._graph, {self._input.value: self._ids[:total]}, rows)
        assert given is not None, "indices of a causal model have one for each token"
        result = self._plan(logits, rows).run(given, rows, self.length)
        self.length = total
        return result

    def truncate(self, length: int) -> None:
        HostSession.truncate(self, length)  # type: ignore[arg-type]

    def restore(self, length: int, caches: Mapping[Value, CacheRows]) -> None:
        """As :meth:`lockstep.session.HostSession.restore`."""
        for value, (keys, key_scales, values, value_scales) in caches.items():
            for cache, rows, scales in zip(
                self._caches[value], (keys, values), (key_scales, value_scales), strict=True
            ):
                cache.rows[:length], cache.scales[:length] = rows, scales
        self.length = length

    def close(self) -> None:
        self._caches.clear()
        self._plans.clear()
        self.length = self.capacity = 0

    def _plan(self, logits: Logits, rows: int) -> GraphPlan:
        key = logits, rows == 1
        if key not in self._plans or self._plans[key].capacity < rows:
            capacity = 1 if rows == 1 else rounded_capacity(rows, self.capacity)
            self._plans[key] = GraphPlan(self._graph, capacity, logits, self._caches)
        return self._plans[key]
