"""Which chunks a product passes over: by hand, chunk by chunk, and never to be seen in its bits."""

from __future__ import annotations

import numpy as np
import pytest
from lockstep_isa.config import ConfigurationError, CoreConfig, preset
from lockstep_isa.executor import GoldenCore
from lockstep_isa.instructions import LOAD, MATRIX, VECTOR, Destination, Instruction, Memory, Source, Sparsity, Weights
from lockstep_isa.registers import core_counters, registers_of
from lockstep_isa.zero_skipping import may_skip, skipped_chunks

TINY = preset("tiny")
R = TINY.rows


def by_hand(i: Instruction, zero: np.ndarray) -> list[list[int]]:
    """The numbers of the chunks that each tile passes over, as the page on the machine says it."""
    tiles = []
    for outer in range(i.outer):
        for inner in range(i.inner):
            tile = i.a + outer * i.a_outer + inner * i.a_inner
            whole = [n for n in range(1, i.depth) if (n + 1) * R <= i.depth]
            tiles.append([n for n in whole if all(zero[tile + n * R + k] for k in range(R))])
    return tiles


@pytest.mark.parametrize("seed", range(20))
def test_chunks_are_those_whose_words_are_all_zero(seed: int) -> None:
    rng = np.random.default_rng(seed)
    zero = np.repeat(rng.random(64) < 0.6, R)
    zero[rng.integers(0, zero.size, 5)] ^= True
    counts = {name: int(rng.integers(1, 4)) for name in ("outer", "inner")}
    places = {name: R * int(rng.integers(0, 8)) for name in ("a", "a_outer", "a_inner")}
    i = Instruction(MATRIX, depth=int(rng.integers(2 * R, 60)), **counts, **places)
    assert [list(np.flatnonzero(tile)) for tile in skipped_chunks(TINY, i, zero)] == by_hand(i, zero)


def test_only_dense_tiles_of_two_chunks_that_begin_with_one_may_skip() -> None:
    i = Instruction(MATRIX, depth=2 * R, a=R, a_outer=3 * R, a_inner=2 * R)
    zero = np.ones(1024, np.bool_)
    assert may_skip(TINY, i)
    assert skipped_chunks(TINY, i, zero).any()
    changes = [{"depth": 2 * R - 1}, {"a": R + 1}, {"a_outer": 3 * R + 2}, {"a_inner": 1}]
    for other in [*(i.replace(**change) for change in changes), i.replace(depth=32, weights=Weights.INT4_32)]:
        assert not may_skip(TINY, other)
        assert not skipped_chunks(TINY, other, zero).any()
    assert not may_skip(TINY, i.replace(depth=32, sparsity=Sparsity.TWO_OF_FOUR))
    assert not may_skip(TINY.replace(zero_skipping=False), i)


def test_words_that_nobody_wrote_are_not_zero() -> None:
    core = GoldenCore(TINY, np.zeros(4096, np.uint8))
    product = Instruction(MATRIX, depth=8 * R)
    core.execute(product)
    assert core.skipped_chunks == 0
    core.execute(Instruction(LOAD, memory=Memory.ACTIVATION, words=3 * R, local=R))
    core.execute(product)
    assert core.skipped_chunks == 3
    core.vector[:] = 3
    core.execute(Instruction(VECTOR, source=Source.VECTOR, destination=Destination.ACTIVATION, columns=1, to=2 * R + 1))
    core.execute(product)
    assert core.skipped_chunks == 3 + 2


def test_a_core_without_the_feature_is_the_core_that_it_was() -> None:
    ulx3s = preset("ulx3s")
    assert ulx3s.crc == 0x81184C71
    assert ulx3s.crc != ulx3s.replace(zero_skipping=True).crc
    assert "SKIPPED_CHUNKS" in core_counters(TINY)
    assert "SKIPPED_CHUNKS" not in core_counters(ulx3s)
    assert [r.name for r in registers_of(TINY)] == [*(r.name for r in registers_of(ulx3s)), "COUNT_SKIPPED_CHUNKS"]


@pytest.mark.parametrize("changes", [{"rows": 2, "columns": 2, "lanes": 2}, {"activation_words": 64}])
def test_small_arrays_and_memories_have_no_chunks(changes: dict[str, int]) -> None:
    like: CoreConfig = preset("paper") if "activation_words" in changes else TINY
    with pytest.raises(ConfigurationError, match="zero_skipping needs at least 4 rows and 2 words of ACTIVATION a row"):
        like.replace(**changes)
    like.replace(**changes, zero_skipping=False)
