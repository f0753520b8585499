"""Block-sparse attention beside causal dense attention: cycles should shrink as the blocks do.

Queries, keys and values lie in device memory as int8, with a scale per token and head, as the cache of a session does;
results return there as float32. Both runs come from one maker of programs, and every bit of both is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from lockstep_driver import Device
from lockstep_isa import attention
from lockstep_isa.config import CoreConfig
from lockstep_isa.program import Program
from lockstep_isa.quantisation import quantise_rows
from numpy.typing import NDArray

from lockstep.compiler.block_mask import BlockSparse, default_tile, strips
from lockstep.compiler.block_sparse import Places, block_sparse_program
from lockstep.compiler.layout import column_words, from_panels, table_words, to_panels

from .limits import Limit, ceil_div, mac_slots
from .measure import Bench, BenchError, Measurement, Ran
from .sizes import SparseAttentionSizes
from .sparse_masks import BlockMask, pattern_mask, read_mask

#: What is counted, from doorbell to fence.
INSIDE = (
    "program, int8 queries, keys, values and their float32 scales from device memory; both products, softmax and its "
    "requantisation; float32 results to device memory"
)
#: Without --mask and --seq or --heads.
TOKENS, HEADS = 512, 4
TABLES = ("exp2", "recip")


@dataclass(frozen=True)
class Operands:
    """q, k, v : float32[heads, tokens, head_dim], whose rows are quantised for a core."""

    q: NDArray[np.float32]
    k: NDArray[np.float32]
    v: NDArray[np.float32]

    @cached_property
    def quantised(self) -> dict[str, tuple[NDArray[np.int8], NDArray[np.float32]]]:
        """int8[heads, tokens, head_dim] and float32[heads, tokens] of each."""
        found = {}
        for name, x in (("q", self.q), ("k", self.k), ("v", self.v)):
            values, scales = quantise_rows(x.reshape(-1, x.shape[2]))
            found[name] = values.reshape(x.shape), scales.reshape(x.shape[:2])
        return found


def random_operands(heads: int, tokens: int, head_dim: int, seed: int = 0) -> Operands:
    """Normal values; queries are larger, so that softmax has peaks."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((heads, tokens, head_dim)).astype(np.float32) for _ in range(3))
    return Operands(2 * q, k, v)


def golden(work: BlockSparse, operands: Operands) -> NDArray[np.float32]:
    """The contract's attention with the elements that the mask leaves: float32[heads, tokens, head_dim]."""
    return np.stack(
        [
            attention.attention(q, k, v, tile=work.tile, mask=work.seen(head))
            for head, (q, k, v) in enumerate(zip(operands.q, operands.k, operands.v, strict=True))
        ]
    )


def run_attention(device: Device, work: BlockSparse, operands: Operands) -> Ran:
    """Place the operands, run the program, and read ``float32[heads, tokens, head_dim]``."""

    def program(places: Mapping[str, int], tables: dict[str, int]) -> Program:
        return block_sparse_program(device.config, work, Places(**places, tables=tables))

    return run_program(device, operands, {}, program)


def run_program(
    device: Device,
    operands: Operands,
    constants: Mapping[str, NDArray[np.generic]],
    program: Callable[[Mapping[str, int], dict[str, int]], Program],
) -> Ran:
    """Place operands and constants in device memory, run a program of attention, and read its result.

    program : makes it from the addresses of all arrays by name, those of function tables apart.

    Gives ``float32[heads, tokens, head_dim]``.
    """
    rows, (heads, tokens, head_dim) = device.config.rows, operands.q.shape
    arrays: dict[str, np.ndarray] = {name: table_words(name) for name in TABLES} | dict(constants)
    for name, (values, scales) in operands.quantised.items():
        panels = [to_panels(head.T if name == "v" else head, rows) for head in values]
        arrays[name] = np.concatenate(panels)
        arrays[f"{name}_scales"] = np.concatenate([column_words(head, rows) for head in scales])
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
        counters = device.run(program(places, tables))
        raw = buffers["out"].data.view(np.float32).reshape(-1, head_dim, rows)
        return Ran([from_panels(raw, heads * tokens).reshape(out.shape)], counters)
    finally:
        for buffer in buffers.values():
            device.free(buffer)


def block_slots(config: CoreConfig, block: int, head_dim: int) -> int:
    """Cycles of the array for both products of a block of queries with a block of keys."""
    values = ceil_div(block, config.rows) * ceil_div(head_dim, config.columns) * block
    return mac_slots(config, block, block, head_dim) + values


