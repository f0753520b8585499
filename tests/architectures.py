"""Architectures of transformers as small models with random weights, and their captured graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from lockstep.graph import Graph
from lockstep.model import load
from sample_models import SMALL
from torch import nn

WINDOW, LAST = 16, 64
T5 = {"d_model": 32, "d_kv": 8, "num_layers": 2, "num_heads": 4, "d_ff": 64, "vocab_size": 100}
WHISPER = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 64, "num_mel_bins": 8}
GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 100}
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


def cases(positions: int) -> dict[str, Case]:
    """Every architecture by name, with that many positions."""
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    sizes = {**SMALL, "num_hidden_layers": 1, "max_position_embeddings": positions, **ends}
    # Two heads of keys and values for four of queries.
    shared = {**sizes, "num_key_value_heads": 2}
    return {
        "bert": Case(of("BertModel", "BertConfig", **sizes), attention=(WITHOUT_WINDOW,)),
        "roberta": Case(of("RobertaModel", "RobertaConfig", **sizes), attention=(WITHOUT_WINDOW,)),
        "albert": Case(
            of("AlbertModel", "AlbertConfig", **{**sizes, "num_hidden_layers": 2}, embedding_size=16),
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
            of("T5EncoderModel", "T5Config", **T5, feed_forward_proj="gated-gelu"),
            norms=5,
            attention=({"scale": 1.0},) * 2,
        ),
        "gpt2": Case(
            of(
                "GPT2LMHeadModel",
                "GPT2Config",
                n_embd=32,
                n_layer=1,
                n_head=4,
                vocab_size=100,
                n_positions=positions,
                **ENDS,
            ),
            attention=(CAUSAL,),
            causal=True,
        ),
        "opt": Case(
            of("OPTForCausalLM", "OPTConfig", **sizes, ffn_dim=64, word_embed_proj_dim=32),
            attention=({**CAUSAL, "scale": 8**-0.5},),
            causal=True,
        ),
        "llama": Case(
            of("LlamaForCausalLM", "LlamaConfig", **shared), norms=3, rotary=(2, 1), attention=(GROUPED,), causal=True
        ),
        "mistral": Case(
            of("MistralForCausalLM", "MistralConfig", **shared, sliding_window=WINDOW),
            norms=3,
            rotary=(2, 1),
            attention=(SLIDING,),
            causal=True,
        ),
        "qwen2": Case(
            of("Qwen2ForCausalLM", "Qwen2Config", **shared, tie_word_embeddings=True),
            norms=3,
            rotary=(2, 1),
            attention=(GROUPED,),
            causal=True,
        ),
        "qwen3": Case(
            of("Qwen3ForCausalLM", "Qwen3Config", **shared, head_dim=8),
            norms=5,
            rotary=(2, 1),
            attention=(GROUPED,),
            causal=True,
        ),
        "phi3": Case(
            of("Phi3ForCausalLM", "Phi3Config", **shared), norms=3, rotary=(2, 1), attention=(GROUPED,), causal=True
        ),
        "gemma3": Case(
            of(
                "Gemma3ForCausalLM",
                "Gemma3TextConfig",
                **{**shared, "num_hidden_layers": 2},
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
            of("MixtralForCausalLM", "MixtralConfig", **shared, num_local_experts=4, num_experts_per_tok=2),
            norms=3,
            rotary=(2, 1),
            attention=(GROUPED,),
            causal=True,
        ),
        "qwen3 moe": Case(
            of(
                "Qwen3MoeForCausalLM",
                "Qwen3MoeConfig",
                **shared,
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


CASES = cases(LAST)


@cache
def captured(kind: str, positions: int = LAST) -> tuple[nn.Module, Graph]:
    """A model and the float stage of its graph."""
    torch.manual_seed(11)
    module = cases(positions)[kind].build().eval()
    for name, parameter in module.named_parameters():
        if "norm" in name.lower():  # as built they are ones or zeros, which would hide a wrong use of them
            nn.init.normal_(parameter, 0.5, 0.2)
    example = {"input_features": torch.zeros(1, 8, 40)} if kind.startswith("whisper") else None
    return module, load(module, example=example, max_tokens=positions).float_graph


def example_inputs(kind: str, tokens: int, seed: int = 5) -> dict[str, torch.Tensor]:
    """Inputs with a batch of one; ViT and Whisper have a length of their own."""
    generator = torch.Generator().manual_seed(seed + tokens)
    if kind == "vit":
        return {"pixel_values": torch.randn(1, 3, 16, 16, generator=generator)}
    if kind.startswith("whisper"):
        return {"input_features": torch.randn(1, 8, 40, generator=generator)}
    return {"input_ids": torch.randint(3, 100, (1, tokens), generator=generator)}
