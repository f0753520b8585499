"""Chunks of zeros on whole cores: bits, counters and cycles, whoever wrote the zeros and whatever overwrote them."""

from __future__ import annotations

import numpy as np
import pytest
from cores import open_core
from lockstep_driver import Device
from lockstep_driver.builder import ProgramBuilder
from lockstep_driver.device import Counters
from lockstep_isa.instructions import LOAD, MATRIX, STORE, VECTOR, Destination, Function, Memory, Source
from numpy.typing import NDArray
from support import assert_same_bits

CORES = ["tiny", "wide", "laptop"]


class Product:
    """A program that multiplies A, int8[chunks R, R], which changes on the way, with one W; and what it must leave."""

    def __init__(self, device: Device, chunks: int) -> None:
        self.device, self.rows, self.depth = device, device.config.rows, chunks * device.config.rows
        self.builder = ProgramBuilder(device.config)
        self.random = np.random.default_rng(3)
        self.a = self.random.integers(1, 9, (self.depth, self.rows)).astype(np.int8)
        self.w = self.random.integers(-9, 9, (self.depth, self.rows)).astype(np.int8)
        self.expected: list[NDArray[np.float32]] = []
        self.skipped = 0
        self.emit_load(Memory.WEIGHT, 0, self.w)

    def place(self, array: NDArray[np.generic]) -> int:
        buffer = self.device.allocate(array.nbytes)
        buffer.write(array)
        return buffer.address

    def emit_load(self, memory: Memory, local: int, words: NDArray[np.generic]) -> None:
        self.builder.emit(LOAD, memory=memory, words=len(words), address=self.place(words), local=local)

    def load(self, local: int, words: NDArray[np.int8]) -> None:
        """Let LOAD write words of A."""
        self.emit_load(Memory.ACTIVATION, local, words)
        self.a[local : local + len(words)] = words

    def round(self, local: int, values: NDArray[np.float32]) -> None:
        """Let VECTOR write words of A: what is left of ``values``, float32[words, R], without the negative ones."""
        self.emit_load(Memory.VECTOR, 512, values)
        fields = {"source": Source.VECTOR, "x": 512, "destination": Destination.ACTIVATION, "to": local}
        self.builder.emit(VECTOR, columns=len(values), function=Function.RELU, **fields)
        self.a[local : local + len(values)] = np.maximum(values, 0)

    def multiply(self) -> None:
        """A tile of A as it is now."""
        to = len(self.expected) * self.rows
        self.builder.emit(MATRIX, depth=self.depth)
        taken = {"source": Source.ACCUMULATOR, "destination": Destination.VECTOR, "to": to}
        self.builder.emit(VECTOR, columns=self.rows, **taken)
        self.expected.append((self.w.T.astype(np.int64) @ self.a).astype(np.float32))
        zero = ~self.a.reshape(-1, self.rows, self.rows).any(axis=(1, 2))
        self.skipped += int(zero[1:].sum())

    def run(self) -> Counters:
        """Compare all tiles and the counter."""
        words = len(self.expected) * self.rows
        result = self.device.allocate(words * self.device.config.vector_word_bytes)
        self.builder.emit(STORE, memory=Memory.VECTOR, words=words, address=result.address)
        counters = self.device.run(self.builder.finish())
        assert_same_bits(result.data.view(np.float32).reshape(-1, self.rows), np.concatenate(self.expected))
        assert counters.skipped_chunks == self.skipped
        return counters


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("scheme", ["fast", "rtl"])
def test_what_is_passed_over_follows_every_write(scheme: str, core: str) -> None:
    with open_core(scheme, core) as device:
        case, r = Product(device, 5), device.config.rows
        zeros = np.zeros((r, r), np.int8)
        values = case.a.copy()
        case.load(0, values)
        case.load(r, zeros)
        case.load(3 * r, zeros)
        case.multiply()  # chunks 1 and 3
        case.round(r + 2, np.full((1, r), 5, np.float32))
        case.multiply()  # VECTOR wrote into chunk 1
        case.load(r + 2, zeros[:1])
        case.load(4 * r - 1, values[:1])
        case.multiply()  # LOAD mended that, and wrote the last word of chunk 3
        for word in reversed(range(2 * r, 3 * r)):
            case.load(word, zeros[:1])
        case.multiply()  # chunk 2, word by word from its end
        case.round(4 * r - 3, np.full((3 + r, r), -1, np.float32))
        case.multiply()  # chunks 3 and 4, all in one pass of VECTOR
        one_lane = np.zeros((2, r), np.float32)
        one_lane[1, r - 1] = 1
        case.round(2 * r - 1, one_lane)
        case.multiply()  # the last lane of the first word of chunk 2
        case.load(0, zeros)
        case.multiply()  # the first chunk is multiplied all the same
        assert case.skipped == 2 + 1 + 1 + 2 + 4 + 3 + 3
        case.run()


def triangle(device: Device, tiles: int, rest: int) -> Counters:
    """A product of probabilities of a causal attention: of row tile t all chunks behind number t are zero."""
    r = device.config.rows
    depth, stride = tiles * r + rest, (tiles + (rest > 0)) * r
    a = np.ones((tiles, stride, r), np.int8)
    for tile in range(tiles):
        a[tile, (tile + 1) * r : tiles * r] = 0
    buffer = device.allocate(a.nbytes)
    buffer.write(a)
    builder = ProgramBuilder(device.config)
    builder.emit(LOAD, memory=Memory.ACTIVATION, words=tiles * stride, address=buffer.address)
    builder.emit(MATRIX, depth=depth, outer=tiles, inner=2, a_outer=stride, w_inner=3)
    drain = {"source": Source.ACCUMULATOR, "destination": Destination.NONE, "tiles": tiles, "columns": 2 * r}
    builder.emit(VECTOR, **drain)
    return device.run(builder.finish())


@pytest.mark.parametrize("rest", [0, 1, 3])
@pytest.mark.parametrize("tiles", [2, 8, 13])
def test_causal_probabilities_take_the_cycles_of_their_chunks(tiles: int, rest: int) -> None:
    """On ``laptop`` as many chunks are looked at while one is multiplied as a tile has here."""
    counters = []
    for scheme in ("fast", "rtl"):
        with open_core(scheme, "laptop") as device:
            counters.append(triangle(device, tiles, rest))
    chunks = tiles * (tiles + 1)
    for counted in counters:
        assert counted.units["MATRIX"]["busy"] == counted.mac_cycles == 16 * chunks + 2 * tiles * rest
        assert counted.skipped_chunks == 2 * tiles**2 - chunks


@pytest.mark.parametrize("rest", [0, 2])
@pytest.mark.parametrize("tiles", [3, 17, 40])
def test_long_runs_of_zeros_take_the_predicted_cycles(tiles: int, rest: int) -> None:
    """On ``tiny`` most of a tile's chunks are looked at while nothing is multiplied; both count alike."""
    counted = []
    for scheme in ("fast", "rtl"):
        with open_core(scheme, "tiny") as device:
            counters = triangle(device, tiles, rest)
            counted.append((counters.units["MATRIX"]["busy"], counters.mac_cycles, counters.skipped_chunks))
    assert counted[0] == counted[1]
    assert counted[0][0] > counted[0][1]


def test_a_core_without_the_feature_multiplies_everything() -> None:
    with open_core("fast", "ulx3s") as device:
        counters = triangle(device, 8, 0)
    assert counters.skipped_chunks == 0
    assert counters.mac_cycles == 2 * 8 * 8 * device.config.rows