def sparse_limit(config: CoreConfig, work: BlockSparse) -> Limit:
    """The multiply-accumulates of the kept blocks over the array, or the bytes over the bus: whichever takes longer.

    Queries count if they keep any key, keys and values count once, if any query keeps them: a core with endless memory
    would read them once. Where the core passes over zeros, probabilities above the diagonal do not count; others that
    come out as 0 do.
    """
    block, d = work.block, work.head_dim
    each = block_slots(config, block, d)
    diagonal = int(work.mask.diagonal(axis1=1, axis2=2).sum()) if config.zero_skipping and work.causal else 0
    tiles = ceil_div(block, config.rows)
    zeros = tiles * (tiles - 1) // 2 * ceil_div(d, config.columns) * config.rows
    slots = work.kept * each - diagonal * zeros
    subtracted = f" - {diagonal:,} * {zeros:,}" if diagonal else ""
    queries, keys = (int(work.mask.any(axis=axis).sum()) * block for axis in (2, 1))
    read = (queries + 2 * keys) * (d + 4)
    written = work.heads * work.tokens * d * 4
    beats = ceil_div(read + written, config.bus_bytes)
    return Limit(
        max(slots, beats),
        "max(kept blocks * array slots of a block's two products"
        + (" - blocks on the diagonal * zeros above it" if diagonal else "")
        + ", (bytes of queries, kept keys and values, and their scales + result bytes) / bus bytes)",
        f"max({work.kept:,} * {each:,}{subtracted}, ({read:,} + {written:,}) / {config.bus_bytes}) = "
        f"max({slots:,}, {beats:,})",
    )


def run_mask(sizes: SparseAttentionSizes, bench: Bench) -> Iterator[Measurement]:
    """Dense first, then what the mask keeps."""
    work = _work(sizes, bench)
    shape = (work.heads, work.tokens, work.head_dim)
    bench.say(f"golden attention of {work.heads} heads, {work.tokens} tokens")
    operands = random_operands(*shape, sizes.seed)
    parameters = {
        "pattern": str(sizes.mask or sizes.pattern),
        "heads": work.heads,
        "seq": work.tokens,
        "head_dim": work.head_dim,
        "block": work.block,
        "tile": work.tile,
        "causal": work.causal,
        "seed": sizes.seed,
    }
    dense = measure_dense(work.dense, operands, parameters, bench)
    yield _measure(work, operands, parameters, bench, dense)


def measure_dense(dense: BlockSparse, operands: Operands, parameters: Mapping[str, object], bench: Bench) -> int:
    """The cycles of attention that skips nothing; raises :class:`BenchError` where its bits are not golden's."""
    found = _measure(dense, operands, parameters, bench)
    if not found.identical:
        raise BenchError(f"dense attention has {found.differences:,} values of other bits than golden on {bench.uri}")
    return found.cycles


def _measure(
    work: BlockSparse, operands: Operands, parameters: Mapping[str, object], bench: Bench, dense: int | None = None
) -> Measurement:
    bench.say(f"attention with {work.kept:,} of {work.dense.kept:,} blocks on {bench.uri}")

    def figures(cycles: int) -> dict[str, object]:
        if dense is None:
            return {}
        speedup = dense / cycles
        return {
            "dense_cycles": dense,
            "density": work.density,
            "speedup": speedup,
            "speedup_over_inverse_density": speedup * work.density,
            "inside": INSIDE,
        }

    return bench.measure(
        "sparse-attention",
        dict(parameters),
        sparse_limit(bench.config, work),
        partial(run_attention, work=work, operands=operands),
        [golden(work, operands)],
        # Programs are a few hundred bytes for each kept block.
        memory_bytes=2 * operands.q.nbytes * 4 + work.kept * 4096 + (8 << 20),
        figures=figures,
    )


def _work(sizes: SparseAttentionSizes, bench: Bench) -> BlockSparse:
    """The attention that was asked for; raises :class:`BenchError` and what :class:`BlockSparse` raises."""
    if sizes.block < 1:
        raise BenchError(f"blocks of {sizes.block} tokens hold nothing; give --block a multiple of the core's rows")
    if sizes.seq is not None and (sizes.seq < 1 or sizes.seq % sizes.block):
        raise BenchError(
            f"{sizes.seq} tokens are no whole number of blocks of {sizes.block}; give --seq a multiple of it"
        )
    if sizes.heads is not None and sizes.heads < 1:
        raise BenchError(f"{sizes.heads} heads are none; give --heads of at least 1")
    mask: BlockMask
    if sizes.mask is not None:
        blocks = None if sizes.seq is None else sizes.seq // sizes.block
        mask = read_mask(sizes.mask, sizes.heads, blocks)
        hidden = int(np.triu(mask, 1).sum()) if sizes.causal else 0
        if hidden:
            bench.say(f"{hidden:,} blocks of {sizes.mask} come after their queries, which do not see them")
    else:
        blocks = (sizes.seq or ceil_div(TOKENS, sizes.block) * sizes.block) // sizes.block
        mask = pattern_mask(sizes.pattern, sizes.heads or HEADS, blocks, sizes.causal, sizes.seed)
    tile = default_tile(sizes.block, mask.shape[1] * sizes.block) if sizes.tile is None else sizes.tile
    work = BlockSparse(mask, sizes.block, sizes.head_dim, tile, sizes.causal)
    strips(bench.config, work.dense)  # does it fit? golden may take minutes
    return work
