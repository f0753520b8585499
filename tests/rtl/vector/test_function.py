"""The function stage against golden: every committed table, every function without one, at nasty arguments."""

import cocotb
import numpy as np
from amaranth.hdl import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from cocotb.triggers import FallingEdge
from lockstep_isa import numerics
from lockstep_isa.instructions import TABLE_ENTRIES, Function
from lockstep_isa.tables import FUNCTIONS
from lockstep_rtl.vector.function import FunctionStage, function_mode
from lockstep_rtl.vector.function_table import ENTRY_BITS
from rtl.harness import assert_equal, run_cocotb, stalls, start, stream_through
from rtl.vector.floats import nasty_words

COUNT = 4000
KINDS = {
    "exp2": Function.EXP2,
    "recip": Function.RECIP,
    "rsqrt": Function.RSQRT,
    "relu_minus": Function.RELU_MINUS,
    "odd": Function.ODD,
    "sigmoid": Function.SIGMOID,
}


class Bench(wiring.Component):
    """A FunctionStage with its function, table slot and k as ports, like the fields of an instruction."""

    function: In(4)
    table: In(2)
    shift: In(4)
    x: In(32)
    scale: In(32)
    enables: In(29)
    write_enable: In(1)
    write_address: In(9)
    write_data: In(ENTRY_BITS)
    z: Out(32)

    def elaborate(self, platform):
        m = Module()
        m.submodules.stage = stage = FunctionStage()
        time = Signal(6)
        m.d.sync += time.eq(time + 1)
        m.d.comb += [
            stage.mode.eq(function_mode(m, self)),
            stage.x.eq(self.x),
            stage.scale.eq(self.scale),
            stage.valid.eq(self.enables),
            stage.time.eq(time),
            stage.write_enable.eq(self.write_enable),
            stage.write_address.eq(self.write_address),
            stage.write_data.eq(self.write_data),
            self.z.eq(stage.z),
        ]
        return m


async def load(dut, slot, table):
    """Fill a slot: c0 as it is, the top 24 bits of c1, the top 16 bits of c2."""
    c0, c1, c2 = (numerics.bits(c).tolist() for c in (table.c0, table.c1, table.c2))
    dut.write_enable.value = 1
    for entry in range(table.entries):
        dut.write_address.value = slot * TABLE_ENTRIES + entry
        dut.write_data.value = c0[entry] | c1[entry] >> 8 << 32 | c2[entry] >> 16 << 56
        await FallingEdge(dut.clk)
    dut.write_enable.value = 0


def arguments(random, table=None):
    """Words of every class, and values around the segments of a table."""
    near = (random.uniform(-1.2, 1.2, COUNT) * float(table.limit if table else 4)).astype(np.float32)
    ties = (random.integers(-300, 300, COUNT) / 64).astype(np.float32)
    return np.concatenate([nasty_words(random, COUNT), near.view(np.uint32), ties.view(np.uint32)])


async def evaluate(dut, function, x, gap):
    dut.function.value = function
    return np.array(await stream_through(dut, FunctionStage.LATENCY, {"x": x}, "z", gap), np.uint32)


@cocotb.test()
async def tables_equal_golden(dut):
    await start(dut)
    random = np.random.default_rng(11)
    for slot, (name, table) in enumerate(FUNCTIONS.items()):
        slot %= 4
        await load(dut, slot, table)
        dut.table.value, dut.shift.value = slot, table.k
        x = arguments(random, table)
        result = await evaluate(dut, KINDS[table.kind], x, stalls(0 if slot % 2 else 0.3, slot))
        expected = numerics.bits(numerics.evaluate(table, x.view(np.float32)))
        assert_equal(result, expected, name, x=x)


@cocotb.test()
async def exp2_takes_its_integer_scale_in_full(dut):
    await start(dut)
    random = np.random.default_rng(12)
    table = FUNCTIONS["exp2"]
    await load(dut, 2, table)
    dut.table.value = 2
    x = np.float32(random.uniform(-200, 200, 60))
    for scale in (0, 1, -1, 127, -130, 32000, -32000, -(2**20), 2**31 - 1, -(2**31)):
        dut.scale.value = scale & 0xFFFFFFFF
        # Around the scale, so that some results are finite.
        z = np.clip(x + np.float32(np.clip(scale, -31000, 31000)), -32000, 32000).astype(np.float32)
        result = await evaluate(dut, Function.EXP2, z.view(np.uint32), stalls(0))
        m, n = numerics.exp2_parts(z)
        expected = numerics.bits(numerics.scale2(m, n.astype(np.int64) - scale))
        assert_equal(result, expected, f"exp2 scaled by 2^-({scale})", x=z)


@cocotb.test()
async def functions_without_a_table_equal_golden(dut):
    await start(dut)
    x = arguments(np.random.default_rng(13))
    value = x.view(np.float32)
    for function, expected in (
        (Function.NONE, x),
        (Function.RELU, numerics.bits(numerics.relu(value))),
        (Function.SCORE, numerics.bits(numerics.clamp_score(value))),
    ):
        assert_equal(await evaluate(dut, function, x, stalls(0.1)), expected, function.name, x=x)


def test_functions_equal_golden():
    run_cocotb(Bench, __name__, "function_stage")
