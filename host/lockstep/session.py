"""Sessions: one sequence of a causal language model with its key-value cache.

A graph that was captured without a cache serves here as it is. Its operations work row by row, so they run on the new
tokens alone; attention reads the cache. By the contract a token's logits have the same bits whether its text came token
by token, in pieces or at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from lockstep_isa import int4_cache
from lockstep_isa.attention import key_importance, visible
from lockstep_isa.numerics import add
from lockstep_isa.selectors import attention_selected

from lockstep.cache_policy import WHOLE, CachePolicy, check_policy
from lockstep.errors import InputError, ModelError, SequenceLengthError
from lockstep.evaluate import Operations, attend, quantise_heads, run_node
from lockstep.eviction import Piece, Slots
from lockstep.graph import (
    Attention,
    Constant,
    Fallback,
    Graph,
    Indices,
    Input,
    Node,
    PositionBias,
    Value,
)

Logits = Literal["last", "all"]

#: Keys and values of one attention node from position 0 on: int8[n, kv_heads * head_dim] and float32[n, kv_heads] of
#: the keys, and of the values.
CacheRows = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


class Session(Protocol):
    """One sequence with its key-value cache.

    Attributes
    ----------
    length : tokens in the cache.
    capacity : the most tokens that it can take.
    slots : which of them are in the cache.
    """

    slots: Slots
    length: int
    capacity: int

    def extend(self, token_ids: np.ndarray, logits: Logits = "last") -> np.ndarray:
        """Append ``token_ids``: int[n] and return their logits: ``float32[1, vocabulary]`` of the last one, or
        ``float32[n, vocabulary]`` of all.

        Raises ``SequenceLengthError`` for no token or more than fit, ``InputError`` for ids that are none; the
        session is then as it was.
        """
        ...

    def truncate(self, length: int) -> None:
        """Forget all tokens but the first ``length``; all or none where a token has been given up."""
        ...

    def close(self) -> None:
        """Give the cache back; the session is of no use afterwards."""
        ...


@dataclass(frozen=True)
class Step:
    """A node of a session's plan.

    Attributes
    ----------
    last : only the row of the last token is computed.
    drop : values that nothing reads afterwards.
    """

    node: Node
    last: bool
    drop: tuple[Value, ...]


def plan(graph: Graph, logits: Logits) -> list[Step]:
    """The nodes of ``graph`` in order. For the last token's logits, everything behind the last attention, and its
    queries, is computed for the last token alone.
    """
    everywhere = {graph.output} if logits == "all" else set[Value]()
    for node in reversed(graph.nodes):
        if isinstance(node, Attention):
            everywhere.update(node.inputs[1:3])  # keys and values are wanted of every token
        if node.value in everywhere:
            everywhere.update(node.inputs)
    last_use = {value: node for node in graph for value in node.inputs}
    return [
        Step(
            node,
            node.value not in everywhere,
            tuple(value for value in dict.fromkeys(node.inputs) if last_use[value] is node and value != graph.output),
        )
        for node in graph
    ]


class HostSession:
    """A session whose operations run on the host, in a module such as ``lockstep_hls.kernels``; see :class:`Session`.

    Parameters
    ----------
    graph : the contract stage of a causal language model.
    capacity : the most tokens of the sequence. policy : how its cache is treated. A slot has
        2 * kv_heads * (head_dim + 4) bytes an attention node.

    Raises
    ------
    ModelError
        if the graph cannot be run piece by piece, or its cache not be treated so.
    SequenceLengthError
        if the model has no positions for ``capacity`` tokens.
    """

    def __init__(
        self,
        graph: Graph,
        capacity: int,
        operations: Operations | Any,
        policy: CachePolicy = WHOLE,
    ) -> None:
        check_graph(graph, capacity, policy)
        self._selector = policy.selector
        # What makes integers of keys, and of values.
        self._quantise = (operations.quantise_rows,) * 2
        if policy.bits == 4:
            self._quantise = int4_cache.quantise_keys, int4_cache.quantise_values
        self.slots = Slots(capacity, policy.eviction)
        self.length = 0
        self.capacity = capacity
        self._graph = graph
        self._operations = operations
        (self._input,) = graph.of(Input)
        self._plans = {"last": plan(graph, "last"), "all": plan(graph, "all")}
        self._ids = np.zeros(capacity, self._input.dtype)
        held = self.slots.held
        self._caches = {node.value: (_Cache(node, held), _Cache(node, held)) for node in graph.of(Attention)}
        #: float32[tokens, slots seen]: what each token of the piece at hand gave to keys, if that is asked for.
        self.importance = np.zeros((0, 0), np.float32)

    def extend(self, token_ids: np.ndarray, logits: Logits = "last") -> np.ndarray:
        ids = checked_ids(self, self._graph, token_ids)
        total = self.length + len(ids)
        self._ids[self.length : total] = ids  # nothing behind self.length counts, so a failure leaves no trace
        results = []
        while self.length < total:
            piece = self.slots.place(self.length, total - self.length)
            # What is weighed is the attention of every token.
            found = self._extend(piece, "all" if self.slots.weighs else logits)
            results.append(found if logits == "all" else found[-1:])
            self.length += piece.count
        return np.concatenate(results) if logits == "all" else results[-1]

    def _extend(self, piece: Piece, logits: Logits) -> np.ndarray:
        """The logits of new tokens that share a turn."""
        self.begin(piece)
        values: dict[Value, Any] = {}
        for step in self._plans[logits]:
            values[step.node.value] = self._run(step, values, piece)
            for value in step.drop:
                del values[value]
        if self.slots.weighs:
            self.slots.credit(self.importance)
        return values[self._graph.output]

    def begin(self, piece: Piece) -> None:
        """New tokens come, whose attentions follow one behind the other."""
        self.importance = np.zeros((piece.count, piece.seen), np.float32)

    def truncate(self, length: int) -> None:
        self.slots.check_truncation(self.length, length)
        self.length = length

    def restore(self, length: int, caches: Mapping[Value, CacheRows]) -> None:
        """Begin behind ``length`` tokens whose keys and values are given, by the value of their attention node: of the
        last ones, as many as the cache holds.
        """
        for given, *_ in caches.values():
            self.slots.restore(length, len(given))
        for value, (keys, key_scales, values, value_scales) in caches.items():
            own_keys, own_values = self._caches[value]
            own_keys.append(0, keys, key_scales)
            own_values.append(0, values, value_scales)
        self.length = length

    def close(self) -> None:
        self._caches.clear()
        self.length = self.capacity = 0

    def _run(self, step: Step, values: dict[Value, Any], piece: Piece) -> Any:
        node, total = step.node, piece.first + piece.count
        rows = 1 if step.last else piece.count
        if isinstance(node, Input):
            return _Integers(self._ids[:total])
        if isinstance(node, Indices | PositionBias):
            whole = node.function(*(values[value].all for value in node.inputs))
            return _Integers(whole) if isinstance(node, Indices) else whole
        if isinstance(node, Constant):
            return self._graph.tensors[node.tensor]
        if isinstance(node, Attention):
            return self.attend(node, values, rows, piece)
        given = [_last_rows(values[value], rows) for value in node.inputs]
        return run_node(self._graph, node, given, self._operations, total - rows)

    def attend(self, node: Attention, values: Mapping[Value, Any], rows: int, piece: Piece) -> np.ndarray:
        """One attention of the last ``rows`` of the piece's tokens, with their keys and values appended before."""
        caches, seen = self._caches[node.value], piece.seen
        for cache, value, quantise in zip(caches, node.inputs[1:3], self._quantise, strict=True):
            cache.append(piece.slot, *quantise_heads(values[value], node, quantise))
        bias = None if node.bias is None else np.ascontiguousarray(values[node.bias][:, seen - rows :])
        keys, held = (cache.first(seen) for cache in caches)
        q, positions = _last_rows(values[node.q], rows), np.arange(seen - rows, seen)
        if self.slots.weighs:
            shown = visible(positions, seen, causal=True)
            weights = key_importance(q, shown, *keys, held[1], scale=node.scale)
            self.importance = add(self.importance, weights)
        if self._selector is not None:
            shown = visible(positions, seen, node.causal, node.window)
            found, _ = attention_selected(
                *(q, shown, *keys, *held, self._selector),
                tile=node.tile,
                scale=node.scale,
                attend=self._operations.attention_cached,
            )
            return found
        return attend(node, q, positions, keys, held, bias, self._operations)


