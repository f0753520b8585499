"""The decoder of packed weights against what their format says: every format, tile behind tile, one step a cycle."""

import random

import cocotb
import numpy as np
from lockstep_isa.instructions import PATTERNS, WEIGHT_GROUPS, Sparsity, Weights
from lockstep_isa.weights import expand, pack, stream, words_per_tile
from lockstep_rtl.generate import component_verilog
from lockstep_rtl.matrix.array import PACKED_TOP
from lockstep_rtl.matrix.weight_decoder import PACKED_START, RING_WORDS, WeightDecoder
from rtl.axi_models import bench, lanes, never, small, unlanes
from rtl.harness import assert_equal, run_cocotb, stalls

CONFIG = small(packed=True)
SIZE = CONFIG.columns
FORMATS = [(w, s) for w in Weights for s in Sparsity if (w, s) != (Weights.INT8, Sparsity.DENSE)]


class Tiles:
    """The tiles of an instruction: uint8[tiles, words, C], what they stand for: int[tiles, K, C], steps and their k."""

    def __init__(self, weights, sparsity, length, words, expected, upper=0):
        self.weights, self.sparsity, self.length, self.words, self.expected = weights, sparsity, length, words, expected
        self.rate = {(False, 2): 2, (False, 1): 4, (True, 4): 2, (True, 2): 4, (True, 1): 4}[
            weights != Weights.INT8, PATTERNS[sparsity][0] if PATTERNS[sparsity] else 4
        ]
        # The first activation of a tile, a multiple of 4, or of 2 where values have no positions.
        self.first = 2 * upper if sparsity == Sparsity.DENSE else 0
        self.steps = length // self.rate * len(words)


def multiples(weights, sparsity):
    """What the length of a tile is a multiple of."""
    return WEIGHT_GROUPS[weights] or {Sparsity.TWO_OF_FOUR: 8, Sparsity.ONE_OF_FOUR: 16}[sparsity]


def any_bits(rng, weights, sparsity, groups, tiles):
    """Tiles of words with bits at random."""
    length, group, pattern = groups * multiples(weights, sparsity), WEIGHT_GROUPS[weights], PATTERNS[sparsity]
    words = rng.integers(0, 256, (tiles, words_per_tile(length, group, pattern), SIZE)).astype(np.uint8)
    expected = np.array([stream(tile, length, group, pattern) for tile in words])
    return Tiles(weights, sparsity, length, words, expected, int(rng.integers(2)))


