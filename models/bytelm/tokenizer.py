"""A tokenizer with one token per byte: the token of a byte is its value, so ``list(text.encode())`` tokenizes too."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = 256, 257, 258
#: Rows of the embedding: 259 tokens, rounded up to a multiple of 16. No text has the last 13.
VOCABULARY = 272

_SPECIAL = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}


def byte_characters() -> list[str]:
    """The character that stands for each byte 0..255 in ``tokenizer.json``.

    The mapping of GPT-2, which the library's byte-level parts use: printable Latin-1 stands for itself, the other bytes
    follow from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def build_tokenizer(longest: int) -> PreTrainedTokenizerFast:
    """The tokenizer of a model of ``longest`` positions; puts BOS before a text unless told otherwise."""
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in _SPECIAL.values()])
    bos = _SPECIAL["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=longest,
        clean_up_tokenization_spaces=False,
        **_SPECIAL,
    )
