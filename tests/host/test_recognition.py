"""What models are captured as, and that the captured graph computes what the model computes."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lockstep.capture import capture
from lockstep.errors import CaptureError, SequenceLengthError
from lockstep.evaluate import run_float
from lockstep.graph import Attention, Dense, Fallback, Graph
from lockstep.model import Model
from lockstep.recognise import recognise
from sample_models import FEATURES, SMALL, Between, Block, Causal, Convolution, Sine, random_bert
from torch import nn

#: Special tokens inside a small vocabulary.
ENDS = {"bos_token_id": 1, "eos_token_id": 2}

ENCODERS = ["bert", "roberta", "xlm-roberta", "distilbert", "electra", "albert"]


def rows(module: nn.Module, max_tokens: int = 64, tokens: int = 8) -> Graph:
    return recognise(capture(module, {next(iter(_names(module))): torch.zeros(1, tokens, FEATURES)}, max_tokens))


def _names(module: nn.Module) -> list[str]:
    return ["src"] if isinstance(module, nn.TransformerEncoder | nn.TransformerEncoderLayer) else ["x"]


def difference(module: nn.Module, graph: Graph, tensor: torch.Tensor) -> float:
    """Greatest difference between the module and its graph on one input with a batch of one."""
    name = next(iter(graph.inputs))
    with torch.no_grad():
        result: Any = module(**{name: tensor})
    wanted = (result if isinstance(result, torch.Tensor) else result[0])[0].numpy()
    return float(np.abs(run_float(graph, {name: tensor[0].numpy()}) - wanted).max())


@cache
def encoder(kind: str, attention: str = "sdpa") -> tuple[nn.Module, Graph]:
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(7)
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64} if kind == "distilbert" else {}
    config = AutoConfig.for_model(kind, **{**SMALL, **sizes})
    config._attn_implementation = attention
    module = AutoModel.from_config(config).eval()
    return module, recognise(capture(module, {"input_ids": torch.ones(1, 8, dtype=torch.int64)}, 64))


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_of_transformers_need_no_fallback_and_keep_their_values(kind: str) -> None:
    module, graph = encoder(kind)
    assert graph.of(Fallback) == []
    assert len(graph.of(Attention)) == 2
    for tokens in (1, 2, 9, graph.max_tokens):
        ids = torch.randint(5, 100, (1, tokens), generator=torch.Generator().manual_seed(tokens))
        assert difference(module, graph, ids) < 1e-4


def test_minilm_is_recognised_whole(minilm: Model) -> None:
    counts = minilm.graph.counts()
    assert counts == {
        "Input": 1,
        "Gather": 3,
        "Indices": 2,
        "Add": 14,
        "LayerNorm": 13,
        "Quantise": 24,
        "Linear": 36,
        "Attention": 6,
        "Activation": 6,
    }
    assert minilm.report().fallbacks == ()
    assert minilm.graph.max_tokens == 512


def test_minilm_graph_keeps_the_values_of_the_model(minilm: Model) -> None:
    from transformers import AutoModel

    assert minilm.folder is not None
    module = AutoModel.from_pretrained(minilm.folder, local_files_only=True).eval()
    for text in ("A short one.", "A somewhat longer sentence, with a clause, that has more tokens than the first."):
        ids = torch.from_numpy(minilm.tokenize([text])[0])[None]
        assert difference(module, minilm.float_graph, ids) < 1e-4


def test_attention_that_is_written_out_is_recognised() -> None:
    module, graph = encoder("bert", "eager")
    assert len(graph.of(Attention)) == 2
    assert graph.of(Fallback) == []
    assert difference(module, graph, torch.tensor([[7, 8, 9]])) < 1e-4


@pytest.mark.parametrize("splitting", ["reshape", "chunk", "split"])
@pytest.mark.parametrize("pre_norm", [True, False])
def test_packed_projections_become_three_products(splitting: str, pre_norm: bool) -> None:
    module = Block(pre_norm, splitting).eval()
    graph = rows(module)
    assert [node.rows for node in graph.of(Dense)][:3] == [(0, 32), (32, 64), (64, 96)]
    assert {node.weight for node in graph.of(Dense)[:3]} == {"packed.weight"}
    assert graph.of(Fallback) == []
    for tokens in (1, 2, 31):
        assert difference(module, graph, torch.randn(1, tokens, FEATURES)) < 1e-4


@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_layers_of_pytorch_are_recognised(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(FEATURES, 4, 64, activation="gelu", batch_first=True, norm_first=norm_first)
    module = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    graph = rows(module)
    assert graph.of(Fallback) == []
    assert len(graph.of(Attention)) == 2
    assert difference(module, graph, torch.randn(1, 11, FEATURES)) < 1e-4


@pytest.mark.parametrize("activation", ["gelu", "silu", "tanh", "sigmoid", "relu"])
def test_activations_of_the_contract_are_recognised(activation: str) -> None:
    module = Block(activation=activation).eval()
    graph = rows(module)
    assert graph.of(Fallback) == []
    assert difference(module, graph, torch.randn(1, 5, FEATURES)) < 1e-4


@given(tokens=st.integers(1, 64), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_any_length_gives_the_values_of_the_model(tokens: int, seed: int) -> None:
    module, graph = encoder("bert")
    ids = torch.randint(0, 100, (1, tokens), generator=torch.Generator().manual_seed(seed))
    assert difference(module, graph, ids) < 1e-4


@given(tokens=st.integers(1, 64))
@settings(max_examples=10, deadline=None)
def test_any_length_survives_a_fallback(tokens: int) -> None:
    module, graph = _convolved()
    assert difference(module, graph, torch.randn(1, tokens, FEATURES)) < 1e-4


@cache
def _convolved() -> tuple[nn.Module, Graph]:
    module = Between(Convolution()).eval()
    return module, rows(module)


@pytest.mark.parametrize(("middle", "name"), [(Sine(), "sin"), (Convolution(), "conv1d"), (nn.ELU(), "elu")])
def test_what_is_not_recognised_runs_in_pytorch_and_is_named(middle: nn.Module, name: str) -> None:
    module = Between(middle).eval()
    graph = rows(module)
    (fallback,) = graph.of(Fallback)
    assert name in fallback.name
    assert f"the contract has no operation for {name}" in fallback.reason
    assert len(graph.of(Attention)) == 2
    assert difference(module, graph, torch.randn(1, 13, FEATURES)) < 1e-4


def test_causal_attention_is_recognised_but_is_no_language_model_on_features() -> None:
    module = Causal().eval()
    graph = rows(module)
    assert [node.causal for node in graph.of(Attention)] == [True]
    assert graph.of(Fallback) == []
    assert not graph.causal
    assert difference(module, graph, torch.randn(1, 6, FEATURES)) < 1e-4


def hidden(name: str) -> Any:
    """Masks on attention by the names of what they hide: ``bool`` or ``float32[tokens, tokens]`` from a length."""

    def of(tokens: Any) -> torch.Tensor:
        query, key = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
        distance = query - key
        masks = {
            "later": distance >= 0,
            "later and those before the last five": (distance >= 0) & (distance < 5),
            "nothing, added": torch.zeros(tokens, tokens),
            "later, added": torch.where(distance >= 0, 0.0, torch.finfo(torch.float32).min),
            "far": distance.abs() * -0.125,
            "later and far": torch.where(distance >= 0, distance * -0.125, -torch.inf),
            "the first": key != 0,
            "those around": distance.abs() < 3,
            "the position": key * -0.125 + 0.0 * query,
        }
        return masks[name]

    return of


class Masked(Block):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.mask = hidden(name)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        q = self.packed(x)[..., :FEATURES].unflatten(-1, (4, -1)).transpose(1, 2)
        mixed = nn.functional.scaled_dot_product_attention(q, q, q, self.mask(x.shape[1]))
        return mixed.transpose(1, 2).flatten(-2)


@pytest.mark.parametrize(
    ("name", "causal", "window", "biased"),
    [
        ("later", True, None, False),
        ("later and those before the last five", True, 5, False),
        ("nothing, added", False, None, False),
        ("later, added", True, None, False),
        ("far", False, None, True),
        ("later and far", True, None, True),
    ],
)
def test_masks_are_read_by_what_they_hide(name: str, causal: bool, window: int | None, biased: bool) -> None:
    module = Masked(name).eval()
    graph = rows(module)
    assert graph.of(Fallback) == []
    (node,) = graph.of(Attention)
    assert (node.causal, node.window, node.bias is not None) == (causal, window, biased)
    for tokens in (1, 4, 40):
        assert difference(module, graph, torch.randn(1, tokens, FEATURES)) < 1e-4


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("the first", "in a way of its own"),
        ("those around", "in a way of its own"),
        ("the position", "more than the distance of tokens"),
    ],
)
def test_a_mask_that_attention_cannot_say_is_named_and_keeps_its_effect(name: str, reason: str) -> None:
    module = Masked(name).eval()
    graph = rows(module)
    assert graph.of(Attention) == []
    assert any(reason in node.reason for node in graph.of(Fallback))
    assert difference(module, graph, torch.randn(1, 9, FEATURES)) < 1e-4


def test_a_causal_model_without_its_head_keeps_its_values() -> None:
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(3)
    module = GPT2Model(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=100, n_positions=64, **ENDS)).eval()
    graph = recognise(capture(module, {"input_ids": torch.ones(1, 8, dtype=torch.int64)}, 64))
    assert graph.causal
    assert graph.of(Fallback) == []
    assert difference(module, graph, torch.tensor([[5, 6, 7, 8, 9]])) < 1e-4


def test_a_mask_given_by_the_user_is_not_taken_for_trivial() -> None:
    ids = torch.ones(1, 8, dtype=torch.int64)
    graph = recognise(capture(random_bert(), {"input_ids": ids, "attention_mask": ids}, 64))
    assert graph.of(Attention) == []
    assert any("depends on more than the length" in node.reason for node in graph.of(Fallback))


def test_positions_that_start_late_shorten_the_longest_sequence() -> None:
    assert encoder("bert")[1].max_tokens == 64
    assert encoder("roberta")[1].max_tokens == 62


def test_shared_weights_are_stored_once() -> None:
    _, graph = encoder("albert")
    products = graph.of(Dense)
    assert len(products) == 13
    assert len({node.weight for node in products}) == 7
    assert len({array.ctypes.data for array in graph.tensors.values()}) == len(graph.tensors)


def test_a_fixed_length_is_captured_as_one() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions, self.block = nn.Parameter(torch.randn(1, 12, FEATURES)), Block()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(x + self.positions)

    module = Fixed().eval()
    graph = rows(module, tokens=12)
    assert graph.max_tokens == 12
    assert graph.inputs["x"].shape == (12, FEATURES)
    assert difference(module, graph, torch.randn(1, 12, FEATURES)) < 1e-4


def test_a_module_with_a_case_of_its_own_for_short_sequences_serves_longer_ones() -> None:
    class Shifting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            later = x[:, 1:]
            return self.block(x) if later.shape[1] == 1 else self.block(torch.cat([later, x[:, :1]], 1))

    module = Shifting().eval()
    graph = rows(module)
    assert graph.min_tokens == 3
    assert difference(module, graph, torch.randn(1, 3, FEATURES)) < 1e-4
    with pytest.raises(SequenceLengthError, match="only be captured for 3 or more"):
        run_float(graph, {"x": np.zeros((2, FEATURES), np.float32)})


def test_capture_leaves_a_training_module_as_it_was() -> None:
    module = Block().train().double()
    rows(module)
    assert module.training
    assert module.up.weight.dtype == torch.float64


def test_a_module_that_cannot_be_exported_is_named() -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum().item() > 0 else -x

    with pytest.raises(CaptureError, match=r"Branching cannot be captured by torch\.export") as error:
        rows(Branching())
    assert "\n" not in str(error.value)


def test_a_batch_of_two_is_refused() -> None:
    with pytest.raises(CaptureError, match="batch of 1"):
        capture(Block(), {"x": torch.zeros(2, 8, FEATURES)})


def test_a_result_that_is_no_rows_of_features_is_refused() -> None:
    class Table(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, :, None, :] - x[:, None, :, :]

    with pytest.raises(CaptureError, match="no \\[1, tokens, features\\]"):
        rows(Table())
