"""Keys that are chosen anew for each token: the same blocks, and the same bits, wherever a model runs."""

from __future__ import annotations

import numpy as np
import pytest
from lockstep.bench.random_models import LlamaShape, llama_graph, random_weights
from lockstep.cache_policy import CachePolicy, asked_policy
from lockstep.compiler.execute import DeviceExecutor
from lockstep.compiler.session import DeviceSession
from lockstep.errors import InputError, ModelError
from lockstep.graph import Attention, Graph
from lockstep.model import HostExecutor
from lockstep.native import NativeExecutor
from lockstep.session import Session
from lockstep_driver import open_device
from lockstep_isa import operations
from lockstep_isa.selectors import Blocks
from lockstep_isa.sketch import GROUP, POOL, key_sketch
from lockstep_isa.weights import pack
from support import assert_same_bits

TOKENS, KEPT = 118, 48
SHAPES = {
    "own keys": LlamaShape(61, 128, 48, 1, 4, 4, 200),
    "grouped": LlamaShape(61, 128, 48, 2, 4, 2, 200),
    "one head": LlamaShape(61, 64, 48, 1, 1, 1, 200),
}
IDS = np.random.default_rng(5).integers(0, 61, TOKENS)
CHOSEN = CachePolicy(selector=Blocks(KEPT))


def graph(shape: str) -> Graph:
    return llama_graph(SHAPES[shape], random_weights(SHAPES[shape]))


def in_pieces(session: Session, cuts: tuple[int, ...]) -> np.ndarray:
    return np.concatenate([session.extend(part, "all") for part in np.split(IDS, list(cuts))])


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    """The logits of golden."""
    return {
        shape: HostExecutor(operations).open_session(graph(shape), TOKENS, CHOSEN).extend(IDS, "all")
        for shape in SHAPES
    }


def test_choosing_matters(expected: dict[str, np.ndarray]) -> None:
    for shape, found in expected.items():
        whole = HostExecutor(operations).open_session(graph(shape), TOKENS).extend(IDS, "all")
        same = (found == whole).all(axis=1)
        assert same[:KEPT].all()
        assert not same[KEPT + 16 :].any()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_host_has_the_bits_of_golden_however_a_text_is_cut(shape: str, expected: dict[str, np.ndarray]) -> None:
    for cuts in ((), (1, 2, 19, 60, 113)):
        session = NativeExecutor().open_session(graph(shape), TOKENS, CHOSEN)
        assert_same_bits(in_pieces(session, cuts), expected[shape])


@pytest.mark.parametrize("core", ["tiny", "laptop"])
@pytest.mark.parametrize("shape", SHAPES)
def test_cores_have_the_bits_of_golden(shape: str, core: str, expected: dict[str, np.ndarray]) -> None:
    with open_device(f"fast:{core}") as device:
        session = DeviceExecutor(device).open_session(graph(shape), TOKENS, CHOSEN)
        for cuts in ((), (1, 2, 19, 60, 113)):
            session.truncate(0)
            assert_same_bits(in_pieces(session, cuts), expected[shape])
        # What is cut off and comes again is sketched again.
        session.truncate(77)
        assert_same_bits(session.extend(IDS[77:], "all"), expected[shape][77:])


def test_the_rtl_has_the_bits_of_golden_in_the_predicted_time(expected: dict[str, np.ndarray]) -> None:
    model, cycles = graph("grouped"), {}
    for uri in ("rtl:tiny", "fast:tiny"):
        counted: list[int] = []
        with open_device(uri) as device:
            executor = DeviceExecutor(device, lambda c, counted=counted: counted.append(c.cycles))
            session = executor.open_session(model, TOKENS, CHOSEN)
            assert_same_bits(in_pieces(session, (KEPT, 99)), expected["grouped"])
        cycles[uri] = sum(counted)
    assert cycles["fast:tiny"] == pytest.approx(cycles["rtl:tiny"], rel=0.03)


@pytest.mark.parametrize("core", ["tiny", "laptop"])
def test_the_sketch_on_the_device_is_that_of_its_keys(core: str) -> None:
    model = graph("grouped")
    with open_device(f"fast:{core}") as device:
        session = DeviceExecutor(device).open_session(model, TOKENS, CHOSEN)
        session.extend(IDS)
        blocks, rows = (TOKENS - 1) // 16, device.config.rows
        for node in model.of(Attention):
            words, scales, k8, sk = stored(session, node)
            for head in range(node.kv_heads):
                at = slice(head * node.head_dim, (head + 1) * node.head_dim)
                levels, multipliers, wanted = key_sketch(k8[: 16 * blocks, at], sk[: 16 * blocks, head])
                count = len(wanted)
                assert np.array_equal(scales[head].reshape(-1)[:count], wanted)
                packed = pack(levels, rows, multipliers)
                lanes = words[head][: len(packed)].transpose(0, 2, 1).reshape(-1, packed.shape[1])
                assert np.array_equal(lanes[:count], packed.transpose(0, 2, 1).reshape(-1, packed.shape[1])[:count])


