"""The sketch of a cache's keys in device memory, and the program that makes it, a block of keys at a time.

A block is sketched when its last key is there, so a token pays for it once in :data:`BLOCK` times; the block in which a
token stands is attended to without being looked at. Panels of R rows hold 4 R keys, packed as weights are:

    words    int8 [kv_heads][panels][head_dim / 32][17][R]        scales   float32[kv_heads][panels][R]

The array does what lanes cannot do with each other. With constant left operands it turns keys around, adds up four of
them, and puts two int4 into a byte:

    keys [features x keys]  -identity->  [keys x features]  -ones->  sums [rows x features]  -1, 16->  bytes
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from lockstep_driver import Buffer, Device, LoadedProgram
from lockstep_isa.config import CoreConfig
from lockstep_isa.instructions import (
    LOAD,
    MATRIX,
    STORE,
    Destination,
    FirstMultiply,
    Maximum,
    Memory,
    SecondAdd,
    Source,
)
from lockstep_isa.program import Program
from lockstep_isa.sketch import GROUP, MULTIPLIER_OFFSET, MULTIPLIER_SLOPE, POOL

from lockstep.errors import ModelError
from lockstep.graph import Attention, Graph

from .context import LayerCache, LayerSketch
from .image import Image
from .lowering import Lowering
from .passes import RECIPROCAL, Fields, float_bits, rounding, scaling

#: Runs a program that is loaded, with its operands.
Launch = Callable[[LoadedProgram, dict[str, int]], None]
#: Keys that are chosen together.
BLOCK = 16
#: Rows of the sketch of a block, and words of a panel for each group of channels: multipliers, then two int4 in a byte.
BLOCK_ROWS, GROUP_WORDS = BLOCK // POOL, 1 + GROUP // 2
#: Added to a small float32, it leaves the nearest integer behind when it is taken away.
_ROUNDER = np.float32(1.5 * 2**23)


def check_sketch(config: CoreConfig, graph: Graph) -> None:
    """Raise :class:`ModelError` for a core that cannot choose keys, or not those of ``graph``."""
    missing = [name for name in ("packed", "selection") if not getattr(config, name)]
    if missing:
        raise ModelError(
            f"core '{config.name}' cannot choose keys: it lacks {' and '.join(repr(name) for name in missing)}; attend "
            "to all keys, or use another core"
        )
    if not 4 <= config.rows <= BLOCK:
        raise ModelError(
            f"core '{config.name}' has words of {config.rows} values, and keys are chosen in blocks of {BLOCK} on "
            f"cores of 4 to {BLOCK} rows; attend to all keys, or use another core"
        )
    for node in graph.of(Attention):
        if node.window is not None:
            raise ModelError(f"{graph.source} sees the last {node.window} tokens only; cores choose from all keys")


def panel_words(head_dim: int) -> int:
    """Words of R bytes in a panel."""
    return head_dim // GROUP * GROUP_WORDS


class Sketches:
    """The sketch of a sequence's cache on one device.

    Parameters
    ----------
    device : whose memory is used. image : the model's parameters there. graph : whose attention is served.
    capacity : slots of the cache. caches : where it lies, by the value of an attention.

    Attributes
    ----------
    layers : where the sketches lie, by the value of an attention.

    Raises :class:`OutOfDeviceMemory` where they do not fit, with nothing kept.
    """

    def __init__(
        self, device: Device, image: Image, graph: Graph, capacity: int, caches: dict[int, LayerCache]
    ) -> None:
        self._device, self._rows = device, device.config.rows
        self._buffers: list[Buffer] = []
        self._blocks = 0
        self.layers: dict[int, LayerSketch] = {}
        panels = -(-capacity // (POOL * self._rows))
        try:
            for node in graph.of(Attention):
                sizes = panel_words(node.head_dim) * self._rows, 4 * self._rows
                words, scales = (self._place(np.zeros(node.kv_heads * panels * size, np.uint8)) for size in sizes)
                self.layers[node.value] = LayerSketch(words, scales, panels)
            constants = SketchConstants(*(self._place(a) for a in constant_words(self._rows)))
            compiler = SketchCompiler(device.config, image, graph, capacity, caches, self.layers, constants)
            self._loaded = device.load(compiler.program())
        except Exception:
            self._free()
            raise
        self._operands = compiler.operands

    def make(self, blocks: int, launch: Launch) -> None:
        """Sketch what is not sketched of the first ``blocks`` blocks of keys."""
        for block in range(self._blocks, blocks):
            launch(self._loaded, self._operands(block))
            self._blocks = block + 1

    def truncate(self, length: int) -> None:
        """Of the sequence the first ``length`` tokens are left."""
        self._blocks = min(self._blocks, length // BLOCK)

    def close(self) -> None:
        """Free the device memory."""
        self._device.unload(self._loaded)
        self._free()

    def _place(self, array: np.ndarray) -> int:
        buffer = self._device.allocate(array.nbytes)
        self._buffers.append(buffer)
        buffer.write(array)
        return buffer.address

    def _free(self) -> None:
        for buffer in self._buffers:
            self._device.free(buffer)
        self._buffers.clear()


@dataclass(frozen=True)
class SketchConstants:
    """Byte addresses of the constant operands: see :func:`constant_words`."""

    identity: int
    sums: int
    pairs: int


def constant_words(rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int8[R, R], the identity; int8[R / 4, 16, R], whose words k add key k to one of the four rows from 4 v on; and
    int8[2 R, R], which makes a byte of features 2 i and 2 i + 1.
    """
    sums = np.zeros((rows // BLOCK_ROWS, BLOCK, rows), np.int8)
    key = np.arange(BLOCK)
    for place, words in enumerate(sums):
        words[key, place * BLOCK_ROWS + key // POOL] = 1
    pairs = np.zeros((rows, 2, rows), np.int8)
    pairs[np.arange(rows), 0, np.arange(rows)] = 1
    pairs[np.arange(rows), 1, np.arange(rows)] = 16
    return np.eye(rows, dtype=np.int8), sums, pairs.reshape(2 * rows, rows)


class SketchCompiler:
    """Compiles the program that sketches one block of keys of all attentions; which one, its operands say."""

    def __init__(
        self,
        config: CoreConfig,
        image: Image,
        graph: Graph,
        capacity: int,
        caches: dict[int, LayerCache],
        sketches: dict[int, LayerSketch],
        constants: SketchConstants,
    ) -> None:
        self.config, self.rows, self.capacity = config, config.rows, capacity
        self.low = Lowering(config, image)
        self.nodes: Iterable[Attention] = graph.of(Attention)
        self.caches, self.sketches, self.constants = caches, sketches, constants
        # Blocks that share a panel, and panels of keys in a block.
        self.together, self.panels = self.rows // BLOCK_ROWS, BLOCK // self.rows
        self._factors: dict[str, tuple[str, int]] = {}
        low = self.low
        self.identity = low.weights.take(self.rows)
        self.sums, self.pairs = low.activations.take(BLOCK), low.activations.take(2 * self.rows)

    def program(self) -> Program:
        """The whole program."""
        load = self.low.builder.emit
        load(LOAD, memory=Memory.WEIGHT, words=self.rows, address=self.constants.identity, local=self.identity)
        load(LOAD, memory=Memory.ACTIVATION, words=2 * self.rows, address=self.constants.pairs, local=self.pairs)
        load(
            LOAD,
            memory=Memory.ACTIVATION,
            words=BLOCK,
            address=self.constants.sums,
            address_operand=self._operand("place", BLOCK * self.rows),
            local=self.sums,
        )
        for node in self.nodes:
            self._sketch(node)
        return self.low.builder.finish()

    def operands(self, block: int) -> dict[str, int]:
        """The operands' values for a block."""
        values = self._factors.items()
        return {name: self._number(kind, block) * factor for name, (kind, factor) in values}

    def _number(self, kind: str, block: int) -> int:
        """Of a block: its number, its panel, or its place in that."""
        panel, place = divmod(block, self.together)
        return {"block": block, "panel": panel, "place": place}[kind]

    def _operand(self, kind: str, factor: int) -> int:
        """The number of an operand that is ``factor`` times what :meth:`_number` says."""
        name = f"{kind}_x{factor}"
        if name not in self._factors:
            blocks = -(-self.capacity // BLOCK)
            most = min(self.together - 1, blocks - 1) if kind == "place" else self._number(kind, blocks - 1)
            self.low.builder.operand(name, 0, most * factor)
            self._factors[name] = kind, factor
        return list(self._factors).index(name) + 1

    def _sketch(self, node: Attention) -> None:
        """One attention, all heads of keys together."""
        low, heads, d = self.low, node.kv_heads, node.head_dim
        tokens = low.weights.take(heads * d // self.rows * BLOCK)
        scales = self._turn(node, tokens)
        tiles = heads * d // GROUP
        mean, largest = low.vectors.take(heads * d), low.parameters.take(tiles)
        low.builder.emit(
            MATRIX,
            depth=BLOCK,
            inner=heads * d // self.rows,
            a=self.sums,
            w=tokens,
            w_inner=BLOCK,
        )
        low.emit_pass(
            source=Source.ACCUMULATOR,
            destination=Destination.VECTOR,
            **scaling(1 / POOL),
            tiles=tiles,
            columns=GROUP,
            to=mean,
            to_stride=GROUP,
            maximum=Maximum.ABSOLUTE,
            max_to=largest,
        )
        low.weights.give(tokens)
        words = self._pack(tiles, mean, largest)
        rows = self._row_scales(heads, mean, scales)
        self._store(node, words, rows)
        for piece in (mean, words, rows):
            low.vectors.give(piece)
        for piece in (largest, scales):
            low.parameters.give(piece)

    def _turn(self, node: Attention, tokens: int) -> int:
        """A block's keys to WEIGHT, a word for each key and R features; returns the PARAMETER words of their scales."""
        low, cache, heads, d, rows = self.low, self.caches[node.value], node.kv_heads, node.head_dim, self.rows
        words = self.panels * d
        keys, scales = low.activations.take(heads * words), low.parameters.take(heads * self.panels)
        low.builder.emit(
            LOAD,
            memory=Memory.ACTIVATION,
            rows=heads,
            words=words,
            address=cache.keys,
            address_operand=self._operand("block", BLOCK * d),
            stride=self.capacity * d,
            local=keys,
            local_stride=words,
        )
        low.builder.emit(
            LOAD,
            memory=Memory.PARAMETER,
            rows=heads,
            words=self.panels,
            address=cache.key_scales,
            address_operand=self._operand("block", BLOCK * 4),
            stride=self.capacity * 4,
            local=scales,
            local_stride=self.panels,
        )
        for panel in range(self.panels):
            low.builder.emit(
                MATRIX,
                depth=rows,
                outer=heads,
                inner=d // rows,
                a=keys + panel * d,
                a_outer=words,
                a_inner=rows,
                w=self.identity,
            )
            low.emit_pass(
                source=Source.ACCUMULATOR,
                destination=Destination.WEIGHT_TRANSPOSED,
                tiles=heads,
                columns=d,
                to=tokens + panel * rows,
                to_stride=d // rows * BLOCK,
                to_group=BLOCK,
            )
        low.activations.give(keys)
        return scales

    def _pack(self, tiles: int, mean: int, largest: int) -> int:
        """Means to VECTOR words of bytes: of each group of channels the multipliers, and int4 in pairs."""
        low, rows = self.low, self.rows
        shifted, inverse = low.parameters.take(tiles), low.parameters.take(tiles)
        offset: Fields = {"add2": SecondAdd.IMMEDIATE1, "immediate1": float_bits(MULTIPLIER_OFFSET)}
        up: Fields = {"add2": SecondAdd.IMMEDIATE1, "immediate1": float_bits(_ROUNDER)}
        down: Fields = {"add2": SecondAdd.IMMEDIATE1, "immediate1": float_bits(-_ROUNDER)}
        low.scalars(largest, largest, tiles, **scaling(MULTIPLIER_SLOPE), **offset)
        low.scalars(largest, shifted, tiles, **up)
        low.scalars(shifted, inverse, tiles, **down, **RECIPROCAL)
        words, levels = low.vectors.take(tiles * GROUP_WORDS), low.weights.take(tiles * GROUP)
        low.emit_pass(
            source=Source.PARAMETER,
            destination=Destination.BYTES,
            **down,
            tiles=tiles,
            columns=1,
            x=shifted,
            x_stride=1,
            to=words,
            to_stride=GROUP_WORDS,
        )
        low.emit_pass(
            **rounding(inverse, Destination.WEIGHT),
            tiles=tiles,
            columns=GROUP,
            x=mean,
            x_stride=GROUP,
            to=levels,
            to_stride=GROUP,
        )
        for first in range(0, GROUP, 2 * rows):
            low.builder.emit(MATRIX, depth=2 * rows, inner=tiles, a=self.pairs, w=levels + first, w_inner=GROUP)
            low.emit_pass(
                source=Source.ACCUMULATOR,
                destination=Destination.BYTES_TRANSPOSED,
                tiles=tiles,
                columns=rows,
                to=words + 1 + first // 2,
                to_stride=GROUP_WORDS,
            )
        low.weights.give(levels)
        for piece in (shifted, inverse):
            low.parameters.give(piece)
        return words

    def _row_scales(self, heads: int, finite: int, scales: int) -> int:
        """VECTOR words with the greatest scale of four keys each, in all lanes; ``finite``: as many words as there are
        keys, whatever they hold.
        """
        low, rows = self.low, heads * BLOCK_ROWS
        greatest, result = low.parameters.take(rows), low.vectors.take(rows)
        low.emit_pass(
            source=Source.VECTOR,
            mul1=FirstMultiply.IMMEDIATE0,
            immediate0=float_bits(0.0),
            add2=SecondAdd.COLUMN1,
            column1=scales,
            columns=heads * BLOCK,
            x=finite,
            maximum=Maximum.ABSOLUTE,
            max_columns=POOL,
            max_to=greatest,
        )
        low.emit_pass(source=Source.PARAMETER, destination=Destination.VECTOR, columns=rows, x=greatest, to=result)
        low.parameters.give(greatest)
        return result

    def _store(self, node: Attention, words: int, rows: int) -> None:
        """The block's lanes of its panel; lanes behind them stand for keys that are still to come."""
        sketch, size, word = self.sketches[node.value], panel_words(node.head_dim), self.config.vector_word_bytes
        for head in range(node.kv_heads):
            self.low.builder.emit(
                STORE,
                memory=Memory.VECTOR,
                bytes=1,
                words=size,
                address=sketch.words + head * sketch.panels * size * self.rows,
                address_operand=self._operand("panel", size * self.rows),
                local=words + head * size,
                lane_operand=self._operand("place", BLOCK_ROWS),
            )
            for row in range(BLOCK_ROWS):
                self.low.builder.emit(
                    STORE,
                    memory=Memory.VECTOR,
                    words=1,
                    address=sketch.scales + head * sketch.panels * word,
                    address_operand=self._operand("panel", word),
                    local=rows + head * BLOCK_ROWS + row,
                    lane=row,
                    lane_operand=self._operand("place", BLOCK_ROWS),
                )
