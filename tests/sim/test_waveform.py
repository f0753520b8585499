"""Waveforms: a traced core computes as ever, and writes a file that viewers read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from lockstep_driver import open_device
from lockstep_driver.builder import ProgramBuilder
from lockstep_isa.instructions import LOAD, STORE, Memory

#: First byte of the header block of an FST file, and the bytes of that block.
FST_HEADER = (0, 329)


@pytest.mark.slow
def test_a_traced_core_computes_and_writes_a_waveform(tmp_path: Path) -> None:
    wave = tmp_path / "run.fst"
    with open_device(f"rtl:tiny?memory=1M&wave={wave}") as device:
        source, target = device.allocate(256), device.allocate(256)
        source.write(np.arange(64, dtype=np.float32))
        builder = ProgramBuilder(device.config)
        builder.emit(LOAD, memory=Memory.VECTOR, words=16, address=source.address)
        builder.emit(STORE, memory=Memory.VECTOR, words=16, address=target.address)
        device.run(builder.finish())
        np.testing.assert_array_equal(target.data, source.data)
    content = wave.read_bytes()
    assert (content[0], int.from_bytes(content[1:9], "big")) == FST_HEADER
