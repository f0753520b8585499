"""The case ``sparse-attention``: blocks of keys that a mask keeps, or that the core chooses itself."""

from __future__ import annotations

from collections.abc import Iterator

from . import selected_attention, sparse_attention
from .measure import Bench, Measurement
from .sizes import SparseAttentionSizes


def run(sizes: SparseAttentionSizes, bench: Bench) -> Iterator[Measurement]:
    """Dense first, then the mask, or what the core chooses."""
    if sizes.select is None:
        yield from sparse_attention.run_mask(sizes, bench)
    else:
        yield from selected_attention.run_selection(sizes, sizes.select, bench)
