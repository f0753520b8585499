"""Architectures of transformers, small and with random weights: recognised whole, and the values are theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import lockstep
import numpy as np
import pytest
import torch
import transformers
from lockstep.errors import FallbackError
from lockstep.evaluate import run_float
from lockstep.graph import (
    Attention,
    Dense,
    Experts,
    Fallback,
    Gather,
    Graph,
    Linear,
    PositionBias,
    RMSNorm,
    Rotary,
    Route,
)
from lockstep.model import load
from lockstep.quantise import quantise
from sample_models import SMALL, Between, Sine
from torch import nn

WINDOW, LAST = 16, 64
SIZES = {**SMALL, "num_hidden_layers": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
#: Two heads of keys and values for four of queries.
SHARED = {**SIZES, "num_key_value_heads": 2}
T5 = {"d_model": 32, "d_kv": 8, "num_layers": 2, "num_heads": 4, "d_ff": 64, "vocab_size": 100}
WHISPER = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 64, "num_mel_bins": 8}
ENDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"), 1)


@dataclass(frozen=True)
class Case:
    """An architecture: how to build it, what its graph must hold, and which convolutions may stay in PyTorch.

    ``rotary`` holds the numbers of rotated tensors and of tables, ``attention`` what every Attention must say.
    """

    build: Callable[[], Any]
    norms: int = 0
    rotary: tuple[int, int] = (0, 0)
    attention: tuple[dict[str, Any], ...] = ({},)
    causal: bool = False
    convolution: str = ""


def of(name: str, configuration: str, **fields: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(getattr(transformers, configuration)(**fields))


def whisper_encoder() -> Any:
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    return WhisperEncoder(transformers.WhisperConfig(**WHISPER, max_source_positions=20, vocab_size=100, **ENDS))


CAUSAL = {"causal": True, "window": None}
GROUPED = {**CAUSAL, "heads": 4, "kv_heads": 2}
SLIDING = {**GROUPED, "window": WINDOW}
WITHOUT_WINDOW = {"causal": False, "window": None, "bias": None}

CASES = {
    "bert": Case(of("BertModel", "BertConfig", **SIZES), attention=(WITHOUT_WINDOW,)),
    "roberta": Case(of("RobertaModel", "RobertaConfig", **SIZES), attention=(WITHOUT_WINDOW,)),
    "albert": Case(
        of("AlbertModel", "AlbertConfig", **{**SIZES, "num_hidden_layers": 2}, embedding_size=16),
        attention=(WITHOUT_WINDOW,) * 2,
    ),
    "vit": Case(
        of("ViTModel", "ViTConfig", **{**SMALL, "num_hidden_layers": 1}, image_size=16, patch_size=4),
        attention=(WITHOUT_WINDOW,),
        convolution="conv2d",
    ),
    "whisper encoder": Case(whisper_encoder, attention=(WITHOUT_WINDOW,), convolution="conv1d"),
    "t5 encoder": Case(of("T5EncoderModel", "T5Config", **T5), norms=5, attention=({"scale": 1.0},) * 2),
    "t5 1.1 encoder": Case(
        of("T5EncoderModel", "T5Config", **T5, feed_forward_proj="gated-gelu"), norms=5, attention=({"scale": 1.0},) * 2
    ),
    "gpt2": Case(
        of("GPT2LMHeadModel", "GPT2Config", n_embd=32, n_layer=1, n_head=4, vocab_size=100, n_positions=LAST, **ENDS),
        attention=(CAUSAL,),
        causal=True,
    ),
    "opt": Case(
        of("OPTForCausalLM", "OPTConfig", **SIZES, ffn_dim=64, word_embed_proj_dim=32),
        attention=({**CAUSAL, "scale": 8**-0.5},),
        causal=True,
    ),
    "llama": Case(
        of("LlamaForCausalLM", "LlamaConfig", **SHARED), norms=3, rotary=(2, 1), attention=(GROUPED,), causal=True
    ),
    "mistral": Case(
        of("MistralForCausalLM", "MistralConfig", **SHARED, sliding_window=WINDOW),
        norms=3,
        rotary=(2, 1),
        attention=(SLIDING,),
        causal=True,
    ),
    "qwen2": Case(
        of("Qwen2ForCausalLM", "Qwen2Config", **SHARED, tie_word_embeddings=True),
        norms=3,
        rotary=(2, 1),
        attention=(GROUPED,),
        causal=True,
    ),
    "qwen3": Case(
        of("Qwen3ForCausalLM", "Qwen3Config", **SHARED, head_dim=8),
        norms=5,
        rotary=(2, 1),
        attention=(GROUPED,),
        causal=True,
    ),
    "phi3": Case(
        of("Phi3ForCausalLM", "Phi3Config", **SHARED), norms=3, rotary=(2, 1), attention=(GROUPED,), causal=True
    ),
    "gemma3": Case(
        of(
            "Gemma3ForCausalLM",
            "Gemma3TextConfig",
            **{**SHARED, "num_hidden_layers": 2},
            head_dim=8,
            sliding_window=WINDOW,
            query_pre_attn_scalar=8,
            layer_types=["sliding_attention", "full_attention"],
        ),
        norms=13,
        rotary=(4, 2),
        attention=(SLIDING, GROUPED),
        causal=True,
    ),
    "mixtral": Case(
        of("MixtralForCausalLM", "MixtralConfig", **SHARED, num_local_experts=4, num_experts_per_tok=2),
        norms=3,
        rotary=(2, 1),
        attention=(GROUPED,),
        causal=True,
    ),
    "qwen3 moe": Case(
        of(
            "Qwen3MoeForCausalLM",
            "Qwen3MoeConfig",
            **SHARED,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
        ),
        norms=5,
        rotary=(2, 1),
        attention=(GROUPED,),
        causal=True,
    ),
}


@cache
def captured(kind: str) -> tuple[nn.Module, Graph]:
    torch.manual_seed(11)
    module = CASES[kind].build().eval()
    for name, parameter in module.named_parameters():
        if "norm" in name.lower():  # as built they are ones or zeros, which would hide a wrong use of them
            nn.init.normal_(parameter, 0.5, 0.2)
    example = {"input_features": torch.zeros(1, 8, 40)} if kind.startswith("whisper") else None
    return module, load(module, example=example, max_tokens=LAST).float_graph


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
    generator = torch.Generator().manual_seed(5)
    for tokens in (1, 7, 40, LAST - 2):
        if kind == "vit":
            inputs = {"pixel_values": torch.randn(1, 3, 16, 16, generator=generator)}
        elif kind.startswith("whisper"):
            inputs = {"input_features": torch.randn(1, 8, 40, generator=generator)}
        else:
            inputs = {"input_ids": torch.randint(3, 100, (1, tokens), generator=generator)}
        with torch.no_grad():
            wanted = module(**inputs)[0][0].numpy()
        result = run_float(graph, {name: tensor[0].numpy() for name, tensor in inputs.items()})
        np.testing.assert_allclose(result, wanted, atol=1e-4)


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
