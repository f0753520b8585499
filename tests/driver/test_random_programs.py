"""Random programs leave the same bits in golden, fast core and RTL, and take about the predicted cycles."""

from __future__ import annotations

import numpy as np
import pytest
from cores import open_core
from lockstep_driver import Device
from lockstep_driver.random_programs import random_program, same_words
from lockstep_isa.config import PRESETS

#: Programs per core; a nightly run does more of them on all executors.
FAST_PROGRAMS, RTL_PROGRAMS = 500, 500


def differences(device: Device, seeds: range) -> tuple[list[str], list[int]]:
    """One line for each program whose result differs, and the cycles of all."""
    buffer = device.allocate(2 << 20)
    lines, cycles, skips = [], [], 0
    for seed in seeds:
        case = random_program(device.config, seed, buffer.address)
        buffer.write(case.memory)
        counters = device.run(case.program, case.operands, timeout=60)
        cycles.append(counters.cycles)
        start = case.result.start - buffer.address
        actual = buffer.data[start : start + case.result.stop - case.result.start].view(np.uint32)
        expected, skipped = case.golden(device.config)
        wrong = np.flatnonzero(~same_words(actual, expected))
        if wrong.size:
            at = wrong[0]
            lines.append(f"seed {seed}: {wrong.size} words, first {at}: {actual[at]:#010x} for {expected[at]:#010x}")
        if counters.skipped_chunks != skipped:
            lines.append(f"seed {seed}: {counters.skipped_chunks} chunks passed over for {skipped}")
        skips += skipped > 0
    device.free(buffer)
    assert not device.config.zero_skipping or skips > len(seeds) // 4, f"only {skips} of {len(seeds)} programs skip"
    return lines, cycles


@pytest.mark.parametrize("core", PRESETS)
def test_there_is_a_program_for_every_seed(core: str) -> None:
    for seed in range(100):
        assert random_program(PRESETS[core], seed, 0).program.instructions


@pytest.mark.parametrize("core", ["tiny", "laptop", "ulx3s", "wide"])
def test_fast_core_equals_golden(core: str) -> None:
    with open_core("fast", core) as device:
        lines, _ = differences(device, range(FAST_PROGRAMS if core != "ulx3s" else 100))
    assert not lines, "\n".join(lines)


@pytest.mark.parametrize("core", ["tiny", "wide", "laptop", pytest.param("ulx3s", marks=pytest.mark.slow)])
def test_rtl_equals_golden_in_the_predicted_time(core: str) -> None:
    seeds = range(RTL_PROGRAMS)
    with open_core("rtl", core) as device:
        lines, counted = differences(device, seeds)
    assert not lines, "\n".join(lines)
    with open_core("fast", core) as device:
        _, predicted = differences(device, seeds)
    # What the model leaves out are cycles in which a memory on chip is busy with something else. Whole models are
    # predicted to 1 %.
    error = np.abs(np.array(predicted) / np.array(counted) - 1)
    assert abs(sum(predicted) / sum(counted) - 1) < 0.01
    assert error.max() < 0.12, f"seed {error.argmax()}: {predicted[error.argmax()]} for {counted[error.argmax()]}"
