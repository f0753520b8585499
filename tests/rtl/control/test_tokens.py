"""Tokens: what is given can be taken once, from the next cycle on."""

import random

import cocotb
from lockstep_isa.instructions import Unit
from lockstep_rtl.control.tokens import COUNTER_BITS, Tokens
from lockstep_rtl.generate import component_verilog
from rtl.axi_models import bench
from rtl.harness import run_cocotb

NAMES = {u: u.name.lower() for u in Unit}
FULL = (1 << COUNTER_BITS) - 1


class Traffic:
    """Random giving and taking, with the counts beside it."""

    def __init__(self, dut, seed, generosity=0.3, greed=0.5):
        self.dut, self.random, self.generosity, self.greed = dut, random.Random(seed), generosity, greed
        self.count = {(a, b): 0 for a in Unit for b in Unit}
        self.taken, self.refused = 0, 0

    def port(self, name, unit):
        return getattr(self.dut, f"{name}_{NAMES[unit]}")

    def mask(self, probability):
        return sum(1 << u for u in Unit if self.random.random() < probability)

    def drive(self):
        self.give, self.want, self.take = {}, {}, {}
        for u in Unit:
            self.give[u], self.want[u] = self.mask(self.generosity), self.mask(0.4)
            granted = all(self.count[a, u] for a in Unit if self.want[u] >> a & 1)
            self.take[u] = granted and self.random.random() < self.greed
            self.port("give", u).value, self.port("want", u).value = self.give[u], self.want[u]
            self.port("take", u).value = self.take[u]

    def sample(self):
        for u in Unit:
            granted = all(self.count[a, u] for a in Unit if self.want[u] >> a & 1)
            assert int(self.port("granted", u).value) == granted, (
                f"cycle {self.bench.cycle}: {u.name} wants {self.want[u]:04b}"
            )
            self.taken += self.take[u]
            self.refused += not granted
        for (a, b), count in self.count.items():
            given, taken = self.give[a] >> b & 1, self.take[b] and self.want[b] >> a & 1
            self.count[a, b] = min(FULL, count + given - taken) if not (given and taken) else count


@cocotb.test()
async def random_traffic_agrees_with_counting(dut):
    world = await bench(dut)
    traffic = world.add(Traffic(dut, 1, generosity=0.15))
    await world.step(1200)
    assert traffic.taken > 300
    assert traffic.refused > 300


@cocotb.test()
async def a_full_counter_keeps_its_value(dut):
    world = await bench(dut)
    traffic = world.add(Traffic(dut, 2, generosity=0.9, greed=0))
    await world.step(320)
    assert set(traffic.count.values()) == {FULL}
    traffic.generosity, traffic.greed = 0.05, 1
    await world.step(700)
    assert min(traffic.count.values()) < FULL // 2


def test_tokens_count():
    run_cocotb(component_verilog(Tokens(), "top"), __name__, "tokens")
