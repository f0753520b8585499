"""The scratchpad: who goes first, what is masked, what is out of bounds."""

import random

import cocotb
import numpy as np
from lockstep_rtl.generate import component_verilog
from lockstep_rtl.scratchpad import Scratchpad, fill_stream
from rtl.axi_models import bench, lanes, pack
from rtl.harness import assert_equal, run_cocotb

WIDTH, GRANULES, DEPTH = 32, 4, 32
BOUNDS = ("write", "fill", "read", "drain")


def fill_payload(address, value):
    return pack(fill_stream(WIDTH).members["payload"].shape, address=address, data=value)


class Traffic:
    """Random accesses of all four kinds in every cycle, with a model of the memory beside it."""

    def __init__(self, dut, seed, beyond=0.0):
        self.dut, self.random, self.beyond = dut, random.Random(seed), beyond
        self.memory = np.zeros((DEPTH, GRANULES), np.uint8)
        self.expected, self.fill_waits, self.served = None, None, dict.fromkeys(BOUNDS, 0)

    def address(self):
        return (
            self.random.randrange(DEPTH, 1 << 16)
            if self.random.random() < self.beyond
            else self.random.randrange(DEPTH)
        )

    def drive(self):
        dut, chance = self.dut, self.random.random
        self.write, self.read, self.drain = chance() < 0.5, chance() < 0.5, chance() < 0.6
        self.mask, self.value = self.random.randrange(16), self.random.randrange(1 << WIDTH)
        self.write_at, self.read_at, self.drain_at = self.address(), self.address(), self.address()
        if self.fill_waits is None and chance() < 0.6:
            self.fill_waits = (self.address(), self.random.randrange(1 << WIDTH))
        dut.write_enable.value, dut.write_address.value = self.write, self.write_at
        dut.write_data.value, dut.write_mask.value = self.value, self.mask
        dut.fill_valid.value = self.fill_waits is not None
        if self.fill_waits:
            dut.fill_payload.value = fill_payload(*self.fill_waits)
        dut.read_enable.value, dut.read_address.value = self.read, self.read_at
        dut.drain_enable.value, dut.drain_address.value = self.drain, self.drain_at

    def sample(self):
        dut = self.dut
        if self.expected is not None:
            actual = lanes(int(dut.read_data.value), GRANULES, np.uint8)
            assert_equal(actual, self.expected, f"cycle {self.bench.cycle}: byte ")
            assert int(dut.drain_data.value) == int(dut.read_data.value)
        assert int(dut.drain_ready.value) == (not self.read), "STORE is served where nobody reads"
        assert int(dut.fill_ready.value) == (not self.write), "LOAD is served where nobody writes"
        done = {"write": self.write_at if self.write else None, "read": self.read_at if self.read else None}
        done["fill"] = self.fill_waits[0] if self.fill_waits and not self.write else None
        done["drain"] = self.drain_at if self.drain and not self.read else None
        wrong = set()
        for name in BOUNDS:
            beyond = done[name] is not None and done[name] >= DEPTH
            assert int(getattr(dut, f"bounds_{name}").value) == beyond, f"bounds_{name} at {done[name]}"
            wrong |= {done[name]} if beyond else set()
            self.served[name] += done[name] is not None
        if wrong:
            assert int(dut.bounds_address.value) in wrong, "the address of one of the accesses beyond the end"

        reader = self.read_at if self.read else self.drain_at if self.drain else None
        if reader is not None:
            self.expected = self.memory[reader % DEPTH].copy()
        if self.write:
            enabled = np.array([self.mask >> g & 1 for g in range(GRANULES)], bool)
            self.memory[self.write_at % DEPTH][enabled] = lanes(self.value, GRANULES, np.uint8)[enabled]
        elif self.fill_waits:
            self.memory[self.fill_waits[0] % DEPTH] = lanes(self.fill_waits[1], GRANULES, np.uint8)
            self.fill_waits = None


async def filled(dut, seed, beyond=0.0):
    """A bench whose memory is known everywhere."""
    world = await bench(dut)
    traffic = Traffic(dut, seed, beyond)
    dut.fill_valid.value = 1
    for address in range(DEPTH):
        dut.fill_payload.value = fill_payload(address, 0)
        await world.step()
    dut.fill_valid.value = 0
    return world, world.add(traffic)


@cocotb.test()
async def random_traffic_agrees_with_a_list_of_words(dut):
    world, traffic = await filled(dut, 1)
    await world.step(1500)
    assert min(traffic.served.values()) > 150, f"every kind of access happened: {traffic.served}"


@cocotb.test()
async def accesses_beyond_the_end_are_named(dut):
    world, _ = await filled(dut, 2, beyond=0.2)
    await world.step(800)


@cocotb.test()
async def data_is_held_until_the_next_read(dut):
    world = await bench(dut)
    dut.write_enable.value, dut.write_mask.value = 1, 15
    dut.write_address.value, dut.write_data.value = 5, 0x12345678
    await world.step()
    dut.write_enable.value, dut.read_enable.value, dut.read_address.value = 0, 1, 5
    await world.step()
    dut.read_enable.value, dut.read_address.value = 0, 6
    for _ in range(4):
        await world.step()
        assert int(dut.read_data.value) == 0x12345678


def test_scratchpad_serves_the_datapath_first_and_names_accesses_beyond_its_end():
    run_cocotb(component_verilog(Scratchpad(WIDTH, GRANULES, DEPTH), "top"), __name__, "scratchpad")
