"""The read arbiter: everyone gets his own data, fetches go first, an address once shown stays."""

import random

import cocotb
import numpy as np
from lockstep_rtl.axi import ReadArbiter
from lockstep_rtl.generate import component_verilog
from rtl.axi_models import ReadMemory, bench, never, random_stalls, small
from rtl.harness import assert_equal, run_cocotb, stalls

CONFIG = small()
BUS = CONFIG.bus_bytes


class Master:
    """Asks for bursts of (address, beats) and collects words."""

    def __init__(self, dut, name, bursts, gap=never, gap_r=never):
        self.port = {
            p: getattr(dut, f"{name}_{p}")
            for p in ("ar_valid", "ar_ready", "ar_addr", "ar_len", "r_valid", "r_ready", "r_data", "r_last")
        }
        self.bursts, self.gap, self.gap_r = list(bursts), gap, gap_r
        self.shown, self.words, self.lasts, self.taken = False, [], [], []

    def drive(self):
        if not self.shown and self.bursts and not self.gap():
            self.shown = True
            self.port["ar_addr"].value, self.port["ar_len"].value = self.bursts[0][0], self.bursts[0][1] - 1
        self.port["ar_valid"].value = self.shown
        self.open = not self.gap_r()
        self.port["r_ready"].value = self.open

    def sample(self):
        if self.shown and int(self.port["ar_ready"].value):
            self.bursts.pop(0)
            self.shown = False
            self.taken.append(self.bench.cycle)
        if self.open and int(self.port["r_valid"].value):
            self.words.append(int(self.port["r_data"].value))
            self.lasts.append(int(self.port["r_last"].value))


class Interleaving(ReadMemory):
    """Answers in any order between IDs, as AXI allows, and in order within each."""

    def drive(self):
        if not self.shown and len(self.pending) > 1 and self.bench.cycle % 3 == 0:
            first = self.pending[0][3]
            other = next((n for n, p in enumerate(self.pending) if p[3] != first), None)
            if other is not None:
                item = self.pending[other]
                del self.pending[other]
                self.pending.appendleft(item)
        super().drive()


def random_bursts(seed, count):
    rand = random.Random(seed)
    return [(64 * rand.randrange(1 << 9), rand.randrange(1, 17)) for _ in range(count)]


async def shared(dut, gaps=(never, never), gap_r=never, **knobs):
    """Both masters read everything they asked for; the world's parts for more questions."""
    memory = np.random.default_rng(1).integers(0, 256, 1 << 16).astype(np.uint8)
    world = await bench(dut)
    asked = {"load": random_bursts(1, 40), "fetch": random_bursts(2, 30)}
    masters = {n: world.add(Master(dut, n, b, gap, gap_r)) for (n, b), gap in zip(asked.items(), gaps, strict=True)}
    bus = world.add(Interleaving(dut, "bus", memory, BUS, **knobs))
    beats = {n: sum(b for _, b in asked[n]) for n in asked}
    await world.until(lambda: all(len(masters[n].words) == beats[n] for n in asked), 20000)
    await world.step(20)
    words = memory.view("<u4")
    for name, master in masters.items():
        expected = np.concatenate([words[a // 4 : a // 4 + n] for a, n in asked[name]])
        assert_equal(np.array(master.words, np.uint32), expected, f"{name} word ")
        assert sum(master.lasts) == len(asked[name])
    return masters, bus


@cocotb.test()
async def both_read_at_full_rate(dut):
    masters, bus = await shared(dut)
    assert max(masters["fetch"].taken) < min(masters["load"].taken), "fetches go first"
    assert_equal(np.diff([c for c, _, _ in bus.bursts]), np.ones(69, int), "cycles between addresses ")


@cocotb.test()
async def both_read_with_stalls_everywhere(dut):
    for seed in range(4):
        knobs = random_stalls(seed)
        knobs = {n: knobs[n] for n in ("stall_ar", "stall_r")}
        gaps = stalls(0.6, seed), stalls(0.9, seed + 1)
        await shared(dut, gaps, stalls(0.4, seed + 2), latency=1 + 3 * seed, **knobs)


def test_arbiter_gives_everyone_his_own_data():
    run_cocotb(component_verilog(ReadArbiter(CONFIG), "top"), __name__, "read_arbiter")
