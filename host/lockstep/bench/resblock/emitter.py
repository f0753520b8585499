"""Instructions of a block: weights that stream ahead of the array, products, and their drains one product behind."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from lockstep_driver.builder import ProgramBuilder
from lockstep_isa.config import CoreConfig
from lockstep_isa.instructions import (
    LOAD,
    MATRIX,
    VECTOR,
    Destination,
    FirstAdd,
    FirstMultiply,
    Maximum,
    Memory,
    SecondAdd,
    SecondMultiply,
    Source,
    ThirdMultiply,
)
from lockstep_isa.numerics import F32, flush
from lockstep_isa.operations import I8
from numpy.typing import NDArray

from lockstep.compiler.allocation import Pieces, Ring
from lockstep.compiler.layout import column_words, to_panels

#: Output columns of a chunk: as many as a row sum has partial sums.
CHUNK_COLUMNS = 64
#: Chunks that are asked for before the one that the array is given.
CHUNKS_AHEAD = 3
#: Share of the WEIGHT and PARAMETER memories through which weights and their scales stream.
WEIGHT_RING, PARAMETER_RING = 0.875, 0.25
#: Integers up to this are exact in float32.
EXACT = 1 << 24
#: Blocks of device memory begin on multiples of this: 32 beats of the widest bus, which is the longest burst.
BLOCK_BYTES = 4096


class Image:
    """Bytes of device memory from address 0 on."""

    def __init__(self) -> None:
        self._blocks: list[NDArray[np.uint8]] = []
        self.size = 0

    def place(self, array: NDArray[np.generic]) -> int:
        """The address of an array's bytes."""
        raw = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        padded = np.zeros(-(-raw.size // BLOCK_BYTES) * BLOCK_BYTES, np.uint8)
        padded[: raw.size] = raw
        self._blocks.append(padded)
        self.size += padded.size
        return self.size - padded.size

    def bytes(self) -> NDArray[np.uint8]:
        """Everything that was placed, uint8[size]."""
        return np.concatenate(self._blocks)


@dataclass(frozen=True)
class Chunk:
    """Some output columns of a layer.

    Attributes
    ----------
    columns, panels, depth : output columns, panels that hold them, and K.
    weights : byte address of panels * depth WEIGHT words. parameters, parameter_words : byte address of the PARAMETER
    words, one of scales per panel, then one of biases per panel if there are any.
    pieces : the parts of K in which the product is formed, first to last; one unless the array is to start early.
    """

    columns: int
    panels: int
    depth: int
    weights: int
    parameters: int
    parameter_words: int
    pieces: tuple[int, ...]


def pack(
    config: CoreConfig, image: Image, weight: I8, scales: F32, bias: F32 | None, columns: int = CHUNK_COLUMNS
) -> list[Chunk]:
    """Chunks of ``columns`` outputs of a layer: weight int8[N, K], scales and bias float32[N]."""
    chunks = []
    for first in range(0, len(weight), columns):
        at = slice(first, first + columns)
        panels = to_panels(weight[at], config.rows)
        words = [column_words(flush(values[at]), config.rows) for values in (scales, bias) if values is not None]
        parameters = np.concatenate(words)
        outputs, depth = weight[at].shape
        addresses = image.place(panels), image.place(parameters)
        chunks.append(Chunk(outputs, len(panels), depth, *addresses, len(parameters), (depth,)))
    return chunks


def adds_exactly(weight: I8) -> bool:
    """Whether products with a layer may be formed piece by piece along K, and the pieces added as float32.

    They may where no partial sum can leave +-2^24, which weight: int8[N, K] decides: operands are in +-127.
    """
    return int(np.abs(weight.astype(np.int64)).sum(axis=1).max(initial=0)) * 127 <= EXACT


def early_pieces(config: CoreConfig, weight: I8) -> tuple[int, ...]:
    """Pieces of K, the first ones short, in which the first product of a program is formed.

    The array starts once the first one is there. Where they do not add up exactly, K stays whole.
    """
    depth = weight.shape[1]
    if not adds_exactly(weight):
        return (depth,)
    pieces: list[int] = []
    size = config.rows
    while len(pieces) < 3 and depth - sum(pieces) >= size + config.rows:
        pieces.append(size)
        size *= 2
    return (*pieces, depth - sum(pieces))


@dataclass(frozen=True)
class Operand:
    """int8[tiles * rows, features] in ACTIVATION words from ``start``; PARAMETER word ``scales`` + t scales tile t."""

    start: int
    features: int
    scales: int


class Emitter:
    """Emits one program for ``tiles`` row tiles.

    Products and drains go in pairs through :meth:`step`, which emits the drain behind the next product: so the array
    has its next instruction before VECTOR, which takes result tiles in their order, is given the passes of this one.
    """

    def __init__(self, config: CoreConfig, tiles: int) -> None:
        self.config, self.tiles = config, tiles
        self.builder = ProgramBuilder(config)
        weights = int(config.weight_words * WEIGHT_RING)
        parameters = int(config.parameter_words * PARAMETER_RING)
        self.activations = Pieces("ACTIVATION", 0, config.activation_words)
        self.vectors = Pieces("VECTOR", 0, config.vector_words)
        self.weights = Pieces("WEIGHT", weights, config.weight_words)
        self.parameters = Pieces("PARAMETER", parameters, config.parameter_words)
        self._weight_ring = Ring("WEIGHT", 0, weights)
        self._parameter_ring = Ring("PARAMETER", 0, parameters)
        self._waiting: deque[Chunk] = deque()
        self._fetched: deque[tuple[Chunk, int, int]] = deque()
        self._drains: deque[Callable[[], None]] = deque()

    # --- Order --------------------------------------------------------------------------------------------------

    def step(self, product: Callable[[], None], drain: Callable[[], None]) -> None:
        """Emit ``product`` now, and the drain of the step before; this step's ``drain`` comes with the next one."""
        product()
        self.settle()
        self._drains.append(drain)

    def settle(self) -> None:
        """Emit the drains that are still to come."""
        while self._drains:
            self._drains.popleft()()

    # --- Transfers ----------------------------------------------------------------------------------------------

    def load(self, memory: Memory, words: int, address: int, local: int, **fields: int) -> None:
        """One LOAD instruction."""
        self.builder.emit(LOAD, memory=memory, words=words, address=address, local=local, **fields)

    def stream(self, chunks: Iterable[Chunk]) -> None:
        """Chunks in the order of their products, behind those announced before."""
        self._waiting.extend(chunks)

    def _fetch_ahead(self, count: int) -> None:
        """Load until ``count`` chunks wait for their products."""
        while self._waiting and len(self._fetched) < count:
            chunk = self._waiting.popleft()
            weights = self._weight_ring.take(chunk.panels * chunk.depth)
            if len(chunk.pieces) == 1:
                self.load(Memory.WEIGHT, chunk.panels * chunk.depth, chunk.weights, weights)
            parameters = self._parameter_ring.take(chunk.parameter_words)
            if len(chunk.pieces) == 1:
                self.load(Memory.PARAMETER, chunk.parameter_words, chunk.parameters, parameters)
            self._fetched.append((chunk, weights, parameters))

    # --- Products -----------------------------------------------------------------------------------------------

    def matrix(self, **fields: int) -> None:
        """One MATRIX instruction."""
        self.builder.emit(MATRIX, **fields)

    def product(self, x: Operand, drain: Callable[[Chunk, int], None]) -> None:
        """The next announced chunk's product as a step; ``drain`` is given the chunk and its PARAMETER words."""
        # An earlier chunk's place in the ring is free once its product is through.
        ahead = 1 + max(0, min(CHUNKS_AHEAD, self._room() - 2))
        fetched: list[tuple[Chunk, int, int]] = []

        def emit() -> None:
            self._fetch_ahead(1)
            chunk, weights, parameters = self._fetched.popleft()
            fetched.append((chunk, weights, parameters))
            self._multiply(x, chunk, weights, 0, chunk.depth)

        self.step(emit, lambda: drain(fetched[0][0], fetched[0][2]))
        # Behind the drain: while LOAD's queue is full, nothing is dispatched.
        self._fetch_ahead(ahead)

    def _room(self) -> int:
        """Chunks like the next ones that the weight ring holds."""
        sizes = [c.panels * c.depth for c in (*(f[0] for f in self._fetched), *list(self._waiting)[:CHUNKS_AHEAD])]
        return self._weight_ring.size // max(sizes, default=1)

    def _multiply(self, x: Operand, chunk: Chunk, weights: int, first: int, depth: int) -> None:
        self.matrix(
            depth=depth,
            outer=self.tiles,
            inner=chunk.panels,
            a=x.start + first,
            a_outer=x.features,
            w=weights + first,
            w_inner=chunk.depth,
        )

    def first_product(
        self, x: Operand, behind: Callable[[], None], drain: Callable[[Chunk, int, int | None], None]
    ) -> None:
        """The first announced chunk's product, formed piece by piece as its weights arrive.

        behind : emitted when everything of this chunk has been asked for. drain : is given the chunk, its PARAMETER
        words, and the VECTOR words of the sum of all pieces but the last, float32[tiles][columns]; those are added to
        the last piece's tiles by the first adder. None: there is one piece.
        """
        self._fetch_ahead(1)
        chunk, weights, parameters = self._fetched.popleft()
        if len(chunk.pieces) == 1:
            behind()
            self.step(lambda: self._multiply(x, chunk, weights, 0, chunk.depth), lambda: drain(chunk, parameters, None))
            return
        row_bytes = chunk.depth * self.config.rows
        partial = self.vectors.take(self.tiles * chunk.columns)
        first = 0
        for n, depth in enumerate(chunk.pieces):
            self.load(
                Memory.WEIGHT,
                depth,
                chunk.weights + first * self.config.rows,
                weights + first,
                rows=chunk.panels,
                stride=row_bytes,
                local_stride=chunk.depth,
            )
            last = n == len(chunk.pieces) - 1
            if last:
                self.load(Memory.PARAMETER, chunk.parameter_words, chunk.parameters, parameters)

            def product(first: int = first, depth: int = depth) -> None:
                self._multiply(x, chunk, weights, first, depth)

            def add(n: int = n, last: bool = last) -> None:
                if last:
                    drain(chunk, parameters, partial)
                    return
                fields = {"add1": FirstAdd.Y, "y": partial, "y_stride": chunk.columns} if n else {}
                self.drain(chunk.columns, partial, chunk.columns, **fields)

            self.step(product, add)
            first += depth
        # The next chunk is wanted before the first drain that needs what is loaded behind it.
        self._fetch_ahead(1)
        behind()
        self._fetch_ahead(CHUNKS_AHEAD)

    # --- Passes -------------------------------------------------------------------------------------------------

    def vector(self, **fields: int) -> None:
        """One VECTOR instruction."""
        self.builder.emit(VECTOR, **fields)

    def drain(self, columns: int, to: int, to_stride: int, **fields: int) -> None:
        """Result tiles of ``columns`` columns to VECTOR."""
        where = {"destination": Destination.VECTOR, "tiles": self.tiles, "columns": columns}
        self.vector(source=Source.ACCUMULATOR, to=to, to_stride=to_stride, **where, **fields)

    def scaled(self, x: Operand, chunk: Chunk, parameters: int) -> dict[str, int]:
        """Fields that scale the result tiles of a chunk by row and column, and add its bias if it has one."""
        fields: dict[str, int] = {
            "mul1": FirstMultiply.LANE1,
            "lane1": x.scales,
            "mul2": SecondMultiply.COLUMN0,
            "column0": parameters,
        }
        if chunk.parameter_words > chunk.panels:
            fields |= {"add2": SecondAdd.COLUMN1, "column1": parameters + chunk.panels}
        return fields

    def scalars(self, x: int, to: int, columns: int, **fields: int) -> None:
        """PARAMETER words x .. x + columns become words to .. to + columns."""
        where = {"source": Source.PARAMETER, "destination": Destination.PARAMETER}
        self.vector(x=x, to=to, columns=columns, **where, **fields)

    @staticmethod
    def scale_of(share: int, to: int, continued: bool) -> dict[str, int]:
        """Fields that leave the scale of each row's quantisation in the words from ``to`` on.

        share : PARAMETER words full of 1 / steps. A scale is absmax(row) * (1 / steps); since rounding keeps order, it
        is the maximum of the products too.
        """
        return {
            "mul3": ThirdMultiply.COLUMN2,
            "column2": share,
            "maximum": Maximum.ABSOLUTE,
            "max_to": to,
            "max_continue": int(continued),
        }
