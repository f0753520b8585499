"""The sequencer: programs from the command ring reach the queues in order; what is malformed never does."""

import random

import cocotb
import numpy as np
import pytest
from lockstep_isa.errors import ErrorCode
from lockstep_isa.instructions import (
    INSTRUCTION_BYTES,
    INSTRUCTION_TYPES,
    LOAD,
    MATRIX,
    OPERANDS,
    STORE,
    VECTOR,
    Instruction,
    Memory,
    Sparsity,
    Weights,
    encode,
    selector,
)
from lockstep_isa.registers import DESCRIPTOR_BYTES, DESCRIPTOR_FIELDS
from lockstep_rtl.control.queue import INDEX_BITS, queue_entry
from lockstep_rtl.control.sequencer import Sequencer
from lockstep_rtl.generate import component_verilog
from rtl.axi_models import Probe, ReadMemory, Sink, bench, never, random_stalls, small
from rtl.harness import parameters, run_cocotb, stalls

RING, SLOTS, VALUES, PROGRAMS, SIZE = 0x400, 4, 0x800, 0x1000, 1 << 15


def config_of(rows, bus_bytes, features=True):
    return small(rows=rows, columns=rows, lanes=rows, bus_bytes=bus_bytes, packed=features, selection=features)


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


def with_operands(count, seed=0):
    """Like ``instructions``, but with operands at random in fields that may have one; many counts become zero."""
    rand = random.Random(seed)
    result = []
    for type in (rand.choice(INSTRUCTION_TYPES) for _ in range(count)):
        values = {"memory": Memory.VECTOR} if type in (LOAD, STORE) else {}
        for field in type.of(config_of(**parameters())).variable:
            if rand.random() < 0.6:
                values[field.name] = rand.choice((0, 1, rand.randrange(1 << field.width), (1 << field.width) - 1))
                values[selector(field.name)] = rand.randrange(1, OPERANDS)
            else:
                values[field.name] = rand.randrange(field.minimum, 1 << field.width)
        values |= {"wait": rand.randrange(16), "signal": rand.randrange(16)}
        result.append(encode(Instruction(type, **values)))
    return result


def some_operands(seed=0):
    """64 words: small ones, big ones, and those that make 1 and 2^16 - 1 to 0; word 0 is never looked at."""
    rand = random.Random(seed)
    words = [rand.choice((0, 0, 1, 0xFFFF, 0xFFFFFFFF, rand.randrange(1 << 32))) for _ in range(OPERANDS)]
    return np.array([0xBAD0BAD0, *words[1:]], "<u4")


def entry(index, word, operands):
    """What a queue ought to get of an instruction: its fields with operands added, and whether it is skipped."""
    number, result, skip = int.from_bytes(word, "little"), 0, False
    type = next(t for t in INSTRUCTION_TYPES if t.opcode == number & 15)
    layout = queue_entry(type, config_of(**parameters()))
    instruction = layout["instruction"]
    for name, (offset, field) in type.layout.items():
        value = number >> offset & (1 << field.width) - 1
        if name.endswith("_operand"):
            assert value < OPERANDS
            continue
        if name not in instruction.shape.members:
            assert not value
            continue
        if field.operand:
            start, chosen = type.layout[selector(name)]
            choice = number >> start & (1 << chosen.width) - 1
            value = (value + int(operands[choice] if choice else 0)) % (1 << field.width)
            skip |= value < field.minimum
        result |= value << instruction.shape[name].offset
    return index | skip << INDEX_BITS | result << instruction.offset


