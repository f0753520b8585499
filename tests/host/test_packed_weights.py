"""Weights of fewer bits on cores: the same bits as expanded, fewer words to load, and what is expanded is said."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from lockstep.bench.random_models import LlamaShape, llama_graph, random_weights
from lockstep.bench.random_weights import random_integers
from lockstep.compiler.execute import DeviceExecutor
from lockstep.compiler.lowering import Lowering
from lockstep.compiler.packing import expanded
from lockstep.evaluate import run_reference
from lockstep.graph import Activation, Add, Graph, Input, LayerNorm, Linear, Quantise
from lockstep.quantisation.formats import Format
from lockstep.run_report import expanded_lines
from lockstep.session import HostSession
from lockstep_driver import Device, open_device
from lockstep_isa import operations as golden
from lockstep_isa.config import preset
from lockstep_isa.instructions import LOAD, MATRIX, Memory, Sparsity, Weights
from support import assert_same_bits

FORMATS = [
    Format(bits, group, pattern)
    for bits, group in ((8, None), (4, 32), (4, 64), (4, 128))
    for pattern in (None, (2, 4), (1, 4))
][1:]
SHAPE = LlamaShape(vocabulary=96, features=128, hidden=256, layers=2, heads=4, kv_heads=2, max_tokens=64, tile=16)


@pytest.fixture(scope="module")
def devices():
    opened = {core: open_device(f"fast:{core}?memory=64M") for core in ("tiny", "laptop", "ulx3s")}
    yield opened
    for device in opened.values():
        device.close()


def block(format: Format, features: int, hidden: int, seed: int = 0) -> Graph:
    """A feed-forward layer with its residual and norm, in front of and behind a product."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {"g": np.ones(features, np.float32), "b": np.zeros(features, np.float32)}
    stored = {}

    def linear(name: str, outputs: int, inputs: int) -> tuple[str, str, None]:
        weight = random_integers(outputs, inputs, format, rng)
        tensors[f"{name}.int8"], tensors[f"{name}.s"], stored[f"{name}.int8"] = weight.w8, weight.scale, weight
        return f"{name}.int8", f"{name}.s", None

    nodes = (
        Input(0, "x", (None, features), "float32"),
        Quantise(1, 0, None),
        Linear(2, 1, *linear("first", features, features)),
        LayerNorm(3, 2, "g", "b", 1e-5),
        Quantise(4, 3, None),
        Linear(5, 4, *linear("up", hidden, features)),
        Activation(6, 5, "gelu_erf"),
        Quantise(7, 6, None),
        Linear(8, 7, *linear("down", features, hidden)),
        Add(9, 3, 8),
    )
    return Graph(nodes, 9, tensors, 512, stored=stored)


def dense(graph: Graph) -> Graph:
    """The same weights without what they came as."""
    return dataclasses.replace(graph, stored={})


def counted(device: Device, graph: Graph, lengths: tuple[int, ...]) -> tuple[int, set[tuple[Weights, Sparsity]]]:
    """WEIGHT words that a program loads, and the formats of its products."""
    executor = DeviceExecutor(device)
    program = executor.program(graph, lengths)
    executor.close()
    loads = [i for i in program.instructions if i.type is LOAD and i.memory == Memory.WEIGHT]
    products = [i for i in program.instructions if i.type is MATRIX]
    return sum(i.rows * i.words for i in loads), {(Weights(i.weights), Sparsity(i.sparsity)) for i in products}


@pytest.mark.parametrize("core", ["tiny", "laptop", "ulx3s"])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_packed_layers_give_contract_bits(devices: dict[str, Device], core: str, format: Format) -> None:
    graph = block(format, 128, 256)
    rng = np.random.default_rng(1)
    sequences = [{"x": rng.normal(0, 1, (tokens, 128)).astype(np.float32)} for tokens in (1, 19, 6)]
    executor = DeviceExecutor(devices[core])
    results = executor.run(graph, sequences)
    executor.close()
    for inputs, result in zip(sequences, results, strict=True):
        assert_same_bits(result, run_reference(graph, inputs, golden))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_packed_generation_gives_contract_bits(devices: dict[str, Device], format: Format) -> None:
    graph = llama_graph(SHAPE, random_weights(SHAPE), format)
    ids = np.arange(23) * 7 % SHAPE.vocabulary
    executor, reference = DeviceExecutor(devices["laptop"]), HostSession(graph, 32, golden)
    session = executor.open_session(graph, 32)
    for piece in (ids[:18], ids[18:19], ids[19:20], ids[20:]):
        assert_same_bits(session.extend(piece), reference.extend(piece))
    session.close()
    executor.close()


@pytest.mark.parametrize(
    ("format", "words"),
    [
        (Format(8, None, (2, 4)), 20),
        (Format(8, None, (1, 4)), 10),
        (Format(4, 32), 17),
        (Format(4, 32, (2, 4)), 13),
        (Format(4, 32, (1, 4)), 7),
        (Format(4, 64), 16.5),
        (Format(4, 128, (2, 4)), 12.25),
    ],
    ids=str,
)
def test_packed_weights_are_loaded_in_their_own_words(devices: dict[str, Device], format: Format, words: float) -> None:
    graph = block(format, 128, 256)
    before, plain = counted(devices["laptop"], dense(graph), (5,))
    after, used = counted(devices["laptop"], graph, (5,))
    assert after * 32 == before * words
    assert plain == {(Weights.INT8, Sparsity.DENSE)}
    assert len(used) == 1
    assert used != plain
    assert expanded(graph, preset("laptop")) == ()


def test_left_operands_of_packed_products_are_aligned(devices: dict[str, Device]) -> None:
    """Probabilities of an odd number of keys must not shift what comes behind them."""
    executor = DeviceExecutor(devices["laptop"])
    low = Lowering(preset("laptop"), executor.image(block(Format(4, 32), 64, 96)))
    low.activations.take(3 * 21)
    assert low.activations.take(64) == 64
    executor.close()


def test_a_core_that_takes_no_packed_weights_gets_int8(devices: dict[str, Device]) -> None:
    graph = block(Format(4, 32), 64, 96)
    assert counted(devices["ulx3s"], graph, (5,)) == counted(devices["ulx3s"], dense(graph), (5,))
    reason = "core 'ulx3s' takes no packed weights"
    found = expanded(graph, preset("ulx3s"))
    assert found == (("first", reason), ("up", reason), ("down", reason))
    assert expanded_lines((*found, ("last", reason))) == [f"expanded to int8: first, up, down and 1 more ({reason})"]


def test_a_depth_without_whole_index_words_gets_int8(devices: dict[str, Device]) -> None:
    """36 inputs are nine fours, but index words hold positions of two of them."""
    graph = block(Format(8, None, (2, 4)), 36, 40)
    assert [name for name, _ in expanded(graph, preset("laptop"))] == ["first", "up"]
    assert counted(devices["laptop"], graph, (5,))[1] == {
        (Weights.INT8, Sparsity.DENSE),
        (Weights.INT8, Sparsity.TWO_OF_FOUR),
    }
    x = np.random.default_rng(2).normal(0, 1, (21, 36)).astype(np.float32)
    executor = DeviceExecutor(devices["laptop"])
    (result,) = executor.run(graph, [{"x": x}])
    executor.close()
    assert_same_bits(result, run_reference(graph, {"x": x}, golden))
