"""The ``cpu`` device: graphs run as plans of compiled operations, a whole model in one call.

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

from lockstep.cache_policy import WHOLE, CachePolicy
from lockstep.evaluate import check_inputs, run_reference
from lockstep.eviction import Slots
from lockstep.graph import Constant, Graph, Input, Value
from lockstep.graph_plan import GraphPlan, can_plan, is_integer, new_caches, row_indices
from lockstep.session import CacheRows, HostSession, Logits, Session, check_graph, checked_ids

#: Fewest rows to make a plan for; others are made for a power of two times that, so that few serve many lengths.
FEWEST_ROWS = 16

#: The plan of each graph for whole sequences, and the lock of its memory.
_PLANS: weakref.WeakKeyDictionary[Graph, GraphPlan] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


@dataclass(frozen=True)
class NativeExecutor:
    """The ``cpu`` device; see :class:`lockstep.model.GeneratingExecutor`."""

    def run(self, graph: Graph, sequences: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
        return [_run(graph, inputs) for inputs in sequences]

    def open_session(self, graph: Graph, capacity: int, policy: CachePolicy = WHOLE) -> Session:
        check_graph(graph, capacity, policy)
        if policy == WHOLE and can_plan(graph):
            return NativeSession(graph, capacity)
        return HostSession(graph, capacity, kernels, policy)


def _run(graph: Graph, inputs: Mapping[str, Any]) -> np.ndarray:
    arrays = check_inputs(graph, inputs)
    given = _rows_of(graph, {node.value: arrays[node.name] for node in graph.of(Input)})
    if given is None:
        return run_reference(graph, inputs, kernels)
    rows = max(len(array) for array in given.values())
    with _LOCK:
        found = _PLANS.get(graph)
        if found is None or found.capacity < rows:
            capacity = _rounded(rows, graph.max_tokens)
            found = _PLANS[graph] = GraphPlan(graph, capacity, new_caches(graph, capacity))
        return found.run(given, rows)


def _rows_of(graph: Graph, arrays: Mapping[Value, np.ndarray]) -> dict[Value, np.ndarray] | None:
    """What a plan takes for these inputs, or none if no plan can run them."""
    if not can_plan(graph) or any(node.shape.count(None) != 1 or node.shape[0] for node in graph.of(Input)):
        return None
    (rows,) = {len(array) for array in arrays.values()}
    if any(len(graph.tensors[node.tensor]) not in (1, rows) for node in graph.of(Constant)):
        return None
    integers = {node.value: arrays[node.value] for node in graph.of(Input) if is_integer(node)}
    indices = row_indices(graph, integers, rows)
    return None if indices is None else {**arrays, **indices}


def _rounded(rows: int, most: int) -> int:
    capacity = FEWEST_ROWS
    while capacity < rows:
        capacity *= 2
    return max(rows, min(capacity, most))


class NativeSession:
    """A session that runs as a plan; see :class:`lockstep.session.Session`.

    The graph is one that ``check_graph`` lets pass, and that a plan can run. Its caches take 2 * kv_heads *
    (head_dim + 4) bytes a token and attention node.
    """

    def __init__(self, graph: Graph, capacity: int) -> None:
        self.length = 0
        self.capacity = capacity
        self.slots = Slots(capacity)
        self._graph = graph
        (self._input,) = graph.of(Input)
        self._ids = np.zeros(capacity, np.int64)
        self._caches = new_caches(graph, capacity)
        self._plans: dict[tuple[Logits, bool], GraphPlan] = {}

    def extend(self, token_ids: np.ndarray, logits: Logits = "last") -> np.ndarray:
        ids = checked_ids(self, self._graph, token_ids)
        rows, total = len(ids), self.length + len(ids)
        self._ids[self.length : total] = ids  # nothing behind self.length counts, so a failure leaves no trace
        given = row_indices(self._graph, {self._input.value: self._ids[:total]}, rows)
        assert given is not None, "indices of a causal model have one for each token"
        result = self._plan(logits, rows).run(given, rows, self.length)
        self.length = total
        return result

    def truncate(self, length: int) -> None:
        self.slots.check_truncation(self.length, length)
        self.length = length

    def restore(self, length: int, caches: Mapping[Value, CacheRows]) -> None:
        """As :meth:`lockstep.session.HostSession.restore`."""
        for value, given in caches.items():
            for cache, rows, scales in zip(self._caches[value], given[::2], given[1::2], strict=True):
                heads, _, d = cache.rows.shape
                cache.rows[:, :length] = rows.reshape(length, heads, d).swapaxes(0, 1)
                cache.scales[:, :length] = scales.T
        self.length = length

    def close(self) -> None:
        self._caches.clear()
        self._plans.clear()
        self.length = self.capacity = 0

    def _plan(self, logits: Logits, rows: int) -> GraphPlan:
        key = logits, rows == 1
        if key not in self._plans or self._plans[key].capacity < rows:
            capacity = 1 if rows == 1 else _rounded(rows, self.capacity)
            self._plans[key] = GraphPlan(self._graph, capacity, self._caches, logits)
        return self._plans[key]
