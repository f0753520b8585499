"""Encoders whose heads leave from layer to layer: the same ones, and the same bits, wherever they run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ENDS, WHISPER, captured, example_inputs
from command_line import Command, save_small_model
from lockstep.bench.random_weights import random_integers
from lockstep.compiler.allocation import CapacityError
from lockstep.compiler.execute import DeviceExecutor
from lockstep.compiler.head_pruning import HeadOffset, HeadOperands, most_sequences, whole_columns
from lockstep.errors import InputError, ModelError
from lockstep.evaluate import run_reference
from lockstep.graph import Attention, Graph, Linear
from lockstep.head_pruning import HeadImportance, KeepHeads, prune_heads
from lockstep.model import Model, load
from lockstep.native import NativeExecutor
from lockstep.pruning import prune_tokens
from lockstep.quantisation.formats import Format
from lockstep.quantise import quantise
from lockstep_driver import Counters, open_device
from lockstep_driver.builder import ProgramBuilder
from lockstep_hls import kernels
from lockstep_isa import operations
from lockstep_isa.attention import head_importance
from lockstep_isa.config import preset
from lockstep_isa.instructions import LOAD, MATRIX
from sample_models import FEATURES, HEADS, SMALL, Block, random_bert
from sample_sentences import SENTENCES
from support import assert_same_bits
from torch import nn
from torch.nn import functional

LAYERS = 4
SCHEDULE = {1: 0.75, 3: 0.5}


class Grouped(nn.Module):
    """An encoder layer with two keys and values for four queries."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(FEATURES, 8 * count) for count in (4, 2, 2))
        self.out, self.norm = nn.Linear(FEATURES, FEATURES), nn.LayerNorm(FEATURES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        q, k, v = (product(y).unflatten(-1, (-1, 8)).transpose(1, 2) for product in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return x + self.out(mixed.transpose(1, 2).flatten(-2))


def stack(kind: type[nn.Module], layers: int = LAYERS) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(*(kind() for _ in range(layers))).eval()


def graph_of(model: nn.Module) -> Graph:
    return load(model, example={"input": torch.randn(1, 12, FEATURES)}).graph


@pytest.fixture(scope="module")
def blocks() -> Graph:
    """Four layers of four heads on float32[tokens, 32]."""
    return graph_of(stack(Block))


def rows(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"input": np.random.default_rng((count, seed)).normal(size=(count, FEATURES)).astype(np.float32)}


def value(graph: Graph, of: int, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """One value of a graph."""
    return run_reference(dataclasses.replace(graph, output=of), inputs, operations)


def kept(graph: Graph, inputs: dict[str, np.ndarray]) -> list[list[int]]:
    """The heads that stay, for each choice."""
    return [np.flatnonzero(value(graph, keep.value, inputs)).tolist() for keep in graph.of(KeepHeads)]


def assert_devices_agree(graph: Graph, batch: list[dict[str, np.ndarray]], *uris: str) -> list[list[Counters]]:
    """Golden, cpu and cores give the same bits; returns the counters of the cores' programs."""
    wanted = [run_reference(graph, one, operations) for one in batch]
    for found, expected in zip(NativeExecutor().run(graph, batch), wanted, strict=True):
        assert_same_bits(found, expected)
    counters: list[list[Counters]] = []
    for uri in uris:
        counters.append([])
        with open_device(uri) as device:
            executor = DeviceExecutor(device, counters[-1].append)
            for found, expected in zip(executor.run(graph, batch), wanted, strict=True):
                assert_same_bits(found, expected)
            executor.close()
    return counters


def test_importance_is_the_sum_of_magnitudes() -> None:
    x = np.random.default_rng(0).normal(size=(37, 3 * 70)).astype(np.float32)
    wanted = np.abs(x.astype(float)).reshape(37, 3, 70).sum(axis=(0, 2))
    assert np.abs(head_importance(x, 3) - wanted).max() < 1e-5 * wanted.max()
    # Features are added as rows are, then tokens in their order.
    by_hand = np.zeros(3, np.float32)
    for token in np.abs(x):
        by_hand = by_hand + [operations.rowsum(part[None])[0] for part in token.reshape(3, 70)]
    assert_same_bits(head_importance(x, 3), by_hand.astype(np.float32))


def test_the_heads_that_stay_are_those_that_said_most(blocks: Graph) -> None:
    pruned = prune_heads(blocks, SCHEDULE)
    layers, whole = pruned.of(Attention), blocks.of(Attention)
    importance, choices = [node.value for node in pruned.of(HeadImportance)], set()
    for seed in range(6):
        inputs = rows(11, seed)
        said = [np.abs(value(pruned, node.value, inputs).reshape(11, HEADS, -1)).sum(axis=(0, 2)) for node in layers]
        first, second = kept(pruned, inputs)
        for found, wanted in zip(importance, (said[0], said[0] + said[2]), strict=True):
            assert np.abs(value(pruned, found, inputs) - wanted).max() < 1e-5 * wanted.max()
        assert first == sorted(np.argsort(-said[0])[:3])
        among = np.where(np.isin(range(HEADS), first), said[0] + said[2], -1)
        assert second == sorted(np.argsort(-among)[:2])
        choices.add((*first, *second))
        # What left is +0, what stayed is what it was.
        mixed = value(pruned, layers[1].value, inputs).reshape(11, HEADS, -1)
        before = value(blocks, whole[1].value, inputs).reshape(11, HEADS, -1)
        assert_same_bits(mixed[:, first], before[:, first])
        for head in set(range(HEADS)) - set(first):
            assert_same_bits(mixed[:, head], np.zeros_like(mixed[:, head]))
    assert len(choices) > 1


def test_results_are_those_of_a_model_whose_heads_say_nothing(blocks: Graph) -> None:
    model, pruned, inputs = stack(Block), prune_heads(blocks, SCHEDULE), rows(19)
    first, second = kept(pruned, inputs)
    masks = [torch.ones(HEADS), *(torch.isin(torch.arange(HEADS), torch.tensor(x)) for x in (first, first, second))]
    for block, mask in zip(model, masks, strict=True):
        wide = mask.float().repeat_interleave(FEATURES // HEADS)
        block.out.register_forward_pre_hook(lambda _, given, wide=wide: (given[0] * wide,))
    with torch.no_grad():
        wanted = model(torch.from_numpy(inputs["input"])[None])[0].numpy()
    found = run_reference(pruned, inputs, operations)
    whole = run_reference(blocks, inputs, operations)
    error, change = np.abs(found - wanted).max(), np.abs(whole - wanted).max()
    assert error < 0.03
    assert change > 5 * error
    assert (found * wanted).sum() / np.linalg.norm(found) / np.linalg.norm(wanted) > 0.9999


def test_a_head_that_left_does_not_come_back() -> None:
    keep = KeepHeads(2, 1, heads=6, kv_heads=6, kept_kv=2, among=0)
    importance = np.array([9, 1, 5, 5, 8, 5], np.float32)
    among = np.array([0, 1, 1, 1, 0, 1], np.bool_)
    assert keep.run(importance, among).nonzero()[0].tolist() == [2, 3]  # of equal ones the first
    # Heads that share keys and values count together: 10, 10, 13.
    pairs = KeepHeads(2, 1, heads=6, kv_heads=3, kept_kv=2)
    assert pairs.run(importance).nonzero()[0].tolist() == [0, 1, 4, 5]
    assert dataclasses.replace(pairs, kept_kv=1, among=0).run(importance, among[[1, 1, 2, 2, 0, 0]]).tolist() == [
        *(True, True, False, False, False, False)
    ]


def test_all_heads_are_as_good_as_none_pruned(blocks: Graph) -> None:
    for schedule in ({1: 1.0}, {1: 1.0, 2: 0.9, 3: 0.76}):
        graph = prune_heads(blocks, schedule)
        (counters,) = assert_devices_agree(graph, [rows(9), rows(20)], "fast:tiny")
        assert_same_bits(run_reference(graph, rows(9), operations), run_reference(blocks, rows(9), operations))
        assert len(counters) == 1 + len(schedule)


@pytest.mark.parametrize("seed", range(6))
def test_random_schedules_have_the_same_bits_everywhere(seed: int) -> None:
    rng = np.random.default_rng(seed)
    graph = graph_of(stack((Block, Grouped)[seed % 2]))
    numbers = sorted(rng.choice(np.arange(1, LAYERS), rng.integers(1, LAYERS), replace=False).tolist())
    shares = sorted(rng.uniform(0.1, 1, len(numbers)).tolist(), reverse=True)
    tokens = {int(rng.integers(1, LAYERS)): 0.6} if seed > 2 else {}
    if tokens:
        graph = prune_tokens(graph, tokens)
    pruned = prune_heads(graph, dict(zip(numbers, shares, strict=True)))
    batch = [rows(int(count), seed) for count in rng.integers(1, 40, 3)]
    assert_devices_agree(pruned, batch, "fast:tiny", "fast:laptop")


def test_sequences_of_a_batch_keep_heads_of_their_own(blocks: Graph) -> None:
    graph = prune_heads(blocks, {1: 0.5})
    batch = [rows(9, seed) for seed in range(10)]
    assert len({str(kept(graph, one)) for one in batch}) > 2
    (counters,) = assert_devices_agree(graph, batch, "fast:laptop")
    assert most_sequences(graph, 100) == 63 // 4
    assert most_sequences(blocks, 100) == 100
    assert len(counters) == 2
    # Three of four heads, and 13 sequences: 10 in the first run of each program.
    graph, batch = prune_heads(blocks, {1: 0.75}), [rows(5, seed) for seed in range(13)]
    (counters,) = assert_devices_agree(graph, batch, "fast:laptop")
    assert len(counters) == 4


@pytest.mark.parametrize("tokens", [{1: 0.5}, {2: 0.7}, {2: 0.9, 3: 0.5}])
def test_tokens_may_leave_too(blocks: Graph, tokens: dict[int, float]) -> None:
    heads = {1: 0.75, 2: 0.5}
    graph = prune_heads(prune_tokens(blocks, tokens), heads)
    assert_devices_agree(graph, [rows(23), rows(9)], "fast:tiny", "fast:laptop")
    # With all heads the tokens are those that stay without.
    assert_same_bits(
        run_reference(prune_heads(prune_tokens(blocks, tokens), {1: 1}), rows(23), operations),
        run_reference(prune_tokens(blocks, tokens), rows(23), operations),
    )
    both = load(stack(Block), example={"input": torch.randn(1, 12, FEATURES)}).pruned(tokens, heads=heads)
    assert_same_bits(run_reference(both.graph, rows(23), operations), run_reference(graph, rows(23), operations))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Block, Grouped])
def test_the_rtl_has_the_bits_of_golden(kind: type[nn.Module]) -> None:
    graph = prune_heads(graph_of(stack(kind)), SCHEDULE)
    batch = [rows(23), rows(5), rows(9)]
    fast, rtl = assert_devices_agree(graph, batch, "fast:tiny", "rtl:tiny")
    assert [c.skipped_chunks for c in rtl] == [c.skipped_chunks for c in fast]
    assert_devices_agree(prune_heads(prune_tokens(graph_of(stack(kind)), {2: 0.5}), SCHEDULE), batch, "rtl:tiny")


@pytest.mark.parametrize("kind", ["t5 encoder", "albert", "vit", "whisper encoder"])
def test_architectures(kind: str) -> None:
    """Biases on positions, one set of weights for all layers, images, and keys without a bias."""
    if kind == "vit":
        from transformers import ViTConfig, ViTModel

        torch.manual_seed(5)
        model: nn.Module = ViTModel(ViTConfig(**SMALL, image_size=16, patch_size=4), add_pooling_layer=False)
        graph = load(model, example={"pixel_values": torch.randn(1, 3, 16, 16)}).graph
    elif kind == "whisper encoder":
        from transformers import WhisperConfig
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        torch.manual_seed(5)
        sizes: dict[str, Any] = {**WHISPER, "encoder_layers": 2, "max_source_positions": 20}
        model = WhisperEncoder(WhisperConfig(**sizes, vocab_size=100, **ENDS))
        graph = load(model.eval(), example={"input_features": torch.zeros(1, 8, 40)}).graph
    else:
        graph = quantise(captured(kind)[1])
    inputs = [{name: array[0].numpy() for name, array in example_inputs(kind, tokens).items()} for tokens in (20, 7)]
    assert_devices_agree(prune_heads(graph, {1: 0.5}), inputs, "fast:tiny", "fast:laptop")


def test_packed_weights_of_heads_that_stay_are_loaded_packed(blocks: Graph) -> None:
    tensors, stored = dict(blocks.tensors), {}
    rng = np.random.default_rng(8)
    for node in blocks.of(Linear):
        if len(tensors[node.weight]) == FEATURES == tensors[node.weight].shape[1]:
            weight = random_integers(FEATURES, FEATURES, Format(4, 32), rng)
            tensors[node.weight], tensors[node.scales], stored[node.weight] = weight.w8, weight.scale, weight
    graph = prune_heads(dataclasses.replace(blocks, tensors=tensors, stored=stored), SCHEDULE)
    assert_devices_agree(graph, [rows(23), rows(5)], "fast:laptop")
    with open_device("fast:laptop") as device:
        program = DeviceExecutor(device).program(graph, (23,), 1)
    assert any(i.weights for i in program.instructions if i.type is MATRIX)


def test_cores_load_and_multiply_for_the_heads_that_stay(blocks: Graph) -> None:
    """Three layers of two heads in the place of four; the zeros of others are passed over in what follows."""
    graph, inputs = prune_heads(blocks, {1: 0.5}), rows(32)
    with open_device("fast:tiny") as device:
        executor = DeviceExecutor(device)
        program, whole = executor.program(graph, (32,), 1), executor.program(prune_heads(blocks, {1: 1}), (32,), 1)
    moved = sum(i.type is LOAD and bool(i.address_operand) for i in program.instructions)
    products = [sum(i.type is MATRIX for i in p.instructions) for p in (whole, program)]
    # A product has its weights and its parameters. Queries, keys and values have one at least, attention two more.
    heads = 3 * 2
    assert moved >= heads * 3 * 2
    assert products[0] - products[1] == heads * (moved // heads // 2 + 2)
    (counters,) = assert_devices_agree(graph, [inputs], "fast:tiny")
    assert counters[1].skipped_chunks > counters[0].skipped_chunks
    # A head has two chunks of 4 features, and what is multiplied first of a tile is always multiplied.
    (choice,) = kept(graph, inputs)
    least = 2 * (HEADS - len(choice)) - (0 not in choice)
    assert counters[1].skipped_chunks >= 3 * least * 8 * 8


def test_programs_have_operands_for_some_heads_only(blocks: Graph) -> None:
    keep = KeepHeads(9, 8, heads=64, kv_heads=64, kept_kv=64)
    operands = HeadOperands(ProgramBuilder(preset("tiny")), {9: keep})
    for turn in range(63):
        operands.of(HeadOffset(9, 0, turn, 256))
    with pytest.raises(CapacityError, match="more than the 63 operands of a program; let fewer heads stay"):
        operands.of(HeadOffset(9, 0, 63, 256))
    assert operands.of(HeadOffset(9, 0, 5, 256)) == 6


def test_queries_that_cross_have_the_columns_of_their_heads() -> None:
    queries, keys = (Linear(1, 0, "weight", "scales", None, present=9, head_dim=2) for _ in range(2))
    present = np.array([0, 0, 1, 1, 0, 0, 1, 1], np.bool_)
    found = whole_columns(queries, np.arange(1, 9, dtype=np.float32)[None], {9: present})
    assert found.tolist() == [[0, 0, 0, 0, 1, 2, 3, 4, 0, 0, 0, 0, 5, 6, 7, 8]]
    # Two heads share keys.
    found = whole_columns(keys, np.arange(1, 5, dtype=np.float32)[None], {9: present})
    assert found.tolist() == [[0, 0, 1, 2, 0, 0, 3, 4]]


def test_the_cpu_computes_nothing_for_heads_that_left(blocks: Graph) -> None:
    seen: list[tuple[str, int]] = []

    class Watched:
        def __getattr__(self, name: str):
            return getattr(kernels, name)

        def linear(self, q, s, w, *rest):
            seen.append(("linear", len(w)))
            return kernels.linear(q, s, w, *rest)

        def attention_cached(self, q, *rest, **named):
            seen.append(("attention", q.shape[1]))
            return kernels.attention_cached(q, *rest, **named)

    run_reference(prune_heads(blocks, {2: 0.5}), rows(9), Watched())
    features = FEATURES // 2
    one = [("linear", features)] * 3 + [("attention", features)]
    attention = [entry for n, entry in enumerate(seen) if n % 7 < 4]
    assert attention[8:] == one * 2
    assert attention[:8] == [("linear", FEATURES)] * 3 + [("attention", FEATURES)] + [("linear", FEATURES)] * 3 + [
        ("attention", FEATURES)
    ]


def test_minilm_takes_fewer_cycles(minilm: Model) -> None:
    texts = [" ".join(SENTENCES[n : n + 6]) for n in (0, 6, 12)]
    whole = minilm.embed(texts, NativeExecutor())
    ids = np.concatenate(minilm.tokenize([" ".join(SENTENCES[:14])]))[:128]
    cycles: dict[str, int] = {}
    schedules = {"all": {}, "12 behind layer 2": {2: 1.0}, "6 behind layer 2": {2: 0.5}, "9, then 6": {2: 0.75, 4: 0.5}}
    for name, schedule in schedules.items():
        model = minilm.pruned(heads=schedule) if schedule else minilm
        found = model.embed(texts, NativeExecutor())
        counters: list[Counters] = []
        with open_device("fast:laptop") as device:
            (on_core,) = DeviceExecutor(device, counters.append).run(model.graph, [{model.input_name: ids}])
        assert_same_bits(on_core, NativeExecutor().run(model.graph, [{model.input_name: ids}])[0])
        cycles[name] = sum(c.cycles for c in counters)
        skipped = sum(c.skipped_chunks for c in counters)
        cosines = np.round((whole * found).sum(axis=1), 2)
        print(f"{name}: {cycles[name]:,} cycles, {skipped:,} chunks passed over, cosines {cosines}")
    assert cycles["all"] < cycles["12 behind layer 2"] < 1.01 * cycles["all"]
    assert cycles["6 behind layer 2"] < 0.9 * cycles["all"]
    assert cycles["6 behind layer 2"] < cycles["9, then 6"] < 0.95 * cycles["all"]
    assert skipped > 5000


def test_which_heads_stay_matters_to_minilm(minilm: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the page of models says of heads that are drawn by chance."""
    texts = [" ".join(SENTENCES[n : n + 6]) for n in (0, 6, 12)]
    whole, model = minilm.embed(texts, NativeExecutor()), minilm.pruned(heads={2: 0.5})
    rng, found = np.random.default_rng(0), []

    def drawn(*_: object) -> np.ndarray:
        return np.isin(np.arange(12), stay)

    monkeypatch.setattr(KeepHeads, "run", drawn)
    for _ in range(12):
        stay = rng.permutation(12)[:6]
        found.append((whole * model.embed(texts, NativeExecutor())).sum(axis=1))
    print(f"six heads by chance: cosines {np.mean(found, axis=0).round(2)}")
    assert np.std(found, axis=0).min() > 0.01
    assert np.mean(found) < 0.9


def test_schedules_and_models_that_make_no_sense_are_refused(blocks: Graph) -> None:
    for schedule, message in (
        ({0: 0.5}, "there is no layer 0; the model has layers 1 to 4"),
        ({5: 0.5}, "there is no layer 5"),
        ({4: 0.5}, "behind layer 4, the last one, no heads are left"),
        ({1: 0.0}, "a share of 0 of the heads makes no sense"),
        ({1: 1.5}, "a share of 1.5"),
        ({1: 0.5, 2: 0.75}, "behind layer 2 0.75 of all heads would stay, more than the 0.5 before it"),
        ({}, "no layer is named"),
    ):
        with pytest.raises(InputError, match=message):
            prune_heads(blocks, schedule)
    pruned = prune_heads(blocks, {1: 0.5})
    with pytest.raises(ModelError, match="leave already; name all layers in one schedule"):
        prune_heads(pruned, {2: 0.5})
    with pytest.raises(ModelError, match="leave already; let tokens leave first"):
        prune_tokens(pruned, {2: 0.5})
    with pytest.raises(ModelError, match="is causal"):
        prune_heads(doubled(quantise(captured("gpt2")[1])), {1: 0.5})
    layers = blocks.of(Attention)
    other = [dataclasses.replace(n, heads=2, head_dim=16, kv_heads=2) if n == layers[2] else n for n in blocks]
    with pytest.raises(ModelError, match=r"layer 3 of .* has 2 heads and 2 keys and values, layer 1 has 4 and 4"):
        prune_heads(dataclasses.replace(blocks, nodes=tuple(other)), {1: 0.5})
    shared = [dataclasses.replace(n, k=layers[1].k) if n == layers[2] else n for n in blocks]
    with pytest.raises(ModelError, match=r"the keys of layer 2 of .* are read by others too"):
        prune_heads(dataclasses.replace(blocks, nodes=tuple(shared)), {1: 0.5})
    straight = [dataclasses.replace(n, q=n.v) if n == layers[1] else n for n in blocks]
    with pytest.raises(ModelError, match=r"the queries of layer 2 of .* are read by others too"):
        prune_heads(dataclasses.replace(blocks, nodes=tuple(straight)), {1: 0.5})
    reads = {node.value: node.inputs for node in blocks}
    unprojected = [dataclasses.replace(n, v=reads[reads[n.v][0]][0]) if n == layers[1] else n for n in blocks]
    with pytest.raises(ModelError, match=r"the values of layer 2 of .* come from LayerNorm, not from a product"):
        prune_heads(dataclasses.replace(blocks, nodes=tuple(unprojected)), {1: 0.5})


def doubled(graph: Graph) -> Graph:
    """A graph of one layer that seems to have two."""
    (layer,) = graph.of(Attention)
    more = dataclasses.replace(layer, value=max(node.value for node in graph) + 1)
    return dataclasses.replace(graph, nodes=(*graph.nodes, more))


def test_a_command_prunes_heads(cli: Command, tmp_path: Path) -> None:
    folder = save_small_model(tmp_path / "two")
    random_bert().save_pretrained(folder)
    text = ("embed", folder, "a longer text of words")
    cli(*text, "--prune-heads", "half").refused(2, "'half' is no LAYER:SHARE")
    cli(*text, "--prune-heads", "2:0.5").refused(2, "behind layer 2, the last one")
    found = cli(*text, "--prune-heads", "1:0.5", "--json").json
    whole = cli(*text, "--json").json
    both = cli(*text, "--prune-heads", "1:0.5", "--prune", "1:0.5", "--json").json
    assert (found["pruned_heads"], whole["pruned_heads"]) == ({"1": 0.5}, {})
    assert (both["pruned_heads"], both["pruned"], found["pruned"]) == ({"1": 0.5}, {"1": 0.5}, {})
    assert len({str(one["embeddings"]) for one in (found, whole, both)}) == 3
    options = ("--prune-heads", "1:0.5", "--prune", "1:0.9", "--device", "fast:tiny")
    same = cli("verify", folder, *options, "--json").json
    assert (same["identical"], same["pruned_heads"], same["pruned"]) == (True, {"1": 0.5}, {"1": 0.9})
    ran, plain = cli("run", folder, *options, "--json").json, cli("run", folder, *options[4:], "--json").json
    assert (ran["programs"], plain["programs"]) == (2, 1)
    assert ran["skipped_chunks"] > plain["skipped_chunks"]
    said = cli("explain", folder, *options, "--json").json
    assert (said["programs"], said["pruned_heads"]) == (2, {"1": 0.5})
    page = cli("report", folder, *options, "--output", tmp_path / "page.html", "--json").json
    assert (page["identical"], page["pruned_heads"]) == (True, {"1": 0.5})
