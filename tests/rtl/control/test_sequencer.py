"""The sequencer: programs from the command ring reach the queues in order; what is malformed never does."""

import random

import cocotb
import numpy as np
from lockstep_isa.errors import ErrorCode
from lockstep_isa.instructions import (
    INSTRUCTION_BYTES,
    INSTRUCTION_TYPES,
    LOAD,
    MATRIX,
    STORE,
    VECTOR,
    Instruction,
    Memory,
    encode,
)
from lockstep_isa.registers import DESCRIPTOR_BYTES, DESCRIPTOR_FIELDS
from lockstep_rtl.control.queue import INDEX_BITS
from lockstep_rtl.control.sequencer import Sequencer
from lockstep_rtl.generate import component_verilog
from rtl.axi_models import Probe, ReadMemory, Sink, bench, never, random_stalls, small
from rtl.harness import run_cocotb, stalls

CONFIG = small()
RING, SLOTS, PROGRAMS, SIZE = 0x800, 4, 0x1000, 1 << 15


def instructions(count, seed=0):
    """A program of all types."""
    rand = random.Random(seed)

    def one():
        word = rand.randrange(1 << 16)
        return rand.choice(
            (
                Instruction(
                    LOAD, memory=Memory.TABLE, rows=3, words=word or 1, address=word << 8, signal=rand.randrange(16)
                ),
                Instruction(MATRIX, depth=1 + word % 99, outer=2, a_inner=word, unsigned=1),
                Instruction(VECTOR, tiles=7, columns=65535, immediate0=rand.randrange(1 << 32), immediate1=0xFFFFFFFF),
                Instruction(STORE, memory=Memory.VECTOR, wait=rand.randrange(16), local=word, stride=64),
            )
        )

    return [encode(one()) for _ in range(count)]


class World:
    """A sequencer, its memory with a ring, and the four queues."""

    @classmethod
    async def start(cls, dut, gap=never, limit=SIZE, **knobs):
        self = cls()
        self.dut = dut
        self.memory = np.zeros(SIZE, np.uint8)
        self.bench = await bench(dut)
        self.bus = self.bench.add(ReadMemory(dut, "bus", self.memory, CONFIG.bus_bytes, **knobs))
        self.queues = {t: self.bench.add(Sink(dut, f"push_{t.name.lower()}", gap)) for t in INSTRUCTION_TYPES}
        names = (
            "busy",
            "dispatched",
            "outstanding",
            "error_valid",
            "error_code",
            "error_address",
            "ring_head",
            "fence",
            "index",
        )
        self.probe = self.bench.add(Probe(dut, *names))
        dut.ring_base.value, dut.ring_size.value = RING, SLOTS
        dut.window_limit.value, dut.units_idle.value = limit, 1
        self.tail, self.place = 0, PROGRAMS
        return self

    def write(self, address, content):
        self.memory[address : address + len(content)] = np.frombuffer(content, np.uint8)

    def submit(self, code, fence, **changes):
        """Put a program of encoded instructions into the ring and ring the doorbell."""
        self.write(self.place, b"".join(code))
        fields = {"program": self.place, "count": len(code), "config_crc": CONFIG.crc, "fence": fence} | changes
        words = np.array([fields[n] for n, _ in DESCRIPTOR_FIELDS], "<u4")
        self.write(RING + self.tail % SLOTS * DESCRIPTOR_BYTES, words.tobytes())
        self.place += len(code) * INSTRUCTION_BYTES
        self.tail += 1
        self.dut.ring_tail.value = self.tail

    def check(self, program):
        """Every queue got its part of the program, in order, with its indices."""
        for type, queue in self.queues.items():
            expected = [
                n | int.from_bytes(word, "little") << INDEX_BITS
                for n, word in enumerate(program)
                if word[0] & 15 == type.opcode
            ]
            assert len(queue.items) == len(expected), f"{type.name}: {len(queue.items)} of {len(expected)} instructions"
            for n, (found, wanted) in enumerate(zip(queue.items, expected, strict=True)):
                assert found == wanted, f"{type.name} {n}: {found:#x}, expected {wanted:#x}"

    async def fence(self, value):
        await self.bench.until(lambda: int(self.dut.fence.value) == value, 20000, f"fence {value}")
        assert not self.probe.count("error_valid")

    async def failure(self):
        """(code, address, index) of the first error; behind it the core halts."""
        await self.bench.until(lambda: self.probe.count("error_valid"), 5000, "an error")
        last = {n: self.probe.values[n][-1] for n in ("error_code", "error_address", "index")}
        self.dut.halt.value = 1
        await self.bench.step()
        await self.bench.until(lambda: not self.probe.values["outstanding"][-1], 500, "a quiet bus")
        assert not self.bus.flying
        return ErrorCode(last["error_code"]), last["error_address"], last["index"]


