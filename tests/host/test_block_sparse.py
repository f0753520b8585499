"""Block-sparse attention: the bits of the contract with a mask, skipped blocks that cost nothing, named mistakes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from command_line import Command
from lockstep.bench.measure import BenchError
from lockstep.bench.sparse_attention import Operands, random_operands, run_attention, sparse_limit
from lockstep.bench.sparse_masks import pattern_mask, read_mask
from lockstep.compiler.block_mask import BlockMaskError, BlockSparse, default_tile, dense_mask, room, strips
from lockstep_driver import open_device
from lockstep_isa import attention
from lockstep_isa.config import PRESETS
from lockstep_isa.quantisation import quantise_rows
from support import assert_same_bits

LAPTOP = PRESETS["laptop"]


def masked(work: BlockSparse, operands: Operands) -> np.ndarray:
    """The contract's attention, each element looked up in the mask by itself."""
    block, tokens = work.block, work.tokens
    expected = np.empty(operands.q.shape, np.float32)
    for head in range(work.heads):
        seen = np.zeros((tokens, tokens), np.bool_)
        for query in range(tokens):
            for key in range(tokens):
                seen[query, key] = work.mask[head, query // block, key // block] and (key <= query or not work.causal)
        q, k, v = operands.q[head], operands.k[head], operands.v[head]
        expected[head] = attention.attention(q, k, v, tile=work.tile, mask=seen)
    return expected


def check(work: BlockSparse, device: str = "fast:tiny", seed: int = 0) -> None:
    operands = random_operands(work.heads, work.tokens, work.head_dim, seed)
    with open_device(device) as opened:
        assert_same_bits(run_attention(opened, work, operands).values[0], masked(work, operands))


def uneven(blocks: int) -> np.ndarray:
    """A head that keeps everything, one that keeps its diagonal, and one that keeps some."""
    mask = pattern_mask("random:0.6", 3, blocks, True, 1)
    mask[0] = dense_mask(1, blocks, True)[0]
    mask[1] = np.eye(blocks, dtype=np.bool_)
    return mask


def without_first_column(blocks: int) -> np.ndarray:
    """Nobody but the first query block sees the first block of keys; nobody keeps its own block but the first two."""
    mask = dense_mask(2, blocks, True)
    mask[:, 1:, 0] = False
    for block in range(2, blocks):
        mask[:, block, block] = False
    return mask


# --- Bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [64, 128, 256])
@pytest.mark.parametrize("mask", [uneven(4), without_first_column(4)], ids=["uneven", "no first column"])
def test_masks_have_the_bits_of_golden_with_any_tile(mask: np.ndarray, tile: int) -> None:
    check(BlockSparse(mask, 64, 16, tile))


@pytest.mark.parametrize("pattern", ["causal", "window:1", "window:2", "sinks:1+window:2", "random:0.5"])
def test_patterns_have_the_bits_of_golden(pattern: str) -> None:
    check(BlockSparse(pattern_mask(pattern, 2, 6, True, 3), 8, 20, 8))


@pytest.mark.parametrize("pattern", ["window:2", "random:0.3"])
def test_queries_may_see_what_comes_later(pattern: str) -> None:
    mask = pattern_mask(pattern, 2, 5, False, 3)
    assert np.triu(mask, 1).any()
    check(BlockSparse(mask, 64, 8, 192, causal=False))


@pytest.mark.parametrize("device", ["fast:tiny", "fast:laptop?without=zero_skipping"])
@pytest.mark.parametrize(("density", "seed"), [(0.0, 0), (0.15, 1), (0.5, 2)])
def test_any_mask_has_the_bits_of_golden(density: float, seed: int, device: str) -> None:
    mask = np.random.default_rng(seed).random((3, 6, 6)) < density
    mask[1] &= seed != 1
    work = BlockSparse(mask, 16, 20, 16)
    head, block = work.empty[0]
    assert not masked(work, random_operands(3, work.tokens, 20))[head, block * 16].any()
    check(work, device)


def test_what_comes_after_a_query_is_not_seen() -> None:
    mask = np.random.default_rng(0).random((2, 5, 5)) < 0.7
    assert np.triu(mask, 1).any()
    work = BlockSparse(mask, 64, 16, 320)
    assert (work.mask == np.tril(mask)).all()
    assert BlockSparse(mask, 64, 16, 320, causal=False).kept == mask.sum()
    check(work)


def test_zeros_are_stored_while_the_array_is_busy() -> None:
    """Of 2,048 tokens about half of the query blocks keep nothing; their zeros cost no time of their own."""
    mask = pattern_mask("random:0.3", 4, 32, True, 0)
    mask[:, ::2] = False
    work = BlockSparse(mask, 64, 64, 2048)
    with open_device("fast:laptop") as device:
        cycles = run_attention(device, work, random_operands(4, 2048, 64)).counters.cycles
    assert cycles <= 1.06 * sparse_limit(LAPTOP, work).cycles  # 1.15 where they all come first, or last


@pytest.mark.parametrize("head_dim", [1, 3, 30])
def test_heads_need_not_fill_panels(head_dim: int) -> None:
    check(BlockSparse(uneven(3), 16, head_dim, 16))


def test_one_block_is_plain_causal_attention() -> None:
    check(BlockSparse(dense_mask(1, 1, True), 64, 16, 64))


@pytest.mark.parametrize(("tile", "head_dim"), [(64, 16), (704, 128)])
def test_a_peak_lasts_through_tiles_and_pieces_of_a_tile(tile: int, head_dim: int) -> None:
    # With 128 features, a product takes eight of the eleven blocks of keys at once.
    work = BlockSparse(dense_mask(1, 11, True), 64, head_dim, tile)
    operands = random_operands(1, work.tokens, head_dim)
    # Exponents of the first keys are hundreds above those of the others: beyond float32, were they not the peak.
    operands.q[:] = np.abs(operands.q)
    operands.k[:, :64] = 200
    with open_device("fast:laptop") as device:
        assert_same_bits(run_attention(device, work, operands).values[0], masked(work, operands))


@pytest.mark.parametrize("tile", [320, 640])
def test_rows_of_a_block_are_taken_apart_where_their_scores_do_not_fit(tile: int) -> None:
    work = BlockSparse(uneven(10), 64, 64, tile)
    core = PRESETS["ulx3s"]
    found = strips(core, work)
    heights = {strip.tiles for strip in found}
    assert (len(heights) > 1) == (tile == 640)
    space = room(core, work)
    for strip in found:
        keys = max(len(section) for section in strip.sections) * work.block
        assert keys * strip.tiles <= min(space.scores, space.probabilities)
    check(work, "fast:ulx3s")


def test_every_row_is_in_one_strip_and_the_longest_come_first() -> None:
    work = BlockSparse(uneven(32), 64, 128, 2048)
    found = strips(LAPTOP, work)
    rows = np.zeros((work.heads, work.mask.shape[1], 4), int)
    for strip in found:
        rows[strip.head, strip.block, strip.first : strip.first + strip.tiles] += 1
        assert [block for section in strip.sections for block in section] == list(
            np.flatnonzero(work.mask[strip.head, strip.block])
        )
    assert (rows == 1).all()
    lengths = [strip.kept * strip.tiles for strip in found]
    assert lengths == sorted(lengths, reverse=True)


# --- Skipping -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_array_is_busy_with_kept_blocks_only(head_dim: int) -> None:
    for pattern in ("causal", "random:0.3", "window:2"):
        work = BlockSparse(pattern_mask(pattern, 2, 8, True, 0), 64, head_dim, 512)
        operands = random_operands(2, 512, head_dim)
        with open_device("fast:laptop") as device:
            counters = run_attention(device, work, operands).counters
        # A block is 4 x 4 tiles of head_dim words, and 4 x (head_dim / 16) tiles of 64. On the diagonal the last 48, 32
        # and 16 words of three of these four are zero, and are passed over.
        each, zeros = 16 * head_dim + head_dim // 4 * 64, head_dim // 16 * (48 + 32 + 16)
        steps = work.kept * each - 16 * zeros
        assert counters.mac_cycles == steps
        assert counters.skipped_chunks == 16 * zeros / 16
        assert sparse_limit(LAPTOP, work).cycles == steps


def test_keys_that_no_query_keeps_are_never_read() -> None:
    work = BlockSparse(without_first_column(5), 64, 16, 320)
    work.mask[:, :, 2] = False
    work.mask[:, 2, 1] = True
    clean = random_operands(work.heads, work.tokens, work.head_dim)
    poisoned = Operands(clean.q, clean.k.copy(), clean.v.copy())
    for values in (poisoned.k, poisoned.v):
        values[:, 2 * 64 : 3 * 64] = np.nan
    with open_device("fast:tiny") as device:
        assert_same_bits(run_attention(device, work, poisoned).values[0], masked(work, clean))


@pytest.mark.parametrize(("head_dim", "density"), [(64, 0.2), (64, 0.6), (128, 0.3)])
def test_cycles_shrink_as_blocks_do(head_dim: int, density: float) -> None:
    work = BlockSparse(pattern_mask(f"random:{density}", 4, 16, True, 0), 64, head_dim, 1024)
    operands = random_operands(4, 1024, head_dim)
    with open_device("fast:laptop") as device:
        dense, sparse = (run_attention(device, one, operands).counters.cycles for one in (work.dense, work))
    assert work.density == pytest.approx(density, abs=0.002)
    assert dense / sparse >= 0.9 / work.density
    assert dense <= 1.02 * sparse_limit(LAPTOP, work.dense).cycles


def test_the_limit_counts_bytes_where_those_take_longer() -> None:
    work = BlockSparse(np.eye(4, dtype=np.bool_)[None], 16, 16, 16)
    # 4 blocks of 16 + 16 array cycles; q 64 * 20, keys and values 64 * 40, results 64 * 64 bytes over 16.
    assert sparse_limit(LAPTOP, work).cycles == (64 * 20 + 64 * 40 + 64 * 64) / 16


# --- Masks ----------------------------------------------------------------------------------------------------------


def test_patterns_keep_what_they_say() -> None:
    kept = pattern_mask("sinks:1+window:2", 1, 5, True, 0)[0].astype(int).tolist()
    assert kept == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 0, 1, 1]]
    assert (pattern_mask("causal", 2, 5, False, 0) == np.tril(np.ones((5, 5), np.bool_))).all()
    assert pattern_mask("window:1", 1, 3, False, 0)[0].tolist() == np.eye(3, dtype=np.bool_).tolist()
    drawn = pattern_mask("random:0.4", 8, 32, True, 0)
    assert drawn.sum() == round(0.4 * 8 * 32 * 33 / 2)
    assert drawn[:, np.arange(32), np.arange(32)].all()
    assert not np.triu(drawn, 1).any()
    heads = drawn.sum(axis=(1, 2))
    assert heads.max() > 1.5 * heads.min()
    assert (drawn == pattern_mask("random:0.4", 8, 32, True, 0)).all()
    assert (drawn != pattern_mask("random:0.4", 8, 32, True, 1)).any()


