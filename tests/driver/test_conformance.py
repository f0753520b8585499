"""Every executor of programs passes the same conformance suite."""

from __future__ import annotations

import pytest
from cores import open_core
from lockstep_driver import open_device
from lockstep_driver.conformance import CHECKS, CheckResult, run_conformance

DEVICES = ["fast:tiny", "fast:laptop", "fast:ulx3s", "fast:wide", "rtl:tiny", "rtl:wide"]
SLOW_DEVICES = ["fast:paper", "rtl:laptop", "rtl:paper"]


@pytest.fixture(
    scope="module", params=[*DEVICES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_DEVICES)]
)
def results(request):
    """What the suite says of one device, by check."""
    with open_core(*request.param.split(":")) as device:
        return {r.name: r for r in run_conformance(device)}


@pytest.mark.parametrize("name", list(CHECKS))
def test_device_conforms(results: dict[str, CheckResult], name: str) -> None:
    assert results[name].failure is None, results[name].failure


def test_the_suite_finds_a_device_that_loses_a_bit() -> None:
    with open_device("fast:tiny?memory=4M") as device:
        run, memory = device._core.run, device._core.memory

        def lossy(cycles: int) -> int:
            """Whatever a run changed in memory loses its lowest bit, unless it is zero."""
            before = memory.copy()
            passed = run(cycles)
            memory[(before != memory) & (memory != 0)] &= 0xFE
            return passed

        device._core.run = lossy
        failed = {r.name for r in run_conformance(device) if r.failure}
    assert {"gives_the_golden_bits_on_random_programs", "loads_and_stores_what_it_was_given"} <= failed
