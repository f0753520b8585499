"""The cases of ``lockstep bench``. Adding one is one entry; its sizes become the options of its command."""

from __future__ import annotations

from . import sizes
from .case import Bar, Case, Published

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case(
            "gemm",
            "Products of int8 matrices from 16 to 512, dequantised to float32.",
            sizes.GemmSizes,
            "gemm",
            Bar("of random products the median 95 % of the limit, the worst 80 %", 0.95, worst=0.80, sample=50),
            (Published("81.9 to 99.3 % of its peak", "OpenGeMM (Yi et al., 2025), GEMMs of its evaluation"),),
        ),
        Case(
            "minilm",
            "MiniLM on one text, beside an array that is always busy.",
            sizes.MiniLmSizes,
            "minilm",
            Bar("95 % of the array's slots", 0.95),
        ),
        Case(
            "decode",
            "One token of a language model with random weights, behind a cache.",
            sizes.DecodeSizes,
            "decode",
            Bar("at most 1.05 times the limit", 1 / 1.05),
            (
                Published("1.02 times its limit", "Hummingbird"),
                Published("1.13 times its limit", "llama-fpga"),
                Published("up to 12 times its limit", "Allo"),
            ),
        ),
        Case(
            "resblock-mha",
            "Transformer-base attention block; all weights stream from memory.",
            sizes.AttentionBlockSizes,
            "blocks",
            Bar("at most 18,000 cycles on paper", 17_408 / 18_000, core="paper"),
            (
                Published("21,344 cycles with an array of 64 x 64", "Lu et al., 2020"),
                Published("17,534 cycles scaled to 64 x 64, without residual, norm and memory", "ITA's RTL"),
            ),
            core="paper",
        ),
        Case(
            "resblock-ffn",
            "Transformer-base feed-forward block; all weights stream from memory.",
            sizes.FeedForwardBlockSizes,
            "blocks",
            Bar("at most 33,400 cycles on paper", 32_768 / 33_400, core="paper"),
            (
                Published("42,099 cycles with an array of 64 x 64", "Lu et al., 2020"),
                Published("32,784 cycles scaled to 64 x 64, without residual, norm and memory", "ITA's RTL"),
            ),
            core="paper",
        ),
        Case(
            "sparse-attention",
            "Causal attention that skips blocks of keys, beside the same with none skipped.",
            sizes.SparseAttentionSizes,
            "sparse_attention_case",
            Bar(
                "at least 0.9 / density times as fast as dense",
                0.9,
                figure="speedup_over_inverse_density",
            ),
        ),
    )
}