@cocotb.test()
async def a_program_reaches_the_queues_in_order(dut):
    world = await World.start(dut)
    program = instructions(50)
    world.submit(program, 0xABCD)
    await world.fence(0xABCD)
    world.check(program)
    await world.bench.step()
    assert int(dut.ring_head.value) == 1
    assert not int(dut.busy.value)
    assert world.probe.count("dispatched") == 50
    beats = INSTRUCTION_BYTES // CONFIG.bus_bytes
    assert np.all(np.diff(world.bus.beats[beats:]) == 1), "the bus never pauses within a program"


@cocotb.test()
async def a_program_reaches_the_queues_with_stalls_everywhere(dut):
    for seed in range(3):
        knobs = random_stalls(seed)
        world = await World.start(
            dut, stalls(0.8, seed), stall_ar=knobs["stall_ar"], stall_r=knobs["stall_r"], latency=1 + 9 * seed
        )
        program = instructions(30, seed)
        world.submit(program, 7)
        await world.fence(7)
        world.check(program)


@cocotb.test()
async def fetches_never_ask_for_more_than_the_buffer_holds(dut):
    closed = True
    world = await World.start(dut, lambda: closed)
    program = instructions(40)
    world.submit(program, 1)
    await world.bench.step(600)
    assert not world.bus.flying, "what was asked for has arrived"
    asked = len(world.bus.bursts) - 1
    assert asked <= 9
    closed = False
    await world.fence(1)
    world.check(program)


@cocotb.test()
async def the_ring_wraps_and_fences_follow_the_units(dut):
    world = await World.start(dut)
    programs = [instructions(n, n) for n in (3, 0, 5, 1, 2, 4, 9)]
    dut.units_idle.value = 0
    for n, program in enumerate(programs[:SLOTS]):
        world.submit(program, 100 + n)
    await world.bench.step(400)
    assert int(dut.fence.value) == 0, "not complete before the units are idle"
    assert int(dut.ring_head.value) == 0
    assert sum(len(q.items) for q in world.queues.values()) == 3, "the next program waits for the one before"
    dut.units_idle.value = 1
    await world.fence(100 + SLOTS - 1)
    for n, program in enumerate(programs[SLOTS:]):
        world.submit(program, 200 + n)
    await world.fence(200 + len(programs) - SLOTS - 1)
    await world.bench.step()
    assert int(dut.ring_head.value) == len(programs)
    assert world.probe.count("dispatched") == sum(map(len, programs))
    values = [f for f, g in zip(world.probe.values["fence"][1:], world.probe.values["fence"], strict=False) if f != g]
    assert values == [*range(100, 100 + SLOTS), *range(200, 200 + len(programs) - SLOTS)]


@cocotb.test()
async def a_program_for_another_core_is_refused(dut):
    world = await World.start(dut)
    world.submit(instructions(3), 1, config_crc=CONFIG.crc ^ 1)
    code, _, _ = await world.failure()
    assert code == ErrorCode.WRONG_CONFIGURATION
    assert not world.probe.count("dispatched")
    assert int(dut.busy.value)
    assert len(world.bus.bursts) == 1


def with_field(instruction, name, value):
    """The encoded instruction with a value that the encoder refuses."""
    offset, field = instruction.type.layout[name]
    word = int.from_bytes(encode(instruction), "little") & ~((1 << field.width) - 1 << offset)
    return (word | value << offset).to_bytes(INSTRUCTION_BYTES, "little")


