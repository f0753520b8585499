"""The MATRIX unit against golden: loops, short tiles, zero chunks, a full queue of tiles, every cycle accounted for."""

import cocotb
import numpy as np
import pytest
from lockstep_isa.executor import GoldenCore
from lockstep_isa.instructions import MATRIX, PATTERNS, WEIGHT_GROUPS, Instruction, Sparsity, Weights
from lockstep_isa.weights import words_per_tile
from lockstep_isa.zero_skipping import CHUNKS_AHEAD, may_skip, skipped_chunks
from lockstep_rtl.generate import component_verilog
from lockstep_rtl.matrix.unit import MatrixUnit
from lockstep_rtl.matrix.weight_decoder import PACKED_START
from rtl.axi_models import Probe, ReadServer, Source, bench, lanes, never, shape, small, unlanes, word_of
from rtl.harness import assert_equal, parameters, run_cocotb, stalls

WORDS = 256
CONFIG = small(accumulator_tiles=8, activation_words=WORDS, weight_words=WORDS, **parameters())
SIZE, TILES, SIDE = CONFIG.rows, CONFIG.accumulator_tiles, CONFIG.columns_per_beat


class ZeroServer:
    """Answers whether chunks are zero, one cycle later; ``asked`` lists the chunks."""

    def __init__(self, dut, zero):
        self.enable, self.chunk, self.zero = (getattr(dut, f"zero_read_{name}") for name in ("enable", "chunk", "zero"))
        self.chunks, self.next, self.asked = zero.reshape(-1, SIZE).all(axis=1), None, []

    def drive(self):
        if self.next is not None:
            self.zero.value, self.next = int(self.chunks[self.next]), None

    def sample(self):
        if int(self.enable.value):
            self.next = int(self.chunk.value)
            self.asked.append(self.next)


class TileReader:
    """The vector unit's side: reads a tile's columns beat by beat and pops it with the last one's read."""

    def __init__(self, dut, gap=never):
        self.dut, self.gap = dut, gap
        self.column, self.asked, self.columns, self.pops = 0, False, [], []

    def drive(self):
        go = self.bench.cycle > 0 and int(self.dut.accumulator_available.value) and not self.gap()
        self.go = bool(go)
        self.dut.accumulator_enable.value = self.go
        self.dut.accumulator_column.value = self.column
        self.dut.accumulator_pop.value = self.go and self.column == SIZE - SIDE

    def sample(self):
        if self.asked:
            self.columns.extend(lanes(int(self.dut.accumulator_data.value), SIZE * SIDE, np.int32).reshape(SIDE, SIZE))
        self.asked = self.go
        if self.go:
            if self.column == SIZE - SIDE:
                self.pops.append(self.bench.cycle)
            self.column = (self.column + SIDE) % SIZE

    @property
    def tiles(self):
        """int32[tiles, rows, columns]"""
        whole = len(self.columns) // SIZE * SIZE
        return np.array(self.columns[:whole], np.int32).reshape(-1, SIZE, SIZE).transpose(0, 2, 1)


def golden(instructions):
    """The operands, and the tiles that golden makes of them."""
    core = GoldenCore(CONFIG, np.zeros(0, np.uint8))
    random = np.random.default_rng(5)
    for memory in (core.activation, core.weight):
        memory[:] = random.integers(-128, 128, memory.shape)
        memory[::7] = -128
    if CONFIG.zero_skipping:
        # Runs of 1 to 14 chunks, and single words.
        for begin, end in ((9, 10), (16, 20), (28, 36), (41, 55), (60, 62), (100, 156), (180, 196), (250, 256)):
            core.activation[begin:end] = 0
        core.zero[:] = ~core.activation.any(axis=1)
    for i in instructions:
        core.execute(i)
    return core, np.array(core.accumulators)


#: k of one step.
RATES = {
    **{(Weights.INT8, s): rate for s, rate in zip(Sparsity, (1, 2, 4), strict=True)},
    **{(w, s): rate for w in list(Weights)[1:] for s, rate in zip(Sparsity, (2, 4, 4), strict=True)},
}


