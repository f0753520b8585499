"""What the fast core predicts of programs with operands: their instructions take the cycles of what runs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from lockstep_driver import Device, open_device
from lockstep_driver.builder import ProgramBuilder
from lockstep_driver.device import Counters
from lockstep_driver.errors import DeviceError
from lockstep_isa.config import CoreConfig, preset
from lockstep_isa.errors import ErrorCode
from lockstep_isa.instructions import (
    LOAD,
    MATRIX,
    OPERANDS,
    STORE,
    VECTOR,
    Destination,
    Instruction,
    Memory,
    Source,
    Sparsity,
    Weights,
    resolve,
)
from lockstep_isa.program import Program

LIMIT = 96


@pytest.fixture(scope="module")
def device():
    with open_device("fast:laptop?memory=1M") as device:
        yield device


def program(config: CoreConfig) -> Program:
    """Load a block, pass over it and store it: everything in a variable number of words."""
    builder = ProgramBuilder(config)
    words = builder.operand("words", 0, LIMIT)
    transfer = {"memory": Memory.VECTOR, "words": 0, "words_operand": words}
    builder.emit(LOAD, address=1 << 16, **transfer)
    passed = {"source": Source.VECTOR, "destination": Destination.VECTOR, "tiles": 2, "x_stride": 200, "to": LIMIT}
    builder.emit(VECTOR, columns=0, columns_operand=words, to_stride=200, sum=1, **passed)
    builder.emit(STORE, address=1 << 17, bytes=1, **transfer)
    return builder.finish()


def unit_cycles(device: Device, program: Program, operands: dict[str, int]) -> dict[str, tuple[int, int]]:
    counters = device.run(program, operands)
    return {name: (unit["busy"], unit["wait_data"]) for name, unit in counters.units.items()}


@pytest.mark.parametrize("words", [1, 17, LIMIT])
def test_an_instruction_with_operands_takes_the_cycles_of_what_runs(device: Device, words: int) -> None:
    variable = program(device.config)
    fixed = Program(device.config.crc, tuple(resolve(i, (words,)) for i in variable.instructions))
    # Another time of the start is another phase of refresh, and so are the words of other instructions.
    assert unit_cycles(device, variable, {"words": words})["VECTOR"] == unit_cycles(device, fixed, {})["VECTOR"]
    difference = device.run(variable, {"words": words}).cycles - device.run(fixed).cycles
    assert 0 < difference < OPERANDS


def test_an_instruction_without_work_takes_next_to_no_time(device: Device) -> None:
    counters = device.run(program(device.config), {"words": 0})
    assert counters.instructions == 3
    assert counters.write_beats == 0
    assert all(unit["busy"] <= 3 for unit in counters.units.values())


def test_shapes_follow_code_that_changes_in_place(device: Device) -> None:
    def passes(columns: int) -> Program:
        builder = ProgramBuilder(device.config)
        builder.emit(VECTOR, source=Source.VECTOR, destination=Destination.NONE, columns=columns)
        return builder.finish()

    loaded = device.load(passes(10))
    before = device.run(loaded).cycles
    loaded.code.write(np.frombuffer(passes(60).encode(), np.uint8))
    assert device.run(loaded).cycles == before + 50


def test_a_word_of_bytes_takes_its_own_beats() -> None:
    for core, beats in (("tiny", 1), ("laptop", 1), ("ulx3s", 1), ("paper", 0.5)):
        config = preset(core)
        builder = ProgramBuilder(config)
        builder.emit(STORE, memory=Memory.VECTOR, words=24, address=4096, bytes=1)
        with open_device(f"fast:{core}?memory=1M") as device:
            assert device.run(builder.finish()).write_beats == 24 * beats


def test_operands_of_the_wrong_size_do_not_reach_other_programs(device: Device) -> None:
    """A descriptor without operands adds nothing, whatever the run before it was given."""
    device.run(program(device.config), {"words": LIMIT})
    variable = program(device.config)
    loaded = dataclasses.replace(device.load(variable), operands=())
    assert device.run(loaded).write_beats == 0
    assert MATRIX not in {i.type for i in variable.instructions}


@pytest.mark.parametrize(
    ("weights", "sparsity", "rate"),
    [
        (Weights.INT8, Sparsity.TWO_OF_FOUR, 2),
        (Weights.INT8, Sparsity.ONE_OF_FOUR, 4),
        (Weights.INT4_32, Sparsity.DENSE, 2),
        (Weights.INT4_128, Sparsity.TWO_OF_FOUR, 4),
        (Weights.INT4_64, Sparsity.ONE_OF_FOUR, 4),
    ],
)
@pytest.mark.parametrize("depth", [256, 128])
def test_packed_weights_take_the_steps_of_their_rate(
    device: Device, weights: Weights, sparsity: Sparsity, rate: int, depth: int
) -> None:
    def product(depth: int, **fields: int) -> Counters:
        builder = ProgramBuilder(device.config)
        builder.emit(MATRIX, depth=depth, outer=2, inner=3, **fields)
        columns = 3 * device.config.columns
        builder.emit(VECTOR, source=Source.ACCUMULATOR, destination=Destination.NONE, tiles=2, columns=columns)
        return device.run(builder.finish())

    dense, packed = product(depth // rate), product(depth, weights=weights, sparsity=sparsity)
    assert packed.mac_cycles == dense.mac_cycles == 6 * depth // rate
    assert packed.units["MATRIX"]["busy"] == dense.units["MATRIX"]["busy"] + 3
    assert packed.cycles == dense.cycles + 3


def test_packed_weights_of_few_steps_wait_for_the_columns(device: Device) -> None:
    """One step a tile, but results leave the array column by column."""
    builder = ProgramBuilder(device.config)
    builder.emit(MATRIX, depth=16, outer=4, weights=Weights.INT8, sparsity=Sparsity.ONE_OF_FOUR)
    builder.emit(VECTOR, source=Source.ACCUMULATOR, destination=Destination.NONE, tiles=4, columns=1)
    counters = device.run(builder.finish())
    assert counters.mac_cycles == 16
    assert counters.units["MATRIX"]["busy"] == 4 * device.config.columns + 3


def test_packed_weights_beyond_the_memory_stop_the_core(device: Device) -> None:
    """The last word counts, not the last input: 17 words for 32 inputs."""
    fields = {"depth": 32, "weights": Weights.INT4_32, "outer": 2, "a_outer": 32}
    drain = {"source": Source.ACCUMULATOR, "destination": Destination.NONE, "tiles": 2, "columns": 1}
    for w, fits in ((device.config.weight_words - 17, True), (device.config.weight_words - 16, False)):
        codes = Instruction(MATRIX, w=w, **fields), Instruction(VECTOR, **drain)
        program = Program(device.config.crc, codes)
        if fits:
            device.run(program)
        else:
            with pytest.raises(DeviceError) as error:
                device.run(program, check=False)
            assert error.value.code == ErrorCode.LOCAL_BOUNDS


def test_a_core_without_packed_weights_refuses_the_instruction() -> None:
    with open_device("fast:ulx3s?memory=1M") as device:
        for fields in ({"weights": Weights.INT4_32}, {"sparsity": Sparsity.TWO_OF_FOUR}):
            program = Program(device.config.crc, (Instruction(MATRIX, depth=32, **fields),))
            with pytest.raises(DeviceError) as error:
                device.run(program, check=False)
            assert error.value.code == ErrorCode.BAD_FIELD
