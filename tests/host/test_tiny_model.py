"""The bundled language model on every executor: the same logits, close to PyTorch's, at the cost of its bytes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from bytelm.tokenizer import BOS
from lockstep.bench.random_models import LlamaShape, llama_graph, random_weights
from lockstep.bundled import BUNDLED
from lockstep.cache_policy import WHOLE, CachePolicy
from lockstep.checkpoint import find_folder
from lockstep.evaluate import run_float
from lockstep.eviction import EvictionPolicy, eviction
from lockstep.graph import Attention
from lockstep.model import HostExecutor, Model, load
from lockstep.native import NativeExecutor
from lockstep.session import HostSession
from lockstep.verification import verify_generation
from lockstep_driver import Counters, open_device
from lockstep_hls import kernels
from lockstep_isa.selectors import Blocks, Predicted, Selector, Sinks

PROMPT = "def add(self, other):\n    "
#: Bytes of held-out text on which accuracy is measured, in windows of as many.
SCORED, WINDOW = 16_384, 1024
#: Windows in which keys are left out: each of their tokens is a look at all keys.
FEW = 4
#: Cycles a token may take, relative to the bytes that it needs over the bytes that the bus delivers in a cycle.
DECODE_BOUND = 1.25
CONTEXTS = (64, 128, 256, 511)


@pytest.fixture(scope="module")
def tiny() -> Model:
    assert "tiny" in BUNDLED
    return load("tiny")


def prompt(model: Model) -> np.ndarray:
    return np.asarray(model.tokenizer(PROMPT)["input_ids"])


def decode_cost(model: Model, uri: str, context: int) -> tuple[Counters, float]:
    """Counters of one token behind ``context`` others, and its cycles relative to the bound of its bytes."""
    from lockstep.compiler.execute import DeviceExecutor

    counted: list[Counters] = []
    text = (find_folder("tiny") / "heldout.txt").read_bytes()[:context]
    with open_device(uri) as device:
        session = DeviceExecutor(device, counted.append).open_session(model.graph, model.graph.max_tokens)
        session.extend(np.array([BOS, *text[:-1]]))
        session.extend(np.array([text[-1]]))
        weights = sum(array.nbytes for array in model.graph.tensors.values() if array.dtype == np.int8)
        # Keys and values of the context and of the token itself, a byte each, and their scales.
        cache = sum(2 * n.kv_heads * (n.head_dim + 4) * (context + 1) for n in model.graph.of(Attention))
        bound = (weights + cache) / device.config.bus_bytes
    return counted[-1], counted[-1].cycles / bound


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_token_costs_little_more_than_its_bytes(tiny: Model, context: int) -> None:
    """Predicted here; the slow test counts."""
    _, ratio = decode_cost(tiny, "fast:laptop", context)
    print(f"context {context}: {ratio:.3f} times the bound")
    assert ratio <= DECODE_BOUND


@pytest.mark.slow
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_token_costs_little_more_than_its_bytes_on_the_rtl(tiny: Model, context: int) -> None:
    counted, ratio = decode_cost(tiny, "rtl:laptop", context)
    print(f"context {context}: {counted.cycles} cycles, {ratio:.3f} times the bound")
    assert ratio <= DECODE_BOUND
    predicted, _ = decode_cost(tiny, "fast:laptop", context)
    assert predicted.cycles == pytest.approx(counted.cycles, rel=0.02)


@pytest.mark.parametrize("devices", [("cpu", "fast:tiny", "fast:laptop")])
def test_all_logits_of_32_tokens_are_the_same(tiny: Model, devices: tuple[str, ...]) -> None:
    found = verify_generation(tiny.graph, [prompt(tiny)], 32, devices)
    assert found.identical, found.first_difference
    assert found.values_compared == 32 * 272 * (len(devices) - 1)


@pytest.mark.slow
@pytest.mark.parametrize("uri", ["rtl:tiny", "rtl:laptop"])
def test_all_logits_of_32_tokens_are_the_same_on_the_rtl(tiny: Model, uri: str) -> None:
    found = verify_generation(tiny.graph, [prompt(tiny)], 32, ["cpu", uri])
    assert found.identical, found.first_difference


@pytest.mark.slow
@pytest.mark.parametrize("uri", ["rtl:tiny", "rtl:laptop"])
def test_a_random_llama_of_two_layers_is_the_same_on_the_rtl(uri: str) -> None:
    shape = LlamaShape(61, 64, 96, 2, 4, 2, 128)
    graph = llama_graph(shape, random_weights(shape))
    ids = np.random.default_rng(5).integers(0, 61, 20)
    found = verify_generation(graph, [ids], 32, ["cpu", f"fast:{uri[4:]}", uri])
    assert found.identical, found.first_difference


def bits_per_byte(logits: np.ndarray, following: np.ndarray) -> float:
    """-log2 of the probability of each byte, on average; logits: float32[n, vocabulary], following: int[n]."""
    shares = torch.from_numpy(logits).double().log_softmax(dim=1).numpy()
    return float(-shares[np.arange(len(following)), following].mean() / math.log(2))


def test_int8_costs_less_than_a_hundredth_of_a_bit(tiny: Model) -> None:
    text = (find_folder("tiny") / "heldout.txt").read_bytes()[:SCORED]
    session = HostExecutor(kernels).open_session(tiny.graph, WINDOW)
    quantised, exact = [], []
    for start in range(0, SCORED, WINDOW):
        ids = np.array([BOS, *text[start : start + WINDOW]])
        session.truncate(0)
        quantised.append(bits_per_byte(session.extend(ids[:-1], "all"), ids[1:]))
        exact.append(bits_per_byte(run_float(tiny.float_graph, {"input_ids": ids[:-1]}), ids[1:]))
    cost = np.mean(quantised) - np.mean(exact)
    print(f"{np.mean(exact):.4f} bits per byte in float32, {cost:+.4f} in int8 with an int8 cache")
    assert cost <= 0.01


@pytest.mark.slow
def test_a_cache_of_4_bits_costs_less_than_a_hundredth_of_a_bit(tiny: Model) -> None:
    text = (find_folder("tiny") / "heldout.txt").read_bytes()[:SCORED]
    found, exact, whole = [], [], []
    for start in range(0, SCORED, WINDOW):
        ids = np.array([BOS, *text[start : start + WINDOW]])
        for scores, asked in ((whole, WHOLE), (found, CachePolicy(bits=4))):
            logits = NativeExecutor().open_session(tiny.graph, WINDOW, asked).extend(ids[:-1], "all")
            scores.append(bits_per_byte(logits, ids[1:]))
        exact.append(bits_per_byte(run_float(tiny.float_graph, {"input_ids": ids[:-1]}), ids[1:]))
    cost, beside = np.mean(found) - np.mean(exact), np.mean(found) - np.mean(whole)
    print(
        f"{np.mean(exact):.4f} bits per byte in float32, {cost:+.4f} in int8 with an int4 cache, {beside:+.4f} to int8"
    )
    assert cost <= 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kept", "most"),
    [
        (eviction("streaming:4", WINDOW // 4), 0.02),
        (eviction("h2o", WINDOW // 4), 0.05),
        (Blocks(WINDOW // 4), 0.02),
        (Sinks(4, WINDOW // 4 - 4), 0.02),
        (Predicted(0.001), 0.02),
    ],
    ids=str,
)
def test_a_quarter_of_the_keys_costs_little(tiny: Model, kept: EvictionPolicy | Selector, most: float) -> None:
    """Beside all keys, over the first quarter of a window too, in which all are kept."""
    text = (find_folder("tiny") / "heldout.txt").read_bytes()
    policy = CachePolicy(selector=kept) if hasattr(kept, "select") else CachePolicy(kept)
    found, whole = [], []
    for start in range(0, FEW * WINDOW, WINDOW):
        ids = np.array([BOS, *text[start : start + WINDOW]])
        for scores, asked in ((whole, WHOLE), (found, policy)):
            logits = HostSession(tiny.graph, WINDOW, kernels, asked).extend(ids[:-1], "all")
            scores.append(bits_per_byte(logits, ids[1:]))
    cost = np.mean(found) - np.mean(whole)
    print(f"{kept}: {cost:+.4f} bits per byte to {np.mean(whole):.4f}")
    assert cost <= most