async def refused(dut, word, expected, before=2):
    """``word`` behind some good instructions stops the sequencer; those before are dispatched, it is not."""
    world = await World.start(dut)
    program = instructions(before)
    world.submit([*program, word, *instructions(4)], 1)
    code, _, index = await world.failure()
    assert (code, index) == (expected, before)
    world.check(program)


@cocotb.test()
async def unknown_opcodes_are_refused(dut):
    known = {t.opcode for t in INSTRUCTION_TYPES}
    for opcode in set(range(16)) - known:
        await refused(dut, bytes([opcode]) + bytes(INSTRUCTION_BYTES - 1), ErrorCode.BAD_OPCODE, before=opcode % 3)


@cocotb.test()
async def counts_of_zero_and_stray_bits_are_refused(dut):
    for type in INSTRUCTION_TYPES:
        good = Instruction(type, **({"memory": Memory.VECTOR} if type in (LOAD, STORE) else {}))
        for field in type.fields:
            if field.minimum:
                await refused(dut, with_field(good, field.name, 0), ErrorCode.BAD_FIELD)
        for bit in (type.width, 8 * INSTRUCTION_BYTES - 1):
            word = int.from_bytes(encode(good), "little") | 1 << bit
            await refused(dut, word.to_bytes(INSTRUCTION_BYTES, "little"), ErrorCode.BAD_FIELD)


@cocotb.test()
async def values_that_no_enumeration_has_are_refused(dut):
    for type in INSTRUCTION_TYPES:
        good = Instruction(type, **({"memory": Memory.VECTOR} if type in (LOAD, STORE) else {}))
        for field in type.fields:
            if field.choices is not None and len(field.choices) < 1 << field.width:
                await refused(dut, with_field(good, field.name, (1 << field.width) - 1), ErrorCode.BAD_FIELD)


@cocotb.test()
async def only_the_vector_memory_is_stored(dut):
    for memory in set(Memory) - {Memory.VECTOR}:
        await refused(dut, encode(Instruction(STORE, memory=memory)), ErrorCode.BAD_FIELD)


@cocotb.test()
async def fetches_outside_the_window_are_refused(dut):
    limit = PROGRAMS + 3 * INSTRUCTION_BYTES
    world = await World.start(dut, limit=limit)
    world.submit(instructions(5), 1)
    code, address, _ = await world.failure()
    assert (code, address) == (ErrorCode.OUT_OF_WINDOW, limit)
    assert all(a + INSTRUCTION_BYTES <= limit for _, a, _ in world.bus.bursts)
    world = await World.start(dut)
    dut.window_base.value = RING + DESCRIPTOR_BYTES
    world.submit(instructions(5), 1)
    assert (await world.failure())[:2] == (ErrorCode.OUT_OF_WINDOW, RING)
    assert not world.bus.bursts
    world = await World.start(dut)
    world.submit(instructions(5), 1, program=PROGRAMS + 4)
    assert (await world.failure())[:2] == (ErrorCode.MISALIGNED, PROGRAMS + 4)


@cocotb.test()
async def a_bus_error_in_a_fetch_stops_the_core(dut):
    world = await World.start(dut, bad=[PROGRAMS + 2 * INSTRUCTION_BYTES + 8])
    program = instructions(5)
    world.submit(program, 1)
    code, _, _ = await world.failure()
    assert code == ErrorCode.BUS_READ
    assert world.probe.count("dispatched") <= 2, "nothing of the damaged instruction is dispatched"


@cocotb.test()
async def halt_lets_the_bus_run_dry(dut):
    for cycle in (3, 17, 40, 77):
        world = await World.start(dut, latency=20)
        world.submit(instructions(20), 1)
        await world.bench.step(cycle)
        dut.halt.value = 1
        await world.bench.step()
        asked, dispatched = len(world.bus.bursts), world.probe.count("dispatched")
        await world.bench.step(250)
        assert len(world.bus.bursts) == asked
        assert world.probe.count("dispatched") == dispatched
        assert not world.probe.values["outstanding"][-1]
        assert not world.bus.flying
        dut.halt.value = 0


def test_sequencer_dispatches_programs_and_refuses_what_is_malformed():
    run_cocotb(component_verilog(Sequencer(CONFIG), "top"), __name__, "sequencer")
