"""Quantised folders of many architectures: written under the names of their files, read back to the same bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import cases, example_inputs
from lockstep.evaluate import run_reference
from lockstep.graph import Dense, Route
from lockstep.model import load
from lockstep.quantisation.formats import Format
from lockstep.quantisation.recipe import Recipe, quantise_model
from lockstep.quantisation.walk import layer_names
from lockstep.quantisation.write import names_in_files, write_folder
from lockstep.quantise import quantise
from lockstep_hls import kernels
from support import assert_same_bits

#: Positions that the models have.
POSITIONS = 64


@pytest.mark.parametrize(
    ("kind", "layers"),
    [("vit", 6), ("opt", 6), ("albert", 6), ("qwen2", 7), ("phi3", 5), ("gemma3", 14), ("mixtral", 5)],
)
def test_every_layer_of_a_folder_comes_back(tmp_path: Path, kind: str, layers: int) -> None:
    """ALBERT shares its layers, Phi-3 packs projections, and files of ViT and Mixtral have names of their own."""
    torch.manual_seed(0)
    cases(POSITIONS)[kind].build().eval().save_pretrained(tmp_path / "source")
    model = load(tmp_path / "source")
    graph = model.float_graph
    wide = [name for name in layer_names(graph) if graph.tensors[name].shape[1] % 32 == 0]
    names = names_in_files(tmp_path / "source", {name: graph.tensors[name] for name in wide})
    assert len(names) == layers
    inputs = [{name: value.numpy()[0] for name, value in example_inputs(kind, 12, seed).items()} for seed in range(3)]
    found = quantise_model(model, Recipe(Format(4, 32), "gptq"), inputs, {}, names=names)
    write_folder(tmp_path / "source", tmp_path / "out", found.weights, {}, names)
    again = load(tmp_path / "out")
    assert again.stored.weights.keys() == names.keys()
    wanted = run_reference(quantise(graph, {}, found.weights), inputs[0], kernels)
    assert_same_bits(run_reference(again.graph, inputs[0], kernels), wanted)
    plain = run_reference(model.graph, inputs[0], kernels)
    assert not np.array_equal(plain, wanted)


def test_routers_stay_as_they_are() -> None:
    torch.manual_seed(0)
    graph = load(cases(POSITIONS)["mixtral"].build().eval()).float_graph
    (router,) = (node.logits for node in graph.of(Route))
    (weight,) = (node.weight for node in graph.of(Dense) if node.value == router)
    assert weight not in layer_names(graph)
