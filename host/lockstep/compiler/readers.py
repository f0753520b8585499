"""Who reads which value in a stage, and what can be compiled together for it."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from lockstep.graph import (
    Activation,
    Add,
    Graph,
    LayerNorm,
    Linear,
    Multiply,
    Node,
    Quantise,
    Value,
)

from .stages import Stage


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward layer: what :meth:`Readers.feed_forward_chain` finds."""

    first: Linear
    activation: Activation | None
    quantise: Quantise
    second: Linear


class Readers:
    """The readers of every value of a stage.

    Attributes
    ----------
    of : the nodes of the stage that read a value; values that none reads are left out.
    """

    def __init__(self, graph: Graph, stage: Stage) -> None:
        self.graph, self.stage = graph, stage
        self.of: dict[Value, list[Node]] = {}
        for node in stage.device:
            for value in node.inputs:
                self.of.setdefault(value, []).append(node)

    def wanted_maxima(self, value: Value) -> tuple[str | None] | None:
        """The pre-scale of the Quantise that reads a value, so that its producer can keep the maxima on the way."""
        for reader in self.of.get(value, []):
            if isinstance(reader, Quantise):
                return (reader.prescale,)
        return None

    def only_reader(self, value: Value) -> Node | None:
        """The node that reads a value, if there is one only and the value does not leave the stage."""
        readers = self.of.get(value, [])
        return readers[0] if len(readers) == 1 and value not in self.stage.outputs else None

    def feed_forward_chain(self, first: Linear) -> FeedForward | None:
        """Linear, perhaps an activation, Quantise, Linear, each read by the next only: done in blocks of rows."""
        reader = self.only_reader(first.value)
        activation = reader if isinstance(reader, Activation) else None
        if activation is not None:
            reader = self.only_reader(activation.value)
        if not isinstance(reader, Quantise):
            return None
        second = self.only_reader(reader.value)
        return FeedForward(first, activation, reader, second) if isinstance(second, Linear) else None

    def rides(self, node: Linear, reader: Add | Multiply, deferred: Container[Value]) -> bool:
        """Whether the other operand of a sum or product can meet this linear layer's results as they are drained.

        ``deferred`` : values that are not computed yet.
        """
        other = reader.y if reader.x == node.value else reader.x
        if other == node.value or other in deferred:
            return False
        if isinstance(reader, Multiply):
            return not self.prescaled(reader.value)
        # Sums that ride on a layer norm are left to it.
        return not isinstance(self.only_reader(reader.value), LayerNorm)

    def prescaled(self, value: Value) -> bool:
        """Whether the Quantise that reads a value scales its features first."""
        wanted = self.wanted_maxima(value)
        return wanted is not None and wanted[0] is not None

    def together(self, node: Node, deferred: Container[Value]) -> bool:
        """Whether a node is compiled with its only reader, which is no attention; ``deferred`` as for :meth:`rides`."""
        reader = self.only_reader(node.value)
        if isinstance(node, Add):
            return isinstance(reader, LayerNorm)
        if not isinstance(node, Linear):
            return False
        if isinstance(reader, Multiply) or (isinstance(reader, Add) and node.bias is None):
            return self.rides(node, reader, deferred)
        return isinstance(reader, Activation)
