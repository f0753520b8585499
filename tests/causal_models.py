"""A causal language model of bytes with random weights, as a folder of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: Bytes and the special tokens behind them.
VOCABULARY = 260
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(chat_template: str | None = None) -> Any:
    """One token per byte; 256 begins a text, 257 ends one, 258 pads."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    vocabulary = {letters[byte]: byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>", "<pad>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    result = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )
    result.chat_template = chat_template
    return result


def save_causal_model(
    folder: Path, seed: int = 0, chat: bool = False, generation: dict[str, Any] | None = None, **fields: Any
) -> Path:
    """A Llama of two layers and 32 features with a tokenizer of bytes; ``generation`` is its generation_config.json."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        **{
            **sizes,
            "num_key_value_heads": 2,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 256,
            "bos_token_id": 256,
            "eos_token_id": 257,
            "pad_token_id": 258,
            "initializer_range": 0.5,
            **fields,
        }
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer(CHAT_TEMPLATE if chat else None).save_pretrained(folder)
    path = folder / "generation_config.json"
    if generation is None:
        path.unlink(missing_ok=True)
    else:
        path.write_text(json.dumps(generation))
    return folder
