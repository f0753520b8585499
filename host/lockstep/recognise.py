"""From captured PyTorch operations to the float stage of the contract graph: every operation by what it computes."""

from __future__ import annotations

from lockstep import rules
from lockstep.capture import Captured
from lockstep.errors import CaptureError
from lockstep.fragment import ancestors
from lockstep.graph import Graph, live, tensor_names
from lockstep.positions import longest_sequence
from lockstep.recogniser import Recogniser


def recognise(captured: Captured, source: str = "module") -> Graph:
    """The float stage of the contract graph for a captured module.

    Raises
    ------
    CaptureError
        if the output cannot be brought to ``[tokens, features]``.
    """
    recogniser = Recogniser(captured, rules.RULES)
    needed = set(ancestors(captured.output, stop=lambda node: False))
    for node in captured.graph.nodes:
        if node in needed and node.op == "call_function":
            recogniser.read(node)
    output = recogniser.rows(captured.output)
    if output is None:
        shape = list(captured.output.meta["val"].shape)
        raise CaptureError(f"the module returns a tensor of shape {shape}, which is no [1, tokens, features]")
    nodes = live(recogniser.nodes, output)
    used = {name for node in nodes for name in tensor_names(node)}
    tensors = {name: array for name, array in recogniser.tensors.items() if name in used}
    limit = longest_sequence(nodes, tensors, captured.max_tokens, captured.fixed)
    return Graph(tuple(nodes), output, tensors, limit, captured.min_tokens, source)
