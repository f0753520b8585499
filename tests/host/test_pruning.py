"""Encoders whose tokens leave from layer to layer: the same ones, and the same bits, wherever they run."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from architectures import captured
from command_line import Command
from lockstep.compiler.execute import DeviceExecutor
from lockstep.errors import InputError, ModelError
from lockstep.evaluate import run_reference
from lockstep.graph import Add, Attention, Graph, Input
from lockstep.model import Model, load
from lockstep.native import NativeExecutor
from lockstep.pruning import KeepTokens, TokenImportance, kept, prune_tokens, schedule_of
from lockstep.quantise import quantise
from lockstep_driver import open_device
from lockstep_isa import operations
from sample_models import FEATURES, Block
from sample_sentences import SENTENCES
from support import assert_same_bits
from torch import nn
from transformers import ViTConfig, ViTModel

SCHEDULE = {1: 0.75, 2: 0.5}


@pytest.fixture(scope="module")
def blocks() -> Graph:
    """Three layers on float32[tokens, 32]."""
    torch.manual_seed(3)
    return load(nn.Sequential(*(Block() for _ in range(3))), example={"input": torch.randn(1, 12, FEATURES)}).graph


@pytest.fixture(scope="module")
def vit() -> Graph:
    torch.manual_seed(5)
    config = ViTConfig(
        hidden_size=32, num_attention_heads=4, intermediate_size=64, num_hidden_layers=3, image_size=16, patch_size=4
    )
    return load(ViTModel(config, add_pooling_layer=False), example={"pixel_values": torch.randn(1, 3, 16, 16)}).graph


def rows(count: int) -> dict[str, np.ndarray]:
    return {"input": np.random.default_rng(count).normal(size=(count, FEATURES)).astype(np.float32)}


def pixels() -> dict[str, np.ndarray]:
    return {"pixel_values": np.random.default_rng(1).normal(size=(3, 16, 16)).astype(np.float32)}


def test_the_tokens_that_stay_are_those_with_most_attention(blocks: Graph) -> None:
    pruned = prune_tokens(blocks, {1: 0.5})
    (importance,), (keep,) = pruned.of(TokenImportance), pruned.of(KeepTokens)
    seen: dict[str, np.ndarray] = {}
    for name, node in (("q", importance.q), ("k", importance.k), ("v", importance.v), ("x", keep.x)):
        part = Graph(pruned.nodes, node, pruned.tensors, pruned.max_tokens)
        seen[name] = run_reference(part, rows(11), operations)
    q, k, v = (seen[name].reshape(11, 4, 8).transpose(1, 0, 2).astype(float) for name in "qkv")
    scores = q @ k.transpose(0, 2, 1) / np.sqrt(8)
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    got = (weights.sum(axis=1) * np.abs(v).max(axis=2) / 127).sum(axis=0)
    found = run_reference(Graph(pruned.nodes, importance.value, pruned.tensors, 200), rows(11), operations)[:, 0]
    assert np.abs(found - got).max() < 0.03 * got.max()
    best = np.sort(np.concatenate([[0], 1 + np.argsort(-found[1:], kind="stable")[:5]]))
    cut = run_reference(Graph(pruned.nodes, keep.value, pruned.tensors, 200), rows(11), operations)
    assert_same_bits(cut, seen["x"][best])


def test_what_follows_computes_with_the_tokens_that_stay(blocks: Graph) -> None:
    for count in (1, 2, 7, 40):
        found = run_reference(prune_tokens(blocks, SCHEDULE), rows(count), operations)
        assert len(found) == kept(kept(count, 0.75), 0.5)
    # All tokens stay: nothing changes.
    whole = run_reference(prune_tokens(blocks, {1: 1.0, 2: 1.0}), rows(9), operations)
    assert_same_bits(whole, run_reference(blocks, rows(9), operations))


@pytest.mark.parametrize("uri", ["fast:tiny", "fast:laptop", "rtl:tiny"])
def test_devices_have_the_bits_of_golden(blocks: Graph, vit: Graph, uri: str) -> None:
    graph = prune_tokens(blocks, SCHEDULE)
    batch = [rows(23), rows(5), rows(9)]
    wanted = [run_reference(graph, one, operations) for one in batch]
    image = prune_tokens(vit, SCHEDULE)
    picture = run_reference(image, pixels(), operations)
    assert len(picture) == kept(kept(17, 0.75), 0.5)
    for found, expected in zip(NativeExecutor().run(graph, batch), wanted, strict=True):
        assert_same_bits(found, expected)
    with open_device(uri) as device:
        executor = DeviceExecutor(device)
        for found, expected in zip(executor.run(graph, batch), wanted, strict=True):
            assert_same_bits(found, expected)
        assert_same_bits(executor.run(image, [pixels()])[0], picture)


def test_minilm_takes_fewer_cycles_and_means_about_the_same(minilm: Model) -> None:
    texts = [" ".join(SENTENCES[n : n + 6]) for n in (0, 6, 12)]
    whole = minilm.embed(texts, NativeExecutor())
    pruned = minilm.pruned({2: 0.75, 4: 0.75})
    found = pruned.embed(texts, NativeExecutor())
    cosines = (whole * found).sum(axis=1)
    print(f"cosines {np.round(cosines, 4)} with 75 % of the tokens behind layer 2, and of those behind layer 4")
    assert cosines.min() > 0.9
    cycles = {}
    for name, model in (("whole", minilm), ("pruned", pruned)):
        counted: list[int] = []
        with open_device("fast:laptop") as device:
            vectors = model.embed(
                texts[:1], DeviceExecutor(device, lambda c, counted=counted: counted.append(c.cycles))
            )
        cycles[name] = sum(counted)
        assert_same_bits(vectors, (whole if model is minilm else found)[:1])
    print(cycles)
    assert cycles["pruned"] < 0.85 * cycles["whole"]


def test_models_whose_tokens_cannot_leave_are_refused(blocks: Graph) -> None:
    for schedule, message in {
        (0, 0.5): "there is no layer 0; the model has layers 1 to 3",
        (4, 0.5): "there is no layer 4",
        (1, 0.0): "a share of 0 of the tokens makes no sense",
        (1, 1.5): "a share of 1.5",
    }.items():
        with pytest.raises(InputError, match=message):
            prune_tokens(blocks, dict([schedule]))
    with pytest.raises(InputError, match="no layer is named"):
        prune_tokens(blocks, {})
    # The input of the first layer once more, behind the last one.
    (x,) = blocks.of(Input)
    end = Add(max(node.value for node in blocks) + 1, blocks.output, x.value)
    around = dataclasses.replace(blocks, nodes=(*blocks.nodes, end), output=end.value)
    with pytest.raises(ModelError, match="values that go past layer 2 of attention"):
        prune_tokens(around, {2: 0.5})
    for kind, message in (("gpt2", "is causal"), ("t5 encoder", "adds a bias on positions")):
        graph = quantise(captured(kind)[1])
        assert graph.of(Attention)
        with pytest.raises(ModelError, match=message):
            prune_tokens(graph, {1: 0.5})


def test_a_command_prunes(cli: Command, small_folder) -> None:
    assert schedule_of(["3:0.7", "1:1"]) == {3: 0.7, 1: 1.0}
    cli("embed", small_folder, "a text", "--prune", "half").refused(2, "'half' is no LAYER:SHARE")
    twice = cli("embed", small_folder, "a text", "--prune", "1:0.5", "--prune", "1:0.7")
    twice.refused(2, "layer 1 is given twice, with 0.5 and 0.7")
    cli("embed", small_folder, "a text", "--prune", "2:0.5").refused(2, "there is no layer 2")
    found = cli("embed", small_folder, "a longer text of words", "--prune", "1:0.5", "--json").json
    whole = cli("embed", small_folder, "a longer text of words", "--json").json
    assert (found["pruned"], whole["pruned"]) == ({"1": 0.5}, {})
    assert found["embeddings"] != whole["embeddings"]
