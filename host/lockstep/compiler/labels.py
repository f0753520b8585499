"""Names for the parts of a program: the modules of the model that they compute."""

from __future__ import annotations

from lockstep.graph import Attention, Graph, LayerNorm, Linear, Node, Quantise, RMSNorm, Rotary, Value


class Labels:
    """Names of the nodes of ``graph``, after the parameters that they use or, where they use none, that others of
    their surroundings do.
    """

    def __init__(self, graph: Graph) -> None:
        self._producers: dict[Value, Node] = {node.value: node for node in graph}
        self._readers: dict[Value, list[Node]] = {}
        for node in graph:
            for value in node.inputs:
                self._readers.setdefault(value, []).append(node)

    def of(self, *nodes: Node) -> str:
        """One name for nodes that are computed together, the last of which is the result."""
        last = nodes[-1]
        kind = type(last).__name__.lower()
        if len(nodes) > 1:
            return f"{common([self._place(node) for node in nodes])}: feed forward"
        place = self._place(last)
        return place if isinstance(last, Linear | LayerNorm | RMSNorm) and place else f"{place}: {kind}".lstrip(": ")

    def _place(self, node: Node) -> str:
        if isinstance(node, Linear):
            return node.weight.removesuffix(".int8").removesuffix(".weight")
        if isinstance(node, LayerNorm | RMSNorm):
            return node.gamma.removesuffix(".weight")
        if isinstance(node, Quantise):
            places = [self._place(reader) for reader in self._readers.get(node.value, [])]
            return common(places)
        if isinstance(node, Attention):
            return common([self._nearest(value) for value in (node.q, node.k, node.v)])
        return self._nearest(node.inputs[0]) if node.inputs else ""

    def _nearest(self, value: Value) -> str:
        """The place of the nearest linear layer or norm before a value."""
        node = self._producers.get(value)
        while node is not None and not isinstance(node, Linear | LayerNorm | RMSNorm):
            if not node.inputs:
                return ""
            node = self._producers.get(node.x if isinstance(node, Rotary) else node.inputs[0])
        return "" if node is None else self._place(node)


def common(places: list[str]) -> str:
    """The path that all places lie on, ``encoder.layer.0`` for ``encoder.layer.0.a`` and ``encoder.layer.0.b.c``."""
    split = [place.split(".") for place in places if place]
    if not split:
        return ""
    shared = 0
    while all(len(parts) > shared and parts[shared] == split[0][shared] for parts in split):
        shared += 1
    return ".".join(split[0][:shared])
