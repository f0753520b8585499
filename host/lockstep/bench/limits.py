"""What no program can beat: cycles from sizes alone, each with its formula in words and in numbers.

A limit knows the array, the bus and the refresh of device memory, and nothing of programs. Bytes are those of the
arrays themselves, without the padding that panels add; multiply-accumulates are counted in slots of the array, with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lockstep_isa.config import CoreConfig
from lockstep_sim.core import MemoryTiming

from lockstep.compiler.cache_form import INT8, CacheForm
from lockstep.compiler.packing import Packing, packing
from lockstep.compiler.sketch import BLOCK, BLOCK_ROWS, panel_words
from lockstep.graph import Attention, Graph, Linear


@dataclass(frozen=True)
class Limit:
    """A number of cycles, what it is made of, and the same with numbers.

    Attributes
    ----------
    cycles : no run can take fewer. formula : in words. numbers : the formula with its numbers.
    """

    cycles: float
    formula: str
    numbers: str


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def mac_slots(config: CoreConfig, m: int, n: int, k: int, rate: int = 1) -> int:
    """Cycles in which the array is busy with an m x n x k product, whole tiles counted, ``rate`` inputs in each."""
    return ceil_div(m, config.rows) * ceil_div(n, config.columns) * max(ceil_div(k, rate), config.rows)


def gemm_bytes(m: int, n: int, k: int, channel: int | None = None) -> tuple[int, int]:
    """(bytes read, bytes written) of ``float32[m, n] = (int8[m, k] . int8[n, k]^T) * float32[m] * float32[n]``.

    channel : bytes of the weights of an output channel, if they are not k.
    """
    return m * k + n * (k if channel is None else channel) + 4 * (m + n), 4 * m * n


def gemm_limit(config: CoreConfig, m: int, n: int, k: int, form: Packing | None = None) -> Limit:
    """The larger of the array's and the bus's time for a product whose operands and result lie in device memory.

    form : of the right side, dense int8 if not said.
    """
    form = form or Packing(k)
    slots, (read, written) = mac_slots(config, m, n, k, form.rate), gemm_bytes(m, n, k, form.words)
    beats = ceil_div(read + written, config.bus_bytes)
    skew = 2 * config.rows - 2
    rows = config.rows
    steps = "K" if form.rate == 1 else f"K/{form.rate}"
    return Limit(
        max(slots, beats) + skew,
        f"max(ceil(M/R) ceil(N/R) max({steps}, R), (operand bytes + result bytes) / bus bytes) + 2 R - 2",
        f"max({ceil_div(m, rows)} * {ceil_div(n, rows)} * {max(ceil_div(k, form.rate), rows)}, ({read:,} + "
        f"{written:,}) / "
        f"{config.bus_bytes}) + {skew} = max({slots:,}, {beats:,}) + {skew}",
    )


def graph_slots(config: CoreConfig, graph: Graph, lengths: Sequence[int]) -> int:
    """Cycles in which the array is busy with the products of ``graph`` for sequences of these lengths.

    Row tiles are those of each sequence by itself. Attention takes all keys of its sequence, without a mask.
    """
    total = 0
    for tokens in lengths:
        for linear in graph.of(Linear):
            outputs, depth = graph.tensors[linear.weight].shape
            total += mac_slots(config, tokens, outputs, depth, _form(config, graph, linear).rate)
        for attention in graph.of(Attention):
            scores = mac_slots(config, tokens, tokens, attention.head_dim)
            mixed = mac_slots(config, tokens, attention.head_dim, tokens)
            total += attention.heads * (scores + mixed)
    return total


def array_limit(config: CoreConfig, graph: Graph, lengths: Sequence[int]) -> Limit:
    """The array busy in every cycle."""
    slots = graph_slots(config, graph, lengths)
    return Limit(
        slots,
        "sum over products of ceil(M/R) ceil(N/R) max(K, R)" + (", K / rate where packed" if graph.stored else ""),
        f"{slots:,} array slots of {config.rows} x {config.columns}",
    )


def decode_slots(
    config: CoreConfig, graph: Graph, context: int, chosen: int | None = None, form: CacheForm = INT8
) -> int:
    """Cycles in which the array is busy with one token behind ``context`` others; ``chosen`` and ``form`` as for
    :func:`decode_bytes`.
    """
    total = 0
    for linear in graph.of(Linear):
        outputs, depth = graph.tensors[linear.weight].shape
        total += mac_slots(config, 1, outputs, depth, _form(config, graph, linear).rate)
    for node in graph.of(Attention):
        keys = context + 1
        if chosen is not None and chosen < keys:
            keys, rows = chosen, sketch_rows(context)
            total += node.heads * mac_slots(config, 1, rows, node.head_dim, 2)
        scores = mac_slots(config, 1, keys, node.head_dim, form.rate)
        total += node.heads * (scores + mac_slots(config, 1, node.head_dim, keys, form.rate))
    return total


@dataclass(frozen=True)
class DecodeBytes:
    """What one token behind ``context`` others must read: weights, and keys and values with their scales, and the
    sketch of keys, where it is chosen from.
    """

    weights: int
    cache: int

    @property
    def total(self) -> int:
        return self.weights + self.cache


def _form(config: CoreConfig, graph: Graph, linear: Linear) -> Packing:
    length = graph.tensors[linear.weight].shape[1]
    return packing(config, length, graph.stored.get(linear.weight))


def sketch_rows(context: int) -> int:
    """Rows of the sketch that one token behind ``context`` others scores."""
    return ceil_div(context + 1, BLOCK) * BLOCK_ROWS


def decode_bytes(
    config: CoreConfig, graph: Graph, context: int, chosen: int | None = None, form: CacheForm = INT8
) -> DecodeBytes:
    """Bytes of the weights as the core takes them, and of keys and values of ``context`` tokens and the new one.

    chosen : keys and values that are read if the token chooses them by a sketch, whose bytes count then. form : of
    keys and values, whose multipliers count if they have some.
    """
    weights = sum(len(graph.tensors[node.weight]) * _form(config, graph, node).words for node in graph.of(Linear))
    keys = context + 1 if chosen is None else min(chosen, context + 1)
    cache = sum(2 * node.kv_heads * (form.words(node.head_dim) + 4) * keys for node in graph.of(Attention))
    if keys <= context:
        row = [node.kv_heads * (panel_words(node.head_dim) + 4) for node in graph.of(Attention)]
        cache += sum(row) * sketch_rows(context)
    return DecodeBytes(weights, cache)


def decode_limit(
    config: CoreConfig,
    timing: MemoryTiming,
    graph: Graph,
    context: int,
    chosen: int | None = None,
    form: CacheForm = INT8,
) -> Limit:
    """Every weight and every cached key and value that counts over the bus once, at the rate that refresh leaves; or
    through the array, where packed weights make that longer. ``chosen`` and ``form`` as for :func:`decode_bytes`.
    """
    needed = decode_bytes(config, graph, context, chosen, form)
    interval, rest = timing.refresh_interval, timing.refresh_cycles
    share = 1 - rest / interval if interval else 1.0
    cycles, slots = needed.total / (config.bus_bytes * share), decode_slots(config, graph, context, chosen, form)
    if (graph.stored or form != INT8) and slots > cycles:
        return Limit(
            slots,
            "sum over products of ceil(N/R) max(K / rate, R)",
            f"{slots:,} array slots of {config.rows} x {config.columns}",
        )
    return Limit(
        cycles,
        "(weight bytes + bytes of keys, values, their scales" + (", sketch" if chosen else "") + ") / (bus bytes a "
        "cycle * share that refresh leaves)",
        f"({needed.weights:,} + {needed.cache:,}) / ({config.bus_bytes} * {share:.4f})",
    )
