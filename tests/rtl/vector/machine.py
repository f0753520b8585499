"""The surroundings of a VectorUnit: memories, the accumulator queue, the instruction port, all checked by golden."""

from collections import deque

import numpy as np
from cocotb.triggers import FallingEdge, RisingEdge
from lockstep_isa import numerics
from lockstep_isa.config import CoreConfig
from lockstep_isa.executor import GoldenCore
from lockstep_isa.instructions import TABLE_ENTRIES
from lockstep_isa.tables import FUNCTIONS
from rtl.axi_models import word_of
from rtl.harness import assert_equal
from rtl.vector.floats import nasty_words


def config_of(rows, lanes, selection=False):
    return CoreConfig("test", rows, rows, lanes, 4, 256, 256, 1024, 512, selection=selection)


class Machine:
    """Drives one VectorUnit cycle by cycle and keeps its memories; ``golden`` is what they ought to be."""

    def __init__(self, dut, config, seed, stall=lambda: False):
        self.dut, self.config, self.stall = dut, config, stall
        self.random, self.noise = np.random.default_rng(seed), np.random.default_rng(~seed & 0xFFFF)
        self.golden = GoldenCore(config, np.zeros(16, np.uint8))
        for name in ("vector", "parameter"):
            memory = getattr(self.golden, name)
            words = nasty_words(self.random, memory.size).view(np.float32)
            memory[:] = numerics.flush(words).reshape(memory.shape)
        for name in ("activation", "weight"):
            memory = getattr(self.golden, name)
            memory[:] = self.random.integers(-128, 128, memory.shape, np.int8)
        self.memories = {
            "vector": self.golden.vector.view(np.uint32).copy(),
            "parameter": self.golden.parameter.view(np.uint32).copy(),
            "activation": self.golden.activation.view(np.uint8).copy(),
            "weight": self.golden.weight.view(np.uint8).copy(),
        }
        if config.selection:
            self.memories["index"] = self.golden.index.copy()
        self.tiles = deque()
        self.cycle = 0
        self.flags = 0
        self.stalled = 0
        self.done_at = None
        self.accepted_at = None
        self.available = False

    async def step(self):
        """One cycle: look at the settled outputs, apply them behind the edge."""
        dut = self.dut
        await FallingEdge(dut.clk)
        answers = []
        side = self.config.columns_per_beat
        for name in ("vector", "parameter"):
            if enable := int(getattr(dut, f"{name}_read__enable").value):
                address = int(getattr(dut, f"{name}_read__address").value)
                # A word that is not asked for is anything.
                words = self.noise.integers(0, 1 << 32, (side, self.config.rows), np.uint32)
                for n in range(enable.bit_length()):
                    words[n] = self.memories[name][address + n]
                answers.append((getattr(dut, f"{name}_read__data"), words))
        if int(dut.accumulator__enable.value):
            assert self.available, f"cycle {self.cycle}: a tile is read that is not there"
            column = int(dut.accumulator__column.value)
            answers.append((dut.accumulator__data, self.tiles[0][:, column : column + side].T.astype("<u4")))
        pop = int(dut.accumulator__pop.value)
        for name, size in (("vector", 4), ("parameter", 4), ("activation", 1), ("weight", 1)):
            enable = int(getattr(dut, f"{name}_write__enable").value)
            assert int(getattr(dut, f"{name}_write_idle").value) == (enable == 0), f"cycle {self.cycle}: {name}"
            if enable:
                address = int(getattr(dut, f"{name}_write__address").value)
                mask = int(getattr(dut, f"{name}_write__mask").value)
                data = int(getattr(dut, f"{name}_write__data").value)
                raw = np.frombuffer(data.to_bytes(size * self.config.rows * side, "little"), f"<u{size}")
                lanes = [lane for lane in range(self.config.rows) if mask >> lane & 1]
                for n, word in enumerate(raw.reshape(side, -1)[: enable.bit_length()]):
                    self.memories[name][address + n, lanes] = word[lanes]
        if self.config.selection and int(dut.index_write__enable.value):
            self.memories["index"][int(dut.index_write__address.value)] = int(dut.index_write__data.value)
        self.flags |= int(dut.flags.value)
        self.stalled += int(dut.stalled.value)
        if int(dut.done.value):
            self.done_at = self.cycle
        accepted = int(dut.instruction__valid.value) and int(dut.instruction__ready.value)
        if accepted:
            self.accepted_at = self.cycle
        self.cycle += 1
        await RisingEdge(dut.clk)
        for port, word in answers:
            port.value = int.from_bytes(word.tobytes(), "little")
        if pop:
            self.tiles.popleft()
        if pop or not self.available:
            self.available = bool(self.tiles) and not self.stall()
            dut.accumulator__available.value = int(self.available)
        if accepted:
            dut.instruction__valid.value = 0

    async def load_table(self, slot, name):
        """Fill a table slot with a committed function."""
        table, dut = FUNCTIONS[name], self.dut
        coefficients = np.stack([table.c0, table.c1, table.c2], axis=1)
        self.golden.table[slot * TABLE_ENTRIES : slot * TABLE_ENTRIES + table.entries] = coefficients
        for entry, (c0, c1, c2) in enumerate(coefficients.view(np.uint32).tolist()):
            dut.table_write__enable.value = 1
            dut.table_write__address.value = slot * TABLE_ENTRIES + entry
            dut.table_write__data.value = c0 | c1 >> 8 << 32 | c2 >> 16 << 56
            await self.step()
        dut.table_write__enable.value = 0

    def push_tiles(self, count, largest=2**31):
        """Result tiles of random accumulators, for golden and for the unit."""
        for _ in range(count):
            tile = self.random.integers(-largest, largest, (self.config.rows, self.config.columns), np.int64)
            tile = (tile >> self.random.integers(0, 28)).astype(np.int32)
            self.golden.accumulators.append(tile)
            self.tiles.append(tile)

    async def execute(self, instruction, limit=20000):
        """Run one instruction on both sides, compare all memories, return the cycles from acceptance to done."""
        dut = self.dut
        dut.instruction__payload.value = word_of(instruction)
        dut.instruction__valid.value = 1
        self.done_at, self.flags, self.stalled = None, 0, 0
        start = self.cycle
        while self.done_at is None:
            await self.step()
            assert self.cycle - start < limit, f"{instruction!r} is not done after {limit} cycles"
        cycles = self.done_at - self.accepted_at
        self.golden.execute(instruction)
        self.compare(instruction)
        return cycles

    def compare(self, what):
        for name, memory in self.memories.items():
            expected = getattr(self.golden, name).view(memory.dtype)
            assert_equal(memory, expected, f"{what!r}: {name}")
        assert len(self.tiles) == len(self.golden.accumulators), f"{what!r}: tiles left"
