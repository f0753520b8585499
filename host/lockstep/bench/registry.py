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
    )
}
