"""Sessions on the host: the same bits however a text is cut, on ``golden`` and on ``cpu``."""

from __future__ import annotations

import dataclasses
import gc
import tracemalloc
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from lockstep.bench.random_models import LlamaShape, llama_graph, random_weights
from lockstep.errors import InputError, ModelError, SequenceLengthError
from lockstep.evaluate import run_reference
from lockstep.executors import executor
from lockstep.graph import Attention, Fallback, Gather, Graph, Indices, Node, PositionBias
from lockstep.native import NativeExecutor
from lockstep.session import HostSession, Session
from lockstep_hls import kernels
from lockstep_isa import operations
from support import assert_same_bits

SHAPE = LlamaShape(
    vocabulary=61, features=32, hidden=48, layers=3, heads=4, kv_heads=2, max_tokens=300, tile=16
)  # fmt: skip
SHAPES = {
    "grouped": SHAPE,
    "windowed": dataclasses.replace(SHAPE, window=11),
    "every head its own, normalised": dataclasses.replace(SHAPE, kv_heads=4, head_norm=True),
    "one tile": dataclasses.replace(SHAPE, tile=512),
}
Host = Callable[[Graph, int], Session]
HOSTS: dict[str, Host] = {
    "golden": lambda graph, capacity: HostSession(graph, capacity, operations),
    "cpu, node by node": lambda graph, capacity: HostSession(graph, capacity, kernels),
    "cpu": lambda graph, capacity: NativeExecutor().open_session(graph, capacity),
}
TOKENS = 50  # tiles begin at 16, 32 and 48
IDS = np.random.default_rng(1).integers(0, SHAPE.vocabulary, TOKENS)

hosts = pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)
shapes = pytest.mark.parametrize("shape", SHAPES)


@cache
def graph(shape: str = "grouped") -> Graph:
    return llama_graph(SHAPES[shape], random_weights(SHAPES[shape]))


@cache
def whole(shape: str = "grouped") -> np.ndarray:
    """The golden logits of all tokens, computed without a cache."""
    return run_reference(graph(shape), {"input_ids": IDS}, operations)


def with_node(changed: Node) -> Graph:
    """The graph with another node in the place of the one with the same value."""
    nodes = tuple(changed if node.value == changed.value else node for node in graph())
    return dataclasses.replace(graph(), nodes=nodes)


def in_pieces(session: Session, ids: np.ndarray, *cuts: int) -> np.ndarray:
    return np.vstack([session.extend(part, "all") for part in np.split(ids, cuts)])


@shapes
@hosts
def test_a_text_at_once_in_pieces_and_token_by_token_has_the_same_bits(host: Host, shape: str) -> None:
    for cuts in ((), (7, 33), (15, 16, 17, 49), range(1, TOKENS)):
        assert_same_bits(in_pieces(host(graph(shape), TOKENS), IDS, *cuts), whole(shape))


@shapes
@hosts
def test_the_last_tokens_logits_are_those_of_all(host: Host, shape: str) -> None:
    session = host(graph(shape), TOKENS)
    assert_same_bits(session.extend(IDS[:20]), whole(shape)[19:20])
    assert_same_bits(session.extend(IDS[20:21]), whole(shape)[20:21])
    assert_same_bits(session.extend(IDS[21:]), whole(shape)[-1:])


@hosts
def test_what_was_truncated_leaves_no_trace(host: Host) -> None:
    session = host(graph(), TOKENS)
    session.extend(IDS[:10])
    session.extend(IDS[::-1][:37])
    session.truncate(10)
    assert session.length == 10
    assert_same_bits(session.extend(IDS[10:], "all"), whole()[10:])
    session.truncate(0)
    assert_same_bits(session.extend(IDS, "all"), whole())


@hosts
def test_a_refused_call_changes_nothing(host: Host) -> None:
    session = host(graph(), TOKENS)
    session.extend(IDS[:40])
    refused: list[tuple[Any, type[ModelError], str]] = [
        (IDS[:0], SequenceLengthError, "no token to add"),
        (IDS[:11], SequenceLengthError, "has 40 tokens and room for 50; 11 more do not fit"),
        (np.array([3, 61]), InputError, "index 61 is not in the table"),
        (np.array([0.5]), InputError, r"int\[n\], not float64\[1\]"),
        (IDS[None, :3], InputError, r"int\[n\], not int64\[1, 3\]"),
    ]
    for ids, kind, message in refused:
        with pytest.raises(kind, match=message):
            session.extend(ids)
        assert session.length == 40
    for length in (-1, 41):
        with pytest.raises(SequenceLengthError, match=f"cannot keep {length} tokens of a session that has 40"):
            session.truncate(length)
    assert_same_bits(session.extend(IDS[40:], "all"), whole()[40:])


