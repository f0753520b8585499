"""The systolic array against exact sums: tiles follow each other every max(K, C) cycles, whatever stands between."""

import cocotb
import numpy as np
from lockstep_rtl.generate import component_verilog
from lockstep_rtl.matrix.array import ARRAY_LATENCY, SystolicArray
from rtl.axi_models import bench, lanes, never, small, unlanes
from rtl.harness import assert_equal, built_verilog, run_cocotb, stalls

CONFIG = small()
SIZE = CONFIG.rows


class ArrayAgent:
    """Feeds tiles of (a: int8[K, R], w: int8[K, C], unsigned); collects ``result`` and the cycles of ``strobe``."""

    def __init__(self, dut, tiles, gap=never):
        self.dut, self.gap = dut, gap
        self.words = []
        for a, w, unsigned in tiles:
            depth = len(a)
            # Where K < C, whoever feeds the array leaves the period empty before the words.
            self.words += [None] * (SIZE - depth)
            for k in range(depth):
                self.words.append((unlanes(a[k]), unlanes(w[k]), k == 0, k == depth - 1, unsigned))
        self.words.reverse()
        self.lasts, self.strobes, self.results = [], [], []

    def drive(self):
        # Between words, the operands are whatever the scratchpad last showed: they must not count.
        word = None if not self.words or (self.words[-1] and self.gap()) else self.words.pop()
        self.dut.valid.value = word is not None
        if word is not None:
            a, w, first, last, unsigned = word
            self.dut.a.value, self.dut.w.value = a, w
            self.dut.first.value, self.dut.last.value = first, last
            self.dut.unsigned.value = unsigned
            if last:
                self.lasts.append(self.bench.cycle)

    def sample(self):
        if int(self.dut.strobe.value):
            self.strobes.append(self.bench.cycle)
        self.results.append(int(self.dut.result.value))


def random_tiles(seed, depths):
    random = np.random.default_rng(seed)
    tiles = []
    for n, depth in enumerate(depths):
        a, w = (random.integers(-128, 128, (depth, SIZE)).astype(np.int8) for _ in range(2))
        if n % 3 == 0:
            a[:, 0], w[:, 0] = -128, -128
            a[:, 1], w[:, 1] = -1, 127
        tiles.append((a, w, n % 2))
    return tiles


def golden(a, w, unsigned):
    a = a.view(np.uint8) if unsigned else a
    return a.astype(np.int64).T @ w.astype(np.int64)


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
        assert_equal(sums, golden(*tile).astype(np.int32), f"tile {n}, K = {len(tile[0])}, element ")
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
    depth = 300
    lowest = np.full((depth, SIZE), -128, np.int8)
    highest = np.full((depth, SIZE), 127, np.int8)
    ones = np.full((depth, SIZE), -1, np.int8)
    await stream(
        dut, [(lowest, lowest, 0), (lowest, highest, 0), (ones, lowest, 1), (lowest, lowest, 1), (ones, ones, 1)]
    )


def test_array_streams_tiles_without_bubbles_and_sums_exactly():
    run_cocotb(component_verilog(SystolicArray(CONFIG), "top"), __name__, "array")


def test_the_array_that_is_built_does_the_same_with_operands_of_9_and_8_bits():
    """Verilator is given whole words, synthesis is not; here it gets what Yosys makes of the same text."""
    run_cocotb(built_verilog(component_verilog(SystolicArray(CONFIG), "top")), __name__, "array_built")
