"""Architectures of transformers, small and with random weights: recognised whole, and the values are theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lockstep
import numpy as np
import pytest
import torch
from architectures import CASES, LAST, captured, example_inputs
from lockstep.errors import FallbackError
from lockstep.evaluate import run_float, run_reference
from lockstep.graph import (
    Attention,
    Dense,
    Experts,
    Fallback,
    Gather,
    Linear,
    PositionBias,
    RMSNorm,
    Rotary,
    Route,
)
from lockstep.model import load
from lockstep.quantise import quantise
from lockstep_hls import kernels
from sample_models import Between, Sine
from torch import nn


@pytest.mark.parametrize("kind", CASES)
def test_architectures_are_recognised_whole(kind: str) -> None:
    case, graph = CASES[kind], captured(kind)[1]
    for node in graph.of(Fallback):
        assert case.convolution, f"{node.name}: {node.reason}"
        names = set(node.name.split(", "))
        assert names <= {case.convolution, "cat", "view", "permute", "transpose"}
    assert graph.causal == case.causal
    assert len(graph.of(RMSNorm)) == case.norms
    assert (len(graph.of(Rotary)), len({node.cos for node in graph.of(Rotary)})) == case.rotary
    for node, wanted in zip(graph.of(Attention), case.attention, strict=True):
        assert {name: getattr(node, name) for name in wanted} == pytest.approx(wanted)


@pytest.mark.parametrize("kind", CASES)
def test_architectures_keep_their_values(kind: str) -> None:
    module, graph = captured(kind)
    for tokens in (1, 7, 40, LAST - 2):
        inputs = example_inputs(kind, tokens)
        with torch.no_grad():
            wanted = module(**inputs)[0][0].numpy()
        result = run_float(graph, {name: tensor[0].numpy() for name, tensor in inputs.items()})
        np.testing.assert_allclose(result, wanted, atol=1e-4)


@pytest.mark.parametrize("kind", CASES)
def test_int8_keeps_the_direction_of_the_results(kind: str) -> None:
    """The contract's numbers against transformers in float32, position by position."""
    module, graph = captured(kind)
    contract = quantise(graph)
    inputs = example_inputs(kind, 40)
    with torch.no_grad():
        wanted = module(**inputs)[0][0].numpy()
    found = run_reference(contract, {name: tensor[0].numpy() for name, tensor in inputs.items()}, kernels)
    cosine = (found * wanted).sum(axis=1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)
    assert cosine.mean() >= 0.995, f"mean {cosine.mean():.4f}, least {cosine.min():.4f}"


def test_heads_of_a_norm_on_queries_and_keys_are_its_groups() -> None:
    assert sorted(node.groups for node in captured("qwen3")[1].of(RMSNorm)) == [1, 1, 1, 2, 4]


def test_relative_positions_are_one_bias_for_all_layers() -> None:
    graph = captured("t5 encoder")[1]
    (bias,) = graph.of(PositionBias)
    assert [node.bias for node in graph.of(Attention)] == [bias.value, bias.value]
    assert bias.function(np.zeros(9, np.int64)).shape == (4, 9, 9)


def test_shared_layers_and_tied_heads_are_stored_once() -> None:
    products = captured("albert")[1].of(Dense)
    assert (len(products), len({node.weight for node in products})) == (13, 7)
    for kind in ("gpt2", "qwen2", "gemma3"):
        graph = captured(kind)[1]
        assert graph.of(Gather)[0].table == graph.of(Dense)[-1].weight


def test_packed_projections_are_used_in_parts() -> None:
    rows = [node.rows for node in captured("phi3")[1].of(Dense)]
    assert rows == [(0, 32), (32, 48), (48, 64), (0, 32), (0, 64), (64, 128), (0, 32), (0, 100)]


def test_experts_are_quantised_one_by_one() -> None:
    graph = quantise(captured("mixtral")[1])
    (route,), (mixture,) = graph.of(Route), graph.of(Experts)
    assert (route.top_k, route.normalise) == (2, True)
    assert not captured("qwen3 moe")[1].of(Route)[0].normalise
    assert graph.of(Dense) == []
    for expert in mixture.experts:
        shapes = [graph.tensors[name].shape for name in expert.tensors]
        assert shapes == [(64, 32), (64, 32), (32, 64), (64,), (64,), (32,)]
        assert {graph.tensors[name].dtype.name for name in expert.tensors[:3]} == {"int8"}


def test_a_capture_leaves_the_configuration_as_it_was() -> None:
    configuration: Any = captured("mixtral")[0].config
    assert configuration.use_cache is True
    assert configuration._experts_implementation != "batched_mm"


def test_a_folder_of_a_language_model_is_loaded_with_its_head(tmp_path: Path) -> None:
    module = captured("gpt2")[0]
    module.save_pretrained(tmp_path)  # type: ignore[operator]
    model = lockstep.load(tmp_path, strict=True)
    assert model.graph.causal
    assert model.graph.max_tokens == LAST
    assert model.graph.tensors[model.graph.of(Linear)[-1].weight].shape == (100, 32)
    ids = np.arange(3, 30)
    with torch.no_grad():
        wanted = module(torch.from_numpy(ids)[None])[0][0].numpy()
    np.testing.assert_allclose(run_float(model.float_graph, {"input_ids": ids}), wanted, atol=1e-4)


def test_strict_loading_names_every_fallback() -> None:
    module = nn.Sequential(Between(Sine()), Between(Sine()))
    example = {"input": torch.zeros(1, 8, 32)}
    assert len(load(module, example=example).report().fallbacks) == 2
    with pytest.raises(FallbackError, match=r"2 parts of Sequential .* sin \(the contract.*; sin \(") as error:
        load(module, example=example, strict=True)
    assert "\n" not in str(error.value)
