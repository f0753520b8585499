"""The longest sequence for which every position has an entry in its table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lockstep.graph import Gather, Indices, Input, Node, Value

#: Token ids with which index arithmetic is tried. Some models give the padding token no position of its own, so more
#: than one.
PROBES = (0, 1, 2, 3)


def longest_sequence(nodes: Sequence[Node], tensors: Mapping[str, np.ndarray], bound: int, fixed: bool) -> int:
    """The greatest length up to ``bound`` at which every computed index exists, found by computing the indices.

    Positions grow with the length, so what holds for a length holds for shorter ones: the search is a bisection.
    """
    by_value = {node.value: node for node in nodes}
    lookups = [
        (by_value[node.indices], tensors[node.table].shape[0])
        for node in nodes
        if isinstance(node, Gather) and isinstance(by_value[node.indices], Indices)
    ]
    if fixed or not lookups:
        return bound
    if not any(isinstance(node, Input) for node in nodes):
        return bound

    def holds(tokens: int) -> bool:
        return all(_exists(node, entries, by_value, tokens, probe) for node, entries in lookups for probe in PROBES)

    low, high = 0, bound
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _exists(node: Any, entries: int, by_value: Mapping[Value, Node], tokens: int, probe: int) -> bool:
    arrays = []
    for value in node.reads:
        source = by_value[value]
        if not isinstance(source, Input):
            return True  # computed from something that is no input: checked when it runs
        arrays.append(np.full([tokens if size is None else size for size in source.shape], probe, source.dtype))
    try:
        indices = node.function(*arrays)
    except (RuntimeError, IndexError):
        return False
    return len(indices) in (1, tokens) and bool(((indices >= 0) & (indices < entries)).all())