def test_a_tile_is_as_long_as_blocks_allow() -> None:
    assert default_tile(64, 512) == 512
    assert default_tile(64, 4096) == 2048
    assert default_tile(192, 4032) == 1920
    assert default_tile(32, 512) == 32


def test_operands_are_quantised_row_by_row() -> None:
    operands = random_operands(2, 8, 4)
    values, scales = operands.quantised["k"]
    expected, factors = quantise_rows(operands.k[1])
    assert (values[1] == expected).all()
    assert_same_bits(scales[1], factors)


# --- Mistakes -------------------------------------------------------------------------------------------------------


def test_mistakes_in_masks_are_named() -> None:
    good = BlockSparse(dense_mask(2, 4, True), 64, 16, 256)

    def refused(match: str, **changes: object) -> None:
        with pytest.raises(BlockMaskError, match=match):
            strips(LAPTOP, dataclasses.replace(good, **changes))  # type: ignore[arg-type]

    refused("of uint8", mask=good.mask.astype(np.uint8))
    refused(r"not \[4, 4\]", mask=good.mask[0])
    refused(r"not \[2, 4, 3\]", mask=good.mask[:, :, :3])
    refused("100 tokens are no multiple of the 16 rows of core 'laptop'", block=100, tile=100)
    refused("no whole number of blocks of 64", tile=100)
    refused("multiple of 64 keys", block=32, tile=64)


