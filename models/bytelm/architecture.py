"""The shape of the tiny model."""

from __future__ import annotations

from transformers import LlamaConfig, LlamaForCausalLM

from bytelm.tokenizer import BOS, EOS, PAD, VOCABULARY


def tiny_config(layers: int = 4, intermediate: int = 640) -> LlamaConfig:
    """A Llama of few, wide layers: every dimension is a multiple of 16, heads have the usual 64 features."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


def parameter_count(model: LlamaForCausalLM) -> int:
    """Parameters, the tied embedding counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
