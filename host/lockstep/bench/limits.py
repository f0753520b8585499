"""What no program can beat: cycles from sizes alone, each with its formula in words and in numbers.

A limit knows the array, the bus and the refresh of device memory, and nothing of programs. Bytes are those of the
arrays themselves, without the padding that panels add; multiply-accumulates are counted in slots of the array, with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lockstep_isa.config import CoreConfig
from lockstep_sim.core import MemoryTiming

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


def mac_slots(config: CoreConfig, m: int, n: int, k: int) -> int:
    """Cycles in which the array is busy with an m x n x k product, whole tiles counted."""
    return ceil_div(m, config.rows) * ceil_div(n, config.columns) * max(k, config.rows)


def gemm_bytes(m: int, n: int, k: int) -> tuple[int, int]:
    """(bytes read, bytes written) of ``float32[m, n] = (int8[m, k] . int8[n, k]^T) * float32[m] * float32[n]``."""
    return m * k + n * k + 4 * (m + n), 4 * m * n


def gemm_limit(config: CoreConfig, m: int, n: int, k: int) -> Limit:
    """The larger of the array's and the bus's time for a product whose operands and result lie in device memory."""
    slots, (read, written) = mac_slots(config, m, n, k), gemm_bytes(m, n, k)
    beats = ceil_div(read + written, config.bus_bytes)
    skew = 2 * config.rows - 2
    rows = config.rows
    return Limit(
        max(slots, beats) + skew,
        "max(ceil(M/R) ceil(N/R) max(K, R), (operand bytes + result bytes) / bus bytes) + 2 R - 2",
        f"max({ceil_div(m, rows)} * {ceil_div(n, rows)} * {max(k, rows)}, ({read:,} + {written:,}) / "
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
            total += mac_slots(config, tokens, outputs, depth)
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
        "sum over products of ceil(M/R) ceil(N/R) max(K, R)",
        f"{slots:,} array slots of {config.rows} x {config.columns}",
    )


@dataclass(frozen=True)
class DecodeBytes:
    """What one token behind ``context`` others must read: int8 weights, and int8 keys and values with their scales."""

    weights: int
    cache: int

    @property
    def total(self) -> int:
        return self.weights + self.cache


def decode_bytes(graph: Graph, context: int) -> DecodeBytes:
    """Bytes of the int8 weights, and of keys and values of ``context`` tokens and the new one."""
    weights = sum(graph.tensors[node.weight].nbytes for node in graph.of(Linear))
    per_token = sum(2 * node.kv_heads * (node.head_dim + 4) for node in graph.of(Attention))
    return DecodeBytes(weights, per_token * (context + 1))


def decode_limit(config: CoreConfig, timing: MemoryTiming, graph: Graph, context: int) -> Limit:
    """Every weight and every cached key and value over the bus once, at the rate that refresh leaves."""
    needed = decode_bytes(graph, context)
    interval, rest = timing.refresh_interval, timing.refresh_cycles
    share = 1 - rest / interval if interval else 1.0
    return Limit(
        needed.total / (config.bus_bytes * share),
        "(weight bytes + bytes of keys, values and their scales) / (bus bytes a cycle * share that refresh leaves)",
        f"({needed.weights:,} + {needed.cache:,}) / ({config.bus_bytes} * {share:.4f})",
    )
