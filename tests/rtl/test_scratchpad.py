"""The scratchpad: who goes first, what is masked, what is out of bounds."""

import random

import cocotb
import numpy as np
import pytest
from lockstep_rtl.generate import component_verilog
from lockstep_rtl.scratchpad import PortWords, Scratchpad, fill_stream
from rtl.axi_models import bench, lanes, pack
from rtl.harness import assert_equal, parameters, run_cocotb

WIDTH, GRANULES, DEPTH = 32, 4, 32
BOUNDS = ("write", "fill", "read", "drain")
#: Words that each port takes.
WORDS = PortWords(**parameters())


def fill_payload(address, value, count=1):
    layout = fill_stream(WIDTH, WORDS.fill).members["payload"].shape
    return pack(layout, address=address, data=value, enable=(1 << count) - 1)


def places(address, count):
    """The words of an access, wrapped at the end of the memory."""
    return [(address + n) % DEPTH for n in range(count)]


class Traffic:
    """Random accesses of all four kinds in every cycle, with a model of the memory beside it."""

    def __init__(self, dut, seed, beyond=0.0):
        self.dut, self.random, self.beyond = dut, random.Random(seed), beyond
        self.memory = np.zeros((DEPTH, GRANULES), np.uint8)
        self.expected, self.fill_waits, self.served = None, None, dict.fromkeys(BOUNDS, 0)
        self.done_before = dict.fromkeys(BOUNDS, (0, 0))

    def access(self, name):
        """Address and number of words of an access of a port, at random: one or all; four are aligned."""
        count = self.random.choice((1, getattr(WORDS, name)))
        if self.random.random() < self.beyond:
            address = self.random.randrange(DEPTH, 1 << 16)
        else:
            address = self.random.randrange(DEPTH if self.beyond else DEPTH + 1 - count)
        return address - address % 4 if count == 4 else address, count

    def value(self, name):
        return self.random.randrange(1 << WIDTH * getattr(WORDS, name))

    def drive(self):
        dut, chance = self.dut, self.random.random
        wanted = {"write": chance() < 0.5, "read": chance() < 0.5, "drain": chance() < 0.6}
        accesses = {name: self.access(name) for name in BOUNDS}
        self.write_at, self.read_at, self.drain_at = (accesses[name][0] for name in wanted)
        self.write, self.read, self.drain = (accesses[name][1] if want else 0 for name, want in wanted.items())
        self.mask, self.written = self.random.randrange(16), self.value("write")
        if self.fill_waits is None and chance() < 0.6:
            address, count = accesses["fill"]
            self.fill_waits = (address, self.value("fill"), count)
        dut.write_enable.value, dut.write_address.value = (1 << self.write) - 1, self.write_at
        dut.write_data.value, dut.write_mask.value = self.written, self.mask
        dut.write_idle.value = not self.write
        dut.fill_valid.value = self.fill_waits is not None
        if self.fill_waits:
            dut.fill_payload.value = fill_payload(*self.fill_waits)
        dut.read_enable.value, dut.read_address.value = (1 << self.read) - 1, self.read_at
        dut.drain_enable.value, dut.drain_address.value = (1 << self.drain) - 1, self.drain_at

    def sample(self):
        dut = self.dut
        if self.expected is not None:
            name, expected = self.expected
            port, count = getattr(dut, f"{name}_data"), getattr(WORDS, name)
            actual = lanes(int(port.value), GRANULES * count, np.uint8).reshape(count, GRANULES)
            assert_equal(actual[: len(expected)], expected, f"cycle {self.bench.cycle}: word, byte ")
        assert int(dut.drain_ready.value) == (not self.read), "STORE is served where nobody reads"
        assert int(dut.fill_ready.value) == (not self.write), "LOAD is served where nobody writes"
        done = {"write": (self.write_at, self.write), "read": (self.read_at, self.read)}
        filled = self.fill_waits and not self.write
        done["fill"] = (self.fill_waits[0], self.fill_waits[2]) if filled else (0, 0)
        done["drain"] = (self.drain_at, 0 if self.read else self.drain)
        wrong = set()
        for name in BOUNDS:
            address, count = self.done_before[name]
            beyond = [address + n for n in range(count) if address + n >= DEPTH][:1]
            assert int(getattr(dut, f"bounds_{name}").value) == len(beyond), f"bounds_{name} at {address}"
            wrong |= set(beyond)
            self.served[name] += done[name][1] > 0
        if wrong:
            assert int(dut.bounds_address.value) in wrong, "the address of one of the accesses beyond the end"

        self.done_before = done
        name = "read" if self.read else "drain"
        if self.read or self.drain:
            self.expected = name, self.memory[places(*done[name])]
        if self.write:
            enabled = np.array([self.mask >> g & 1 for g in range(GRANULES)], bool)
            words = lanes(self.written, GRANULES * WORDS.write, np.uint8).reshape(-1, GRANULES)
            for place, word in zip(places(*done["write"]), words, strict=False):
                self.memory[place][enabled] = word[enabled]
        elif self.fill_waits:
            words = lanes(self.fill_waits[1], GRANULES * WORDS.fill, np.uint8).reshape(-1, GRANULES)
            self.memory[places(*done["fill"])] = words[: self.fill_waits[2]]
            self.fill_waits = None


async def filled(dut, seed, beyond=0.0):
    """A bench whose memory is known everywhere."""
    world = await bench(dut)
    traffic = Traffic(dut, seed, beyond)
    dut.fill_valid.value, dut.write_idle.value = 1, 1
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
        assert int(dut.read_data.value) & 0xFFFFFFFF == 0x12345678


@pytest.mark.parametrize(
    "words",
    [
        {"drain": 1},
        {"write": 2, "fill": 2, "drain": 1},
        {"write": 2, "read": 2, "drain": 2},
        {"fill": 2, "drain": 1},
        {"read": 2, "drain": 1},
        {"read": 4, "drain": 1},
        {"write": 2, "fill": 2, "read": 4, "drain": 2},
    ],
    ids=lambda words: "_".join(f"{name}{n}" for name, n in words.items()),
)
def test_scratchpad_serves_the_datapath_first_and_names_accesses_beyond_its_end(words):
    scratchpad = Scratchpad(WIDTH, GRANULES, DEPTH, PortWords(**words))
    name = "_".join(["scratchpad", *(f"{port}{n}" for port, n in words.items())])
    run_cocotb(component_verilog(scratchpad, "top"), __name__, name, words)
