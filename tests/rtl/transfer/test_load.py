"""The LOAD unit against golden: all memories, strides, stalls of every channel and none, errors, halt."""

import cocotb
import numpy as np
import pytest
from lockstep_isa.errors import ErrorCode
from lockstep_isa.executor import GoldenCore
from lockstep_isa.instructions import INDEX_ENTRIES, LOAD, Instruction, Memory
from lockstep_rtl.generate import component_verilog
from lockstep_rtl.scratchpad import fill_stream
from lockstep_rtl.transfer.load import LoadUnit
from rtl.axi_models import (
    Probe,
    ReadMemory,
    ReadServer,
    Sink,
    Source,
    bench,
    lanes,
    never,
    random_stalls,
    shape,
    small,
    word_of,
)
from rtl.harness import assert_equal, parameters, run_cocotb, stalls

CONFIG = small(**parameters())
BUS, ROWS, WORDS = CONFIG.bus_bytes, CONFIG.rows, CONFIG.operand_words_per_beat
#: What stands in the index memory: neither in order nor each number once, and some up to the greatest one.
INDEX = np.random.default_rng(3).integers(0, np.repeat([20, INDEX_ENTRIES], [600, INDEX_ENTRIES - 600]))
#: Addresses are written for a bus of 4 bytes; ``at`` is the same beat of this one.
SIZE = (1 << 14) * BUS


def at(address):
    return address // 4 * BUS


PROBED = ("done", "outstanding", *(f"error_{n}" for n in ("valid", "code", "address", "oldest")))
FILLS = {
    Memory.ACTIVATION: ("fill_activation", np.int8),
    Memory.WEIGHT: ("fill_weight", np.int8),
    Memory.VECTOR: ("fill_vector", np.float32),
    Memory.PARAMETER: ("fill_parameter", np.float32),
}


