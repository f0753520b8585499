"""Loading, tokens, inputs and reports: the host's own surface before a device is chosen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lockstep.errors import CaptureError, InputError, SequenceLengthError, TokenizerError
from lockstep.evaluate import run_reference
from lockstep.graph import Add, Graph, Input
from lockstep.model import HostExecutor, Model, load
from lockstep_hls import kernels
from lockstep_isa import operations
from sample_models import FEATURES, Between, Block, Sine, random_bert


@pytest.fixture(scope="module")
def small() -> Model:
    return load(random_bert())


def test_tokens_are_those_of_the_folder_and_long_texts_are_cut(minilm: Model) -> None:
    ids = minilm.tokenize(["hello world", "  hello world ", "word " * 400])
    assert ids[0].tolist() == [101, 7592, 2088, 102]
    assert ids[1].tolist() == ids[0].tolist()
    assert len(ids[2]) == 256
    assert ids[2][-1] == 102


def test_one_text_gives_the_same_vector_alone_and_in_company(minilm: Model) -> None:
    executor = HostExecutor(kernels)
    alone = minilm.embed(["Numbers do not care who sits next to them."], executor)
    company = minilm.embed(["A", "Numbers do not care who sits next to them.", "long " * 30], executor)
    assert alone.shape == (1, 384)
    assert np.array_equal(alone[0].view(np.uint32), company[1].view(np.uint32))


@given(tokens=st.integers(1, 64), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_any_length_has_the_same_bits_in_both_implementations(small: Model, tokens: int, seed: int) -> None:
    ids = np.random.default_rng(seed).integers(0, 100, tokens)
    golden, compiled = small.hidden_states(ids, operations), small.hidden_states(ids, kernels)
    assert golden.shape == (tokens, FEATURES)
    assert np.array_equal(golden.view(np.uint32), compiled.view(np.uint32))


def test_a_fallback_runs_inside_a_contract_graph_and_is_reported() -> None:
    model = load(Between(Sine()).eval(), example={"x": torch.zeros(1, 8, FEATURES)}, max_tokens=32)
    report = model.report()
    assert report.fallbacks == (("sin", "the contract has no operation for sin"),)
    assert "on the CPU in PyTorch: sin (the contract has no operation for sin)" in str(report)
    x = np.random.default_rng(4).standard_normal((6, FEATURES), np.float32)
    results = [run_reference(model.graph, {"x": x}, module) for module in (operations, kernels)]
    assert np.array_equal(results[0], results[1])


def test_a_sequence_beyond_the_positions_is_refused(small: Model) -> None:
    assert small.hidden_states(np.ones(64, np.int64), kernels).shape == (64, FEATURES)
    with pytest.raises(SequenceLengthError, match="65 tokens, but the model has positions for 64"):
        small.hidden_states(np.ones(65, np.int64), kernels)
    with pytest.raises(SequenceLengthError, match="empty"):
        small.hidden_states([], kernels)


def test_a_text_beyond_the_positions_is_refused_where_the_folder_does_not_cut(minilm: Model) -> None:
    from lockstep.text import token_ids

    with pytest.raises(SequenceLengthError, match="makes 602 tokens, but the model has positions for 512"):
        token_ids(minilm.tokenizer, "word " * 600, 512, None)


def test_token_ids_outside_the_vocabulary_are_refused(small: Model) -> None:
    for wrong in (100, -1):
        with pytest.raises(InputError, match=f"index {wrong} is not in the table"):
            small.hidden_states([5, wrong], kernels)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "'input_ids' is missing"),
        ({"input_ids": [1], "token_type_ids": [0]}, "no input 'token_type_ids'"),
        ({"input_ids": [[1, 2]]}, r"shape \[1, 2\], not \[tokens\]"),
        ({"input_ids": [1.5]}, "float64 where integers are needed"),
    ],
)
def test_inputs_that_do_not_fit_are_named(small: Model, inputs: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run_reference(small.graph, inputs, kernels)


def test_a_module_needs_an_example_unless_it_says_what_it_takes() -> None:
    with pytest.raises(CaptureError, match="give example="):
        load(Block())


def test_a_module_has_no_tokenizer(small: Model) -> None:
    with pytest.raises(TokenizerError, match="give token ids"):
        small.tokenize(["a text"])


def test_images_enter_through_a_fallback_and_go_on_as_tokens() -> None:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(8)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    module = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8)).eval()
    model = load(module)
    assert len(model.report().fallbacks) == 1
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        wanted = module(pixels)[0][0].numpy()
    got = run_reference(model.graph, {"pixel_values": pixels[0].numpy()}, kernels)
    assert got.shape == (17, 32)
    assert np.corrcoef(got.ravel(), wanted.ravel())[0, 1] > 0.999


def test_graphs_that_make_no_sense_cannot_be_built() -> None:
    start = Input(0, "x", (None, 4), "float32")
    with pytest.raises(ValueError, match="reads 7"):
        Graph((start, Add(1, 0, 7)), 1, {}, 8)
    with pytest.raises(ValueError, match="defined twice"):
        Graph((start, Add(0, 0, 0)), 0, {}, 8)
    with pytest.raises(ValueError, match="output 3"):
        Graph((start,), 3, {}, 8)
