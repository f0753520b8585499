"""The burst splitter: every byte once and in order, no burst over a border, nothing outside the window."""

import random

import cocotb
import numpy as np
from lockstep_isa.errors import ErrorCode
from lockstep_rtl.axi import BURST_BEATS
from lockstep_rtl.generate import component_verilog
from lockstep_rtl.transfer.bursts import BLOCK, BURST, BurstSplitter
from rtl.axi_models import Probe, Sink, Source, bench, check_burst, never, pack, small
from rtl.harness import assert_equal, run_cocotb, stalls

CONFIG = small(bus_bytes=4)
BUS = CONFIG.bus_bytes
TOP = 1 << 32


def block(address, rows=1, beats=1, stride=0):
    return dict(address=address, stride=stride, rows=rows, beats=beats)


def expected(blocks):
    """Addresses of all beats in order."""
    return np.array(
        [
            (b["address"] + r * b["stride"] + n * BUS) % TOP
            for b in blocks
            for r in range(b["rows"])
            for n in range(b["beats"])
        ]
    )


async def open_window(dut, base=0, limit=TOP - 1):
    world = await bench(dut)
    dut.window_base.value, dut.window_limit.value = base, limit
    return world


async def split(dut, blocks, gap=never, burst_gap=never):
    """Split blocks; the sink of bursts and the probe of errors."""
    world = await open_window(dut)
    world.add(Source(dut, "block", [pack(BLOCK, **b) for b in blocks], gap))
    bursts = world.add(Sink(dut, "burst", burst_gap))
    probe = world.add(Probe(dut, "error_valid"))
    wanted = expected(blocks)
    shown = []

    def beats():
        for item in bursts.items[len(shown) :]:
            burst = BURST.from_bits(item)
            check_burst(burst.addr, burst.len + 1, BUS)
            assert burst.len < BURST_BEATS
            shown.append([burst.addr + n * BUS for n in range(burst.len + 1)])
        return sum(map(len, shown))

    await world.until(lambda: beats() >= len(wanted))
    await world.step(5)
    assert_equal(np.concatenate(shown), wanted, "address of beat ")
    assert not probe.count("error_valid")
    return bursts


BLOCKS = [
    block(0x1000, beats=BURST_BEATS),
    block(0x0FFC, beats=2),
    block(0x2F80, rows=3, beats=70, stride=0x1234),
    block(0x5000, rows=5, beats=1, stride=4),
    block(0x9FF8, rows=4, beats=33, stride=TOP - 0x100),
    block(0x30000, beats=1),
]


@cocotb.test()
async def a_burst_a_cycle_and_one_idle_cycle_between_blocks(dut):
    bursts = await split(dut, BLOCKS)
    first = {b["address"] for b in BLOCKS[1:]}
    expected = [2 if BURST.from_bits(item).addr in first else 1 for item in bursts.items[1:]]
    assert_equal(np.diff(bursts.cycles), expected, "cycles in front of burst ")


@cocotb.test()
async def random_blocks_with_stalls(dut):
    rand = random.Random(3)
    blocks = [
        block(4 * rand.randrange(1 << 20), rand.randrange(1, 6), rand.randrange(1, 90), 4 * rand.randrange(1 << 16))
        for _ in range(60)
    ]
    await split(dut, blocks, stalls(0.5, 1), stalls(0.5, 2))


async def refused(dut, code, at, base=0x1000, limit=0x2000, **fields):
    """A block that must be refused at ``address``."""
    world = await open_window(dut, base, limit)
    world.add(Source(dut, "block", [pack(BLOCK, **block(**fields))]))
    bursts = world.add(Sink(dut, "burst"))
    await world.step(20)
    found = int(dut.error_valid.value), ErrorCode(int(dut.error_code.value)), hex(int(dut.error_address.value))
    assert found == (1, code, hex(at))
    for item in bursts.items:
        burst = BURST.from_bits(item)
        assert base <= burst.addr
        assert burst.addr + (burst.len + 1) * BUS <= limit
    return len(bursts.items)


@cocotb.test()
async def a_burst_outside_the_window_is_never_shown(dut):
    assert await refused(dut, ErrorCode.OUT_OF_WINDOW, 0xFFC, address=0xFFC, beats=2) == 0
    assert await refused(dut, ErrorCode.OUT_OF_WINDOW, 0x2000, address=0x1FF8, beats=3) == 1
    assert await refused(dut, ErrorCode.OUT_OF_WINDOW, 0x1100, limit=0x1104, address=0x1100, beats=2) == 0
    assert await refused(dut, ErrorCode.OUT_OF_WINDOW, 0x2200, address=0x1A00, rows=3, beats=4, stride=0x800) == 1
    assert await refused(dut, ErrorCode.OUT_OF_WINDOW, TOP - 4, address=TOP - 4, limit=TOP - 1) == 0


@cocotb.test()
async def a_burst_that_ends_at_the_limit_is_legal(dut):
    world = await open_window(dut, 0x1000, 0x2000)
    world.add(Source(dut, "block", [pack(BLOCK, **block(0x1000, 2, 2, 0xFF8))]))
    bursts = world.add(Sink(dut, "burst"))
    await world.step(20)
    assert [BURST.from_bits(i).addr for i in bursts.items] == [0x1000, 0x1FF8]
    assert not int(dut.error_valid.value)


@cocotb.test()
async def misaligned_addresses_and_strides_are_refused(dut):
    await refused(dut, ErrorCode.MISALIGNED, 0x1002, address=0x1002)
    await refused(dut, ErrorCode.MISALIGNED, 0x1000, address=0x1000, rows=2, stride=6)


def test_splitter_covers_blocks_with_legal_bursts():
    run_cocotb(component_verilog(BurstSplitter(CONFIG), "top"), __name__, "bursts")
