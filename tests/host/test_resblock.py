"""The transformer blocks of the benchmarks: golden bits on every core, and an array that does not wait."""

from __future__ import annotations

import numpy as np
import pytest
from lockstep.bench.resblock.block import build_block, execute, run_block
from lockstep.bench.resblock.emitter import early_pieces
from lockstep.bench.resblock.reference import Kind
from lockstep_driver import Device, open_device
from lockstep_isa.config import preset
from lockstep_isa.instructions import LOAD, MATRIX, Memory

KINDS: tuple[Kind, ...] = ("mha", "ffn")
SMALL = {"d_model": 64, "heads": 2, "d_ff": 128}


def check(device: Device, kind: Kind, **sizes: int) -> int:
    """Run a block; every value must be the golden one, and every multiply-accumulate counted. Returns the cycles."""
    block = build_block(device.config, kind, **sizes)
    counters, results = execute(device, block)
    for name in ("values", "q", "s"):
        found, golden = getattr(results, name), getattr(block.expected, name)
        wrong = np.argwhere(found != golden)
        assert not len(wrong), f"{name}{tuple(wrong[0])}: {found[tuple(wrong[0])]}, golden {golden[tuple(wrong[0])]}"
    assert run_block(device, block)[1]
    assert counters.mac_cycles >= block.limit_cycles
    return counters.cycles


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "sizes",
    [
        {"seq": 16, **SMALL},
        {"seq": 3, **SMALL},
        {"seq": 13, "d_model": 96, "heads": 3, "d_ff": 200},
        {"seq": 4, "d_model": 80, "heads": 4, "d_ff": 100},
        {"seq": 6, "d_model": 128, "heads": 1, "d_ff": 64},
        {"seq": 5, "d_model": 256, "heads": 4, "d_ff": 448},
        {"seq": 9, "parts": 1, **SMALL},
        {"seq": 5, "d_model": 200, "heads": 4, "d_ff": 520, "parts": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("core", ["fast:tiny", "fast:laptop", "fast:paper"])
def test_any_sizes_give_golden_bits(core: str, kind: Kind, sizes: dict[str, int]) -> None:
    with open_device(core) as device:
        check(device, kind, **sizes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seq", [16, 7])
def test_the_rtl_gives_golden_bits(kind: Kind, seq: int) -> None:
    with open_device("rtl:tiny") as device:
        check(device, kind, seq=seq, **SMALL)


@pytest.mark.parametrize(("kind", "published"), [("mha", 21_344), ("ffn", 42_099)])
def test_full_size_on_paper_beats_the_published_cycles(kind: Kind, published: int) -> None:
    with open_device("fast:paper") as device:
        assert check(device, kind) < published


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_rtl_of_paper_takes_the_predicted_cycles(kind: Kind) -> None:
    with open_device("rtl:paper") as core, open_device("fast:paper") as model:
        counted, predicted = check(core, kind), check(model, kind)
    assert abs(counted - predicted) < 0.002 * predicted


@pytest.mark.parametrize(("kind", "cycles"), [("mha", 1_200), ("ffn", 370)])
def test_a_second_part_hides_the_quantisation(kind: Kind, cycles: int) -> None:
    """It saves 1,242 cycles in mha and 387 in ffn."""
    with open_device("fast:paper") as device:
        assert check(device, kind, parts=2) + cycles < check(device, kind, parts=1)


def test_a_wrong_weight_is_noticed() -> None:
    block = build_block(preset("tiny"), "ffn", seq=4, **SMALL)
    with open_device("fast:tiny") as device:
        assert run_block(device, block)[1]
        first = next(i for i in block.program.instructions if i.type is LOAD and i.memory == Memory.WEIGHT)
        block.image[first.address] ^= 0x40
        assert not run_block(device, block)[1]


def test_the_first_product_is_formed_in_pieces_only_where_they_add_up_exactly() -> None:
    config = preset("paper")
    light = np.full((64, 512), 64, np.int8)
    assert early_pieces(config, light) == (64, 128, 256, 64)
    assert early_pieces(config, np.full((64, 2048), 127, np.int8)) == (2048,)
    assert early_pieces(config, light[:, :64]) == (64,)
    program = build_block(config, "mha").program
    depths = [i.depth for i in program.instructions if i.type is MATRIX]
    assert depths[:4] == [64, 128, 256, 64]


def test_limits_are_those_of_the_array() -> None:
    config = preset("paper")
    assert build_block(config, "mha").limit_cycles == 17_408
    block = build_block(config, "ffn")
    assert block.limit_cycles == 32_768
    assert block.formula == "2 seq d_model d_ff / 4096 = 32,768"


@pytest.mark.parametrize("sizes", [{"seq": 0}, {"heads": 3}, {"d_model": 0}, {"parts": 3}])
def test_sizes_that_make_no_block_are_named(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(sizes))):
        build_block(preset("tiny"), "mha", **sizes)
