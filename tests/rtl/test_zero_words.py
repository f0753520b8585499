"""The bits beside ACTIVATION: a chunk is zero if all of its words are, by whomever and in whatever parts they came."""

import random

import cocotb
import numpy as np
import pytest
from lockstep_rtl.generate import component_verilog
from lockstep_rtl.zero_words import ZeroWords
from rtl.axi_models import bench, shape, small, unlanes
from rtl.harness import parameters, run_cocotb

WORDS = 64
GIVEN = parameters()
CONFIG = small(activation_words=WORDS, zero_skipping=True, **GIVEN.get("shape", {}))
SIZE, MOST = CONFIG.rows, GIVEN.get("words", 1)


class Traffic:
    """Words of two writers, the one in parts, the other whole, and questions about what is not being written.

    The model keeps the words themselves. ``written`` lists the last cycle in which a chunk's word was.
    """

    def __init__(self, dut, seed):
        self.dut, self.random = dut, random.Random(seed)
        self.memory = np.ones((WORDS, SIZE), np.uint8)
        self.written, self.expected = np.full(WORDS // SIZE, -9), None
        self.part, self.answers = 0, {True: 0, False: 0}

    def word(self):
        values = (
            [0] * SIZE if self.random.random() < 0.85 else [self.random.choice((0, 0, 1, 128)) for _ in range(SIZE)]
        )
        return np.array(values, np.uint8)

    def drive(self):
        dut, cycle = self.dut, self.bench.cycle
        parts = CONFIG.subwords
        dut.write_enable.value = 0
        if self.random.random() < 0.7:
            whole = parts == 1 or self.random.random() < 0.3
            if not whole and self.part == 0:
                self.at, self.value = self.random.randrange(WORDS), self.word()
            if whole:
                count = self.random.randint(1, MOST)
                at, values = self.random.randrange(WORDS + 1 - count), [self.word() for _ in range(count)]
                if parts > 1 and self.part and at == self.at:
                    return self.ask(cycle)
                lanes = slice(0, SIZE)
            else:
                at, values, count = self.at, [self.value], 1
                lanes = slice(self.part * CONFIG.lanes, (self.part + 1) * CONFIG.lanes)
                # The lanes of a part come in all places, as VECTOR gives them.
                values = [np.tile(self.value[lanes], parts)]
                self.part = (self.part + 1) % parts
            dut.write_enable.value, dut.write_address.value = (1 << count) - 1, at
            filler = [np.full(SIZE, 7, np.uint8)] * (MOST - count)
            dut.write_data.value = unlanes(np.concatenate([*values, *filler]))
            dut.write_mask.value = sum(1 << r for r in range(SIZE)[lanes])
            for n, value in enumerate(values):
                self.memory[at + n, lanes] = value[lanes]
                self.written[(at + n) // SIZE] = cycle
        self.ask(cycle)

    def ask(self, cycle):
        """Of a chunk whose last word was written two cycles ago or earlier, and of which no word waits for its rest."""
        open_chunk = self.at // SIZE if self.part else -1
        settled = [c for c in range(WORDS // SIZE) if self.written[c] <= cycle - 2 and c != open_chunk]
        self.dut.read_enable.value = bool(settled)
        self.asked = self.random.choice(settled) if settled else None
        if settled:
            self.dut.read_chunk.value = self.asked

    def sample(self):
        if self.expected is not None:
            chunk, expected = self.expected
            assert int(self.dut.read_zero.value) == expected, f"cycle {self.bench.cycle}: chunk {chunk}"
            self.answers[expected] += 1
        self.expected = None
        if self.asked is not None:
            words = self.memory[self.asked * SIZE : (self.asked + 1) * SIZE]
            self.expected = self.asked, not words.any()


@cocotb.test()
async def a_chunk_is_zero_if_all_of_its_words_are(dut):
    world = await bench(dut)
    traffic = Traffic(dut, 1)
    # Every word once, so that its bit is defined.
    dut.write_mask.value, dut.write_enable.value, dut.write_data.value = (1 << SIZE) - 1, 1, 1
    for at in range(WORDS):
        dut.write_address.value = at
        await world.step()
    traffic.memory[:] = [1] + [0] * (SIZE - 1)
    dut.write_enable.value = 0
    await world.step(2)
    world.add(traffic)
    await world.step(6000)
    assert min(traffic.answers.values()) > 300, f"both answers: {traffic.answers}"


@cocotb.test()
async def no_chunk_beyond_the_end_is_zero(dut):
    world = await bench(dut)
    dut.write_mask.value, dut.write_enable.value = (1 << SIZE) - 1, 1
    for at in range(WORDS):
        dut.write_address.value = at
        await world.step()
    dut.write_enable.value, dut.read_enable.value = 0, 1
    await world.step(2)
    for chunk in (0, WORDS // SIZE - 1, WORDS // SIZE, 3 * WORDS // SIZE, (1 << len(dut.read_chunk)) - 1):
        dut.read_chunk.value = chunk
        await world.step()
        dut.read_enable.value = 0
        for _ in range(3):
            assert int(dut.read_zero.value) == (chunk < WORDS // SIZE), f"chunk {chunk}"
            await world.step()
        dut.read_enable.value = 1


@cocotb.test(skip=CONFIG.subwords == 1)
async def a_word_is_not_zero_before_all_of_its_parts_are(dut):
    """A reset may end a pass in the middle of a word, whose other lanes are old ones then."""
    world = await bench(dut)
    dut.write_mask.value, dut.write_enable.value = (1 << SIZE) - 1, 1
    for at in range(SIZE):
        dut.write_address.value, dut.write_data.value = at, 1 << 8 * SIZE - 1 if at == 1 else 0
        await world.step()
    dut.read_enable.value, dut.write_address.value, dut.write_data.value = 1, 1, 0
    for part in range(CONFIG.subwords):
        dut.write_mask.value = (1 << CONFIG.lanes) - 1 << part * CONFIG.lanes
        dut.write_enable.value = 1
        await world.step()
        dut.write_enable.value = 0
        await world.step(3)
        assert int(dut.read_zero.value) == (part == CONFIG.subwords - 1), f"after part {part}"


@cocotb.test()
async def a_reset_loses_no_write(dut):
    """A word that is written in the cycle of a reset is in the memory, so its bit must be too."""
    world = await bench(dut)
    dut.write_mask.value, dut.write_enable.value = (1 << SIZE) - 1, 1
    for at in range(SIZE):
        dut.write_address.value = at
        await world.step()
    dut.write_address.value, dut.write_data.value, dut.rst.value = 1, 1 << 5, 1
    await world.step()
    dut.write_enable.value, dut.rst.value = 0, 0
    await world.step()
    dut.read_enable.value = 1
    await world.step()
    assert not int(dut.read_zero.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [(shape(4, 4), 1), (shape(8, 8, 2), 1), (shape(4, 8, 8), 2), (shape(8, 16, 2), 2)],
    ids=["words", "parts", "pairs", "parts_and_pairs"],
)
def test_zero_words_follow_what_is_written(given, words):
    parameters = {"shape": given, "words": words}
    unit = ZeroWords(small(activation_words=WORDS, zero_skipping=True, **given), words)
    name = f"zero_words_{given['rows']}_{given['lanes']}_{words}"
    run_cocotb(component_verilog(unit, "top"), __name__, name, parameters)