def test_blocks_of_keys_are_whole_in_a_cache_of_any_length() -> None:
    # Behind the end of a cache there may be anything; what is gathered must not reach there.
    model = graph("one head")
    for core in ("tiny", "laptop"):
        with open_device(f"fast:{core}") as device:
            executor = DeviceExecutor(device)
            for capacity in (97, 98, 113):
                session = executor.open_session(model, capacity, CHOSEN)
                assert session._held % 16 == 0
                found = session.extend(IDS[:capacity])
                wanted = NativeExecutor().open_session(model, capacity, CHOSEN).extend(IDS[:capacity])
                assert_same_bits(found, wanted)
                session.close()


def stored(session: DeviceSession, node: Attention) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """uint8[kv_heads, panels, words, R] and float32[kv_heads, panels, R] of the sketch; int8[n, kv_heads * d] and
    float32[n, kv_heads] of the keys.
    """
    device, sketch, cache = session._executor.device, session._sketches.layers[node.value], session._cache
    rows, heads, d = device.config.rows, node.kv_heads, node.head_dim
    _, (keys, _, key_scales, _) = cache._parts[node.value]
    size = d // GROUP * (1 + GROUP // 2)
    panels = sketch.panels
    assert panels == -(-session._held // (POOL * rows))
    buffers = {b.address: b for b in session._sketches._buffers}
    words = buffers[sketch.words].data[: heads * panels * size * rows].reshape(heads, panels, size, rows)
    scales = buffers[sketch.scales].data.view(np.float32)[: heads * panels * rows].reshape(heads, panels, rows)
    k8 = keys.data.view(np.int8)[: heads * session._held * d].reshape(heads, -1, d, rows)
    k8 = k8.transpose(1, 3, 0, 2).reshape(-1, heads * d)
    sk = key_scales.data.view(np.float32)[: heads * session._held].reshape(heads, -1).T
    return words, scales, k8, sk


@pytest.mark.parametrize("name", ["sinks:40", "a3:300", "elsa:4", "sanger:0.01", "energon:0.1"])
def test_selectors_that_no_core_has_give_the_same_bits_with_attention_on_the_host(name: str) -> None:
    model, policy = graph("grouped"), asked_policy(select=name)
    wanted = HostExecutor(operations).open_session(model, TOKENS, policy).extend(IDS, "all")
    whole = HostExecutor(operations).open_session(model, TOKENS).extend(IDS, "all")
    assert not (wanted == whole).all(axis=1)[-10:].any()
    assert_same_bits(in_pieces(NativeExecutor().open_session(model, TOKENS, policy), (30, 31)), wanted)
    for uri in ("fast:tiny", "fast:laptop", "rtl:tiny"):
        with open_device(uri) as device:
            session = DeviceExecutor(device).open_session(model, TOKENS, policy)
            assert_same_bits(in_pieces(session, (50, 51, 90)), wanted)
            session.truncate(70)
            assert_same_bits(session.extend(IDS[70:]), wanted[-1:])


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(InputError, match="give one of them"):
        asked_policy("h2o", 20, 64)
    for select in (0, 8, 40, 16):
        with pytest.raises(InputError, match=f"{select} keys are no whole blocks of 16, or fewer"):
            asked_policy(select=select)
    for name, message in {
        "h2o:3": "'h2o:3' selects no keys; give how many, or one of blocks, sinks, a3, elsa, sanger, energon",
        "many": "'many' is no number for 'blocks'; give blocks:NUMBER, the keys",
        "sanger:": "'' is no number for 'sanger'",
        "sinks:4": "'4' makes no sense for 'sinks'",
        "a3:1.5": "'1.5' makes no sense for 'a3'",
        "a3": "'a3' selects no keys; give how many, or one of blocks, sinks, a3",
        "a3:0": "'0' makes no sense for 'a3'",
        "elsa:-1": "'-1' makes no sense for 'elsa'",
        "elsa:inf": "'inf' makes no sense for 'elsa'",
        "sanger:1.5": "'1.5' makes no sense for 'sanger'; give sanger:NUMBER, the least predicted probability, 0 to 1",
        "energon:nan": "'nan' makes no sense for 'energon'",
        "energon:2": "'2' makes no sense for 'energon'",
    }.items():
        with pytest.raises(InputError, match=message):
            asked_policy(select=name)
    narrow = llama_graph(LlamaShape(61, 32, 48, 1, 4, 4, 200), random_weights(LlamaShape(61, 32, 48, 1, 4, 4, 200)))
    with pytest.raises(ModelError, match="heads of 8 features, which are no groups of 32"):
        NativeExecutor().open_session(narrow, TOKENS, CHOSEN)


def test_cores_say_which_keys_they_cannot_choose() -> None:
    model = graph("one head")
    with open_device("fast:ulx3s") as device, pytest.raises(ModelError, match="it lacks 'packed' and 'selection'"):
        DeviceExecutor(device).open_session(model, TOKENS, CHOSEN)
    with open_device("fast:tiny") as device:
        executor = DeviceExecutor(device)
        tiled = llama_graph(LlamaShape(61, 64, 48, 1, 1, 1, 200, tile=32), random_weights(SHAPES["one head"]))
        with pytest.raises(ModelError, match="48 keys are met in several tiles of 32"):
            executor.open_session(tiled, TOKENS, CHOSEN)
