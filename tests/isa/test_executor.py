"""The golden executor's masks, integers and bytes, against their definitions written out element by element."""

from __future__ import annotations

import numpy as np
import pytest
from lockstep_isa import numerics
from lockstep_isa.config import preset
from lockstep_isa.executor import GoldenCore
from lockstep_isa.instructions import (
    STORE,
    TABLE_ENTRIES,
    VECTOR,
    Destination,
    Function,
    Instruction,
    Mask,
    Maximum,
    Memory,
    SecondAdd,
    Source,
)
from lockstep_isa.tables import FUNCTIONS

from tests.support import assert_same_bits

CONFIG = preset("tiny")
ROWS = CONFIG.rows


def a_core(memory: int = 4096) -> GoldenCore:
    core = GoldenCore(CONFIG, np.full(memory, 0xA5, np.uint8))
    exp2 = FUNCTIONS["exp2"]
    for column, values in enumerate((exp2.c0, exp2.c1, exp2.c2)):
        core.table[: exp2.entries, column] = values
    assert len(core.table) >= TABLE_ENTRIES
    return core


@pytest.mark.parametrize("window", [0, 1, 3, 100])
@pytest.mark.parametrize("first_row", [0, -3, 7, -100, 500, 2**19 - 1, -(2**19)])
def test_a_causal_mask_hides_what_is_ahead_and_what_is_behind_the_window(first_row: int, window: int) -> None:
    tiles, columns = 3, 10
    core = a_core()
    scores = np.random.default_rng(1).normal(0, 100, (tiles * columns, ROWS)).astype(np.float32)
    scores[4, 1], scores[7, 2] = np.nan, np.inf
    core.vector[: len(scores)] = scores
    core.execute(
        Instruction(
            VECTOR,
            source=Source.VECTOR,
            destination=Destination.VECTOR,
            function=Function.SCORE,
            maximum=Maximum.EXPONENT,
            mask=Mask.CAUSAL,
            first_row=first_row % (1 << 20),
            window=window,
            tiles=tiles,
            columns=columns,
            x_stride=columns,
            to=1000,
            to_stride=columns,
        )
    )
    expected = np.zeros_like(scores)
    greatest = np.full((tiles, ROWS), -32000, np.int32)
    for tile in range(tiles):
        for lane in range(ROWS):
            position = first_row + tile * ROWS + lane
            for column in range(columns):
                sees = column <= position and (window == 0 or column > position - window)
                score = numerics.clamp_score(scores[tile * columns + column, lane])
                expected[tile * columns + column, lane] = score if sees else -np.inf
                if sees:
                    power = numerics.exp2_parts(score.reshape(1))[1][0]
                    greatest[tile, lane] = max(greatest[tile, lane], power)
    assert_same_bits(core.vector[1000 : 1000 + len(scores)], expected)
    assert_same_bits(core.parameter[:tiles].view(np.int32), greatest)


@pytest.mark.parametrize("power", [0, -32000, -40000, 2**31 - 1, -(2**31)])
def test_a_hidden_score_has_no_weight_whatever_the_greatest_exponent(power: int) -> None:
    core = a_core()
    core.vector[0] = [-np.inf, -32000, 0, np.nan]
    core.parameter[5] = np.full(ROWS, power, np.int32).view(np.float32)
    core.execute(
        Instruction(VECTOR, source=Source.VECTOR, destination=Destination.VECTOR, function=Function.EXP2, lane0=5, to=1)
    )
    assert_same_bits(core.vector[1, :1], np.float32([0]))
    assert np.isnan(core.vector[1, 3])
    if power == -32000:
        assert core.vector[1, 1] == 1.0


def test_integers_become_fp32_and_y_is_added_behind_the_multipliers() -> None:
    core = a_core()
    integers = np.array([[0, -1, 1, -32000], [2**24 + 1, -(2**31), 2**31 - 1, 5]], np.int32)
    core.parameter[3:5] = integers.view(np.float32)
    core.vector[8:10] = y = np.float32([[0.5, 1, 2, 0.25], [1, 2, 3, 4]])
    passed = {"source": Source.INTEGER, "destination": Destination.VECTOR, "columns": 2, "x": 3, "to": 0}
    core.execute(Instruction(VECTOR, **passed))
    assert_same_bits(core.vector[:2], integers.astype(np.float32))
    core.execute(Instruction(VECTOR, add2=SecondAdd.Y, y=8, **passed))
    assert_same_bits(core.vector[:2], integers.astype(np.float32) + y)


@pytest.mark.parametrize("columns", [3, 4, 10])
def test_bytes_and_transposed_bytes_lie_in_the_low_byte_of_each_lane(columns: int) -> None:
    core = a_core()
    values = np.random.default_rng(2).integers(-128, 128, (columns, ROWS))
    core.vector[:columns] = values
    core.vector[100:200] = np.nan
    passed = {"source": Source.VECTOR, "columns": columns, "to": 100, "to_group": 20}
    core.execute(Instruction(VECTOR, destination=Destination.BYTES, **passed))
    assert_same_bits(core.vector[100 : 100 + columns].view(np.uint32), (values & 255).astype(np.uint32))
    core.execute(Instruction(VECTOR, destination=Destination.BYTES_TRANSPOSED, **passed))
    for group in range(-(-columns // ROWS)):
        for lane in range(ROWS):
            for n in range(ROWS):
                column = group * ROWS + n
                expected = values[column, lane] & 255 if column < columns else 0
                assert core.vector[100 + 20 * group + lane].view(np.uint32)[n] == expected


@pytest.mark.parametrize("lane_bytes", [1, 4])
@pytest.mark.parametrize("lane", range(ROWS))
def test_a_store_leaves_lanes_of_its_first_row_alone(lane_bytes: int, lane: int) -> None:
    core = a_core()
    rows, words, stride = 2, 3, 64
    core.vector[:8] = np.random.default_rng(3).normal(size=(8, ROWS))
    lanes = core.vector.view(np.uint8).reshape(-1, ROWS, 4)
    core.execute(
        Instruction(
            STORE,
            memory=Memory.VECTOR,
            rows=rows,
            words=words,
            address=256,
            stride=stride,
            local=1,
            local_stride=4,
            bytes=lane_bytes == 1,
            lane=lane,
        )
    )
    expected = np.full(4096, 0xA5, np.uint8)
    for row in range(rows):
        for word in range(words):
            for r in range(lane if row == 0 else 0, ROWS):
                at = 256 + row * stride + (word * ROWS + r) * lane_bytes
                expected[at : at + lane_bytes] = lanes[1 + 4 * row + word, r, :lane_bytes]
    assert_same_bits(core.memory, expected)
