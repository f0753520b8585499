"""The ``cpu`` device: plans against node-by-node execution, bit for bit, and what becomes no plan."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from architectures import CASES, captured, example_inputs
from lockstep.bench.random_models import LlamaShape, llama_graph, random_weights
from lockstep.errors import InputError
from lockstep.evaluate import run_reference
from lockstep.executors import executor
from lockstep.graph import Experts, Fallback, Gather, Graph, Indices, PositionBias
from lockstep.graph_plan import can_plan
from lockstep.native import NativeExecutor, NativeSession
from lockstep.quantise import quantise
from lockstep.session import HostSession
from lockstep_hls import kernels
from lockstep_isa import operations
from support import assert_same_bits

SHAPE = LlamaShape(vocabulary=61, features=32, hidden=48, layers=2, heads=4, kv_heads=2, max_tokens=300, tile=16)
CPU = NativeExecutor()


def llama() -> Graph:
    return llama_graph(SHAPE, random_weights(SHAPE))


@pytest.mark.parametrize("kind", CASES)
def test_every_architecture_has_the_bits_of_its_nodes(kind: str) -> None:
    graph = quantise(captured(kind)[1])
    for tokens in (40, 7, 33, 1):
        inputs = {name: tensor[0].numpy() for name, tensor in example_inputs(kind, tokens).items()}
        assert_same_bits(CPU.run(graph, [inputs])[0], run_reference(graph, inputs, kernels))


@pytest.mark.parametrize("kind", CASES)
def test_what_a_plan_does_not_know_runs_node_by_node(kind: str) -> None:
    graph = quantise(captured(kind)[1])
    unknown = any(graph.of(node) for node in (Fallback, Experts, PositionBias))
    assert can_plan(graph) != unknown
    if graph.causal and not graph.of(Fallback):
        session = CPU.open_session(graph, 30)
        assert isinstance(session, HostSession if unknown else NativeSession)


def test_a_plan_has_golden_bits() -> None:
    graph, ids = llama(), np.arange(50) % SHAPE.vocabulary
    found = CPU.run(graph, [{"input_ids": ids[:20]}, {"input_ids": ids}])
    for count, logits in zip((20, 50), found, strict=True):
        assert_same_bits(logits, run_reference(graph, {"input_ids": ids[:count]}, operations))


def test_a_session_goes_on_from_given_keys_and_values() -> None:
    graph, ids = llama(), np.arange(40) % SHAPE.vocabulary
    earlier = HostSession(graph, 40, kernels)
    earlier.extend(ids[:25])
    caches = {
        value: (*keys.first(25), *values.first(25)) for value, (keys, values) in earlier._caches.items()
    }  # fmt: skip
    session = NativeSession(graph, 40)
    session.restore(25, caches)
    assert_same_bits(session.extend(ids[25:], "all"), earlier.extend(ids[25:], "all"))


def test_an_index_outside_its_table_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"index 61 is not in the table 'model\.embed_tokens\.weight', which has 61"):
        CPU.run(llama(), [{"input_ids": np.array([1, 61])}])


def test_an_index_for_all_tokens_runs_node_by_node() -> None:
    graph = llama()
    (gather,) = graph.of(Gather)
    single = Indices(1000, (gather.indices,), lambda ids: ids[:1])
    nodes = []
    for node in graph:
        nodes += [single, dataclasses.replace(node, indices=1000)] if node is gather else [node]
    changed = dataclasses.replace(graph, nodes=tuple(nodes))
    inputs = {"input_ids": np.array([4, 5, 6])}
    assert_same_bits(CPU.run(changed, [inputs])[0], run_reference(changed, inputs, kernels))


def test_a_plan_goes_with_its_graph() -> None:
    graph = llama()
    CPU.run(graph, [{"input_ids": np.array([1, 2])}])
    tensor = weakref.ref(graph.tensors["lm_head.weight"])
    del graph
    gc.collect()
    assert tensor() is None


def test_callers_in_several_threads_do_not_disturb_each_other() -> None:
    graph = llama()
    texts = [np.random.default_rng(i).integers(0, SHAPE.vocabulary, 5 + 7 * i) for i in range(6)]
    expected = [run_reference(graph, {"input_ids": ids}, kernels) for ids in texts]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(5):
            found = list(pool.map(lambda ids: CPU.run(graph, [{"input_ids": ids}])[0], texts))
            for actual, wanted in zip(found, expected, strict=True):
                assert_same_bits(actual, wanted)


def test_an_executor_takes_as_many_threads_as_it_is_told() -> None:
    before = kernels.threads()
    try:
        for threads in (3, 1):
            with executor("cpu", threads=threads):
                assert kernels.threads() == threads
        with pytest.raises(ValueError, match="threads = 0 must be at least 1"):
            executor("cpu", threads=0)
    finally:
        kernels.set_threads(before)