def steps(i):
    """Steps of a tile."""
    return i.depth // RATES[i.weights, i.sparsity]


def late(i, before=None, seen=0):
    """Cycles by which the first step comes later than without packed weights, behind another instruction that ended
    ``seen`` cycles after this one was there to be seen.
    """
    carried = before is not None and (i.weights, i.sparsity) == (before.weights, before.sparsity) and seen >= 3
    return 0 if RATES[i.weights, i.sparsity] == 1 or carried else PACKED_START


class Finder:
    """What the finder of chunks does from cycle ``now`` on: a chunk a cycle, or a tile's end, while its queue has room.

    skipped : bool[tiles, chunks] of the instruction that begins.
    """

    def __init__(self, skipped, now):
        self.now, self.known, self.taken = now, [], []
        # Whether it finds something, look by look: chunks that are multiplied, but for a tile's first one, and ends.
        self.looks = [found for tile in skipped for found in (*~tile[1:], True)]

    def next_known(self):
        """When it is known what follows the next chunk."""
        number = len(self.taken)
        while len(self.known) <= number:
            waiting = sum(k <= self.now for k in self.known) - sum(t < self.now for t in self.taken)
            if waiting <= CHUNKS_AHEAD - 2 and self.looks.pop(0):
                self.known.append(self.now + 2)
            self.now += 1
        return self.known[number]


def chunk_cycles(i, tile, finder, now):
    """The cycle of every step of a tile that begins at ``now`` and passes over the chunks that are true in ``tile``."""
    cycles = []
    for _ in range((~tile).sum()):
        last = now + SIZE - 1
        if (known := finder.next_known()) >= last:
            last = known + 1
        cycles += [*range(now, now + SIZE - 1), last]
        finder.taken.append(last - 1)
        now = last + 1
    return cycles + list(range(now, now + i.depth % SIZE))


def step_cycles(instructions, presented, taken, pops, zero):
    """The cycle of every step, if instructions are shown and taken and tiles of results are popped in these cycles."""
    cycles, tile = [], 0
    before = [None, *instructions[:-1]]
    for i, previous, shown, start in zip(instructions, before, presented, taken, strict=True):
        now = start + 1
        skipped = skipped_chunks(CONFIG, i, zero)
        finder = Finder(skipped, now)
        for n in range(i.outer * i.inner):
            # A tile waits for room, then for the weights if it is the first one, then until its period's end is due.
            if tile >= TILES:
                now = max(now, pops[tile - TILES] + 1)
            now += max(0, SIZE - steps(i)) + (late(i, previous, start - shown) if n == 0 else 0)
            if may_skip(CONFIG, i):
                cycles += chunk_cycles(i, skipped[n], finder, now)
            else:
                cycles += range(now, now + steps(i))
            now = cycles[-1] + 1
            tile += 1
    return cycles


async def run(dut, instructions, gap=never, source_gap=never):
    """Execute instructions, compare every tile and the cycle of every step; the probe, the reader, the source."""
    core, expected = golden(instructions)
    world = await bench(dut)
    world.add(ReadServer(dut, "activation_read", [unlanes(w) for w in core.activation]))
    world.add(ReadServer(dut, "weight_read", [unlanes(w) for w in core.weight]))
    if CONFIG.zero_skipping:
        world.add(ZeroServer(dut, core.zero))
    reader = world.add(TileReader(dut, gap))
    source = world.add(Source(dut, "instruction", [word_of(i) for i in instructions], source_gap))
    skipped = ["skipped"] if CONFIG.zero_skipping else []
    probe = world.add(Probe(dut, "done", "stalled", "streaming", "activation_read_enable", *skipped))
    await world.until(lambda: len(reader.tiles) == len(expected), 20000, f"{len(expected)} tiles")
    await world.step(4 * SIZE)
    assert_equal(reader.tiles, expected, "tile, row, column ")
    assert probe.count("done") == len(instructions)
    expected = step_cycles(instructions, source.presented, source.taken, reader.pops, core.zero)
    assert_equal(probe.cycles("streaming"), expected, "cycle of step ")
    if CONFIG.zero_skipping:
        assert probe.count("skipped") == core.skipped_chunks
    return probe, reader, source


