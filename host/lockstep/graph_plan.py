"""A graph as a plan of compiled operations (:mod:`lockstep_hls.plan`), with the memory of its values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from lockstep_hls.plan import Cache, Plan, Rows

from lockstep.errors import InputError
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
from lockstep.session import Logits, Step, plan

Caches = Mapping[Value, tuple[Cache, Cache]]

_INTEGERS = (Input, Indices)
_PLANNED = (
    *(Input, Constant, Indices, Gather, Add, Multiply, LayerNorm, RMSNorm, Rotary),
    *(Activation, Quantise, Linear, Attention),
)


def can_plan(graph: Graph) -> bool:
    """Whether a plan can run ``graph``: it knows every node, and every index is one of a table."""
    if not all(isinstance(node, _PLANNED) for node in graph):
        return False
    integers = {node.value for node in graph if is_integer(node)}
    readers = [node for node in graph if integers.intersection(node.inputs)]
    return graph.output not in integers and all(isinstance(node, Gather | Indices) for node in readers)


def is_integer(node: Node) -> bool:
    """Whether the value of ``node`` is ``int64[tokens]``."""
    return isinstance(node, Indices) or (
        isinstance(node, Input) and node.shape == (None,) and node.dtype.startswith("int")
    )


def row_indices(graph: Graph, integers: Mapping[Value, np.ndarray], rows: int) -> dict[Value, np.ndarray] | None:
    """What :meth:`GraphPlan.run` takes for the integers of the last ``rows`` tokens, from the integer inputs of the
    whole sequence; none if there is not one for each token.

    Raises ``InputError`` for an index that is not in its table.
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


def new_caches(graph: Graph, capacity: int) -> dict[Value, tuple[Cache, Cache]]:
    """Empty caches for ``capacity`` tokens, of keys and of values, by the value of their attention node."""

    def empty(node: Attention) -> Cache:
        return Cache.empty(node.kv_heads, capacity, node.head_dim)

    return {node.value: (empty(node), empty(node)) for node in graph.of(Attention)}


class GraphPlan:
    """The plan of a graph that :func:`can_plan`. It holds tensors of the graph, but not the graph.

    Parameters
    ----------
    capacity : most new tokens of a run.
    caches : keys and values of earlier tokens, with room for all.
    logits : as for :meth:`lockstep.session.Session.extend`.

    A run writes to memory of the plan and to the caches: one at a time.
    """

    def __init__(self, graph: Graph, capacity: int, caches: Caches, logits: Logits = "all") -> None:
        self.capacity = capacity
        builder = _Builder(graph, capacity, caches)
        for step in plan(graph, logits):
            builder.values[step.node.value] = builder.build(step)
            for value in step.drop:
                builder.release(builder.values[value])
        self._plan = builder.plan
        self._inputs = {node.value: builder.values[node.value][0] for node in graph if isinstance(node, _INTEGERS)}
        (self._output,) = builder.values[graph.output]

    def run(self, given: Mapping[Value, np.ndarray], rows: int, first: int = 0) -> np.ndarray:
        """The output for ``rows`` new tokens from position ``first`` on.

        given : for each input ``float32[rows, features]``, or ``int64[rows, 1]`` of integers and indices, by value.
        """
        for value, array in given.items():
            self._inputs[value].memory[:rows] = array
        self._plan.run(rows, first)
        return self._output.memory[: rows if self._output.whole else 1].copy()


class _Builder:
    """Makes the steps of a plan; ``values`` holds what its nodes give: two in case of ``Quantise``, else one."""

    def __init__(self, graph: Graph, capacity: int, caches: Caches) -> None:
        self.plan = Plan()
        self.values: dict[Value, tuple[Rows, ...]] = {}
        self._graph, self._capacity, self._caches = graph, capacity, caches
        self._free: list[np.ndarray] = []
        self._taken: dict[int, np.ndarray] = {}

    def build(self, step: Step) -> tuple[Rows, ...]:
        node, last, plan, tensor = step.node, step.last, self.plan, self._tensor
        read = [self.values[value] for value in node.inputs]
        x = read[0][0] if read else None
        if isinstance(node, _INTEGERS):
            return (self._given(node),)
        if isinstance(node, Constant):
            rows = np.ascontiguousarray(tensor(node.tensor), np.float32)
            return (Rows(rows, len(rows) > 1),)
        assert x is not None
        if isinstance(node, Quantise):
            q, s = self._take(last, x.columns, np.int8), self._take(last, 1)
            plan.quantise_rows(x, tensor(node.prescale), q, s, last=last)
            return q, s
        y = self._take(last, self._columns(node, x))
        match node:
            case Linear():
                weight = tensor(node.weight)
                weight.flags.writeable = False  # so that all plans share a packed copy
                q, s = read[0]
                plan.linear(q, s, weight, tensor(node.scales), tensor(node.bias), y, last=last)
            case Attention():
                keys, values = self._caches[node.value]
                plan.keep(read[1][0], keys)
                plan.keep(read[2][0], values)
                plan.attention(
                    x, keys, values, y, heads=node.heads, tile=node.tile, scale=node.scale, causal=node.causal,
                    window=node.window, last=last,
                )  # fmt: skip
            case Gather():
                plan.gather(tensor(node.table), x, y, last=last)
            case Add():
                plan.add(x, read[1][0], y, last=last)
            case Multiply():
                plan.multiply(x, read[1][0], y, last=last)
            case LayerNorm():
                plan.layer_norm(x, tensor(node.gamma), tensor(node.beta), node.eps, y, last=last)
            case RMSNorm():
                plan.rms_norm(x, tensor(node.gamma), node.eps, node.groups, y, last=last)
            case Rotary():
                plan.rotary(x, tensor(node.cos), tensor(node.sin), node.heads, node.interleaved, y, last=last)
            case Activation():
                plan.apply_function(node.function, x, y, last=last)
        return (y,)

    def release(self, values: tuple[Rows, ...]) -> None:
        """Let later values have the memory of these; inputs and parameters keep theirs."""
        for value in values:
            block = self._taken.pop(value.memory.ctypes.data, None)
            if block is not None:
                self._free.append(block)

    def _tensor(self, name: str | None) -> Any:
        return None if name is None else self._graph.tensors[name]

    def _columns(self, node: Node, x: Rows) -> int:
        if isinstance(node, Linear):
            return len(self._tensor(node.weight))
        return self._tensor(node.table).shape[1] if isinstance(node, Gather) else x.columns

    def _given(self, node: Node) -> Rows:
        if is_integer(node):
            return Rows(np.zeros((self._capacity, 1), np.int64), True)
        assert isinstance(node, Input)
        return Rows(np.zeros((self._capacity, *(size for size in node.shape if size is not None)), np.float32), True)

    def _take(self, last: bool, columns: int, dtype: type = np.float32) -> Rows:
        rows = 1 if last else self._capacity
        size = rows * columns * np.dtype(dtype).itemsize
        fitting = [block for block in self._free if block.nbytes >= size]
        if fitting:
            block = min(fitting, key=lambda block: block.nbytes)
            self._free = [other for other in self._free if other is not block]
        else:
            block = np.zeros(size, np.uint8)
        memory: np.ndarray = block[:size].view(dtype).reshape(rows, columns)
        self._taken[memory.ctypes.data] = block
        return Rows(memory, not last)