def test_files_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "mask.npy"
    np.save(file, dense_mask(2, 4, True))
    assert read_mask(file, None, None).sum() == 20
    with pytest.raises(BenchError, match="has 2 heads, --heads ask for 3"):
        read_mask(file, 3, None)
    with pytest.raises(BenchError, match="has 4 blocks of tokens"):
        read_mask(file, None, 5)
    (tmp_path / "no.npy").write_text("no array")
    with pytest.raises(BenchError, match=r"no\.npy is no array of NumPy; write it with numpy\.save"):
        read_mask(tmp_path / "no.npy", None, None)
    with pytest.raises(BenchError, match=r"missing\.npy cannot be read: No such file"):
        read_mask(tmp_path / "missing.npy", None, None)


# --- The command ----------------------------------------------------------------------------------------------------


def test_the_command_compares_with_dense_attention(cli: Command, tmp_path: Path) -> None:
    file = tmp_path / "mask.npy"
    np.save(file, uneven(4))
    arguments = ("bench", "sparse-attention", "--mask", file, "--head-dim", 32, "--device", "fast:laptop")
    (one,) = cli(*arguments, "--json").json
    work = BlockSparse(uneven(4), 64, 32, 256)
    assert one["identical"]
    assert one["values_compared"] == 3 * 256 * 32
    assert one["density"] == pytest.approx(work.kept / 30)
    assert one["speedup"] == pytest.approx(one["dense_cycles"] / one["cycles"])
    assert one["speedup_over_inverse_density"] == pytest.approx(one["speedup"] * one["density"])
    assert one["limit_cycles"] == sparse_limit(LAPTOP, work).cycles
    assert "results to device memory" in one["inside"]
    shown = cli(*arguments)
    assert "1 of 1 have the bits of golden" in shown.out
    assert "speedup over inverse density" in shown.out
    assert "0.9 / density times as fast as dense" in shown.out


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--pattern", "stripes"), ("'stripes' is no pattern", "sinks:S+window:W")),
        (("--pattern", "window:0"), ("at least 1 block",)),
        (("--pattern", "random:0.01"), ("the diagonal alone", "not 0.01")),
        (("--block", "40"), ("blocks of 40 tokens", "16 rows of core 'laptop'")),
        (("--seq", "100"), ("100 tokens", "blocks of 64")),
        (("--block", "0"), ("--block",)),
        (("--heads", "0"), ("--heads",)),
        (("--head-dim", "0"), ("0 features",)),
        (("--head-dim", "33", "--device", "fast:paper"), ("33 features", "128 bytes of the bus")),
        (("--head-dim", "2048"), ("WEIGHT memory", "smaller blocks")),
        (("--device", "fast:ulx3s", "--seq", "2048", "--pattern", "causal"), ("query block", "shorter tile")),
    ],
)
def test_mistakes_are_named(cli: Command, arguments: tuple[str, ...], parts: tuple[str, ...]) -> None:
    device = () if "--device" in arguments else ("--device", "fast:laptop")
    cli("bench", "sparse-attention", *arguments, *device).refused(2, *parts)
