"""The sizes of every case: what its command can be asked for, and what it does unasked.

A field is an option of the command: its annotation is the type with the option's help, its default what runs unasked.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated


@dataclass(frozen=True)
class GemmSizes:
    """One product, or many drawn from a seed."""

    m: Annotated[int | None, "Rows of the result; give --n and --k too."] = None
    n: Annotated[int | None, "Columns of the result."] = None
    k: Annotated[int | None, "Depth of the sums."] = None
    shapes: Annotated[int, "Random products, where no size is given."] = 200
    weights: Annotated[str, "Of the right side: int8, int4 (groups of 32), int4-g64 or int4-g128."] = "int8"
    sparsity: Annotated[str, "Of the weights: none, 2:4 or 1:4."] = "none"
    seed: Annotated[int, "Of sizes and values."] = 0


@dataclass(frozen=True)
class MiniLmSizes:
    """One text through the whole model."""

    tokens: Annotated[int, "Of the text."] = 128
    reference: Annotated[str, "What to compare with: golden, or cpu, which is faster."] = "golden"
    seed: Annotated[int, "Of the tokens."] = 0


@dataclass(frozen=True)
class DecodeSizes:
    """One token behind a cache, for every shape and context."""

    shape: Annotated[list[str] | None, "Of the model; may be given again. Without it gpt2-medium, then llama-160m."] = (
        None
    )
    context: Annotated[list[int] | None, "Tokens in the cache; may be given again. Without it 128, 512, then 1024."] = (
        None
    )
    layers: Annotated[int, "Layers."] = 2
    kv_heads: Annotated[
        int | None, "Heads of keys and values, a divisor of those of queries; unasked, the shape's."
    ] = None
    head: Annotated[bool, "Compute the logits too, over the shape's vocabulary."] = False
    keep: Annotated[int | None, "Tokens of the context that the cache keeps; unasked, all."] = None
    evict: Annotated[str | None, "Which token makes room for the new one: streaming, h2o or spatten."] = None
    select: Annotated[int | None, "Keys that the token attends to, in blocks of 16 that the core chooses."] = None
    cache_bits: Annotated[int | None, "Of a key or value: 8, or 4; unasked, 8."] = None
    weights: Annotated[str, "Of all products: int8, int4 (groups of 32), int4-g64 or int4-g128."] = "int8"
    sparsity: Annotated[str, "Of the weights: none, 2:4 or 1:4."] = "none"
    seed: Annotated[int, "Of weights, keys and values."] = 0


@dataclass(frozen=True)
class AttentionBlockSizes:
    """One block of multi-head attention: projections, softmax, residual, layer norm, requantisation."""

    seq: Annotated[int, "Tokens."] = 64
    d_model: Annotated[int, "Features of a token."] = 512
    heads: Annotated[int, "Heads."] = 8
    parts: Annotated[int, "1 or 2: scales per token of the last product's left operand."] = 2
    seed: Annotated[int, "Of weights and values."] = 0


@dataclass(frozen=True)
class FeedForwardBlockSizes:
    """One feed-forward block: two products, ReLU, residual, layer norm, requantisation."""

    seq: Annotated[int, "Tokens."] = 64
    d_model: Annotated[int, "Features of a token."] = 512
    d_ff: Annotated[int, "Features between the products."] = 2048
    parts: Annotated[int, "1 or 2: scales per token of the last product's left operand."] = 2
    seed: Annotated[int, "Of weights and values."] = 0


@dataclass(frozen=True)
class SparseAttentionSizes:
    """Attention that keeps some blocks of queries and keys, beside one that keeps them all."""

    mask: Annotated[Path | None, "A file of NumPy: bool[heads, query blocks, key blocks], True is kept."] = None
    pattern: Annotated[str, "Without --mask: causal, window:W, sinks:S+window:W (in blocks), or random:DENSITY."] = (
        "random:0.4"
    )
    select: Annotated[
        float | None, "The core chooses this share of the blocks of 16 keys by itself, in the place of a mask."
    ] = None
    queries: Annotated[int, "With --select: queries that choose together, a multiple of 16."] = 32
    heads: Annotated[int | None, "Heads; unasked, the mask's, or 4."] = None
    seq: Annotated[int | None, "Tokens; unasked, the mask's, or 512."] = None
    head_dim: Annotated[int, "Features of a head."] = 128
    block: Annotated[int, "Tokens of a block."] = 64
    tile: Annotated[int | None, "Keys per tile of the stream, part of the bits; unasked, up to 2048."] = None
    causal: Annotated[bool, "Queries see keys up to their own position."] = True
    seed: Annotated[int, "Of values and random blocks."] = 0
