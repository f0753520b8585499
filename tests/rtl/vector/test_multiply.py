"""FloatMultiply against the contract, one product per cycle, with and without gaps."""

import cocotb
import numpy as np
from lockstep_rtl.vector.fp import FloatMultiply
from rtl.harness import ROOT, assert_equal, run_cocotb, stalls, start, stream_through

CORNERS = ROOT / "tests" / "data" / "ftz_corner_vectors.npz"


async def corner_products(dut, gap):
    await start(dut)
    corners = np.load(CORNERS)
    a, b = corners["a"].view(np.uint32), corners["b"].view(np.uint32)
    z = await stream_through(dut, FloatMultiply.LATENCY, {"a": a, "b": b}, "z", gap)
    assert_equal(z, corners["expected_after_rounding"].view(np.uint32), "product", a=a, b=b)


@cocotb.test()
async def corner_products_flush_after_rounding(dut):
    await corner_products(dut, stalls(0))


@cocotb.test()
async def corner_products_survive_gaps(dut):
    await corner_products(dut, stalls(0.4))


def test_products_agree_with_the_contract():
    run_cocotb(FloatMultiply, __name__, "float_multiply")
