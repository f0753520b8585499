"""Parameters in device memory: packed once per model and core, in the order in which programs stream them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import numpy as np
from lockstep_driver import Buffer, Device
from lockstep_isa.config import CoreConfig
from lockstep_isa.numerics import flush
from numpy.typing import NDArray

from lockstep.graph import Graph

from .layout import column_words, table_words, to_panels
from .packing import Packing, packed_panels, packing


@dataclass(frozen=True)
class Chunk:
    """Some output columns of a linear layer: what one LOAD, one MATRIX and one VECTOR instruction work on.

    Attributes
    ----------
    first, columns : which output columns.
    panels : panels of ``columns`` output channels each, the last one padded.
    weights : byte address of the WEIGHT words of its panels.
    parameters : byte address of ``panels`` PARAMETER words of scales, then as many of biases if there are any.
    operand : a run-time operand that is added to both addresses; 0: none.
    """

    first: int
    columns: int
    panels: int
    weights: int
    parameters: int
    operand: int = 0


@dataclass(frozen=True)
class LinearImage:
    """A linear layer in device memory: K, how its panels are packed, its chunks, and whether it has biases."""

    depth: int
    packing: Packing
    chunks: tuple[Chunk, ...]
    has_bias: bool


class Image:
    """Everything constant that programs of one graph read, in the memory of one device.

    Parameters
    ----------
    device : whose memory is used; it gives up the memory when :meth:`close` is called.
    graph : whose parameters they are.
    """

    def __init__(self, device: Device, graph: Graph) -> None:
        self._device = device
        self._config: CoreConfig = device.config
        self._tensors: Mapping[str, NDArray[np.generic]] = graph.tensors
        self._stored = graph.stored
        self._buffers: list[Buffer] = []
        self._known: dict[object, object] = {}

    def close(self) -> None:
        """Free the device memory."""
        for buffer in self._buffers:
            self._device.free(buffer)
        self._buffers.clear()
        self._known.clear()

    def _place(self, array: NDArray[np.generic]) -> int:
        buffer = self._device.allocate(array.nbytes)
        buffer.write(array)
        self._buffers.append(buffer)
        return buffer.address

    def constant(self, name: Hashable, array: NDArray[np.generic]) -> int:
        """Byte address of an array that programs need besides parameters, placed once for each name."""
        key = ("constant", name)
        if key not in self._known:
            self._known[key] = self._place(array)
        return self._known[key]  # type: ignore[return-value]

    def columns(self, name: str) -> tuple[int, int]:
        """Byte address and PARAMETER words of a tensor float32[features], one value per column."""
        key = ("columns", name)
        if key not in self._known:
            words = column_words(np.asarray(self._tensors[name], np.float32).reshape(-1), self._config.rows)
            self._known[key] = (self._place(words), len(words))
        return self._known[key]  # type: ignore[return-value]

    def table(self, name: str) -> int:
        """Byte address of a function table, as LOAD to the TABLE memory wants it."""
        key = ("table", name)
        if key not in self._known:
            self._known[key] = self._place(table_words(name))
        return self._known[key]  # type: ignore[return-value]

    def angles(self, cos: str, sin: str) -> tuple[int, int]:
        """Byte address and pairs of a rotary table: panels of positions, ``pairs`` words of cosines, then of sines."""
        key = ("angles", cos, sin)
        if key not in self._known:
            table = np.concatenate([self._tensors[cos], self._tensors[sin]], axis=1).astype(np.float32)
            self._known[key] = (self._place(to_panels(flush(table), self._config.rows)), table.shape[1] // 2)
        return self._known[key]  # type: ignore[return-value]

    def angle_columns(self, cos: str, sin: str) -> tuple[int, int, int]:
        """Byte address, PARAMETER words a position, and pairs of a rotary table with one block per position: cosines
        for both halves, sines, minus sines, each as column words.
        """
        key = ("angle columns", cos, sin)
        if key not in self._known:
            c, s = (flush(np.asarray(self._tensors[name], np.float32)) for name in (cos, sin))
            blocks = [_word_columns(block, self._config.rows) for block in (np.hstack([c, c]), s, -s)]
            table = np.concatenate(blocks, axis=1)
            self._known[key] = (self._place(table), table.shape[1], c.shape[1])
        return self._known[key]  # type: ignore[return-value]

    def packing(self, weight: str) -> Packing:
        """How the panels of a weight int8[N, K] lie in the WEIGHT memory."""
        return packing(self._config, self._tensors[weight].shape[1], self._stored.get(weight))

    def linear(
        self, weight: str, scales: str, bias: str | None, group: int | None, panels_per_chunk: int
    ) -> LinearImage:
        """A linear layer, weight int8[N, K].

        group : columns that must not share a panel with others (a head), or none. panels_per_chunk : at most so many
        panels make a chunk; chunks do not cross groups.
        """
        key = ("linear", weight, scales, bias, group, panels_per_chunk)
        if key not in self._known:
            self._known[key] = self._pack(weight, scales, bias, group, panels_per_chunk)
        return self._known[key]  # type: ignore[return-value]

    def _pack(self, weight: str, scales: str, bias: str | None, group: int | None, most: int) -> LinearImage:
        w = np.asarray(self._tensors[weight], np.int8)
        s = np.asarray(self._tensors[scales], np.float32)
        b = None if bias is None else np.asarray(self._tensors[bias], np.float32)
        rows = self._config.rows
        outputs, depth = w.shape
        group = group or outputs
        form, stored = self.packing(weight), self._stored.get(weight)
        chunks = []
        for start in range(0, outputs, group):
            for first in range(start, min(start + group, outputs), most * rows):
                end = min(first + most * rows, start + group, outputs)
                if stored is not None and form != Packing(depth):
                    panels = packed_panels(stored, first, end, rows)
                else:
                    panels = to_panels(w[first:end], rows)
                words = [column_words(flush(s[first:end]), rows)]
                if b is not None:
                    words.append(column_words(flush(b[first:end]), rows))
                chunks.append(
                    Chunk(first, end - first, len(panels), self._place(panels), self._place(np.concatenate(words)))
                )
        return LinearImage(depth, form, tuple(chunks), b is not None)


def _word_columns(values: NDArray[np.float32], rows: int) -> NDArray[np.float32]:
    """values[positions, columns] as column words, float32[positions, words, rows]; the rest is zero."""
    positions, columns = values.shape
    words = np.zeros((positions, -(-columns // rows) * rows), np.float32)
    words[:, :columns] = values
    return words.reshape(positions, -1, rows)