class _Cache:
    """Quantised keys or values of one attention node, by position."""

    def __init__(self, node: Attention, capacity: int) -> None:
        self.rows = np.zeros((capacity, node.kv_heads * node.head_dim), np.int8)
        self.scales = np.zeros((capacity, node.kv_heads), np.float32)

    def append(self, first: int, rows: np.ndarray, scales: np.ndarray) -> None:
        self.rows[first : first + len(rows)] = rows
        self.scales[first : first + len(rows)] = scales

    def first(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        return self.rows[:length], self.scales[:length]


@dataclass(frozen=True)
class _Integers:
    """Integers of all tokens so far. Those of a token may depend on where it stands, so they are computed anew."""

    all: np.ndarray


def _last_rows(value: Any, rows: int) -> Any:
    """The last ``rows`` rows; a single row is for every token."""
    if isinstance(value, tuple):
        return tuple(_last_rows(part, rows) for part in value)
    if isinstance(value, _Integers):
        value = value.all
    return value if len(value) <= rows else value[-rows:]


def check_graph(graph: Graph, capacity: int, policy: CachePolicy = WHOLE) -> None:
    """Raise ``ModelError`` unless ``graph`` can be run piece by piece, and its cache be treated as asked, and
    ``SequenceLengthError`` unless it has positions for ``capacity`` tokens.
    """
    if not graph.causal:
        raise ModelError(
            f"{graph.source} is no causal language model, so it cannot generate; run its graph on whole sequences"
        )
    if parts := graph.of(Fallback):
        raise ModelError(
            f"{graph.source} runs {parts[0].name} in PyTorch ({parts[0].reason}), which cannot be done piece by piece;"
            " run its graph on whole sequences"
        )
    for node in graph.of(Constant):
        if len(graph.tensors[node.tensor]) != 1:
            raise ModelError(
                f"{graph.source} has the parameter {node.tensor!r} with a row for each token, which cannot be taken "
                "piece by piece; run its graph on whole sequences"
            )
    if not 1 <= capacity <= graph.max_tokens:
        raise SequenceLengthError(
            f"a session of {capacity} tokens is not possible: the model has positions for 1 to {graph.max_tokens}"
        )
    check_policy(graph, policy)


def checked_ids(session: Session, graph: Graph, token_ids: np.ndarray) -> np.ndarray:
    """``token_ids`` as an array, if ``session`` can take them; raises ``InputError`` or ``SequenceLengthError``."""
    ids = np.asarray(token_ids)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise InputError(f"token ids are int[n], not {ids.dtype}{list(ids.shape)}")
    if not len(ids):
        raise SequenceLengthError("there is no token to add; give at least one")
    if session.length + len(ids) < graph.min_tokens:
        raise SequenceLengthError(
            f"the session would have {session.length + len(ids)} tokens, but the model can only be captured for "
            f"{graph.min_tokens} or more; begin with a longer text"
        )
    if session.length + len(ids) > session.capacity:
        raise SequenceLengthError(
            f"the session has {session.length} tokens and room for {session.capacity}; {len(ids)} more do not fit: "
            "open one with a greater capacity, or truncate it"
        )
    return ids
