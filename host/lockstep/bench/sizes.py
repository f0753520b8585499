"""The sizes of every case: what its command can be asked for, and what it does unasked."""

from __future__ import annotations

from dataclasses import dataclass

from .case import option


@dataclass(frozen=True)
class GemmSizes:
    """Options of ``lockstep bench gemm``: one product, or many drawn from a seed."""

    m: int | None = option(None, "Rows of the result; give --n and --k too.")
    n: int | None = option(None, "Columns of the result.")
    k: int | None = option(None, "Depth of the sums.")
    shapes: int = option(200, "Random products, where no size is given.")
    seed: int = option(0, "Of sizes and values.")
