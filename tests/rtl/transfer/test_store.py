"""The STORE unit against golden: strides, stalls of every channel and none, errors, halt."""

import cocotb
import numpy as np
import pytest
from lockstep_isa.errors import ErrorCode
from lockstep_isa.executor import GoldenCore
from lockstep_isa.instructions import STORE, Instruction, Memory
from lockstep_rtl.generate import component_verilog
from lockstep_rtl.transfer.store import OUTSTANDING_BURSTS, StoreUnit
from rtl.axi_models import (
    Probe,
    ReadServer,
    Source,
    WriteMemory,
    bench,
    never,
    random_stalls,
    shape,
    small,
    unlanes,
    word_of,
)
from rtl.harness import assert_equal, parameters, run_cocotb, stalls

CONFIG = small(**parameters())
BUS, ROWS, BEATS = CONFIG.bus_bytes, CONFIG.rows, CONFIG.beats_per_vector_word
#: Words of bytes in a beat, and beats of one such word or of as many as share a beat.
BYTE_WORDS, BYTE_BEATS = CONFIG.operand_words_per_beat, max(1, ROWS // BUS)
#: Addresses are written for a bus of 4 bytes; ``at`` is the same beat of this one.
SIZE = (1 << 14) * BUS


def at(address):
    return address // 4 * BUS


class World:
    """A STORE unit between the vector scratchpad and a device memory."""

    @classmethod
    async def start(cls, dut, instructions, gap=never, read_gap=never, size=SIZE, **knobs):
        self = cls()
        words = np.random.default_rng(3).integers(0, 1 << 32, (CONFIG.vector_words, ROWS), np.uint32)
        self.expected, self.memory = (np.full(size, 0xA5, np.uint8) for _ in range(2))
        self.golden = GoldenCore(CONFIG, self.expected)
        self.golden.vector[:] = words.view(np.float32)
        self.bench = await bench(dut)
        dut.window_base.value, dut.window_limit.value = 0, size
        self.source = self.bench.add(Source(dut, "instruction", [word_of(i) for i in instructions], gap))
        self.pad = self.bench.add(ReadServer(dut, "read", [unlanes(w) for w in words], "read_ready", read_gap))
        self.bus = self.bench.add(WriteMemory(dut, "bus", self.memory, BUS, **knobs))
        self.probe = self.bench.add(Probe(dut, "done", "error_valid", "error_code", "error_address", "outstanding"))
        return self

    async def finish(self, instructions):
        await self.bench.until(lambda: self.probe.count("done") == len(instructions), 30000, "done")
        answered = not self.bus.answers and not self.bus.open_bursts
        await self.bench.step(5)
        assert answered, "done means that the memory has everything"
        assert self.probe.count("done") == len(instructions)
        assert not self.probe.count("error_valid")
        assert not self.probe.values["outstanding"][-1]
        for i in instructions:
            self.golden.execute(i)
        assert_equal(self.memory, self.expected, "device memory, byte ")


def store(**fields):
    return Instruction(STORE, memory=Memory.VECTOR, **fields)


#: Bytes, and first rows that begin at some lane; 9 and 63 are beyond the last one.
PARTIAL = [
    store(bytes=1, rows=3, words=7, address=at(0x1014), stride=at(0x40), local=5, local_stride=9),
    store(bytes=1, words=50, address=at(0x2000), local=2),
    store(rows=3, words=2, lane=1, address=at(0x3000), stride=at(0x20), local=1, local_stride=3),
    store(rows=2, words=3, lane=3, address=at(0x4000), stride=at(0x40), local=1, local_stride=3),
    store(bytes=1, rows=3, words=2, lane=2, address=at(0x5000), stride=at(0x40), local=1, local_stride=3),
    store(bytes=1, rows=1, words=3, lane=ROWS - 1, address=at(0x6000), local=9),
    store(bytes=1, rows=2, words=3, lane=9, address=at(0x7000), stride=at(0x20), local=9),
    store(rows=2, words=1, lane=63, address=at(0x7100), stride=at(0x100), local=9),
    store(rows=2, words=3, lane=1, lane_only=1, address=at(0x7400), stride=at(0x100), local=9),
    store(bytes=1, rows=2, words=3, lane=2, lane_only=1, address=at(0x7600), stride=at(0x20), local=11),
    store(bytes=1, words=2, lane=ROWS - 1, lane_only=1, address=at(0x7700), local=13),
]

STORES = [
    Instruction(STORE, memory=Memory.VECTOR, rows=1, words=20, address=at(0x0FF0), local=3),
    Instruction(
        STORE, memory=Memory.VECTOR, rows=5, words=3, address=at(0x2004), stride=at(0x1010), local=2, local_stride=7
    ),
    Instruction(
        STORE, memory=Memory.VECTOR, rows=4, words=1, address=at(0x8000), stride=at(16), local=60, local_stride=1
    ),
    Instruction(
        STORE, memory=Memory.VECTOR, rows=2, words=9, address=at(0x9F00), stride=at(0x100), local=50, local_stride=4
    ),
    Instruction(STORE, memory=Memory.VECTOR, rows=1, words=1, address=at(0xFFF0), local=63),
]


@cocotb.test()
async def blocks_without_stalls(dut):
    world = await World.start(dut, STORES)
    await world.finish(STORES)


@cocotb.test()
async def bytes_and_parts_of_rows_without_stalls(dut):
    world = await World.start(dut, PARTIAL)
    await world.finish(PARTIAL)


@cocotb.test()
async def every_channel_stalls(dut):
    for seed in range(4):
        knobs = random_stalls(seed)
        knobs = {name: knobs[name] for name in ("stall_aw", "stall_w", "stall_b")}
        stores = STORES + PARTIAL
        world = await World.start(dut, stores, stalls(0.5, seed), stalls(0.5, seed), latency=1 + 7 * seed, **knobs)
        await world.finish(stores)


def beats_of(store):
    """Bus beats of a STORE."""
    row = -(-store.words // BYTE_WORDS) * BYTE_BEATS if store.bytes else store.words * BEATS
    return store.rows * row


async def beats_without_a_gap(dut, stores):
    """Run stores on a memory and a scratchpad that never wait: a beat in every cycle; the world behind it."""
    world = await World.start(dut, stores)
    await world.finish(stores)
    assert len(world.bus.beats) == sum(beats_of(i) for i in stores)
    assert_equal(np.diff(world.bus.beats), np.ones(len(world.bus.beats) - 1), "cycles behind beat ")
    return world


@cocotb.test()
async def a_block_takes_its_beats_and_no_other_cycle(dut):
    # Rows of one word too, of which each is a burst.
    for rows, words in ((1, 48), (3, 7), (12, 1)):
        for as_bytes in (0, 1):
            block = store(rows=rows, words=words, address=at(0x1000), stride=at(0x400), local=2, local_stride=4)
            await beats_without_a_gap(dut, [block.replace(bytes=as_bytes)])


#: One behind the other: of bytes and of whole words, with and without parts of rows, of some beats and of many.
CHAIN = [
    store(words=12, address=at(0x1000), local=5),
    store(bytes=1, words=24, lane=1, address=at(0x2000), local=3),
    store(rows=2, words=5, lane=2, address=at(0x3000), stride=at(0x100), local=1, local_stride=6),
    store(bytes=1, rows=3, words=6, address=at(0x4000), stride=at(0x40), local=9, local_stride=5),
    store(bytes=1, rows=2, words=9, lane=3, address=at(0x5010), stride=at(0x20), local=20, local_stride=11),
    store(words=4, lane=1, address=at(0x6000), local=40),
    store(words=4, address=at(0x7000), local=50),
    store(words=20, address=at(0x8000), local=33),
]


@cocotb.test()
async def stores_follow_each_other_without_a_gap_and_are_done_in_order(dut):
    world = await beats_without_a_gap(dut, CHAIN)
    # Done is the answer to an instruction's own last beat.
    last = np.array(world.bus.beats)[np.cumsum([beats_of(i) for i in CHAIN]) - 1]
    assert_equal(world.probe.cycles("done"), last + world.bus.latency, "cycle of done ")
    # The next one was accepted while the one before was not answered, or not even sent.
    assert all(np.array(world.source.taken[1:]) < np.array(world.probe.cycles("done")[:-1]))


@cocotb.test()
async def bursts_beyond_those_that_may_wait_for_answers_are_held_back(dut):
    block = store(rows=60, words=1, bytes=1, address=at(0x1000), stride=at(0x100), local_stride=1)
    world = await World.start(dut, [block], latency=200)
    await world.finish([block])
    announced, answered = (np.array(cycles) for cycles in ([c for c, *_ in world.bus.bursts], world.bus.beats))
    flying = [(answered[:n] + world.bus.latency >= cycle).sum() for n, cycle in enumerate(announced)]
    assert max(flying) == OUTSTANDING_BURSTS - 1, "in front of the one that is announced"


@cocotb.test()
async def a_scratchpad_that_is_often_busy_costs_nothing_where_words_have_four_beats(dut):
    turns = iter(range(1 << 30))
    world = await World.start(dut, CHAIN[:1], read_gap=lambda: next(turns) % 2 == 0)
    await world.finish(CHAIN[:1])
    gaps = np.diff(world.bus.beats) - 1
    # With two beats a word a cycle without an answer is one without a beat.
    assert gaps.sum() == 0 if BEATS >= 4 else gaps.sum() <= CHAIN[0].words


@cocotb.test()
async def every_read_is_for_the_last_accepted_instruction_or_the_one_before(dut):
    for seed in range(2):
        world = await World.start(dut, CHAIN, stalls(0.3, seed), stalls(0.5, seed), stall_w=stalls(0.3, seed))
        earlier = world.bench.add(Probe(dut, "read_earlier"))
        await world.finish(CHAIN)
        reads = [n for n, i in enumerate(CHAIN) for _ in range(i.rows * words_read(i))]
        assert len(world.pad.reads) == len(reads)
        for (cycle, address), expected in zip(world.pad.reads, reads, strict=True):
            newest = sum(taken < cycle for taken in world.source.taken) - 1
            named = newest - earlier.values["read_earlier"][cycle]
            assert named == expected, f"the read of word {address} is for STORE {expected}, {named} was named"


def words_read(store):
    """Reads of one row."""
    return -(-store.words // BYTE_WORDS) if store.bytes else store.words


@cocotb.test()
async def transfers_outside_the_window_or_misaligned_are_refused(dut):
    odd = at(0x100) + 2
    for address, code, where in (
        (at(0xFFF8), ErrorCode.OUT_OF_WINDOW, SIZE),
        (odd, ErrorCode.MISALIGNED, odd),
    ):
        world = await World.start(dut, [Instruction(STORE, memory=Memory.VECTOR, words=3, address=address)])
        await world.bench.until(lambda world=world: world.probe.count("error_valid"), 500, "an error")
        assert world.probe.values["error_code"][-1] == code
        assert world.probe.values["error_address"][-1] == where
        assert all(a + n * BUS <= SIZE for _, a, n in world.bus.bursts)


@cocotb.test()
async def a_refused_burst_is_of_the_last_accepted_instruction(dut):
    """Though older ones are not answered yet, and are so in the end."""
    stores = [*CHAIN[:2], store(words=3, address=at(0xFFF8)), CHAIN[2]]
    world = await World.start(dut, stores, latency=100)
    await world.bench.until(lambda: world.probe.count("error_valid"), 500, "an error")
    assert not int(dut.error_oldest.value)
    assert (len(world.source.taken), world.probe.count("done")) == (3, 0)
    dut.halt.value = 1
    await world.bench.until(lambda: world.probe.count("done") == 2, 500, "the end of the older ones")


@cocotb.test()
async def a_bus_error_is_reported_for_the_oldest_instruction(dut):
    for bad, older in ((at(0x3014), 1), (at(0xFFF0), 4), (at(0x1000), 0)):
        world = await World.start(dut, STORES, bad=[bad], latency=40)
        oldest = world.bench.add(Probe(dut, "error_oldest"))
        await world.bench.until(lambda world=world: world.probe.count("error_valid"), 2000, "an error")
        assert world.probe.values["error_code"][-1] == ErrorCode.BUS_WRITE
        assert world.probe.values["error_address"][-1] == bad
        assert oldest.values["error_oldest"][-1]
        assert len([n for n in world.probe.cycles("done") if n < world.bench.cycle - 1]) == older


@cocotb.test()
async def halt_announces_nothing_and_finishes_what_is_announced(dut):
    for seed, cycle in enumerate((8, 21, 40, 55, 56)):
        knobs = random_stalls(seed)
        knobs = {name: knobs[name] for name in ("stall_aw", "stall_w", "stall_b")}
        world = await World.start(dut, STORES, **knobs)
        await world.bench.step(cycle)
        dut.halt.value = 1
        await world.bench.step()
        asked = len(world.bus.bursts) + int(dut.bus_aw_valid.value)  # what was shown is still finished
        await world.bench.until(lambda world=world: not world.probe.values["outstanding"][-1], 1000, "a quiet bus")
        assert not world.bus.answers
        assert not world.bus.open_bursts
        await world.bench.step(50)
        assert len(world.bus.bursts) == asked
        dut.halt.value = 0


@cocotb.test()
async def an_address_once_shown_stays_through_halt(dut):
    closed = True
    world = await World.start(dut, STORES, stall_aw=lambda: closed)
    await world.bench.until(lambda: int(dut.bus_aw_valid.value), 50, "an address")
    await world.bench.step(2)
    dut.halt.value = 1
    await world.bench.step(10)
    assert int(dut.bus_aw_valid.value)
    closed = False
    await world.bench.until(lambda: not world.probe.values["outstanding"][-1], 1000, "a quiet bus")
    assert len(world.bus.bursts) == 1


@pytest.mark.parametrize(("rows", "bus_bytes"), [(4, 4), (4, 8), pytest.param(64, 128, marks=pytest.mark.slow)])
def test_store_writes_device_memory_like_golden(rows, bus_bytes):
    given = shape(rows, bus_bytes)
    run_cocotb(component_verilog(StoreUnit(small(**given)), "top"), __name__, f"store_{rows}_{bus_bytes}", given)