class World:
    """A sequencer, its memory with a ring, and the four queues."""

    @classmethod
    async def start(cls, dut, gap=never, limit=SIZE, **knobs):
        self = cls()
        self.dut = dut
        self.config = config_of(**parameters())
        self.fetch_bytes = max(INSTRUCTION_BYTES, self.config.bus_bytes)
        self.operands = np.zeros(OPERANDS, "<u4")
        self.memory = np.zeros(SIZE, np.uint8)
        self.bench = await bench(dut)
        self.bus = self.bench.add(ReadMemory(dut, "bus", self.memory, self.config.bus_bytes, **knobs))
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
        """Put a program of encoded instructions into the ring and ring the doorbell; operands lie at VALUES."""
        self.write(self.place, b"".join(code))
        fields = {"program": self.place, "count": len(code), "config_crc": self.config.crc, "fence": fence}
        fields |= {"operands": 0} | changes
        words = np.array([fields[n] for n, _ in DESCRIPTOR_FIELDS], "<u4")
        self.write(RING + self.tail % SLOTS * DESCRIPTOR_BYTES, words.tobytes())
        self.place += -(-len(code) * INSTRUCTION_BYTES // self.fetch_bytes) * self.fetch_bytes
        self.tail += 1
        self.dut.ring_tail.value = self.tail

    def check(self, program):
        """Every queue got its part of the program, in order, with its indices and operands."""
        for type, queue in self.queues.items():
            expected = [entry(n, w, self.operands) for n, w in enumerate(program) if w[0] & 15 == type.opcode]
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
    beats = INSTRUCTION_BYTES // world.config.bus_bytes
    if beats > 1:
        assert np.all(np.diff(world.bus.beats[beats:]) == 1), "the bus never pauses within a program"
    else:
        assert np.all(np.diff(world.probe.cycles("dispatched")) == 2), "nor does the dispatcher wait for the bus"


@cocotb.test()
async def operands_are_added_on_the_way(dut):
    for seed in range(4):
        world = await World.start(dut)
        world.operands = some_operands(seed)
        world.write(VALUES, world.operands.tobytes())
        program = with_operands(100, seed)
        world.submit(program, 9, operands=VALUES)
        await world.fence(9)
        world.check(program)
        skipped = sum(entry(0, w, world.operands) >> INDEX_BITS & 1 for w in program)
        assert 10 < skipped < 50, "some are skipped, some are not"
        beats = INSTRUCTION_BYTES // world.config.bus_bytes
        if beats > 1:
            fetched = np.diff(world.bus.beats[beats : 12 * beats])
            assert np.all(fetched == 1), "operands and the first instructions come without a pause"


@cocotb.test()
async def operands_are_those_of_their_descriptor(dut):
    for seed in range(3):
        knobs = random_stalls(seed)
        world = await World.start(
            dut, stalls(0.8, seed), stall_ar=knobs["stall_ar"], stall_r=knobs["stall_r"], latency=1 + 9 * seed
        )
        programs = [with_operands(n, seed + n) for n in (12, 0, 9, 10)]
        # The third program has none: its operands are zero, whatever those of the second one were.
        blocks = [some_operands(seed), some_operands(seed + 9), np.zeros(OPERANDS, "<u4"), some_operands(seed + 20)]
        for n, (program, block) in enumerate(zip(programs, blocks, strict=True)):
            world.write(VALUES + 256 * n, block.tobytes())
            world.submit(program, 1 + n, operands=0 if n == 2 else VALUES + 256 * n)
        await world.fence(len(programs))
        for type, queue in world.queues.items():
            expected = [
                entry(n, word, block)
                for program, block in zip(programs, blocks, strict=True)
                for n, word in enumerate(program)
                if word[0] & 15 == type.opcode
            ]
            assert queue.items == expected, type.name


@cocotb.test()
async def an_operand_costs_a_cycle_and_the_first_one_two_more(dut):
    closed = True
    world = await World.start(dut, lambda: closed)
    counts = (0, 2, 0, 5, 1, 0, 0)
    names = [selector(f.name) for f in STORE.variable]
    program = [
        encode(Instruction(STORE, memory=Memory.VECTOR, **dict.fromkeys(names[:count], 1 + n)))
        for n, count in enumerate(counts)
    ]
    world.operands = some_operands()
    world.write(VALUES, world.operands.tobytes())
    world.submit(program, 1, operands=VALUES)
    await world.bench.step(400)
    closed = False
    await world.fence(1)
    world.check(program)
    taken = np.diff(world.probe.cycles("dispatched"))
    assert taken.tolist() == [2 + (count + 2 if count else 0) for count in counts[1:]]


@cocotb.test()
async def operands_outside_the_window_or_misaligned_are_refused(dut):
    half = max(INSTRUCTION_BYTES, parameters()["bus_bytes"]) // 2
    for operands, code, at in (
        (VALUES + 4, ErrorCode.MISALIGNED, VALUES + 4),
        (VALUES + half, ErrorCode.MISALIGNED, VALUES + half),
        (SIZE - 128, ErrorCode.OUT_OF_WINDOW, SIZE),
    ):
        world = await World.start(dut)
        world.submit(instructions(3), 1, operands=operands)
        assert await world.failure() == (code, at, 0)
        assert not world.probe.count("dispatched")
    world = await World.start(dut, bad=[VALUES + 128])
    world.submit(instructions(3), 1, operands=VALUES)
    assert (await world.failure())[0] == ErrorCode.BUS_READ
    assert not world.probe.count("dispatched")


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
    assert asked <= 9 * INSTRUCTION_BYTES // world.fetch_bytes
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
    world.submit(instructions(3), 1, config_crc=config_of(**parameters()).crc ^ 1)
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
        if type.variable:
            # Whatever its operands: it is malformed in itself.
            stray = good.replace(**{selector(f.name): 3 for f in type.variable})
            await refused(dut, encode(stray)[:-1] + b"\x80", ErrorCode.BAD_FIELD)
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
async def packed_weights_are_refused_where_the_core_takes_none(dut):
    formats = [Instruction(MATRIX, weights=w, sparsity=s) for w in Weights for s in Sparsity]
    packed = [i for i in formats if (i.weights, i.sparsity) != (Weights.INT8, Sparsity.DENSE)]
    if config_of(**parameters()).packed:
        world = await World.start(dut)
        program = [encode(i) for i in formats]
        world.submit(program, 1)
        await world.fence(1)
        world.check(program)
    else:
        for instruction in packed:
            await refused(dut, encode(instruction), ErrorCode.BAD_FIELD)


@cocotb.test()
async def selections_are_of_one_row_tile_and_refused_without_an_index_memory(dut):
    some = {"select_lane": 63, "select_lane_operand": 1}
    fields = [{"select": k, "select_to": k, "select_first": 255, "select_last": 3, **some} for k in (1, 1 << 15)]
    good = [Instruction(VECTOR, **f) for f in fields] + [Instruction(LOAD, gather=1, gather_from=0xFFFF)]
    several = [Instruction(VECTOR, tiles=t, select=k) for t in (2, 1 << 8, 0xFFFF) for k in (1, 1 << 15)]
    if config_of(**parameters()).selection:
        world = await World.start(dut)
        program = [encode(i) for i in good]
        world.submit(program, 1)
        await world.fence(1)
        world.check(program)
        refuses = several
    else:
        refuses = good + several + [Instruction(VECTOR, select_lane_operand=1), Instruction(LOAD, gather_from=1)]
    for instruction in refuses:
        await refused(dut, encode(instruction), ErrorCode.BAD_FIELD)


@cocotb.test()
async def fetches_outside_the_window_are_refused(dut):
    limit = PROGRAMS + 3 * max(INSTRUCTION_BYTES, parameters()["bus_bytes"])
    world = await World.start(dut, limit=limit)
    world.submit(instructions(9), 1)
    code, address, _ = await world.failure()
    assert (code, address) == (ErrorCode.OUT_OF_WINDOW, limit)
    assert all(a + INSTRUCTION_BYTES <= limit for _, a, _ in world.bus.bursts)
    world = await World.start(dut)
    dut.window_base.value = RING + world.fetch_bytes
    world.submit(instructions(5), 1)
    assert (await world.failure())[:2] == (ErrorCode.OUT_OF_WINDOW, RING)
    assert not world.bus.bursts
    world = await World.start(dut)
    world.submit(instructions(5), 1, program=PROGRAMS + 4)
    assert (await world.failure())[:2] == (ErrorCode.MISALIGNED, PROGRAMS + 4)


@cocotb.test()
async def a_bus_error_in_a_fetch_stops_the_core(dut):
    world = await World.start(dut, bad=[PROGRAMS + 2 * INSTRUCTION_BYTES])
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


@pytest.mark.parametrize(
    ("rows", "bus_bytes", "features"), [(4, 4, True), (16, 16, True), (64, 64, False), (64, 128, True), (8, 8, False)]
)
def test_sequencer_dispatches_programs_and_refuses_what_is_malformed(rows, bus_bytes, features):
    given = {"rows": rows, "bus_bytes": bus_bytes, "features": features}
    verilog = component_verilog(Sequencer(config_of(**given)), "top")
    run_cocotb(verilog, __name__, f"sequencer_{bus_bytes}", given)
