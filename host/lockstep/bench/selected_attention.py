"""Attention to the blocks of keys that the core chooses itself, beside the same attention to all of them.

Cycles hold everything that choosing costs: the sketch of the keys, the look at it, the selection and the gathers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from typing import Any

import numpy as np
from lockstep_driver import Device
from lockstep_isa import attention
from lockstep_isa.config import CoreConfig
from lockstep_isa.program import Program
from lockstep_isa.selectors import Looked
from numpy.typing import NDArray

from lockstep.compiler.block_mask import BlockSparse, default_tile, dense_mask
from lockstep.compiler.prefill_sparse import prefill_sparse_program
from lockstep.compiler.prefill_work import Places, PrefillSparse, check_core
from lockstep.compiler.sketch_prefill import Constants, sketch_constants

from .limits import Limit, ceil_div
from .measure import Bench, BenchError, Measurement, Ran
from .sizes import SparseAttentionSizes
from .sparse_attention import HEADS, TOKENS, Operands, block_slots, measure_dense, run_program

#: What is counted, from doorbell to fence.
INSIDE = (
    "program, int8 queries, keys, values and their float32 scales from device memory; the sketch of the keys, the look "
    "at it, the selection; both products, softmax and its requantisation; float32 results to device memory"
)
#: Tokens of a block of dense attention.
DENSE = 64


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
        (q8, sq), (k8, sk) = of["q"], of["k"]
        heads = range(work.heads)
        return [work.rule.tiles(Looked(q8[h], sq[h], k8[h], sk[h], seen, factor)) for h in heads]

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
    def probability(self) -> float:
        """The part of the probability of all seen keys that the kept ones have, on average over queries."""
        return self._share(self.blocks)

    @cached_property
    def best_probability(self) -> float:
        """The same for as many blocks of each tile, those that have the most of it by exact scores of all keys."""
        kept = [self.work.kept(tile) for tile in range(self.work.tiles)]
        return self._share(
            [
                [np.argsort(-tile.sum(axis=0), kind="stable")[:count] for tile, count in zip(head, kept, strict=True)]
                for head in self._shares
            ]
        )

    def _share(self, blocks: list[list[NDArray[np.intp]]]) -> float:
        return float(
            np.mean(
                [
                    shares[:, of_tile].sum(axis=1)
                    for head, of in zip(self._shares, blocks, strict=True)
                    for shares, of_tile in zip(head, of, strict=True)
                ]
            )
        )

    @cached_property
    def _shares(self) -> list[NDArray[np.float64]]:
        """The probability that each block has: float64[tiles, queries, blocks] of each head."""
        work, found = self.work, []
        for q, k in zip(self.operands.q.astype(np.float64), self.operands.k.astype(np.float64), strict=True):
            scores = q @ k.T / np.sqrt(work.head_dim)
            if work.causal:
                scores = np.where(np.tri(work.tokens, dtype=np.bool_), scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            found.append(weights.reshape(work.tiles, work.queries, -1, work.block).sum(axis=3))
        return found


def run_selected(device: Device, work: PrefillSparse, operands: Operands) -> Ran:
    """Place the operands, run the program, and read ``float32[heads, tokens, head_dim]``."""
    constants = sketch_constants(device.config.rows)

    def program(places: Mapping[str, int], tables: dict[str, int]) -> Program:
        of_maker = Constants(**{name: places[name] for name in constants})
        others = {name: place for name, place in places.items() if name not in constants}
        return prefill_sparse_program(device.config, work, Places(**others, tables=tables, constants=of_maker))

    return run_program(device, operands, constants, program)


def selected_limit(config: CoreConfig, work: PrefillSparse) -> Limit:
    """The array's cycles for what is kept, or the bytes over the bus: whichever takes longer. Choosing is not in it."""
    slots, d = block_slots(config, work.block, work.head_dim), work.head_dim
    tokens = work.heads * work.tokens
    # Queries and all keys once: those that are not kept were looked at; values of the blocks that are always kept.
    read = tokens * 2 * (d + 4) + work.heads * (work.first + work.last) * work.block * (d + 4)
    written = tokens * d * 4
    beats = ceil_div(read + written, config.bus_bytes)
    return Limit(
        max(work.kept_pairs * slots, beats),
        "max(kept blocks * array slots of a block's two products, (bytes of queries, all keys, the values that are "
        "always kept, and their scales + result bytes) / bus bytes)",
        f"max({work.kept_pairs:,} * {slots:,}, ({read:,} + {written:,}) / {config.bus_bytes}) = "
        f"max({work.kept_pairs * slots:,}, {beats:,})",
    )


def run_selection(sizes: SparseAttentionSizes, density: float, bench: Bench) -> Iterator[Measurement]:
    """Dense first, then the blocks that the core chooses."""
    work = _work(sizes, density)
    check_core(bench.config, work)
    dense_mask_ = dense_mask(work.heads, work.tokens // DENSE, work.causal)
    dense = BlockSparse(dense_mask_, DENSE, work.head_dim, default_tile(DENSE, work.tokens), work.causal)
    bench.say(f"golden attention of {work.heads} heads, {work.tokens} tokens")
    operands = clustered_operands(work.heads, work.tokens, work.head_dim, sizes.seed)
    parameters: dict[str, Any] = {
        "select": density,
        "heads": work.heads,
        "seq": work.tokens,
        "head_dim": work.head_dim,
        "queries": work.queries,
        "block": work.block,
        "causal": work.causal,
        "seed": sizes.seed,
    }
    dense_cycles = measure_dense(dense, operands, parameters, bench)
    chosen = Chosen(work, operands)

    def figures(cycles: int) -> dict[str, object]:
        return {
            "dense_cycles": dense_cycles,
            "density": work.kept_pairs / work.seen_pairs,
            "speedup": dense_cycles / cycles,
            "kept_probability": chosen.probability,
            "best_probability": chosen.best_probability,
            "inside": INSIDE,
        }

    bench.say(f"attention with {work.kept_pairs:,} of {work.seen_pairs:,} blocks on {bench.uri}")
    yield bench.measure(
        "sparse-attention",
        parameters,
        selected_limit(bench.config, work),
        partial(run_selected, work=work, operands=operands),
        [chosen.attention],
        # Programs are a few hundred bytes for each product.
        memory_bytes=2 * operands.q.nbytes * 4 + work.heads * work.tokens * 1024 + (8 << 20),
        figures=figures,
    )


def _work(sizes: SparseAttentionSizes, density: float) -> PrefillSparse:
    """The attention that was asked for; raises :class:`BenchError` and what :class:`PrefillSparse` raises."""
    given = [
        option
        for option, value, unasked in (
            ("--mask", sizes.mask, None),
            ("--pattern", sizes.pattern, SparseAttentionSizes.pattern),
            ("--block", sizes.block, SparseAttentionSizes.block),
            ("--tile", sizes.tile, None),
        )
        if value != unasked
    ]
    if given:
        raise BenchError(f"{given[0]} is for blocks that are known beforehand; leave it out, or leave out --select")
    tokens = TOKENS if sizes.seq is None else sizes.seq
    if tokens % DENSE:
        raise BenchError(
            f"{tokens} tokens are no multiple of {DENSE}, the block of the dense attention that it is compared with; "
            "give --seq a multiple of it"
        )
    heads = HEADS if sizes.heads is None else sizes.heads
    return PrefillSparse(heads, tokens, sizes.head_dim, density, sizes.causal, sizes.queries)
