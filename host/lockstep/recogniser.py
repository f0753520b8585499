"""Reading a captured graph: what every tensor in it is, and the contract nodes that follow from it.

Every captured tensor gets one of five
readings: contents known in advance (parameters and what follows from them alone), contents that follow from the
length of the sequence (masks, rotary angles), integers that say what to fetch, a ``View`` of a graph value, or nothing
yet. What has no reading is *opaque*: it is cut out and run by PyTorch as a ``Fallback``, but only where a recognised
operation or the output needs it, so that views, masks and dead branches cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

from lockstep import layout
from lockstep.capture import Captured
from lockstep.fragment import ONE, Axis, Fragment, View, Whole, extent, operation_name
from lockstep.graph import Constant, Dense, Fallback, Gather, Indices, Input, Node, Value


class Unrecognised(Exception):
    """Raised by a rule: an operation of this kind that the contract does not cover, with the reason."""


Reading = View | tuple[View, ...]
Rule = Callable[["Recogniser", fx.Node, dict[str, Any]], Reading]

#: Reasons that a fallback gives, those nearest to its result first.
REASONS = 3
#: Up to this length, every length is tried where something depends on it.
SHORT = 64

#: Rules by the name of the PyTorch operation; importing ``lockstep.rules`` fills it.
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule for the PyTorch operations called ``names``."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


class Recogniser:
    """What is known so far of a captured graph, and the nodes emitted for it.

    Attributes
    ----------
    nodes, tensors : what is emitted so far.
    constants : captured nodes with contents known in advance.
    fixed : captured nodes that depend on parameters and the length of the sequence alone.
    views : captured nodes that show a graph value.
    memory : what rules remember from one captured node to the next.
    """

    def __init__(self, captured: Captured, rules: Mapping[str, Rule]) -> None:
        self._rules = rules
        self.nodes: list[Node] = []
        self.tensors: dict[str, np.ndarray] = {}
        self.min_tokens = captured.min_tokens
        self.max_tokens = captured.max_tokens
        self.fixed_length = captured.fixed
        self.constants = {node: tensor for node, (_, tensor) in captured.parameters.items()}
        self.fixed: set[fx.Node] = set()
        self.views: dict[fx.Node, Reading] = {}
        self.memory: dict[Any, Any] = {}
        self.reasons: dict[fx.Node, str] = {}
        self._inputs: dict[fx.Node, Whole] = {}
        self._names = {node: name for node, (name, _) in captured.parameters.items()}
        self._stored: dict[tuple[Any, ...], str] = {}
        self._integers: set[fx.Node] = set()
        self._made: dict[Any, Any] = {}
        self._widths: dict[Value, int] = {}
        for node, name in captured.inputs.items():
            self._add_input(node, name)

    def emit(self, make: Callable[..., Node], *fields: Any) -> Value:
        """Append a node and return its value; the same node is not appended twice."""
        key = (make, *fields)
        if key not in self._made:
            self._made[key] = len(self.nodes)
            self.nodes.append(make(len(self.nodes), *fields))
        return self._made[key]

    def read(self, node: fx.Node) -> None:
        """Give ``node`` its reading, or note why it has none."""
        before = node.all_input_nodes
        result = node.meta.get("val")
        floating = is_floating(node)
        if all(item in self.constants for item in before) and isinstance(result, torch.Tensor):
            self._fold(node)
        elif operation_name(node) == "sym_size" or all(item in self.constants or item in self.fixed for item in before):
            self._read_fixed(node, floating)
        elif not floating and not isinstance(result, tuple | list) and all(self._is_integer(item) for item in before):
            self._integers.add(node)
        else:
            self._apply_rule(node)

    def _read_fixed(self, node: fx.Node, floating: bool) -> None:
        if floating and operation_name(node) == "embedding":
            self._apply_rule(node)
            if node in self.views:
                return
        self.fixed.add(node)
        if not floating and not isinstance(node.meta.get("val"), tuple | list):
            self._integers.add(node)

    def rows(self, node: Any) -> Value | None:
        """The value of ``node`` as ``float32[tokens, features]``, cutting out a fallback if need be; none if it has
        no such form.
        """
        if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
            return None
        if node in self.constants:
            return None
        if node in self.fixed and (value := self._looked_up(node)) is not None:
            return value
        reading = self.views.get(node)
        if isinstance(reading, View) and (width := layout.row_width(reading)) is not None:
            value = self.features(reading.value, reading.offset, width)
            if value is not None:
                return value
        return self._cut_out(node)

    def features(self, value: Value, start: int, size: int) -> Value | None:
        """Features ``start:start + size`` of a value: itself, or fewer channels of the product it comes from; else
        none.
        """
        if start + size > self._widths[value]:
            return None
        if (start, size) == (0, self._widths[value]):
            return value
        made = self.nodes[value]
        if not isinstance(made, Dense):
            return None
        first = made.rows[0] + start
        return self.emit(Dense, made.x, made.weight, made.bias, (first, first + size))

    def view(self, value: Value, node: fx.Node) -> View:
        """``value`` as the result of ``node``, whose shape is ``[tokens, features]`` but for sizes of one.

        Raises Unrecognised for another shape.
        """
        axes = _row_axes(node)
        if axes is None:
            raise Unrecognised(f"{operation_name(node)} has the shape {list(node.meta['val'].shape)}")
        self._widths[value] = axes[-1].size
        return View(value, axes)

    def reuse(self, value: Value, like: View, width: int) -> View:
        """``value``, which has ``width`` features, seen through the axes of another view that shows as many."""
        self._widths[value] = width
        return View(value, like.axes)

    def canonical(self, view: View) -> tuple[Value, layout.Heads] | None:
        """The value whose features are those of ``view`` in their order, and their heads; ``reuse`` makes views of
        such values. None if the view skips features of something that is no product, or repeats some.
        """
        shape = layout.heads(view)
        if shape is None or shape.repeat != 1:
            return None
        value = self.features(view.value, view.offset, shape.heads * shape.width)
        return None if value is None else (value, shape)

    def name(self, node: Any) -> str | None:
        """The name under which the contents of ``node`` are stored, or none if they are not known in advance."""
        if not isinstance(node, fx.Node) or node not in self.constants:
            return None
        tensor = self.constants[node]
        return self.store(self._names[node], tensor)

    def name_of(self, node: fx.Node) -> str:
        """What the contents of a node of ``constants`` are called, without keeping them."""
        return self._names[node]

    def store(self, name: str, tensor: torch.Tensor) -> str:
        """Keep ``tensor`` under ``name``, or under the name it already has."""
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype) if tensor.numel() else (name,)
        if key not in self._stored:
            unique, number = name, 1
            while unique in self.tensors:
                number += 1
                unique = f"{name}.{number}"
            self._stored[key] = unique
            self.tensors[unique] = np.ascontiguousarray(tensor.numpy())
        return self._stored[key]

    def constant(self, node: fx.Node, width: int) -> Value | None:
        """A parameter as a value: one row of ``width`` features, or a row per token of a fixed length."""
        tensor = self.constants.get(node)
        if tensor is None or tensor.dtype != torch.float32 or tensor.ndim == 0 or tensor.shape[-1] != width:
            return None
        if tensor.ndim > 1 and tensor.numel() != tensor.shape[-1] * tensor.shape[-2]:
            return None
        name = self.store(self._names[node], tensor.reshape(-1, width))
        return self.emit(Constant, name)

    def indices(self, node: Any) -> Value | None:
        """The value of an integer tensor ``[1, tokens]``: an input or index arithmetic; none for anything else."""
        if not isinstance(node, fx.Node) or node in self.constants:
            return None
        if node in self._inputs:
            return self._inputs[node].value
        if node not in self._integers or not isinstance(node.meta["val"], torch.Tensor):
            return None
        if ("indices", node) not in self._made:
            fragment = self.fragment(node)
            function: Callable[..., np.ndarray] = fragment.integers
            if any(is_floating(item) for item in fragment.nodes):
                # Floating point is exact on one machine only, so its results are taken down now.
                table = self.table(node)
                if table is None:
                    return None
                function = _prefix_of(table.reshape(-1).to(torch.int64).numpy())
            self._made["indices", node] = self.emit(Indices, fragment.reads, function, fragment.operations)
        return self._made["indices", node]

    def evaluate(self, node: fx.Node, tokens: int) -> torch.Tensor:
        """The contents of a node of ``fixed`` for a sequence of ``tokens``.

        Raises RuntimeError or IndexError where PyTorch does.
        """
        fragment = self.fragment(node)
        return fragment.tensor(*(self.blank(value, tokens) for value in fragment.reads))

    def blank(self, value: Value, tokens: int) -> np.ndarray:
        """Zeros in the shape that ``value`` has for a sequence of ``tokens``."""
        node = self.nodes[value]
        if isinstance(node, Input):
            return np.zeros([tokens if size is None else size for size in node.shape], node.dtype)
        return np.zeros((tokens, self._widths[value]), np.float32)

    def lengths(self) -> list[int]:
        """Lengths with which what depends on the length is tried: all short ones, and some up to the longest."""
        if self.fixed_length:
            return [self.max_tokens]
        short = range(self.min_tokens, min(self.max_tokens, SHORT) + 1)
        longer = (SHORT << step for step in range(1, 32))
        edges = (length + step for length in longer for step in (-1, 0, 1))
        return [*short, *(length for length in edges if SHORT < length < self.max_tokens), self.max_tokens]

    def table(self, node: fx.Node) -> torch.Tensor | None:
        """The rows of a node of ``fixed`` at the greatest length if shorter sequences have the first of them."""
        if _row_axes(node) is None and node.meta["val"].is_floating_point():
            return None
        try:
            whole = self._flat(node, self.max_tokens)
            for tokens in self.lengths():
                if not torch.equal(self._flat(node, tokens), whole[:tokens]):
                    return None
        except (RuntimeError, IndexError):
            return None
        return whole

    def _flat(self, node: fx.Node, tokens: int) -> torch.Tensor:
        result = self.evaluate(node, tokens)
        return result.reshape(-1, result.shape[-1]) if result.is_floating_point() else result.reshape(-1)

    def _looked_up(self, node: fx.Node) -> Value | None:
        """Rows that depend on the position alone, as rows of a table."""
        if ("table", node) not in self._made:
            table = self.table(node)
            value: Value | None = None
            if table is not None and table.dtype == torch.float32:
                reads = self.fragment(node).reads
                positions = self._made.get(("positions", reads))
                if positions is None:
                    function = _prefix_of(np.arange(self.max_tokens))
                    positions = self._made["positions", reads] = self.emit(Indices, reads, function, ("arange",))
                value = self.emit(Gather, self.store(node.name, table), positions)
                self._widths[value] = table.shape[-1]
            self._made["table", node] = value
        return self._made["table", node]

    def fragment(self, node: fx.Node) -> Fragment:
        """Everything between ``node`` and the graph values it depends on."""
        boundaries: dict[fx.Node, View | Whole] = dict(self._inputs)
        boundaries.update(
            (item, view) for item, view in self.views.items() if isinstance(view, View) and item is not node
        )
        return Fragment(node, boundaries, self.constants)

    def _add_input(self, node: fx.Node, name: str) -> None:
        tensor = node.meta["val"]
        sizes = [extent(size) for size in tensor.shape]
        fixed = [size if isinstance(size, int) else None for size in sizes]
        value = self.emit(Input, name, tuple(fixed[1:]), str(tensor.dtype).removeprefix("torch."))
        self._inputs[node] = Whole(value, tuple(-1 if size is None else size for size in fixed))
        if tensor.dtype == torch.float32 and len(sizes) == 3:
            self.views[node] = self.view(value, node)
        elif not tensor.is_floating_point():
            self._integers.add(node)

    def _is_integer(self, node: fx.Node) -> bool:
        if node in self.constants:
            return not self.constants[node].is_floating_point()
        return node in self._integers

    def _fold(self, node: fx.Node) -> None:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            self.reasons[node] = f"{operation_name(node)} is random"
            return
        arguments, keywords = fx.map_arg((node.args, node.kwargs), lambda item: self.constants[item])
        with torch.no_grad():
            self.constants[node] = node.target(*arguments, **keywords)  # type: ignore[operator]
        first = next(iter(node.all_input_nodes), None)
        self._names[node] = node.name if first is None else f"{self._names[first]}.{operation_name(node)}"

    def _apply_rule(self, node: fx.Node) -> None:
        name = operation_name(node)
        found = self._rules.get(name)
        if found is None:
            self.reasons[node] = f"the contract has no operation for {name}"
            return
        try:
            self.views[node] = found(self, node, arguments_by_name(node))
        except Unrecognised as reason:
            if str(reason):  # a view of something opaque needs no reason of its own
                self.reasons[node] = str(reason)

    def _cut_out(self, node: fx.Node) -> Value | None:
        axes = _row_axes(node)
        if axes is None or node.meta["val"].dtype != torch.float32:
            return None
        if ("fallback", node) not in self._made:
            fragment = self.fragment(node)
            reasons = list(
                dict.fromkeys(self.reasons[item] for item in reversed(fragment.nodes) if item in self.reasons)
            )
            reason = "; ".join(reasons[:REASONS]) or "it moves data in a way that the contract has no operation for"
            name = ", ".join(fragment.operations)
            value = self.emit(Fallback, name, reason, fragment.reads, fragment.rows)
            self._made["fallback", node] = value
            self._widths[value] = axes[-1].size
            self.views.setdefault(node, View(value, axes))
        return self._made["fallback", node]


def _prefix_of(table: np.ndarray) -> Callable[..., np.ndarray]:
    def first(*arrays: np.ndarray) -> np.ndarray:
        return table[: len(arrays[0])]

    return first


def is_floating(node: fx.Node) -> bool:
    """Whether ``node`` is a floating-point tensor, real or complex."""
    result = node.meta.get("val")
    return isinstance(result, torch.Tensor) and (result.is_floating_point() or result.is_complex())


def is_rows(node: fx.Node) -> bool:
    """Whether ``node`` is ``[tokens, features]`` but for sizes of one."""
    return _row_axes(node) is not None


def _row_axes(node: fx.Node) -> tuple[Axis, ...] | None:
    """Axes of a tensor that is ``[tokens, features]`` but for sizes of one, or none."""
    sizes = [extent(size) for size in node.meta["val"].shape]
    if len(sizes) < 2 or not isinstance(sizes[-1], int):
        return None
    leading = [index for index, size in enumerate(sizes[:-1]) if size != 1]
    if len(leading) > 1:
        return None
    axes = [ONE] * len(sizes)
    token = leading[0] if leading else len(sizes) - 2
    axes[token] = Axis("token", sizes[token])
    axes[-1] = Axis("feature", sizes[-1], 1)
    return tuple(axes)


def arguments_by_name(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by the names in its schema, defaults included."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {str(index): argument for index, argument in enumerate(node.args)}
    bound: dict[str, Any] = {}
    for index, argument in enumerate(schema.arguments):
        if index < len(node.args):
            bound[argument.name] = node.args[index]
        else:
            bound[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return bound