@hosts
def test_sessions_of_one_graph_do_not_share_a_cache(host: Host) -> None:
    first, second = (host(graph(), TOKENS) for _ in range(2))
    for start in range(0, TOKENS, 10):
        assert_same_bits(first.extend(IDS[start : start + 10], "all"), whole()[start : start + 10])
        second.extend(IDS[::-1][start : start + 10])


def test_a_capacity_without_positions_is_refused() -> None:
    for capacity in (0, SHAPE.max_tokens + 1):
        with pytest.raises(SequenceLengthError, match=f"session of {capacity} tokens .* positions for 1 to 300"):
            HostSession(graph(), capacity, kernels)


def test_a_graph_that_cannot_be_cut_is_refused_with_the_reason() -> None:
    attention = graph().of(Attention)[0]
    with pytest.raises(ModelError, match="random-llama is no causal language model"):
        HostSession(with_node(dataclasses.replace(attention, causal=False)), TOKENS, kernels)
    gather = graph().of(Gather)[0]
    fallback = Fallback(gather.value, "aten.sort", "no rule", (gather.indices,), lambda ids: ids)
    with pytest.raises(ModelError, match=r"runs aten.sort in PyTorch \(no rule\)"):
        HostSession(with_node(fallback), TOKENS, kernels)


def positions_and_bias() -> Graph:
    """The graph with learnt positions in the place of token embeddings, and a bias on the scores of its attention."""
    nodes = []
    for node in graph():
        if isinstance(node, Gather):
            nodes.append(Indices(1000, (node.indices,), lambda ids: np.arange(len(ids)) % 7 + 3 * (ids % 5)))
            nodes.append(PositionBias(1001, (1000,), bias, SHAPE.heads))
            nodes.append(dataclasses.replace(node, indices=1000))
        else:
            nodes.append(dataclasses.replace(node, bias=1001) if isinstance(node, Attention) else node)
    return dataclasses.replace(graph(), nodes=tuple(nodes))


def bias(indices: np.ndarray) -> np.ndarray:
    distance = np.abs(np.arange(len(indices))[:, None] - np.arange(len(indices)))
    return (-np.arange(SHAPE.heads)[:, None, None] * distance / 8 + (indices % 3)[None, None]).astype(np.float32)


def test_indices_and_biases_are_those_of_absolute_positions() -> None:
    special = positions_and_bias()
    expected = run_reference(special, {"input_ids": IDS}, operations)
    assert (expected != whole()).any()
    for host in HOSTS.values():
        assert_same_bits(in_pieces(host(special, TOKENS), IDS, 5, 31, 32), expected)
        session = host(special, TOKENS)
        session.extend(IDS[:31])
        assert_same_bits(session.extend(IDS[31:]), expected[-1:])


@pytest.mark.parametrize("kind", ["cpu, node by node", "cpu"])
def test_memory_stays_flat_while_tokens_are_generated(kind: str) -> None:
    session = HOSTS[kind](graph(), 300)

    def generate(tokens: int) -> int:
        """Bytes that arrays hold after so many more tokens."""
        for _ in range(tokens):
            session.extend(IDS[:1])
        gc.collect()
        arrays = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
        return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([arrays]).traces)

    tracemalloc.start()
    try:
        before = generate(60)
        grown = generate(240) - before
    finally:
        tracemalloc.stop()
    assert grown < 240 * 32, f"240 tokens left {grown} bytes"


@pytest.mark.parametrize("uri", ["cpu", "golden"])
def test_executors_open_sessions(uri: str) -> None:
    with executor(uri) as opened:
        session = opened.open_session(graph(), TOKENS)
        assert (session.length, session.capacity) == (0, TOKENS)
        assert_same_bits(session.extend(IDS, "all"), whole())
        session.close()


def test_attention_is_close_to_pytorchs() -> None:
    """The shape of the graph itself, against the model that it imitates."""
    import torch
    from generation_peers import torch_model

    weights = random_weights(SHAPE)
    with torch.no_grad():
        expected = torch_model(SHAPE, weights)(torch.from_numpy(IDS)[None]).logits[0].numpy()
    similarity = (whole() * expected).sum(1) / np.linalg.norm(whole(), axis=1) / np.linalg.norm(expected, axis=1)
    assert similarity.min() > 0.99