def packed_weights(rng, weights, sparsity, groups, tiles):
    """Tiles of weights that the format holds, as its packer packs them; what they stand for are the weights."""
    length, group, pattern = groups * multiples(weights, sparsity), WEIGHT_GROUPS[weights], PATTERNS[sparsity]
    shape = (tiles * SIZE, length)
    w = rng.integers(-7, 8, shape) if group else rng.integers(-127, 128, shape)
    if pattern:
        order = rng.permuted(np.tile(np.arange(4), (tiles * SIZE, length // 4, 1)), axis=2)
        w[order.reshape(shape) >= pattern[0]] = 0
    w = w.astype(np.int8)
    k = rng.integers(1, 19, (tiles * SIZE, length // group)).astype(np.uint8) if group else None
    meant = w if k is None else expand(w, k)
    expected = meant.reshape(tiles, SIZE, length).transpose(0, 2, 1)
    return Tiles(weights, sparsity, length, pack(w, SIZE, k, pattern), expected)


class Decoding:
    """Runs instructions back to back: asks while there is room, takes steps from the earliest cycle on."""

    def __init__(self, dut, instructions, gap=never):
        self.dut, self.gap, self.random = dut, gap, random.Random(7)
        self.waiting = list(instructions)
        self.running, self.asks, self.answer, self.taken = None, [], None, None
        self.tops, self.starts, self.ends, self.asked = [], [], [], 0

    def drive(self):
        dut = self.dut
        dut.start.value = 0
        dut.words.value = self.answer if self.answer is not None else self.random.getrandbits(2 * 8 * SIZE)
        self.ask_next()
        self.step_next()
        if self.waiting and (self.running is None or self.done):
            dut.start.value = 1
            self.starts.append(self.bench.cycle)

    def ask_next(self):
        dut = self.dut
        dut.ask.value, self.answer = 0, None
        if self.asks and int(dut.room.value):
            words = self.asks.pop(0)
            dut.ask.value = (1 << len(words)) - 1
            self.answer = unlanes(words)
            if len(words) == 1:
                self.answer |= self.random.getrandbits(8 * SIZE) << 8 * SIZE

    def step_next(self):
        dut = self.dut
        dut.step.value, self.next, self.done = 0, None, False
        if self.running is None:
            return
        i = self.running
        dut.weights.value, dut.sparsity.value = i.weights, i.sparsity
        ready = self.bench.cycle > self.starts[-1] + PACKED_START
        if ready and self.left and not self.gap():
            step = i.steps - self.left
            tile, step = divmod(step, i.length // i.rate)
            a = i.first + step * i.rate
            dut.step.value = 1
            dut.upper.value = a >> 1 & 1 if i.sparsity == Sparsity.DENSE else self.random.getrandbits(1)
            self.next = len(self.tops) - len(i.words) + tile, a // 4 * 4 - i.first
            self.left -= 1
            if not self.left:
                self.done = True
                self.ends.append(self.bench.cycle)

    def sample(self):
        if self.taken is not None:
            tile, first = self.taken
            w = lanes(int(self.dut.w.value), PACKED_TOP * SIZE, np.int8).reshape(PACKED_TOP, SIZE)
            picks = int(self.dut.picks.value)
            for n, c in np.ndindex(PACKED_TOP, SIZE):
                k = first + (picks >> 2 * (n * SIZE + c) & 3)
                if w[n, c]:
                    self.tops[tile][k, c] += w[n, c]
        self.taken = self.next
        if self.starts and self.starts[-1] == self.bench.cycle:
            self.running = i = self.waiting.pop(0)
            self.asks = [tile[n : n + 2] for tile in i.words for n in range(0, len(tile), 2)]
            self.left = i.steps
            self.tops += [np.zeros((i.length, SIZE), int) for _ in i.words]


async def decode(dut, instructions, gap=never):
    world = await bench(dut)
    agent = world.add(Decoding(dut, instructions, gap))
    await world.until(lambda: len(agent.ends) == len(instructions), 200000)
    await world.step(3)
    tops = iter(agent.tops)
    for n, i in enumerate(instructions):
        for tile, expected in enumerate(i.expected):
            assert_equal(next(tops), expected, f"{n}: {i.weights.name} {i.sparsity.name}, tile {tile}: k, column ")
    return agent


def instructions(seed, make):
    """All formats twice, in any order, with some tiles each."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(FORMATS) * 2) % len(FORMATS)
    return [make(rng, *FORMATS[n], int(rng.integers(1, 5)), int(rng.integers(1, 5))) for n in order]


@cocotb.test()
async def one_step_a_cycle_whatever_the_bits(dut):
    program = instructions(1, any_bits)
    agent = await decode(dut, program)
    # Nothing stands between the steps of an instruction, nor between its last one and the next start.
    expected = np.cumsum([PACKED_START + i.steps for i in program]) + agent.starts[0]
    assert_equal(agent.ends, expected, "cycle of the last step of instruction ")
    assert_equal(agent.starts[1:], expected[:-1], "cycle of the start behind instruction ")


@cocotb.test()
async def steps_that_wait_change_nothing(dut):
    await decode(dut, instructions(2, any_bits), stalls(0.4, 2))
    await decode(dut, instructions(3, any_bits), stalls(0.9, 3))


@cocotb.test()
async def packed_weights_mean_what_was_packed(dut):
    await decode(dut, instructions(4, packed_weights))


@cocotb.test()
async def nothing_is_asked_for_that_has_no_room(dut):
    for weights in (Weights.INT8, Weights.INT4_32):
        world = await bench(dut)
        instruction = any_bits(np.random.default_rng(5), weights, Sparsity.TWO_OF_FOUR, 4, 4)
        agent = world.add(Decoding(dut, [instruction], lambda: True))
        await world.step(PACKED_START + RING_WORDS)
        # Without steps only the first multipliers leave the ring, and that is no room for two.
        left = sum(map(len, agent.asks))
        assert instruction.words.shape[0] * instruction.words.shape[1] - left == RING_WORDS
        assert not int(dut.room.value)


def test_decoder_gives_the_operands_of_one_step_a_cycle():
    run_cocotb(component_verilog(WeightDecoder(CONFIG), "top"), __name__, "weight_decoder")
