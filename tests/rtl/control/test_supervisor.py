"""The supervisor: the first error wins, the watchdog, a reset that waits for the bus, every cycle counted once."""

import random

import cocotb
from lockstep_isa.config import preset
from lockstep_isa.errors import CONTROL_UNIT, ErrorCode
from lockstep_isa.instructions import Unit
from lockstep_isa.registers import UNIT_COUNTERS, core_counters
from lockstep_rtl.control.supervisor import REPORTERS, Supervisor
from lockstep_rtl.generate import component_verilog
from rtl.axi_models import Probe, bench
from rtl.harness import run_cocotb

COUNTERS = core_counters(preset("tiny"))
EVENTS = COUNTERS[1:]
STATES = [n for n, _ in UNIT_COUNTERS]


def report(dut, name, code, address=0, index=0):
    """Drive one reporter; code 0 withdraws."""
    for port, value in (("error", bool(code)), ("code", code), ("address", address), ("index", index)):
        getattr(dut, f"{port}_{name}").value = value


def error(dut):
    return tuple(int(getattr(dut, f"error_{f}").value) for f in ("code", "unit", "index", "address"))


def count(dut, name):
    return int(getattr(dut, f"count_{name}").value)


@cocotb.test()
async def the_first_error_wins_and_halts(dut):
    for number, name in enumerate(REPORTERS):
        world = await bench(dut)
        assert not int(dut.halt.value)
        code = 1 + number
        report(dut, name, code, 0x1000 + number, 77 + number)
        await world.step()
        assert int(dut.halt.value)
        report(dut, name, 0)
        for other in REPORTERS:
            report(dut, other, ErrorCode.BUS_WRITE, 5, 6)
        await world.step(3)
        assert error(dut) == (code, number, 77 + number, 0x1000 + number)
        for other in REPORTERS:
            report(dut, other, 0)


@cocotb.test()
async def the_watchdog_counts_cycles_without_progress(dut):
    world = await bench(dut)
    dut.watchdog.value, dut.busy.value = 20, 1
    dut.index_vector.value, dut.running_vector.value, dut.stalled_vector.value = 9, 1, 1
    for _ in range(5):
        dut.progress.value = 0
        await world.step(19)
        dut.progress.value = 1
        await world.step()
    assert error(dut)[0] == ErrorCode.NONE
    dut.progress.value = 0
    await world.step(22)  # progress is looked at a cycle later
    assert error(dut)[:3] == (ErrorCode.WATCHDOG, Unit.VECTOR, 9), "the unit with an instruction is to blame"


@cocotb.test()
async def the_watchdog_sleeps_where_nothing_runs_and_where_it_is_off(dut):
    world = await bench(dut)
    dut.watchdog.value = 5
    await world.step(50)
    dut.watchdog.value, dut.busy.value = 0, 1
    await world.step(50)
    assert error(dut)[0] == ErrorCode.NONE
    dut.watchdog.value, dut.index_control.value = 5, 33
    await world.step(2)
    assert error(dut)[:3] == (ErrorCode.WATCHDOG, CONTROL_UNIT, 33), "no unit has an instruction"


@cocotb.test()
async def a_soft_reset_waits_for_a_quiet_bus(dut):
    world = await bench(dut)
    report(dut, "load", ErrorCode.BUS_READ, 3)
    await world.step()
    report(dut, "load", 0)
    probe = world.add(Probe(dut, "soft_reset", "halt"))
    dut.reset_request.value = 1
    await world.step()
    dut.reset_request.value = 0
    await world.step(25)
    assert not probe.count("soft_reset")
    assert all(probe.values["halt"])
    dut.bus_quiet.value = 1
    await world.step(6)
    assert probe.count("soft_reset") == 1, "one pulse"
    assert error(dut)[0] == ErrorCode.NONE
    assert not int(dut.halt.value)
    assert not int(dut.error_address.value)


@cocotb.test()
async def every_cycle_counts_in_one_state_of_each_unit(dut):
    world = await bench(dut)
    rand = random.Random(1)
    expected = {}

    def step(name, amount=1):
        expected[name] = expected.get(name, 0) + amount

    for _ in range(600):
        busy = rand.random() < 0.9
        dut.busy.value, dut.progress.value = busy, 1
        events = rand.randrange(1 << len(EVENTS))
        dut.events.value = events
        step("CYCLES", busy)
        for n, name in enumerate(EVENTS):
            step(name, events >> n & 1)
        for unit in Unit:
            flags = {s: rand.random() < 0.5 for s in ("running", "stalled", "waiting")}
            for state, value in flags.items():
                getattr(dut, f"{state}_{unit.name.lower()}").value = value
            if flags["running"]:
                state = "WAIT_DATA" if flags["stalled"] else "BUSY"
            else:
                state = "WAIT_TOKEN" if flags["waiting"] else "IDLE"
            step(f"{unit.name}_{state}", busy)
        await world.step()
    found = {name: count(dut, name) for name in expected}
    assert found == expected, {n: (found[n], expected[n]) for n in expected if found[n] != expected[n]}
    for unit in Unit:
        assert sum(count(dut, f"{unit.name}_{s}") for s in STATES) == count(dut, "CYCLES")
    dut.busy.value, dut.events.value, dut.clear_counters.value = 1, 0, 1
    await world.step()
    dut.clear_counters.value, dut.busy.value = 0, 0
    await world.step(2)
    assert not any(count(dut, name) for name in expected)


def test_supervisor_stops_resets_and_counts():
    run_cocotb(component_verilog(Supervisor(COUNTERS), "top"), __name__, "supervisor")
