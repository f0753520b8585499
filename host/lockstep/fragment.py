"""Pieces of a captured graph that run as they are: index arithmetic, and what no contract operation covers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx


@dataclass(frozen=True)
class Axis:
    """What one dimension of a PyTorch tensor means in the ``[tokens, features]`` array behind it.

    ``kind`` is ``"token"``, ``"feature"`` or ``"one"`` (a size of one that means nothing). Moving ``stride`` features
    further in the array is moving one further along a feature axis, or ``repeat`` further if every entry is shown that
    many times in a row. ``size`` is an integer, or a symbolic expression for tokens.
    """

    kind: str
    size: Any
    stride: int = 0
    repeat: int = 1


ONE = Axis("one", 1)


@dataclass(frozen=True)
class View:
    """A PyTorch tensor as a view of a graph value: an axis for each of its dimensions, and the first feature it
    shows.
    """

    value: int
    axes: tuple[Axis, ...]
    offset: int = 0

    def on(self, array: np.ndarray) -> torch.Tensor:
        """The tensor itself, given the value's ``float32[tokens, features]``."""
        tensor = torch.from_numpy(np.require(array, np.float32, ["C", "W"]))
        tokens, features = tensor.shape
        sizes = [tokens if axis.kind == "token" else int(axis.size) // axis.repeat for axis in self.axes]
        strides = [features if axis.kind == "token" else axis.stride for axis in self.axes]
        shown = torch.as_strided(tensor, sizes, strides, self.offset)
        for dimension, axis in enumerate(self.axes):
            if axis.repeat > 1:
                shown = shown.repeat_interleave(axis.repeat, dimension)
        return shown


def _rounded(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """``function`` in float64, rounded to the type of its argument."""

    def compute(x: torch.Tensor) -> torch.Tensor:
        return function(x.double()).to(x.dtype)

    return compute


#: Single precision sines and cosines differ between processors; rounded ones give rotary tables that do not.
_ROUNDED: dict[Any, Callable[[torch.Tensor], torch.Tensor]] = {
    torch.ops.aten.cos.default: _rounded(torch.cos),
    torch.ops.aten.sin.default: _rounded(torch.sin),
}


@dataclass(frozen=True)
class Whole:
    """A PyTorch tensor that is an input of the model; ``shape`` has -1 for the number of tokens."""

    value: int
    shape: tuple[int, ...]

    def on(self, array: np.ndarray) -> torch.Tensor:
        """The tensor itself, given the input without its batch."""
        return torch.from_numpy(np.ascontiguousarray(array)).reshape(self.shape)


class Fragment:
    """A part of a captured graph as a function of arrays.

    Parameters
    ----------
    output : the node whose result is wanted.
    boundaries : nodes at which the part begins, and how each is made from a graph value.
    constants : nodes with known contents.

    Attributes
    ----------
    reads : the graph values that the function takes, in order.
    operations : names of the operations inside, each once, in order.
    nodes : the captured nodes inside.
    """

    def __init__(
        self, output: fx.Node, boundaries: Mapping[fx.Node, View | Whole], constants: Mapping[fx.Node, torch.Tensor]
    ) -> None:
        self.nodes = ancestors(output, stop=lambda node: node in boundaries or node in constants)
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        self._sources: list[View | Whole] = []
        tensors: dict[str, torch.Tensor] = {}
        for node in self.nodes:
            if node in boundaries:
                copies[node] = graph.placeholder(f"x{len(self._sources)}")
                self._sources.append(boundaries[node])
        for node in self.nodes:
            if node in constants:
                name = f"c{len(tensors)}"
                tensors[name] = constants[node]
                copies[node] = graph.get_attr(name)
            elif node not in copies:
                copies[node] = graph.node_copy(node, copies.__getitem__)
                copies[node].target = _ROUNDED.get(node.target, node.target)
        graph.output(copies[output])
        self._module = fx.GraphModule(tensors, graph)
        self.reads = tuple(dict.fromkeys(source.value for source in self._sources))
        inside = (node for node in self.nodes if node not in boundaries and node not in constants)
        self.operations = tuple(dict.fromkeys(operation_name(node) for node in inside))

    def tensor(self, *arrays: np.ndarray) -> Any:
        """The result as PyTorch has it, given the arrays of ``reads``."""
        given = dict(zip(self.reads, arrays, strict=True))
        with torch.no_grad():
            return self._module(*(source.on(given[source.value]) for source in self._sources))

    def rows(self, *arrays: np.ndarray) -> np.ndarray:
        """The result as ``float32[tokens, features]``."""
        result = self.tensor(*arrays)
        return result.reshape(-1, result.shape[-1]).to(torch.float32).numpy()

    def integers(self, *arrays: np.ndarray) -> np.ndarray:
        """The result as ``int64[tokens]``."""
        return self.tensor(*arrays).reshape(-1).to(torch.int64).numpy()


def ancestors(output: fx.Node, stop: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """``output`` and all that it needs, in topological order, not going beyond nodes for which ``stop`` holds."""
    found: set[fx.Node] = set()
    pending = [output]
    while pending:
        node = pending.pop()
        if node in found:
            continue
        found.add(node)
        if not stop(node):
            pending.extend(node.all_input_nodes)
    return [node for node in output.graph.nodes if node in found]


def operation_name(node: fx.Node) -> str:
    """``"linear"`` for a node that calls ``aten.linear.default``, ``"getitem"`` for a Python operator."""
    packet = getattr(node.target, "overloadpacket", None)
    return packet.__name__ if packet is not None else getattr(node.target, "__name__", str(node.target))


def same(sizes: Iterable[Any], others: Iterable[Any]) -> bool:
    """Whether two shapes are equal, symbolic sizes included, without asking PyTorch to guard on it."""
    return [extent(size) for size in sizes] == [extent(size) for size in others]


def extent(size: Any) -> Any:
    """A size as an integer if it is one, else as the expression behind it."""
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return int(expression) if expression.is_number else expression
    return size
