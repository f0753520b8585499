"""The queue in front of a unit: order, tokens before the start, tokens at the end, what is running and waiting."""

import random

import cocotb
from lockstep_isa.instructions import LOAD, Instruction, Memory
from lockstep_rtl.control.queue import INDEX_BITS, UnitQueue
from lockstep_rtl.generate import component_verilog
from rtl.axi_models import Sink, Source, bench, never, small, word_of
from rtl.harness import run_cocotb, stalls

CONFIG = small()
IN_FLIGHT = 5


def instruction(n, rand):
    return Instruction(LOAD, memory=Memory.WEIGHT, wait=rand.randrange(16), signal=rand.randrange(16), address=64 * n)


class Unit(Sink):
    """Accepts a few instructions and completes each some cycles later, in order; checks tokens on the way."""

    def __init__(self, dut, instructions, gap, granted, seed):
        super().__init__(dut, "instruction", gap)
        self.dut, self.instructions, self.granted, self.random = dut, instructions, granted, random.Random(seed)
        self.done, self.due, self.takes, self.gives = 0, None, 0, []

    def drive(self):
        super().drive()
        if len(self.items) - self.done >= IN_FLIGHT:
            self.open = False
            self.ready.value = 0
        self.grant = not self.granted()
        self.dut.granted.value = self.grant
        self.completes = self.due is not None and self.bench.cycle >= self.due
        self.dut.done.value = self.completes

    def sample(self):
        dut, before = self.dut, len(self.items)
        valid = int(self.valid.value)
        assert not valid or self.grant, "offered without its tokens"
        # Offered only while the tokens are there: they never go away in a real core, in this test they do.
        self.waiting = None
        super().sample()
        accepted = len(self.items) > before
        assert int(dut.take.value) == accepted
        assert int(dut.running.value) == (before > self.done)
        if accepted:
            assert int(dut.want.value) == self.instructions[before].wait
        if self.completes:
            assert int(dut.oldest.value) == self.done
            assert int(dut.give.value) == self.instructions[self.done].signal, f"tokens of instruction {self.done}"
            self.done += 1
            self.due = None
        else:
            assert int(dut.give.value) == 0
        if self.done < len(self.items) and self.due is None:
            # An instruction takes at least four cycles: the array's shortest tile.
            self.due = self.bench.cycle + self.random.randrange(4, 12)


async def flow(dut, gap=never, granted=never, source_gap=never, count=60):
    rand = random.Random(7)
    instructions = [instruction(n, rand) for n in range(count)]
    world = await bench(dut)
    pushes = [n | word_of(i) << INDEX_BITS for n, i in enumerate(instructions)]
    source = world.add(Source(dut, "push", pushes, source_gap))
    unit = world.add(Unit(dut, instructions, gap, granted, 1))
    await world.until(lambda: unit.done == count, 5000, "completion")
    assert unit.items == [word_of(i) for i in instructions]
    await world.step(2)
    assert int(dut.empty.value)
    assert not int(dut.running.value)
    return world, source, unit


@cocotb.test()
async def in_order_without_stalls(dut):
    await flow(dut)


@cocotb.test()
async def in_order_with_stalls_everywhere(dut):
    for seed in range(3):
        await flow(dut, stalls(0.4, seed), stalls(0.5, seed + 1), stalls(0.3, seed + 2))


@cocotb.test()
async def waits_for_tokens_and_says_so(dut):
    closed = True
    world = await bench(dut)
    load = Instruction(LOAD, memory=Memory.WEIGHT, wait=0b0110)
    source = world.add(Source(dut, "push", [n | word_of(load) << INDEX_BITS for n in range(CONFIG.queue_depth + 3)]))
    unit = world.add(Unit(dut, [load] * 20, never, lambda: closed, 1))
    await world.step(40)
    assert len(source.taken) == CONFIG.queue_depth, "the queue holds queue_depth instructions"
    assert int(dut.waiting.value)
    assert not int(dut.running.value)
    assert not unit.items
    assert int(dut.want.value) == 0b0110
    assert not int(dut.empty.value)
    closed = False
    await world.step(3)
    assert unit.items


@cocotb.test()
async def halt_offers_nothing(dut):
    world = await bench(dut)
    load = Instruction(LOAD, memory=Memory.WEIGHT)
    world.add(Source(dut, "push", [n | word_of(load) << INDEX_BITS for n in range(5)]))
    unit = world.add(Unit(dut, [load] * 20, never, never, 1))
    dut.halt.value = 1
    await world.step(30)
    assert not unit.items
    dut.halt.value = 0
    await world.until(lambda: unit.done == 5)


def test_queue_keeps_order_and_tokens():
    run_cocotb(component_verilog(UnitQueue(CONFIG, LOAD), "top"), __name__, "queue")
