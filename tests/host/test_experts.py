"""Mixtures of experts in the numbers of the contract: near the float model, row by row, and only where chosen."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from lockstep.compiler.execute import DeviceExecutor
from lockstep.compiler.stages import split
from lockstep.evaluate import run_float, run_reference
from lockstep.experts import choose, route
from lockstep.graph import Dense, Expert, Experts, Graph, Input, Route
from lockstep.quantise import quantise
from lockstep_driver import Counters, open_device
from lockstep_hls import kernels
from lockstep_isa import operations
from support import assert_same_bits

FEATURES, HIDDEN, EXPERTS, TOP = 32, 48, 6, 2


def mixture(normalise: bool = True, seed: int = 3) -> Graph:
    """A router and its experts on ``float32[tokens, 32]``, float stage."""
    generator = np.random.default_rng(seed)
    tensors = {"router": generator.standard_normal((EXPERTS, FEATURES))}
    for number in range(EXPERTS):
        for name, shape in (("gate", (HIDDEN, FEATURES)), ("up", (HIDDEN, FEATURES)), ("down", (FEATURES, HIDDEN))):
            tensors[f"{name}{number}"] = generator.standard_normal(shape) / 6
    experts = tuple(Expert(f"gate{number}", f"up{number}", f"down{number}") for number in range(EXPERTS))
    nodes = (
        Input(0, "x", (None, FEATURES), "float32"),
        Dense(1, 0, "router", None, (0, EXPERTS)),
        Route(2, 1, TOP, normalise),
        Experts(3, 0, 2, experts, "silu"),
    )
    return Graph(nodes, 3, {name: array.astype(np.float32) for name, array in tensors.items()}, 64)


def rows(tokens: int) -> np.ndarray:
    return np.random.default_rng(tokens).standard_normal((tokens, FEATURES)).astype(np.float32)


@pytest.mark.parametrize("normalise", [True, False])
def test_int8_experts_come_close_to_float_ones(normalise: bool) -> None:
    graph = mixture(normalise)
    x = rows(40)
    wanted, got = run_float(graph, {"x": x}), run_reference(quantise(graph), {"x": x}, operations)
    # A token whose router is in doubt may go elsewhere after rounding: most must not.
    cosine = (wanted * got).sum(1) / np.linalg.norm(wanted, axis=1) / np.linalg.norm(got, axis=1)
    assert np.mean(cosine > 0.999) > 0.9


def test_a_token_has_the_same_bits_alone_and_among_others() -> None:
    graph = quantise(mixture())
    x = rows(17)
    together = run_reference(graph, {"x": x}, operations)
    assert_same_bits(np.vstack([run_reference(graph, {"x": row[None]}, operations) for row in x]), together)


def test_kernels_and_golden_operations_give_the_same_experts() -> None:
    graph, x = quantise(mixture()), rows(9)
    assert_same_bits(run_reference(graph, {"x": x}, kernels), run_reference(graph, {"x": x}, operations))


@pytest.mark.parametrize("tokens", [1, 5, 23])
def test_devices_run_the_experts_that_are_chosen(tokens: int) -> None:
    graph, x = quantise(mixture()), rows(tokens)
    host = [node for stage in split(graph) for node in stage.host]
    assert [type(node) for node in host if node.value in (2, 3)] == [Route, Experts]
    logits = run_reference(dataclasses.replace(graph, output=1), {"x": x}, operations)
    chosen, _ = route(graph.of(Route)[0], logits)
    with open_device("fast:tiny") as device:
        runs: list[Counters] = []
        (result,) = DeviceExecutor(device, runs.append).run(graph, [{"x": x}])
    assert_same_bits(result, run_reference(graph, {"x": x}, operations))
    # One program for the router, and one for each expert that some token chose.
    assert len(runs) == 1 + len(np.unique(chosen))


def test_experts_that_nobody_chooses_are_not_computed() -> None:
    class Counting:
        """The golden operations, noting the rows of every product."""

        def __init__(self) -> None:
            self.rows: list[int] = []

        def __getattr__(self, name: str) -> Any:
            return getattr(operations, name)

        def linear(self, q: Any, *rest: Any) -> Any:
            self.rows.append(len(q))
            return operations.linear(q, *rest)

    counting = Counting()
    run_reference(quantise(mixture()), {"x": rows(1)}, counting)
    assert counting.rows == [1] + [1] * 3 * TOP


def test_equal_scores_go_to_the_lower_number() -> None:
    node = Route(1, 0, TOP, True)
    logits = np.float32([[0, 2, 1, 2, 2, -0.0], [1, 1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(choose(node, logits), [[1, 3], [0, 1]])


@pytest.mark.parametrize("normalise", [True, False])
def test_weights_are_a_softmax(normalise: bool) -> None:
    logits = rows(20)[:, :EXPERTS] * 5
    ids, weights = route(Route(1, 0, TOP, normalise), logits)
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    wanted = np.take_along_axis(shares, ids, axis=1)
    if normalise:
        wanted /= wanted.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(weights, wanted, rtol=1e-5)
    assert (np.diff(weights, axis=1) <= 0).all()
