"""The FIFO with a turning head against Amaranth's own, cycle by cycle."""

import random

import pytest
from amaranth.hdl import Module
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.sim import Simulator
from lockstep_rtl.fifo import HeadFIFO

CYCLES = 3000


@pytest.mark.parametrize("depth", [2, 3, 4, 8])
@pytest.mark.parametrize(("writing", "reading"), [(1, 1), (0.5, 0.5), (0.9, 0.2), (0.2, 0.9)])
def test_it_does_what_amaranths_fifo_does(depth: int, writing: float, reading: float) -> None:
    m = Module()
    m.submodules.fifo = fifo = HeadFIFO(width=16, depth=depth)
    m.submodules.reference = reference = SyncFIFOBuffered(width=16, depth=depth)
    seen = 0

    async def drive(context) -> None:
        nonlocal seen
        draw = random.Random(depth)
        for cycle in range(CYCLES):
            enables = (draw.random() < writing, draw.random() < reading)
            for one in (fifo, reference):
                context.set(one.w_data, cycle)
                context.set(one.w_en, enables[0])
                context.set(one.r_en, enables[1])
            states = [[context.get(s) for s in (one.w_rdy, one.r_rdy, one.level)] for one in (fifo, reference)]
            assert states[0] == states[1], f"cycle {cycle}"
            if states[0][1]:
                assert context.get(fifo.r_data) == context.get(reference.r_data), f"cycle {cycle}"
                seen += enables[1]
            await context.tick()

    simulator = Simulator(m)
    simulator.add_clock(1e-6)
    simulator.add_testbench(drive)
    simulator.run()
    assert seen > CYCLES // 10


def test_a_fifo_of_one_entry_is_refused() -> None:
    with pytest.raises(ValueError, match="no room"):
        HeadFIFO(width=8, depth=1)