def device_memory(seed=1, size=SIZE):
    """Random bytes; a third of the words are subnormals, zeros or infinities as fp32."""
    random = np.random.default_rng(seed)
    words = random.integers(0, 1 << 32, size // 4, np.uint32)
    special = random.integers(0, 6, len(words))
    words[special == 0] &= 0x807FFFFF
    words[special == 1] &= 0xFF800000
    return words.view(np.uint8).copy()


def patterns(values):
    """Bits; those of a NaN are outside the contract, so all NaNs are one."""
    bits = values.view(f"u{values.dtype.itemsize}")
    return np.where(np.isnan(values), 0x7FC00000, bits) if values.dtype.kind == "f" else bits


class TableWriter:
    """Collects function table entries."""

    def __init__(self, dut):
        self.dut, self.entries = dut, []

    def drive(self):
        """Nothing to drive: entries are always taken."""

    def sample(self):
        if int(self.dut.table_enable.value):
            self.entries.append((int(self.dut.table_address.value), int(self.dut.table_data.value)))


class World:
    """A LOAD unit between a device memory and scratchpads."""

    @classmethod
    async def start(cls, dut, instructions, memory, gap=never, fill_gap=never, **knobs):
        self = cls()
        self.dut, self.memory = dut, memory
        self.bench = await bench(dut)
        dut.window_base.value, dut.window_limit.value = 0, len(memory)
        self.bus = self.bench.add(ReadMemory(dut, "bus", memory, BUS, **knobs))
        self.source = self.bench.add(Source(dut, "instruction", [word_of(i) for i in instructions], gap))
        self.sinks = {m: self.bench.add(Sink(dut, name, fill_gap)) for m, (name, _) in FILLS.items()}
        self.table = self.bench.add(TableWriter(dut))
        if CONFIG.selection:
            self.index = self.bench.add(ReadServer(dut, "index", INDEX.tolist()))
        self.probe = self.bench.add(Probe(dut, *PROBED))
        return self

    async def finish(self, count):
        await self.bench.until(lambda: self.probe.count("done") == count, 30000, f"done of {count} instructions")
        await self.bench.step(10)
        assert self.probe.count("done") == count
        assert not self.probe.count("error_valid")
        assert not self.probe.values["outstanding"][-1]

    def words(self, memory, name, dtype):
        """(address, content) of every word that was written, in order."""
        most = WORDS if memory in (Memory.ACTIVATION, Memory.WEIGHT) else 1
        layout = fill_stream(8 * ROWS * np.dtype(dtype).itemsize, most).members["payload"].shape
        found = []
        for item in map(layout.from_bits, self.sinks[memory].items):
            words = lanes(item.data, ROWS * most, dtype).reshape(most, ROWS)[: item.enable.bit_length()]
            found += [(item.address + n, word) for n, word in enumerate(words)]
        return found

    def compare(self, instructions):
        """Every word that was written, in order: address and content."""
        golden = GoldenCore(CONFIG, self.memory)
        golden.index[:] = INDEX
        for i in instructions:
            golden.execute(i)
        for memory, (name, dtype) in FILLS.items():
            written_words = self.words(memory, name, dtype)
            places = addresses(instructions, memory)
            assert_equal([address for address, _ in written_words], places, f"{name} address of word ")
            kept = np.array(getattr(golden, memory.name.lower()))
            written = np.zeros_like(kept)
            for address, word in written_words:
                written[address] = word
            untouched = np.ones(len(kept), bool)
            untouched[places] = False
            kept[untouched] = 0
            assert_equal(patterns(written), patterns(kept), f"{name} word, lane ")
        places = addresses(instructions, Memory.TABLE)
        assert_equal([a for a, _ in self.table.entries], places, "address of table entry ")
        entries = np.array([[e & 0xFFFFFFFF, e >> 32 & 0xFFFFFF, e >> 56] for _, e in self.table.entries]).reshape(
            -1, 3
        )
        c = golden.table.view(np.uint32)[places].reshape(-1, 3)
        assert_equal(entries, np.stack([c[:, 0], c[:, 1] >> 8, c[:, 2] >> 16], 1), "table entry, coefficient ")


def addresses(instructions, memory):
    """On-chip words that the instructions fill, in order."""
    return np.array(
        [
            i.local + r * i.local_stride + n
            for i in instructions
            if i.memory == memory
            for r in range(i.rows)
            for n in range(i.words)
        ],
        int,
    )


def beats(i):
    """Bus beats of an instruction: each row has whole beats."""
    word = {Memory.TABLE: 16, Memory.VECTOR: 4 * ROWS, Memory.PARAMETER: 4 * ROWS}.get(i.memory, ROWS)
    return i.rows * -(-i.words * word // BUS)


LOADS = [
    Instruction(LOAD, memory=Memory.ACTIVATION, rows=1, words=40, address=at(0x0FF0), local=3),
    Instruction(
        LOAD, memory=Memory.WEIGHT, rows=5, words=3, address=at(0x2004), stride=at(0x1010), local=2, local_stride=7
    ),
    Instruction(
        LOAD, memory=Memory.VECTOR, rows=3, words=5, address=at(0x3FE0), stride=at(0x58), local=20, local_stride=5
    ),
    Instruction(
        LOAD, memory=Memory.PARAMETER, rows=2, words=4, address=at(0x7000), stride=at(0x40), local=1, local_stride=8
    ),
    Instruction(
        LOAD, memory=Memory.TABLE, rows=2, words=9, address=at(0x8000), stride=at(0x400), local=128, local_stride=256
    ),
    Instruction(LOAD, memory=Memory.VECTOR, rows=1, words=1, address=at(0x9000), local=63),
    Instruction(
        LOAD, memory=Memory.WEIGHT, rows=4, words=1, address=at(0x9004), stride=at(4), local=40, local_stride=1
    ),
    Instruction(LOAD, memory=Memory.ACTIVATION, rows=1, words=1, address=at(0xFFFC), local=0),
]
if CONFIG.selection:
    #: Words of rows that begin before and behind the row before, cross a burst's border, share a beat, are one beat.
    LOADS += [
        Instruction(LOAD, gather=1, **fields)
        for fields in (
            {"rows": 9, "words": 5, "address": at(0x1004), "stride": at(0x2C), "local": 2, "local_stride": 6},
            {"rows": 1, "words": 40, "address": at(0x2000), "stride": at(0x100), "gather_from": 7},
            {
                "memory": Memory.VECTOR,
                "rows": 6,
                "words": 8,
                "address": at(0x7E0),
                "stride": at(0x80),
                "local_stride": 9,
                "gather_from": 300,
            },
            {
                "memory": Memory.WEIGHT,
                "rows": 16,
                "words": 1,
                "address": at(0x600),
                "stride": at(4),
                "local_stride": 1,
                "gather_from": INDEX_ENTRIES - 16,
            },
            {"memory": Memory.PARAMETER, "rows": 2, "words": 1, "address": at(0xC000), "local_stride": 1},
        )
    ]
    LOADS += LOADS[:2]


@cocotb.test()
async def all_memories_without_stalls(dut):
    world = await World.start(dut, LOADS, device_memory())
    await world.finish(len(LOADS))
    world.compare(LOADS)


@cocotb.test()
async def all_memories_with_every_channel_stalling(dut):
    for seed in range(3):
        knobs = random_stalls(seed)
        knobs = {name: knobs[name] for name in ("stall_ar", "stall_r")}
        memory = device_memory(seed)
        world = await World.start(
            dut, LOADS, memory, stalls(0.3, seed), stalls(0.4, seed), latency=1 + 5 * seed, **knobs
        )
        await world.finish(len(LOADS))
        world.compare(LOADS)


@cocotb.test()
async def one_beat_a_cycle_over_rows_and_instructions(dut):
    """With a memory that answers at once, the bus never pauses between bursts of one or of two instructions."""
    loads = [
        Instruction(LOAD, memory=Memory.ACTIVATION, words=50, address=at(0x0F00)),
        Instruction(
            LOAD, memory=Memory.VECTOR, rows=2, words=16, address=at(0x1000), stride=at(0x400), local_stride=16
        ),
        Instruction(LOAD, memory=Memory.WEIGHT, rows=1, words=60, address=at(0x3000)),
    ]
    world = await World.start(dut, loads, device_memory(), latency=3)
    await world.finish(len(loads))
    world.compare(loads)
    assert_equal(np.diff(world.bus.beats), np.ones(sum(map(beats, loads)) - 1, int), "cycles between beat ")


@cocotb.test(skip=not CONFIG.selection)
async def gathered_rows_come_as_fast_as_others(dut):
    """Their first beat is 4 cycles later. Rows of two beats and more then come without a pause."""
    word_beats = max(1, ROWS // BUS)
    blocks = [
        {
            "rows": 16,
            "words": 2 * WORDS,
            "address": at(0x1000),
            "stride": at(8 * word_beats),
            "local_stride": 2 * WORDS,
        },
        {"rows": 4, "words": 8 * WORDS, "address": at(0x1010), "stride": at(0x80), "local_stride": 8 * WORDS},
    ]
    for block in blocks:
        beats_at = []
        for gather in (0, 1):
            load = Instruction(LOAD, gather=gather, **block)
            world = await World.start(dut, [load], device_memory(), latency=3)
            await world.finish(1)
            world.compare([load])
            beats_at.append(np.array(world.bus.beats))
        assert_equal(beats_at[1] - beats_at[0], np.full(beats(load), 4), "cycles by which beats are late, of beat ")
    # Behind another instruction the list is read while that one's beats come.
    loads = [LOADS[0], *(Instruction(LOAD, gather=1, **block) for block in blocks)]
    world = await World.start(dut, loads, device_memory(), latency=3)
    await world.finish(len(loads))
    assert_equal(np.diff(world.bus.beats), np.ones(sum(map(beats, loads)) - 1, int), "cycles between beat ")


@cocotb.test()
async def done_comes_with_the_last_write(dut):
    load = Instruction(LOAD, memory=Memory.VECTOR, words=4, address=at(0x100))
    world = await World.start(dut, [load], device_memory())
    await world.finish(1)
    assert world.probe.cycles("done") == world.sinks[Memory.VECTOR].cycles[-1:]


async def fails(dut, loads, base=0, limit=SIZE, bad=()):
    """(code, address, oldest) of the first error."""
    world = await World.start(dut, loads, device_memory(), bad=bad)
    dut.window_base.value, dut.window_limit.value = base, limit
    await world.bench.until(lambda: world.probe.count("error_valid"), 500, "an error")
    for _, address, count in world.bus.bursts:
        assert base <= address <= limit - count * BUS, f"a burst at {address:#x}"
    return world


@cocotb.test()
async def transfers_outside_the_window_or_misaligned_are_refused(dut):
    outside = Instruction(LOAD, memory=Memory.WEIGHT, rows=1, words=4 * WORDS, address=at(0x1FF8))
    await fails(dut, [LOADS[0], outside], limit=at(0x2000))
    assert (int(dut.error_code.value), int(dut.error_address.value)) == (ErrorCode.OUT_OF_WINDOW, at(0x2000))
    assert not int(dut.error_oldest.value), "the newest instruction is to blame"
    await fails(dut, [outside.replace(address=at(0x1000) + 2)])
    assert int(dut.error_code.value) == ErrorCode.MISALIGNED


@cocotb.test(skip=not CONFIG.selection)
async def gathered_rows_outside_the_window_and_entries_that_are_not_there_are_refused(dut):
    stride = at(0x100)
    gather = Instruction(LOAD, gather=1, gather_from=590, rows=40, words=WORDS, stride=stride)
    rows = [int(number) * stride for number in INDEX[590:630]]
    limit = at(0x3000)
    await fails(dut, [LOADS[0], gather], limit=limit)
    outside = next(address for address in rows if address >= limit)
    assert (int(dut.error_code.value), int(dut.error_address.value)) == (ErrorCode.OUT_OF_WINDOW, outside)
    assert not int(dut.error_oldest.value), "the newest instruction is to blame"
    await fails(dut, [gather.replace(address=at(0x1000) + 2)])
    assert int(dut.error_code.value) == ErrorCode.MISALIGNED
    for first in (INDEX_ENTRIES - 39, 0xFFFF):
        await fails(dut, [LOADS[0], gather.replace(gather_from=first, stride=at(4))])
        found = [int(getattr(dut, f"error_{n}").value) for n in ("code", "address", "oldest")]
        assert found == [ErrorCode.LOCAL_BOUNDS, INDEX_ENTRIES, 0]


@cocotb.test()
async def table_entries_beyond_the_last_slot_are_refused(dut):
    world = await fails(dut, [Instruction(LOAD, memory=Memory.TABLE, words=4, address=0, local=510)])
    found = [world.probe.values[f"error_{n}"][-1] for n in ("code", "address", "oldest")]
    assert found == [ErrorCode.LOCAL_BOUNDS, 512, 1]


@cocotb.test()
async def a_bus_error_stops_the_oldest_instruction(dut):
    bad = at(0x1008)
    world = await World.start(dut, LOADS[:2], device_memory(), bad=[bad])
    seen = []

    def failed():
        if int(dut.error_valid.value):
            seen.append((int(dut.error_code.value), int(dut.error_oldest.value)))
        return bool(seen)

    class Watch:
        def drive(self):
            pass

        def sample(self):
            failed()

    world.bench.add(Watch())
    await world.bench.until(lambda: bool(seen), 500, "an error")
    assert seen[0] == (ErrorCode.BUS_READ, 1)
    wrong = world.bus.beats[(bad - LOADS[0].address) // BUS]
    assert wrong == world.bench.cycle - 2, "in the cycle behind the beat"


@cocotb.test()
async def halt_starts_nothing_and_lets_the_bus_run_dry(dut):
    for seed, cycle in enumerate((12, 25, 60, 61, 62)):
        knobs = random_stalls(seed)
        world = await World.start(
            dut, LOADS, device_memory(), fill_gap=stalls(0.9, 1), stall_ar=knobs["stall_ar"], stall_r=knobs["stall_r"]
        )
        await world.bench.step(cycle)
        dut.halt.value = 1
        await world.bench.step()
        asked = len(world.bus.bursts) + int(dut.bus_ar_valid.value)  # what was shown is still finished
        await world.bench.until(lambda world=world: not world.probe.values["outstanding"][-1], 1000, "a quiet bus")
        assert not world.bus.flying
        await world.bench.step(50)
        assert len(world.bus.bursts) == asked
        dut.halt.value = 0


@cocotb.test()
async def an_address_once_shown_stays_through_halt(dut):
    closed = True
    world = await World.start(dut, LOADS, device_memory(), stall_ar=lambda: closed)
    await world.bench.until(lambda: int(dut.bus_ar_valid.value), 50, "an address")
    await world.bench.step(2)
    dut.halt.value = 1
    await world.bench.step(10)
    assert int(dut.bus_ar_valid.value)
    closed = False
    await world.bench.until(lambda: not world.probe.values["outstanding"][-1], 1000, "a quiet bus")
    assert len(world.bus.bursts) == 1


@pytest.mark.parametrize(
    ("rows", "bus_bytes", "selection"),
    [(4, 4, True), (4, 4, False), (4, 8, True), (16, 32, True), pytest.param(64, 128, True, marks=pytest.mark.slow)],
)
def test_load_fills_every_memory_like_golden(rows, bus_bytes, selection):
    given = shape(rows, bus_bytes) | {"selection": selection}
    name = f"load_{rows}_{bus_bytes}_{selection:d}"
    run_cocotb(component_verilog(LoadUnit(small(**given)), "top"), __name__, name, given)
