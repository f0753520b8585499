"""The queue in front of a unit: order, tokens before the start, tokens at the end, what is running and waiting."""

import random

import cocotb
from lockstep_isa.instructions import LOAD, Instruction, Memory
from lockstep_rtl.control.queue import INDEX_BITS, UnitQueue, queue_entry
from lockstep_rtl.generate import component_verilog
from rtl.axi_models import Probe, Sink, Source, bench, never, small, word_of
from rtl.harness import run_cocotb, stalls

CONFIG = small()
IN_FLIGHT = 5


def instruction(n, rand):
    return Instruction(LOAD, memory=Memory.WEIGHT, wait=rand.randrange(16), signal=rand.randrange(16), address=64 * n)


def entry(index, instruction, skip=False):
    """An instruction as the dispatcher pushes it."""
    offset = queue_entry(LOAD, CONFIG)["instruction"].offset
    return index | skip << INDEX_BITS | word_of(instruction) << offset


class Unit(Sink):
    """Accepts a few instructions and completes each some cycles later, in order; checks tokens on the way."""

    def __init__(self, dut, instructions, gap, granted, seed):
        super().__init__(dut, "instruction", gap)
        self.dut, self.instructions, self.granted, self.random = dut, instructions, granted, random.Random(seed)
        self.done, self.due, self.takes, self.gives, self.held = 0, None, 0, [], False

    def drive(self):
        super().drive()
        if len(self.items) - self.done >= IN_FLIGHT:
            self.open = False
            self.ready.value = 0
        # Tokens that are there stay until they are taken.
        self.grant = self.held or not self.granted()
        self.dut.granted.value = self.grant
        self.completes = self.due is not None and self.bench.cycle >= self.due
        self.dut.done.value = self.completes

    def sample(self):
        dut, before = self.dut, len(self.items)
        valid = int(self.valid.value)
        assert not valid or self.grant, "offered without its tokens"
        super().sample()
        accepted = len(self.items) > before
        assert int(dut.take.value) == accepted
        self.held = self.grant and not accepted
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
    pushes = [entry(n, i) for n, i in enumerate(instructions)]
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
    source = world.add(Source(dut, "push", [entry(n, load) for n in range(CONFIG.queue_depth + 3)]))
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
    world.add(Source(dut, "push", [entry(n, load) for n in range(5)]))
    unit = world.add(Unit(dut, [load] * 20, never, never, 1))
    dut.halt.value = 1
    await world.step(30)
    assert not unit.items
    dut.halt.value = 0
    await world.until(lambda: unit.done == 5)


class Bursty:
    """A unit that is done with an instruction when ``latencies`` says, or one cycle behind the one before it."""

    def __init__(self, dut, gap, latencies):
        self.dut, self.gap, self.latencies, self.accepted, self.finished = dut, gap, latencies, [], []

    def drive(self):
        number, cycle = len(self.finished), self.bench.cycle
        due = number < len(self.accepted) and self.accepted[number][0] + self.latencies[number] <= cycle
        if due:
            self.finished.append(cycle)
        self.dut.done.value = due
        self.dut.granted.value = 1
        self.dut.instruction_ready.value = not self.gap()

    def sample(self):
        if int(self.dut.instruction_valid.value) and int(self.dut.instruction_ready.value):
            self.accepted.append((self.bench.cycle, int(self.dut.instruction_payload.value)))


@cocotb.test()
async def skipped_instructions_exchange_tokens_in_order(dut):
    for seed in range(6):
        rand = random.Random(seed)
        program = [(instruction(n, rand).replace(signal=1 + n % 15), rand.random() < 0.5) for n in range(80)]
        world = await bench(dut)
        pushes = [entry(n, i, skip) for n, (i, skip) in enumerate(program)]
        world.add(Source(dut, "push", pushes, stalls(0.3 * (seed % 2), seed)))
        latencies = [rand.choice((4, 5, 30)) for _ in program]
        unit = world.add(Bursty(dut, stalls(0.4 if seed % 3 else 0, seed), latencies))
        probe = world.add(Probe(dut, "take", "want", "give", "running", "newest", "oldest", "earlier"))
        await world.until(lambda probe=probe: probe.count("give") == 80, 5000, "completion")
        assert [word for _, word in unit.accepted] == [word_of(i) for i, skip in program if not skip]
        gives = probe.cycles("give")
        assert [probe.values["give"][n] for n in gives] == [i.signal for i, _ in program]
        assert [probe.values["oldest"][n] for n in gives] == list(range(len(program)))
        accepted = [n for n, (_, skip) in enumerate(program) if not skip]
        behind = [cycle + 1 for cycle, _ in unit.accepted][1:]
        assert [probe.values["newest"][n] for n in behind] == accepted[1:]
        assert [probe.values["earlier"][n] for n in behind] == accepted[:-1]
        takes = probe.cycles("take")
        assert [probe.values["want"][n] for n in takes] == [i.wait for i, _ in program]
        # Nobody gives before the unit is done with it, nor a skipped one before those in front of it are done.
        done = iter(unit.finished)
        earliest = 0
        for (_, skip), given in zip(program, gives, strict=True):
            earliest = earliest if skip else next(done)
            assert given >= earliest
            assert skip or given <= earliest + 8, "no more than the skipped ones in front of it are waited for"
        await world.step(3)
        assert not int(dut.running.value)
        assert int(dut.empty.value)


@cocotb.test()
async def a_skipped_instruction_waits_for_its_tokens(dut):
    world = await bench(dut)
    load = Instruction(LOAD, memory=Memory.WEIGHT, wait=0b0110, signal=0b1000)
    world.add(Source(dut, "push", [entry(0, load, True)]))
    probe = world.add(Probe(dut, "take", "give", "instruction_valid", "waiting"))
    await world.step(20)
    assert not probe.count("take")
    assert int(dut.waiting.value)
    dut.granted.value = 1
    await world.step(10)
    assert probe.count("take") == 1
    assert probe.count("give") == 1
    assert not probe.count("instruction_valid")
    assert int(dut.empty.value)


def test_queue_keeps_order_and_tokens():
    run_cocotb(component_verilog(UnitQueue(CONFIG, LOAD), "top"), __name__, "queue")
