"""Compiled graphs give the bits of the contract, whatever the shapes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lockstep.compiler.allocation import CapacityError, Pieces, Ring
from lockstep.compiler.execute import DeviceExecutor
from lockstep.compiler.layout import from_panels, to_panels
from lockstep.evaluate import run_reference
from lockstep.graph import Activation, Add, Attention, Graph, Input, LayerNorm, Linear, Quantise
from lockstep_driver import open_device
from lockstep_isa import operations as golden
from support import assert_same_bits


def encoder(
    rng: np.random.Generator, features: int, heads: int, middle: int, prescale: bool, norm_first: bool
) -> Graph:
    """One transformer layer with random parameters; features is a multiple of heads."""
    tensors: dict[str, np.ndarray] = {}

    def linear(name: str, outputs: int, inputs: int) -> tuple[str, str, str]:
        tensors[f"{name}.w"] = rng.integers(-128, 128, (outputs, inputs)).astype(np.int8)
        tensors[f"{name}.s"] = rng.uniform(1e-4, 2e-3, outputs).astype(np.float32)
        tensors[f"{name}.b"] = rng.normal(0, 0.1, outputs).astype(np.float32)
        return f"{name}.w", f"{name}.s", f"{name}.b"

    def norm(value: int, x: int, name: str) -> LayerNorm:
        tensors[f"{name}.g"] = rng.uniform(0.5, 1.5, features).astype(np.float32)
        tensors[f"{name}.b"] = rng.normal(0, 0.1, features).astype(np.float32)
        return LayerNorm(value, x, f"{name}.g", f"{name}.b", 1e-5)

    def scale(name: str, count: int) -> str | None:
        if not prescale:
            return None
        tensors[name] = rng.uniform(0.5, 2.0, count).astype(np.float32)
        return name

    x = 0
    nodes: list = [Input(0, "x", (None, features), "float32")]
    attended = x
    if norm_first:
        nodes.append(norm(1, x, "n0"))
        attended = 1
    nodes += [
        Quantise(2, attended, scale("p0", features)),
        Linear(3, 2, *linear("q", features, features)),
        Linear(4, 2, *linear("k", features, features)),
        Linear(5, 2, *linear("v", features, features)),
        Attention(6, 3, 4, 5, heads, features // heads, (features // heads) ** -0.5),
        Quantise(7, 6, scale("p1", features)),
        Linear(8, 7, *linear("o", features, features)),
        Add(9, x, 8),
        norm(10, 9, "n1"),
        Quantise(11, 10, scale("p2", features)),
        Linear(12, 11, *linear("f1", middle, features)),
        Activation(13, 12, "gelu_erf"),
        Quantise(14, 13, scale("p3", middle)),
        Linear(15, 14, *linear("f2", features, middle)),
        Add(16, 9 if norm_first else 10, 15),
        norm(17, 16, "n2"),
    ]
    return Graph(tuple(nodes), 17, tensors, 512)


@pytest.fixture(scope="module")
def devices():
    opened = {uri: open_device(f"{uri}?memory=64M") for uri in ("fast:tiny", "fast:laptop", "fast:ulx3s", "rtl:tiny")}
    yield opened
    for device in opened.values():
        device.close()


def check(device, graph: Graph, lengths: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    features = graph.inputs["x"].shape[1]
    sequences = [{"x": rng.normal(0, 1, (n, features)).astype(np.float32)} for n in lengths]
    executor = DeviceExecutor(device)
    try:
        results = executor.run(graph, sequences)
    finally:
        executor.close()
    for inputs, result in zip(sequences, results, strict=True):
        assert_same_bits(result, run_reference(graph, inputs, golden))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    core=st.sampled_from(["fast:tiny", "fast:laptop", "fast:ulx3s"]),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 40),
    middle=st.integers(1, 150),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    prescale=st.booleans(),
    norm_first=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_fast_core_gives_contract_bits(
    devices, core, heads, head_dim, middle, lengths, prescale, norm_first, seed
) -> None:
    graph = encoder(np.random.default_rng(seed), heads * head_dim, heads, middle, prescale, norm_first)
    check(devices[core], graph, lengths, seed)


@pytest.mark.parametrize(
    ("heads", "head_dim", "middle", "lengths"), [(2, 8, 24, [5]), (1, 7, 13, [1, 9]), (3, 4, 70, [17, 2])]
)
def test_rtl_gives_contract_bits(devices, heads, head_dim, middle, lengths) -> None:
    graph = encoder(np.random.default_rng(1), heads * head_dim, heads, middle, True, False)
    check(devices["rtl:tiny"], graph, lengths, 2)


def test_long_sequences_are_done_in_blocks(devices) -> None:
    graph = encoder(np.random.default_rng(3), 64, 2, 256, False, True)
    check(devices["fast:laptop"], graph, [300], 3)


def test_a_batch_that_does_not_fit_is_split_and_a_sequence_that_does_not_is_refused(devices) -> None:
    graph = encoder(np.random.default_rng(4), 128, 4, 256, False, False)
    check(devices["fast:ulx3s"], graph, [40] * 8, 4)
    with pytest.raises(CapacityError, match="too long for this core"):
        check(devices["fast:ulx3s"], graph, [500], 4)


@given(tokens=st.integers(1, 70), features=st.integers(1, 30), rows=st.sampled_from([2, 4, 16]))
def test_panels_hold_every_value_once(tokens: int, features: int, rows: int) -> None:
    x = np.arange(1, tokens * features + 1).reshape(tokens, features)
    panels = to_panels(x, rows)
    assert (from_panels(panels, tokens) == x).all()
    assert np.count_nonzero(panels) == x.size


def test_pieces_are_reused_and_rings_wrap() -> None:
    pieces = Pieces("VECTOR", 0, 100)
    first, second = pieces.take(60), pieces.take(40)
    pieces.give(first)
    assert pieces.take(50) == 0
    with pytest.raises(CapacityError, match="20 words of VECTOR memory are needed and 10 of 100 are free"):
        pieces.take(20)
    pieces.give(second)
    assert pieces.largest == 50
    fours = Pieces("ACTIVATION", 0, 16, 4)
    assert [fours.take(5), fours.take(1), fours.take_last(3)] == [0, 8, 12]
    ring = Ring("WEIGHT", 10, 50)
    assert [ring.take(15), ring.take(15), ring.take(15)] == [10, 25, 10]
    with pytest.raises(CapacityError, match="too wide"):
        ring.take(41)
