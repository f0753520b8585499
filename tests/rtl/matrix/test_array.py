"""The systolic array against exact sums: tiles follow each other every max(K, C) cycles, whatever stands between."""

from typing import NamedTuple

import cocotb
import numpy as np
import pytest
from lockstep_rtl.generate import component_verilog
from lockstep_rtl.matrix.array import ARRAY_LATENCY, PACKED_LEFT, PACKED_TOP, SystolicArray
from rtl.axi_models import bench, lanes, never, small, unlanes
from rtl.harness import assert_equal, built_verilog, parameters, run_cocotb, stalls

CONFIG = small(packed=parameters().get("packed", False))
SIZE = CONFIG.rows
LEFT, TOP = (PACKED_LEFT, PACKED_TOP) if CONFIG.packed else (1, 1)


class Tile(NamedTuple):
    """a: int8[K, LEFT, R], w: int8[K, TOP, C], picks: int[K, TOP, C]; not packed, the first a and w count."""

    a: np.ndarray
    w: np.ndarray
    unsigned: int
    packed: int
    picks: np.ndarray


class ArrayAgent:
    """Feeds tiles; collects ``result`` and the cycles of ``strobe``."""

    def __init__(self, dut, tiles, gap=never):
        self.dut, self.gap = dut, gap
        self.words = []
        for tile in tiles:
            depth = len(tile.a)
            # Where K < C, whoever feeds the array leaves the period empty before the words.
            self.words += [None] * (SIZE - depth)
            for k in range(depth):
                picks = sum(int(pick) << 2 * n for n, pick in enumerate(tile.picks[k].flat))
                word = {"a": unlanes(tile.a[k]), "w": unlanes(tile.w[k]), "first": k == 0, "last": k == depth - 1}
                word |= {"more": tile.packed, "picks": picks} if CONFIG.packed else {}
                self.words.append(word | {"unsigned": tile.unsigned})
        self.words.reverse()
        self.lasts, self.strobes, self.results = [], [], []

    def drive(self):
        # Between words, the operands are whatever the scratchpad last showed: they must not count.
        word = None if not self.words or (self.words[-1] and self.gap()) else self.words.pop()
        self.dut.valid.value = word is not None
        if word is not None:
            for name, value in word.items():
                getattr(self.dut, name).value = value
            if word["last"]:
                self.lasts.append(self.bench.cycle)

    def sample(self):
        if int(self.dut.strobe.value):
            self.strobes.append(self.bench.cycle)
        self.results.append(int(self.dut.result.value))


def random_tiles(seed, depths):
    """Tiles at random; where the core takes packed steps, some of each kind."""
    random = np.random.default_rng(seed)
    tiles = []
    packed = random.integers(0, 2, len(depths)) if CONFIG.packed else np.zeros(len(depths), int)
    for n, depth in enumerate(depths):
        a, w = (random.integers(-128, 128, (depth, words, SIZE)).astype(np.int8) for words in (LEFT, TOP))
        if n % 3 == 0:
            a[..., 0], w[..., 0] = -128, -128
            a[..., 1], w[..., 1] = -1, 127
        tiles.append(Tile(a, w, n % 2, int(packed[n]), random.integers(0, 4, (depth, TOP, SIZE))))
    return tiles


def golden(tile):
    a = tile.a.view(np.uint8) if tile.unsigned else tile.a
    a, w = a.astype(np.int64), tile.w.astype(np.int64)
    if not tile.packed:
        return a[:, 0].T @ w[:, 0]
    sums = np.zeros((SIZE, SIZE), np.int64)
    for k, c, n in np.ndindex(len(a), SIZE, TOP):
        sums[:, c] += a[k, tile.picks[k, n, c]] * w[k, n, c]
    return sums


async def stream(dut, tiles, gap=never):
    """Run tiles through the array and compare; the agent with its cycles."""
    world = await bench(dut)
    agent = world.add(ArrayAgent(dut, tiles, gap))
    await world.until(lambda: not agent.words)
    await world.step(3 * SIZE + ARRAY_LATENCY)
    assert len(agent.strobes) == SIZE * len(tiles), f"{len(agent.strobes)} columns of {len(tiles)} tiles"
    for n, tile in enumerate(tiles):
        sums = np.zeros((SIZE, SIZE), np.int32)
        for c in range(SIZE):
            for r in range(SIZE):
                sums[r, c] = lanes(agent.results[agent.strobes[n * SIZE + c] + r], SIZE, np.int32)[r]
        assert_equal(sums, golden(tile).astype(np.int32), f"tile {n}, K = {len(tile.a)}, element ")
    return agent


@cocotb.test()
async def tiles_follow_without_a_bubble(dut):
    depths = [9, SIZE, 5, SIZE, SIZE, 1, 2, 3, 1, 1, 17, SIZE, 1, 8]
    agent = await stream(dut, random_tiles(1, depths))
    # The n-th tile's last word arrives at the end of its period, and nothing stands between the periods.
    assert_equal(agent.lasts, np.cumsum([max(d, SIZE) for d in depths]) - 1, "cycle of the last word of tile ")


@cocotb.test()
async def latency_is_as_documented(dut):
    agent = await stream(dut, random_tiles(2, [6, 4, 7]))
    expected = [last + ARRAY_LATENCY + c for last in agent.lasts for c in range(SIZE)]
    assert_equal(agent.strobes, expected, "cycle of column ")


@cocotb.test()
async def bubbles_between_words_change_nothing(dut):
    await stream(dut, random_tiles(3, [6, 4, 1, 2, 12, 4, 4, 3, 9]), stalls(0.4, 3))


@cocotb.test()
async def sparse_words_change_nothing(dut):
    await stream(dut, random_tiles(4, [4, 4, 1, 5]), stalls(0.85, 4))


@cocotb.test()
async def extremes_are_exact(dut):
    lowest, highest, ones = -128, 127, -1
    shape = (300, LEFT, SIZE), (300, TOP, SIZE)
    values = [(lowest, lowest, 0), (lowest, highest, 0), (ones, lowest, 1), (lowest, lowest, 1), (ones, ones, 1)]
    await stream(
        dut,
        [
            Tile(*(np.full(s, v, np.int8) for s, v in zip(shape, (a, w), strict=True)), unsigned, n % TOP, picks)
            for a, w, unsigned in values
            for n, picks in enumerate(np.full((TOP, *shape[1]), 3))
        ],
    )


@pytest.mark.parametrize("packed", [False, True], ids=["int8", "packed"])
def test_array_streams_tiles_without_bubbles_and_sums_exactly(packed):
    array = SystolicArray(small(packed=packed))
    run_cocotb(component_verilog(array, "top"), __name__, f"array_{packed:d}", {"packed": packed})


@pytest.mark.parametrize("packed", [False, True], ids=["int8", "packed"])
def test_the_array_that_is_built_does_the_same_with_operands_of_9_and_8_bits(packed):
    """Verilator is given whole words, synthesis is not; here it gets what Yosys makes of the same text."""
    array = built_verilog(component_verilog(SystolicArray(small(packed=packed)), "top"))
    run_cocotb(array, __name__, f"array_built_{packed:d}", {"packed": packed})
