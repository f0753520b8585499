"""Caches of a fixed size: the same tokens leave, and the same bits come, wherever a model runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from lockstep.bench.random_models import LlamaShape, llama_graph, random_weights
from lockstep.cache_policy import CachePolicy
from lockstep.compiler.execute import DeviceExecutor
from lockstep.errors import InputError, ModelError, SequenceLengthError
from lockstep.eviction import HeavyHitters, Slots, Streaming, TokenPruning, asked_eviction, eviction
from lockstep.graph import Attention, Graph
from lockstep.model import HostExecutor
from lockstep.native import NativeExecutor
from lockstep.session import HostSession, Session
from lockstep_driver import open_device
from lockstep_hls import kernels
from lockstep_isa import operations
from lockstep_isa.attention import key_importance, visible
from lockstep_isa.quantisation import quantise_rows
from support import assert_same_bits

TOKENS = 44
SHAPE = LlamaShape(61, 32, 48, 2, 4, 2, 100)
IDS = np.random.default_rng(5).integers(0, 61, TOKENS)
NAMES = ["streaming:3", "h2o", "h2o:2", "spatten"]
BUDGET = 21


def graph(shape: LlamaShape = SHAPE) -> Graph:
    return llama_graph(shape, random_weights(shape))


def policy(name: str, budget: int = BUDGET) -> CachePolicy:
    return CachePolicy(eviction(name, budget))


def in_pieces(session: Session, cuts: tuple[int, ...]) -> np.ndarray:
    return np.concatenate([session.extend(part, "all") for part in np.split(IDS, list(cuts))])


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    """The logits of golden, by policy."""
    model = graph()
    return {
        name: HostExecutor(operations).open_session(model, TOKENS, policy(name)).extend(IDS, "all") for name in NAMES
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_host_has_the_bits_of_golden_however_a_text_is_cut(name: str, expected: dict[str, np.ndarray]) -> None:
    model = graph()
    for cuts in ((), (1, 2, 19, 30), (21,), (22, 23)):
        session = NativeExecutor().open_session(model, TOKENS, policy(name))
        assert_same_bits(in_pieces(session, cuts), expected[name])


@pytest.mark.parametrize("core", ["tiny", "laptop"])
@pytest.mark.parametrize("name", NAMES)
def test_cores_have_the_bits_of_golden(name: str, core: str, expected: dict[str, np.ndarray]) -> None:
    model = graph()
    with open_device(f"fast:{core}") as device:
        session = DeviceExecutor(device).open_session(model, TOKENS, policy(name))
        for cuts in ((), (1, 2, 19, 30)):
            session.truncate(0)
            assert_same_bits(in_pieces(session, cuts), expected[name])


def test_the_rtl_has_the_bits_of_golden_in_the_predicted_time(expected: dict[str, np.ndarray]) -> None:
    model, cycles = graph(), {}
    for uri in ("rtl:tiny", "fast:tiny"):
        counted: list[int] = []
        with open_device(uri) as device:
            executor = DeviceExecutor(device, lambda c, counted=counted: counted.append(c.cycles))
            session = executor.open_session(model, TOKENS, policy("h2o"))
            assert_same_bits(in_pieces(session, ()), expected["h2o"])
        cycles[uri] = sum(counted)
    assert cycles["fast:tiny"] == pytest.approx(cycles["rtl:tiny"], rel=0.03)


def test_a_cache_with_room_for_all_has_the_bits_of_one_without_a_policy() -> None:
    model = graph()
    wanted = HostSession(model, TOKENS, kernels).extend(IDS, "all")
    for name in NAMES:
        found = HostSession(model, TOKENS, kernels, policy(name, TOKENS)).extend(IDS, "all")
        assert_same_bits(found, wanted)


def test_a_window_as_long_as_what_is_kept_sees_what_streaming_keeps() -> None:
    # One layer: there, a key hangs on its token alone. Row sums go by slots in the one and by positions in the other.
    kept = 20
    shape = LlamaShape(61, 32, 48, 1, 4, 2, 100)
    weights = random_weights(shape)
    windowed = llama_graph(shape, weights)
    windowed = dataclasses.replace(
        windowed,
        nodes=tuple(
            dataclasses.replace(node, window=kept) if isinstance(node, Attention) else node for node in windowed.nodes
        ),
    )
    wanted = HostSession(windowed, TOKENS, kernels).extend(IDS, "all")
    streaming = CachePolicy(Streaming(kept, sinks=0))
    found = HostSession(llama_graph(shape, weights), TOKENS, kernels, streaming).extend(IDS, "all")
    close = np.abs(found - wanted).max(axis=1) / np.abs(wanted).max(axis=1)
    assert close.max() < 0.02
    assert not np.array_equal(found, HostSession(llama_graph(shape, weights), TOKENS, kernels).extend(IDS, "all"))


def test_importance_is_the_sum_of_probabilities_over_heads() -> None:
    rng = np.random.default_rng(2)
    heads, kv_heads, d, keys, rows = 4, 2, 16, 30, 5
    q = rng.normal(size=(rows, heads * d)).astype(np.float32)
    k, v = (rng.normal(size=(keys, kv_heads, d)).astype(np.float32) for _ in range(2))
    parts = [[quantise_rows(x[:, h]) for h in range(kv_heads)] for x in (k, v)]
    k8 = np.concatenate([values for values, _ in parts[0]], axis=1)
    sk, sv = (np.stack([scales for _, scales in part], axis=1) for part in parts)
    seen = visible(np.arange(keys - rows, keys), keys, causal=True)
    found = key_importance(q, seen, k8, sk, sv)
    wanted = np.zeros((rows, keys))
    for head in range(heads):
        of = head // (heads // kv_heads)
        scores = q[:, head * d : (head + 1) * d].astype(float) @ k[:, of].T.astype(float) / np.sqrt(d)
        weights = np.where(seen, np.exp(scores - scores.max(axis=1, keepdims=True)), 0)
        wanted += weights / weights.sum(axis=1, keepdims=True) * sv[:, of]
    assert np.abs(found - wanted).max() < 0.03 * wanted.max()
    assert not found[~seen].any()


def test_policies_give_up_what_they_say() -> None:
    positions = np.array([0, 1, 9, 3, 8, 7])
    importance = np.array([5, 4, 0, 2, 1, 2], np.float32)
    assert Streaming(6, sinks=2).victim(positions, importance) == 3
    assert Streaming(6, sinks=0).victim(positions, importance) == 0
    assert HeavyHitters(6, recent=2).victim(positions, importance) == 3  # as little as 7, and older
    assert HeavyHitters(6, recent=1).victim(positions, importance) == 4
    assert HeavyHitters(6).victim(positions, importance) == 3
    assert TokenPruning(6).victim(positions, importance) == 4


def test_what_a_token_got_leaves_with_it() -> None:
    slots = Slots(10, HeavyHitters(3, recent=1))
    assert slots.place(0, 5).count == 3
    slots.credit(np.array([[3, 0, 0], [0, 1, 0], [1, 1, 5]], np.float32))
    assert slots.place(3, 2).slot == 1  # 0 has 4, 1 has 2, 2 is the newest
    slots.credit(np.array([[0, 0.5, 0]], np.float32))
    assert slots.place(4, 1).slot == 0  # 0 has 4, 2 has 5


def test_a_session_that_gave_up_tokens_keeps_all_or_none() -> None:
    session = HostSession(graph(), TOKENS, kernels, CachePolicy(Streaming(10)))
    session.extend(IDS[:8])
    session.truncate(5)
    session.extend(IDS[5:20])
    with pytest.raises(SequenceLengthError, match="has given up some of its 20"):
        session.truncate(12)
    session.truncate(0)
    assert_same_bits(session.extend(IDS[:7], "all"), HostSession(graph(), TOKENS, kernels).extend(IDS[:7], "all"))


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: eviction("lru", 10), "'lru' is no eviction policy; there are streaming, h2o, spatten"),
        (lambda: eviction("streaming:x", 10), "'x' in 'streaming:x' is no number of tokens for sinks"),
        (lambda: eviction("streaming:", 10), "'' in 'streaming:' is no number"),
        (lambda: eviction("spatten:3", 10), "'spatten' has no parameter"),
        (lambda: eviction("streaming:10", 10), "sinks = 10 leaves no slot of 10"),
        (lambda: eviction("h2o", 1), "a cache of 1 tokens is too small"),
        (lambda: asked_eviction("h2o", None), "but not how many stay"),
        (lambda: Streaming(10, sinks=-1), "sinks = -1 is no number of tokens"),
    ],
)
def test_policies_that_make_no_sense_are_refused(ask: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ask()


def test_models_whose_keys_hang_on_their_place_are_refused() -> None:
    windowed = graph(LlamaShape(61, 32, 48, 2, 4, 2, 100, window=9))
    with pytest.raises(ModelError, match="sees the last 9 tokens only"):
        HostSession(windowed, TOKENS, kernels, CachePolicy(Streaming(10)))
    tiled = graph(LlamaShape(61, 32, 48, 1, 4, 2, 100, tile=16))
    with pytest.raises(ModelError, match="met in several tiles of 16 keys"):
        HostSession(tiled, TOKENS, kernels, CachePolicy(HeavyHitters(20)))
    HostSession(tiled, TOKENS, kernels, CachePolicy(Streaming(20))).extend(IDS)


def test_a_core_that_writes_two_tokens_in_a_beat_says_so() -> None:
    with (
        open_device("fast:paper") as device,
        pytest.raises(ModelError, match="'paper' writes the values of two tokens"),
    ):
        DeviceExecutor(device).open_session(graph(), TOKENS)


def test_a_core_without_selection_says_so() -> None:
    with open_device("fast:ulx3s") as device, pytest.raises(ModelError, match="'ulx3s' cannot replace a token"):
        DeviceExecutor(device).open_session(graph(), TOKENS, CachePolicy(Streaming(10)))
