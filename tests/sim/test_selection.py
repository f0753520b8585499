"""Columns that a device selects and rows that it gathers by them: golden's, in the cycles that the formula gives."""

from __future__ import annotations

import numpy as np
import pytest
from cores import open_core
from lockstep_driver import Device
from lockstep_driver.builder import ProgramBuilder
from lockstep_driver.device import Counters
from lockstep_driver.errors import DeviceError
from lockstep_isa.config import CoreConfig
from lockstep_isa.errors import ErrorCode
from lockstep_isa.executor import GoldenCore
from lockstep_isa.instructions import INDEX_ENTRIES, LOAD, STORE, VECTOR, Instruction, Memory, Source, Unit
from lockstep_isa.program import Program
from lockstep_rtl.vector.timing import vector_cycles
from lockstep_sim.core import MemoryTiming

#: Greatest number of columns that is tried.
COLUMNS = 130


DEVICES = ["fast:tiny", "fast:laptop", "fast:wide", "fast:paper", "rtl:tiny", "rtl:wide"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest):
    with open_core(*request.param.split(":")) as device:
        yield device


def random_values(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Ordinary values, and ones that are equal, zeros, infinities and NaNs."""
    special = np.array([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 2.0**-126], np.float32)
    ordinary = rng.normal(0, 3, shape).astype(np.float32)
    return np.where(rng.random(shape) < rng.random() ** 2, rng.choice(special, shape), ordinary)


def random_fields(rng: np.random.Generator, rows: int) -> dict[str, int]:
    columns = int(rng.choice([1, 2, 3, 31, 64, int(rng.integers(1, COLUMNS + 1))]))
    select = int(rng.choice([1, columns, int(rng.integers(1, columns + 1))]))
    first, lane = int(rng.integers(0, select + 1)) // 2, int(rng.integers(0, rows))
    return {
        "columns": columns,
        "select": select,
        "select_to": int(rng.integers(0, INDEX_ENTRIES - select + 1)),
        "select_lane": lane,
        "select_more_lanes": int(rng.integers(0, rows - lane)),
        "select_first": first,
        "select_last": int(rng.integers(0, select - first + 1)) // 2,
    }


def first_lanes(memory: np.ndarray, config: CoreConfig) -> np.ndarray:
    """The first value of each VECTOR word in uint8[bytes]."""
    return memory.view(np.float32).reshape(-1, config.rows)[:, 0].copy()


def test_selected_rows_are_those_of_golden_in_the_cycles_of_the_formula(device: Device) -> None:
    config, rng = device.config, np.random.default_rng(5)
    word = config.vector_word_bytes
    values, table, result = (device.allocate(n * COLUMNS * word) for n in (1, 2, 1))
    # Each row of the table begins with its number.
    table.write(np.repeat(np.arange(2 * COLUMNS, dtype=np.float32), config.rows))
    for _ in range(40):
        fields = random_fields(rng, config.rows)
        values.write(random_values(rng, (COLUMNS, config.rows)))
        result.write(np.zeros(COLUMNS * config.rows, np.float32))
        builder = ProgramBuilder(config)
        builder.emit(LOAD, memory=Memory.VECTOR, words=fields["columns"], address=values.address)
        at = builder.emit(VECTOR, source=Source.VECTOR, **fields)
        gather = {"gather": 1, "gather_from": fields["select_to"], "rows": fields["select"], "stride": 2 * word}
        builder.emit(LOAD, memory=Memory.VECTOR, address=table.address, local_stride=1, **gather)
        builder.emit(STORE, memory=Memory.VECTOR, words=fields["select"], address=result.address)
        program = builder.finish()
        golden = GoldenCore(config, device.memory_at(0, device.memory_bytes).copy())
        golden.run(program)
        counters = device.run(program, timeout=60)
        assert counters.units["VECTOR"]["busy"] == vector_cycles(config, program.instructions[at]), f"{fields}"
        found = first_lanes(result.data, config)
        expected = first_lanes(golden.memory[result.address :][: result.data.size], config)
        assert (found == expected).all(), f"{fields}: {found} instead of {expected}"
    for buffer in (values, table, result):
        device.free(buffer)


@pytest.mark.parametrize("name", DEVICES)
def test_a_gather_takes_the_cycles_of_a_block_with_a_stride(name: str) -> None:
    """Rows of one and a half bursts, one behind the other or wherever the list has them: 4 cycles more in all."""
    scheme, core = name.split(":")
    with open_core(scheme, core, timing=MemoryTiming(refresh_interval=0)) as device:
        config, rows = device.config, 12
        words = 3 * 32 * config.bus_bytes // 2 // config.rows
        block = {"memory": Memory.WEIGHT, "rows": rows, "words": words, "stride": 2 * 32 * config.bus_bytes}
        select = {"source": Source.VECTOR, "columns": 3 * rows, "select": rows}

        def counted(**fields: int) -> Counters:
            instructions = [Instruction(VECTOR, **select, select_first=rows)]
            instructions += [Instruction(VECTOR, **select, select_last=rows, select_to=rows, signal=1 << Unit.LOAD)]
            instructions += [Instruction(LOAD, **block, **fields, wait=1 << Unit.VECTOR)]
            return device.run(Program(config.crc, tuple(instructions)))

        strided, same, others = counted(), counted(gather=1), counted(gather=1, gather_from=rows)
    assert strided.read_beats == same.read_beats == others.read_beats
    assert same.cycles == others.cycles == strided.cycles + 4


@pytest.mark.parametrize(
    ("instruction", "unit"),
    [
        (Instruction(LOAD, memory=Memory.VECTOR, rows=2, gather=1, gather_from=INDEX_ENTRIES - 1), "LOAD"),
        (Instruction(VECTOR, source=Source.VECTOR, columns=4, select=4, select_to=INDEX_ENTRIES - 3), "VECTOR"),
        (Instruction(VECTOR, source=Source.VECTOR, columns=INDEX_ENTRIES + 1, select=4), "VECTOR"),
    ],
)
def test_entries_beyond_the_index_memory_stop_the_core(device: Device, instruction: Instruction, unit: str) -> None:
    with pytest.raises(DeviceError) as error:
        device.run(Program(device.config.crc, (instruction,)), check=False)
    assert (error.value.code, error.value.unit, error.value.instruction) == (ErrorCode.LOCAL_BOUNDS, unit, 0)
    device.run(Program(device.config.crc, (Instruction(LOAD, memory=Memory.VECTOR),)))


def test_a_gathered_row_outside_the_window_stops_the_core(device: Device) -> None:
    builder = ProgramBuilder(device.config)
    builder.emit(VECTOR, source=Source.VECTOR, columns=9, select=2, select_last=2)
    stride = device.memory_bytes // 8
    builder.emit(LOAD, memory=Memory.VECTOR, rows=2, gather=1, stride=stride)
    with pytest.raises(DeviceError) as error:
        device.run(builder.finish(), check=False)
    found = (error.value.code, error.value.unit, error.value.instruction, error.value.address)
    assert found == (ErrorCode.OUT_OF_WINDOW, "LOAD", 1, 8 * stride)
