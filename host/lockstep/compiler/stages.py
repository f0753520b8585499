"""Which nodes run where and when: stages of host work and device work that follow each other.

A node of the contract runs on the device, everything else on the host. Stage 0 is host work, stage 1 the device work
that needs no more host work than that, and so on; a model without fallbacks in its middle has one of each.
"""

from __future__ import annotations

from dataclasses import dataclass

from lockstep.graph import (
    Activation,
    Add,
    Attention,
    Graph,
    LayerNorm,
    Linear,
    Multiply,
    Node,
    Quantise,
    RMSNorm,
    Rotary,
    Value,
)
from lockstep.head_pruning import KeepHeads

#: What a core executes.
DEVICE_NODES = (Activation, Add, Attention, LayerNorm, Linear, Multiply, Quantise, RMSNorm, Rotary)


@dataclass(frozen=True)
class Stage:
    """Host nodes, then the device nodes of one program.

    ``inputs`` are values that the program loads, ``outputs`` those that it stores because the host or a later stage
    needs them; ``choices`` are values that become its run-time operands.
    """

    host: tuple[Node, ...]
    device: tuple[Node, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    choices: tuple[Value, ...] = ()


def split(graph: Graph, on_host: tuple[type[Node], ...] = ()) -> list[Stage]:
    """The stages of a contract-stage graph, in order; ``on_host``: nodes that a core could execute, and will not."""
    level: dict[Value, int] = {}
    on_device: dict[Value, bool] = {}
    for node in graph:
        # Host work that reads device work belongs to the next stage.
        on_device[node.value] = isinstance(node, DEVICE_NODES) and not isinstance(node, on_host)
        level[node.value] = max(
            (level[v] + (on_device[v] and not on_device[node.value]) for v in node.inputs), default=0
        )
    # A quantised pair lives on chip only: whoever reads it must be in its stage, so it moves there.
    readers: dict[Value, list[Node]] = {}
    for node in graph:
        for value in node.inputs:
            readers.setdefault(value, []).append(node)
    for node in graph.of(Quantise):
        level[node.value] = min((level[r.value] for r in readers.get(node.value, [])), default=level[node.value])
    kept = {node.value for node in graph.of(KeepHeads)}
    stages = []
    for number in range(max(level.values(), default=0) + 1):
        members = [n for n in graph if level[n.value] == number]
        device = tuple(n for n in members if on_device[n.value])
        own = {n.value for n in device}
        inputs = dict.fromkeys(v for n in device for v in n.inputs if v not in own)
        outputs = [
            n.value
            for n in device
            if n.value == graph.output or any(r.value not in own for r in readers.get(n.value, []))
        ]
        host = tuple(n for n in members if not on_device[n.value])
        choices = tuple(value for value in inputs if value in kept)
        loaded = tuple(value for value in inputs if value not in kept)
        stages.append(Stage(host, device, loaded, tuple(outputs), choices))
    return stages
