"""Caches of 4 bits: the levels that they hold, and the same bits wherever a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from lockstep.bench.decode import random_cache
from lockstep.bench.random_models import LlamaShape, llama_graph, random_weights
from lockstep.cache_policy import CachePolicy, asked_policy, hosted
from lockstep.compiler.execute import DeviceExecutor
from lockstep.errors import InputError, ModelError
from lockstep.graph import Graph
from lockstep.model import HostExecutor
from lockstep.native import NativeExecutor
from lockstep.session import HostSession, Session
from lockstep_driver import open_device
from lockstep_hls import kernels
from lockstep_isa import int4_cache, operations
from lockstep_isa.int4_cache import LevelError
from lockstep_isa.weights import expand
from support import assert_same_bits

INT4 = CachePolicy(bits=4)
TOKENS = 75
IDS = np.random.default_rng(3).integers(0, 61, TOKENS)
#: One and several tiles of keys, a window that ends inside a tile, heads of 32 and of 64 features.
SHAPES = {
    "one tile": LlamaShape(61, 64, 48, 2, 2, 2, 300),
    "grouped": LlamaShape(61, 128, 48, 2, 4, 2, 300, tile=32),
    "windowed": LlamaShape(61, 96, 40, 2, 3, 1, 300, tile=32, window=37, head_norm=True),
    "wide heads": LlamaShape(61, 128, 48, 1, 2, 1, 300, tile=64),
}
CUTS: tuple[Iterable[int], ...] = ((), (1, 2, 18, 19, 40), range(9, 30))


def graph(shape: str) -> Graph:
    return llama_graph(SHAPES[shape], random_weights(SHAPES[shape]))


def in_pieces(session: Session, cuts: Iterable[int]) -> np.ndarray:
    return np.concatenate([session.extend(part, "all") for part in np.split(IDS, list(cuts))])


@pytest.mark.parametrize("core", ["tiny", "laptop"])
@pytest.mark.parametrize("shape", SHAPES)
def test_cores_have_the_bits_of_golden_however_a_text_is_cut(shape: str, core: str) -> None:
    model = graph(shape)
    wanted = HostExecutor(operations).open_session(model, TOKENS, INT4).extend(IDS, "all")
    with open_device(f"fast:{core}") as device:
        session = DeviceExecutor(device).open_session(model, TOKENS, INT4)
        for cuts in CUTS:
            session.truncate(0)
            assert_same_bits(in_pieces(session, cuts), wanted)


@pytest.mark.parametrize("core", ["tiny", "laptop"])
def test_a_text_goes_on_behind_any_cut_back(core: str) -> None:
    """An odd length cuts through a byte of two tokens."""
    model = graph("one tile")
    wanted = HostSession(model, TOKENS, kernels, INT4).extend(IDS, "all")
    with open_device(f"fast:{core}") as device:
        session = DeviceExecutor(device).open_session(model, TOKENS, INT4)
        other = (IDS + 1) % 61
        for length in (47, 32, 16, 15, 1):
            session.truncate(0)
            session.extend(IDS[:length])
            session.extend(other[length : length + 2])
            session.extend(other[length + 2 : length + 20])
            session.truncate(length)
            found = [session.extend(IDS[n : n + 1], "all") for n in (length, length + 1)]
            assert_same_bits(np.concatenate(found), wanted[length : length + 2])
            assert_same_bits(session.extend(IDS[length + 2 :], "all"), wanted[length + 2 :])


def test_the_rtl_has_the_bits_of_golden_in_the_predicted_time() -> None:
    model, cycles = graph("grouped"), {}
    wanted = HostExecutor(operations).open_session(model, TOKENS, INT4).extend(IDS, "all")
    for uri in ("rtl:tiny", "fast:tiny"):
        counted: list[int] = []
        with open_device(uri) as device:
            executor = DeviceExecutor(device, lambda c, counted=counted: counted.append(c.cycles))
            session = executor.open_session(model, TOKENS, INT4)
            assert_same_bits(in_pieces(session, (5, 6, 7, 60, 61)), wanted)
        cycles[uri] = sum(counted)
    assert cycles["fast:tiny"] == pytest.approx(cycles["rtl:tiny"], rel=0.03)


@pytest.mark.parametrize("tokens", [1, 31, 32, 45])
def test_a_core_goes_on_from_a_cache_that_is_given(tokens: int) -> None:
    model = graph("grouped")
    caches = random_cache(model, tokens, bits=4)
    reference = HostSession(model, TOKENS, kernels, INT4)
    reference.restore(tokens, caches)
    wanted = reference.extend(IDS[:20], "all")
    with open_device("fast:laptop") as device:
        session = DeviceExecutor(device).open_session(model, TOKENS, INT4)
        session.restore(tokens, caches)
        assert_same_bits(np.concatenate([session.extend(IDS[n : n + 1]) for n in range(20)]), wanted)


def test_what_is_no_product_of_levels_cannot_be_restored() -> None:
    model = graph("one tile")
    with open_device("fast:tiny") as device:
        session = DeviceExecutor(device).open_session(model, TOKENS, INT4)
        with pytest.raises(LevelError, match="are no multiples of one integer by -7 to 7"):
            session.restore(5, random_cache(model, 5))


def test_levels_come_near_what_they_stand_for() -> None:
    rng = np.random.default_rng(1)
    x = (rng.normal(size=(50, 64)) * rng.uniform(1e-3, 1e3, (50, 1))).astype(np.float32)
    k8, sk = int4_cache.quantise_keys(x)
    levels, multipliers = int4_cache.key_levels(k8)
    assert np.array_equal(expand(levels, multipliers), k8)
    assert np.abs(levels).max() == 7
    # Half a level of the group, and what its greatest value loses beyond level 7.
    group = np.repeat(np.abs(x).reshape(50, 2, 32).max(axis=2), 32, axis=1)
    assert (np.abs(k8 * sk[:, None] - x) / group).max() < 0.11
    v8, sv = int4_cache.quantise_values(x)
    assert np.abs(v8).max() == 7
    assert (np.abs(v8 * sv[:, None] - x) <= 0.501 * sv[:, None]).all()


def test_rows_that_are_no_numbers_become_zeros() -> None:
    for fill in (np.nan, np.inf, 0):
        x = np.ones((2, 64), np.float32)
        x[0, 5], x[1] = fill, fill
        for quantise in (int4_cache.quantise_keys, int4_cache.quantise_values):
            q, _ = quantise(x)
            assert not q[1].any()
            assert q[0].any() == (fill == 0)


@pytest.mark.parametrize(
    "asked", [{"keep": 20, "evict": "h2o"}, {"keep": 20}, {"select": 32}, {"select": "sanger:0.02"}]
)
def test_what_no_core_does_with_4_bits_has_the_same_bits_on_the_host(asked: dict[str, Any]) -> None:
    model, policy = graph("one tile"), asked_policy(**asked, cache_bits=4)
    wanted = HostExecutor(operations).open_session(model, TOKENS, policy).extend(IDS, "all")
    for other in (asked_policy(**asked), INT4):
        found = HostSession(model, TOKENS, kernels, other).extend(IDS, "all")
        assert not (found == wanted).all(axis=1)[-10:].any()
    assert_same_bits(in_pieces(HostSession(model, TOKENS, kernels, policy), (5, 23, 24)), wanted)
    ((part, _),) = hosted(policy)
    assert part == "attention"
    # One of the cores has neither packed weights nor selection.
    for core in ("tiny", "ulx3s"):
        with open_device(f"fast:{core}") as device:
            session = DeviceExecutor(device).open_session(model, TOKENS, policy)
            assert_same_bits(in_pieces(session, (5, 23, 24)), wanted)


def test_other_numbers_of_bits_are_refused() -> None:
    with pytest.raises(InputError, match="5 is no number of bits for keys and values; give 8 or 4"):
        asked_policy(cache_bits=5)


@pytest.mark.parametrize(
    ("open_session", "message"),
    [
        (lambda: NativeExecutor().open_session(narrow(), 9, INT4), "heads of 16 features, which are no groups of 32"),
        (
            lambda: on_core("ulx3s", graph("one tile")),
            "'ulx3s' takes no packed weights, so it cannot meet a cache",
        ),
        (lambda: on_core("tiny", odd_tiles()), "in tiles of 48, which are no groups of 32"),
    ],
)
def test_models_and_cores_that_cannot_are_refused(open_session: Callable[[], object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        open_session()


def narrow() -> Graph:
    shape = LlamaShape(61, 32, 48, 1, 2, 2, 300)
    return llama_graph(shape, random_weights(shape))


def odd_tiles() -> Graph:
    shape = LlamaShape(61, 64, 48, 1, 2, 2, 300, tile=48)
    return llama_graph(shape, random_weights(shape))


def on_core(core: str, model: Graph) -> None:
    with open_device(f"fast:{core}") as device:
        DeviceExecutor(device).open_session(model, 9, INT4)
