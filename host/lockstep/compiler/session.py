"""A sequence with its key-value cache on a device: prefill in chunks of row tiles, decode with one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from lockstep_driver import Buffer
from lockstep_hls import kernels
from lockstep_isa.numerics import add
from lockstep_isa.selectors import Blocks

from lockstep.cache_policy import WHOLE, CachePolicy, hosted
from lockstep.errors import ModelError
from lockstep.eviction import Piece, Slots
from lockstep.graph import Attention, Graph, Indices, Input, Linear, PositionBias, Value
from lockstep.session import CacheRows, HostSession, check_graph, checked_ids

from .allocation import CapacityError
from .cache_form import INT8, CacheForm, check_form
from .compile_causal import CausalStageCompiler
from .context import Cache, CausalRun, Context, rounded_capacity
from .layout import from_panels, to_panels
from .placed import Placed, place
from .shapes import feature_counts
from .sketch import BLOCK, Sketches, check_sketch
from .stages import Stage, split

if TYPE_CHECKING:
    from .execute import DeviceExecutor

#: Most row tiles of new tokens in one program; fewer where they do not fit the core.
MOST_TILES = 8

Logits = Literal["last", "all", "none"]


class DeviceSession:
    """One sequence on one device; see :class:`lockstep.session.Session`.

    Parameters
    ----------
    executor : holds the device and the parameters in its memory. graph : a causal language model, contract stage.
    capacity : most tokens. policy : how its cache is treated. Attention that no core can treat so runs on the host, and
        its cache lies there.

    Raises :class:`ModelError` for a graph that cannot be run piece by piece, :class:`OutOfDeviceMemory` and
    :class:`CapacityError` for what does not fit.
    """

    def __init__(self, executor: DeviceExecutor, graph: Graph, capacity: int, policy: CachePolicy = WHOLE) -> None:
        check_graph(graph, capacity, policy)
        if biases := graph.of(PositionBias):
            raise ModelError(
                f"{graph.source} adds a bias on positions to its scores ({biases[0].heads} heads), which cores "
                "cannot do token by token; generate on cpu"
            )
        self._executor, self._graph = executor, graph
        device = executor.device
        on_host = bool(hosted(policy))
        if policy.eviction is not None and not on_host and not device.config.selection:
            raise ModelError(
                f"core '{device.config.name}' cannot replace a token in its cache: it lacks 'selection'; generate "
                "without an eviction policy, or on another core"
            )
        if device.config.operand_words_per_beat > 1:
            raise ModelError(
                f"core '{device.config.name}' writes the values of two tokens in one beat of its bus, so it cannot "
                "append a single one to a cache; run causal models on a core with a bus of at most "
                f"{device.config.rows} bytes"
            )
        form = INT8 if on_host else CacheForm(policy.bits)
        check_form(device.config, graph, form)
        self._blocks = None
        self._hosted = HostSession(graph, capacity, kernels, policy) if on_host else None
        if isinstance(policy.selector, Blocks) and not on_host:
            check_sketch(device.config, graph)
            check_tiles(graph, policy.selector)
            # Where all keys are kept, none are chosen.
            self._blocks = policy.selector if policy.selector.keys < capacity else None
        self._rows, self._form = device.config.rows, form
        self.capacity = capacity
        self.slots = Slots(capacity, policy.eviction)
        least_tile = min(node.tile for node in graph.of(Attention))
        block = BLOCK if self._blocks is not None else 1 if form == INT8 else form.unit(self._rows)
        self._held = rounded_capacity(device.config, self.slots.held, least_tile, block)
        self._stages = split(graph, () if self._hosted is None else (Attention,))
        self._features = feature_counts(graph)
        self._image = executor.image(graph)
        # Attentions that run on the host have none there.
        self._cache = Cache(device, graph.of(Attention) if self._hosted is None else [], self._held, form)
        self._sketches: Sketches | None = None
        self._importance: dict[Value, Buffer] = {}
        self._programs: dict[tuple[int, int, bool, Logits, bool], tuple[Placed, Context]] = {}
        self._most = min(MOST_TILES, self._held // self._rows)
        self._ids = np.zeros(capacity, np.int64)
        self.length = 0
        self._closed = False
        try:
            if self.slots.weighs and self._hosted is None:
                size = self._most * self._held * device.config.vector_word_bytes
                for node in graph.of(Attention):
                    self._importance[node.value] = device.allocate(size)
            if self._blocks is not None:
                self._sketches = Sketches(device, self._image, graph, self._held, self._cache.layers)
                self._program(0, 1, True, "last", True)
            self._program(0, 1, True, "last")
        except Exception:
            self.close()
            raise

    def extend(self, token_ids: Any, logits: Literal["last", "all"] = "last") -> np.ndarray:
        """Append tokens; ``float32[1, vocabulary]`` behind the last one, or ``float32[tokens, vocabulary]``."""
        ids = checked_ids(self, self._graph, token_ids)
        end = self.length + len(ids)
        self._ids[self.length : end] = ids
        results, first = [], self.length
        while first < end:
            piece = self.slots.place(first, self._together(first, end - first))
            results += self._extend(piece, logits, piece.first + piece.count == end)
            first += piece.count
            if first > self.slots.held or self.slots.weighs:
                # A token has been given up, or given its attention: what ran cannot be undone.
                self.length = first
        # Not before everything ran: an error leaves the sequence as it was.
        self.length = end
        return np.concatenate(results)

    def _together(self, first: int, count: int) -> int:
        """How many of the tokens from position ``first`` on can share a turn: those that choose their keys cannot."""
        if self._blocks is None or count == 1:
            return count
        return max(1, min(count, self._blocks.keys - first))

    def _extend(self, piece: Piece, logits: Literal["last", "all"], is_last: bool) -> list[np.ndarray]:
        """The logits of new tokens that share a turn, as far as they are wanted."""
        results, done = [], 0
        while done < piece.count:
            rest, lane = piece.count - done, (piece.slot + done) % self._rows
            tiles = min(self._most, -(-(lane + rest) // self._rows))
            count = min(rest, tiles * self._rows - lane)
            part = Piece(piece.first + done, count, piece.slot + done, piece.seen - rest + count)
            wanted: Logits = "all" if logits == "all" else "last" if is_last and count == rest else "none"
            try:
                found = self._run(part, tiles, wanted)
            except CapacityError:
                if tiles == 1:
                    raise
                self._most = tiles // 2
                continue
            if found is not None:
                results.append(found)
            done += count
        return results

    def truncate(self, length: int) -> None:
        """Forget the tokens from position ``length`` on; all or none where a token has been given up."""
        self.slots.check_truncation(self.length, length)
        self.length = length
        if self._sketches is not None:
            self._sketches.truncate(length)

    def restore(self, length: int, caches: Mapping[Value, CacheRows]) -> None:
        """Begin behind ``length`` tokens whose keys and values are given, by the value of their attention node: of the
        last ones, as many as the cache holds.
        """
        for given, *_ in caches.values():
            self.slots.restore(length, len(given))
        if self._hosted is not None:
            self._hosted.restore(length, caches)
        else:
            for value, rows in caches.items():
                self._cache.write(value, rows)
        self.length = length
        if self._sketches is not None:
            self._sketches.truncate(0)

    def close(self) -> None:
        """Free what the sequence holds in device memory."""
        if self._closed:
            return
        self._closed = True
        for placed, _ in self._programs.values():
            placed.close()
        self._programs.clear()
        for buffer in self._importance.values():
            self._executor.device.free(buffer)
        self._importance.clear()
        if self._sketches is not None:
            self._sketches.close()
        self._cache.close()

    # --- One run of one program ----------------------------------------------------------------------------------

    def _run(self, piece: Piece, tiles: int, wanted: Logits) -> np.ndarray | None:
        first, count, lane = piece.first, piece.count, piece.slot % self._rows
        values: dict[Value, Any] = {}
        result = None
        chooses = self._blocks is not None and piece.seen > self._blocks.keys
        if chooses and self._sketches is not None:
            self._sketches.make(piece.slot // BLOCK, self._executor.launch)
        if self._hosted is not None:
            self._hosted.begin(piece)
        for number, stage in enumerate(self._stages):
            for node in stage.host:
                if isinstance(node, Input):
                    values[node.value] = self._ids[first : first + count]
                elif isinstance(node, Attention):
                    assert self._hosted is not None
                    values[node.value] = self._hosted.attend(node, values, count, piece)
                elif isinstance(node, Indices):
                    # Positions and the like may depend on every token so far.
                    found = node.function(*(self._ids[: first + count] for _ in node.reads))
                    values[node.value] = found[-count:] if len(found) > 1 else np.repeat(found, count)
                else:
                    values[node.value] = self._executor.host_value(self._graph, node, [values[v] for v in node.inputs])
            if not stage.device:
                continue
            placed, context = self._program(number, tiles, count == 1, wanted, chooses)
            self._write(stage, placed, values, lane, count, tiles)
            self._executor.launch(placed.loaded, context.values(piece))
            for value in stage.outputs:
                found = self._read(placed, value, lane, count, tiles, wanted)
                values[value] = found
                if value == self._graph.output:
                    result = found
        if self.slots.weighs:
            self.slots.credit(self._credit(piece, tiles))
        return None if wanted == "none" else result

    def _credit(self, piece: Piece, tiles: int) -> np.ndarray:
        """float32[count, seen]: the attention that the new tokens gave, over all layers in their order."""
        if self._hosted is not None:
            return self._hosted.importance
        lane, total = piece.slot % self._rows, np.zeros((piece.count, piece.seen), np.float32)
        for node in self._graph.of(Attention):
            words = self._importance[node.value].data.view(np.float32)
            most = min(node.tile, self._held)
            panels = words[: tiles * most * self._rows].reshape(tiles, most, self._rows)
            total = add(total, from_panels(panels, tiles * self._rows)[lane : lane + piece.count, : piece.seen])
        return total

    def _write(self, stage: Stage, placed: Placed, values: dict[Value, Any], lane: int, count: int, tiles: int) -> None:
        for value in stage.inputs:
            rows = np.zeros((tiles * self._rows, placed.bindings[value].features), np.float32)
            rows[lane : lane + count] = values[value]
            placed.write(value, to_panels(rows, self._rows))

    def _read(self, placed: Placed, value: Value, lane: int, count: int, tiles: int, wanted: Logits) -> np.ndarray:
        raw = placed.read(value)
        if value == self._graph.output and wanted == "last":
            return raw[-1, :, (lane + count - 1) % self._rows][None].copy()
        return from_panels(raw, tiles * self._rows)[lane : lane + count]

    def _program(
        self, number: int, tiles: int, single: bool, wanted: Logits, chooses: bool = False
    ) -> tuple[Placed, Context]:
        key = (number, tiles, single, wanted, chooses)
        if key not in self._programs:
            self._programs[key] = self._compile(self._stages[number], tiles, single, wanted, chooses)
        return self._programs[key]

    def _compile(self, stage: Stage, tiles: int, single: bool, wanted: Logits, chooses: bool) -> tuple[Placed, Context]:
        device, graph = self._executor.device, self._graph
        output = next(node for node in graph if node.value == graph.output)
        last = wanted != "all" and isinstance(output, Linear)
        shapes = {
            value: (1 if last and value == graph.output else tiles, self._features[value])
            for value in (*stage.inputs, *stage.outputs)
        }
        importance = {value: buffer.address for value, buffer in self._importance.items()}
        run = CausalRun(self._held, tiles, single, self._cache.layers, wanted, self.capacity, self._form, importance)
        if chooses and self._sketches is not None:
            run = replace(run, blocks=self._blocks, sketches=self._sketches.layers)
        placed, compiler = place(
            device,
            shapes,
            lambda bindings: CausalStageCompiler(device.config, graph, stage, self._image, bindings, run),
        )
        return placed, compiler.context


def check_tiles(graph: Graph, blocks: Blocks) -> None:
    """Raise :class:`ModelError` where the keys that a token keeps are met in several tiles."""
    for node in graph.of(Attention):
        if blocks.keys > node.tile:
            raise ModelError(
                f"{blocks.keys} keys are met in several tiles of {node.tile}, and a core meets those that it chooses "
                "in one; keep fewer"
            )