def periods(i, before=None):
    """Cycles of an instruction that never waits and passes over nothing, behind another one that took as many."""
    return late(i, before, SIZE - 1) + i.outer * i.inner * max(steps(i), SIZE)


def chunked(seed, count):
    """Dense instructions whose tiles begin with chunks, some of them zero, and others in between."""
    rng = np.random.default_rng(seed)

    def one():
        depth, outer, inner = int(rng.integers(1, 90)), int(rng.integers(1, 4)), int(rng.integers(1, 3))
        room = (WORDS - depth) // 3 // SIZE
        places = {name: int(rng.integers(0, room + 1)) * SIZE for name in ("a", "a_outer", "a_inner")}
        places["a_outer"] //= 2
        places |= {name: int(rng.integers(0, (WORDS - depth) // 4 + 1)) for name in ("w", "w_outer", "w_inner")}
        places["w_outer"] //= 2
        return Instruction(MATRIX, depth=depth, outer=outer, inner=inner, unsigned=int(rng.integers(2)), **places)

    return [i for pair in zip((one() for _ in range(count)), mixed(seed, count), strict=True) for i in pair]


LOOPS = [
    Instruction(MATRIX, depth=7, outer=3, inner=2, a=1, a_outer=8, a_inner=2, w=3, w_outer=5, w_inner=9),
    Instruction(MATRIX, depth=4, outer=1, inner=5, a=0, a_inner=0, w=0, w_inner=4),
    Instruction(MATRIX, depth=1, outer=2, inner=2, a=9, a_outer=3, a_inner=1, w=60, w_inner=1),
    Instruction(MATRIX, depth=3, outer=4, inner=1, a=20, a_outer=3, w=30, w_outer=1, unsigned=1),
    Instruction(MATRIX, depth=30, a=2, w=33, unsigned=1),
    Instruction(MATRIX, depth=2, a=62, w=62),
    Instruction(MATRIX, depth=1, a=63, w=0),
    Instruction(
        MATRIX, depth=5, outer=2, inner=2, a=50, a_outer=0xFFF0, a_inner=0xFFFF, w=40, w_outer=2, w_inner=0xFFFE
    ),
]
# Negative steps wrap in 16 bits; golden has no such addresses, so the last one is unrolled for it.
NEGATIVE = [
    LOOPS[-1].replace(outer=1, inner=1, a=50 - 16 * o - i, w=40 + 2 * o - 2 * i) for o in (0, 1) for i in (0, 1)
]


def mixed(seed, count):
    """Instructions of all formats in any order, half of them dense where the core takes others too; half of them have
    the format of the one before.
    """
    format = Weights.INT8, Sparsity.DENSE
    rng = np.random.default_rng(seed)

    def some(least, most, unit=1):
        return int(rng.integers(least // unit, most // unit + 1)) * unit

    def one():
        nonlocal format
        if some(0, 1):
            format = list(RATES)[rng.integers(len(RATES)) if CONFIG.packed and some(0, 1) else 0]
        weights, sparsity = format
        rate = RATES[weights, sparsity]
        unit = WEIGHT_GROUPS[weights] or {1: 1, 2: 8, 4: 16}[rate]
        depth = some(unit, max(unit, 64 if some(0, 1) else 12), unit)
        words = words_per_tile(depth, WEIGHT_GROUPS[weights], PATTERNS[sparsity])
        outer, inner = some(1, 3), some(1, 3)
        # A step looks at words that begin at a multiple of 4; dense int4 also at the upper half of them.
        aligned = 1 if rate == 1 else 2 if sparsity == Sparsity.DENSE else 4
        values = {"depth": depth, "outer": outer, "inner": inner, "unsigned": some(0, 1)}
        for name, length, multiple in (("a", depth, aligned), ("w", words, 1)):
            room = (WORDS - length) // 5
            values |= {f"{name}_{loop}": some(0, room, multiple) for loop in ("outer", "inner")}
            values[name] = some(0, WORDS - length - 4 * room, multiple)
        return Instruction(MATRIX, weights=weights, sparsity=sparsity, **values)

    return [one() for _ in range(count)]


async def follow_without_a_bubble(dut, instructions):
    probe, _, source = await run(dut, instructions)
    assert probe.count("stalled") == 0
    before = [None, *instructions[:-1]]
    expected = source.taken[0] + np.cumsum([periods(*pair) for pair in zip(instructions, before, strict=True)])
    assert_equal(probe.cycles("done"), expected, "cycle of done of instruction ")
    # The next instruction is taken in the cycle in which the one before is done.
    assert_equal(source.taken[1:], expected[:-1], "cycle in which the next is taken after instruction ")


@cocotb.test()
async def instructions_follow_without_a_bubble(dut):
    await follow_without_a_bubble(dut, LOOPS[:-1])


@cocotb.test()
async def formats_follow_each_other_without_a_bubble(dut):
    await follow_without_a_bubble(dut, [i for i in mixed(1, 120) if not may_skip(CONFIG, i)])


@cocotb.test()
async def formats_with_a_slow_reader_and_gaps(dut):
    await run(dut, mixed(2, 60), gap=stalls(0.9, 4), source_gap=stalls(0.5, 5))
    await run(dut, mixed(3, 60), gap=stalls(0.6, 6))


@cocotb.test(skip=not CONFIG.packed)
async def weights_come_ahead_of_an_instruction_that_is_seen_early_enough(dut):
    """Behind one of the same format, three cycles before that one ends; whenever else it is seen, it begins anew."""
    for weights, sparsity in list(RATES)[1:]:
        depth = WEIGHT_GROUPS[weights] or 16
        one, other = (
            Instruction(MATRIX, weights=weights, sparsity=sparsity, depth=depth, w=w, a=w, inner=2, w_inner=3)
            for w in (8, 40)
        )
        seen = []
        for delay in (1, *range(periods(one) - 4, periods(one) + 2)):
            late_by = iter([False] + [True] * (delay - 1) + [False])
            _, _, source = await run(dut, [one, other], source_gap=lambda late_by=late_by: next(late_by))
            seen.append(source.taken[1] - source.presented[1])
        assert {0, 1, 2, 3, 4} <= set(seen)


@cocotb.test(skip=not CONFIG.zero_skipping)
async def zero_chunks_are_passed_over(dut):
    await run(dut, chunked(7, 60))


@cocotb.test(skip=not CONFIG.zero_skipping)
async def zero_chunks_with_a_slow_reader_and_gaps(dut):
    await run(dut, chunked(8, 40), gap=stalls(0.9, 9), source_gap=stalls(0.5, 10))
    await run(dut, chunked(9, 40), gap=stalls(0.6, 11))


@cocotb.test(skip=not CONFIG.zero_skipping)
async def a_tile_takes_its_chunks_and_its_rest(dut):
    """Nothing else, but for the first tile: its zero chunks are looked at one by one while its first chunk runs."""
    for a, depth, cycles in (
        (8, 18, [3 * SIZE + 2] * 3),  # words 16 to 19 are zero
        (8, 24, [4 * SIZE, 4 * SIZE, 4 * SIZE]),  # and words 28 to 31, behind which nothing comes
        (24, 17, [2 * SIZE + 1 + 2] + [2 * SIZE + 1] * 3),  # words 28 to 35
        (104, 16, [SIZE + 3, SIZE, SIZE]),  # all words
    ):
        instruction = Instruction(MATRIX, depth=depth, outer=len(cycles), a=a)
        probe, _, source = await run(dut, [instruction])
        assert probe.cycles("done")[0] - source.taken[0] == sum(cycles), f"words {a} to {a + depth}"


@cocotb.test(skip=not CONFIG.zero_skipping)
async def chunks_without_zeros_take_no_cycle_more(dut):
    instructions = [Instruction(MATRIX, depth=d, outer=2, inner=2, a=64, a_outer=4, w=3) for d in (8, 9, 11, 12, 31)]
    await follow_without_a_bubble(dut, instructions * 3)


@cocotb.test()
async def done_means_that_the_operands_are_read(dut):
    instructions = [Instruction(MATRIX, depth=9, inner=2, a_inner=9), Instruction(MATRIX, depth=2)]
    probe, reader, _ = await run(dut, instructions)
    reads, done = probe.cycles("activation_read_enable"), probe.cycles("done")
    assert done == [reads[17], reads[19]]
    assert reads[18] == reads[17] + 1 + SIZE - 2, "where K < C, the period's idle cycles come first"
    # The first column leaves the array 3 cycles behind its operands, which came one cycle behind the read; the last
    # row's last column is written R + C - 2 later and can be asked for in the cycle behind.
    assert reader.pops[1] - (SIZE // SIDE - 1) == done[0] + 1 + 3 + 2 * SIZE - 2 + 1


@cocotb.test()
async def slow_reader_stalls_the_array_and_loses_nothing(dut):
    probe, *_ = await run(dut, LOOPS[:-1], gap=stalls(0.9, 1))
    assert probe.count("stalled") > 0


@cocotb.test()
async def random_reader_and_instructions_with_gaps(dut):
    await run(dut, LOOPS[:-1] * 2, gap=stalls(0.5, 2), source_gap=stalls(0.8, 3))


@cocotb.test()
async def full_queue_then_all_at_once(dut):
    """Nobody pops until the queue is full; the array stops behind the last tile with room."""
    blocked = True
    instruction = Instruction(MATRIX, depth=5, inner=9, a_inner=3, w_inner=2)
    core, expected = golden([instruction])
    world = await bench(dut)
    world.add(ReadServer(dut, "activation_read", [unlanes(w) for w in core.activation]))
    world.add(ReadServer(dut, "weight_read", [unlanes(w) for w in core.weight]))
    reader = world.add(TileReader(dut, lambda: blocked))
    world.add(Source(dut, "instruction", [word_of(instruction)]))
    probe = world.add(Probe(dut, "done", "stalled", "streaming"))
    await world.step(100)
    assert probe.count("streaming") == TILES * 5, "operands of as many tiles as there is room for"
    assert probe.values["stalled"][-1]
    assert not probe.count("done")
    blocked = False
    await world.until(lambda: len(reader.tiles) == len(expected))
    assert_equal(reader.tiles, expected, "tile, row, column ")


@cocotb.test()
async def a_tile_of_room_is_used_in_the_next_cycle(dut):
    instruction = Instruction(MATRIX, depth=4, inner=12, a_inner=3, w_inner=2)
    probe, reader, _ = await run(dut, [instruction])
    # A reader at full speed takes C cycles per tile, so with K = C nobody ever waits.
    assert probe.count("stalled") == 0
    assert_equal(np.diff(reader.pops), np.full(11, SIZE), "cycles between pops ")


@cocotb.test()
async def steps_may_be_negative(dut):
    core, expected = golden(NEGATIVE)
    world = await bench(dut)
    world.add(ReadServer(dut, "activation_read", [unlanes(w) for w in core.activation]))
    world.add(ReadServer(dut, "weight_read", [unlanes(w) for w in core.weight]))
    reader = world.add(TileReader(dut))
    world.add(Source(dut, "instruction", [word_of(LOOPS[-1])]))
    await world.until(lambda: len(reader.tiles) == len(expected))
    assert_equal(reader.tiles, expected, "tile, row, column ")


@pytest.mark.parametrize(
    ("lanes", "packed", "zero_skipping"),
    [(4, False, False), (8, False, False), (4, True, False), (4, False, True), (4, True, True)],
)
def test_matrix_unit_executes_loops_like_golden(lanes, packed, zero_skipping):
    given = shape(4, 4, lanes) | {"packed": packed, "zero_skipping": zero_skipping}
    unit = MatrixUnit(small(accumulator_tiles=8, activation_words=WORDS, weight_words=WORDS, **given))
    run_cocotb(component_verilog(unit, "top"), __name__, f"matrix_unit_{lanes}_{packed:d}{zero_skipping:d}", given)
