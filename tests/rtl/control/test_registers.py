"""The register file behind AXI4-Lite: every register of the map, with stalls and without."""

import random

import cocotb
import pytest
from lockstep_isa.config import ABI_VERSION, ISA_VERSION
from lockstep_isa.registers import ADDRESS_BITS, BY_NAME, MAGIC, registers_of
from lockstep_rtl.control.registers import RegisterFile
from lockstep_rtl.generate import component_verilog
from rtl.axi_models import bench, never, small
from rtl.harness import parameters, run_cocotb, stalls

CONFIG = small(**parameters())
FILE, REGISTERS = RegisterFile(CONFIG), registers_of(CONFIG)
DECERR = 3


class Host:
    """An AXI4-Lite master: queues of reads and writes, answers in order. Address and data may come apart."""

    def __init__(self, dut, gap=never):
        self.dut, self.gap = dut, gap
        self.aw, self.w, self.ar, self.b, self.r = [], [], [], [], []
        self.shown = dict.fromkeys(("aw", "w", "ar"), False)
        self.strobes = []

    def drive(self):
        for channel, field in (("aw", "addr"), ("w", "data"), ("ar", "addr")):
            items = getattr(self, channel)
            if not self.shown[channel] and items and not self.gap():
                self.shown[channel] = True
                getattr(self.dut, f"bus_{channel}_{field}").value = items[0]
            getattr(self.dut, f"bus_{channel}_valid").value = self.shown[channel]
        self.open = {c: not self.gap() for c in ("b", "r")}
        for channel, is_open in self.open.items():
            getattr(self.dut, f"bus_{channel}_ready").value = is_open

    def sample(self):
        dut = self.dut
        for name in FILE.strobed:
            if int(getattr(dut, f"written_{name}").value):
                self.strobes.append((name, int(dut.write_data.value)))
        for channel in ("aw", "w", "ar"):
            if self.shown[channel] and int(getattr(dut, f"bus_{channel}_ready").value):
                getattr(self, channel).pop(0)
                self.shown[channel] = False
        if self.open["b"] and int(dut.bus_b_valid.value):
            self.b.append(int(dut.bus_b_resp.value))
        if self.open["r"] and int(dut.bus_r_valid.value):
            self.r.append((int(dut.bus_r_resp.value), int(dut.bus_r_data.value)))

    async def write(self, *accesses):
        """Write (address, data) pairs; their answers."""
        self.aw += [a for a, _ in accesses]
        self.w += [d for _, d in accesses]
        start = len(self.b)
        await self.bench.until(lambda: len(self.b) == start + len(accesses))
        return self.b[start:]

    async def read(self, *addresses):
        """(answer, data) of each address."""
        self.ar += addresses
        start = len(self.r)
        await self.bench.until(lambda: len(self.r) == start + len(addresses))
        return self.r[start:]


async def every_register(dut, gap):
    world = await bench(dut)
    host = world.add(Host(dut, gap))
    rand = random.Random(1)
    expected = {
        "MAGIC": MAGIC,
        "ABI_VERSION": ABI_VERSION,
        "ISA_VERSION": ISA_VERSION,
        "CONFIG_CRC": CONFIG.crc,
        "CONTROL": 0,
    }
    for name in FILE.driven:
        expected[name] = rand.randrange(1 << 32)
        getattr(dut, f"value_{name}").value = expected[name]
    for name in FILE.stored:
        expected[name] = rand.randrange(1 << 32)
    writes = [(r.address, expected[r.name] if r.name in FILE.stored else 0xFFFFFFFF) for r in REGISTERS]
    assert await host.write(*writes) == [0] * len(writes)
    names = [r.name for r in REGISTERS]
    rand.shuffle(names)
    for name, (answer, value) in zip(names, await host.read(*(BY_NAME[n].address for n in names)), strict=True):
        assert (answer, hex(value)) == (0, hex(expected[name])), name
    for name in FILE.stored:
        assert int(getattr(dut, name).value) == expected[name], f"{name} as the core sees it"
    assert sorted(host.strobes) == [("CONTROL", 0xFFFFFFFF), ("FLAGS", 0xFFFFFFFF)], "one pulse each"
    return host


@cocotb.test()
async def every_register_without_stalls(dut):
    await every_register(dut, never)


@cocotb.test()
async def every_register_with_stalls(dut):
    for seed in range(3):
        await every_register(dut, stalls(0.5, seed))


@cocotb.test()
async def addresses_beyond_the_map_answer_with_a_decode_error(dut):
    world = await bench(dut)
    host = world.add(Host(dut))
    beyond = range(4 * len(REGISTERS), 1 << ADDRESS_BITS, 4)
    assert await host.read(*beyond) == [(DECERR, 0)] * len(beyond)
    before = [int(getattr(dut, n).value) for n in FILE.stored]
    assert await host.write(*((a, 0x5A5A5A5A) for a in beyond)) == [DECERR] * len(beyond)
    assert before == [int(getattr(dut, n).value) for n in FILE.stored]
    assert not host.strobes


@pytest.mark.parametrize("zero_skipping", [False, True])
def test_registers_answer_axi_lite(zero_skipping):
    """With all of the map, and on a core that lacks the register of a feature."""
    given = {"zero_skipping": zero_skipping}
    file = RegisterFile(small(**given))
    run_cocotb(component_verilog(file, "top"), __name__, f"registers_{zero_skipping:d}", given)
