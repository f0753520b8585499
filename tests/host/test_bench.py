"""Benchmarks: limits against numbers made by hand, products of odd shapes bit for bit, caches from elsewhere."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lockstep.bench import decode, limits
from lockstep.bench.case import Bar
from lockstep.bench.gemm import random_operands, run_gemm
from lockstep.bench.gemm_schedule import boxes
from lockstep.bench.measure import Bench, BenchError, Ran
from lockstep.bench.random_models import Gpt2Shape, LlamaShape, gpt2_graph, llama_graph, random_weights
from lockstep.bench.random_weights import INT8, SPARSITY, WEIGHTS, depth_unit, format_of, random_integers
from lockstep.compiler.execute import DeviceExecutor
from lockstep.compiler.packing import Packing, packing
from lockstep.graph import Attention, Graph
from lockstep.quantisation.formats import Format
from lockstep.session import HostSession
from lockstep_driver import Device, open_device
from lockstep_isa import operations
from lockstep_isa.config import PRESETS
from lockstep_isa.instructions import Sparsity, Weights
from lockstep_sim.core import MemoryTiming
from support import assert_same_bits

LAPTOP = PRESETS["laptop"]
#: Heads of 8 features, fewer than a panel of laptop has lanes, that share keys; two tiles of keys.
LLAMA = LlamaShape(61, 32, 48, 2, 4, 2, 64, tile=32)
GPT2 = Gpt2Shape(61, 32, 64, 2, 2, 64, tile=32)


# --- Limits -------------------------------------------------------------------------------------------------------


def test_the_limit_of_a_product_is_that_of_the_array_or_that_of_the_bus() -> None:
    # 7 x 6 tiles of 200 words, and 30 cycles of skew; the bus would take (100*200 + 90*200 + 4*190 + 4*9000) / 16.
    assert limits.gemm_limit(LAPTOP, 100, 90, 200).cycles == 7 * 6 * 200 + 30
    # 1 x 1 tile of 16 words; 16*16 + 16*16 + 4*32 bytes in and 4*256 out make 104 beats.
    assert limits.gemm_limit(LAPTOP, 16, 16, 16).cycles == 104 + 30
    # A depth below R takes R cycles a tile: 4 x 4 tiles of 16 each; 3*64*2 + 512 in and 16,384 out make 1,080 beats.
    assert limits.mac_slots(LAPTOP, 64, 64, 3) == 256
    assert limits.gemm_limit(LAPTOP, 64, 64, 3).cycles == 1080 + 30
    assert "7 * 6 * 200" in limits.gemm_limit(LAPTOP, 100, 90, 200).numbers


def test_the_limit_of_decode_is_bytes_over_what_refresh_leaves_of_the_bus() -> None:
    graph = llama_graph(LLAMA, random_weights(LLAMA))
    # A layer: q and o 32 x 32, k and v 16 x 32, gate, up and down 48 x 32; the head 61 x 32.
    weights = 2 * (2 * 1024 + 2 * 512 + 3 * 1536) + 61 * 32
    # A token: 2 layers, keys and values, 2 heads, 8 bytes and a scale of 4.
    cache = 10 * 2 * 2 * 2 * (8 + 4)
    assert limits.decode_bytes(LAPTOP, graph, 9) == limits.DecodeBytes(weights, cache)
    timing = MemoryTiming(40, 100, 25)
    assert limits.decode_limit(LAPTOP, timing, graph, 9).cycles == pytest.approx((weights + cache) / (16 * 0.75))
    still = limits.decode_limit(LAPTOP, MemoryTiming(40, 0, 0), graph, 9)
    assert still.cycles == pytest.approx((weights + cache) / 16)


def test_the_slots_of_a_model_are_those_of_its_products() -> None:
    graph = llama_graph(dataclasses.replace(LLAMA, layers=1, head=False), random_weights(LLAMA))
    # 20 tokens are 2 row tiles; panels of outputs: q, o 2, k, v 1, gate and up 3, down 2 with 48 words.
    linear = 2 * (2 * 2 * 32 + 2 * 1 * 32 + 2 * 3 * 32 + 2 * 48)
    # 4 heads: scores 2 x 2 tiles of max(8, 16) words, weighted values 2 x 1 tiles of 20.
    attention = 4 * (2 * 2 * 16 + 2 * 1 * 20)
    assert limits.graph_slots(LAPTOP, graph, [20]) == linear + attention
    assert limits.graph_slots(LAPTOP, graph, [20, 20]) == 2 * (linear + attention)


def test_a_bar_of_many_looks_at_their_median_and_the_worst_one() -> None:
    bar = Bar("", 0.9, worst=0.5, sample=3)
    assert bar.met([0.95, 0.92, 0.5], "laptop")
    assert bar.met([0.95, 0.92, 0.49], "laptop") is False
    assert bar.met([0.95, 0.89, 0.8], "laptop") is False
    assert bar.met([0.1, 0.1], "laptop") is None
    assert Bar("", 0.9).met([0.9], "laptop") is True
    assert Bar("", 0.9, core="paper").met([0.9], "laptop") is None
    assert Bar("", 0.9, core="paper").met([0.9], "paper") is True


# --- Products -----------------------------------------------------------------------------------------------------


@given(
    m=st.integers(1, 12),
    n=st.integers(1, 12),
    k=st.integers(1, 1100),
    format=st.sampled_from([format_of(*names) for names in itertools.product(WEIGHTS, SPARSITY)]),
    core=st.sampled_from(["tiny", "laptop"]),
)
def test_boxes_cover_every_tile_and_depth_once_and_in_order(m: int, n: int, k: int, format: Format, core: str) -> None:
    unit = depth_unit(format)
    k = -(-k // unit) * unit
    stored = random_integers(1, k, format, np.random.default_rng(0))
    form = packing(PRESETS[core], k, stored)
    reached = np.zeros((m, n), int)
    for box in boxes(PRESETS[core], m, n, k, form):
        assert box.depth.start % form.unit == 0
        tiles = reached[box.rows.start : box.rows.end, box.columns.start : box.columns.end]
        assert tiles.size
        assert len(box.depth) > 0
        assert (tiles == box.depth.start).all()
        tiles[:] = box.depth.end
    assert (reached == k).all()


@pytest.fixture(scope="module", params=["fast:tiny", "fast:laptop"])
def core(request: pytest.FixtureRequest) -> Iterator[Device]:
    with open_device(request.param) as device:
        yield device


def check_product(device: Device, m: int, n: int, k: int, seed: int = 0, format: Format = INT8) -> Ran:
    operands = random_operands(m, n, k, np.random.default_rng(seed), format)
    ran = run_gemm(device, operands)
    expected = operations.linear(operands.a, operands.row_scales, operands.b.w8, operands.b.scale)
    assert_same_bits(expected, ran.values[0])
    return ran


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(m=st.integers(1, 90), n=st.integers(1, 90), k=st.integers(1, 300), seed=st.integers(0, 99))
def test_products_of_odd_shapes_have_the_bits_of_golden(core: Device, m: int, n: int, k: int, seed: int) -> None:
    check_product(core, m, n, k, seed)


@pytest.mark.parametrize("shape", [(512, 512, 512), (16, 512, 16), (1, 1, 1), (40, 40, 1024), (40, 40, 1025)])
def test_products_at_the_ends_of_the_range(shape: tuple[int, int, int]) -> None:
    with open_device("fast:laptop") as device:
        check_product(device, *shape)


FORMATS = [format_of(*names) for names in itertools.product(WEIGHTS, SPARSITY)][1:]


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize(("m", "n", "units"), [(1, 1, 1), (40, 70, 2), (100, 30, 5)])
def test_products_of_packed_weights_have_the_bits_of_golden(
    core: Device, m: int, n: int, units: int, format: Format
) -> None:
    k = units * depth_unit(format)
    ran = check_product(core, m, n, k, format=format)
    assert ran.counters.mac_cycles < limits.mac_slots(core.config, m, n, k)


def test_a_product_of_sparse_weights_takes_half_the_cycles() -> None:
    with open_device("fast:laptop") as device:
        dense, sparse = (
            check_product(device, 64, 512, 256, format=f).counters for f in (INT8, Format(8, None, (2, 4)))
        )
    form = Packing(160, Weights.INT8, Sparsity.TWO_OF_FOUR)
    assert sparse.mac_cycles * 2 == dense.mac_cycles == 4 * 32 * 256
    assert dense.cycles > 1.9 * sparse.cycles
    assert limits.gemm_limit(LAPTOP, 64, 512, 256, form).cycles < sparse.cycles


def test_the_limits_of_packed_weights_are_those_of_their_bytes_and_steps() -> None:
    form = Packing(13 * 4, Weights.INT4_32, Sparsity.TWO_OF_FOUR)  # 13 words for each 32 of 128 inputs
    # 8 x 8 tiles of 128 / 4 steps; 128 * 128 + 128 * 52 bytes of operands, scales, and 65,536 of results.
    assert limits.mac_slots(LAPTOP, 128, 128, 128, form.rate) == 64 * 32
    assert limits.gemm_bytes(128, 128, 128, form.words) == (16384 + 6656 + 1024, 65536)
    assert limits.gemm_limit(LAPTOP, 128, 128, 128, form).cycles == (16384 + 6656 + 1024 + 65536) // 16 + 30


@pytest.mark.parametrize(("depth", "least"), [(1024, -128), (1024, 100), (4096, 100)])
def test_sums_of_large_values_are_rounded_once(depth: int, least: int) -> None:
    rng = np.random.default_rng(0)
    operands = random_operands(48, 48, depth, rng)
    operands.a[:] = rng.integers(least, least + 28, operands.a.shape)
    operands.b.values[:] = rng.integers(least, least + 28, operands.b.values.shape)
    operands.a[0], operands.b.values[0] = -128, -128
    with open_device("fast:laptop") as device:
        ran = run_gemm(device, operands)
    expected = operations.linear(operands.a, operands.row_scales, operands.b.w8, operands.b.scale)
    assert_same_bits(expected, ran.values[0])


@settings(max_examples=6, deadline=None)
@given(m=st.integers(1, 20), n=st.integers(1, 20), k=st.integers(1, 90))
def test_products_on_the_rtl_have_the_bits_of_golden(m: int, n: int, k: int) -> None:
    with open_device("rtl:tiny") as device:
        check_product(device, m, n, k)


@pytest.fixture(scope="module")
def laptops() -> Iterator[list[Device]]:
    with open_device("fast:laptop") as fast, open_device("rtl:laptop") as rtl:
        yield [fast, rtl]


TWO_OF_FOUR, ONE_OF_FOUR = Format(8, None, (2, 4)), Format(8, None, (1, 4))


@pytest.mark.parametrize(
    ("m", "n", "k", "format"),
    [
        *((64, 64, 256, INT8), (256, 256, 32, INT8), (512, 512, 16, INT8), (256, 256, 64, INT8), (16, 16, 16, INT8)),
        *((512, 32, 32, INT8), (48, 400, 16, INT8), (32, 64, 1024, INT8), (128, 256, 128, INT8)),
        *((16, 16, 384, INT8), (16, 384, 384, INT8), (18, 226, 22, INT8), (40, 57, 203, INT8)),
        *((64, 256, 256, ONE_OF_FOUR), (256, 64, 128, TWO_OF_FOUR), (256, 256, 64, ONE_OF_FOUR)),
    ],
    ids=str,
)
def test_products_take_the_predicted_cycles(laptops: list[Device], m: int, n: int, k: int, format: Format) -> None:
    """Where K is small the results take longer than the product, and STORE and LOAD meet on the bus."""
    predicted, counted = (check_product(device, m, n, k, format=format).counters.cycles for device in laptops)
    assert predicted == pytest.approx(counted, rel=0.01)


def test_a_large_product_keeps_the_array_busy() -> None:
    with open_device("fast:laptop") as device:
        ran = check_product(device, 256, 256, 256)
    assert ran.counters.cycles < 1.02 * limits.gemm_limit(LAPTOP, 256, 256, 256).cycles


def test_a_product_that_does_not_fit_names_the_memory() -> None:
    with open_device("fast:ulx3s") as device, pytest.raises(BenchError, match="VECTOR memory, core 'ulx3s' has 4,096"):
        check_product(device, 256, 256, 256)


def test_measurements_count_values_that_differ() -> None:
    operands = random_operands(20, 20, 20, np.random.default_rng(0))
    expected = operations.linear(operands.a, operands.row_scales, operands.b.w8, operands.b.scale)
    expected[3, 4] += 1
    with Bench("fast:tiny") as bench:
        limit = limits.gemm_limit(bench.config, 20, 20, 20)
        found = bench.measure("gemm", {}, limit, lambda device: run_gemm(device, operands), [expected])
    assert found.differences == 1
    assert not found.identical
    assert not found.counted


def test_measurements_compare_integers_too() -> None:
    operands = random_operands(4, 4, 4, np.random.default_rng(0))
    with Bench("fast:tiny") as bench:
        limit = limits.gemm_limit(bench.config, 4, 4, 4)

        def work(device: Device) -> Ran:
            return Ran([np.array([1, -2, 3], np.int8)], run_gemm(device, operands).counters)

        found = bench.measure("gemm", {}, limit, work, [np.array([1, 2, 3], np.int8)])
        assert (found.values, found.differences) == (3, 1)
        with pytest.raises(ValueError, match="int8"):
            bench.measure("gemm", {}, limit, work, [np.array([1, -2, 3], np.int32)])


def test_a_device_with_more_memory_is_opened_where_it_must_be() -> None:
    with Bench("fast:tiny?memory=1M") as bench:
        limit, sizes = limits.gemm_limit(bench.config, 4, 4, 4), []

        def work(device: Device) -> Ran:
            sizes.append(device.memory_bytes)
            return check_product(device, 4, 4, 4)

        for needed in (0, 3 << 20, 0):
            expected = [check_product(bench._device("fast", 0), 4, 4, 4).values[0]]
            bench.measure("gemm", {}, limit, work, expected, memory_bytes=needed)
        with pytest.raises(BenchError, match="at most 2 GiB"):
            bench.measure("gemm", {}, limit, work, expected, memory_bytes=3 << 30)
    assert sizes == [1 << 20, 4 << 20, 4 << 20]


# --- Decode -------------------------------------------------------------------------------------------------------


def graphs() -> dict[str, Graph]:
    return {"llama": llama_graph(LLAMA, random_weights(LLAMA)), "gpt2": gpt2_graph(GPT2, random_weights(GPT2))}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("tokens", [1, 16, 37])
def test_a_session_goes_on_from_a_cache_that_it_is_given(core: Device, name: str, tokens: int) -> None:
    graph = graphs()[name]
    ids = np.random.default_rng(tokens).integers(0, 61, tokens + 2)
    whole = HostSession(graph, tokens + 2, operations)
    whole.extend(ids[:tokens])
    caches = {}
    for node in graph.of(Attention):
        (keys, key_scales), (values, value_scales) = (cache.first(tokens) for cache in whole._caches[node.value])
        caches[node.value] = (keys.copy(), key_scales.copy(), values.copy(), value_scales.copy())
    sessions = [HostSession(graph, tokens + 2, operations), DeviceExecutor(core).open_session(graph, tokens + 2)]
    for session in sessions:
        session.restore(tokens, caches)
    for token in ids[tokens:]:
        expected = whole.extend(token[None])
        for session in sessions:
            assert_same_bits(expected, session.extend(token[None]))


def test_a_random_gpt2_is_the_gpt2_of_transformers() -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    weights = random_weights(GPT2)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=61, n_embd=32, n_inner=64, n_layer=2, n_head=2, n_positions=64, tie_word_embeddings=False)
    ).eval()
    state = {"transformer.wte.weight": weights["wte"], "transformer.wpe.weight": weights["wpe"]}
    state["lm_head.weight"] = weights["lm_head.weight"]
    for name in ("ln_f.weight", "ln_f.bias", *(n for n in weights if ".ln_" in n)):
        state["transformer." + name] = weights[name]
    for layer in ("h.0.", "h.1."):
        for kind in ("weight", "bias"):
            packed = np.concatenate([weights[f"{layer}attn.{part}.{kind}"] for part in "qkv"])
            parts = {"attn.c_attn": packed}
            parts |= {
                theirs: weights[f"{layer}{ours}.{kind}"]
                for theirs, ours in (("attn.c_proj", "attn.o"), ("mlp.c_fc", "mlp.up"), ("mlp.c_proj", "mlp.down"))
            }
            state |= {f"transformer.{layer}{name}.{kind}": array.T for name, array in parts.items()}
    model.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in state.items()})
    ids = np.arange(20) % 61
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    found = HostSession(graphs()["gpt2"], 20, operations).extend(ids, "all")
    cosine = (expected * found).sum(1) / np.linalg.norm(expected, axis=1) / np.linalg.norm(found, axis=1)
    assert cosine.min() > 0.99


@pytest.mark.parametrize("head", [False, True])
def test_shapes_have_the_layers_that_were_asked_for(head: bool) -> None:
    graph = decode.model("llama-tiny", 3, 20, head)
    assert len(graph.of(Attention)) == 3
    features, hidden = 256, 640
    expected = 3 * (4 * features**2 + 3 * features * hidden) + head * 272 * features
    assert limits.decode_bytes(LAPTOP, graph, 0).weights == expected
