"""Running contract graphs on a device: programs compiled once per batch shape, parameters placed once per graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from lockstep_driver import Counters, Device, LoadedProgram
from lockstep_isa.numerics import mul
from lockstep_isa.program import Program

from lockstep.cache_policy import WHOLE, CachePolicy
from lockstep.errors import ModelError
from lockstep.evaluate import check_inputs, host_node
from lockstep.graph import Attention, Experts, Graph, Linear, Node, PositionBias, Value

from .allocation import CapacityError
from .compile import StageCompiler
from .experts import DeviceExperts, Run
from .head_pruning import (
    HeadOffset,
    PresentHeadsCompiler,
    crossing_features,
    most_sequences,
    operand_values,
    whole_columns,
)
from .image import Image
from .layout import from_panels, panel_count, to_panels
from .placed import Placed, place
from .session import DeviceSession
from .shapes import feature_counts, sequences_of
from .stages import Stage, split


class DeviceExecutor:
    """Runs contract graphs on one device.

    Parameters
    ----------
    device : open; the caller closes it.
    observe : is given the counters of every program that ran.
    """

    def __init__(self, device: Device, observe: Callable[[Counters], None] | None = None) -> None:
        self.device = device
        self._observe = observe
        self._graph: Graph | None = None
        self._stages: list[Stage] = []
        self._features: dict[Value, int] = {}
        self._image: Image | None = None
        self._compiled: dict[tuple[int, tuple[int, ...]], _Compiled] = {}
        self._parts: list[DeviceExecutor] = []
        self._experts = DeviceExperts(device, self._open_part)

    def _open_part(self) -> Run:
        """What runs a graph beside the one at hand, with parameters of its own on the device."""
        self._parts.append(DeviceExecutor(self.device, self._observe))
        return self._parts[-1].run

    def host_value(self, graph: Graph, node: Node, given: list[Any]) -> Any:
        """The value of a node that the host computes, or has computed expert by expert."""
        if isinstance(node, Experts):
            return self._experts.run(node, given[0], given[1], graph)
        return host_node(graph, node, given)

    def run(self, graph: Graph, sequences: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
        """``float32[tokens, features]`` for each sequence, given as arrays by input name without the batch.

        Sequences share a program as far as they fit the core together. Raises :class:`ModelError` for inputs that do
        not fit the model, :class:`CapacityError` for what does not fit the core, and what the driver raises.
        """
        self._use(graph)
        arrays = [check_inputs(graph, inputs) for inputs in sequences]
        if any(node.causal for node in graph.of(Attention)):
            return [self._run_cached(graph, inputs) for inputs in arrays]
        results: list[np.ndarray] = []
        position = 0
        # A bias on positions has a shape of its own for every length.
        most = 1 if graph.of(PositionBias) else most_sequences(graph, len(arrays))
        while position < len(arrays):
            count = min(most, len(arrays) - position)
            while True:
                try:
                    results += self._run_batch(graph, arrays[position : position + count])
                    break
                except CapacityError:
                    if count == 1:
                        raise
                    count = max(1, count // 2)
            position += count
        return results

    def _run_cached(self, graph: Graph, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """One sequence of a causal model, at once."""
        (ids,) = inputs.values()
        session = self.open_session(graph, len(ids))
        try:
            return session.extend(ids, "all")
        finally:
            session.close()

    def open_session(self, graph: Graph, capacity: int, policy: CachePolicy = WHOLE) -> DeviceSession:
        """A sequence of ``graph`` with a key-value cache for ``capacity`` tokens; see :class:`DeviceSession`."""
        return DeviceSession(self, graph, capacity, policy)

    def image(self, graph: Graph) -> Image:
        """The parameters of ``graph`` in device memory."""
        self._use(graph)
        assert self._image is not None
        return self._image

    def launch(self, loaded: LoadedProgram, operands: dict[str, int] | None = None) -> None:
        """Run a program that is loaded."""
        counters = self.device.run(loaded, operands=operands)
        if self._observe is not None:
            self._observe(counters)

    def close(self) -> None:
        """Free what lies in device memory; the device stays open."""
        for compiled in self._compiled.values():
            compiled.placed.close()
        self._compiled.clear()
        for part in self._parts:
            part.close()
        self._parts.clear()
        self._experts = DeviceExperts(self.device, self._open_part)
        if self._image is not None:
            self._image.close()
        self._image, self._graph = None, None

    def program(self, graph: Graph, lengths: tuple[int, ...], stage: int = 0) -> Program:
        """The program of one stage for sequences of these lengths."""
        self._use(graph)
        values = {v: np.zeros((1, 1)) for v in self._stages[stage].inputs}
        return self._compile(graph, stage, lengths, [values] * len(lengths)).placed.program

    def _use(self, graph: Graph) -> None:
        if self._graph is not graph:
            self.close()
            self._graph, self._stages, self._features = graph, split(graph), feature_counts(graph)
            self._image = Image(self.device, graph)

    def _run_batch(self, graph: Graph, batch: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
        inputs = graph.inputs
        values: list[dict[Value, Any]] = [
            {node.value: arrays[name] for name, node in inputs.items()} for arrays in batch
        ]
        for number, stage in enumerate(self._stages):
            for known in values:
                for node in stage.host:
                    if node.value not in known:
                        known[node.value] = self.host_value(graph, node, [known[v] for v in node.inputs])
            if stage.device:
                # What the host hands over says how many rows there are: an image has no tokens of its own.
                lengths = tuple(max(len(_rows(known[value])) for value in stage.inputs) for known in values)
                compiled = self._compile(graph, number, lengths, values)
                self._run_stage(stage, compiled, lengths, values)
        return [known[graph.output] for known in values]

    def _compile(
        self, graph: Graph, number: int, lengths: tuple[int, ...], values: list[dict[Value, Any]]
    ) -> _Compiled:
        key = (number, lengths)
        if key not in self._compiled:
            image, stage, config = self._image, self._stages[number], self.device.config
            assert image is not None
            tiles = sum(panel_count(tokens, config.rows) for tokens in lengths)
            features = {**self._features, **crossing_features(graph, stage)}
            shapes = {
                value: (tiles, features.get(value) or self._infer(stage, value, values[0]))
                for value in (*stage.inputs, *stage.outputs, *stage.choices)
            }
            kind = PresentHeadsCompiler if stage.choices else StageCompiler
            placed, made = place(
                self.device, shapes, lambda bindings: kind(config, graph, stage, image, lengths, bindings)
            )
            offsets = made.operands.offsets if isinstance(made, PresentHeadsCompiler) else {}
            self._compiled[key] = _Compiled(placed, offsets)
        return self._compiled[key]

    def _infer(self, stage: Stage, value: Value, known: dict[Value, Any]) -> int:
        """Features of a value whose producer does not tell: those of the array that is there, or of its siblings."""
        if value in known and np.ndim(known[value]) > 1 and _rows(known[value]).shape[1] > 1:
            return _rows(known[value]).shape[1]
        for node in stage.device:
            if value in node.inputs or value == node.value:
                for other in (*node.inputs, node.value):
                    if other in self._features:
                        return self._features[other]
                    if other in known and np.ndim(known[other]) == 2 and known[other].shape[1] > 1:
                        return known[other].shape[1]
        raise ModelError(f"the number of features of value {value} is not known; this graph cannot run on a device")

    def _run_stage(
        self, stage: Stage, compiled: _Compiled, lengths: tuple[int, ...], values: list[dict[Value, Any]]
    ) -> None:
        rows, placed = self.device.config.rows, compiled.placed
        for value in stage.inputs:
            features = placed.bindings[value].features
            panels = [
                to_panels(np.broadcast_to(_rows(known[value]), (tokens, features)), rows)
                for known, tokens in zip(values, lengths, strict=True)
            ]
            placed.write(value, np.concatenate(panels))
        self.launch(placed.loaded, operand_values(compiled.offsets, values))
        products = {node.value: node for node in stage.device if isinstance(node, Linear)}
        for value in stage.outputs:
            raw, node = placed.read(value), products.get(value)
            for known, sequence in zip(values, sequences_of(lengths, rows), strict=True):
                array = from_panels(raw[sequence.first : sequence.first + sequence.tiles], sequence.tokens)
                known[value] = array if node is None else whole_columns(node, array, known)


@dataclass(frozen=True)
class _Compiled:
    """A stage on the device, and the operands by which it knows which heads are there."""

    placed: Placed
    offsets: Mapping[str, HeadOffset]


def _rows(array: Any) -> np.ndarray:
    """A value as rows of tokens; a bias ``[heads, tokens, keys]`` as exponents of 2, ``[tokens, heads * keys]``."""
    if np.ndim(array) == 3:
        exponents = mul(array, np.float32(math.log2(math.e)))
        return exponents.transpose(1, 0, 2).reshape(array.shape[1], -1)
    return np.asarray(array, np.float32)
