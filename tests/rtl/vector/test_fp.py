"""The floating-point pipelines against the golden numerics: one result per cycle, with and without gaps."""

import cocotb
import numpy as np
import pytest
from lockstep_isa import numerics
from lockstep_rtl.vector import fp
from rtl.harness import ROOT, assert_equal, parameters, run_cocotb, stalls, start, stream_through
from rtl.vector.floats import nasty_words

CORNERS = ROOT / "tests" / "data" / "ftz_corner_vectors.npz"
COUNT = 12000


def words(values):
    return numerics.bits(values)


def cases(name, random):
    """(inputs by port, expected words) for one pipeline."""
    a, b = nasty_words(random, COUNT), nasty_words(random, COUNT)
    if name == "FloatMultiply":
        corners = np.load(CORNERS)
        a = np.concatenate([a, corners["a"].view(np.uint32)])
        b = np.concatenate([b, corners["b"].view(np.uint32)])
        bypass = random.random(len(a)) < 0.2
        z = words(numerics.mul(a.view(np.float32), b.view(np.float32)))
        return {"a": a, "b": b, "bypass": bypass}, np.where(bypass, a, z)
    if name == "FloatAdd":
        # Half of the pairs nearly cancel: the same magnitude but for some low bits or a small step of the exponent.
        near = a ^ np.uint32(1 << 31) ^ random.integers(0, 1 << 8, COUNT, np.uint32)
        near += random.integers(0, 3, COUNT, np.uint32) << np.uint32(23)
        b = np.where(random.random(COUNT) < 0.5, near, b)
        bypass = random.random(COUNT) < 0.2
        z = words(numerics.add(a.view(np.float32), b.view(np.float32)))
        return {"a": a, "b": b, "bypass": bypass}, np.where(bypass, a, z)
    if name == "IntToFloat":
        a = random.integers(-(2**31), 2**31, COUNT) >> random.integers(0, 32, COUNT)
        a[:5] = 0, -1, -(2**31), 2**31 - 1, 2**24 + 1
        bypass = np.zeros(COUNT, bool)
        return {"a": a.astype(np.int32).view(np.uint32), "bypass": bypass}, words(numerics.int_to_float(a))
    whole = random.integers(-(2**23), 2**23, COUNT) >> random.integers(0, 24, COUNT)
    halves = (whole + random.integers(0, 4, COUNT) / 4).astype(np.float32)
    a = np.concatenate([a, words(halves)])
    return {"a": a}, numerics.round_to_int8bits(a.view(np.float32))


async def agrees(dut, gap):
    await start(dut)
    name = parameters()["component"]
    inputs, expected = cases(name, np.random.default_rng(7))
    result = await stream_through(dut, getattr(fp, name).LATENCY, inputs, "z", gap)
    assert_equal(np.array(result, np.uint32), expected.astype(np.uint32), name, **inputs)


@cocotb.test()
async def full_rate(dut):
    await agrees(dut, stalls(0))


@cocotb.test()
async def with_gaps(dut):
    await agrees(dut, stalls(0.4))


@cocotb.test()
async def int_to_float_bypass_is_untouched(dut):
    if parameters()["component"] != "IntToFloat":
        return
    await start(dut)
    a = np.random.default_rng(8).integers(0, 2**32, 500, np.uint32)
    result = await stream_through(dut, fp.IntToFloat.LATENCY, {"a": a, "bypass": np.ones(500, bool)}, "z", stalls(0))
    assert_equal(np.array(result, np.uint32), a, "bypassed word")


@pytest.mark.parametrize("component", [fp.FloatMultiply, fp.FloatAdd, fp.IntToFloat, fp.RoundToInt8])
def test_pipeline_agrees_with_golden(component):
    run_cocotb(component, __name__, f"fp_{component.__name__}", {"component": component.__name__})
