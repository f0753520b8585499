"""Parameters in device memory: packed once per model and core, in the order in which programs stream them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import numpy as np
from lockstep_driver import Buffer, Device
from lockstep_driver.memory import ALIGNMENT
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


#: Names of a linear layer's weight, scales, and bias or none.
LinearNames = tuple[str, str, str | None]


@dataclass(frozen=True)
class HeadRecords:
    """Linear layers in device memory, head by head.

    Attributes
    ----------
    stride : bytes from what belongs to one head to what belongs to the next. images : each layer, with the chunks of
    head 0. columns : byte address of the PARAMETER words that come with them for head 0, one value per column.
    """

    stride: int
    images: tuple[LinearImage, ...]
    columns: int


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

    def records(
        self, layers: tuple[LinearNames, ...], columns: str | None, group: int, panels_per_chunk: int
    ) -> HeadRecords:
        """Linear layers head by head, each head's chunks of all of them one behind the other.

        layers : names of weight, scales and bias of each, with as many columns as the others. columns : names a tensor
        float32[heads * group] that comes with them, or none. group, panels_per_chunk : as for :meth:`linear`.
        """
        key = ("records", layers, columns, group, panels_per_chunk)
        if key not in self._known:
            self._known[key] = self._pack_records(layers, columns, group, panels_per_chunk)
        return self._known[key]  # type: ignore[return-value]

    def _pack_records(self, layers: tuple[LinearNames, ...], columns: str | None, group: int, most: int) -> HeadRecords:
        rows, outputs = self._config.rows, len(self._tensors[layers[0][0]])
        record: list[NDArray[np.uint8]] = []
        places: list[int] = []
        for start in range(0, outputs, group):
            arrays: list[NDArray[np.generic]] = []
            for names in layers:
                for first in range(start, start + group, most * rows):
                    arrays += self._chunk(*names, first, min(first + most * rows, start + group))
            if columns is not None:
                arrays.append(column_words(np.asarray(self._tensors[columns], np.float32)[start : start + group], rows))
            padded = [_whole(array) for array in arrays]
            places = np.cumsum([0, *(array.size for array in padded)]).tolist()
            record += padded
        address, stride = self._place(np.concatenate(record)), places[-1]
        at = (address + place for place in places)
        images = []
        for weight, _, bias in layers:
            chunks = []
            for first in range(0, group, most * rows):
                width = min(most * rows, group - first)
                chunks.append(Chunk(first, width, -(-width // rows), next(at), next(at)))
            images.append(LinearImage(self._tensors[weight].shape[1], self.packing(weight), tuple(chunks), bool(bias)))
        return HeadRecords(stride, tuple(images), next(at))

    def _pack(self, weight: str, scales: str, bias: str | None, group: int | None, most: int) -> LinearImage:
        rows = self._config.rows
        outputs, depth = self._tensors[weight].shape
        group = group or outputs
        chunks = []
        for start in range(0, outputs, group):
            for first in range(start, min(start + group, outputs), most * rows):
                end = min(first + most * rows, start + group, outputs)
                panels, words = self._chunk(weight, scales, bias, first, end)
                chunks.append(Chunk(first, end - first, len(panels), self._place(panels), self._place(words)))
        return LinearImage(depth, self.packing(weight), tuple(chunks), bias is not None)

    def _chunk(
        self, weight: str, scales: str, bias: str | None, first: int, end: int
    ) -> tuple[NDArray[np.generic], NDArray[np.float32]]:
        """Panels of some output columns of a linear layer, and the PARAMETER words that come with them."""
        w, form, stored = np.asarray(self._tensors[weight], np.int8), self.packing(weight), self._stored.get(weight)
        rows = self._config.rows
        if stored is not None and form != Packing(w.shape[1]):
            panels = packed_panels(stored, first, end, rows)
        else:
            panels = to_panels(w[first:end], rows)
        names = [scales] if bias is None else [scales, bias]
        columns = [np.asarray(self._tensors[name], np.float32)[first:end] for name in names]
        return panels, np.concatenate([column_words(flush(values), rows) for values in columns])


def _word_columns(values: NDArray[np.float32], rows: int) -> NDArray[np.float32]:
    """values[positions, columns] as column words, float32[positions, words, rows]; the rest is zero."""
    positions, columns = values.shape
    words = np.zeros((positions, -(-columns // rows) * rows), np.float32)
    words[:, :columns] = values
    return words.reshape(positions, -1, rows)


def _whole(array: NDArray[np.generic]) -> NDArray[np.uint8]:
    """The bytes of an array, and zeros up to where a buffer could begin."""
    raw = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    return np.concatenate([raw, np.zeros(-raw.size % ALIGNMENT, np.uint8)])
