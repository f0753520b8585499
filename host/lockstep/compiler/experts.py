"""Mixtures of experts on a device: the host routes, the core multiplies.

Which experts a token needs is known only while a model runs, so an expert is a program of its own, over the tokens that
chose it. Routing and the weighted sum are a few operations per token; they run on the host, in the contract's numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from lockstep_driver import Device

from lockstep.experts import Choice, mix
from lockstep.graph import Activation, Expert, Experts, Graph, Input, Linear, Multiply, Node, Quantise

from .layout import panel_count

Run = Callable[[Graph, list[dict[str, np.ndarray]]], list[np.ndarray]]


def expert_graph(expert: Expert, function: str, whole: Graph) -> Graph:
    """One expert of ``whole`` as a graph of its own on ``x: float32[tokens, features]``."""
    gate, up, down = zip((expert.gate, expert.up, expert.down), expert.scales, strict=True)
    features = whole.tensors[expert.gate].shape[1]
    nodes: tuple[Node, ...] = (
        Input(0, "x", (None, features), "float32"),
        Quantise(1, 0, None),
        Linear(2, 1, *gate, None),
        Activation(3, 2, function),
        Linear(4, 1, *up, None),
        Multiply(5, 3, 4),
        Quantise(6, 5, None),
        Linear(7, 6, *down, None),
    )
    names = (*expert.tensors, *expert.scales)
    tensors = {name: whole.tensors[name] for name in names}
    stored = {name: whole.stored[name] for name in expert.tensors if name in whole.stored}
    return Graph(nodes, 7, tensors, max_tokens=1 << 16, source="expert", stored=stored)


class DeviceExperts:
    """Runs the ``Experts`` nodes of graphs on one device.

    Parameters
    ----------
    device : where they run. open_runner : makes what runs the graph of an expert; called once per expert.
    """

    def __init__(self, device: Device, open_runner: Callable[[], Run]) -> None:
        self._rows = device.config.rows
        self._open = open_runner
        self._runs: dict[tuple[int, Expert], tuple[Graph, Run]] = {}

    def run(self, node: Experts, x: np.ndarray, choice: Choice, graph: Graph) -> np.ndarray:
        """``float32[tokens, features]`` of a node of ``graph`` for x: ``float32[tokens, features]`` and the choice of a
        ``Route``.
        """

        def compute(expert: Expert, at: np.ndarray) -> np.ndarray:
            key = (node.value, expert)
            if key not in self._runs:
                self._runs[key] = (expert_graph(expert, node.function, graph), self._open())
            own, run = self._runs[key]
            # Whole row tiles, so that a handful of programs serves every number of tokens.
            rows = np.zeros((panel_count(len(at), self._rows) * self._rows, x.shape[1]), np.float32)
            rows[: len(at)] = x[at]
            return run(own, [{"x": rows}])[0][: len(at)]

        return mix(node, choice, compute)
