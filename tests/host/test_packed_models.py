"""Real models with weights of fewer bits: the same bits on every executor, in the packed forms and not expanded."""

from __future__ import annotations

import numpy as np
import pytest
from lockstep.cache_policy import WHOLE, CachePolicy
from lockstep.compiler.packing import expanded
from lockstep.graph import Graph
from lockstep.model import Model, load
from lockstep.quantisation.formats import Format
from lockstep.quantisation.recipe import Recipe, calibration_inputs, quantise_model
from lockstep.quantise import prescales_of, quantise
from lockstep.verification import verify, verify_generation
from lockstep_isa.config import preset

SENTENCES = ["The same bits on any silicon.", "Two of four weights are zeros, and the array passes over them."]
PROMPT, NEW_TOKENS = b"def add(self, ", 8
INT4 = CachePolicy(bits=4)


@pytest.fixture(scope="module")
def sparse_minilm(minilm: Model) -> Graph:
    """W8A8, 2:4."""
    recipe = Recipe(Format(8, None, (2, 4)), "rtn")
    prescales = prescales_of(minilm.graph)
    found = quantise_model(minilm, recipe, calibration_inputs(minilm, None)[:2], prescales)
    return quantise(minilm.float_graph, found.prescales, found.weights)


@pytest.fixture(scope="module")
def small_tiny() -> Graph:
    """int4, 2:4."""
    tiny = load("tiny")
    recipe = Recipe(Format(4, 32, (2, 4)), "rtn")
    found = quantise_model(tiny, recipe, calibration_inputs(tiny, None)[:2], {})
    return quantise(tiny.float_graph, found.prescales, found.weights)


def check_minilm(minilm: Model, graph: Graph, devices: tuple[str, ...]) -> None:
    assert expanded(graph, preset("laptop")) == ()
    found = verify(graph, [{"input_ids": ids} for ids in minilm.tokenize(SENTENCES)], devices)
    assert found.identical, found.first_difference


def check_tiny(graph: Graph, devices: tuple[str, ...], policy: CachePolicy = WHOLE) -> None:
    assert expanded(graph, preset("laptop")) == ()
    ids = np.array([256, *PROMPT])
    found = verify_generation(graph, [ids], NEW_TOKENS, devices, policy=policy)
    assert found.identical, found.first_difference


def test_a_sparse_encoder_has_the_same_bits(minilm: Model, sparse_minilm: Graph) -> None:
    check_minilm(minilm, sparse_minilm, ("cpu", "fast:laptop", "fast:ulx3s"))


def test_a_sparse_int4_language_model_has_the_same_bits(small_tiny: Graph) -> None:
    check_tiny(small_tiny, ("golden", "cpu", "fast:laptop", "fast:tiny", "fast:ulx3s"))


def test_a_sparse_int4_language_model_with_an_int4_cache_has_the_same_bits(small_tiny: Graph) -> None:
    check_tiny(small_tiny, ("golden", "cpu", "fast:laptop", "fast:tiny"), INT4)


@pytest.mark.slow
def test_a_sparse_encoder_has_the_same_bits_on_the_rtl(minilm: Model, sparse_minilm: Graph) -> None:
    check_minilm(minilm, sparse_minilm, ("golden", "cpu", "fast:laptop", "rtl:laptop"))


@pytest.mark.slow
@pytest.mark.parametrize("policy", [WHOLE, INT4], ids=["int8 cache", "int4 cache"])
@pytest.mark.parametrize("core", ["tiny", "laptop"])
def test_a_sparse_int4_language_model_has_the_same_bits_on_the_rtl(
    small_tiny: Graph, core: str, policy: CachePolicy
) -> None:
    check_tiny(small_tiny, ("golden", f"rtl:{core}"), policy)
