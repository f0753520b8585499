"""Attention to the blocks of keys that the core chooses itself, beside the same attention to all of them.

Cycles hold everything that choosing costs: the sketch of the keys, the look at it, the selection and the gathers.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
from lockstep_driver import Device
from lockstep_isa import attention
from lockstep_isa.prefill_selection import TileBlocks
from lockstep_isa.selectors import Looked
from numpy.typing import NDArray

from lockstep.compiler.layout import column_words, from_panels, table_words, to_panels
from lockstep.compiler.prefill_sparse import Places, prefill_sparse_program
from lockstep.compiler.prefill_work import PrefillSparse
from lockstep.compiler.sketch_prefill import Constants, sketch_constants

from .measure import Ran
from .sparse_attention import TABLES, Operands


def clustered_operands(heads: int, tokens: int, head_dim: int, seed: int = 0) -> Operands:
    """Keys of 16 neighbours about one topic, and queries of 64 neighbours that look for a few of them."""
    rng = np.random.default_rng(seed)
    shape = heads, tokens, head_dim
    topics = rng.standard_normal((heads, max(4, tokens // 32), head_dim))
    count = topics.shape[1]

    def about(neighbours: int, noise: float) -> NDArray[np.float64]:
        topic = rng.integers(0, count, (heads, -(-tokens // neighbours)))
        chosen = np.repeat(topic, neighbours, axis=1)[:, :tokens]
        return np.take_along_axis(topics, chosen[:, :, None], axis=1) + noise * rng.standard_normal(shape)

    q, k = 1.5 * about(16, 0.5), about(16, 0.5)
    v = rng.standard_normal(shape)
    return Operands(*(x.astype(np.float32) for x in (q, k, v)))


class Chosen:
    """Golden: what each tile of queries of each head keeps, and the attention to it."""

    def __init__(self, work: PrefillSparse, operands: Operands) -> None:
        self.work, self.operands = work, operands

    @cached_property
    def blocks(self) -> list[list[NDArray[np.intp]]]:
        """By head and tile, ascending."""
        work, of = self.work, self.operands.quantised
        seen = attention.visible(np.arange(work.tokens), work.tokens, work.causal)
        factor = attention.score_factor(None, work.head_dim)
        parts = [[values[head] for name in ("q", "k") for values in of[name]] for head in range(work.heads)]
        return [work.rule.tiles(Looked(*part, seen, factor)) for part in parts]

    @cached_property
    def attention(self) -> NDArray[np.float32]:
        """float32[heads, tokens, head_dim]."""
        work, out = self.work, np.empty(self.operands.q.shape, np.float32)
        for head, tiles in enumerate(self.blocks):
            for tile, blocks in enumerate(tiles):
                rows = slice(tile * work.queries, (tile + 1) * work.queries)
                keys = (blocks[:, None] * work.block + np.arange(work.block)).reshape(-1)
                seen = keys <= np.arange(rows.start, rows.stop)[:, None] if work.causal else None
                q, k, v = self.operands.q[head, rows], self.operands.k[head, keys], self.operands.v[head, keys]
                out[head, rows] = attention.attention(q, k, v, tile=len(keys), mask=seen)
        return out

    @cached_property
    def mass(self) -> float:
        """The part of the probability of all seen keys that the kept ones have, on average over queries."""
        work, shares = self.work, []
        for head, tiles in enumerate(self.blocks):
            q, k = (x[head].astype(np.float64) for x in (self.operands.q, self.operands.k))
            scores = q @ k.T / np.sqrt(work.head_dim)
            if work.causal:
                scores = np.where(np.tri(work.tokens, dtype=np.bool_), scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            by_block = weights.reshape(work.tokens, -1, work.block).sum(axis=2)
            shares += [
                by_block[tile * work.queries : (tile + 1) * work.queries, blocks].sum(axis=1)
                for tile, blocks in enumerate(tiles)
            ]
        return float(np.mean(shares))


def run_selected(device: Device, work: PrefillSparse, operands: Operands) -> Ran:
    """Place the operands, run the program, and read ``float32[heads, tokens, head_dim]``."""
    rows = device.config.rows
    arrays: dict[str, np.ndarray] = {name: table_words(name) for name in TABLES}
    for name, (values, scales) in operands.quantised.items():
        panels = [to_panels(head.T if name == "v" else head, rows) for head in values]
        arrays[name] = np.concatenate(panels)
        arrays[f"{name}_scales"] = np.concatenate([column_words(head, rows) for head in scales])
    constants = sketch_constants(rows)
    arrays |= constants
    out = np.empty(operands.q.shape, np.float32)
    buffers = {name: device.allocate(array.nbytes) for name, array in arrays.items()}
    buffers["out"] = device.allocate(out.nbytes)
    try:
        for name, array in arrays.items():
            buffers[name].write(array)
        # What an earlier run left must not be taken for this one's.
        buffers["out"].data[:] = 0xFF
        places = {name: buffer.address for name, buffer in buffers.items()}
        tables = {name: places.pop(name) for name in TABLES}
        made = Constants(**{name: places.pop(name) for name in constants})
        program = prefill_sparse_program(device.config, work, Places(**places, tables=tables, constants=made))
        counters = device.run(program)
        raw = buffers["out"].data.view(np.float32).reshape(-1, work.head_dim, rows)
        return Ran([from_panels(raw, work.heads * work.tokens).reshape(out.shape)], counters)
    finally:
        for buffer in buffers.values():
            device.free(buffer)
