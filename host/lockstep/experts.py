"""Running mixtures of experts on the host, in the numbers of the contract and in PyTorch's.

Every step works row by row, and what a token's experts give is added in the order of their scores. So a token has the
same bits whichever tokens run beside it. An expert that no token chooses is not computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from lockstep_isa.numerics import add, clamp_score, exp2_parts, mul, recip, rowsum, scale2
from torch.nn import functional

from lockstep.graph import Expert, Experts, Route

#: Ids and weights of the experts of every token: ``int64[tokens, top_k]`` and ``float32[tokens, top_k]``.
Choice = tuple[np.ndarray, np.ndarray]


def choose(node: Route, logits: np.ndarray) -> np.ndarray:
    """``int64[tokens, top_k]``: experts with the greatest logits, the greatest first, lower numbers before equals."""
    return np.argsort(-logits, axis=1, kind="stable")[:, : node.top_k]


def route(node: Route, logits: np.ndarray) -> Choice:
    """The choice of the contract for logits: ``float32[tokens, experts]``.

    The softmax is that of attention: powers of two relative to the greatest, their sum, and its reciprocal.
    """
    ids = choose(node, logits)
    m, n = exp2_parts(clamp_score(mul(logits, np.float32(math.log2(math.e)))))
    shares = scale2(m, n - n.max(axis=1)[:, None])
    chosen = np.take_along_axis(shares, ids, axis=1)
    return ids, mul(chosen, recip(rowsum(chosen if node.normalise else shares))[:, None])


def run_experts(
    node: Experts, x: np.ndarray, choice: Choice, tensors: Mapping[str, np.ndarray], operations: Any
) -> np.ndarray:
    """``float32[tokens, features]`` from int8 products, by the contract's ``operations``; x: ``float32[tokens, K]``."""
    q, s = operations.quantise_rows(x)

    def product(rows: tuple[Any, Any], weight: str, scales: str) -> np.ndarray:
        return operations.linear(*rows, tensors[weight], tensors[scales])

    def compute(expert: Expert, at: np.ndarray) -> np.ndarray:
        rows = (np.ascontiguousarray(q[at]), np.ascontiguousarray(s[at]))
        gate, up, down = zip((expert.gate, expert.up, expert.down), expert.scales, strict=True)
        active = operations.apply_function(node.function, product(rows, *gate))
        return product(operations.quantise_rows(mul(active, product(rows, *up))), *down)

    return mix(node, choice, compute)


def run_experts_float(
    node: Experts, x: np.ndarray, choice: Choice, tensors: Mapping[str, np.ndarray], activation: Callable[..., Any]
) -> np.ndarray:
    """The same in PyTorch's float32, from the float stage's weights and PyTorch's ``activation``."""

    def product(rows: torch.Tensor, weight: str) -> torch.Tensor:
        return functional.linear(rows, torch.from_numpy(tensors[weight]))

    def compute(expert: Expert, at: np.ndarray) -> np.ndarray:
        rows = torch.from_numpy(x[at])
        return product(activation(product(rows, expert.gate)) * product(rows, expert.up), expert.down).numpy()

    return mix(node, choice, compute, np.add, np.multiply)


def route_float(node: Route, logits: np.ndarray) -> Choice:
    """The choice in PyTorch's float32."""
    ids = choose(node, logits)
    chosen = np.take_along_axis(torch.from_numpy(logits).softmax(-1).numpy(), ids, axis=1)
    return ids, chosen / chosen.sum(axis=1, keepdims=True) if node.normalise else chosen


def mix(
    node: Experts,
    choice: Choice,
    compute: Callable[[Expert, np.ndarray], np.ndarray],
    plus: Callable[..., np.ndarray] = add,
    times: Callable[..., np.ndarray] = mul,
) -> np.ndarray:
    """Each expert on its tokens, then the weighted sum over the experts of a token, the greatest weight first."""
    ids, weights = choice
    parts: list[Any] = [None] * ids.shape[1]
    for number in np.unique(ids):
        tokens, ranks = np.nonzero(ids == number)
        results = compute(node.experts[number], tokens)
        for rank in np.unique(ranks):
            if parts[rank] is None:
                parts[rank] = np.empty((len(ids), results.shape[1]), np.float32)
            parts[rank][tokens[ranks == rank]] = results[ranks == rank]
    total = times(parts[0], weights[:, :1])
    for rank in range(1, len(parts)):
        total = plus(total, times(parts[rank], weights[:, rank : rank + 1]))
    return total
